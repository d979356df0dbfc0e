"""Decode attention on a TPU: one call per layer, which copies blocks of the stacked caches to VMEM itself.

    grid (2, Y / 2)   one tile per step: its R rows read one prompt.  The two cores of a chip alternate tiles.
    q, out            (K, R, g', w) VMEM, pipelined.  g' = g rounded up to 8 sublanes
    prompt blocks     (2, K, C, 2 h) VMEM: [layer, prompt, :, C columns] in one copy for all rows of the tile
    suffix blocks     (2, K, R, C, 2 h) VMEM: [layer, row, :, C columns], one copy per row with such columns
    scales            (2, .., K, C) f32 VMEM, in int8
    m, l, acc         (K, J, 128 or w) f32 VMEM: max z, sum e^(z - m) and sum e^(z - m) v so far; J = R * g'

While one block is processed, the next is copied; while a tile's last block is processed, the first block of
the next tile is copied.  So copies never wait for a grid step.  Suffix blocks are counted back from `last`.

Only columns that count are copied: a prompt up to its length, a suffix from `first` to `last`, both extended
to whole tiles of 8 columns (of 128 in int8, whose scales lie along the lanes).  The rest of a buffer contains
older data, which gets probability 0.  With a sliding window, a prompt is copied from the block on that has the
oldest column of the tile's rows.

At head_dim 64 a token's [k | v] fills the 128 lanes.  With zeros beside q, [q | 0] . [k | v] = q . k, and the
second half of p @ [k | v] is the output, so nothing is sliced.  At multiples of 128 the halves of [k | v] are
whole registers.

Y tiles   R rows of a tile   J queries of a tile (R * g')   K key/value heads   g queries for each
h head_dim   w width of q   C columns of a block   L layers
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.schedule import LOWEST, Schedule

# The hardware: registers of SUBLANES x LANES, and the cores of a chip that share a grid.
LANES = 128
SUBLANES = 8
CORES = 2
# Sizes that were chosen.
BLOCK = 128  # C, at most
CHAINS = 16  # (row, head) pairs processed together: enough that no product waits for another's softmax
BUFFERS = 24 * 2**20  # bytes of both buffers of suffix blocks
VMEM = 60 * 2**20  # of 64 MiB on v5p

NO_COLUMN = 2**30  # the first column of a row without suffix columns

Refs = tuple[jax.Ref, ...]  # a cache's data, followed in int8 by the scales of k and of v


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
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Attend as decode_attention.decode_attention does, reading packed caches through a Pallas kernel.

    Raises ValueError for a head_dim that does not fill the lanes and for caches of partial tiles.
    """
    n, heads, h = q.shape
    kv_heads, _, kv_width = suffix.data[0].shape[2:]  # kv_width: 2 h
    tiles, rows = schedule.rows.shape
    group = heads // kv_heads
    padded = -(-group // SUBLANES) * SUBLANES  # g'
    joined = h % LANES != 0  # k and v share a register
    width = kv_width if joined else h  # w
    if kv_width % LANES:
        raise ValueError(
            f"head_dim {h}: keys and values side by side must fill lanes of {LANES}: a multiple of 64"
        )
    blocks = Blocks(_block_columns(prompt, block, 1, "prompt"), _block_columns(suffix, block, rows, "suffix"))
    scalars = _make_scalars(suffix, schedule, first, last, layer, blocks.suffix)
    prompt_window = _make_prompt_window(schedule, prompt_first, blocks.prompt)

    # Empty places of a tile attend with the queries of row 0, and their output is dropped.
    q = q[jnp.maximum(schedule.rows, 0)].reshape(tiles, rows, kv_heads, group, h).swapaxes(1, 2)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, padded - group), (0, width - h)))  # [Y, K, R, g', w]

    # The pipeline copies queries and outputs; the caches stay in HBM, and the kernel copies what it needs.
    prompt_arrays, suffix_arrays = (*prompt.data, *prompt.scales), (*suffix.data, *suffix.scales)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    queries_of_tile = pl.BlockSpec((None, kv_heads, rows, padded, width), _tile_index)
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            blocks=blocks,
            scale=h**-0.5,
            joined=joined,
            tile_columns=_tile_columns(suffix),
            quantised=bool(suffix.scales),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 1,
            grid=(CORES, tiles // CORES),
            in_specs=[
                queries_of_tile,
                jax.tree.map(lambda _: in_hbm, prompt_arrays),
                jax.tree.map(lambda _: in_hbm, suffix_arrays),
            ],
            out_specs=queries_of_tile,
            scratch_shapes=_make_scratch_shapes(q, prompt, suffix, blocks),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=_estimate_cost(q, prompt, suffix),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="decode_attention",
    )(*scalars, prompt_window, q, prompt_arrays, suffix_arrays)

    # Back to the order of the rows, without padding; joined outputs are in the second half of the lanes.
    out = out.swapaxes(1, 2).reshape(tiles * rows, kv_heads, padded, width)[schedule.slot_of]
    return out[:, :, :group, width - h :].reshape(n, heads, h)


