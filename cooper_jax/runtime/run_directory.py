"""The run directory: what a run leaves behind, and what it finds there when it goes on.

    config.json     `format` (FORMAT) and every field of the config, as of the last start
    metrics.jsonl   one object a step: `step` and slash-grouped names
    samples.jsonl   prompts with their completions, verdicts, scores
    checkpoints/    see checkpoint.py
    tensorboard/    the metrics once more, as events
    lock            held by the process that writes here

1. `check_shared(path)`, with several processes: all must see what one of them writes.
2. `Run(path, config, resume)` locks the directory and checks that the config may go on from what is there.
3. `truncate(step)` cuts metrics and samples back to the checkpoint that the run goes on from.
4. `log` and `dump_samples` append.  A step is to be logged, and `flush` called, *before* its checkpoint is saved:
   then a kill in between repeats the step, and no line is missing.

With several processes the first alone looks, locks, writes and finds fault; the others need not have the directory.
Nothing is taken from the environment.

Under gs:// objects cannot be appended to: lines and events are written into `remote_files.staging_dir` on the first host's
disk, and uploaded whole in the background; `flush` waits for that.  What counts on a restart is what lies in the
bucket: the staged files are replaced by it.  The lock is the staging directory's, so it keeps out other processes
of the same machine alone: that no other machine runs in the same place is for whoever starts runs to see to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from cooper_jax.runtime import hosts, remote_files
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.runtime.metrics import JsonLines, to_jsonable
from cooper_jax.runtime.remote_files import write_atomically

# Of run directories, in config.json.  It rises with a change after which older ones cannot be read or resumed.
FORMAT = 1

# Fields that a resumed run may change; a name that ends in a dot stands for its whole section.  They say how
# long, how fast or where a run goes, not what it computes (a mesh moves the last bits, no more).
HARMLESS = (
    "name",
    "steps",
    "run_dir",
    "resume",
    "checkpoint.",
    "log.",
    "mesh.",
    "policy.microbatch",
    "reward.microbatch",
    "rollout.max_rows",
    "rollout.memory_gib",
    "rollout.weight_placement",
    "rollout.kernels",
    "rollout.segment",
    "rule.workers",
    "rule.timeout",
    "rule.retry_timeout",
    "rule.memory_mb",
    "assistant.url",
    "assistant.key_env",
    "assistant.concurrency",
    "assistant.timeout",
    "assistant.retries",
    "judge.",
    "source.",
    "annotate.",
)


def run_path(config: ConfigDict) -> Path | epath.Path:
    """Where a config's run lives: its run_dir, or runs/<name>.  Raises ValueError for an address but gs://."""
    return remote_files.to_path(config.run_dir or f"runs/{config.name}")


def read_stored_config(run_dir: Path | epath.Path, known: ConfigDict) -> dict[str, Any]:
    """The config of a run directory as nested dicts, without `format`.

    known: a config that has all fields there are.  Raises FileNotFoundError without a config.json, ValueError for
    one that is not JSON, and for a directory that another version of this project made.
    """
    stored = run_dir / "config.json"
    if not stored.exists():
        raise FileNotFoundError(f"{stored} is not there: {run_dir} is no run directory of launch/train.py")
    try:
        config = json.loads(stored.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{stored} is not JSON ({error}): fix it, or give another --config.run_dir"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{stored} holds no JSON object: fix it, or give another --config.run_dir")
    number = config.pop("format", None)
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{run_dir} was made by a later version of this project (format {number}, this one reads {FORMAT}): "
            "use that version, or start a new run directory"
        )
    unknown = sorted(flatten_config(config).keys() - flatten_config(_plain(known)).keys())
    if unknown or number != FORMAT:
        shown = f"it has {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        reason = shown if unknown else f"its format is {number or 'not stated'}, this one reads {FORMAT}"
        raise ValueError(
            f"{run_dir} was made by an earlier version of this project ({reason}); start a new run directory"
        )
    return config


