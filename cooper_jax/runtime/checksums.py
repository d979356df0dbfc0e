"""Checksums of arrays: a changed bit in a stored array is found when it is read again.

    checksum(x) = sum over the elements of bits(x_i) * w_i   mod 2^32,   w_i odd, from the index i of the element

A single flipped bit changes the sum by 2^k * w_i, which is never 0 mod 2^32.  Integers are added exactly in any
order, so the checksum does not depend on how an array is sharded.  Rows of vocabulary padding are left out, since
their number depends on the mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Parameters whose rows are tokens, followed by padding.  The moments of these have the same names and shapes.
PADDED = ("embed", "lm_head")


def make_checksums(tree: Any, vocab_size: int | None) -> dict[str, Any]:
    """The checksums of a tree as JSON: {"vocab_size": int | None, "arrays": {dotted name: checksum}}.

    Collective: all processes have their shards of the arrays.

    vocab_size: the number of rows of `embed` and `lm_head`, and of their moments, that are tokens; None: all.
    """
    sums = {}
    for path, x in jax.tree.leaves_with_path(tree):
        name = join_path(path)
        rows = vocab_size if name.rsplit(".", 1)[-1] in PADDED and np.ndim(x) else None
        sums[name] = _sum_words(x, rows)

    # One transfer for all arrays.
    arrays = {name: int(value) for name, value in jax.device_get(sums).items()}
    return {"vocab_size": vocab_size, "arrays": arrays}


def find_damaged(tree: Any, checksums: Mapping[str, Any]) -> list[str]:
    """Names of the arrays whose checksums differ from those of `make_checksums`, or that have none.  Collective."""
    found = make_checksums(tree, checksums["vocab_size"])["arrays"]
    return [name for name, value in found.items() if checksums["arrays"].get(name) != value]


def join_path(path: tuple[Any, ...]) -> str:
    """Convert a key path to dotted names, so that a stored dict compares equal to a dataclass."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@functools.partial(jax.jit, static_argnums=1)
def _sum_words(x: jax.Array, rows: int | None) -> jax.Array:
    """The checksum of an array, u32[].  rows: the first rows that count; None: all."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if rows is not None:
        x = x[:rows]
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)

    # Elements of 64 bits become two words; those of 8 and 16 bits are words of their own.
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)

    # The index of each element, from those of its axes; unsigned numbers wrap around.
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]

    # Knuth's multiplicative hash; the last bit makes weights odd.
    weights = (index * np.uint32(2654435761)) | np.uint32(1)
    return jnp.sum(words * weights, dtype=jnp.uint32)
