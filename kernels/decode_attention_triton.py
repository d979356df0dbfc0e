"""Decode attention on a CUDA GPU, through Triton: two calls per layer, on the stacked caches.

    prompt   program (tile, KV head)   R rows' g queries against their prompt, each block read once per tile
             -> m = max z, l = sum e^(z - m): f32[Y, K, R * g]; acc = sum e^(z - m) v: f32[Y, K, R * g, h]
    suffix   program (row, KV head)    starts from the row's m, l and acc, and adds columns `first` to `last`

Loads are masked, so columns outside a row's range or past a prompt's length are never read.  Queries are
padded to the 16 rows of a tensor core's operand.

jax's own Pallas decode kernel is no substitute.  It takes separate k and v of one layer without a head axis,
vmaps over rows (so each row would read its own copy of the prompt), and supports neither int8 nor a first
column.

Y tiles   R rows of a tile   J queries of a program   N rows   K key/value heads   g queries for each
h head_dim   C columns of a block   L layers
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.schedule import LOWEST, Schedule
from cooper_jax.kernels.triton_backend import plgpu

BLOCK = 64  # C
DOT = 16  # the smallest extent of a tensor core's operand
NO_COLUMN = 2**30  # the first column of a place without a row
WARPS, STAGES = 4, 3  # of a program, and of its software pipeline of loads


def decode_attention(
    q: jax.Array,  # [N, H, h]
    prompt: KV,
    suffix: KV,
    schedule: Schedule,
    first: jax.Array,
    last: jax.Array,
    layer: jax.Array,
    prompt_first: jax.Array | None = None,
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """Attend as decode_attention.decode_attention does, reading packed caches through two Pallas kernels.

    Raises ValueError for a head_dim that is not a power of two of at least 16.
    """
    n, heads, h = q.shape
    if h < DOT or h & (h - 1):
        raise ValueError(f"head_dim {h}: Triton's tensors are powers of two, from {DOT} on")
    kv_heads = suffix.data[0].shape[2]
    group = heads // kv_heads
    tiles, rows = schedule.rows.shape

    # Queries by row for the suffix, and by tile for the prompt: [Y, K, R * g, h].
    q = q.reshape(n, kv_heads, group, h)
    by_tile = q[jnp.maximum(schedule.rows, 0)].swapaxes(1, 2).reshape(tiles, kv_heads, rows * group, h)
    call = functools.partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )

    # With windows: each tile's first prompt column i32[Y], and that of each of its queries i32[Y, R * g].
    prompt_window: tuple[jax.Array, ...] = ()
    if prompt_first is not None:
        row_first = jnp.where(schedule.rows >= 0, prompt_first[jnp.maximum(schedule.rows, 0)], NO_COLUMN)
        row_first = row_first.astype(jnp.int32)
        prompt_window = (row_first.min(axis=1), jnp.repeat(row_first, group, axis=1))

    # Prompt: a tile's rows share one read of its keys.
    prompt, layer_index = _make_addressable(prompt, layer)
    acc, m, l = call(
        functools.partial(_prompt_kernel, block=block),
        grid=(tiles, kv_heads),
        out_shape=[
            jax.ShapeDtypeStruct(by_tile.shape, jnp.float32),
            jax.ShapeDtypeStruct(by_tile.shape[:-1], jnp.float32),
            jax.ShapeDtypeStruct(by_tile.shape[:-1], jnp.float32),
        ],
        cost_estimate=_estimate_cost(by_tile, prompt),
        name="decode_attention_prompt",
    )(
        layer_index,
        schedule.tile_prompt,
        schedule.tile_length,
        prompt_window,
        by_tile,
        (*prompt.data, *prompt.scales),
    )

    # Suffix: a program for each row, which also divides acc by l.
    suffix, layer_index = _make_addressable(suffix, layer)
    cursor = jnp.stack([layer_index[0], last.astype(jnp.int32)])
    out = call(
        functools.partial(_suffix_kernel, block=block, rows=rows),
        grid=(n, kv_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        cost_estimate=_estimate_cost(q, suffix),
        name="decode_attention_suffix",
    )(cursor, schedule.slot_of, first.astype(jnp.int32), acc, m, l, q, (*suffix.data, *suffix.scales))
    return out.reshape(n, heads, h)


def _make_addressable(cache: KV, layer: jax.Array) -> tuple[KV, jax.Array]:
    """Return a cache whose elements Triton's offsets can all reach, and the layer's index in it: i32[1].

    The lowering counts elements in signed 32 bits for arrays of up to 4 GiB and in 64 bits above that.  An
    int8 array of 2 to 4 GiB has more than 2^31 elements, so its layer is copied out.
    """
    if cache.scales and 2**31 < cache.data[0].size <= 2**32:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer), cache), jnp.zeros(1, jnp.int32)
    return cache, layer.astype(jnp.int32).reshape(1)


def _estimate_cost(q: jax.Array, cache: KV) -> pl.CostEstimate:
    """Estimate the cost for a full cache: the columns that are read are known only when the kernel runs."""
    pairs = q.size // q.shape[-1] * cache.data[0].shape[3]
    layer_bytes = sum(x.size // x.shape[0] * x.dtype.itemsize for x in (*cache.data, *cache.scales))
    return pl.CostEstimate(
        flops=4 * pairs * q.shape[-1],
        transcendentals=pairs,
        bytes_accessed=layer_bytes + q.size * (q.dtype.itemsize + 4),
    )


def _prompt_kernel(
    # inputs
    layer,  # i32[1]
    tile_prompt,  # i32[Y]
    tile_length,  # i32[Y]
    prompt_window,  # with windows: first columns i32[Y] of the tiles, i32[Y, R * g] of their queries
    q,  # [Y, K, R * g, h]
    cache,  # [L, B, K, P, 2 h]; in int8 two scales f32[L, B, K, P]
    # outputs
    acc_out,  # f32[Y, K, R * g, h]
    m_out,  # f32[Y, K, R * g]
    l_out,  # f32[Y, K, R * g]
    *,
    block: int,
):
    tile, head = pl.program_id(0), pl.program_id(1)
    queries, h = q.shape[2:]
    line, lane = _pad_queries(0, queries), pl.ds(0, h)
    shape = (line.mask.size, h)  # [J, h]

    # Empty accumulators (acc, m, l).  A tile without a prompt returns them as they are.
    start = (
        jnp.zeros(shape, jnp.float32),
        jnp.full(shape[:1], LOWEST, jnp.float32),
        jnp.zeros(shape[:1], jnp.float32),
    )
    acc, m, l = _attend(
        _load(q, (tile, head, line, lane)),
        cache,
        (layer[0], tile_prompt[tile], head),
        start,
        begin=prompt_window[0][tile] if prompt_window else 0,
        end=tile_length[tile],
        block=block,
        h=h,
        query_begin=_load(prompt_window[1], (tile, line)) if prompt_window else None,
    )
    _store(acc_out, (tile, head, line, lane), acc)
    _store(m_out, (tile, head, line), m)
    _store(l_out, (tile, head, line), l)


def _suffix_kernel(
    # inputs
    cursor,  # i32[2]: layer, last column
    slot_of,  # i32[N]: each row's place in the tiles
    first,  # i32[N]
    acc_prompt,  # f32[Y, K, R * g, h]
    m_prompt,  # f32[Y, K, R * g]
    l_prompt,  # f32[Y, K, R * g]
    q,  # [N, K, g, h]
    cache,  # [L, N, K, W, 2 h]; in int8 two scales f32[L, N, K, W]
    # outputs
    out,  # [N, K, g, h]
    *,
    block: int,
    rows: int,
):
    row, head = pl.program_id(0), pl.program_id(1)
    group, h = q.shape[2:]
    line, lane = _pad_queries(0, group), pl.ds(0, h)

    # The prompt kernel's accumulators of this row: `group` queries within those of its tile.
    slot = slot_of[row]
    own = slot // rows, head, _pad_queries(slot % rows * group, group)
    acc, _, l = _attend(
        _load(q, (row, head, line, lane)),
        cache,
        (cursor[0], row, head),
        (_load(acc_prompt, (*own, lane)), _load(m_prompt, own), _load(l_prompt, own)),
        begin=jnp.maximum(first[row], 0),
        end=cursor[1] + 1,
        block=block,
        h=h,
    )

    # l is 0 in a row without keys, whose output is 0.
    value = acc / jnp.where(l > 0.0, l, 1.0)[:, None]
    _store(out, (row, head, line, lane), value.astype(out.dtype))


def _attend(q, cache, where, accumulators, *, begin, end, block, h, query_begin=None):
    """Add columns `begin` to `end` - 1 of cache[where] to (acc [J, h], m [J], l [J]) for queries q [J, h].

    where: the index (layer, prompt or row, key/value head).
    query_begin: i32[J], the first column that each query attends to; None: `begin`.
    """
    # int8 is multiplied in the queries' dtype.
    data, *scale_refs = cache
    dtype = q.dtype if data.dtype == jnp.int8 else data.dtype
    q = q.astype(dtype)

    def add_block(i, accumulators):
        acc_old, m_old, l_old = accumulators
        column = i * block + jnp.arange(block)
        columns = MaskedSlice(pl.ds(i * block, block), (column >= begin) & (column < end))

        # [k | v] side by side are loaded as two [C, h]; int8's scales f32[C] apply to the columns of z.
        k, v = (_load(data, (*where, columns, pl.ds(offset, h))).astype(dtype) for offset in (0, h))
        scales = [_load(ref, (*where, columns)) for ref in scale_refs]
        z = _dot(q, k.T) * h**-0.5
        if scales:
            z = z * scales[0][None, :]
        z = jnp.where(columns.mask[None, :], z, -jnp.inf)
        if query_begin is not None:
            z = jnp.where(column[None, :] >= query_begin[:, None], z, -jnp.inf)

        # Rescale the old sums from m_old to the new maximum, as in flash attention.
        m = jnp.maximum(m_old, jnp.max(z, axis=1))
        p = jnp.exp(z - m[:, None])
        decay = jnp.exp(m_old - m)
        l = decay * l_old + jnp.sum(p, axis=1)
        if scales:
            p = p * scales[1][None, :]
        return decay[:, None] * acc_old + _dot(p.astype(dtype), v), m, l

    # Blocks are aligned: the first and the last may have columns outside the range, which are masked.
    return jax.lax.fori_loop(begin // block, pl.cdiv(end, block), add_block, accumulators)


class MaskedSlice(NamedTuple):
    """A slice of an axis of which only some entries are read or written."""

    at: slice | pl.Slice
    mask: jax.Array  # bool[length of the slice]


def _pad_queries(start: jax.Array | int, size: int) -> MaskedSlice:
    """Slice the `size` queries from `start` on, padded to an extent that Triton's dots accept."""
    # A power of two and at least DOT.
    length = max(DOT, pl.next_power_of_2(size))
    # JAX refuses a slice beyond the axis if its start is a Python number; the mask keeps reads and writes inside.
    return MaskedSlice(pl.ds(jnp.asarray(start, jnp.int32), length), jnp.arange(length) < size)


def _view(ref, index):
    """Return the view and the mask of an index: scalars, then one MaskedSlice, then at most one slice."""
    # The mask has the view's rank: one axis, or two if a slice follows.
    *_, masked = (i for i in index if isinstance(i, MaskedSlice))
    mask = masked.mask if index[-1] is masked else masked.mask[:, None]
    return ref.at[tuple(i.at if isinstance(i, MaskedSlice) else i for i in index)], mask


def _load(ref, index):
    """Load a view; entries outside the mask are not read and give 0."""
    view, mask = _view(ref, index)
    return plgpu.load(view, mask=mask, other=jnp.zeros((), ref.dtype))


def _store(ref, index, value):
    """Store into a view; entries outside the mask are not written."""
    view, mask = _view(ref, index)
    plgpu.store(view, value, mask=mask)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply [J, d] with [d, n], accumulating in f32 -> f32[J, n]."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
