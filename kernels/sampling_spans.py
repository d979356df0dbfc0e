"""Sampling statistics from kernels that keep no row: for rows too long for fast memory, or sharded.

1. `span_sums`: each span of a row (what a program holds at a time; at most a shard's columns) gives its own
   largest logit and its sums relative to that.  They are rescaled to the whole row's here, on [N, M]: the
   logits are read once.
2. Top-k and top-p: `tally_thresholds` tries X thresholds per pass over the logits, which leaves 1 / (X + 1)
   of the interval: 11 passes for X = 7, 8 for X = 15, each with one small psum.
3. `span_sums` again, at the threshold.

N rows   V vocabulary, or a shard's contiguous columns of it: whole blocks   M blocks of 128 tokens   E spans
X candidate thresholds
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

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


class SpanKernels(Protocol):
    """The module of a backend: sampling_tpu or sampling_triton."""

    CANDIDATES: int  # X

    def span_sums(self, logits: jax.Array, threshold: jax.Array | None, rule: Rule, interpret: Any) -> Spans:
        """Sum the spans' probabilities at or above `threshold` f32[N]; None: of all tokens."""

    def tally_thresholds(
        self,
        logits: jax.Array,
        max_logit: jax.Array,
        thresholds: jax.Array,
        temperature: float | None,
        interpret: Any,
    ) -> jax.Array:
        """Sum probabilities (temperature None: count tokens) at or above each threshold: f32[N, E, X]."""


def span_statistics(
    kernels: SpanKernels, logits: jax.Array, rule: Rule, axis_name: str | None, interpret: bool
) -> Statistics:
    """Compute what sampling_statistics.row_statistics does, with a backend's kernels."""
    unfiltered = _join_spans(kernels.span_sums(logits, None, rule, interpret), rule, axis_name)
    if not rule.filters:
        return unfiltered._replace(full_sum=None)
    max_logit = unfiltered.max_logit

    def tally(thresholds, temperature):  # f32[N, X] -> f32[N, X]
        sums = kernels.tally_thresholds(logits, max_logit, thresholds, temperature, interpret)
        return _sum_spans(sums, axis_name)

    threshold = jnp.full_like(max_logit, -jnp.inf)
    if rule.top_k:
        threshold = _find_threshold(max_logit, lambda v: tally(v, None) >= rule.top_k, kernels.CANDIDATES)
    if rule.top_p < 1.0:
        top_k_threshold = jnp.broadcast_to(threshold[:, None], (threshold.shape[0], kernels.CANDIDATES))
        needed = rule.top_p * tally(top_k_threshold, rule.temperature)

        def keeps_p(v):
            return tally(jnp.maximum(v, top_k_threshold), rule.temperature) >= needed

        threshold = _find_threshold(max_logit, keeps_p, kernels.CANDIDATES)
    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, max_logit - rule.min_p_depth)

    rule = rule._replace(entropy=False)  # `unfiltered` has it
    kept = _join_spans(kernels.span_sums(logits, threshold, rule, interpret), rule, axis_name)
    return unfiltered._replace(threshold=threshold, block_sums=kept.block_sums)


def _join_spans(spans: Spans, rule: Rule, axis_name: str | None) -> Statistics:
    """Rescale spans to the largest logit of the whole row, over all shards; only block_sums are filtered."""
    max_logit = jnp.max(spans.max_logit, axis=1)
    if axis_name is not None:
        max_logit = jax.lax.pmax(max_logit, axis_name)
    shift = (spans.max_logit - max_logit[:, None]) * (
        1.0 / rule.temperature
    )  # f32[N, E]; -inf: an empty span
    scale = jnp.exp(shift)
    block_sums = spans.block_sums * scale[:, :, None]
    plogp = jnp.where(scale > 0.0, scale * (spans.plogp_sum + shift * spans.full_sum), 0.0)
    return Statistics(
        max_logit=max_logit,
        threshold=jnp.full_like(max_logit, -jnp.inf),
        block_sums=gather_shards(
            block_sums.reshape(block_sums.shape[0], -1)[:, : spans.num_blocks], axis_name
        ),
        full_sum=_sum_spans(spans.full_sum * scale, axis_name),
        plogp_sum=_sum_spans(plogp, axis_name) if rule.entropy else None,
    )


def _sum_spans(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Sum [N, E, ...] -> [N, ...] in one order whatever N, and over all shards."""
    total = functools.reduce(jnp.add, [x[:, i] for i in range(x.shape[1])])
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _find_threshold(
    max_logit: jax.Array, keeps_enough: Callable[[jax.Array], jax.Array], candidates: int
) -> jax.Array:
    """Do sampling_statistics.largest_threshold with several thresholds f32[N, X] at a time -> f32[N].

    keeps_enough returns bool[N, X].
    """
    low = float_to_order(
        jnp.full_like(max_logit, -jnp.inf)
    )  # keeps_enough holds here, and fails at low + width
    width = jax.lax.bitcast_convert_type(float_to_order(max_logit) + 1 - low, jnp.uint32)
    nth = jnp.arange(candidates + 1, dtype=jnp.uint32)[None, :]

    def narrow(_, bounds):
        low, width = bounds
        step = width // (candidates + 1) + (width % (candidates + 1) > 0)
        offset = jnp.minimum(nth * step[:, None], width[:, None])  # u32[N, 1 + X]: what is added to low
        at = low[:, None] + jax.lax.bitcast_convert_type(offset, jnp.int32)
        holds = keeps_enough(order_to_float(at[:, 1:])) & (offset[:, 1:] < width[:, None])
        best = jnp.sum(holds, axis=1)[:, None]
        low = jnp.take_along_axis(at, best, axis=1)[:, 0]
        return low, jnp.minimum(step, width - jnp.take_along_axis(offset, best, axis=1)[:, 0])

    passes = next(n for n in range(1, 33) if (candidates + 1) ** n >= 2**32)
    return order_to_float(jax.lax.fori_loop(0, passes, narrow, (low, width))[0])
