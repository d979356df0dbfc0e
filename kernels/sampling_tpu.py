"""Sampling statistics on a TPU, where 8 rows of logits fit into VMEM and are read from HBM once.

    grid         ceil(N / 8): one step per 8 rows, while the rows of the next step are copied

    statistics
    logits       (8, V)       in: f32 in VMEM, 4.9 MB for 152K tokens, double-buffered
    given        (8, 1)       in: the threshold below which tokens are dropped, -inf: none
    block_sums   (8, M')      out: M' is M rounded up to registers of 128 lanes
    scalars      (8, 128)     out: max_logit, threshold, full_sum and plogp_sum in the first four lanes
    p            (8, V)       scratch, only with top-p: its passes do not compute exponentials again

All passes over the row (the maximum, 32 for top-k, 32 for top-p, the block sums) read VMEM.  A pass takes one
or two loads and 2 to 5 vector operations per register of 8 x 128 logits.  Without top-k and top-p the passes
should take less time than the copy of the next rows from HBM; with both they take more.

    tally        logits (8, V), max_logit (8, 1) and thresholds (8, 7) in, sums (8, 7) out: one pass of a
                 search over shards reads the logits once and gives 3 bits of the threshold
    take         one block of 128 logits per row.  XLA's gather is a loop over rows on a TPU.

N rows   V vocabulary, or a shard of it: whole blocks   M blocks of 128 tokens   X candidate thresholds
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cooper_jax.kernels.sampling_statistics import BLOCK, Rule, Spans, Statistics, largest_threshold

ROWS = 8  # sublanes of a register
STRIDE = 8  # blocks per iteration of a loop: independent registers, which do not wait for one another
CANDIDATES = 7  # X: thresholds that one pass over the logits tries
_SCALARS = 4  # max_logit, threshold, full_sum, plogp_sum
Interpret = bool | pltpu.InterpretParams


def tpu_statistics(logits: jax.Array, rule: Rule, interpret: Interpret) -> Statistics:
    """Compute the statistics of sampling_statistics.row_statistics, up to the order of their sums."""
    block_sums, scalars = _call(logits, None, rule, interpret)
    max_logit, threshold, full_sum, plogp_sum = (scalars[:, i] for i in range(_SCALARS))
    return Statistics(
        max_logit=max_logit,
        threshold=threshold,
        block_sums=block_sums[:, : logits.shape[1] // BLOCK],
        full_sum=full_sum if rule.filters else None,
        plogp_sum=plogp_sum if rule.entropy else None,
    )


def span_sums(logits: jax.Array, threshold: jax.Array | None, rule: Rule, interpret: Interpret) -> Spans:
    """Sum each row as one span (E = 1), filtered at `threshold` f32[N] unless None: see sampling_spans.py."""
    # The filters of `rule` are applied by the caller, through the threshold.
    rule = Rule(rule.temperature, entropy=rule.entropy)
    block_sums, scalars = _call(logits, threshold, rule, interpret)
    max_logit, _, full_sum, plogp_sum = (scalars[:, i : i + 1] for i in range(_SCALARS))
    return Spans(max_logit, block_sums[:, None], full_sum, plogp_sum, logits.shape[1] // BLOCK)


def _call(
    logits: jax.Array, threshold: jax.Array | None, rule: Rule, interpret: Interpret
) -> tuple[jax.Array, jax.Array]:
    """Run the kernel -> (block_sums f32[N, M'], scalars f32[N, 128])."""
    rows, vocabulary = logits.shape
    width = -(-vocabulary // (BLOCK * BLOCK)) * BLOCK  # M'

    # For the cost estimate: passes over the row, with a bisection of 32 passes for top-k and for top-p.
    passes = 3 + 32 * ((rule.top_k > 0) + (rule.top_p < 1.0))
    given = jnp.full((rows,), -jnp.inf, jnp.float32) if threshold is None else threshold
    return pl.pallas_call(
        functools.partial(_statistics, rule=rule, filtered=rule.filters or threshold is not None),
        grid=(pl.cdiv(rows, ROWS),),
        in_specs=[_row_block(vocabulary), _row_block(1)],
        out_specs=[_row_block(width), _row_block(BLOCK)],
        out_shape=[jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (width, BLOCK)],
        scratch_shapes=[pltpu.VMEM((ROWS, vocabulary if rule.top_p < 1.0 else BLOCK), jnp.float32)],
        compiler_params=_compiler_params(vocabulary),
        cost_estimate=pl.CostEstimate(
            flops=4 * passes * rows * vocabulary,
            transcendentals=2 * rows * vocabulary,
            bytes_accessed=4 * rows * (vocabulary + width + BLOCK),
        ),
        interpret=_interpret_params(interpret),
        name="sampling_statistics",
    )(logits, given[:, None])


def _statistics(
    # inputs
    logits,  # f32[8, V]
    given,  # f32[8, 1]
    # outputs
    block_sums,  # f32[8, M']
    scalars,  # f32[8, 128]
    # scratch
    p,  # f32[8, V] with top-p
    *,
    rule: Rule,
    filtered: bool,
):
    def update_max(_, at, m):
        return jnp.maximum(m, _reduce_registers(logits[:, at], jnp.maximum))

    # Lane by lane over the row's registers, then once over the 128 lanes.
    lowest = jnp.full((ROWS, BLOCK), -jnp.inf, jnp.float32)
    lane_max = _loop_over_blocks(update_max, lowest, 0, logits.shape[1] // BLOCK)
    max_logit = jnp.max(lane_max, axis=1, keepdims=True)  # f32[8, 1]

    # A shard may have only -inf: its probabilities are 0, not NaN.
    base = jnp.where(max_logit == -jnp.inf, 0.0, max_logit)

    def z_at(columns: pl.Slice) -> jax.Array:
        return (logits[:, columns] - base) * (1.0 / rule.temperature)

    threshold = _find_threshold(logits, p, z_at, given[...], max_logit, rule)
    full, plogp = _write_block_sums(logits, block_sums, z_at, threshold if filtered else None, rule)
    _store_lanes(scalars, (max_logit, threshold, _sum_lanes(full), _sum_lanes(plogp)))


def _find_threshold(
    logits,  # f32[8, V]
    p,  # scratch f32[8, V] with top-p
    z_at: Callable[[pl.Slice], jax.Array],
    threshold: jax.Array,  # f32[8, 1]: without top-k, the one to begin with
    max_logit: jax.Array,  # f32[8, 1]
    rule: Rule,
) -> jax.Array:
    """Find the threshold of the rule's filters: f32[8, 1]."""
    if rule.top_k:

        def keeps_k(v):
            count = _sum_row(logits, lambda at: jnp.where(logits[:, at] >= v, 1.0, 0.0))
            return count >= float(rule.top_k)

        threshold = largest_threshold(max_logit, keeps_k)

    if rule.top_p < 1.0:
        # 32 passes read the probabilities: they are computed once.
        def store_p(_, at, carry):
            p[:, at] = jnp.exp(z_at(at))
            return carry

        _loop_over_blocks(store_p, 0, 0, logits.shape[1] // BLOCK)

        def sum_kept(v):
            return _sum_row(logits, lambda at: jnp.where(logits[:, at] >= v, p[:, at], 0.0))

        # Top-p's share is one of the tokens that top-k left.
        top_k_threshold = threshold
        needed = rule.top_p * sum_kept(top_k_threshold)

        def keeps_p(v):
            return sum_kept(jnp.maximum(v, top_k_threshold)) >= needed

        threshold = largest_threshold(max_logit, keeps_p)

    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, max_logit - rule.min_p_depth)
    return threshold


def _write_block_sums(
    logits,  # f32[8, V]
    block_sums,  # out: f32[8, M']
    z_at: Callable[[pl.Slice], jax.Array],
    threshold: jax.Array | None,  # f32[8, 1]; None: nothing is filtered
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """Write each block's sum of kept p; return sums of p and p log p over all tokens by lane: f32[8, 128]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1)
    zeros = jnp.zeros((ROWS, BLOCK), jnp.float32)
    end = logits.shape[1] // BLOCK

    # One register of block_sums at a time: the sums of 128 blocks.
    full, plogp = zeros, zeros
    for first in range(0, end, BLOCK):

        def add_blocks(block, at, carry, first=first):
            sums, full, plogp = carry
            z = z_at(at)
            e = jnp.exp(z)
            full += _reduce_registers(e, jnp.add)
            if rule.entropy:
                plogp += _reduce_registers(jnp.where(e > 0.0, e * z, 0.0), jnp.add)
            if threshold is not None:
                e = jnp.where(logits[:, at] >= threshold, e, 0.0)

            # Block i of these goes to its own lane of the register.
            for i in range(e.shape[1] // BLOCK):
                block_sum = _sum_lanes(e[:, i * BLOCK : (i + 1) * BLOCK])
                sums = jnp.where(lane == block + i - first, block_sum, sums)
            return sums, full, plogp

        stop = min(first + BLOCK, end)
        sums, full, plogp = _loop_over_blocks(add_blocks, (zeros, full, plogp), first, stop)
        block_sums[:, first : first + BLOCK] = sums
    return full, plogp


def _sum_row(logits, values: Callable[[pl.Slice], jax.Array]) -> jax.Array:
    """Sum values(columns) f32[8, n * 128] over all columns of `logits` -> f32[8, 1]."""

    def add(_, at, sums):
        return sums + _reduce_registers(values(at), jnp.add)

    zeros = jnp.zeros((ROWS, BLOCK), jnp.float32)
    return _sum_lanes(_loop_over_blocks(add, zeros, 0, logits.shape[1] // BLOCK))


def tally_thresholds(
    logits: jax.Array,  # f32[N, V]
    max_logit: jax.Array,  # f32[N]
    thresholds: jax.Array,  # f32[N, X]
    temperature: float | None,  # None: count tokens
    interpret: Interpret,
) -> jax.Array:
    """Sum the probabilities, or count the tokens, at or above each threshold: f32[N, 1, X]."""
    rows, vocabulary = logits.shape

    # The output is a whole register of 128 lanes, of which X are used.
    sums = pl.pallas_call(
        functools.partial(_tally, temperature=temperature),
        grid=(pl.cdiv(rows, ROWS),),
        in_specs=[_row_block(vocabulary), _row_block(1), _row_block(CANDIDATES)],
        out_specs=_row_block(BLOCK),
        out_shape=jax.ShapeDtypeStruct((rows, BLOCK), jnp.float32),
        compiler_params=_compiler_params(vocabulary),
        cost_estimate=pl.CostEstimate(
            flops=3 * CANDIDATES * rows * vocabulary,
            transcendentals=rows * vocabulary,
            bytes_accessed=4 * rows * (vocabulary + 2 * BLOCK),
        ),
        interpret=_interpret_params(interpret),
        name="sampling_tally",
    )(logits, max_logit[:, None], thresholds)
    return sums[:, None, :CANDIDATES]


def _tally(
    # inputs
    logits,  # f32[8, V]
    max_logit,  # f32[8, 1]
    thresholds,  # f32[8, X]
    # outputs
    sums,  # f32[8, 128]
    *,
    temperature: float | None,
):
    def add(_, at, totals):
        x = logits[:, at]
        if temperature is None:
            p = jnp.ones_like(x)
        else:
            p = jnp.exp((x - max_logit[...]) * (1.0 / temperature))

        # One load and one exponential serve all X thresholds.
        new_totals = []
        for i, total in enumerate(totals):
            kept = jnp.where(x >= thresholds[:, i : i + 1], p, 0.0)
            new_totals.append(total + _reduce_registers(kept, jnp.add))
        return tuple(new_totals)

    zeros = (jnp.zeros((ROWS, BLOCK), jnp.float32),) * CANDIDATES
    totals = _loop_over_blocks(add, zeros, 0, logits.shape[1] // BLOCK)
    _store_lanes(sums, [_sum_lanes(x) for x in totals])


def take_block(logits: jax.Array, block: jax.Array, interpret: Interpret) -> jax.Array:
    """Take block i32[N] of each row of f32[N, V] -> f32[N, 128]."""
    rows = logits.shape[0]
    steps = pl.cdiv(rows, ROWS)
    block = jnp.pad(block, (0, steps * ROWS - rows))

    # The pipeline copies (8, 128) tiles: for each of a step's 8 rows, the tile that has the row's block.
    def block_of_row(row):
        return pl.BlockSpec((ROWS, BLOCK), lambda i, block: (i, block[i * ROWS + row]))

    return pl.pallas_call(
        _take,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[block_of_row(row) for row in range(ROWS)],
            out_specs=pl.BlockSpec((ROWS, BLOCK), lambda i, block: (i, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, BLOCK), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=4 * BLOCK * steps * ROWS * (ROWS + 1)
        ),
        interpret=_interpret_params(interpret),
        name="sampling_take",
    )(block, *[logits] * ROWS)


def _take(
    # prefetch scalars
    _,  # i32[rows of all steps]: used by the index maps
    # inputs: eight tiles f32[8, 128], the i-th with the block of row i; outputs: f32[8, 128]
    *inputs_and_output,
):
    # Sublane i of the output comes from the i-th tile.
    *inputs, out = inputs_and_output
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 0)
    result = inputs[0][...]
    for i in range(1, ROWS):
        result = jnp.where(row == i, inputs[i][...], result)
    out[...] = result


def _loop_over_blocks(step: Callable[..., Any], carry: Any, first: int, end: int) -> Any:
    """Run carry = step(block, columns, carry) over blocks `first` to `end` - 1.

    A step gets the columns of STRIDE blocks, the last steps those of one block each.
    """
    strides = (end - first) // STRIDE

    def run_stride(i, carry):
        block = first + i * STRIDE
        return step(block, pl.ds(pl.multiple_of(block * BLOCK, BLOCK), STRIDE * BLOCK), carry)

    carry = jax.lax.fori_loop(0, strides, run_stride, carry)
    for block in range(first + strides * STRIDE, end):
        carry = step(block, pl.ds(block * BLOCK, BLOCK), carry)
    return carry


def _reduce_registers(x: jax.Array, op: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Reduce f32[8, n * 128] -> f32[8, 128], lane by lane."""
    # As a tree, whose operations wait for each other log2(n) times instead of n - 1 times.
    parts = [x[:, i : i + BLOCK] for i in range(0, x.shape[1], BLOCK)]
    while len(parts) > 1:
        pairs = [op(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _sum_lanes(x: jax.Array) -> jax.Array:
    """Sum f32[8, 128] -> f32[8, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


def _store_lanes(out, columns: Sequence[jax.Array]) -> None:
    """Store columns f32[8, 1] into the first lanes of `out` f32[8, 128]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1)
    packed = jnp.zeros((ROWS, BLOCK), jnp.float32)
    for i, column in enumerate(columns):
        packed = jnp.where(lane == i, column, packed)
    out[...] = packed


def _row_block(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((ROWS, width), lambda i: (i, 0))


def _compiler_params(vocabulary: int) -> pltpu.CompilerParams:
    """Reserve VMEM for two buffers of 8 rows and one of their probabilities, and 4 MiB for the rest."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",), vmem_limit_bytes=3 * 4 * ROWS * vocabulary + (4 << 20)
    )


def _interpret_params(interpret: Interpret) -> Interpret:
    return pltpu.InterpretParams() if interpret is True else interpret
