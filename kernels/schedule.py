"""Which row reads which prompt's keys, for decode attention: fixed once, while rows keep their prompts.

Rows of one prompt are put side by side in tiles, so that a tile reads its prompt's keys once for all of them.

N rows   B prompts   G samples a prompt   T tiles of R slots
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

ROWS = 8  # slots of a tile where nothing is known of the rows
MOST_ROWS = 16  # and where all samples of a prompt are there
LOWEST = -1e38  # the least maximum: differences of two stay finite, and e^(-inf - maximum) is 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompt_of", "lengths", "rows", "slot_of", "tile_prompt", "tile_length"],
    meta_fields=["samples"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which row reads which prompt, and the order in which kernels take them."""

    prompt_of: jax.Array  # i32[N]; -1: none
    lengths: jax.Array  # i32[B]: prompt keys that are real
    rows: jax.Array  # i32[T, R]: the row of each slot, or -1; T is even
    slot_of: jax.Array  # i32[N]: the inverse
    tile_prompt: jax.Array  # i32[T]: the one prompt that a tile's rows read
    tile_length: jax.Array  # i32[T]: its real keys; 0: no prompt
    samples: int | None  # static: row n reads prompt n // samples; None: rows are in any order


def make_schedule(
    prompt_of: jax.Array,  # i32[N]: the prompt whose keys each row reads; -1: none
    lengths: jax.Array,  # i32[B]: prompt keys that are real, 0 allowed
    *,
    samples: int | None = None,
    rows: int | None = None,
) -> Schedule:
    """Constant until a row gets another prompt.

    samples: promises that row n reads prompt n // samples.  rows: slots of a tile, for tests.
    """
    n, prompts = prompt_of.shape[0], lengths.shape[0]
    prompt_of, lengths = prompt_of.astype(jnp.int32), lengths.astype(jnp.int32)
    if samples is None:
        size = rows or ROWS
        # Each class of rows (a prompt's, or the idle ones) fills its tiles but for at most size - 1 slots.
        tiles = min(n, (n + (prompts + 1) * (size - 1)) // size)
    else:
        if n != prompts * samples:
            raise ValueError(f"{n} rows are not {samples} samples of each of {prompts} prompts")
        size = rows or -(-samples // -(-samples // MOST_ROWS))
        tiles = prompts * -(-samples // size)
    tiles += tiles % 2  # two cores share them evenly

    kind = jnp.where(prompt_of < 0, prompts, prompt_of)
    order = jnp.argsort(kind, stable=True)
    count = jnp.zeros(prompts + 1, jnp.int32).at[kind].add(1)
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n) - (jnp.cumsum(count) - count)[kind[order]])
    needed = -(-count // size)
    tile = (jnp.cumsum(needed) - needed)[kind] + rank // size
    slot_of = tile * size + rank % size
    slots = jnp.full(tiles * size, -1, jnp.int32).at[slot_of].set(jnp.arange(n, dtype=jnp.int32))
    tile_prompt = jnp.zeros(tiles, jnp.int32).at[tile].set(jnp.maximum(prompt_of, 0))
    tile_length = jnp.zeros(tiles, jnp.int32).at[tile].set(prompt_lengths(prompt_of, lengths))
    return Schedule(
        prompt_of=prompt_of,
        lengths=lengths,
        rows=slots.reshape(tiles, size),
        slot_of=slot_of,
        tile_prompt=tile_prompt,
        tile_length=tile_length,
        samples=samples,
    )


def prompt_lengths(prompt_of: jax.Array, lengths: jax.Array) -> jax.Array:
    """i32[N]: keys of each row's prompt."""
    return jnp.where(prompt_of < 0, 0, lengths[jnp.maximum(prompt_of, 0)])