class Blocks(NamedTuple):
    """Columns C of a block of each cache."""

    prompt: int
    suffix: int


def _make_scalars(
    suffix: KV, schedule: Schedule, first: jax.Array, last: jax.Array, layer: jax.Array, block: int
) -> tuple[jax.Array, ...]:
    """Make the prefetch scalars of the kernel, in the order of its parameters.  block: C of the suffix."""
    row_first = first[jnp.maximum(schedule.rows, 0)]  # i32[Y, R]
    has_columns = (schedule.rows >= 0) & (row_first <= last)
    row_first = jnp.where(has_columns, jnp.maximum(row_first, 0), NO_COLUMN)

    # The last block ends with the tile of columns that contains `last`.  Blocks are counted back from that
    # end to the oldest column of a tile's rows.
    tile_first = row_first.min(axis=1)
    end = jnp.minimum(_round_up(last + 1, _tile_columns(suffix)), suffix.data[0].shape[3])
    suffix_blocks = jnp.where(tile_first == NO_COLUMN, 0, pl.cdiv(end - tile_first, block))
    return (
        jnp.stack([layer, last, end]).astype(jnp.int32),
        schedule.tile_prompt,
        schedule.tile_length,
        suffix_blocks.astype(jnp.int32),
        schedule.rows.reshape(-1),
        row_first.reshape(-1),
    )


def _make_prompt_window(
    schedule: Schedule, prompt_first: jax.Array | None, block: int
) -> tuple[jax.Array, ...]:
    """Make the prefetch scalars of windows over prompts; () without windows.  block: C of the prompt.

    They are each tile's first block i32[Y], and the first column of each of its places i32[Y * R].
    """
    if prompt_first is None:
        return ()
    row_first = jnp.where(schedule.rows >= 0, prompt_first[jnp.maximum(schedule.rows, 0)], NO_COLUMN)
    tile_first = row_first.min(axis=1)

    # A tile whose windows begin behind the prompt has no block.
    length = schedule.tile_length
    first_block = jnp.where(tile_first < length, tile_first // block, pl.cdiv(length, block))
    return first_block.astype(jnp.int32), row_first.astype(jnp.int32).reshape(-1)


def _make_scratch_shapes(q: jax.Array, prompt: KV, suffix: KV, blocks: Blocks) -> list[Any]:
    """Make the scratch of the kernel, in the order of its parameters.  q: [Y, K, R, g', w]."""
    _, kv_heads, rows, padded, width = q.shape
    kv_width = suffix.data[0].shape[-1]

    # Two blocks of each cache: one that is processed and one that is being copied.
    prompt_buffers = (
        pltpu.VMEM((2, kv_heads, blocks.prompt, kv_width), prompt.data[0].dtype),
        *[pltpu.VMEM((2, kv_heads, blocks.prompt), jnp.float32) for _ in prompt.scales],
    )
    suffix_buffers = (
        pltpu.VMEM((2, kv_heads, rows, blocks.suffix, kv_width), suffix.data[0].dtype),
        *[pltpu.VMEM((2, rows, kv_heads, blocks.suffix), jnp.float32) for _ in suffix.scales],
    )

    # m and l fill whole registers with equal lanes, which saves a broadcast at each use.
    accumulators = (
        pltpu.VMEM((kv_heads, rows * padded, LANES), jnp.float32),
        pltpu.VMEM((kv_heads, rows * padded, LANES), jnp.float32),
        pltpu.VMEM((kv_heads, rows * padded, width), jnp.float32),
    )
    processed = pltpu.SMEM((2,), jnp.int32)
    arrived = (pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,)))
    return [prompt_buffers, suffix_buffers, accumulators, processed, arrived]


