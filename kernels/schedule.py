"""Schedule of decode attention: the assignment of rows to prompts and to tiles.

It is computed once and stays valid while rows keep their prompts.  Rows of one prompt are put side by side in
tiles, so that a tile reads its prompt's keys once for all its rows.

N rows   B prompts   G samples per prompt   Y tiles of R rows
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

ROWS = 8  # rows of a tile if rows are in any order
MOST_ROWS = 16  # upper bound on a tile's rows if rows are prompt-major
LOWEST = -1e38  # the least m = max z: differences of two stay finite, and e^(-inf - m) is 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompt_of", "lengths", "rows", "slot_of", "tile_prompt", "tile_length"],
    meta_fields=["samples"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Assignment of rows to prompts, and of rows to places in the tiles that kernels process."""

    # The rows' prompts: enough for the xla backend.
    prompt_of: jax.Array  # i32[N]: the prompt that each row reads; -1: none
    lengths: jax.Array  # i32[B]: keys of each prompt without padding
    # The tiles, for the kernels.
    rows: jax.Array  # i32[Y, R]: the row at each place of a tile, or -1; Y is even
    slot_of: jax.Array  # i32[N]: each row's place, counted over all tiles: the inverse of `rows`
    tile_prompt: jax.Array  # i32[Y]: the one prompt that a tile's rows read
    tile_length: jax.Array  # i32[Y]: that prompt's length; 0: no prompt
    # Static: row n reads prompt n // samples.  None: rows are in any order.
    samples: int | None


def make_schedule(
    prompt_of: jax.Array,  # i32[N]: the prompt whose keys each row reads; -1: none
    lengths: jax.Array,  # i32[B]: keys of each prompt without padding, 0 allowed
    *,
    samples: int | None = None,
    rows: int | None = None,
) -> Schedule:
    """Make the schedule, which stays valid until a row gets another prompt.

    samples: a promise that row n reads prompt n // samples; None: rows are in any order.
    rows: R, for tests.

    Raises ValueError if the number of rows is not samples times the number of prompts.
    """
    n, prompts = prompt_of.shape[0], lengths.shape[0]
    prompt_of, lengths = prompt_of.astype(jnp.int32), lengths.astype(jnp.int32)

    # The number of tiles is static: an upper bound if rows are in any order, exact if they are prompt-major.
    if samples is None:
        size = rows or ROWS
        # Each class of rows (those of one prompt, or the idle rows) leaves at most size - 1 places empty.
        tiles = min(n, (n + (prompts + 1) * (size - 1)) // size)
    else:
        if n != prompts * samples:
            raise ValueError(f"{n} rows are not {samples} samples of each of {prompts} prompts")
        # A prompt's samples fill as few tiles as MOST_ROWS allows, evenly.
        size = rows or -(-samples // -(-samples // MOST_ROWS))
        tiles = prompts * -(-samples // size)
    tiles += tiles % 2  # the two cores of a TPU chip process half of them each

    # Rank each row among the rows of its class (its prompt, or idle), and give each class whole tiles.
    group = jnp.where(prompt_of < 0, prompts, prompt_of)
    order = jnp.argsort(group, stable=True)
    count = jnp.zeros(prompts + 1, jnp.int32).at[group].add(1)
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n) - (jnp.cumsum(count) - count)[group[order]])
    needed = -(-count // size)
    tile = (jnp.cumsum(needed) - needed)[group] + rank // size

    # Invert the assignment.  Places that no row gets keep row -1; tiles without rows keep prompt 0, length 0.
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
    """Return the length of each row's prompt, 0 for a row without one: i32[N]."""
    return jnp.where(prompt_of < 0, 0, lengths[jnp.maximum(prompt_of, 0)])
