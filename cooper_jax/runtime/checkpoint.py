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
   Under gs://, where directories cannot be renamed, a checkpoint is complete from when Orbax has written a
   marker into it until the marker is deleted, which comes first when it is.
3. `restore` wants a tree of `jax.ShapeDtypeStruct` with shardings, on any mesh: bits do not depend on it.  Padding
   of the vocabulary does, so its rows are added or left off where `vocab_size` says how many are real.
4. A checkpoint that cannot be read is renamed to `<step>.unreadable` (under gs://, moved to `unreadable/<step>`)
   and named in a warning, and the one before it is used.  One that can be read but does not fit (shapes, types,
   format) is an error.

With several processes each writes and reads its own shards, in a directory that all see; all must call the methods
below, in one order.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from cooper_jax.runtime import hosts, remote_files
from cooper_jax.types import Params, TrainState

FORMAT = 1  # raise it when what is stored changes its meaning
LOOP = "loop"
_RESERVED = ("step", "format", "items")  # written by `save` into the loop's JSON
_PADDED = ("embed", "lm_head")  # parameters whose rows are tokens, and padding after them; their moments too
_COMMITTED = ocp.path.atomicity_types.COMMIT_SUCCESS_FILE  # what counts under gs://
_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX  # in a name on a local disk


class Unreadable(ValueError):
    """A checkpoint, or a part of one, that is damaged."""


def split_state(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """A TrainState -> (weights, optimiser tree), the two items it is kept as."""
    return state.params, {"opt_state": state.opt_state, "updates": state.updates, "skipped": state.skipped}


def join_state(params: Params, optimiser: dict[str, Any]) -> TrainState:
    """The inverse of `split`."""
    return TrainState(params=params, **optimiser)


def abstract_like(tree: Any) -> Any:
    """A tree of arrays -> the tree of ShapeDtypeStruct, with shardings, that `restore` wants."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def list_steps(run_dir: str | Path | epath.Path) -> list[int]:
    """The steps of the complete checkpoints in a run directory, ascending."""
    folder = remote_files.to_path(run_dir) / "checkpoints"
    if remote_files.is_remote(folder) and not folder.exists():
        return []
    named = folder.iterdir() if remote_files.is_remote(folder) else folder.glob("*")
    return sorted(int(p.name) for p in named if p.name.isdecimal() and _complete(p))


def _complete(path: Path | epath.Path) -> bool:
    return (path / _COMMITTED).exists() if remote_files.is_remote(path) else path.is_dir()


class Checkpoints:
    """The checkpoints of one run directory; a context manager.

    keep: the newest N are kept, 0 keeps all.  read_only: for a process that looks at a run which may be alive
    elsewhere: nothing is cleaned up, renamed or saved.
    """

    def __init__(self, run_dir: str | Path | epath.Path, keep: int, read_only: bool = False):
        if keep < 0:
            raise ValueError(f"checkpoint.keep is {keep}: it is a number of checkpoints, or 0 for all")
        self.run_dir = remote_files.to_path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.reference = self.run_dir / "reference"
        self.keep = keep
        self.read_only = read_only
        self._under_way: int | None = None
        if read_only and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not there: {self.run_dir} holds no checkpoints")
        # Leftovers are not left to the manager, which deletes them while others may look at them; nor are old
        # checkpoints: it deletes in place, and a kill in the middle would leave a visible half.
        if hosts.is_primary() and not read_only:
            self._clean()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(create=not read_only, read_only=read_only),
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

    def save(self, step: int, items: dict[str, Any], loop: dict[str, Any]) -> float:
        """Save named pytrees and the loop's JSON, in the background; returns the seconds of the first wait.

        Waits for the save before this one, so that the host holds one copy of the arrays at a time, then until they
        are copied: they may be donated as soon as it returns.  A failure of the writing itself is raised by the
        next `save`, `wait` or exit.  Raises ValueError for a step that is not newer than the newest, and for a
        reserved name.
        """
        if LOOP in items or not items:
            raise ValueError(f"items are named pytrees, none of them {LOOP!r}; given: {sorted(items)}")
        if taken := sorted(set(loop) & set(_RESERVED)):
            raise ValueError(f"the fields {taken} of the loop are written by save itself: leave them out")
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise ValueError(f"step {step} is not newer than {self.folder / str(newest)}: nothing was saved")
        record = {"step": step, "format": FORMAT, "items": sorted(items), **loop}
        json.dumps(record, allow_nan=False)  # here, not in the background: TypeError or ValueError
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        if not self._manager.save(step, args=ocp.args.Composite(**args, **{LOOP: ocp.args.JsonSave(record)})):
            raise RuntimeError(f"{self.folder / str(step)} was not saved")
        self._under_way = step
        return waited

    def wait(self) -> None:
        """Until the save under way is complete and visible; raises OSError, with its cause, where it failed.

        Then deletes what is older than the newest `keep`.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            last = max(list_steps(self.run_dir), default=None)
            left = "there is none before it" if last is None else f"that of step {last} is complete"
            raise OSError(
                f"{self.folder}: the checkpoint of step {self._under_way} could not be written "
                f"({_said(_first_cause(error))}); {left}.  Make room there or mend what it says, and start the "
                "same command again"
            ) from error
        self._under_way = None
        self._prune()

    # --- restoring ---

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending, as the first process sees them."""
        return json.loads(
            hosts.broadcast_value("checkpoint steps", lambda: json.dumps(list_steps(self.run_dir)).encode())
        )

    def newest(self) -> int | None:
        """The newest step whose record and item tables can be read; None where there is no checkpoint.

        Unreadable ones are set aside with a warning.  Raises ValueError when there were some and none is
        left, or for a checkpoint of another format.
        """
        found = self._newest({}, {})
        return None if found is None else found[0]

    def restore_newest(
        self, likes: dict[str, Any], vocab_sizes: Mapping[str, int] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """(step, items, loop) of the newest checkpoint whose items `likes` can all be read; None for none.

        vocab_sizes: `restore`'s, by item.  Raises as `newest` and `restore` do.
        """
        return self._newest(likes, vocab_sizes or {})

    def restore(self, step: int, item: str, like: Any, vocab_size: int | None = None) -> Any:
        """One item, placed by `like`: a tree of jax.ShapeDtypeStruct with shardings, on any mesh.

        vocab_size: so many rows of `embed` and `lm_head`, and of their moments, are tokens; of what comes after
        them, rows are left off, or rows of zeros added, where another number is asked for than is stored.  None:
        no number but the stored one fits.

        Raises ValueError where the tree, a shape or a type differs from what is stored (nothing is cast),
        KeyError for an item that this checkpoint does not have, Unreadable for damage.
        """
        return self._restore(self._stored(step, item), like, self.folder / str(step) / item, vocab_size)

    def loop(self, step: int) -> dict[str, Any]:
        """The loop's record: the fields given to `save`, with `step`, `format` and `items`.

        Raises ValueError for another format than this code's, FileNotFoundError for a step that is not there.
        """
        where = self.folder / str(step) / LOOP
        if not _complete(where.parent):
            raise FileNotFoundError(
                f"{where.parent} is not there; the checkpoints are {list_steps(self.run_dir)}"
            )
        with _reading(where):
            # By the handler, not the manager, which would wait for the other processes after a read that may fail.
            record = ocp.JsonCheckpointHandler().restore(epath.Path(where))
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

    def restore_reference(self, like: Any, vocab_size: int | None = None) -> Any:
        """The reference, placed by `like`; vocab_size as in `restore`.

        Raises FileNotFoundError where none was saved, else as `restore`.
        """
        if not _complete(self.reference):
            raise FileNotFoundError(f"{self.reference} is not there: begin again in a new run_dir")
        return self._restore(self._table(self.reference), like, self.reference, vocab_size)

    # --- inside ---

    def _newest(
        self, likes: dict[str, Any], vocab_sizes: Mapping[str, int]
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        unreadable = []
        for step in reversed(self.steps()):
            damage = None
            try:
                loop = self.loop(step)
                for item in loop["items"]:
                    self._stored(step, item)
                found = {
                    item: self.restore(step, item, like, vocab_sizes.get(item))
                    for item, like in likes.items()
                }
            except Unreadable as error:
                damage = error
            # Each process reads its own shards, so one alone may meet the damage.
            said = hosts.exchange_json("checkpoint damage", None if damage is None else str(damage))
            if damage is None and any(said):
                damage = Unreadable(next(text for text in said if text))
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

    def _restore(self, table: Any, like: Any, where: Path | epath.Path, vocab_size: int | None) -> Any:
        repad = _check_fit(table, like, where, vocab_size)
        with _reading(where):
            handler = ocp.StandardCheckpointHandler()
            # Where it is not strict, Orbax itself leaves off rows, or adds zeros.
            args = ocp.args.StandardRestore(like, strict=not repad)
            return handler.restore(epath.Path(where), args=args)

    def _clean(self) -> None:
        """Delete what a killed process left half written or half deleted."""
        remote = remote_files.is_remote(self.folder)
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if remote and path.name.isdecimal() and not _complete(path):
                path.rmtree()
            elif not remote and _UNFINISHED in path.name:
                shutil.rmtree(path)

    def _prune(self) -> None:
        if self.read_only or not hosts.is_primary():
            return
        remote = remote_files.is_remote(self.folder)
        for step in list_steps(self.run_dir)[: -self.keep] if self.keep else []:
            path = self.folder / str(step)
            if remote:
                (path / _COMMITTED).unlink()  # first: what is left of it after a kill is no checkpoint
                path.rmtree()
            else:
                path.rename(path.with_name(f"{step}.deleted"))
        if not remote:
            for path in self.folder.glob("*.deleted"):
                shutil.rmtree(path)

    def _set_aside(self, step: int, error: Exception) -> None:
        if self.read_only:
            raise error
        path = self.folder / str(step)
        aside = hosts.broadcast_value(
            "checkpoint set aside", lambda: str(_move_aside(path)).encode()
        ).decode()
        self._manager.reload()
        warnings.warn(f"{error}; it is now {aside}, and the one before is used", stacklevel=4)


def _move_aside(path: Path | epath.Path) -> str:
    """Take a checkpoint out of sight; returns its new place, below the run directory."""
    remote = remote_files.is_remote(path)
    first = (
        path.parent.parent / "unreadable" / path.name if remote else path.with_name(f"{path.name}.unreadable")
    )
    aside, number = first, 1
    while aside.exists():
        number += 1
        aside = first.with_name(f"{first.name}{'.' if remote else ''}{number}")
    if not remote:
        path.rename(aside)
        return aside.name
    # Elsewhere, for what lies here without the marker is deleted at the next start.
    (path / _COMMITTED).unlink(missing_ok=True)
    remote_files.move_files(path, aside)
    return f"unreadable/{aside.name}"


def _check_fit(stored: Any, like: Any, where: Path | epath.Path, vocab_size: int | None) -> bool:
    """Compare a stored table with the tree asked for: paths, shapes, types; every sharding must be given.

    Returns whether they differ in rows of padding (see `Checkpoints.restore`), which is no fault.
    """
    have = {_name(path): (tuple(x.shape), str(x.dtype)) for path, x in jax.tree.leaves_with_path(stored)}
    want = {}
    for path, x in jax.tree.leaves_with_path(like):
        if x.sharding is None:
            raise ValueError(
                f"{where}: {_name(path)} is asked for without a sharding; see checkpoint.abstract_like"
            )
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):  # stored as its raw words
            x = jax.eval_shape(jax.random.key_data, x)
        want[_name(path)] = (tuple(x.shape), str(x.dtype))
    wrong = [f"{n} is not stored" for n in sorted(want.keys() - have.keys())]
    wrong += [f"{n} is stored but not asked for" for n in sorted(have.keys() - want.keys())]
    repad = False
    for name in sorted(want.keys() & have.keys()):
        if want[name] == have[name]:
            continue
        if vocab_size is not None and _pads(name, have[name], want[name], vocab_size):
            repad = True
            continue
        shown = [f"{dtype}{list(shape)}" for shape, dtype in (have[name], want[name])]
        wrong.append(f"{name} is stored as {shown[0]}, asked for as {shown[1]}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(
            f"{where} does not fit this config's model or optimiser: {'; '.join(wrong[:5])}{more}: use the "
            "config that it was saved with, or a new run_dir"
        )
    return repad


def _pads(name: str, have: tuple, want: tuple, vocab_size: int) -> bool:
    """Whether two (shape, type) of one array differ in rows of padding alone."""
    (shape, dtype), (asked, asked_dtype) = have, want
    rows = shape[:1] + asked[:1]
    return (
        name.rsplit(".", 1)[-1] in _PADDED
        and dtype == asked_dtype
        and len(rows) == 2
        and min(rows) >= vocab_size
        and shape[1:] == asked[1:]
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
        cause = _first_cause(error)
        if not isinstance(cause, OSError | ValueError | KeyError | TypeError | AttributeError):
            raise
        raise Unreadable(f"{where} cannot be read: {_said(cause)}") from error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _said(error: BaseException) -> str:
    """The first line of an error; of a long one both ends, for paths stand in front of what is wrong with them."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = said.split(" [tensorstore_spec=")[0]  # as long as it is, and of no use here
    return said if len(said) <= 400 else f"{said[:150]} ... {said[-250:]}"
