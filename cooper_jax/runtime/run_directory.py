"""The run directory: all files of a run, and the checks before it resumes.

    config.json     `format` and every field of the config of the latest start (stored_config.py)
    metrics.jsonl   one object per step: `step` and slash-grouped names
    environment.json  versions, system and devices of the latest start (environment.py)
    provenance.json  the same of the first start, and digests of the inputs (trainer/input_digests.py)
    samples.jsonl   prompts with their completions, verdicts, scores
    supervised.jsonl  figures of the phases before step 1: `phase`, `step` of the phase, and names
    checkpoints/    see checkpoint.py
    trackers.json   how far the trackers of `log.to` are (trackers/run_trackers.py), whose files may lie beside it
    tensorboard/    metrics and samples as TensorBoard events; those of the phases before step 1 in supervised/
    lock            held by the process that writes here

1. `check_shared(path)` checks, with several processes, that all see what process 0 writes.
2. `RunDirectory(path, config, resume)` locks the directory, and checks that a run with this config may resume
   there.
3. `truncate(step)` truncates metrics and samples to the checkpoint from which the run resumes.
4. `log`, `log_phase` and `dump_samples` append.  A step must be logged, and `flush` called, *before* its checkpoint
   is saved: if the process is killed in between, the step is repeated, and no line is missing.

With several processes only process 0 checks, locks and writes; the others do not need access to the files
that this module writes.

Nothing can be appended to an object under gs://.  Lines and events are written to `remote_files.staging_dir`
on the first host's disk, and whole files are uploaded in the background; `flush` waits for the uploads.  On a
restart, the bucket's files replace the staged files.  The lock file is in the staging directory, so it only
excludes processes of the same machine: nothing stops two machines from using one run directory.
"""

from __future__ import annotations

import fcntl
import json
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
from cooper_jax.runtime.environment import write_environment
from cooper_jax.runtime.metric_glossary import TRACKER_FAILURES
from cooper_jax.runtime.metrics import JsonLines, parse_numbers, read_lines
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.runtime.stored_config import (
    FORMAT,
    describe_changes,
    flatten_config,
    read_stored_config,
    to_plain_config,
)
from cooper_jax.runtime.trackers.run_trackers import STATE_FILE, RunTrackers
from cooper_jax.runtime.trackers.tracker import EVENT_FOLDERS, TENSORBOARD_FOLDER
from cooper_jax.runtime.trackers.tracker_choice import ChosenTracker, load_trackers


def run_path(config: ConfigDict) -> Path | epath.Path:
    """Return the path of a config's run: run_dir, or runs/<name>.

    Raises ValueError for an address that is not under gs://.
    """
    return remote_files.to_path(config.run_dir or f"runs/{config.name}")


def check_shared(path: str | Path | epath.Path) -> None:
    """Raise ValueError on all processes unless each of them can read what process 0 writes to a directory.

    All processes must call it.  The directory is created if it does not exist.
    """
    # Every process writes its shards of a checkpoint: with separate disks no complete checkpoint would exist.
    if jax.process_count() == 1:
        return
    folder = epath.Path(path) if remote_files.is_remote(path) else Path(path)

    # A random name, so that a marker of an earlier start is not mistaken for this one.
    def write_marker() -> bytes:
        marker = f".seen_by_all_{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / marker).write_bytes(b"")
        except (OSError, ImportError) as error:
            return json.dumps({"error": f"{folder} cannot be written to ({error})"}).encode()
        return json.dumps({"marker": marker}).encode()

    # Errors are exchanged, not raised by the process that has them: the others would wait forever.
    answer = json.loads(hosts.broadcast_value("run_dir mark", write_marker))
    if "error" in answer:
        raise ValueError(answer["error"])
    try:
        problem = "" if (folder / answer["marker"]).exists() else "not there"
    except (OSError, ImportError) as error:
        problem = str(error)
    problems = hosts.exchange_json("run_dir seen", problem)
    if hosts.is_primary():
        (folder / answer["marker"]).unlink()

    failed = {process: text for process, text in enumerate(problems) if text}
    if failed:
        raise ValueError(
            f"{folder} is not one directory for all hosts: what process 0 wrote there, process "
            f"{', '.join(map(str, failed))} did not find ({next(iter(failed.values()))}), and each must "
            "write its part of a checkpoint: give a --config.run_dir on a disk that they share, or "
            "gs://BUCKET/NAME"
        )


