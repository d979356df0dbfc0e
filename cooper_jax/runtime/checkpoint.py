"""Checkpoints: the state that a run needs to resume, and weights that other jobs load.

    <run_dir>/checkpoints/<step>/policy             f32 master weights
                                 policy_optimiser   moments and counters
                                 reward             (not in the rule arm)
                                 reward_optimiser   (not in the rule arm)
                                 loop               JSON: step, format, items, checksums of all arrays, and the
                                                    caller's own fields
    <run_dir>/reference/                            the policy at step 0, stored because its source may change
    <run_dir>/reference_checksums.json              of its arrays

1. Items are stored separately, so that weights can be restored without the optimiser.
2. Orbax writes a checkpoint into a temporary directory in the background and renames it at the end, so that
   SIGKILL at any time leaves only complete checkpoints visible.  For the same reason old checkpoints are
   renamed before they are deleted.  The next start deletes leftovers of both.  Under gs://, where directories
   cannot be renamed, Orbax writes a marker file at the end: a checkpoint with a marker is complete, and
   deleting a checkpoint starts with its marker.
3. `restore` takes a tree of `jax.ShapeDtypeStruct` with shardings, on any mesh.  The stored bits do not
   depend on the mesh, but the padding of the vocabulary does: `vocab_size` is the number of real rows, and
   rows of padding are added or dropped.
4. What is read is compared with the checksums (checksums.py), so that no changed bit passes for a weight.
   Checkpoints of earlier commits have none, and are not compared.
5. A checkpoint that cannot be read, or whose arrays are damaged, is renamed to `<step>.unreadable` (under gs://,
   moved to `unreadable/<step>`) with a warning, and the checkpoint before it is used.  A checkpoint that can be
   read but does not fit (shapes, dtypes, format) is an error.
6. After a save, checkpoints older than the newest `keep` ones are deleted.  Only complete checkpoints that this
   process has written or could read are counted among these, so that damaged ones displace none.

With several processes, each writes and reads its own shards, in a directory that all of them share.  All must
call the methods below in the same order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from cooper_jax.runtime import hosts, remote_files
from cooper_jax.runtime.checkpoint_checks import (
    Unreadable,
    check_fit,
    find_first_cause,
    raise_unreadable,
    shorten_error,
)
from cooper_jax.runtime.checksums import find_damaged, make_checksums
from cooper_jax.runtime.optim import select_trained
from cooper_jax.types import Params, TrainState

FORMAT = 1  # to be raised when the meaning of stored data changes
LOOP = "loop"  # item with the loop's JSON
_RESERVED = (
    "step",
    "format",
    "items",
    "checksums",
    "digest",
)  # fields of the loop's JSON that `save` itself writes

# File and folder names with which Orbax tells complete checkpoints from incomplete ones.
_COMMITTED = ocp.path.atomicity_types.COMMIT_SUCCESS_FILE  # marks a complete checkpoint under gs://
_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX  # in the name of an incomplete one on a local disk


def split_state(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """Split a TrainState into (trained weights, optimiser tree), the two items that it is stored as.

    The frozen base of adapters is not stored: it is read from its source again.
    """
    return select_trained(state.params), {
        "opt_state": state.opt_state,
        "updates": state.updates,
        "skipped": state.skipped,
    }


def join_state(params: Params, optimiser: dict[str, Any], frozen: Params | None = None) -> TrainState:
    """Undo `split_state`.  frozen: the weights that it leaves out; None: there are none."""
    return TrainState(params=(frozen or {}) | params, **optimiser)


def delete_stored(state: TrainState) -> Params:
    """Delete the arrays of a state that checkpoints store, and return its other weights."""
    stored = split_state(state)
    jax.tree.map(lambda x: x.delete(), stored)
    return {name: value for name, value in state.params.items() if name not in stored[0]}


def abstract_like(tree: Any) -> Any:
    """Make the tree of ShapeDtypeStruct with shardings that `restore` takes, from a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def list_steps(run_dir: str | Path | epath.Path) -> list[int]:
    """List the steps of the complete checkpoints in a run directory, ascending."""
    folder = remote_files.to_path(run_dir) / "checkpoints"
    if not folder.exists():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and _is_complete(p))