def _block_columns(kv: KV, block: int, rows: int, name: str) -> int:
    """Return C for blocks that `rows` rows copy.  Raises ValueError if copies cannot be whole tiles.

    block: an upper bound on C, halved until two buffers fit into BUFFERS bytes.
    """
    (*_, kv_heads, columns, kv_width), itemsize = kv.data[0].shape, kv.data[0].dtype.itemsize
    tile = _tile_columns(kv)
    while block % (2 * tile) == 0 and 2 * kv_heads * rows * block * kv_width * itemsize > BUFFERS:
        block //= 2

    # A cache of a single block is copied whole.
    if columns % tile and columns > block:
        raise ValueError(f"the {name} cache has {columns} columns: round up to a multiple of {tile}")
    return min(block, columns)


def _tile_columns(kv: KV) -> int:
    """Return the number that a copy's columns are a multiple of; in int8 the scales lie along the lanes."""
    return LANES if kv.scales else SUBLANES


def _tile_index(core, step, *_):
    """Map a grid position to the block index of its tile's queries and outputs."""
    return step * CORES + core, 0, 0, 0, 0


def _estimate_cost(q: jax.Array, prompt: KV, suffix: KV) -> pl.CostEstimate:
    """Estimate the cost for full caches: the columns that are read are known only when the kernel runs."""
    tiles, kv_heads, rows, padded, width = q.shape
    columns = prompt.data[0].shape[3] + suffix.data[0].shape[3]
    pairs = tiles * rows * kv_heads * padded * columns

    def layer_bytes(kv: KV) -> int:
        return sum(x.size // x.shape[0] * x.dtype.itemsize for x in (*kv.data, *kv.scales))

    return pl.CostEstimate(
        flops=4 * pairs * width,
        transcendentals=pairs,
        bytes_accessed=layer_bytes(prompt) + layer_bytes(suffix) + 2 * q.size * q.dtype.itemsize,
    )


# --- the kernel --------------------------------------------------------------------------------------------


class CacheRefs(NamedTuple):
    """A cache and the buffers into which the kernel copies its blocks."""

    source: Refs  # HBM: [L, .., K, columns, 2 h]; scales [L, .., K, columns]
    buffers: Refs  # VMEM: two blocks of each source
    arrived: jax.Ref  # semaphores [2]: one for each half of the buffers
    # Columns.
    block: int  # C
    tile: int  # a copy's columns are a multiple of this

    @property
    def partial_copies(self) -> bool:
        """True if less than a block can be copied."""
        return self.block > self.tile and self.block % self.tile == 0


class Stream(NamedTuple):
    """Operations on the blocks of one cache, which alternate between the two halves of its buffers."""

    num_blocks: Callable  # (tile) -> i32[]: blocks that the tile's rows need
    start_copies: Callable  # (tile, index of the block, half)
    process: Callable  # (index of the block, half): wait for this tile's copies and update m, l and acc


class SuffixBlocks(NamedTuple):
    """The columns of each suffix block, counted back from the end of the last block."""

    # Prefetch scalars of the kernel.
    cursor: jax.Ref
    suffix_blocks: jax.Ref
    row_first: jax.Ref
    # Sizes.
    rows: int  # R
    block: int  # C
    tile: int  # blocks begin at a multiple of this

    def end(self, t, index):
        """Return the column behind a block of tile t."""
        return self.cursor[2] - (self.suffix_blocks[t] - 1 - index) * self.block

    def begin(self, t, index):
        """Return the first column that is copied for a block of tile t: never before the cache."""
        return pl.multiple_of(jnp.maximum(self.end(t, index) - self.block, 0), self.tile)

    def has_columns(self, t, r, index):
        """Tell whether row r of tile t has columns in a block."""
        return self.row_first[t * self.rows + r] < self.end(t, index)


def _kernel(
    # prefetch scalars
    cursor,  # i32[3]: layer, last column, end of the last suffix block
    tile_prompt,  # i32[Y]
    tile_length,  # i32[Y]
    suffix_blocks,  # i32[Y]: number of suffix blocks
    row_of,  # i32[Y * R]
    row_first,  # i32[Y * R]: the row's first suffix column, or NO_COLUMN
    prompt_window,  # with windows: the tile's first prompt block i32[Y], the row's first column i32[Y * R]
    # inputs
    q,  # [K, R, g', w]
    prompt,  # HBM: [L, B, K, P, 2 h]; in int8 two scales f32[L, B, K, P]
    suffix,  # HBM: [L, N, K, W, 2 h]; in int8 two scales f32[L, N, K, W]
    # outputs
    out,  # [K, R, g', w]
    # scratch
    prompt_buffers,  # [2, K, C, 2 h]; in int8 two scales f32[2, K, C]
    suffix_buffers,  # [2, K, R, C, 2 h]; in int8 two scales f32[2, R, K, C]
    accumulators,  # m, l f32[K, J, 128], acc f32[K, J, w]
    processed,  # SMEM i32[2]: blocks of each stream that have been processed, over all tiles so far
    arrived,  # semaphores [2], of each stream
    *,
    blocks: Blocks,
    scale: float,
    joined: bool,
    tile_columns: int,
    quantised: bool,
):
    m, l, acc = accumulators
    step, steps = pl.program_id(1), pl.num_programs(1)
    tile = step * CORES + pl.program_id(0)

    # int8 is multiplied in the queries' dtype.
    update = functools.partial(
        _update_accumulators, scale=scale, joined=joined, dtype=q.dtype if quantised else suffix[0].dtype
    )
    prompt_refs = CacheRefs(prompt, prompt_buffers, arrived[0], blocks.prompt, tile_columns)
    suffix_refs = CacheRefs(suffix, suffix_buffers, arrived[1], blocks.suffix, tile_columns)
    streams = (
        _make_prompt_stream(
            prompt_refs, tile, cursor, tile_prompt, tile_length, prompt_window, q, accumulators, update
        ),
        _make_suffix_stream(
            suffix_refs, tile, cursor, suffix_blocks, row_of, row_first, q, accumulators, update
        ),
    )

    @pl.when(step == 0)
    def start_first_tile():
        # Columns that no copy writes get probability 0, and must be finite: 0 * NaN is NaN.
        for buffer in (*prompt_buffers, *suffix_buffers):
            buffer[...] = jnp.zeros_like(buffer)

        # No earlier tile has started the copies of this core's first tile.
        for i, stream in enumerate(streams):
            processed[i] = 0

            @pl.when(stream.num_blocks(tile) > 0)
            def start_first_block(stream=stream):
                stream.start_copies(tile, 0, 0)

    m[...] = jnp.full_like(m, LOWEST)
    l[...] = jnp.zeros_like(l)
    acc[...] = jnp.zeros_like(acc)

    # The scalars are read at `next_tile` even in the last step, so it stays within bounds there.
    next_tile = jnp.minimum(tile + CORES, CORES * steps - 1)
    for i, stream in enumerate(streams):
        before = processed[i]
        _process_tile(stream, tile, before, next_tile, step + 1 < steps)
        processed[i] = before + stream.num_blocks(tile)

    # l is 0 in a row without keys, whose output is 0.
    total = _fit_lanes(l[...], acc.shape[-1])
    out[...] = (acc[...] / jnp.where(total > 0.0, total, 1.0)).reshape(out.shape).astype(out.dtype)


def _process_tile(stream: Stream, tile, before, next_tile, has_next) -> None:
    """Process a tile's blocks, each while the next block, or the first block of the next tile, is copied.

    before: the number of blocks of the stream processed in earlier tiles.  Its parity is the half of the
      buffers that contains this tile's first block, whose copy the previous tile has started.
    """
    count = stream.num_blocks(tile)

    def start_next_tile(half):
        @pl.when(has_next & (stream.num_blocks(next_tile) > 0))
        def start():
            stream.start_copies(next_tile, 0, half)

    def process_block(index, _):
        half = (before + index) % 2

        @pl.when(index + 1 < count)
        def start_next_block():
            stream.start_copies(tile, index + 1, 1 - half)

        @pl.when(index + 1 == count)
        def last_block():
            start_next_tile(1 - half)

        stream.process(index, half)

    jax.lax.fori_loop(0, count, process_block, None)

    # A tile without blocks has no last block that starts the next tile's copies.
    @pl.when(count == 0)
    def no_block():
        start_next_tile(before % 2)


def _make_prompt_stream(
    cache: CacheRefs, tile, cursor, tile_prompt, tile_length, prompt_window, q, accumulators, update
) -> Stream:
    """Make the stream of a tile's prompt blocks, which all its rows read; the last ends with the prompt."""
    kv_heads, rows, padded, _ = q.shape

    def skip_blocks(t):
        """Return the number of blocks before the windows of a tile's rows."""
        return prompt_window[0][t] if prompt_window else 0

    def num_blocks(t):
        return pl.cdiv(tile_length[t], cache.block) - skip_blocks(t)

    def make_copies(t, index, half):
        """Describe the copies of a block: the same when they are started and when they are waited for."""
        begin = pl.multiple_of((skip_blocks(t) + index) * cache.block, cache.block)
        size: jax.Array | int = cache.block
        if cache.partial_copies:
            left = _round_up(tile_length[t] - begin, cache.tile)
            size = pl.multiple_of(jnp.minimum(cache.block, left), cache.tile)
        return [
            pltpu.make_async_copy(
                source.at[cursor[0], tile_prompt[t], :, pl.ds(begin, size)],
                buffer.at[half, :, pl.ds(0, size)],
                cache.arrived.at[half],
            )
            for source, buffer in zip(cache.source, cache.buffers, strict=True)
        ]

    def start_copies(t, index, half):
        for copy in make_copies(t, index, half):
            copy.start()

    def process(index, half):
        for copy in make_copies(tile, index, half):
            copy.wait()

        # One product per key/value head, with the queries of all rows: [K, R * g', w].
        column = (skip_blocks(tile) + index) * cache.block + _iota((1, 1, cache.block))
        queries = q[...].astype(jnp.float32).reshape(kv_heads, rows * padded, -1)
        kv, *by_column = (buffer[half] for buffer in cache.buffers)
        scales = [x[:, None, :] for x in by_column]
        mask = _mask_bias(column < tile_length[tile])
        mask = _mask_windows(mask, prompt_window, tile, column, rows, padded)
        new = update(queries, kv, scales, mask, [ref[...] for ref in accumulators])
        for ref, value in zip(accumulators, new, strict=True):
            ref[...] = value

    return Stream(num_blocks, start_copies, process)


def _mask_windows(mask, prompt_window, tile, column, rows: int, padded: int) -> jax.Array:
    """Add -inf where a column is before a row's window: mask f32 and column i32 [1, 1, C] -> f32[1, R * g', C]."""
    if not prompt_window:
        return mask

    # Rows have windows of their own; a row's g' queries share one.
    by_row = []
    for r in range(rows):
        in_window = column >= prompt_window[1][tile * rows + r]
        by_row.append(jnp.broadcast_to(_mask_bias(in_window), (1, padded, column.shape[-1])))
    return mask + jnp.concatenate(by_row, axis=1)


def _make_suffix_stream(
    cache: CacheRefs, tile, cursor, suffix_blocks, row_of, row_first, q, accumulators, update
) -> Stream:
    """Make the stream of a tile's suffix blocks: each row's own columns, from its first up to cursor[2]."""
    kv_heads, rows, padded, _ = q.shape
    block = cache.block
    blocks = SuffixBlocks(cursor, suffix_blocks, row_first, rows, block, cache.tile)

    # Rows processed together: the largest divisor of R with at most CHAINS (row, head) pairs.
    max_together = min(rows, max(1, CHAINS // kv_heads))
    together = next(n for n in range(max_together, 0, -1) if rows % n == 0)

    def num_blocks(t):
        return suffix_blocks[t]

    def start_copies(t, index, half):
        _for_each_suffix_copy(cache, blocks, row_of, t, index, half, lambda copy: copy.start())

    def process(index, half):
        _for_each_suffix_copy(cache, blocks, row_of, tile, index, half, lambda copy: copy.wait())
        column = blocks.begin(tile, index) + _iota((padded, block))
        # A block that would begin before column 0 contains columns of the next block too: they count there.
        in_block = column < jnp.minimum(blocks.end(tile, index), cursor[1] + 1)

        def process_rows(i, _):
            members = [i * together + j for j in range(together)]

            @pl.when(functools.reduce(jnp.logical_or, (blocks.has_columns(tile, r, index) for r in members)))
            def update_rows():
                # Keys are each row's own: one product per (head, row) pair, X = K * together.
                data, *scale_refs = cache.buffers
                row_slice = pl.ds(i * together, together)
                queries = q[:, row_slice].reshape(kv_heads * together, padded, -1)
                kv = data[half, :, row_slice].reshape(kv_heads * together, block, -1)
                scales = []
                for ref in scale_refs:
                    by_row = [ref[half, r][:, None, :] for r in members]
                    scales.append(jnp.stack(by_row, axis=1).reshape(-1, 1, block))

                # Rows differ in their first column; heads do not.
                masks = [_mask_bias(in_block & (column >= row_first[tile * rows + r])) for r in members]
                mask = jnp.stack(masks)
                mask = jnp.broadcast_to(mask[None], (kv_heads, *mask.shape)).reshape(-1, padded, block)

                # The accumulators of these rows are `together` * g' consecutive queries of each head.
                query_slice = pl.ds(pl.multiple_of(i * together * padded, SUBLANES), together * padded)
                old = [x[:, query_slice, :].reshape(kv_heads * together, padded, -1) for x in accumulators]
                for ref, value in zip(accumulators, update(queries, kv, scales, mask, old), strict=True):
                    ref[:, query_slice, :] = value.reshape(kv_heads, together * padded, -1)

        jax.lax.fori_loop(0, rows // together, process_rows, None)

    return Stream(num_blocks, start_copies, process)


def _for_each_suffix_copy(
    cache: CacheRefs, blocks: SuffixBlocks, row_of, t, index, half, do: Callable
) -> None:
    """Call do(copy) for the copies of a block of tile t: those of each row that has columns in it."""
    block = cache.block

    def copy_row(r, _):
        @pl.when(blocks.has_columns(t, r, index))
        def copy_columns():
            begin = blocks.begin(t, index)

            # Whole tiles of columns before the row's first column are skipped.
            skipped: jax.Array | int = 0
            size: jax.Array | int = block
            if cache.partial_copies:
                before_first = jnp.maximum(blocks.row_first[t * blocks.rows + r] - begin, 0)
                skipped = pl.multiple_of(before_first & -cache.tile, cache.tile)
                size = pl.multiple_of(block - skipped, cache.tile)

            # Data are [half, K, R, C, 2 h], with heads first for the products; scales are [half, R, K, C].
            columns = pl.ds(begin + skipped, size)
            data, *scale_refs = cache.buffers
            targets = [data.at[half, :, r], *(x.at[half, r] for x in scale_refs)]
            for source, target in zip(cache.source, targets, strict=True):
                source = source.at[blocks.cursor[0], row_of[t * blocks.rows + r], :, columns]
                target = target.at[:, pl.ds(skipped, size)]
                do(pltpu.make_async_copy(source, target, cache.arrived.at[half]))

    jax.lax.fori_loop(0, blocks.rows, copy_row, None)


def _update_accumulators(queries, kv, scales, mask, accumulators, *, scale, joined, dtype):
    """Add a block of keys and values to (m, l, acc): the online softmax of flash attention.

    For a batch X: queries [X, J, w], kv [X, C, 2 h]; scales: in int8 those of k and of v, [X, 1, C] each.
    mask: 0, or -inf where a column does not count; broadcasts to [X, J, C].
    """
    m_old, l_old, acc_old = accumulators
    h = kv.shape[-1] // 2
    kv = kv.astype(dtype)

    # Joined queries have zeros beside them, so whole registers [k | v] take the place of k and of v.
    k, v = (kv, kv) if joined else (kv[..., :h], kv[..., h:])
    z = _dot(queries.astype(dtype), k, contract=2) * scale
    if scales:
        z = z * scales[0]
    z = z + mask

    # Rescale the old sums from m_old to the new maximum.  m is never below LOWEST, so no difference is NaN.
    m = jnp.maximum(m_old, jnp.max(z, axis=-1, keepdims=True))
    p = jnp.exp(z - _fit_lanes(m, z.shape[-1]))
    decay = jnp.exp(m_old - m)
    l = decay * l_old + jnp.sum(p, axis=-1, keepdims=True)
    if scales:
        p = p * scales[1]
    acc = _fit_lanes(decay, v.shape[-1]) * acc_old + _dot(p.astype(dtype), v, contract=1)
    return m, l, acc


def _round_up(x: jax.Array, multiple: int) -> jax.Array:
    """Round x up to a multiple of a power of two."""
    return (x + multiple - 1) & -multiple


def _iota(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _fit_lanes(x: jax.Array, width: int) -> jax.Array:
    """Fit x [.., 128], whose lanes are equal, to an operand [.., width], without a shuffle of lanes."""
    if width % LANES:
        return x[..., :1]
    return jnp.concatenate([x] * (width // LANES), axis=-1)


def _mask_bias(counts: jax.Array) -> jax.Array:
    """Return 0 where a column counts and -inf elsewhere."""
    return jnp.where(counts, 0.0, -jnp.inf)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """Multiply [X, J, d] with [X, C, d] (contract 2) or [X, d, C] (contract 1) -> f32[X, J, C]."""
    return jax.lax.dot_general(
        a,
        b,
        (((2,), (contract,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
