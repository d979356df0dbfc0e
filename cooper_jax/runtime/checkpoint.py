"""Checkpoints: the state that a run needs to resume, and weights that other jobs load.

    <run_dir>/checkpoints/<step>/policy             f32 master weights
                                 policy_optimiser   moments and counters
                                 reward             (not in the rule arm)
                                 reward_optimiser   (not in the rule arm)
                                 loop               JSON: step, format, items, and the caller's own fields
    <run_dir>/reference/                            the policy at step 0, stored because its source may change

1. Items are stored separately, so that weights can be restored without the optimiser.
2. Orbax writes a checkpoint into a temporary directory in the background and renames it at the end, so that
   SIGKILL at any time leaves only complete checkpoints visible.  For the same reason old checkpoints are
   renamed before they are deleted.  The next start deletes leftovers of both.  Under gs://, where directories
   cannot be renamed, Orbax writes a marker file at the end: a checkpoint with a marker is complete, and
   deleting a checkpoint starts with its marker.
3. `restore` takes a tree of `jax.ShapeDtypeStruct` with shardings, on any mesh.  The stored bits do not
   depend on the mesh, but the padding of the vocabulary does: `vocab_size` is the number of real rows, and
   rows of padding are added or dropped.
4. A checkpoint that cannot be read is renamed to `<step>.unreadable` (under gs://, moved to
   `unreadable/<step>`) with a warning, and the checkpoint before it is used.  A checkpoint that can be read
   but does not fit (shapes, dtypes, format) is an error.

With several processes, each writes and reads its own shards, in a directory that all of them share.  All must
call the methods below in the same order.
"""

from __future__ import annotations

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
from cooper_jax.runtime.optim import select_trained
from cooper_jax.types import Params, TrainState