def _is_complete(path: Path | epath.Path) -> bool:
    return (path / _COMMITTED).exists() if remote_files.is_remote(path) else path.is_dir()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own look for a SIGTERM.

    JAX agrees on one number at which all processes stop.  A look by the manager, which counts in steps, would
    replace the number of `hosts.raise_if_stopping`, which then never comes.
    """

    def reached_preemption(self, step: int) -> bool:
        """Return False: the training loop decides when to save and to stop."""
        return False


class Checkpoints:
    """The checkpoints of one run directory; a context manager.

    Args:
      keep: number of newest checkpoints that are kept; 0 keeps all.
      read_only: nothing is cleaned up, renamed or saved, because the run may be active in another process.
    """

    def __init__(self, run_dir: str | Path | epath.Path, keep: int, read_only: bool = False):
        if keep < 0:
            raise ValueError(f"checkpoint.keep is {keep}: it is a number of checkpoints, or 0 for all")
        self.run_dir = remote_files.to_path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.reference = self.run_dir / "reference"
        self.keep = keep
        self.read_only = read_only
        self._pending_step: int | None = None  # of the save in progress
        self._readable: set[int] = set()  # steps that this process has written or read completely
        if read_only and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not there: {self.run_dir} holds no checkpoints")

        # Orbax's manager could clean up and delete, too.  But it removes leftovers while other processes may
        # be listing the folder, and deletes checkpoints in place: SIGKILL would leave half a checkpoint
        # visible.
        if hosts.is_primary() and not read_only:
            self._delete_leftovers()
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(create=not read_only, read_only=read_only),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    # --- saving ---

    def save(
        self,
        step: int,
        items: dict[str, Any],
        loop: dict[str, Any],
        vocab_sizes: Mapping[str, int] | None = None,
    ) -> float:
        """Save named pytrees and the loop's JSON in the background; return the seconds of the first wait.

        Waits for the previous save first, so that the host has only one copy of the arrays, and then until
        the arrays are copied to the host: they may be donated as soon as this returns.  If writing fails, the
        next `save`, `wait` or exit raises.  Raises ValueError for a step that is not newer than the newest,
        and for a reserved name.

        vocab_sizes: `vocab_size` of `restore`, by item: checksums leave out the padding.
        """
        if LOOP in items or not items:
            raise ValueError(f"items are named pytrees, none of them {LOOP!r}; given: {sorted(items)}")
        if taken := sorted(set(loop) & set(_RESERVED)):
            raise ValueError(f"the fields {taken} of the loop are written by save itself: leave them out")

        # The seconds are returned as a metric: they grow if the disk is slower than the interval between
        # saves.
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - start

        # Refused here, because Orbax skips such a save instead of raising.
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise ValueError(f"step {step} is not newer than {self.folder / str(newest)}: nothing was saved")
        sizes = vocab_sizes or {}
        checksums = {name: make_checksums(tree, sizes.get(name)) for name, tree in items.items()}
        record = {"step": step, "format": FORMAT, "items": sorted(items), "checksums": checksums, **loop}
        record["digest"] = _digest_record(record)

        # Returns once the arrays are on the host; a background thread writes them.
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        if not self._manager.save(step, args=ocp.args.Composite(**args, **{LOOP: ocp.args.JsonSave(record)})):
            raise RuntimeError(f"{self.folder / str(step)} was not saved")
        self._pending_step = step
        return waited

    def wait(self) -> None:
        """Wait until the save in progress is complete and visible, then delete all but the newest `keep`.

        Raises OSError, with its cause, if the save failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            # The message says from which step a restart resumes: nothing older was deleted yet.
            last = max(list_steps(self.run_dir), default=None)
            left = "there is none before it" if last is None else f"that of step {last} is complete"
            raise OSError(
                f"{self.folder}: the checkpoint of step {self._pending_step} could not be written "
                f"({shorten_error(find_first_cause(error))}); {left}.  Free disk space or fix the cause, "
                "and start the same command again"
            ) from error
        if self._pending_step is not None:
            self._readable.add(self._pending_step)
            self._pending_step = None
            self._delete_old()

    # --- restoring ---

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, ascending.

        Process 0 lists them for all: on a network file system, others may see a new directory later.
        """

        def list_as_json() -> bytes:
            return json.dumps(list_steps(self.run_dir)).encode()

        return json.loads(hosts.broadcast_value("checkpoint steps", list_as_json))

    def newest(self) -> int | None:
        """Return the newest step whose record and item tables can be read; None if there is no checkpoint.

        Unreadable checkpoints are set aside with a warning.  Raises ValueError if all were unreadable, or for
        a checkpoint of another format.
        """
        restored = self._restore_newest({}, {})
        return None if restored is None else restored[0]

    def go_back(self, step: int) -> list[str]:
        """Move the checkpoints after `step` aside, so that it is the newest; return their new names.

        Raises ValueError if there is no complete checkpoint of that step.
        """
        self.wait()
        steps = self.steps()
        if step not in steps:
            raise ValueError(f"{self.folder} has no checkpoint of step {step}; it has {steps}")

        def move_newer() -> bytes:
            return json.dumps(
                [_move_aside(self.folder / str(s), "abandoned") for s in steps if s > step]
            ).encode()

        # Process 0 moves the folders while the others wait; then all forget what Orbax knows about the steps.
        names = json.loads(hosts.broadcast_value("checkpoints abandoned", move_newer))
        self._manager.reload()
        return names

    def restore_newest(
        self, likes: dict[str, Any], vocab_sizes: Mapping[str, int] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Restore (step, items, loop) of the newest readable checkpoint; None if there is no checkpoint.

        likes, vocab_sizes: the arguments `like` and `vocab_size` of `restore`, by item.  Raises the errors of
        `newest` and `restore`.
        """
        return self._restore_newest(likes, vocab_sizes or {})

    def restore(self, step: int, item: str, like: Any, vocab_size: int | None = None) -> Any:
        """Restore one item, sharded as in `like`: a tree of jax.ShapeDtypeStruct with shardings, on any mesh.

        Args:
          vocab_size: number of rows of `embed` and `lm_head`, and of their moments, that are tokens.  The
            rows after them are padding, which is dropped or extended with zeros to the requested shape.
            None: the stored shape must fit exactly.

        Raises ValueError if the tree, a shape or a dtype differs from the stored one (nothing is cast),
        KeyError for an item that this checkpoint does not have, Unreadable for damaged files and arrays.
        """
        tree = self._read_item(step, item, like, vocab_size)
        self._check_item(step, item, tree, self.loop(step))
        return tree

    def loop(self, step: int) -> dict[str, Any]:
        """Read the loop's record: the fields given to `save`, with `step`, `format` and `items`.

        Raises ValueError for a format other than this code's, FileNotFoundError for a step that does not
        exist.
        """
        # A step that was never saved is the caller's error, not damage.
        where = self.folder / str(step) / LOOP
        if not _is_complete(where.parent):
            raise FileNotFoundError(
                f"{where.parent} is not there; the checkpoints are {list_steps(self.run_dir)}"
            )
        with raise_unreadable(where):
            # The manager waits for the other processes after a read, forever if the read failed on one of
            # them: use the handler directly.
            record = ocp.JsonCheckpointHandler().restore(epath.Path(where))
            stored_format = record["format"]
            # Earlier versions wrote neither checksums nor a digest.
            missing = [
                name for name in _RESERVED if name not in record and name not in ("checksums", "digest")
            ]

        # The format first: in another one, other fields may be missing for good reason.
        if stored_format != FORMAT:
            raise ValueError(
                f"{where.parent} is a checkpoint of format {stored_format}; this code reads format {FORMAT}: "
                "resume with the version of the code that wrote it, or start again in a new run_dir"
            )
        if missing:
            raise Unreadable(f"{where} lacks the fields {missing}")
        if record.get("digest", _digest_record(record)) != _digest_record(record):
            raise Unreadable(f"{where} is damaged: by its digest, it is not what was saved")
        return record

    # --- the frozen reference ---

    def save_reference(self, tree: Any, vocab_size: int | None = None) -> None:
        """Store the policy at step 0; complete when this returns.

        If an earlier start stored a reference but no checkpoint, the reference is replaced.  Raises
        ValueError if there are checkpoints: the reference belongs to them.  vocab_size: as in `restore`.
        """
        self.wait()
        if self.steps():
            raise ValueError(
                f"{self.reference} belongs to the checkpoints {self.steps()}: it is not replaced"
            )
        # The checksums first: if the process is killed in between, the next start writes both again.
        self._write_reference_checksums(tree, vocab_size)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.reference, tree, force=True)

    def restore_reference(self, like: Any, vocab_size: int | None = None, has_checksums: bool = False) -> Any:
        """Restore the reference, sharded as in `like`; vocab_size as in `restore`.

        has_checksums: the checkpoint says that there are checksums, so they must be there.  Else, in a run of an
          earlier version, they are written now.

        Raises FileNotFoundError if none was saved or its checksums are missing, and the errors of `restore`.
        """
        if not _is_complete(self.reference):
            raise FileNotFoundError(f"{self.reference} is not there: start again in a new run_dir")
        tree = self._restore(self._read_table(self.reference), like, self.reference, vocab_size)
        # Process 0 reads for all: on a network file system, others may see a new file later.
        read = hosts.broadcast_value("reference checksums", self._read_reference_checksums)
        if not read and has_checksums:
            raise FileNotFoundError(
                f"{self._reference_checksums} is not there, so nobody can tell if the reference is what was saved: "
                "bring the file back, or start again in a new run_dir"
            )
        if read:
            with raise_unreadable(self._reference_checksums):
                checksums = json.loads(read)
                if not (isinstance(checksums, dict) and isinstance(checksums.get("arrays"), dict)):
                    raise ValueError("it has no checksums of arrays")
            _raise_if_damaged(tree, checksums, self.reference)
        else:
            self._write_reference_checksums(tree, vocab_size)
        return tree

    def _write_reference_checksums(self, tree: Any, vocab_size: int | None) -> None:
        sums = json.dumps(make_checksums(tree, vocab_size)).encode()
        if hosts.is_primary():
            remote_files.write_atomically(self._reference_checksums, sums)

    def _read_reference_checksums(self) -> bytes:
        """The file of the reference's checksums; empty if there is none, as in runs of earlier commits."""
        path = self._reference_checksums
        # An empty file is damage: other than none at all, it is no JSON.
        return (path.read_bytes() or b" ") if path.exists() else b""

    @property
    def _reference_checksums(self) -> Path | epath.Path:
        return self.run_dir / "reference_checksums.json"

    # --- internals ---

    def _restore_newest(
        self, likes: dict[str, Any], vocab_sizes: Mapping[str, int]
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Restore (step, items, loop) of the newest checkpoint that all processes can read.

        With empty `likes`, only the record and the tables of arrays are read, not the arrays.
        """
        unreadable = []
        for step in reversed(self.steps()):
            loop, restored, damage = self._read_items(step, likes, vocab_sizes)
            if damage is None:
                self._readable.add(step)
                return step, restored, loop
            self._set_aside(step, damage)
            unreadable.append(str(damage))
        if unreadable:
            raise ValueError(
                f"{self.folder}: no checkpoint is left that can be read: {'; '.join(unreadable)}.  Start "
                "again in a new run_dir"
            )
        return None

    def _read_items(
        self, step: int, likes: dict[str, Any], vocab_sizes: Mapping[str, int]
    ) -> tuple[dict[str, Any], dict[str, Any], Unreadable | None]:
        """Read items of a checkpoint: (its loop, the items, the damage that any process has found).  Collective."""
        # Every item's table is read, also of items that are not restored: the run will need them later.
        damage: Unreadable | None = None
        loop: dict[str, Any] = {}
        restored = {}
        try:
            loop = self.loop(step)
            for item in loop["items"]:
                self._item_table(step, item)
            for item, like in likes.items():
                restored[item] = self._read_item(step, item, like, vocab_sizes.get(item))
        except Unreadable as error:
            damage = error

        # Processes read different shards, so one alone may notice the damage: all must skip the step.
        reports = hosts.exchange_json("checkpoint damage", None if damage is None else str(damage))
        if damage is None and any(reports):
            damage = Unreadable(next(report for report in reports if report))
        if damage is not None:
            return loop, restored, damage

        # Checksums are computed by all processes together, so each must have read its shards.
        try:
            for item, tree in restored.items():
                self._check_item(step, item, tree, loop)
        except Unreadable as error:
            damage = error
        return loop, restored, damage

    def _item_table(self, step: int, item: str) -> Any:
        """Read the tree of shapes and dtypes of an item's arrays."""
        where = self.folder / str(step) / item
        items = self.loop(step)["items"]
        if item not in items:
            raise KeyError(f"{where.parent} has no item {item!r}; it has {', '.join(items)}")
        return self._read_table(where)

    def _read_table(self, where: Path | epath.Path) -> Any:
        with raise_unreadable(where):
            return ocp.StandardCheckpointHandler().metadata(epath.Path(where)).tree

    def _restore(self, table: Any, like: Any, where: Path | epath.Path, vocab_size: int | None) -> Any:
        differs_in_padding = check_fit(table, like, where, vocab_size)
        with raise_unreadable(where):
            handler = ocp.StandardCheckpointHandler()
            # If not strict, Orbax cuts rows or adds rows of zeros to match the shape.
            args = ocp.args.StandardRestore(like, strict=not differs_in_padding)
            return handler.restore(epath.Path(where), args=args)

    def _read_item(self, step: int, item: str, like: Any, vocab_size: int | None) -> Any:
        """Restore one item without a look at its checksums."""
        return self._restore(self._item_table(step, item), like, self.folder / str(step) / item, vocab_size)

    def _check_item(self, step: int, item: str, tree: Any, loop: Mapping[str, Any]) -> None:
        """Raise Unreadable if a restored item is not what was saved.  Collective: all processes have read it."""
        if "checksums" in loop:
            _raise_if_damaged(tree, loop["checksums"][item], self.folder / str(step) / item)

    def _delete_leftovers(self) -> None:
        """Delete checkpoints that a killed process left incomplete, or had begun to delete."""
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            # On a local disk Orbax marks incomplete folders by their names, under gs:// complete ones by a
            # file.
            if isinstance(path, Path):
                is_leftover = _UNFINISHED in path.name or path.suffix == ".deleted"
            else:
                is_leftover = path.name.isdecimal() and not _is_complete(path)
            if is_leftover:
                _delete_tree(path)

    def _delete_old(self) -> None:
        """Delete the checkpoints older than the newest `keep`; none is visible while only a part of it is left."""
        if self.read_only or not hosts.is_primary():
            return
        kept = 0
        for step in reversed(list_steps(self.run_dir)):
            # A checkpoint that cannot be read is neither counted nor deleted: a start sets it aside.
            if not self.keep or kept < self.keep:
                kept += self._is_readable(step)
                continue
            path = self.folder / str(step)
            if isinstance(path, Path):
                path.rename(path.with_name(f"{step}.deleted"))
            else:
                (path / _COMMITTED).unlink()  # first: without it the rest is not a checkpoint
                _delete_tree(path)

        # Only now, so that one that is killed leaves no half checkpoint visible.
        if isinstance(self.folder, Path):
            for renamed in self.folder.glob("*.deleted"):
                _delete_tree(renamed)

    def _is_readable(self, step: int) -> bool:
        """True if this process has written or read a checkpoint, or can read its record and its tables."""
        if step not in self._readable:
            try:
                for item in self.loop(step)["items"]:
                    self._item_table(step, item)
            except (ValueError, KeyError, OSError):  # Unreadable, another format, or not there any more
                return False
            self._readable.add(step)
        return True

    def _set_aside(self, step: int, error: Unreadable) -> None:
        """Move an unreadable checkpoint away and warn; raise the error instead if this run is read-only."""
        if self.read_only:
            raise error
        # Process 0 moves the folder while the others wait; then all forget what Orbax knows about the step.
        path = self.folder / str(step)
        new_name = hosts.broadcast_value(
            "checkpoint set aside", lambda: _move_aside(path, "unreadable").encode()
        ).decode()
        self._manager.reload()
        warnings.warn(f"{error}; it is now {new_name}, and the one before is used", stacklevel=4)


def _digest_record(record: Mapping[str, Any]) -> str:
    """The digest of a loop's record without its own field.  Raises TypeError or ValueError for what is no JSON."""
    fields = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _raise_if_damaged(tree: Any, checksums: Mapping[str, Any], where: Path | epath.Path) -> None:
    """Raise Unreadable, naming the arrays, if a tree is not what the checksums were made of.  Collective."""
    if damaged := find_damaged(tree, checksums):
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise Unreadable(
            f"{where} is damaged: by their checksums, {', '.join(damaged[:3])}{more} are not what was saved"
        )


def _delete_tree(path: Path | epath.Path) -> None:
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        path.rmtree()


def _move_aside(path: Path | epath.Path, reason: str) -> str:
    """Move a checkpoint to a name with `reason`, under which it is not listed; return the name for messages."""
    if isinstance(path, Path):
        target = _find_free_name(path.with_name(f"{path.name}.{reason}"), separator="")
        path.rename(target)
        return target.name

    # To another folder, because the next start deletes folders without a marker in `checkpoints`.
    target = _find_free_name(path.parent.parent / reason / path.name, separator=".")
    (path / _COMMITTED).unlink(missing_ok=True)
    remote_files.move_files(path, target)
    return f"{reason}/{target.name}"


def _find_free_name(path: Any, separator: str) -> Any:
    """Return the path, or the path with the first number from 2, that does not exist yet; local or gs://."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{separator}{number}")
    return candidate
