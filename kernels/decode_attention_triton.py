"""Decode attention on a GPU, through Triton: two calls a layer, on the stacked caches.

    prompt   program (tile, KV head)   R rows' g queries against their one prompt, each block read once a tile
             -> peak = max z, mass = sum e^(z - peak): f32[T, K, R * g]; sums = sum e^(z - peak) v, [.., h] more
    suffix   program (row, KV head)    starts from what its row has and goes on over columns `first` to `last`

Columns outside a row's range, and those past a prompt's length, are masked loads: never read.  Queries are
padded to the 16 rows that a tensor core takes.

jax's own Pallas decode kernel stands for none of this: it wants one layer's k and v apart and without a head axis,
vmaps over rows (so each row would read its own copy of the prompt), and knows neither int8 nor an oldest column.

T tiles   R rows in a tile   N rows   K key/value heads   g queries for each   h head_dim   C columns of a block
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.schedule import LOWEST, Schedule

BLOCK = 64
DOT = 16  # the least extent of a tensor core's operand
WARPS, STAGES = 4, 3


def decode_attention(
    q: jax.Array,  # [N, H, h]
    prompt: KV,
    suffix: KV,
    plan: Schedule,
    first: jax.Array,
    last: jax.Array,
    layer: jax.Array,
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """See decode_attention.decode_attention."""
    n, heads, h = q.shape
    if h < DOT or h & (h - 1):
        raise ValueError(f"head_dim {h}: Triton's tensors are powers of two, from {DOT} on")
    kv_heads = suffix.data[0].shape[2]
    group = heads // kv_heads
    tiles, rows = plan.rows.shape
    q = q.reshape(n, kv_heads, group, h)
    tiled = q[jnp.maximum(plan.rows, 0)].swapaxes(1, 2).reshape(tiles, kv_heads, rows * group, h)
    lines = tiled.shape[:-1]
    call = functools.partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )

    prompt, at = _addressable(prompt, layer)
    state = call(
        functools.partial(_prompt_kernel, block=block),
        grid=(tiles, kv_heads),
        out_shape=[
            jax.ShapeDtypeStruct(tiled.shape, jnp.float32),
            jax.ShapeDtypeStruct(lines, jnp.float32),
            jax.ShapeDtypeStruct(lines, jnp.float32),
        ],
        cost_estimate=_cost(tiled, prompt),
        name="decode_attention_prompt",
    )(at, plan.tile_prompt, plan.tile_length, tiled, *prompt.data, *prompt.scales)

    suffix, at = _addressable(suffix, layer)
    bounds = jnp.stack([at[0], last.astype(jnp.int32)])
    out = call(
        functools.partial(_suffix_kernel, block=block, rows=rows),
        grid=(n, kv_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        cost_estimate=_cost(q, suffix),
        name="decode_attention_suffix",
    )(bounds, plan.slot_of, first.astype(jnp.int32), *state, q, *suffix.data, *suffix.scales)
    return out.reshape(n, heads, h)


def _addressable(cache: KV, layer: jax.Array) -> tuple[KV, jax.Array]:
    """The cache and i32[1], the layer in it, such that Triton's offsets hold every element of it.

    The lowering counts elements in signed 32 bits up to 4 GiB, and in 64 from there on: of int8 the second half
    is out of reach, and the layer has to be copied out.
    """
    if cache.scales and 2**31 < cache.data[0].size <= 2**32:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer), cache), jnp.zeros(1, jnp.int32)
    return cache, layer.astype(jnp.int32).reshape(1)


def _cost(q: jax.Array, cache: KV) -> pl.CostEstimate:
    """Of a full cache: how much of it is read is known only when the kernel runs."""
    pairs = q.size // q.shape[-1] * cache.data[0].shape[3]
    layer = sum(x.size // x.shape[0] * x.dtype.itemsize for x in (*cache.data, *cache.scales))
    return pl.CostEstimate(
        flops=4 * pairs * q.shape[-1],
        transcendentals=pairs,
        bytes_accessed=layer + q.size * (q.dtype.itemsize + 4),
    )


def _prompt_kernel(
    layer,  # inputs: i32[1]
    tile_prompt,  # i32[T]
    tile_length,  # i32[T]
    q,  # [T, K, R * g, h]
    *rest,  # the prompt's [L, B, K, P, 2 h], in int8 its scales f32[L, B, K, P] twice
    # outputs: sums f32[T, K, R * g, h], peak and mass f32[T, K, R * g]
    block: int,
):
    *cache, sums, peak, mass = rest
    tile, head = pl.program_id(0), pl.program_id(1)
    lines, h = q.shape[2:]
    line, lane = _part(0, lines), pl.ds(0, h)
    shape = (line.at.size, h)
    empty = (
        jnp.zeros(shape, jnp.float32),
        jnp.full(shape[:1], LOWEST, jnp.float32),
        jnp.zeros(shape[:1], jnp.float32),
    )
    queries = _load(q, (tile, head, line, lane))
    where = layer[0], tile_prompt[tile], head
    state = _attend(queries, cache, where, empty, begin=0, end=tile_length[tile], block=block, h=h)
    _store(sums, (tile, head, line, lane), state[0])
    _store(peak, (tile, head, line), state[1])
    _store(mass, (tile, head, line), state[2])


def _suffix_kernel(
    bounds,  # inputs: i32[2]: layer, last column
    slot_of,  # i32[N]
    first,  # i32[N]
    sums,  # f32[T, K, R * g, h]
    peak,  # f32[T, K, R * g]
    mass,  # f32[T, K, R * g]
    q,  # [N, K, g, h]
    *rest,  # the suffix's [L, N, K, W, 2 h], in int8 its scales f32[L, N, K, W] twice
    # outputs: [N, K, g, h]
    block: int,
    rows: int,
):
    *cache, out = rest
    row, head = pl.program_id(0), pl.program_id(1)
    group, h = q.shape[2:]
    line, lane = _part(0, group), pl.ds(0, h)
    slot = slot_of[row]
    own = slot // rows, head, _part(slot % rows * group, group)
    state = _load(sums, (*own, lane)), _load(peak, own), _load(mass, own)
    queries = _load(q, (row, head, line, lane))
    where = bounds[0], row, head
    begin, end = jnp.maximum(first[row], 0), bounds[1] + 1
    sums_new, _, mass_new = _attend(queries, cache, where, state, begin=begin, end=end, block=block, h=h)
    value = sums_new / jnp.where(mass_new > 0.0, mass_new, 1.0)[:, None]
    _store(out, (row, head, line, lane), value.astype(out.dtype))


def _attend(q, cache, where, state, *, begin, end, block, h):
    """The state, (sums [M, h], peak [M], mass [M]), and columns `begin` to `end` - 1 of cache[where].  q [M, h]."""
    keys = cache[0]
    compute = q.dtype if keys.dtype == jnp.int8 else keys.dtype
    q = q.astype(compute)

    def one(i, state):
        sums, peak, mass = state
        column = i * block + jnp.arange(block)
        seen = Part(pl.ds(i * block, block), (column >= begin) & (column < end))
        k, v = (_load(keys, (*where, seen, pl.ds(offset, h))).astype(compute) for offset in (0, h))  # [C, h]
        scales = [_load(x, (*where, seen)) for x in cache[1:]]  # f32[C]
        z = _dot(q, k.T) * h**-0.5
        if scales:
            z = z * scales[0][None, :]
        z = jnp.where(seen.real[None, :], z, -jnp.inf)
        peak_new = jnp.maximum(peak, jnp.max(z, axis=1))
        p = jnp.exp(z - peak_new[:, None])
        decay = jnp.exp(peak - peak_new)
        mass_new = decay * mass + jnp.sum(p, axis=1)
        if scales:
            p = p * scales[1][None, :]
        return decay[:, None] * sums + _dot(p.astype(compute), v), peak_new, mass_new

    return jax.lax.fori_loop(begin // block, pl.cdiv(end, block), one, state)


class Part(NamedTuple):
    """A stretch of an axis that may go past what there is."""

    at: pl.Slice
    real: jax.Array  # bool[length]: which of it is there


def _part(start: jax.Array | int, size: int) -> Part:
    """`size` queries, padded to what Triton's dots take."""
    length = max(DOT, pl.next_power_of_2(size))
    return Part(pl.ds(start, length), jnp.arange(length) < size)


def _access(ref, index):
    """The view of an index of scalars, one `Part` and at most a slice behind it; and its mask."""
    *_, part = (i for i in index if isinstance(i, Part))
    mask = part.real if index[-1] is part else part.real[:, None]
    return ref.at[tuple(i.at if isinstance(i, Part) else i for i in index)], mask


def _load(ref, index):
    """What is not there is 0, and is not read."""
    view, mask = _access(ref, index)
    return plgpu.load(view, mask=mask, other=jnp.zeros((), ref.dtype))


def _store(ref, index, value):
    view, mask = _access(ref, index)
    plgpu.store(view, value, mask=mask)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """f32[M, n]"""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
