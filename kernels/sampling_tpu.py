"""The statistics of a draw on a TPU, where a row fits into fast memory: it is read once.

    grid      ceil(N / 8): a step for 8 rows, the next step's rows arriving meanwhile

    statistics
    logits    (8, V)       f32 in VMEM: 4.9 MB for 152K tokens, twice, for they are double-buffered
    floor     (8, 1)       a threshold found elsewhere
    blocks    (8, M')      out: M' is M rounded up to registers of 128 lanes
    numbers   (8, 128)     out: peak, threshold, full and weighted sum in the first lanes
    mass      (8, V)       scratch, with top-p alone: exponentials are not taken again in each of its passes

Passes over the row (peak, 32 for top-k and 32 for top-p, block sums) go to VMEM.  A pass is one or two loads and
2 to 5 vector operations for a register of 8 x 128 logits: without a search they should hide behind the next rows'
copy from HBM; two searches take longer than it.

    tally     logits (8, V), peak (8, 1) and thresholds (8, 7) in, sums (8, 7) out: a search over shards reads the
              logits once for 3 bits of its answer
    take      one block of 128 logits a row.  XLA's gather is a loop over rows on a TPU.

N rows   V vocabulary, or a shard of it: whole blocks   M blocks   W = 128 tokens in a block   C thresholds
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cooper_jax.kernels.sampling_statistics import BLOCK, Rule, Spans, Statistics, largest_threshold

ROWS = 8
STRIDE = 8  # blocks a loop's step takes: registers that do not wait for one another
CANDIDATES = 7
_NUMBERS = 4
Interpret = bool | pltpu.InterpretParams


def tpu_statistics(logits: jax.Array, rule: Rule, interpret: Interpret) -> Statistics:
    """See sampling_statistics.row_statistics; sums are taken in another order, so their last bits differ."""
    blocks, numbers = _call(logits, None, rule, interpret)
    peak, threshold, full, weighted = (numbers[:, i] for i in range(_NUMBERS))
    blocks = blocks[:, : logits.shape[1] // BLOCK]
    full, weighted = full if rule.cuts else None, weighted if rule.entropy else None
    return Statistics(peak, threshold, blocks, full, weighted)


def span_sums(logits: jax.Array, threshold: jax.Array | None, rule: Rule, interpret: Interpret) -> Spans:
    """See sampling_spans.py; one span a row, cut at threshold f32[N] where it is given."""
    rule = Rule(rule.temperature, entropy=rule.entropy)
    blocks, numbers = _call(logits, threshold, rule, interpret)
    peak, _, full, weighted = (numbers[:, i : i + 1] for i in range(_NUMBERS))
    return Spans(peak, blocks[:, None], full, weighted, logits.shape[1] // BLOCK)


def _call(logits, threshold, rule, interpret) -> tuple[jax.Array, jax.Array]:
    """blocks f32[N, M'] and numbers f32[N, 128]."""
    rows, vocabulary = logits.shape
    width = -(-vocabulary // (BLOCK * BLOCK)) * BLOCK  # M'
    passes = 3 + 32 * ((rule.top_k > 0) + (rule.top_p < 1.0))
    floor = jnp.full((rows,), -jnp.inf, jnp.float32) if threshold is None else threshold
    return pl.pallas_call(
        functools.partial(_statistics, rule=rule, cuts=rule.cuts or threshold is not None),
        grid=(pl.cdiv(rows, ROWS),),
        in_specs=[_tile(vocabulary), _tile(1)],
        out_specs=[_tile(width), _tile(BLOCK)],
        out_shape=[jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (width, BLOCK)],
        scratch_shapes=[pltpu.VMEM((ROWS, vocabulary if rule.top_p < 1.0 else BLOCK), jnp.float32)],
        compiler_params=_parameters(vocabulary),
        cost_estimate=pl.CostEstimate(
            flops=4 * passes * rows * vocabulary,
            transcendentals=2 * rows * vocabulary,
            bytes_accessed=4 * rows * (vocabulary + width + BLOCK),
        ),
        interpret=_interpreted(interpret),
        name="sampling_statistics",
    )(logits, floor[:, None])


def _statistics(
    logits,  # inputs: f32[8, V]
    floor,  # f32[8, 1]
    blocks,  # outputs: f32[8, M']
    numbers,  # f32[8, W]
    mass,  # scratch: f32[8, V] with top-p
    *,
    rule: Rule,
    cuts: bool,
):
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1)
    nothing = jnp.zeros((ROWS, BLOCK), jnp.float32)
    end = logits.shape[1] // BLOCK

    def total(of: Callable[[pl.Slice], jax.Array]) -> jax.Array:
        """of(columns) f32[8, n * W], over the whole row -> f32[8, 1]."""
        return _across(_fold(lambda _, at, sums: sums + _merge(of(at), jnp.add), nothing, 0, end))

    def higher(_, at, top):
        return jnp.maximum(top, _merge(logits[:, at], jnp.maximum))

    peak = jnp.max(_fold(higher, nothing - jnp.inf, 0, end), axis=1, keepdims=True)  # f32[8, 1]
    base = jnp.where(peak == -jnp.inf, 0.0, peak)  # a shard without tokens has masses of 0, not NaN

    def z_at(columns):
        return (logits[:, columns] - base) * (1.0 / rule.temperature)

    threshold = floor[...]
    if rule.top_k:
        threshold = largest_threshold(
            peak, lambda v: total(lambda at: jnp.where(logits[:, at] >= v, 1.0, 0.0)) >= float(rule.top_k)
        )
    if rule.top_p < 1.0:

        def store(_, at, carry):
            mass[:, at] = jnp.exp(z_at(at))
            return carry

        _fold(store, 0, 0, end)

        def kept(v):
            return total(lambda at: jnp.where(logits[:, at] >= v, mass[:, at], 0.0))

        needed = rule.top_p * kept(threshold)
        threshold = largest_threshold(peak, lambda v, floor=threshold: kept(jnp.maximum(v, floor)) >= needed)
    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, peak - rule.depth)

    full, weighted = nothing, nothing  # by lane
    for first in range(0, end, BLOCK):  # the sums of 128 blocks fill a register

        def sum_up(block, at, carry, first=first):
            sums, full, weighted = carry
            z = z_at(at)
            m = jnp.exp(z)
            full += _merge(m, jnp.add)
            if rule.entropy:
                weighted += _merge(jnp.where(m > 0.0, m * z, 0.0), jnp.add)
            if cuts:
                m = jnp.where(logits[:, at] >= threshold, m, 0.0)
            for i in range(m.shape[1] // BLOCK):
                sums = jnp.where(lane == block + i - first, _across(m[:, i * BLOCK : (i + 1) * BLOCK]), sums)
            return sums, full, weighted

        sums, full, weighted = _fold(sum_up, (nothing, full, weighted), first, min(first + BLOCK, end))
        blocks[:, first : first + BLOCK] = sums

    _store_lanes(numbers, (peak, threshold, _across(full), _across(weighted)))


def tally_thresholds(
    logits: jax.Array,  # f32[N, V]
    peak: jax.Array,  # f32[N]
    thresholds: jax.Array,  # f32[N, C]
    temperature: float | None,  # None: count
    interpret: Interpret,
) -> jax.Array:
    """The mass, or the number, of the tokens whose logits are not below each threshold: f32[N, 1, C]."""
    rows, vocabulary = logits.shape
    sums = pl.pallas_call(
        functools.partial(_tally, temperature=temperature),
        grid=(pl.cdiv(rows, ROWS),),
        in_specs=[_tile(vocabulary), _tile(1), _tile(CANDIDATES)],
        out_specs=_tile(BLOCK),
        out_shape=jax.ShapeDtypeStruct((rows, BLOCK), jnp.float32),
        compiler_params=_parameters(vocabulary),
        cost_estimate=pl.CostEstimate(
            flops=3 * CANDIDATES * rows * vocabulary,
            transcendentals=rows * vocabulary,
            bytes_accessed=4 * rows * (vocabulary + 2 * BLOCK),
        ),
        interpret=_interpreted(interpret),
        name="sampling_tally",
    )(logits, peak[:, None], thresholds)
    return sums[:, None, :CANDIDATES]


def _tally(
    logits,  # inputs: f32[8, V]
    peak,  # f32[8, 1]
    thresholds,  # f32[8, C]
    sums,  # outputs: f32[8, W]
    *,
    temperature: float | None,
):
    def add(_, at, carry):
        x = logits[:, at]
        m = jnp.ones_like(x) if temperature is None else jnp.exp((x - peak[...]) * (1.0 / temperature))
        reached = (jnp.where(x >= thresholds[:, c : c + 1], m, 0.0) for c in range(CANDIDATES))
        return tuple(sums + _merge(m, jnp.add) for sums, m in zip(carry, reached, strict=True))

    zeros = (jnp.zeros((ROWS, BLOCK), jnp.float32),) * CANDIDATES
    _store_lanes(sums, [_across(x) for x in _fold(add, zeros, 0, logits.shape[1] // BLOCK)])


def take_block(logits: jax.Array, block: jax.Array, interpret: Interpret) -> jax.Array:
    """Of each row of f32[N, V] the block i32[N] -> f32[N, W]."""
    rows = logits.shape[0]
    steps = pl.cdiv(rows, ROWS)
    block = jnp.pad(block, (0, steps * ROWS - rows))

    def of_row(row):
        return pl.BlockSpec((ROWS, BLOCK), lambda i, block: (i, block[i * ROWS + row]))

    return pl.pallas_call(
        _take,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[of_row(row) for row in range(ROWS)],
            out_specs=pl.BlockSpec((ROWS, BLOCK), lambda i, block: (i, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, BLOCK), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=4 * BLOCK * steps * ROWS * (ROWS + 1)
        ),
        interpret=_interpreted(interpret),
        name="sampling_take",
    )(block, *[logits] * ROWS)


def _take(
    _,  # prefetch: i32[N'], used by the index maps
    *refs,  # inputs: f32[8, W], eight times, the block of one row each; outputs: f32[8, W]
):
    *inputs, out = refs
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 0)
    taken = inputs[0][...]
    for i in range(1, ROWS):
        taken = jnp.where(row == i, inputs[i][...], taken)
    out[...] = taken


def _fold(step, carry, first: int, end: int):
    """carry = step(block, columns, carry) over blocks `first` to `end`: STRIDE at a time, the last ones singly."""
    whole = (end - first) // STRIDE

    def several(i, carry):
        block = first + i * STRIDE
        return step(block, pl.ds(pl.multiple_of(block * BLOCK, BLOCK), STRIDE * BLOCK), carry)

    carry = jax.lax.fori_loop(0, whole, several, carry)
    for block in range(first + whole * STRIDE, end):
        carry = step(block, pl.ds(block * BLOCK, BLOCK), carry)
    return carry


def _merge(x: jax.Array, op) -> jax.Array:
    """f32[8, n * W] -> f32[8, W]: registers in pairs, then pairs of pairs."""
    parts = [x[:, i : i + BLOCK] for i in range(0, x.shape[1], BLOCK)]
    while len(parts) > 1:
        parts = [op(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def _across(x: jax.Array) -> jax.Array:
    """f32[8, W] -> f32[8, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


def _store_lanes(out, columns) -> None:
    """f32[8, 1] each -> the first lanes of f32[8, W]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1)
    packed = jnp.zeros((ROWS, BLOCK), jnp.float32)
    for i, column in enumerate(columns):
        packed = jnp.where(lane == i, column, packed)
    out[...] = packed


def _tile(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((ROWS, width), lambda i: (i, 0))


def _parameters(vocabulary: int) -> pltpu.CompilerParams:
    """Memory for the rows twice and their masses, and 4 MiB for the rest."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",), vmem_limit_bytes=3 * 4 * ROWS * vocabulary + (4 << 20)
    )


def _interpreted(interpret: Interpret) -> Interpret:
    return pltpu.InterpretParams() if interpret is True else interpret