class RunDirectory:
    """An open run directory; a context manager.

        with (
            RunDirectory(run_path(config), config, config.resume) as run,
            Checkpoints(run.path, config.checkpoint.keep) as checkpoints,
        ):
            run.truncate(checkpoints.newest())
            for step in ...:
                run.log(step, metrics)

    Raises ValueError if another process has the lock, or if the directory has checkpoints and either `resume`
    is False or the config differs from theirs in a field that must stay.
    """

    def __init__(
        self, path: str | Path | epath.Path, config: ConfigDict, resume: bool, uncovered: int | None = None
    ):
        """Lock the directory, check that the run may begin or resume here, and store its config.

        uncovered: the last step whose metrics a killed run can have without any checkpoint.  If there are later
          ones and no checkpoint, checkpoints are lost: ValueError, before anything is written.  None: not checked.
        """
        self.path = remote_files.to_path(path)
        self.config = config
        self.primary = hosts.is_primary()
        self._remote = remote_files.is_remote(self.path)

        # Local files; a remote run directory has them in the staging directory.
        self._folder = remote_files.staging_dir(self.path) if self._remote else self.path
        self._uploads: remote_files.Uploads | None = None
        self._lock: int | None = None  # file descriptor
        self._chosen_trackers: list[ChosenTracker] = []
        self._trackers: RunTrackers | None = None  # until `truncate`
        self._metrics = JsonLines(self._folder / "metrics.jsonl")
        self._samples = JsonLines(self._folder / "samples.jsonl")
        self._phases = JsonLines(self._folder / "supervised.jsonl")

        # Guards against lines out of order.
        self._last_step: int | None = None
        self._ready = False  # `truncate` was called
        if not self.primary:
            return

        # Lock first: the checks read files that another process might be writing.
        self._chosen_trackers = load_trackers(config.log.to)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self._folder / "lock", self.path, "--config.run_dir")
        try:
            self._check_resume(resume, uncovered)
            # Stored at every start, because a resumed run may change some fields.
            text = json.dumps({"format": FORMAT} | to_plain_config(config), indent=2, allow_nan=False)
            write_atomically(self.path / "config.json", text.encode() + b"\n")
            write_environment(self.path)
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
            # The error that ended the run is more important than a failed upload.
            error.add_note(str(failed))

    def close(self) -> None:
        """Flush, and release the lock.  Raises OSError for files that could not be uploaded."""
        self._ready = False
        self._metrics.close()
        self._samples.close()
        self._phases.close()

        # The lock must be released even if an upload fails.
        try:
            self._close_trackers()
        finally:
            try:
                if self._uploads is not None:
                    self._uploads.close()
            finally:
                self._uploads = None
                if self._lock is not None:
                    os.close(self._lock)  # also unlocks
                    self._lock = None

    def truncate(self, step: int | None, uncovered: int | None = None) -> None:
        """Prepare to continue after the newest checkpoint's `step` (None: step 0), before the first `log`.

        Drops metrics and samples of later steps, and an incomplete last line; with None also the figures of the
        phases before step 1, which run again.  Warns if metrics up to `step`
        are missing.  Raises ValueError for a malformed line.

        uncovered: the last step whose metrics a killed run can have without any checkpoint.  If there are later
          ones and `step` is None, checkpoints are lost: nothing is dropped, and ValueError raised.  None: not
          checked.
        """
        # All processes check the order of steps; only the first one has files.
        self._last_step = step
        self._ready = True
        if not self.primary:
            return

        if self._remote:
            # TensorBoard writes a new file at every start, so staged events are not needed any more.  For the
            # lines, the bucket's files count: this machine may not be the one that ran last.
            shutil.rmtree(self._folder / TENSORBOARD_FOLDER, ignore_errors=True)
            for lines in (self._metrics, self._samples, self._phases):
                remote_files.download_file(self.path / lines.path.name, lines.path)
            if self._uploads is None:
                self._uploads = remote_files.Uploads(self._folder, self.path)

        # A run that goes back to an earlier checkpoint calls this again.
        self._close_trackers()
        if step is None and uncovered is not None:
            self._refuse_lost_checkpoints(uncovered)

        # Later steps will be run again.
        last = self._metrics.truncate(step)
        self._samples.truncate(step)
        if step is None:
            self._phases.truncate(None)
        written = (self._metrics, self._samples, self._phases)
        self._upload(*(lines.path.name for lines in written if lines.path.exists()))
        if step and last != step:
            # Only after somebody edited or deleted the file.  Step 0 has no line.
            file = self.path / "metrics.jsonl"
            warnings.warn(f"{file} ends at step {last}, the checkpoint is of step {step}", stacklevel=2)

        if self._chosen_trackers:
            fields = flatten_config(to_plain_config(self.config))
            self._trackers = RunTrackers(self._chosen_trackers, self.path, self._folder, fields, step)

    def keep_copies(self, name: str) -> None:
        """Copy metrics and samples as they are to files with `name` in theirs; to be called before `truncate`.

        Copies of an earlier call stay.  The trackers' state is moved: they begin new runs, as their libraries
        cannot take rows back.
        """
        # Their threads would write the state again with the rows that still wait.
        self._close_trackers()
        if not self.primary:
            return
        for file in ("metrics.jsonl", "samples.jsonl", STATE_FILE):
            source = self.path / file
            if source.exists():
                stem, suffix = file.split(".")
                target, number = self.path / f"{stem}.{name}.{suffix}", 1
                while target.exists():
                    number += 1
                    target = self.path / f"{stem}.{name}.{number}.{suffix}"
                write_atomically(target, source.read_bytes())
        (self.path / STATE_FILE).unlink(missing_ok=True)

    def _refuse_lost_checkpoints(self, uncovered: int) -> None:
        """Raise ValueError if there are metrics of steps that only a run with a checkpoint can have reached."""
        last = self._metrics.read_last_step()
        if last is None or last <= uncovered:
            return
        folder = self.path / "checkpoints"
        others = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        raise ValueError(
            f"{self.path / 'metrics.jsonl'} reaches step {last}, but no checkpoint is left to resume from "
            f"({folder}: {', '.join(others) or 'nothing'}): restore one, or give another --config.run_dir; to "
            "begin again here, move this folder away first"
        )

    def flush(self) -> None:
        """Wait until everything logged is in the run directory; to be called before a checkpoint is saved.

        Returns at once if the run directory is local.  Raises OSError for files that could not be uploaded; a
        later call tries again.
        """
        if self._uploads is not None:
            self._uploads.flush()

    def _upload(self, *names: str) -> None:
        """Tell the uploading thread that these files, or the files of these folders, have changed."""
        if self._uploads is None:
            return
        changed: list[Path] = []
        for path in (self._folder / name for name in names):
            changed += [path] if path.is_file() else [file for file in path.glob("*") if file.is_file()]
        self._uploads.changed(*(str(path.relative_to(self._folder)) for path in changed))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics: names like `policy/kl`, values that can be converted to float.

        The line is on disk when this returns (under gs://, it is being uploaded).  Raises ValueError for a
        step that is not after the last one, or a name without a group; OSError for a line that could not be
        written.
        """
        if not self._ready:
            raise RuntimeError(f"{self.path}: call truncate(step) before the first log")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"{self.path / 'metrics.jsonl'}: step {step} after step {self._last_step}: log each step "
                "once, in ascending order"
            )

        # All processes convert the values, so that all fail on a bad one; process 0 alone writes.
        row: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            if "/" not in name:
                raise ValueError(f"metric {name!r} has no group: call it GROUP/{name}")
            row[name] = float(value)
        self._last_step = step
        if not self.primary:
            return

        # A failure is counted from the next row on: trackers work behind the run.
        if self._trackers is not None and (failures := self._trackers.failures):
            row[TRACKER_FAILURES] = float(failures)
        self._metrics.append(row)
        if self._trackers is not None:
            self._trackers.log(step, {name: value for name, value in row.items() if name != "step"})
            self._print_tracker_messages(self._trackers.take_messages())
        self._upload("metrics.jsonl", *EVENT_FOLDERS)

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Append figures of an update of a phase before step 1, such as its loss; steps count from 1 in each phase.

        Raises OSError for a line that could not be written.
        """
        if not self._ready:
            raise RuntimeError(f"{self.path}: call truncate(step) before the first log")
        row = {name: float(value) for name, value in figures.items()}
        if not self.primary:
            return
        self._phases.append({"phase": phase, "step": step, **row})
        if self._trackers is not None:
            self._trackers.log_phase(phase, step, row)
        self._upload("supervised.jsonl", *EVENT_FOLDERS)

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows that are logged, as floats; none on processes other than the first."""
        if not self.primary or not self._metrics.path.exists():
            return []
        return [parse_numbers(row) for row in read_lines(self._metrics.path)]

    def dump_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (text, numbers, lists and dicts of them) to samples.jsonl, each with the `step`."""
        if not self._ready:
            raise RuntimeError(f"{self.path}: call truncate(step) before the first dump")
        if self.primary and rows:
            self._samples.append(*({"step": step, **row} for row in rows))
            if self._trackers is not None:
                self._trackers.log_samples(step, rows)
            self._upload("samples.jsonl", *EVENT_FOLDERS)

    def _close_trackers(self) -> None:
        """Wait for the trackers, for a bounded time, and print their failures."""
        trackers, self._trackers = self._trackers, None
        if trackers is None:
            return
        trackers.close()
        self._print_tracker_messages(trackers.take_messages() + trackers.describe_failures())
        self._upload(*EVENT_FOLDERS)

    @staticmethod
    def _print_tracker_messages(messages: Sequence[str]) -> None:
        for message in messages:
            hosts.print_once(f"warning: log.to: {message}")

    def _check_resume(self, resume: bool, uncovered: int | None) -> None:
        """Raise ValueError if there are checkpoints from which this config may not resume, or if they are lost."""
        # Without checkpoints the run starts from step 0 and writes all files again.
        steps = list_steps(self.path)
        if not steps:
            if uncovered is not None:
                if self._remote:
                    remote_files.download_file(self.path / self._metrics.path.name, self._metrics.path)
                self._refuse_lost_checkpoints(uncovered)
            return
        if not resume:
            raise ValueError(
                f"{self.path} holds checkpoints {steps} and resume is False: give another --config.run_dir, "
                "or resume with --config.resume=True"
            )

        # config.json is that of the last start, so a field that must stay is equal in all earlier ones.
        stored = self.path / "config.json"
        if not stored.exists():
            raise ValueError(
                f"{stored} is not there, but checkpoints {steps} are: give another --config.run_dir"
            )
        changes = describe_changes(read_stored_config(self.path, self.config), self.config)
        if changes:
            raise ValueError(
                f"{self.path} was begun with another config: {'; '.join(changes)}: give another "
                "--config.run_dir, or the old value"
            )


def lock_folder(path: Path, folder: Path | epath.Path, flag: str) -> int:
    """Take the lock file of a folder; the lock is released when the process ends, even by SIGKILL.

    Args:
      path: the lock file.
      folder: the folder, for messages; the lock file may be elsewhere.
      flag: the command-line flag for another folder, for messages.

    Returns a file descriptor: closing it releases the lock.  Raises ValueError, naming the holder, if the
    folder is locked.
    """
    # Worker processes must not inherit the descriptor, or the lock would outlive this process; Python's
    # default.
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise ValueError(
            f"{folder} is in use by {holder or 'another process'}: stop it, or give another {flag}"
        ) from None
    except OSError as error:
        # Some network file systems have no locks; runs should still be possible there.
        warnings.warn(
            f"{path} cannot be locked ({error}): make sure that no other process uses {folder}", stacklevel=3
        )

    # The file's contents name the holder, for the message above in another process.
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle
