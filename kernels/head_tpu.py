"""Output head fused with sampling or scoring on a TPU: logits stay in VMEM.

    grid (E splits, row tiles, vocabulary tiles + 1)   the last axis is the innermost
    hidden        [R, D]                  stays in VMEM for all vocabulary tiles
    head          [C, D] or [D, C]        double-buffered by the pipeline: read once per row tile
    logits        [C / 128, R, 128] f32   scratch, two buffers
    Accumulators  [R, 128]                the output block: an online softmax and an argmax per lane

1. A step multiplies its own tile on the matrix unit, and accumulates the logits of the previous step's tile
   on the vector unit.  There, the hash and the softmax of a logit take as long as a product of 2,000 terms
   takes on the matrix unit.  Both are in the body of one loop, so that the compiler overlaps them; the two
   scratch buffers alternate.
2. The logits of 8 rows are C / 128 registers, which are hashed, compared and summed lane by lane.
3. The caller merges the 128 lanes of a row once (`online.reduce_accumulators`).

With a single row tile, the vocabulary is split in two for chips whose two cores share the parallel axes of a
grid.

N rows   R rows of a tile   V vocabulary entries (of this shard)   C entries of a tile   D width
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cooper_jax.kernels import gumbel, online

LANES = 128
GROUP = 8  # rows whose logits are accumulated in registers at a time
# Upper bounds on a tile.  1024 rows are 2 x 1024 flops per head element of 2 bytes, above any chip's ratio of
# flops to bytes, so the product and not the head's copy takes the time.
ROWS = 1024
COLUMNS = 1024  # vocabulary entries
HIDDEN_BYTES, HEAD_BYTES = 8 * 2**20, 4 * 2**20  # of one of two buffers
VMEM = 64 * 2**20


def stream_head(
    hidden: jax.Array,  # [N, D]
    head: jax.Array,  # [V, D], of the same dtype; by column [D, V]
    ids: jax.Array,  # u32[N, 2] key words, or i32[N, 1] targets
    bounds: jax.Array,  # i32[2]: the vocabulary index of head[0]; number of entries that are not padding
    *,
    mode: str,  # "draw" | "greedy" | "score"
    temperature: float,
    aligned: bool,  # bounds[0] is a multiple of gumbel.PAIR
    by_column: bool = False,
    interpret: pltpu.InterpretParams | bool = False,
) -> online.Accumulators:
    """Accumulate each lane's share of the vocabulary, for `head._stream_head`: arrays [N, E * 128]."""
    (n, width), vocabulary = hidden.shape, head.shape[1 if by_column else 0]
    columns = _tile_columns(vocabulary, width * head.dtype.itemsize)

    # Rows are a multiple of `row_multiple`, so that every iteration of the kernel's loop accumulates the same
    # number of groups.
    row_multiple = columns // LANES * GROUP
    max_multiples = max(min(ROWS, HIDDEN_BYTES // (width * hidden.dtype.itemsize)) // row_multiple, 1)
    rows = min(max_multiples, pl.cdiv(n, row_multiple)) * row_multiple

    row_tiles, tiles = pl.cdiv(n, rows), pl.cdiv(vocabulary, columns)
    splits = 2 if n <= rows and tiles > 1 else 1
    per_split = pl.cdiv(tiles, splits)

    def head_block(split, row_tile, step, _):
        # The last step only accumulates, and the last split may have fewer tiles.  There a tile is read
        # again, but accumulated once.
        tile = jnp.minimum(split * per_split + jnp.minimum(step, per_split - 1), tiles - 1)
        return (0, tile) if by_column else (tile, 0)

    # The fields of Accumulators: four f32, and for sampling f32 `score` and i32 `token`.
    dtypes = [jnp.float32] * (4 if mode == "score" else 5) + [jnp.int32] * (mode != "score")
    out_shape = [jax.ShapeDtypeStruct((n, splits * LANES), dtype) for dtype in dtypes]
    kernel = functools.partial(
        _kernel,
        mode=mode,
        scale=1.0 / (temperature or 1.0),
        aligned=aligned,
        by_column=by_column,
        per_split=per_split,
    )
    read_bytes = row_tiles * head.size * head.dtype.itemsize + hidden.size * hidden.dtype.itemsize
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(splits, row_tiles, per_split + 1),
            in_specs=[
                pl.BlockSpec((rows, width), lambda split, row_tile, step, _: (row_tile, 0)),
                pl.BlockSpec((width, columns) if by_column else (columns, width), head_block),
                pl.BlockSpec((rows, ids.shape[1]), lambda split, row_tile, step, _: (row_tile, 0)),
            ],
            out_specs=[
                pl.BlockSpec((rows, LANES), lambda split, row_tile, step, _: (row_tile, split)),
            ]
            * len(out_shape),
            scratch_shapes=[pltpu.VMEM((columns // LANES, rows, LANES), jnp.float32)] * 2,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * vocabulary * width,
            transcendentals=(3 if mode == "draw" else 1) * n * vocabulary,
            bytes_accessed=read_bytes + len(out_shape) * n * splits * LANES * 4,
        ),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name=f"head_{mode}",
    )(bounds, hidden, head, ids)
    return online.Accumulators(*out)


def _kernel(
    # prefetch scalars
    bounds,  # i32[2]
    # inputs
    hidden,  # [R, D]
    head,  # [C, D], or by column [D, C]
    ids,  # [R, 2] or [R, 1]
    # outputs: the arrays of Accumulators, [R, 128] each; scratch: logits f32[C / 128, R, 128], twice
    *outputs_and_scratch,
    mode: str,
    scale: float,
    aligned: bool,
    by_column: bool,
    per_split: int,
):
    *acc_refs, even_logits, odd_logits = outputs_and_scratch
    columns, rows, step = head.shape[1 if by_column else 0], hidden.shape[0], pl.program_id(2)
    pieces = columns // LANES
    groups = rows // GROUP // pieces  # groups of rows accumulated in one iteration of the loop

    @pl.when(step == 0)
    def init():
        # The output block stays in VMEM for all steps of a row tile.
        start = online.init_accumulators((rows, LANES), mode != "score")
        for ref, value in zip(acc_refs, start, strict=False):
            ref[...] = value

    # Columns of the previous step's tile.  Step 0 has none, and its scratch is not initialised: with a count
    # below every column, none of them is valid.
    first = (pl.program_id(0) * per_split + step - 1) * columns
    count = jnp.where(step == 0, -columns, bounds[1])
    shape = (pieces, GROUP, LANES)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lane
    index = bounds[0] + column

    def multiply(logits, i):
        """Write the logits f32[R, 128] of the i-th 128 columns of this step's tile."""
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        logits[i] = jax.lax.dot_general(
            hidden[...],
            head[:, at] if by_column else head[at, :],
            (((1,), (0 if by_column else 1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def accumulate(logits, i):
        """Accumulate the logits f32[C / 128, 8, 128] of the i-th group of rows of the previous tile."""
        at = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        z = jnp.where(column < count, logits[:, at, :] * scale, -jnp.inf)
        words = [jnp.broadcast_to(ids[at, k : k + 1], shape[1:])[None] for k in range(ids.shape[1])]
        if mode == "score":
            tile = online.accumulate_logits(z, 0, index=index, score=None, target=words[0])
        else:
            noise = _noise(words[0], words[1], bounds[0] + first, index, aligned) if mode == "draw" else 0.0
            tile = online.accumulate_logits(z, 0, index=index, score=z + noise, target=None)

        # `tile` has the columns behind those of `acc`: the order decides ties.
        acc = online.Accumulators(*(ref[at, :] for ref in acc_refs))
        for ref, value in zip(acc_refs, online.merge_accumulators(acc, tile), strict=False):
            ref[at, :] = value

    def run_step(this_tile, previous_tile):
        def multiply_and_accumulate(i, _):
            multiply(this_tile, i)
            for k in range(groups):
                accumulate(previous_tile, i * groups + k)

        jax.lax.fori_loop(0, pieces, multiply_and_accumulate, None)

    # The buffers are separate refs, so that the two halves of the loop's body visibly use different memory.
    pl.when(step % 2 == 0)(lambda: run_step(even_logits, odd_logits))
    pl.when(step % 2 == 1)(lambda: run_step(odd_logits, even_logits))


def _noise(k0: jax.Array, k1: jax.Array, first: jax.Array, index: jax.Array, aligned: bool) -> jax.Array:
    """Make the Gumbel noise of the entries `index`, which begin at `first`: f32[C / 128, 8, 128]."""
    if not aligned:
        return gumbel.gumbel_at(k0, k1, index.astype(jnp.uint32))

    # One hash for two registers: columns 0 to 127 and 128 to 255 of each pair.
    pieces, rows, lanes = index.shape
    shape = (pieces // 2, rows, lanes)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    count = (first >> 1) + jax.lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lane
    noise = gumbel.gumbel_pair(k0, k1, count.astype(jnp.uint32))
    return jnp.stack(noise, axis=1).reshape(index.shape)


def _tile_columns(vocabulary: int, row_bytes: int) -> int:
    """Return C: a power of two up to COLUMNS and HEAD_BYTES, and no larger than the vocabulary needs."""
    columns = gumbel.PAIR
    while 2 * columns <= min(COLUMNS, HEAD_BYTES // row_bytes) and columns < vocabulary:
        columns *= 2
    return columns
