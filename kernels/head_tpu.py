"""The head's matmul with a race or a score behind it, for TPUs: logits live and die in VMEM.

    grid (S splits, row tiles, vocabulary tiles and one)  innermost last
    hidden [R, D]     stays while the vocabulary passes
    head   [C, D]     streams, double-buffered by the pipeline: read once a row tile
    logits [C / 128, R, 128] f32 scratch, twice
    Seen   [R, 128]   accumulates in the output's block, a softmax and a race of each lane's own

1. A step multiplies its own tile on the matrix unit, and looks at the logits of the tile before on the vector unit,
   where a logit's hash and softmax take as long as a product of 2,000 terms takes on the other.  Both lie in one
   loop's body, which the compiler schedules as one; the two scratches take turns.
2. For each 8 rows the C columns are C / 128 registers: hashed, raced and summed lane by lane, in registers.
3. What the 128 lanes of a row hold is merged by the caller (`online.reduce_accumulators`), once.

Splits halve the vocabulary when there is one row tile, for chips whose two cores share a grid's parallel axes.

N rows, R of them in a tile   V vocabulary entries here, C in a tile   D width
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cooper_jax.kernels import gumbel, online

LANES = 128
ROWS = 1024  # the most in a tile: 2 x 1024 flops for each head element of 2 bytes, above any chip's ratio
GROUP = 8  # rows whose logits are worked on in registers at a time
COLUMNS = 1024  # the most in a tile
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
    """What every lane saw: arrays [N, S * 128]."""
    (n, width), vocabulary = hidden.shape, head.shape[0]
    columns = _columns(vocabulary, width * head.dtype.itemsize)
    share = columns // LANES * GROUP  # rows: a group for each of the loop's turns
    most = max(min(ROWS, HIDDEN_BYTES // (width * hidden.dtype.itemsize)) // share, 1)
    rows = min(most, pl.cdiv(n, share)) * share
    tiles = pl.cdiv(vocabulary, columns)
    splits = 2 if n <= rows and tiles > 1 else 1
    per_split = pl.cdiv(tiles, splits)

    def head_tile(s, i, j, _):
        # The last step only looks, and the last split may end early: what is read twice there counts once.
        return jnp.minimum(s * per_split + jnp.minimum(j, per_split - 1), tiles - 1), 0

    dtypes = [jnp.float32] * (4 if mode == "score" else 5) + [jnp.int32] * (mode != "score")
    seen = [jax.ShapeDtypeStruct((n, splits * LANES), d) for d in dtypes]
    kernel = functools.partial(
        _kernel, mode=mode, scale=1.0 / (temperature or 1.0), aligned=aligned, per_split=per_split
    )
    reads = pl.cdiv(n, rows) * head.size * head.dtype.itemsize + hidden.size * hidden.dtype.itemsize
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(splits, pl.cdiv(n, rows), per_split + 1),
            in_specs=[
                pl.BlockSpec((rows, width), lambda s, i, j, _: (i, 0)),
                pl.BlockSpec((columns, width), head_tile),
                pl.BlockSpec((rows, ids.shape[1]), lambda s, i, j, _: (i, 0)),
            ],
            out_specs=[pl.BlockSpec((rows, LANES), lambda s, i, j, _: (i, s))] * len(seen),
            scratch_shapes=[pltpu.VMEM((columns // LANES, rows, LANES), jnp.float32)] * 2,
        ),
        out_shape=seen,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * vocabulary * width,
            transcendentals=(3 if mode == "draw" else 1) * n * vocabulary,
            bytes_accessed=reads + len(seen) * n * splits * LANES * 4,
        ),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name=f"head_{mode}",
    )(bounds, hidden, head, ids)
    return online.Accumulators(*out)


def _kernel(
    bounds,  # prefetch: i32[2]
    hidden,  # inputs: [R, D]
    head,  # [C, D]
    ids,  # [R, 2] or [R, 1]
    *rest,  # outputs: Seen's arrays, [R, 128] each; scratch: logits f32[C / 128, R, 128], twice
    mode: str,
    scale: float,
    aligned: bool,
    per_split: int,
):
    *seen, even, odd = rest
    (columns, _), rows, step = head.shape, hidden.shape[0], pl.program_id(2)
    pieces = columns // LANES
    groups = rows // GROUP // pieces  # looked at in each turn of the loop

    @pl.when(step == 0)
    def _():
        for ref, value in zip(seen, online.init_accumulator((rows, LANES), mode != "score"), strict=False):
            ref[...] = value

    # The tile before.  At step 0 there is none, and the scratch holds anything: no column counts.
    first = (pl.program_id(0) * per_split + step - 1) * columns
    count = jnp.where(step == 0, -columns, bounds[1])
    shape = (pieces, GROUP, LANES)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lane
    index = bounds[0] + column

    def multiply(logits, i):
        logits[i] = jax.lax.dot_general(
            hidden[...],
            head[pl.ds(pl.multiple_of(i * LANES, LANES), LANES), :],
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def look(logits, i):
        at = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        z = jnp.where(column < count, logits[:, at, :] * scale, -jnp.inf)
        words = [jnp.broadcast_to(ids[at, k : k + 1], shape[1:])[None] for k in range(ids.shape[1])]
        if mode == "score":
            new = online.update_accumulator(z, 0, index=index, score=None, target=words[0])
        else:
            noise = _noise(words, bounds[0] + first, index, aligned) if mode == "draw" else 0.0
            new = online.update_accumulator(z, 0, index=index, score=z + noise, target=None)
        old = online.Accumulators(*(ref[at, :] for ref in seen))
        for ref, value in zip(seen, online.merge_accumulators(old, new), strict=False):
            ref[at, :] = value

    def take_turns(this, before):
        def turn(i, _):
            multiply(this, i)
            for k in range(groups):
                look(before, i * groups + k)

        jax.lax.fori_loop(0, pieces, turn, None)

    pl.when(step % 2 == 0)(lambda: take_turns(even, odd))
    pl.when(step % 2 == 1)(lambda: take_turns(odd, even))


def _noise(words: list[jax.Array], first: jax.Array, index: jax.Array, aligned: bool) -> jax.Array:
    """Gumbel noise of entries `index` = first + 0, 1, ..., f32[C / 128, 8, 128]."""
    if not aligned:
        return gumbel.gumbel_at(*words, index.astype(jnp.uint32))
    pieces, rows, lanes = index.shape
    shape = (pieces // 2, rows, lanes)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    count = (first >> 1) + jax.lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lane
    noise = gumbel.gumbel_pair(*words, count.astype(jnp.uint32))
    return jnp.stack(noise, axis=1).reshape(index.shape)


def _columns(vocabulary: int, row_bytes: int) -> int:
    """C: a power of two within HEAD_BYTES, no more than the vocabulary needs."""
    columns = gumbel.PAIR
    while 2 * columns <= min(COLUMNS, HEAD_BYTES // row_bytes) and columns < vocabulary:
        columns *= 2
    return columns
