"""Output head fused with sampling or scoring on a CUDA GPU: logits stay in registers.

    grid (row tiles, E splits)     row tiles innermost: those of one split read the same part of the head at
                                   about the same time, so all but the first read it from the L2 cache
    a program, for every 256 columns of its split:
        z [R, 2 x 128] = hidden [R, D] head[columns]^T, a part of D at a time, on the tensor cores in f32
        one hash gives the noise of two columns, 128 apart
        an online softmax and an argmax of each row: Accumulators [R]

The caller merges the E splits of a row once (`online.reduce_accumulators`).

N rows   R rows of a tile   V vocabulary entries (of this shard)   D width
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cooper_jax.kernels import gumbel, online
from cooper_jax.kernels.triton_backend import plgpu

ROWS = {"draw": 64, "greedy": 64, "score": 128}  # upper bound on a tile's rows; hashing needs registers
DEPTH_BYTES = 128  # of each row of hidden and head, loaded at a time
# Target number of programs: four per multiprocessor of an H100, so that all finish at about the same time.
PROGRAMS = 528
WARPS = 8


def stream_head(
    hidden: jax.Array,  # [N, D]
    head: jax.Array,  # [V, D], of the same dtype
    ids: jax.Array,  # u32[N, 2] key words, or i32[N, 1] targets
    bounds: jax.Array,  # i32[2]: the vocabulary index of head[0]; number of entries that are not padding
    *,
    mode: str,  # "draw" | "greedy" | "score"
    temperature: float,
    aligned: bool,  # bounds[0] is a multiple of gumbel.PAIR
    interpret: bool = False,
) -> online.Accumulators:
    """Accumulate each split's share of the vocabulary, for `head._stream_head`: arrays [N, E]."""
    (n, width), vocabulary = hidden.shape, head.shape[0]

    # 16 is the smallest extent of a tensor core's operand.
    rows = min(ROWS[mode], max(16, pl.next_power_of_2(n)))
    row_tiles, tiles = pl.cdiv(n, rows), pl.cdiv(vocabulary, gumbel.PAIR)

    # Few row tiles get many splits, so that there are about PROGRAMS programs in any case.
    per_split = pl.cdiv(tiles, pl.cdiv(PROGRAMS, row_tiles))
    splits = pl.cdiv(tiles, per_split)
    kernel = functools.partial(
        _kernel,
        mode=mode,
        scale=1.0 / (temperature or 1.0),
        aligned=aligned,
        rows=rows,
        per_split=per_split,
    )

    # The fields of Accumulators: four f32, and for sampling f32 `score` and i32 `token`.
    dtypes = [jnp.float32] * (4 if mode == "score" else 5) + [jnp.int32] * (mode != "score")
    out = pl.pallas_call(
        kernel,
        grid=(row_tiles, splits),
        out_shape=[jax.ShapeDtypeStruct((n, splits), d) for d in dtypes],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * vocabulary * width,
            transcendentals=(3 if mode == "draw" else 1) * n * vocabulary,
            bytes_accessed=(head.size + splits * hidden.size) * head.dtype.itemsize
            + len(dtypes) * n * splits * 4,
        ),
        interpret=interpret,
        name=f"head_{mode}",
    )(hidden, head, ids, bounds)
    return online.Accumulators(*out)


def _kernel(
    # inputs
    hidden,  # [N, D]
    head,  # [V, D]
    ids,  # [N, 2] or [N, 1]
    bounds,  # i32[2]
    # outputs: the arrays of Accumulators, [N, E] each
    *acc_refs,
    mode: str,
    scale: float,
    aligned: bool,
    rows: int,
    per_split: int,
):
    # Rows past N and entries past the vocabulary are masked loads: the tiles need not divide either.
    split = pl.program_id(1)
    at = pl.ds(pl.program_id(0) * rows, rows)
    real = pl.program_id(0) * rows + jnp.arange(rows) < hidden.shape[0]  # bool[R]
    words = [plgpu.load(ids.at[at, pl.ds(k, 1)], mask=real[:, None], other=0) for k in range(ids.shape[1])]
    base, count = bounds[0], bounds[1]
    lane = jnp.arange(gumbel.HALF)[None, :]

    def add_pair(i, acc):
        """Accumulate 256 columns, in two halves of 128 that share their hashes."""
        first = (split * per_split + i) * gumbel.PAIR

        # Aligned shards begin at a pair of the vocabulary, so one hash serves both halves.
        pair_noise = None
        if mode == "draw" and aligned:
            hash_count = (((base + first) >> 1) + lane).astype(jnp.uint32)
            pair_noise = gumbel.gumbel_pair(words[0], words[1], hash_count)

        logits = _logits(hidden, head, at, real, first)
        for half, z in enumerate(logits):
            column = first + half * gumbel.HALF + lane  # i32[1, 128]
            index = jnp.broadcast_to(base + column, z.shape)
            z = jnp.where(column < count, z * scale, -jnp.inf)
            if mode == "score":
                piece = online.accumulate_logits(z, 1, index=index, score=None, target=words[0])
            else:
                noise: jax.Array | float = 0.0
                if pair_noise is not None:
                    noise = pair_noise[half]
                elif mode == "draw":
                    noise = gumbel.gumbel_at(words[0], words[1], index.astype(jnp.uint32))
                piece = online.accumulate_logits(z, 1, index=index, score=z + noise, target=None)
            acc = online.merge_accumulators(acc, piece)
        return acc

    acc = jax.lax.fori_loop(0, per_split, add_pair, online.init_accumulators((rows,), mode != "score"))
    for ref, value in zip(acc_refs, acc, strict=False):
        plgpu.store(ref.at[at, pl.ds(split, 1)], value[:, None], mask=real[:, None])


def _logits(hidden, head, at, real, first) -> tuple[jax.Array, jax.Array]:
    """Multiply rows `at` of hidden with the 256 columns from `first` on, in two halves: f32[R, 128] each.

    real: bool[R], False in rows past the end of hidden.
    """
    width, dtype = hidden.shape[1], hidden.dtype
    depth = DEPTH_BYTES // dtype.itemsize
    column = first + jnp.arange(gumbel.HALF)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def add_product(k, z):
        """Add the product over the k-th `depth` entries of the width."""
        part = pl.ds(k * depth, depth)
        in_width = (k * depth + jnp.arange(depth) < width)[None, :]
        a = plgpu.load(hidden.at[at, part], mask=real[:, None] & in_width, other=0.0)  # [R, depth]

        # Two products of 128 columns each, since their logits are hashed and merged apart.
        sums = []
        for half in range(2):
            columns = pl.ds(first + half * gumbel.HALF, gumbel.HALF)
            mask = (column + half * gumbel.HALF < head.shape[0])[:, None] & in_width
            w = plgpu.load(head.at[columns, part], mask=mask, other=0.0)  # [128, depth]
            product = jax.lax.dot_general(
                a, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            sums.append(z[half] + product)
        return tuple(sums)

    zero = jnp.zeros((real.shape[0], gumbel.HALF), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(width, depth), add_product, (zero, zero))
