"""Packed rows on the devices: the parts of a batch that belong to a microbatch of them.

N  sequences   M  microbatches   R  rows of a microbatch   K  sequences of a row
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import PackedRows


def take_microbatch(packed: PackedRows, i: jax.Array) -> PackedRows:
    """Microbatch i of packed rows: leaves [M, R, ..] -> [R, ..]."""
    return jax.tree.map(lambda x: x[i] if x.ndim else x, packed)


def replicate(tree: Any, layout: Layout) -> Any:
    """Put the leaves of a batch, inside jit, on every device in full: a packed row may hold any sequence."""
    return jax.tree.map(lambda x: layout.constrain(x, *(None,) * x.ndim), tree)


def take_or_zero(tree: Any, rows: jax.Array) -> Any:
    """Take rows of all leaves: [N, ..] -> [n, ..].  rows: i32[n]; a negative one gives a row of zeros."""

    def take(x: jax.Array) -> jax.Array:
        found = x[jnp.maximum(rows, 0)]
        return jnp.where((rows >= 0).reshape((-1,) + (1,) * (x.ndim - 1)), found, jnp.zeros((), x.dtype))

    return jax.tree.map(take, tree)


def set_rows(out: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Write values [n, ..] to rows of out [N, ..].  rows: i32[n]; values of negative ones are dropped."""
    return out.at[jnp.where(rows < 0, len(out), rows)].set(values, mode="drop")