def check_shared(path: str | Path | epath.Path) -> None:
    """Raise ValueError, on all processes alike, unless all see what the first one writes to a directory.

    All processes must call it.  The directory is made where it is absent.
    """
    if jax.process_count() == 1:
        return
    place = Path(path) if not remote_files.is_remote(path) else epath.Path(path)

    def write() -> bytes:
        mark = f".seen_by_all_{secrets.token_hex(8)}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / mark).write_bytes(b"")
        except (OSError, ImportError) as error:
            return json.dumps({"error": f"{place} cannot be written to ({error})"}).encode()
        return json.dumps({"mark": mark}).encode()

    told = json.loads(hosts.broadcast_value("run_dir mark", write))
    if "error" in told:
        raise ValueError(told["error"])
    try:
        trouble = "" if (place / told["mark"]).exists() else "not there"
    except (OSError, ImportError) as error:
        trouble = str(error)
    found = hosts.exchange_json("run_dir seen", trouble)
    if hosts.is_primary():
        (place / told["mark"]).unlink()
    if blind := {i: x for i, x in enumerate(found) if x}:
        raise ValueError(
            f"{place} is not one directory for all hosts: what process 0 wrote there, process "
            f"{', '.join(map(str, blind))} did not find ({next(iter(blind.values()))}), and each must write its "
            "part of a checkpoint: give a --config.run_dir on a disk that they share, or gs://BUCKET/NAME"
        )


