"""The head's matmul with a race or a score behind it, for CUDA GPUs: logits live and die in registers.

    grid (row tiles, S splits)     row tiles innermost: those of one split read the same part of the head at about
                                   the same time, so all but one find it in the L2 cache
    a program, for each 256 columns of its split:
        z [R, 2 x 128] = hidden [R, D] head[columns]^T, DEPTH of D at a time, on the tensor cores in f32
        a hash gives the noise of two columns, 128 apart
        a softmax and a race of each row: Seen [R]

What the S splits of a row hold is merged by the caller (`online.reduce_accumulators`), once.

N rows, R of them in a tile   V vocabulary entries here   D width
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cooper_jax.kernels import gumbel, online

ROWS = {"draw": 64, "greedy": 64, "score": 128}  # hashing wants registers
DEPTH_BYTES = 128  # of a row of a factor, loaded at a time
PROGRAMS = 528  # about: four for each of an H100's multiprocessors, which even out at the end
WARPS = 8


def stream_head(
    hidden: jax.Array,  # [N, D]
    head: jax.Array,  # [V, D], of the same dtype
    ids: jax.Array,  # u32[N, 2] key words, or i32[N, 1] targets
    bounds: jax.Array,  # i32[2]: the global index of head[0]; how many entries count, from head[0]
    *,
    mode: str,  # "draw" | "greedy" | "score"
    temperature: float,
    aligned: bool,  # bounds[0] is a multiple of gumbel.PAIR
    interpret: bool = False,
) -> online.Accumulators:
    """What every split saw: arrays [N, S]."""
    (n, width), vocabulary = hidden.shape, head.shape[0]
    rows = min(ROWS[mode], max(16, pl.next_power_of_2(n)))
    row_tiles, tiles = pl.cdiv(n, rows), pl.cdiv(vocabulary, gumbel.PAIR)
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
    hidden,  # inputs: [N, D]
    head,  # [V, D]
    ids,  # [N, 2] or [N, 1]
    bounds,  # i32[2]
    *out,  # outputs: Seen's arrays, [N, S] each
    mode: str,
    scale: float,
    aligned: bool,
    rows: int,
    per_split: int,
):
    split = pl.program_id(1)
    at = pl.ds(pl.program_id(0) * rows, rows)
    real = pl.program_id(0) * rows + jnp.arange(rows) < hidden.shape[0]  # bool[R]
    words = [plgpu.load(ids.at[at, pl.ds(k, 1)], mask=real[:, None], other=0) for k in range(ids.shape[1])]
    base, count = bounds[0], bounds[1]
    lane = jnp.arange(gumbel.HALF)[None, :]

    def tile(i, seen):
        first = (split * per_split + i) * gumbel.PAIR
        noise = (0.0, 0.0)
        if mode == "draw" and aligned:
            noise = gumbel.gumbel_pair(*words, (((base + first) >> 1) + lane).astype(jnp.uint32))
        logits = _logits(hidden, head, at, real, first)
        for half, z in enumerate(logits):
            column = first + half * gumbel.HALF + lane  # i32[1, 128]
            index = jnp.broadcast_to(base + column, z.shape)
            z = jnp.where(column < count, z * scale, -jnp.inf)
            if mode == "score":
                new = online.update_accumulator(z, 1, index=index, score=None, target=words[0])
            else:
                if mode == "draw" and not aligned:
                    noise = 2 * (gumbel.gumbel_at(*words, index.astype(jnp.uint32)),)
                new = online.update_accumulator(z, 1, index=index, score=z + noise[half], target=None)
            seen = online.merge_accumulators(seen, new)
        return seen

    seen = jax.lax.fori_loop(0, per_split, tile, online.init_accumulator((rows,), mode != "score"))
    for ref, value in zip(out, seen, strict=False):
        plgpu.store(ref.at[at, pl.ds(split, 1)], value[:, None], mask=real[:, None])


def _logits(hidden, head, at, real, first) -> tuple[jax.Array, jax.Array]:
    """hidden head^T for the columns from `first` on, in two halves: f32[R, 128] each."""
    width, dtype = hidden.shape[1], hidden.dtype
    depth = DEPTH_BYTES // dtype.itemsize
    here = first + jnp.arange(gumbel.HALF)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def step(k, z):
        deep = pl.ds(k * depth, depth)
        inside = (k * depth + jnp.arange(depth) < width)[None, :]
        a = plgpu.load(hidden.at[at, deep], mask=real[:, None] & inside, other=0.0)  # [R, depth]
        out = []
        for half in range(2):
            columns = pl.ds(first + half * gumbel.HALF, gumbel.HALF)
            there = (here + half * gumbel.HALF < head.shape[0])[:, None] & inside
            w = plgpu.load(head.at[columns, deep], mask=there, other=0.0)  # [128, depth]
            product = jax.lax.dot_general(
                a, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            out.append(z[half] + product)
        return tuple(out)

    zero = jnp.zeros((real.shape[0], gumbel.HALF), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(width, depth), step, (zero, zero))