FORMAT = 1  # to be raised when the meaning of stored data changes
LOOP = "loop"  # item with the loop's JSON
_RESERVED = ("step", "format", "items")  # fields of the loop's JSON that `save` itself writes

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
        if read_only and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not there: {self.run_dir} holds no checkpoints")

        # Orbax's manager could clean up and delete, too.  But it removes leftovers while other processes may
        # be listing the folder, and deletes checkpoints in place: SIGKILL would leave half a checkpoint
        # visible.
        if hosts.is_primary() and not read_only:
            self._delete_leftovers()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(create=not read_only, read_only=read_only),
        )
        self._delete_old()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    # --- saving ---

    def save(self, step: int, items: dict[str, Any], loop: dict[str, Any]) -> float:
        """Save named pytrees and the loop's JSON in the background; return the seconds of the first wait.

        Waits for the previous save first, so that the host has only one copy of the arrays, and then until
        the arrays are copied to the host: they may be donated as soon as this returns.  If writing fails, the
        next `save`, `wait` or exit raises.  Raises ValueError for a step that is not newer than the newest,
        and for a reserved name.
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
        record = {"step": step, "format": FORMAT, "items": sorted(items), **loop}
        json.dumps(record, allow_nan=False)  # raises TypeError or ValueError here, not in the background

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
        KeyError for an item that this checkpoint does not have, Unreadable for damaged files.
        """
        return self._restore(self._item_table(step, item), like, self.folder / str(step) / item, vocab_size)

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
            missing = [name for name in _RESERVED if name not in record]

        # The format first: in another one, other fields may be missing for good reason.
        if stored_format != FORMAT:
            raise ValueError(
                f"{where.parent} is a checkpoint of format {stored_format}; this code reads format {FORMAT}: "
                "resume with the version of the code that wrote it, or start again in a new run_dir"
            )
        if missing:
            raise Unreadable(f"{where} lacks the fields {missing}")
        return record

    # --- the frozen reference ---

    def save_reference(self, tree: Any) -> None:
        """Store the policy at step 0; complete when this returns.

        If an earlier start stored a reference but no checkpoint, the reference is replaced.  Raises
        ValueError if there are checkpoints: the reference belongs to them.
        """
        self.wait()
        if self.steps():
            raise ValueError(
                f"{self.reference} belongs to the checkpoints {self.steps()}: it is not replaced"
            )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.reference, tree, force=True)

    def restore_reference(self, like: Any, vocab_size: int | None = None) -> Any:
        """Restore the reference, sharded as in `like`; vocab_size as in `restore`.

        Raises FileNotFoundError if none was saved, and the errors of `restore`.
        """
        if not _is_complete(self.reference):
            raise FileNotFoundError(f"{self.reference} is not there: start again in a new run_dir")
        return self._restore(self._read_table(self.reference), like, self.reference, vocab_size)

    # --- internals ---

    def _restore_newest(
        self, likes: dict[str, Any], vocab_sizes: Mapping[str, int]
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Restore (step, items, loop) of the newest checkpoint that all processes can read.

        With empty `likes`, only the record and the tables of arrays are read, not the arrays.
        """
        unreadable = []
        for step in reversed(self.steps()):
            # Every item's table is read, also of items that are not restored: the run will need them later.
            damage: Unreadable | None = None
            restored = {}
            try:
                loop = self.loop(step)
                for item in loop["items"]:
                    self._item_table(step, item)
                for item, like in likes.items():
                    restored[item] = self.restore(step, item, like, vocab_sizes.get(item))
            except Unreadable as error:
                damage = error

            # Processes read different shards, so one alone may notice the damage: all must skip the step.
            reports = hosts.exchange_json("checkpoint damage", None if damage is None else str(damage))
            if damage is None and any(reports):
                damage = Unreadable(next(report for report in reports if report))
            if damage is None:
                return step, restored, loop
            self._set_aside(step, damage)
            unreadable.append(str(damage))
        if unreadable:
            raise ValueError(
                f"{self.folder}: no checkpoint is left that can be read: {'; '.join(unreadable)}.  Start "
                "again in a new run_dir"
            )
        return None

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

    def _delete_leftovers(self) -> None:
        """Delete checkpoints that a killed process left incomplete."""
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            # On a local disk Orbax marks incomplete folders by their names, under gs:// complete ones by a
            # file.
            if isinstance(path, Path):
                is_leftover = _UNFINISHED in path.name
            else:
                is_leftover = path.name.isdecimal() and not _is_complete(path)
            if is_leftover:
                _delete_tree(path)

    def _delete_old(self) -> None:
        """Delete all checkpoints but the newest `keep`; none is visible while only a part of it is left."""
        if self.read_only or not hosts.is_primary():
            return
        for step in list_steps(self.run_dir)[: -self.keep] if self.keep else []:
            path = self.folder / str(step)
            if isinstance(path, Path):
                path.rename(path.with_name(f"{step}.deleted"))
            else:
                (path / _COMMITTED).unlink()  # first: without it the rest is not a checkpoint
                _delete_tree(path)

        # Also those that an earlier process renamed, but was killed before it deleted them.
        if isinstance(self.folder, Path):
            for leftover in self.folder.glob("*.deleted"):
                _delete_tree(leftover)

    def _set_aside(self, step: int, error: Unreadable) -> None:
        """Move an unreadable checkpoint away and warn; raise the error instead if this run is read-only."""
        if self.read_only:
            raise error
        # Process 0 moves the folder while the others wait; then all forget what Orbax knows about the step.
        path = self.folder / str(step)
        new_name = hosts.broadcast_value("checkpoint set aside", lambda: _move_aside(path).encode()).decode()
        self._manager.reload()
        warnings.warn(f"{error}; it is now {new_name}, and the one before is used", stacklevel=4)


def _delete_tree(path: Path | epath.Path) -> None:
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        path.rmtree()


def _move_aside(path: Path | epath.Path) -> str:
    """Move a checkpoint to a name under which it is not listed; return the new name for messages."""
    if isinstance(path, Path):
        target = _find_free_name(path.with_name(f"{path.name}.unreadable"), separator="")
        path.rename(target)
        return target.name

    # To another folder, because the next start deletes folders without a marker in `checkpoints`.
    target = _find_free_name(path.parent.parent / "unreadable" / path.name, separator=".")
    (path / _COMMITTED).unlink(missing_ok=True)
    remote_files.move_files(path, target)
    return f"unreadable/{target.name}"


def _find_free_name(path: Any, separator: str) -> Any:
    """Return the path, or the path with the first number from 2, that does not exist yet; local or gs://."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{separator}{number}")
    return candidate
