"""Checkpoints: what a run needs to go on, and what others need of its weights.

    <run_dir>/checkpoints/<step>/policy             f32 master weights
                                 policy_optimiser   moments and counters
                                 reward             (not in the rule arm)
                                 reward_optimiser   (not in the rule arm)
                                 loop               JSON: step, format, items, and the caller's own fields
    <run_dir>/reference/                            the policy at step 0: always kept, as its source may change

1. Items are separate, so that weights restore without optimisers.
2. Orbax writes a checkpoint into a temporary directory in the background and renames it at the end: a
   process killed at any moment leaves complete checkpoints alone visible.  Old ones are renamed before they
   are deleted, for the same reason.  Leftovers of either kind go at the next start.
3. `restore` wants a tree of `jax.ShapeDtypeStruct` with shardings, on any mesh: bits do not depend on it.
4. A checkpoint that cannot be read is renamed to `<step>.unreadable` and named in a warning, and the one
   before it is used.  One that can be read but does not fit (shapes, types, format) is an error.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from cooper_jax.types import Params, TrainState

FORMAT = 1  # raise it when what is stored changes its meaning
LOOP = "loop"
_RESERVED = ("step", "format", "items")  # written by `save` into the loop's JSON


class Unreadable(ValueError):
    """A checkpoint, or a part of one, that is damaged."""


def split(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """A TrainState -> (weights, optimiser tree), the two items it is kept as."""
    return state.params, {"opt_state": state.opt_state, "updates": state.updates, "skipped": state.skipped}


def join(params: Params, optimiser: dict[str, Any]) -> TrainState:
    """The inverse of `split`."""
    return TrainState(params=params, **optimiser)


def abstract(tree: Any) -> Any:
    """A tree of arrays -> the tree of ShapeDtypeStruct, with shardings, that `restore` wants."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def steps_in(run_dir: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a run directory, ascending, by name alone."""
    folder = Path(run_dir) / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal() and p.is_dir())


