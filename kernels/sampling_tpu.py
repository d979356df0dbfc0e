"""Sampling statistics on a TPU, where 8 rows of logits fit into VMEM: they are read once.

    grid         ceil(N / 8): a step for 8 rows; the next step's rows arrive meanwhile

    statistics
    logits       (8, V)       f32 in VMEM: 4.9 MB for 152K tokens, double-buffered
    given        (8, 1)       a threshold found elsewhere
    block_sums   (8, M')      out: M' is M rounded up to registers of 128 lanes
    scalars      (8, 128)     out: max_logit, threshold, full_sum and plogp_sum in the first lanes
    p            (8, V)       scratch, with top-p alone: its passes do not compute exponentials again

Passes over the row (maximum, 32 for top-k and 32 for top-p, block sums) go to VMEM.  A pass is one or two
loads and 2 to 5 vector operations for a register of 8 x 128 logits: without a search they should hide behind
the next rows' copy from HBM; two searches take longer than it.

    tally        logits (8, V), max_logit (8, 1) and thresholds (8, 7) in, sums (8, 7) out: a search over
                 shards reads the logits once for 3 bits of its answer
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

ROWS = 8
STRIDE = 8  # blocks of one iteration of a loop: registers that do not wait for one another
CANDIDATES = 7  # X: thresholds that one pass over the logits tries
_SCALARS = 4  # max_logit, threshold, full_sum, plogp_sum
Interpret = bool | pltpu.InterpretParams


def tpu_statistics(logits: jax.Array, rule: Rule, interpret: Interpret) -> Statistics:
    """Do sampling_statistics.row_statistics; sums in another order differ in their last bits."""
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
    """Sum each row as one span, filtered at threshold f32[N] where it is given: see sampling_spans.py."""
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
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1)
    zeros = jnp.zeros((ROWS, BLOCK), jnp.float32)
    end = logits.shape[1] // BLOCK

    def sum_row(values: Callable[[pl.Slice], jax.Array]) -> jax.Array:
        """Sum values(columns) f32[8, n * 128] over the whole row -> f32[8, 1]."""

        def add(_, at, sums):
            return sums + _reduce_registers(values(at), jnp.add)

        return _sum_lanes(_loop_over_blocks(add, zeros, 0, end))

    def update_max(_, at, m):
        return jnp.maximum(m, _reduce_registers(logits[:, at], jnp.maximum))

    max_logit = jnp.max(
        _loop_over_blocks(update_max, zeros - jnp.inf, 0, end), axis=1, keepdims=True
    )  # f32[8, 1]
    base = jnp.where(max_logit == -jnp.inf, 0.0, max_logit)  # a shard without tokens gives 0, not NaN

    def z_at(columns):
        return (logits[:, columns] - base) * (1.0 / rule.temperature)

    threshold = given[...]
    if rule.top_k:

        def keeps_k(v):
            count = sum_row(lambda at: jnp.where(logits[:, at] >= v, 1.0, 0.0))
            return count >= float(rule.top_k)

        threshold = largest_threshold(max_logit, keeps_k)
    if rule.top_p < 1.0:

        def store_p(_, at, carry):
            p[:, at] = jnp.exp(z_at(at))
            return carry

        _loop_over_blocks(store_p, 0, 0, end)

        def sum_kept(v):
            return sum_row(lambda at: jnp.where(logits[:, at] >= v, p[:, at], 0.0))

        top_k_threshold = threshold
        needed = rule.top_p * sum_kept(top_k_threshold)

        def keeps_p(v):
            return sum_kept(jnp.maximum(v, top_k_threshold)) >= needed

        threshold = largest_threshold(max_logit, keeps_p)
    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, max_logit - rule.min_p_depth)

    # The sums of 128 blocks fill a register; full and plogp are summed lane by lane.
    full, plogp = zeros, zeros
    for first in range(0, end, BLOCK):

        def add_blocks(block, at, carry, first=first):
            sums, full, plogp = carry
            z = z_at(at)
            e = jnp.exp(z)
            full += _reduce_registers(e, jnp.add)
            if rule.entropy:
                plogp += _reduce_registers(jnp.where(e > 0.0, e * z, 0.0), jnp.add)
            if filtered:
                e = jnp.where(logits[:, at] >= threshold, e, 0.0)
            for i in range(e.shape[1] // BLOCK):
                block_sum = _sum_lanes(e[:, i * BLOCK : (i + 1) * BLOCK])
                sums = jnp.where(lane == block + i - first, block_sum, sums)
            return sums, full, plogp

        stop = min(first + BLOCK, end)
        sums, full, plogp = _loop_over_blocks(add_blocks, (zeros, full, plogp), first, stop)
        block_sums[:, first : first + BLOCK] = sums

    _store_lanes(scalars, (max_logit, threshold, _sum_lanes(full), _sum_lanes(plogp)))


def tally_thresholds(
    logits: jax.Array,  # f32[N, V]
    max_logit: jax.Array,  # f32[N]
    thresholds: jax.Array,  # f32[N, X]
    temperature: float | None,  # None: count
    interpret: Interpret,
) -> jax.Array:
    """Sum the probabilities, or count the tokens, at or above each threshold: f32[N, 1, X]."""
    rows, vocabulary = logits.shape
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
    def add(_, at, carry):
        x = logits[:, at]
        if temperature is None:
            p = jnp.ones_like(x)
        else:
            p = jnp.exp((x - max_logit[...]) * (1.0 / temperature))
        out = []
        for i, total in enumerate(carry):
            kept = jnp.where(x >= thresholds[:, i : i + 1], p, 0.0)
            out.append(total + _reduce_registers(kept, jnp.add))
        return tuple(out)

    zeros = (jnp.zeros((ROWS, BLOCK), jnp.float32),) * CANDIDATES
    totals = _loop_over_blocks(add, zeros, 0, logits.shape[1] // BLOCK)
    _store_lanes(sums, [_sum_lanes(x) for x in totals])


def take_block(logits: jax.Array, block: jax.Array, interpret: Interpret) -> jax.Array:
    """Take block i32[N] of each row of f32[N, V] -> f32[N, 128]."""
    rows = logits.shape[0]
    steps = pl.cdiv(rows, ROWS)
    block = jnp.pad(block, (0, steps * ROWS - rows))

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
    # inputs: f32[8, 128], eight times, each the block of one row; outputs: f32[8, 128]
    *inputs_and_output,
):
    *inputs, out = inputs_and_output
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 0)
    taken = inputs[0][...]
    for i in range(1, ROWS):
        taken = jnp.where(row == i, inputs[i][...], taken)
    out[...] = taken


def _loop_over_blocks(step: Callable[..., Any], carry: Any, first: int, end: int) -> Any:
    """Run carry = step(block, columns, carry) over blocks `first` to `end`, STRIDE at a time, then singly."""
    whole = (end - first) // STRIDE

    def several(i, carry):
        block = first + i * STRIDE
        return step(block, pl.ds(pl.multiple_of(block * BLOCK, BLOCK), STRIDE * BLOCK), carry)

    carry = jax.lax.fori_loop(0, whole, several, carry)
    for block in range(first + whole * STRIDE, end):
        carry = step(block, pl.ds(block * BLOCK, BLOCK), carry)
    return carry


def _reduce_registers(x: jax.Array, op: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Reduce f32[8, n * 128] -> f32[8, 128]: registers in pairs, then pairs of pairs."""
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
    """Reserve VMEM for the rows twice and their probabilities, and 4 MiB for the rest."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",), vmem_limit_bytes=3 * 4 * ROWS * vocabulary + (4 << 20)
    )


def _interpret_params(interpret: Interpret) -> Interpret:
    return pltpu.InterpretParams() if interpret is True else interpret
