"""Decode attention on a TPU: one call a layer, prompt and suffix blocks copied by hand from the stacked caches.

    grid (2, T / 2)   a tile a step: its R rows read one prompt.  Cores that share a chip take every other tile.
    q, o              (K, R, g', w) VMEM, pipelined.  g' = g rounded up to 8 sublanes
    prompt blocks     (2, K, C, 2 h) VMEM: [layer, prompt, :, C columns] in one copy for the tile's rows together
    suffix blocks     (2, K, R, C, 2 h) VMEM: [layer, row, :, C columns] a copy for each row that has such columns
    scales            (2, .., K, C) f32 VMEM, in int8
    peak, mass, sums  (K, R * g', 128 or w) f32 VMEM: max z, sum e^(z - peak) and sum e^(z - peak) v so far

While a block is multiplied the next one arrives, and with a tile's last blocks the next tile's first ones:
copies never wait for a grid step.  Blocks outside a row's columns or past the prompt's length are not copied.

At head_dim 64 a token's [k | v] fills the 128 lanes: with zeros beside q, [q | 0] . [k | v] = q . k, and
p @ [k | v] holds o in its second half; nothing is sliced.  At multiples of 128 the halves are whole registers.

Suffix blocks are counted back from `last`, to the next whole tile, and begin anywhere: a row reads at most C + 7
columns too many (int8: 2 C).  Where C does not divide a prompt cache's length, its last block begins early.

T tiles   R rows in a tile   K key/value heads   g queries for each   h head_dim   w width of q   C columns a block
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.decode_attention import LOWEST, Schedule
from kernels.kv import KV

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
    end = jnp.minimum(pl.cdiv(last + 1, _tile(suffix)) * _tile(suffix), suffix.data[0].shape[3])
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


def _kernel(
    at,  # prefetch: i32[3]: layer, last column, end of the last suffix block
    tile_prompt,  # i32[T]
    tile_length,  # i32[T]
    suffix_count,  # i32[T]: blocks
    row_of,  # i32[T * R]
    first_of,  # i32[T * R]: a slot's first suffix column, or NEVER
    q,  # inputs: [K, R, g', w]
    *rest,  # HBM: prompt's and suffix's [L, .., K, columns, 2 h], each followed by two f32 scales in int8
    # outputs: [K, R, g', w]; scratch: as in the module's docstring, counters i32[2], semaphores [2] twice
    blocks: Blocks,
    scale: float,
    joined: bool,
    tile_columns: int,
    quantised: bool,
):
    arrays = 3 if quantised else 1
    (
        prompt,
        suffix,
        (out,),
        prompt_buffers,
        suffix_buffers,
        (peak, mass, sums, taken, prompt_arrived, suffix_arrived),
    ) = _cut(rest, arrays, arrays, 1, arrays, arrays, 6)
    kv_heads, rows, padded, _ = q.shape
    prompt_columns = prompt[0].shape[3]
    layer, last, end = at[0], at[1], at[2]
    step, steps = pl.program_id(1), pl.num_programs(1)
    tile = step * CORES + pl.program_id(0)
    compute = q.dtype if quantised else suffix[0].dtype

    # --- copies

    def prompt_count(t):
        return pl.cdiv(tile_length[t], blocks.prompt)

    def prompt_copies(t, block, slot):
        begin = _begin(block, blocks.prompt, prompt_columns)
        return [
            pltpu.make_async_copy(
                source.at[layer, tile_prompt[t], :, pl.ds(begin, blocks.prompt)],
                buffer.at[slot],
                prompt_arrived.at[slot],
            )
            for source, buffer in zip(prompt, prompt_buffers, strict=True)
        ]

    def start_prompt(t, block, slot):
        for copy in prompt_copies(t, block, slot):
            copy.start()

    def suffix_end(t, index):
        """Of the tile's block `index`, the last of which ends at `end`."""
        return end - (suffix_count[t] - 1 - index) * blocks.suffix

    def suffix_begin(t, index):
        return pl.multiple_of(jnp.maximum(suffix_end(t, index) - blocks.suffix, 0), tile_columns)

    def wants(t, r, index):
        """Whether the row in slot r has columns in the block."""
        return first_of[t * rows + r] < suffix_end(t, index)

    def suffix_copies(t, r, index, slot):
        columns = pl.ds(suffix_begin(t, index), blocks.suffix)
        targets = [suffix_buffers[0].at[slot, :, r], *(x.at[slot, r] for x in suffix_buffers[1:])]
        return [
            pltpu.make_async_copy(
                source.at[layer, row_of[t * rows + r], :, columns], target, suffix_arrived.at[slot]
            )
            for source, target in zip(suffix, targets, strict=True)
        ]

    def each_suffix_copy(t, index, slot, do):
        def one(r, _):
            @pl.when(wants(t, r, index))
            def _():
                for copy in suffix_copies(t, r, index, slot):
                    do(copy)

        jax.lax.fori_loop(0, rows, one, None)

    def start_suffix(t, index, slot):
        each_suffix_copy(t, index, slot, lambda copy: copy.start())

    # --- blocks

    def merge(queries, kv, scales, bias, state):
        """Batches X of queries [X, M, w] and keys [X, C, 2 h]; scales [X, 1, C]; bias, 0 or -inf, broadcasts."""
        peak_old, mass_old, sums_old = state
        h = kv.shape[-1] // 2
        kv = kv.astype(compute)
        k, v = (kv, kv) if joined else (kv[..., :h], kv[..., h:])
        z = _dot(queries.astype(compute), k, contract=2) * scale
        if quantised:
            z = z * scales[0]
        z = z + bias
        peak_new = jnp.maximum(peak_old, jnp.max(z, axis=-1, keepdims=True))
        p = jnp.exp(z - _spread(peak_new, z.shape[-1]))
        decay = jnp.exp(peak_old - peak_new)
        mass_new = decay * mass_old + jnp.sum(p, axis=-1, keepdims=True)
        if quantised:
            p = p * scales[1]
        return (
            peak_new,
            mass_new,
            _spread(decay, v.shape[-1]) * sums_old + _dot(p.astype(compute), v, contract=1),
        )

    def prompt_block(block, slot):
        for copy in prompt_copies(tile, block, slot):
            copy.wait()
        column = _begin(block, blocks.prompt, prompt_columns) + _iota((1, 1, blocks.prompt))
        bias = _bias((column >= block * blocks.prompt) & (column < tile_length[tile]))
        queries = q[...].astype(jnp.float32).reshape(kv_heads, rows * padded, -1)
        scales = [x[slot][:, None, :] for x in prompt_buffers[1:]]
        state = merge(queries, prompt_buffers[0][slot], scales, bias, (peak[...], mass[...], sums[...]))
        peak[...], mass[...], sums[...] = state

    together = next(n for n in range(min(rows, max(1, CHAINS // kv_heads)), 0, -1) if rows % n == 0)

    def suffix_block(index, slot):
        each_suffix_copy(tile, index, slot, lambda copy: copy.wait())
        column = suffix_begin(tile, index) + _iota((padded, blocks.suffix))
        # One that would have begun before column 0 holds columns of the next one too.
        new = column < jnp.minimum(suffix_end(tile, index), last + 1)

        def some(i, _):
            members = [i * together + j for j in range(together)]

            @pl.when(functools.reduce(jnp.logical_or, (wants(tile, r, index) for r in members)))
            def _():
                bias = jnp.stack([_bias(new & (column >= first_of[tile * rows + r])) for r in members])
                bias = jnp.broadcast_to(bias[None], (kv_heads, *bias.shape)).reshape(-1, *bias.shape[1:])
                scales = [
                    jnp.stack([x[slot, r][:, None, :] for r in members], axis=1).reshape(-1, 1, blocks.suffix)
                    for x in suffix_buffers[1:]
                ]
                slots = pl.ds(i * together, together)
                lines = pl.ds(pl.multiple_of(i * together * padded, SUBLANES), together * padded)
                state = [x[:, lines, :].reshape(kv_heads * together, padded, -1) for x in (peak, mass, sums)]
                keys = suffix_buffers[0][slot, :, slots].reshape(kv_heads * together, blocks.suffix, -1)
                queries = q[:, slots].reshape(kv_heads * together, padded, -1)
                for x, value in zip(
                    (peak, mass, sums), merge(queries, keys, scales, bias, state), strict=True
                ):
                    x[:, lines, :] = value.reshape(kv_heads, together * padded, -1)

        jax.lax.fori_loop(0, rows // together, some, None)

    # --- the tile

    @pl.when(step == 0)
    def _():
        # What is never copied must be finite: probabilities of 0 multiply it.
        for buffer in suffix_buffers:
            buffer[...] = jnp.zeros_like(buffer)
        taken[0] = 0
        taken[1] = 0

        @pl.when(prompt_count(tile) > 0)
        def _():
            start_prompt(tile, 0, 0)

        @pl.when(suffix_count[tile] > 0)
        def _():
            start_suffix(tile, 0, 0)

    peak[...] = jnp.full_like(peak, LOWEST)
    mass[...] = jnp.zeros_like(mass)
    sums[...] = jnp.zeros_like(sums)
    upcoming = jnp.minimum(tile + CORES, CORES * steps - 1)

    def stream(counter, count, upcoming_count, start, work):
        """work(index, slot) on `count` blocks, each started a block ahead; the upcoming tile's first one too."""
        before = taken[counter]

        def start_upcoming(slot):
            @pl.when((step + 1 < steps) & (upcoming_count > 0))
            def _():
                start(upcoming, 0, slot)

        def one(index, _):
            slot = (before + index) % 2

            @pl.when(index + 1 < count)
            def _():
                start(tile, index + 1, 1 - slot)

            @pl.when(index + 1 == count)
            def _():
                start_upcoming(1 - slot)

            work(index, slot)

        jax.lax.fori_loop(0, count, one, None)

        @pl.when(count == 0)
        def _():
            start_upcoming(before % 2)

        taken[counter] = before + count

    stream(0, prompt_count(tile), prompt_count(upcoming), start_prompt, prompt_block)
    stream(1, suffix_count[tile], suffix_count[upcoming], start_suffix, suffix_block)
    total = _spread(mass[...], sums.shape[-1])
    out[...] = (sums[...] / jnp.where(total > 0.0, total, 1.0)).reshape(out.shape).astype(out.dtype)


def _cut(refs, *counts):
    """Consecutive pieces of a sequence, of the given lengths."""
    refs = iter(refs)
    return [[next(refs) for _ in range(count)] for count in counts]


def _begin(block: jax.Array, size: int, columns: int) -> jax.Array:
    """Where a block's columns begin in the cache: the last one's early, if `size` does not divide `columns`."""
    if columns % size == 0:
        return pl.multiple_of(block * size, size)
    return pl.multiple_of(jnp.minimum(block * size, columns - size), SUBLANES)


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