class Checkpoints:
    """The checkpoints of one run directory; a context manager.

    keep: the newest N are kept, 0 keeps all.  read_only: for a process that looks at a run which may be alive
    elsewhere: nothing is cleaned up, renamed or saved.
    """

    def __init__(self, run_dir: str | Path, keep: int, read_only: bool = False):
        if keep < 0:
            raise ValueError(f"checkpoint.keep is {keep}: it is a number of checkpoints, or 0 for all")
        self.run_dir = Path(run_dir).absolute()
        self.folder = self.run_dir / "checkpoints"
        self.reference = self.run_dir / "reference"
        self.keep = keep
        self.read_only = read_only
        if read_only and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not there: {self.run_dir} holds no checkpoints")
        # Old checkpoints are not left to the manager: it deletes in place, and a kill in the middle would
        # leave a visible half.
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )
        self._prune()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    # --- saving ---

    def save(self, step: int, items: dict[str, Any], loop: dict[str, Any]) -> None:
        """Save named pytrees and the loop's JSON, in the background.

        Waits for the save before this one, then until the arrays are copied to the host: they may be donated
        as soon as it returns.  A failure of the writing itself is raised by the next `save`, `wait` or exit.
        Raises ValueError for a step that is not newer than the newest, and for a reserved name.
        """
        if LOOP in items or not items:
            raise ValueError(f"items are named pytrees, none of them {LOOP!r}; given: {sorted(items)}")
        if taken := sorted(set(loop) & set(_RESERVED)):
            raise ValueError(f"the fields {taken} of the loop are written by save itself: leave them out")
        self.wait()
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise ValueError(f"step {step} is not newer than {self.folder / str(newest)}: nothing was saved")
        record = {"step": step, "format": FORMAT, "items": sorted(items), **loop}
        json.dumps(record, allow_nan=False)  # here, not in the background: TypeError or ValueError
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        if not self._manager.save(step, args=ocp.args.Composite(**args, **{LOOP: ocp.args.JsonSave(record)})):
            raise RuntimeError(f"{self.folder / str(step)} was not saved")

    def wait(self) -> None:
        """Until the save under way is complete and visible; raises what went wrong in it.

        Then deletes what is older than the newest `keep`.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._prune()

    # --- restoring ---

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return steps_in(self.run_dir)

    def newest(self) -> int | None:
        """The newest step whose record and item tables can be read; None where there is no checkpoint.

        Unreadable ones are set aside with a warning.  Raises ValueError when there were some and none is
        left, or for a checkpoint of another format.
        """
        found = self._newest({})
        return None if found is None else found[0]

    def restore_newest(self, likes: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """(step, items, loop) of the newest checkpoint whose items `likes` can all be read; None for none.

        Raises as `newest` and `restore` do.
        """
        return self._newest(likes)

    def restore(self, step: int, item: str, like: Any) -> Any:
        """One item, placed by `like`: a tree of jax.ShapeDtypeStruct with shardings, on any mesh.

        Raises ValueError where the tree, a shape or a type differs from what is stored (nothing is cast),
        KeyError for an item that this checkpoint does not have, Unreadable for damage.
        """
        return self._restore(self._stored(step, item), like, self.folder / str(step) / item)

    def loop(self, step: int) -> dict[str, Any]:
        """The loop's record: the fields given to `save`, with `step`, `format` and `items`.

        Raises ValueError for another format than this code's, FileNotFoundError for a step that is not there.
        """
        where = self.folder / str(step) / LOOP
        if not where.parent.is_dir():
            raise FileNotFoundError(f"{where.parent} is not there; the checkpoints are {self.steps()}")
        with _reading(where):
            restored = self._manager.restore(step, args=ocp.args.Composite(**{LOOP: ocp.args.JsonRestore()}))
            record = restored[LOOP]
            found = record["format"]
            missing = [name for name in _RESERVED if name not in record]
        if found != FORMAT:
            raise ValueError(
                f"{where.parent} is a checkpoint of format {found}; this code reads format {FORMAT}: go on "
                "with the version of the code that wrote it, or begin again in a new run_dir"
            )
        if missing:
            raise Unreadable(f"{where} lacks the fields {missing}")
        return record

    # --- the frozen reference ---

    def save_reference(self, tree: Any) -> None:
        """Keep the policy as it was at step 0; complete when this returns.

        One that is left from a start which never reached a checkpoint is replaced; beside checkpoints it is
        frozen, and ValueError is raised.
        """
        self.wait()
        if self.steps():
            raise ValueError(
                f"{self.reference} belongs to the checkpoints {self.steps()}: it is not replaced"
            )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.reference, tree, force=True)

    def restore_reference(self, like: Any) -> Any:
        """The reference, placed by `like`.

        Raises FileNotFoundError where none was saved, else as `restore`.
        """
        if not self.reference.is_dir():
            raise FileNotFoundError(f"{self.reference} is not there: begin again in a new run_dir")
        return self._restore(self._table(self.reference), like, self.reference)

    # --- inside ---

    def _newest(self, likes: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        unreadable = []
        for step in reversed(self.steps()):
            damage = None
            try:
                loop = self.loop(step)
                for item in loop["items"]:
                    self._stored(step, item)
                found = {item: self.restore(step, item, like) for item, like in likes.items()}
            except Unreadable as error:
                damage = error
            # Each process reads its own shards, so one alone may meet the damage.
            if jax.process_count() > 1:
                damaged = multihost_utils.process_allgather(np.array(damage is not None))
                if damage is None and damaged.any():
                    damage = Unreadable(f"{self.folder / str(step)} cannot be read by another process")
            if damage is None:
                return step, found, loop
            self._set_aside(step, damage)
            unreadable.append(str(damage))
        if unreadable:
            raise ValueError(
                f"{self.folder}: no checkpoint is left that can be read: {'; '.join(unreadable)}.  Begin "
                "again in a new run_dir"
            )
        return None

    def _stored(self, step: int, item: str) -> Any:
        """The table of an item's arrays."""
        where = self.folder / str(step) / item
        items = self.loop(step)["items"]
        if item not in items:
            raise KeyError(f"{where.parent} has no item {item!r}; it has {', '.join(items)}")
        return self._table(where)

    def _table(self, where: Path) -> Any:
        with _reading(where):
            return ocp.StandardCheckpointHandler().metadata(epath.Path(where)).tree

    def _restore(self, table: Any, like: Any, where: Path) -> Any:
        _check_fit(table, like, where)
        with _reading(where):
            handler = ocp.StandardCheckpointHandler()
            return handler.restore(epath.Path(where), args=ocp.args.StandardRestore(like))

    def _prune(self) -> None:
        if self.read_only or jax.process_index() != 0:
            return
        for step in self.steps()[: -self.keep] if self.keep else []:
            path = self.folder / str(step)
            path.rename(path.with_name(f"{step}.deleted"))
        for path in self.folder.glob("*.deleted"):
            shutil.rmtree(path)

    def _set_aside(self, step: int, error: Exception) -> None:
        path = self.folder / str(step)
        if self.read_only:
            raise error
        aside = path.with_name(f"{step}.unreadable")
        if jax.process_index() == 0:
            number = 1
            while aside.exists():
                number += 1
                aside = path.with_name(f"{step}.unreadable{number}")
            path.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {path}")
        self._manager.reload()
        warnings.warn(f"{error}; it is now {aside.name}, and the one before is used", stacklevel=4)


def _check_fit(stored: Any, like: Any, where: Path) -> None:
    """Compare a stored table with the tree asked for: paths, shapes, types; every sharding must be given."""
    have = {_name(path): (tuple(x.shape), str(x.dtype)) for path, x in jax.tree.leaves_with_path(stored)}
    want = {}
    for path, x in jax.tree.leaves_with_path(like):
        if x.sharding is None:
            raise ValueError(
                f"{where}: {_name(path)} is asked for without a sharding; see checkpoint.abstract"
            )
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):  # stored as its raw words
            x = jax.eval_shape(jax.random.key_data, x)
        want[_name(path)] = (tuple(x.shape), str(x.dtype))
    wrong = [f"{n} is not stored" for n in sorted(want.keys() - have.keys())]
    wrong += [f"{n} is stored but not asked for" for n in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        if want[name] != have[name]:
            shown = [f"{dtype}{list(shape)}" for shape, dtype in (have[name], want[name])]
            wrong.append(f"{name} is stored as {shown[0]}, asked for as {shown[1]}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(
            f"{where} does not fit this config's model or optimiser: {'; '.join(wrong[:5])}{more}: use the "
            "config that it was saved with, or a new run_dir"
        )


def _name(path: tuple) -> str:
    """A key path as dotted names; containers of other kinds with the same names are alike here."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@contextlib.contextmanager
def _reading(where: Path) -> Iterator[None]:
    """Turn what damaged files raise into Unreadable.

    Orbax wraps errors of single arrays in bare Exceptions, so the first cause decides.  RuntimeErrors pass: a
    device that is out of memory says nothing against the checkpoint.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if not isinstance(cause, OSError | ValueError | KeyError | TypeError | AttributeError):
            raise
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:300]
        raise Unreadable(f"{where} cannot be read: {said}") from error
