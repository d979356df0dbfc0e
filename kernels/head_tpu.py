"""Output head fused with sampling or scoring on a TPU: logits stay in VMEM.

    grid (E splits, row tiles, vocabulary tiles + 1)   the last axis is the innermost
    hidden        [R, D]                  stays while the vocabulary passes
    head          [C, D]                  streams, double-buffered by the pipeline: read once per row tile
    logits        [C / 128, R, 128] f32   scratch, twice
    Accumulators  [R, 128]                in the output's block: an online softmax and an argmax per lane

1. A step multiplies its own tile on the matrix unit, and accumulates the logits of the tile before on the
   vector unit, where a logit's hash and softmax take as long as a product of 2,000 terms takes on the other.
   Both lie in one loop's body, which the compiler schedules as one; the two scratch buffers alternate.
2. For each 8 rows the C columns are C / 128 registers: hashed, compared and summed lane by lane, in
   registers.
3. The 128 lanes of a row are merged once, by the caller (`online.reduce_accumulators`).

With one row tile the vocabulary is split in two, for chips whose two cores share a grid's parallel axes.

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
ROWS = 1024  # most rows of a tile: 2 x 1024 flops for each head element of 2 bytes, above any chip's ratio
GROUP = 8  # rows whose logits are accumulated in registers at a time
COLUMNS = 1024  # most vocabulary entries of a tile
HIDDEN_BYTES, HEAD_BYTES = 8 * 2**20, 4 * 2**20  # of a tile, which is held twice
VMEM = 64 * 2**20


def stream_head(
    hidden: jax.Array,  # [N, D]
    head: jax.Array,  # [V, D], of the same dtype
    ids: jax.Array,  # u32[N, 2] key words, or i32[N, 1] targets
    bounds: jax.Array,  # i32[2]: the global index of head[0]; how many entries count, from head[0]
    *,
    mode: str,  # "draw" | "greedy" | "score"
    temperature: float,
    aligned: bool,  # bounds[0] is a multiple of gumbel.PAIR
    interpret: pltpu.InterpretParams | bool = False,
) -> online.Accumulators:
    """Accumulate each lane's share of the vocabulary: arrays [N, E * 128]."""
    (n, width), vocabulary = hidden.shape, head.shape[0]
    columns = _tile_columns(vocabulary, width * head.dtype.itemsize)

    # Rows are a multiple of `share`: then each turn of the kernel's loop accumulates as many groups as the
    # others.
    share = columns // LANES * GROUP
    most = max(min(ROWS, HIDDEN_BYTES // (width * hidden.dtype.itemsize)) // share, 1)
    rows = min(most, pl.cdiv(n, share)) * share
    row_tiles, tiles = pl.cdiv(n, rows), pl.cdiv(vocabulary, columns)
    splits = 2 if n <= rows and tiles > 1 else 1
    per_split = pl.cdiv(tiles, splits)

    def head_block(split, row_tile, step, _):
        # The last step only accumulates, and the last split may end early: a tile read twice there counts
        # once.
        return jnp.minimum(split * per_split + jnp.minimum(step, per_split - 1), tiles - 1), 0

    dtypes = [jnp.float32] * (4 if mode == "score" else 5) + [jnp.int32] * (mode != "score")
    out_shape = [jax.ShapeDtypeStruct((n, splits * LANES), dtype) for dtype in dtypes]
    kernel = functools.partial(
        _kernel, mode=mode, scale=1.0 / (temperature or 1.0), aligned=aligned, per_split=per_split
    )
    read_bytes = row_tiles * head.size * head.dtype.itemsize + hidden.size * hidden.dtype.itemsize
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(splits, row_tiles, per_split + 1),
            in_specs=[
                pl.BlockSpec((rows, width), lambda split, row_tile, step, _: (row_tile, 0)),
                pl.BlockSpec((columns, width), head_block),
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
    head,  # [C, D]
    ids,  # [R, 2] or [R, 1]
    # outputs: the arrays of Accumulators, [R, 128] each; scratch: logits f32[C / 128, R, 128], twice
    *outputs_and_scratch,
    mode: str,
    scale: float,
    aligned: bool,
    per_split: int,
):
    *acc_refs, even_logits, odd_logits = outputs_and_scratch
    columns, rows, step = head.shape[0], hidden.shape[0], pl.program_id(2)
    pieces = columns // LANES
    groups = rows // GROUP // pieces  # accumulated in each turn of the loop

    @pl.when(step == 0)
    def init():
        start = online.init_accumulators((rows, LANES), mode != "score")
        for ref, value in zip(acc_refs, start, strict=False):
            ref[...] = value

    # The tile before.  At step 0 there is none and the scratch is not initialised: no column is valid.
    first = (pl.program_id(0) * per_split + step - 1) * columns
    count = jnp.where(step == 0, -columns, bounds[1])
    shape = (pieces, GROUP, LANES)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lane
    index = bounds[0] + column

    def multiply(logits, i):
        """Write the logits of the i-th 128 columns of this step's tile."""
        logits[i] = jax.lax.dot_general(
            hidden[...],
            head[pl.ds(pl.multiple_of(i * LANES, LANES), LANES), :],
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def accumulate(logits, i):
        """Accumulate the logits of the i-th group of rows of the tile before."""
        at = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        z = jnp.where(column < count, logits[:, at, :] * scale, -jnp.inf)
        words = [jnp.broadcast_to(ids[at, k : k + 1], shape[1:])[None] for k in range(ids.shape[1])]
        if mode == "score":
            tile = online.accumulate_logits(z, 0, index=index, score=None, target=words[0])
        else:
            noise = _noise(words[0], words[1], bounds[0] + first, index, aligned) if mode == "draw" else 0.0
            tile = online.accumulate_logits(z, 0, index=index, score=z + noise, target=None)
        acc = online.Accumulators(*(ref[at, :] for ref in acc_refs))
        for ref, value in zip(acc_refs, online.merge_accumulators(acc, tile), strict=False):
            ref[at, :] = value

    def run_step(this_tile, tile_before):
        def turn(i, _):
            multiply(this_tile, i)
            for k in range(groups):
                accumulate(tile_before, i * groups + k)

        jax.lax.fori_loop(0, pieces, turn, None)

    pl.when(step % 2 == 0)(lambda: run_step(even_logits, odd_logits))
    pl.when(step % 2 == 1)(lambda: run_step(odd_logits, even_logits))


def _noise(k0: jax.Array, k1: jax.Array, first: jax.Array, index: jax.Array, aligned: bool) -> jax.Array:
    """Make the Gumbel noise of entries `index` = first + 0, 1, ...: f32[C / 128, 8, 128]."""
    if not aligned:
        return gumbel.gumbel_at(k0, k1, index.astype(jnp.uint32))
    pieces, rows, lanes = index.shape
    shape = (pieces // 2, rows, lanes)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    count = (first >> 1) + jax.lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lane
    noise = gumbel.gumbel_pair(k0, k1, count.astype(jnp.uint32))
    return jnp.stack(noise, axis=1).reshape(index.shape)


def _tile_columns(vocabulary: int, row_bytes: int) -> int:
    """Return C: a power of two within HEAD_BYTES, no more than the vocabulary needs."""
    columns = gumbel.PAIR
    while 2 * columns <= min(COLUMNS, HEAD_BYTES // row_bytes) and columns < vocabulary:
        columns *= 2
    return columns
