"""Checks of stored checkpoints: a stored tree must fit the requested one, and its files must be readable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from cooper_jax.runtime.checksums import PADDED, join_path

# Limits of error messages.
_MAX_REPORTED = 5  # differences in an error message
_MAX_MESSAGE = 400  # characters


class Unreadable(ValueError):
    """A checkpoint, or part of one, is damaged."""


def check_fit(stored: Any, like: Any, where: Path | epath.Path, vocab_size: int | None) -> bool:
    """Compare a stored table of arrays with the requested tree: paths, shapes and dtypes.

    Returns whether they differ in rows of vocabulary padding only (see `Checkpoints.restore`), which is
    allowed.  Raises ValueError for any other difference, and for a requested array without a sharding.
    """
    # Both trees as dotted name -> (shape, dtype).
    have = {}
    for path, x in jax.tree.leaves_with_path(stored):
        have[join_path(path)] = (tuple(x.shape), str(x.dtype))

    # Without a sharding, Orbax would restore the array as it was sharded when it was saved.
    want = {}
    for path, x in jax.tree.leaves_with_path(like):
        if x.sharding is None:
            raise ValueError(
                f"{where}: {join_path(path)} is asked for without a sharding; see checkpoint.abstract_like"
            )
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            # Random keys are stored as their raw words.
            x = jax.eval_shape(jax.random.key_data, x)
        want[join_path(path)] = (tuple(x.shape), str(x.dtype))

    # Collect all differences: a single one rarely shows what is wrong with the config.
    wrong = [f"{name} is not stored" for name in sorted(want.keys() - have.keys())]
    wrong += [f"{name} is stored but not asked for" for name in sorted(have.keys() - want.keys())]
    differs_in_padding = False
    for name in sorted(want.keys() & have.keys()):
        if want[name] == have[name]:
            continue
        if vocab_size is not None and _differ_in_padding(name, have[name], want[name], vocab_size):
            differs_in_padding = True
            continue
        stored_as, asked_for = (f"{dtype}{list(shape)}" for shape, dtype in (have[name], want[name]))
        wrong.append(f"{name} is stored as {stored_as}, asked for as {asked_for}")

    if wrong:
        more = f" (and {len(wrong) - _MAX_REPORTED} more)" if len(wrong) > _MAX_REPORTED else ""
        raise ValueError(
            f"{where} does not fit this config's model or optimiser: "
            f"{'; '.join(wrong[:_MAX_REPORTED])}{more}: "
            "use the config that it was saved with, or a new run_dir"
        )
    return differs_in_padding


def _differ_in_padding(
    name: str, have: tuple[tuple[int, ...], str], want: tuple[tuple[int, ...], str], vocab_size: int
) -> bool:
    """Tell whether two (shape, dtype) of one array differ only in the number of padded vocabulary rows."""
    # Padding may shrink, but never below the real rows; scalars have no rows.
    (shape, dtype), (asked, asked_dtype) = have, want
    rows = shape[:1] + asked[:1]
    return (
        name.rsplit(".", 1)[-1] in PADDED
        and dtype == asked_dtype
        and len(rows) == 2
        and min(rows) >= vocab_size
        and shape[1:] == asked[1:]
    )


@contextlib.contextmanager
def raise_unreadable(where: Path | epath.Path) -> Iterator[None]:
    """Raise Unreadable for errors that are caused by damaged files.

    Orbax wraps errors of single arrays in bare Exceptions, so the first cause decides.  RuntimeErrors pass:
    running out of device memory does not mean that the checkpoint is damaged.
    """
    try:
        yield
    except Exception as error:
        cause = find_first_cause(error)
        if not isinstance(cause, OSError | ValueError | KeyError | TypeError | AttributeError):
            raise
        raise Unreadable(f"{where} cannot be read: {shorten_error(cause)}") from error


def find_first_cause(error: BaseException) -> BaseException:
    """Follow `__cause__` to the first exception of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def shorten_error(error: BaseException) -> str:
    """Return the first line of an error message, shortened in the middle: the reason follows long paths."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = line.split(" [tensorstore_spec=")[0]  # hundreds of characters that do not help
    return line if len(line) <= _MAX_MESSAGE else f"{line[:150]} ... {line[-250:]}"
