"""Decode attention on a TPU: one call a layer, prompt and suffix blocks copied by hand from the stacked caches.

    grid (2, T / 2)   a tile a step: its R rows read one prompt.  Cores that share a chip take every other tile.
    q, o              (K, R, g', w) VMEM, pipelined.  g' = g rounded up to 8 sublanes
    prompt blocks     (2, K, C, 2 h) VMEM: [layer, prompt, :, C columns] in one copy for the tile's rows together
    suffix blocks     (2, K, R, C, 2 h) VMEM: [layer, row, :, C columns] a copy for each row that has such columns
    scales            (2, .., K, C) f32 VMEM, in int8
    peak, mass, sums  (K, R * g', 128 or w) f32 VMEM: max z, sum e^(z - peak) and sum e^(z - peak) v so far

While a block is multiplied the next one arrives, and with a tile's last blocks the next tile's first ones:
copies never wait for a grid step.  Suffix blocks are counted back from `last`.  What no row needs is not copied:
prompts up to their length, suffixes from `first` to `last`, to whole tiles of 8 columns (in int8 of 128, for the
scales' sake); the rest of a block holds what was there before, and its probabilities are 0.

At head_dim 64 a token's [k | v] fills the 128 lanes: with zeros beside q, [q | 0] . [k | v] = q . k, and
p @ [k | v] holds o in its second half; nothing is sliced.  At multiples of 128 the halves are whole registers.

T tiles   R rows in a tile   K key/value heads   g queries for each   h head_dim   w width of q   C columns a block
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.schedule import LOWEST, Schedule

LANES = 128
SUBLANES = 8
BLOCK = 128
CORES = 2
CHAINS = 16  # (row, head) pairs worked on together: enough that no product waits for another's softmax
BUFFERS = 24 * 2**20  # bytes of suffix blocks, the arriving ones included
VMEM = 60 * 2**20  # of 64 MiB on v5p
NEVER = 2**30  # the first column of a slot without columns


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
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See decode_attention.decode_attention."""
    n, heads, h = q.shape
    kv_heads, _, both = suffix.data[0].shape[2:]
    tiles, rows = plan.rows.shape
    group = heads // kv_heads
    padded = -(-group // SUBLANES) * SUBLANES  # g'
    joined = h % LANES != 0
    wide = both if joined else h
    if both % LANES:
        raise ValueError(
            f"head_dim {h}: keys and values side by side must fill lanes of {LANES}: a multiple of 64"
        )
    blocks = Blocks(_block(prompt, block, 1, "prompt"), _block(suffix, block, rows, "suffix"))

    def in_slots(x):
        """[N, ..] -> [T, R, ..]"""
        return x[jnp.maximum(plan.rows, 0)]

    own = jnp.where((plan.rows >= 0) & (in_slots(first) <= last), jnp.maximum(in_slots(first), 0), NEVER)
    tile_first = own.min(axis=1)
    end = jnp.minimum(_up(last + 1, _tile(suffix)), suffix.data[0].shape[3])
    scalars = (
        jnp.stack([layer, last, end]).astype(jnp.int32),
        plan.tile_prompt,
        plan.tile_length,
        jnp.where(tile_first == NEVER, 0, pl.cdiv(end - tile_first, blocks.suffix)).astype(jnp.int32),
        plan.rows.reshape(-1),
        own.reshape(-1),
    )
    q = in_slots(q).reshape(tiles, rows, kv_heads, group, h).swapaxes(1, 2)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, padded - group), (0, wide - h)))  # [T, K, R, g', w]
    caches = (*prompt.data, *prompt.scales, *suffix.data, *suffix.scales)
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            blocks=blocks,
            scale=h**-0.5,
            joined=joined,
            tile_columns=_tile(suffix),
            quantised=bool(suffix.scales),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(CORES, tiles // CORES),
            in_specs=[
                pl.BlockSpec((None, kv_heads, rows, padded, wide), _tile_block),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(caches),
            ],
            out_specs=pl.BlockSpec((None, kv_heads, rows, padded, wide), _tile_block),
            scratch_shapes=[
                pltpu.VMEM((2, kv_heads, blocks.prompt, both), prompt.data[0].dtype),
                *[pltpu.VMEM((2, kv_heads, blocks.prompt), jnp.float32) for _ in prompt.scales],
                pltpu.VMEM((2, kv_heads, rows, blocks.suffix, both), suffix.data[0].dtype),
                *[pltpu.VMEM((2, rows, kv_heads, blocks.suffix), jnp.float32) for _ in suffix.scales],
                pltpu.VMEM((kv_heads, rows * padded, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows * padded, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows * padded, wide), jnp.float32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=_cost(q, prompt, suffix),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="decode_attention",
    )(*scalars, q, *caches)
    out = out.swapaxes(1, 2).reshape(tiles * rows, kv_heads, padded, wide)[plan.slot_of]
    return out[:, :, :group, wide - h :].reshape(n, heads, h)


class Blocks(NamedTuple):
    """Columns of a block."""

    prompt: int
    suffix: int


def _block(kv: KV, block: int, rows: int, name: str) -> int:
    """Columns of a block that `rows` rows copy.  Raises ValueError where copies could not keep to whole tiles."""
    (*_, kv_heads, columns, both), itemsize = kv.data[0].shape, kv.data[0].dtype.itemsize
    tile = _tile(kv)
    while block % (2 * tile) == 0 and 2 * kv_heads * rows * block * both * itemsize > BUFFERS:
        block //= 2
    if columns % tile and columns > block:
        raise ValueError(f"the {name} cache has {columns} columns: round up to a multiple of {tile}")
    return min(block, columns)


def _tile(kv: KV) -> int:
    """What a copy's columns are a multiple of: a scale's lie along lanes."""
    return LANES if kv.scales else SUBLANES


def _tile_block(core, step, *_):
    return step * CORES + core, 0, 0, 0, 0


def _cost(q: jax.Array, prompt: KV, suffix: KV) -> pl.CostEstimate:
    """Of full caches: how much of them is read is known only when the kernel runs."""
    tiles, kv_heads, rows, padded, wide = q.shape
    p, w = prompt.data[0].shape[3], suffix.data[0].shape[3]
    pairs = tiles * rows * kv_heads * padded * (p + w)

    def layer_bytes(kv: KV) -> int:
        return sum(x.size // x.shape[0] * x.dtype.itemsize for x in (*kv.data, *kv.scales))

    return pl.CostEstimate(
        flops=4 * pairs * wide,
        transcendentals=pairs,
        bytes_accessed=layer_bytes(prompt) + layer_bytes(suffix) + 2 * q.size * q.dtype.itemsize,
    )


class Cache(NamedTuple):
    """A cache as the kernel sees it: refs of the data, then in int8 of both scales."""

    source: list  # HBM: [L, .., K, columns, 2 h], [L, .., K, columns]
    buffers: list  # VMEM, two of each
    arrived: jax.Ref  # semaphores [2]
    block: int
    tile: int  # copies are whole tiles of columns

    @property
    def in_parts(self) -> bool:
        """Whether less than a block can be copied."""
        return self.block > self.tile and self.block % self.tile == 0


class Stream(NamedTuple):
    """The blocks that a tile's rows need of a cache."""

    count: Callable  # (tile) -> how many
    start: Callable  # (tile, index, slot): of the copies
    work: Callable  # (index, slot): on this tile's, once they are there


def _kernel(
    at,  # prefetch: i32[3]: layer, last column, end of the last suffix block
    tile_prompt,  # i32[T]
    tile_length,  # i32[T]
    suffix_count,  # i32[T]: blocks
    row_of,  # i32[T * R]
    first_of,  # i32[T * R]: a slot's first suffix column, or NEVER
    q,  # inputs: [K, R, g', w]
    *rest,  # HBM: prompt's and suffix's data, each followed by two scales in int8
    # outputs: [K, R, g', w]; scratch: as in the module's docstring, counters i32[2], semaphores [2] twice
    blocks: Blocks,
    scale: float,
    joined: bool,
    tile_columns: int,
    quantised: bool,
):
    n = 3 if quantised else 1
    prompt, suffix, (out,), prompt_buffers, suffix_buffers, state, rest = _cut(rest, n, n, 1, n, n, 3, 3)
    taken, *arrived = rest
    peak, mass, sums = state
    step, steps = pl.program_id(1), pl.num_programs(1)
    tile = step * CORES + pl.program_id(0)
    merge = functools.partial(
        _merge, scale=scale, joined=joined, dtype=q.dtype if quantised else suffix[0].dtype
    )
    streams = (
        _prompts(
            Cache(prompt, prompt_buffers, arrived[0], blocks.prompt, tile_columns),
            *(tile, at[0], tile_prompt, tile_length, q, state, merge),
        ),
        _suffixes(
            Cache(suffix, suffix_buffers, arrived[1], blocks.suffix, tile_columns),
            *(tile, at, suffix_count, row_of, first_of, q, state, merge),
        ),
    )

    @pl.when(step == 0)
    def _():
        # What is never copied must be finite: probabilities of 0 multiply it.
        for buffer in (*prompt_buffers, *suffix_buffers):
            buffer[...] = jnp.zeros_like(buffer)
        for i, stream in enumerate(streams):
            taken[i] = 0

            @pl.when(stream.count(tile) > 0)
            def _(stream=stream):
                stream.start(tile, 0, 0)

    peak[...] = jnp.full_like(peak, LOWEST)
    mass[...] = jnp.zeros_like(mass)
    sums[...] = jnp.zeros_like(sums)
    upcoming = jnp.minimum(tile + CORES, CORES * steps - 1)
    for i, stream in enumerate(streams):
        before = taken[i]
        _run(stream, tile, before, upcoming, step + 1 < steps)
        taken[i] = before + stream.count(tile)
    total = _spread(mass[...], sums.shape[-1])
    out[...] = (sums[...] / jnp.where(total > 0.0, total, 1.0)).reshape(out.shape).astype(out.dtype)


def _run(stream: Stream, tile, before, upcoming, more):
    """A tile's blocks, each started while the last one is worked on; then the upcoming tile's first, if `more`.

    before: how many blocks were taken before these: they alternate between two slots.
    """
    count = stream.count(tile)

    def start_upcoming(slot):
        @pl.when(more & (stream.count(upcoming) > 0))
        def _():
            stream.start(upcoming, 0, slot)

    def one(index, _):
        slot = (before + index) % 2

        @pl.when(index + 1 < count)
        def _():
            stream.start(tile, index + 1, 1 - slot)

        @pl.when(index + 1 == count)
        def _():
            start_upcoming(1 - slot)

        stream.work(index, slot)

    jax.lax.fori_loop(0, count, one, None)

    @pl.when(count == 0)
    def _():
        start_upcoming(before % 2)


def _prompts(cache: Cache, tile, layer, tile_prompt, tile_length, q, state, merge) -> Stream:
    """Blocks of a tile's one prompt, for all its rows together; the last one as far as the prompt goes."""
    kv_heads, rows, padded, _ = q.shape

    def copies(t, index, slot):
        begin, size = pl.multiple_of(index * cache.block, cache.block), cache.block
        if cache.in_parts:
            size = pl.multiple_of(jnp.minimum(size, _up(tile_length[t] - begin, cache.tile)), cache.tile)
        return [
            pltpu.make_async_copy(
                source.at[layer, tile_prompt[t], :, pl.ds(begin, size)],
                buffer.at[slot, :, pl.ds(0, size)],
                cache.arrived.at[slot],
            )
            for source, buffer in zip(cache.source, cache.buffers, strict=True)
        ]

    def start(t, index, slot):
        for copy in copies(t, index, slot):
            copy.start()

    def work(index, slot):
        for copy in copies(tile, index, slot):
            copy.wait()
        column = index * cache.block + _iota((1, 1, cache.block))
        queries = q[...].astype(jnp.float32).reshape(kv_heads, rows * padded, -1)
        keys, *scales = (x[slot] for x in cache.buffers)
        scales = [x[:, None, :] for x in scales]
        new = merge(queries, keys, scales, _bias(column < tile_length[tile]), [x[...] for x in state])
        for x, value in zip(state, new, strict=True):
            x[...] = value

    return Stream(lambda t: pl.cdiv(tile_length[t], cache.block), start, work)


def _suffixes(cache: Cache, tile, at, suffix_count, row_of, first_of, q, state, merge) -> Stream:
    """Blocks of a tile's rows, each row's own, from its first column on.  The last block ends at at[2]."""
    kv_heads, rows, padded, _ = q.shape
    block = cache.block
    together = next(n for n in range(min(rows, max(1, CHAINS // kv_heads)), 0, -1) if rows % n == 0)

    def end(t, index):
        return at[2] - (suffix_count[t] - 1 - index) * block

    def begin(t, index):
        return pl.multiple_of(jnp.maximum(end(t, index) - block, 0), cache.tile)

    def wants(t, r, index):
        """Whether the row in slot r has columns in the block."""
        return first_of[t * rows + r] < end(t, index)

    def each_copy(t, index, slot, do):
        def one(r, _):
            @pl.when(wants(t, r, index))
            def _():
                size, skipped = block, 0
                if cache.in_parts:
                    skipped = jnp.maximum(first_of[t * rows + r] - begin(t, index), 0) & -cache.tile
                    skipped = pl.multiple_of(skipped, cache.tile)
                    size = pl.multiple_of(block - skipped, cache.tile)
                columns = pl.ds(begin(t, index) + skipped, size)
                data, *scales = cache.buffers
                targets = [data.at[slot, :, r], *(x.at[slot, r] for x in scales)]
                for source, target in zip(cache.source, targets, strict=True):
                    source = source.at[at[0], row_of[t * rows + r], :, columns]
                    target = target.at[:, pl.ds(skipped, size)]
                    do(pltpu.make_async_copy(source, target, cache.arrived.at[slot]))

        jax.lax.fori_loop(0, rows, one, None)

    def start(t, index, slot):
        each_copy(t, index, slot, lambda copy: copy.start())

    def work(index, slot):
        each_copy(tile, index, slot, lambda copy: copy.wait())
        column = begin(tile, index) + _iota((padded, block))
        # A block that would begin before column 0 holds columns of the next one too.
        own = column < jnp.minimum(end(tile, index), at[1] + 1)

        def some(i, _):
            members = [i * together + j for j in range(together)]

            @pl.when(functools.reduce(jnp.logical_or, (wants(tile, r, index) for r in members)))
            def _():
                data, *scales = cache.buffers
                slots = pl.ds(i * together, together)
                lines = pl.ds(pl.multiple_of(i * together * padded, SUBLANES), together * padded)
                queries = q[:, slots].reshape(kv_heads * together, padded, -1)
                keys = data[slot, :, slots].reshape(kv_heads * together, block, -1)
                scales = [
                    jnp.stack([x[slot, r][:, None, :] for r in members], axis=1).reshape(-1, 1, block)
                    for x in scales
                ]
                bias = jnp.stack([_bias(own & (column >= first_of[tile * rows + r])) for r in members])
                bias = jnp.broadcast_to(bias[None], (kv_heads, *bias.shape)).reshape(-1, padded, block)
                old = [x[:, lines, :].reshape(kv_heads * together, padded, -1) for x in state]
                for x, value in zip(state, merge(queries, keys, scales, bias, old), strict=True):
                    x[:, lines, :] = value.reshape(kv_heads, together * padded, -1)

        jax.lax.fori_loop(0, rows // together, some, None)

    return Stream(lambda t: suffix_count[t], start, work)


def _merge(queries, keys, scales, bias, state, *, scale, joined, dtype):
    """State with a block behind it.  Batches X: queries [X, M, w], keys [X, C, 2 h], scales [X, 1, C].

    bias: 0, or -inf where a column does not count; broadcasts to [X, M, C].
    """
    peak_old, mass_old, sums_old = state
    h = keys.shape[-1] // 2
    keys = keys.astype(dtype)
    k, v = (keys, keys) if joined else (keys[..., :h], keys[..., h:])
    z = _dot(queries.astype(dtype), k, contract=2) * scale
    if scales:
        z = z * scales[0]
    z = z + bias
    peak = jnp.maximum(peak_old, jnp.max(z, axis=-1, keepdims=True))
    p = jnp.exp(z - _spread(peak, z.shape[-1]))
    decay = jnp.exp(peak_old - peak)
    mass = decay * mass_old + jnp.sum(p, axis=-1, keepdims=True)
    if scales:
        p = p * scales[1]
    sums = _spread(decay, v.shape[-1]) * sums_old + _dot(p.astype(dtype), v, contract=1)
    return peak, mass, sums


def _cut(refs, *counts):
    """Consecutive pieces of a sequence, of the given lengths."""
    refs = iter(refs)
    return [[next(refs) for _ in range(count)] for count in counts]


def _up(x: jax.Array, tile: int) -> jax.Array:
    """x rounded up to a power of two's multiple."""
    return (x + tile - 1) & -tile


def _iota(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _spread(x: jax.Array, width: int) -> jax.Array:
    """x [.., 128], all lanes alike -> what broadcasts to [.., width].  Whole registers need no shuffle of lanes."""
    if width % LANES:
        return x[..., :1]
    return jnp.concatenate([x] * (width // LANES), axis=-1)


def _bias(seen: jax.Array) -> jax.Array:
    return jnp.where(seen, 0.0, -jnp.inf)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """[X, M, d] with [X, C, d] (contract 2) or [X, d, C] (1) -> f32[X, M, C]."""
    return jax.lax.dot_general(
        a,
        b,
        (((2,), (contract,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
