"""Schedule of decode attention: which row reads which prompt, computed once while rows keep their prompts.

Rows of one prompt are put side by side in tiles, so that a tile reads its prompt's keys once for all of them.

N rows   B prompts   G samples per prompt   Y tiles of R rows
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

ROWS = 8  # rows of a tile if rows are in any order
MOST_ROWS = 16  # most rows of a tile if rows are prompt-major
LOWEST = -1e38  # the least m = max z: differences of two stay finite, and e^(-inf - m) is 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompt_of", "lengths", "rows", "slot_of", "tile_prompt", "tile_length"],
    meta_fields=["samples"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Assignment of rows to prompts, and of rows to places in the tiles that kernels process."""

    prompt_of: jax.Array  # i32[N]: the prompt that each row reads; -1: none
    lengths: jax.Array  # i32[B]: prompt keys that are real
    rows: jax.Array  # i32[Y, R]: the row at each place of a tile, or -1; Y is even
    slot_of: jax.Array  # i32[N]: each row's place, counted over all tiles: the inverse of `rows`
    tile_prompt: jax.Array  # i32[Y]: the one prompt that a tile's rows read
    tile_length: jax.Array  # i32[Y]: its real keys; 0: no prompt
    samples: int | None  # static: row n reads prompt n // samples; None: rows are in any order


def make_schedule(
    prompt_of: jax.Array,  # i32[N]: the prompt whose keys each row reads; -1: none
    lengths: jax.Array,  # i32[B]: prompt keys that are real, 0 allowed
    *,
    samples: int | None = None,
    rows: int | None = None,
) -> Schedule:
    """Make the schedule, which stays valid until a row gets another prompt.

    samples: promises that row n reads prompt n // samples.  rows: R, for tests.  Raises ValueError if the
    number of rows is not samples times the number of prompts.
    """
    n, prompts = prompt_of.shape[0], lengths.shape[0]
    prompt_of, lengths = prompt_of.astype(jnp.int32), lengths.astype(jnp.int32)
    if samples is None:
        size = rows or ROWS
        # Each class of rows (a prompt's, or the idle ones) fills its tiles except for at most size - 1
        # places.
        tiles = min(n, (n + (prompts + 1) * (size - 1)) // size)
    else:
        if n != prompts * samples:
            raise ValueError(f"{n} rows are not {samples} samples of each of {prompts} prompts")
        size = rows or -(-samples // -(-samples // MOST_ROWS))
        tiles = prompts * -(-samples // size)
    tiles += tiles % 2  # two cores share them evenly

    # Rank each row among those of its class (its prompt, or idle), and give each class whole tiles.
    group = jnp.where(prompt_of < 0, prompts, prompt_of)
    order = jnp.argsort(group, stable=True)
    count = jnp.zeros(prompts + 1, jnp.int32).at[group].add(1)
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n) - (jnp.cumsum(count) - count)[group[order]])
    needed = -(-count // size)
    tile = (jnp.cumsum(needed) - needed)[group] + rank // size

    slot_of = tile * size + rank % size
    row_of = jnp.full(tiles * size, -1, jnp.int32).at[slot_of].set(jnp.arange(n, dtype=jnp.int32))
    tile_prompt = jnp.zeros(tiles, jnp.int32).at[tile].set(jnp.maximum(prompt_of, 0))
    tile_length = jnp.zeros(tiles, jnp.int32).at[tile].set(prompt_lengths(prompt_of, lengths))
    return Schedule(
        prompt_of=prompt_of,
        lengths=lengths,
        rows=row_of.reshape(tiles, size),
        slot_of=slot_of,
        tile_prompt=tile_prompt,
        tile_length=tile_length,
        samples=samples,
    )


def prompt_lengths(prompt_of: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return the number of keys of each row's prompt: i32[N]."""
    return jnp.where(prompt_of < 0, 0, lengths[jnp.maximum(prompt_of, 0)])
