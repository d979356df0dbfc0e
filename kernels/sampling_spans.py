"""A draw's statistics from kernels that keep nothing: for rows that are too long for fast memory, or sharded.

1. `span_sums`: each span of a row (what a program holds at a time; a shard's columns at most) gives its own peak
   and its sums relative to that.  Put in terms of the whole row's peak here, on [N, M]: the logits are read once.
2. Top-k and top-p: `tally` tries C thresholds a reading, which leaves 1 / (C + 1) of the interval: 11 readings for
   C = 7, 8 for C = 15, each with one small psum.
3. `span_sums` again, at the threshold.

N rows   V vocabulary, or a shard's contiguous columns of it: whole blocks   M blocks   S spans   C thresholds
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cooper_jax.kernels.sampling_statistics import (
    Rule,
    Spans,
    Statistics,
    float_to_order,
    gather_shards,
    order_to_float,
)


def span_statistics(
    kernel, logits: jax.Array, rule: Rule, axis_name: str | None, interpret: bool
) -> Statistics:
    """See sampling_statistics.row_statistics.  kernel: a module with `span_sums`, `tally` and CANDIDATES."""
    whole = _joined(kernel.span_sums(logits, None, rule, interpret), rule, axis_name)
    if not rule.cuts:
        return whole._replace(full=None)
    peak = whole.peak

    def reach(thresholds, temperature):  # f32[N, C] -> f32[N, C]
        return _over_spans(kernel.tally(logits, peak, thresholds, temperature, interpret), axis_name)

    threshold = jnp.full_like(peak, -jnp.inf)
    if rule.top_k:
        threshold = _largest(peak, lambda v: reach(v, None) >= rule.top_k, kernel.CANDIDATES)
    if rule.top_p < 1.0:
        floor = jnp.broadcast_to(threshold[:, None], (threshold.shape[0], kernel.CANDIDATES))
        needed = rule.top_p * reach(floor, rule.temperature)
        threshold = _largest(
            peak, lambda v: reach(jnp.maximum(v, floor), rule.temperature) >= needed, kernel.CANDIDATES
        )
    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, peak - rule.depth)
    rule = rule._replace(entropy=False)  # `whole` has it
    kept = _joined(kernel.span_sums(logits, threshold, rule, interpret), rule, axis_name)
    return whole._replace(threshold=threshold, blocks=kept.blocks)


def _joined(spans: Spans, rule: Rule, axis_name: str | None) -> Statistics:
    """Nothing cut but the blocks; all in terms of the peak of the whole row, over all shards."""
    peak = jnp.max(spans.peak, axis=1)
    if axis_name is not None:
        peak = jax.lax.pmax(peak, axis_name)
    shift = (spans.peak - peak[:, None]) * (1.0 / rule.temperature)  # f32[N, S]; -inf for an empty span
    scale = jnp.exp(shift)
    blocks = spans.blocks * scale[:, :, None]
    weighted = jnp.where(scale > 0.0, scale * (spans.weighted + shift * spans.full), 0.0)
    return Statistics(
        peak=peak,
        threshold=jnp.full_like(peak, -jnp.inf),
        blocks=gather_shards(blocks.reshape(blocks.shape[0], -1)[:, : spans.count], axis_name),
        full=_over_spans(spans.full * scale, axis_name),
        weighted=_over_spans(weighted, axis_name) if rule.entropy else None,
    )


def _over_spans(x: jax.Array, axis_name: str | None) -> jax.Array:
    """[N, S, ...] -> [N, ...], in one order whatever N; over all shards."""
    total = functools.reduce(jnp.add, [x[:, i] for i in range(x.shape[1])])
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _largest(peak: jax.Array, enough: Callable[[jax.Array], jax.Array], candidates: int) -> jax.Array:
    """sampling_statistics.largest_threshold, several thresholds f32[N, C] at a time: enough gives bool[N, C]."""
    low = float_to_order(jnp.full_like(peak, -jnp.inf))  # enough holds here, and fails at low + width
    width = jax.lax.bitcast_convert_type(float_to_order(peak) + 1 - low, jnp.uint32)
    nth = jnp.arange(candidates + 1, dtype=jnp.uint32)[None, :]

    def narrow(_, bounds):
        low, width = bounds
        step = width // (candidates + 1) + (width % (candidates + 1) > 0)
        ahead = jnp.minimum(nth * step[:, None], width[:, None])  # u32[N, 1 + C]: what is added to low
        at = low[:, None] + jax.lax.bitcast_convert_type(ahead, jnp.int32)
        holds = enough(order_to_float(at[:, 1:])) & (ahead[:, 1:] < width[:, None])
        best = jnp.sum(holds, axis=1)[:, None]
        low = jnp.take_along_axis(at, best, axis=1)[:, 0]
        return low, jnp.minimum(step, width - jnp.take_along_axis(ahead, best, axis=1)[:, 0])

    passes = next(n for n in range(1, 33) if (candidates + 1) ** n >= 2**32)
    return order_to_float(jax.lax.fori_loop(0, passes, narrow, (low, width))[0])