def flatten_config(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> dotted names; lists are leaves."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out.update(flatten_config(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out


def must_stay(field: str) -> bool:
    """Whether a resumed run must keep this field."""
    return not any(field == h or (h.endswith(".") and field.startswith(h)) for h in HARMLESS)


def config_hash(config: ConfigDict) -> str:
    """16 hex digits over the fields that matter: equal for configs that may go on from one another."""
    fields = {name: value for name, value in flatten_config(_plain(config)).items() if must_stay(name)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class RunDirectory:
    """An open run directory; a context manager.

        with Run(run_path(config), config, config.resume) as run, Checkpoints(run.path, ...) as kept:
            step = kept.newest()
            run.truncate(step)
            ...
            run.log(step, metrics)

    Raises ValueError where the config differs, in a field that matters, from the one that the checkpoints
    there were made with; where `resume` is False and there are checkpoints; where another process holds it.
    """

    def __init__(self, path: str | Path | epath.Path, config: ConfigDict, resume: bool):
        self.path = remote_files.to_path(path)
        self.config = config
        self.primary = hosts.is_primary()
        self._remote = remote_files.is_remote(self.path)
        self._folder = remote_files.staging_dir(self.path) if self._remote else self.path
        self._uploads: remote_files.Uploads | None = None
        self._lock = None
        self._tensorboard = None
        self._metrics = JsonLines(self._folder / "metrics.jsonl")
        self._samples = JsonLines(self._folder / "samples.jsonl")
        self._last: int | None = None
        self._ready = False
        if not self.primary:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self._folder / "lock", self.path, "--config.run_dir")
        try:
            self._check(resume)
            text = json.dumps({"format": FORMAT} | _plain(config), indent=2, allow_nan=False)
            write_atomically(self.path / "config.json", text.encode() + b"\n")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except OSError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what ended the run says more

    def close(self) -> None:
        """Flush, and let go of the directory.  Raises OSError for what could not be uploaded."""
        self._ready = False
        self._metrics.close()
        self._samples.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
                self._tensorboard = None
                self._upload("tensorboard")
        finally:
            try:
                if self._uploads is not None:
                    self._uploads.close()
            finally:
                self._uploads = None
                if self._lock is not None:
                    os.close(self._lock)  # which also unlocks
                    self._lock = None

    def truncate(self, step: int | None) -> None:
        """Go on after `step`, the newest checkpoint's (None: from the beginning); due before the first `log`.

        Drops metrics and samples of later steps, and a line torn by a kill.  Warns where metrics up to
        `step` are missing.  Raises ValueError for a malformed line.
        """
        self._last = step
        self._ready = True
        if not self.primary:
            return
        if self._remote:
            shutil.rmtree(
                self._folder / "tensorboard", ignore_errors=True
            )  # of an earlier life, and uploaded
            for lines in (self._metrics, self._samples):
                remote_files.download_file(self.path / lines.path.name, lines.path)
            if self._uploads is None:
                self._uploads = remote_files.Uploads(self._folder, self.path)
        last = self._metrics.truncate(step)
        self._samples.truncate(step)
        self._upload(*(x.path.name for x in (self._metrics, self._samples) if x.path.exists()))
        if step and last != step:  # step 0 has no line
            where = self.path / "metrics.jsonl"
            warnings.warn(f"{where} ends at step {last}, the checkpoint is of step {step}", stacklevel=2)
        if self.config.log.tensorboard:
            # The readers of events drop those of an earlier life from purge_step on.
            purge_step = 0 if step is None else step + 1
            from tensorboardX import SummaryWriter  # which imports torch where there is one: seconds

            self._tensorboard = SummaryWriter(
                str(self._folder / "tensorboard"), purge_step=purge_step, filename_suffix=f".{purge_step}"
            )

    def flush(self) -> None:
        """Until what was logged lies in the run directory; to be called before a checkpoint is saved.

        Locally it does at once.  Raises OSError for what could not be uploaded; it is kept, and a later call tries
        again.
        """
        if self._uploads is not None:
            self._uploads.flush()

    def _upload(self, *names: str) -> None:
        """These files, or the files of these folders, have changed."""
        if self._uploads is None:
            return
        found = [p for n in names for p in ([self._folder / n] if (self._folder / n).is_file() else [])]
        found += [p for n in names for p in (self._folder / n).glob("*")]
        self._uploads.changed(*(str(p.relative_to(self._folder)) for p in found))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics: names like `policy/kl`, values that are or become floats.

        The line is on the disk when this returns (under gs://, on its way there).  Raises ValueError for a step
        that is not after the last, or a name without a group; OSError for a line that could not be written.
        """
        if not self._ready:
            raise RuntimeError(f"{self.path}: call truncate(step) before the first log")
        if self._last is not None and step <= self._last:
            raise ValueError(
                f"{self.path / 'metrics.jsonl'}: step {step} after step {self._last}; one line a step, forwards"
            )
        row: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            if "/" not in name:
                raise ValueError(f"metric {name!r} has no group: call it GROUP/{name}")
            row[name] = float(value)
        self._last = step
        if not self.primary:
            return
        self._metrics.append(row)
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):  # the writer warns at each other one
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        self._upload("metrics.jsonl", "tensorboard")

    def dump_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (text, numbers, lists and dicts of them) to samples.jsonl, each with its `step`."""
        if not self._ready:
            raise RuntimeError(f"{self.path}: call truncate(step) before the first dump")
        if self.primary and rows:
            self._samples.append(*({"step": step, **row} for row in rows))
            self._upload("samples.jsonl")

    def _check(self, resume: bool) -> None:
        steps = list_steps(self.path)
        if not steps:
            return  # nothing here that a start from the beginning could not make again
        if not resume:
            raise ValueError(
                f"{self.path} holds checkpoints {steps} and resume is False: give another --config.run_dir, or "
                "go on with --config.resume=True"
            )
        stored = self.path / "config.json"
        if not stored.exists():
            raise ValueError(
                f"{stored} is not there, but checkpoints {steps} are: give another --config.run_dir"
            )
        old = flatten_config(read_stored_config(self.path, self.config))
        new = flatten_config(_plain(self.config))
        absent = "(absent)"
        changed = [
            f"{name} was {json.dumps(old[name]) if name in old else absent} and is now "
            f"{json.dumps(new[name]) if name in new else absent}"
            for name in sorted(old.keys() | new.keys())
            if must_stay(name) and (name not in old or name not in new or old[name] != new[name])
        ]
        if changed:
            raise ValueError(
                f"{self.path} was begun with another config: {'; '.join(changed)}: give another "
                "--config.run_dir, or the old value"
            )


def _plain(config: ConfigDict) -> dict[str, Any]:
    """A config as what its JSON would read back as: dicts, lists, strings, numbers."""
    return to_jsonable(config.to_dict())


def lock_folder(path: Path, folder: Path | epath.Path, flag: str) -> int:
    """Take the lock of a folder, or raise ValueError with its holder; it goes with the process, however that ends.

    flag: names another folder, for the message.  Returns a handle: closing it unlocks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by worker processes
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise ValueError(
            f"{folder} is in use by {holder or 'another process'}: stop it, or give another {flag}"
        ) from None
    except OSError as error:
        # Some network file systems have no locks, which is no reason not to run there.
        warnings.warn(
            f"{path} cannot be locked ({error}): see that one process alone runs here", stacklevel=3
        )
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle
