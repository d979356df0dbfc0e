"""Sampling statistics from kernels that read a row in spans: for rows too long for fast memory, or sharded.

A span is the part of a row that one program of a kernel processes: at most the columns of a shard.

1. `span_sums` computes each span's largest logit, and its sums relative to that logit.  They are rescaled to
   the largest logit of the whole row in this file, on [N, M], so the logits are read once.
2. Top-k and top-p: `tally_thresholds` tries X thresholds per pass over the logits, which leaves 1 / (X + 1)
   of the interval: 11 passes for X = 7, 8 passes for X = 15, each with one small psum.
3. `span_sums` runs again, at the threshold found.

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
    """Interface of a backend's module: sampling_tpu or sampling_triton."""

    CANDIDATES: int  # X

    def span_sums(self, logits: jax.Array, threshold: jax.Array | None, rule: Rule, interpret: Any) -> Spans:
        """Sum each span's probabilities at or above `threshold` f32[N]; None: of all tokens."""

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
    """Compute the statistics of sampling_statistics.row_statistics with a backend's kernels."""
    unfiltered = _join_spans(kernels.span_sums(logits, None, rule, interpret), rule, axis_name)
    if not rule.filters:
        return unfiltered._replace(full_sum=None)
    max_logit = unfiltered.max_logit

    def tally(thresholds, temperature):
        """Tally the whole row at each threshold f32[N, X], over all shards -> f32[N, X]."""
        sums = kernels.tally_thresholds(logits, max_logit, thresholds, temperature, interpret)
        return _sum_spans(sums, axis_name)

    threshold = jnp.full_like(max_logit, -jnp.inf)
    if rule.top_k:
        threshold = _find_threshold(max_logit, lambda v: tally(v, None) >= rule.top_k, kernels.CANDIDATES)

    # Top-p counts the tokens that top-k left: no candidate is below top-k's threshold.
    if rule.top_p < 1.0:
        top_k_threshold = jnp.broadcast_to(threshold[:, None], (threshold.shape[0], kernels.CANDIDATES))
        needed = rule.top_p * tally(top_k_threshold, rule.temperature)

        def keeps_p(v):
            return tally(jnp.maximum(v, top_k_threshold), rule.temperature) >= needed

        threshold = _find_threshold(max_logit, keeps_p, kernels.CANDIDATES)

    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, max_logit - rule.min_p_depth)

    # Only the block sums are filtered.  The entropy is that of the full softmax, which `unfiltered` has.
    rule = rule._replace(entropy=False)
    kept = _join_spans(kernels.span_sums(logits, threshold, rule, interpret), rule, axis_name)
    return unfiltered._replace(threshold=threshold, block_sums=kept.block_sums)


def _join_spans(spans: Spans, rule: Rule, axis_name: str | None) -> Statistics:
    """Rescale spans to the largest logit of the whole row, over all shards."""
    max_logit = jnp.max(spans.max_logit, axis=1)
    if axis_name is not None:
        max_logit = jax.lax.pmax(max_logit, axis_name)

    # A span's log p is relative to its own maximum, `shift` below the row's; shift is -inf in an empty span.
    shift = (spans.max_logit - max_logit[:, None]) * (1.0 / rule.temperature)  # f32[N, E]
    scale = jnp.exp(shift)
    plogp = jnp.where(scale > 0.0, scale * (spans.plogp_sum + shift * spans.full_sum), 0.0)

    # The last span may extend past the end of the row.
    block_sums = spans.block_sums * scale[:, :, None]
    block_sums = block_sums.reshape(block_sums.shape[0], -1)[:, : spans.num_blocks]
    return Statistics(
        max_logit=max_logit,
        threshold=jnp.full_like(max_logit, -jnp.inf),
        block_sums=gather_shards(block_sums, axis_name),
        full_sum=_sum_spans(spans.full_sum * scale, axis_name),
        plogp_sum=_sum_spans(plogp, axis_name) if rule.entropy else None,
    )


def _sum_spans(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Sum [N, E, ...] -> [N, ...] in an order that does not depend on N, and over all shards."""
    total = functools.reduce(jnp.add, [x[:, i] for i in range(x.shape[1])])
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _find_threshold(
    max_logit: jax.Array, keeps_enough: Callable[[jax.Array], jax.Array], candidates: int
) -> jax.Array:
    """Find the threshold of sampling_statistics.largest_threshold, trying X values per pass -> f32[N].

    keeps_enough: f32[N, X] -> bool[N, X].
    """
    # keeps_enough is True at low and False at low + width, in the integer order of f32 numbers.
    low = float_to_order(jnp.full_like(max_logit, -jnp.inf))
    width = jax.lax.bitcast_convert_type(float_to_order(max_logit) + 1 - low, jnp.uint32)
    nth = jnp.arange(candidates + 1, dtype=jnp.uint32)[None, :]

    def narrow(_, bounds):
        """Divide the interval into X + 1 parts and keep the one in which keeps_enough turns False."""
        low, width = bounds
        step = width // (candidates + 1) + (width % (candidates + 1) > 0)
        offset = jnp.minimum(nth * step[:, None], width[:, None])  # u32[N, 1 + X]: distances from low
        at = low[:, None] + jax.lax.bitcast_convert_type(offset, jnp.int32)

        # keeps_enough never turns from False to True, so the number of True is the index of the last one.
        holds = keeps_enough(order_to_float(at[:, 1:])) & (offset[:, 1:] < width[:, None])
        last_true = jnp.sum(holds, axis=1)[:, None]
        low = jnp.take_along_axis(at, last_true, axis=1)[:, 0]
        return low, jnp.minimum(step, width - jnp.take_along_axis(offset, last_true, axis=1)[:, 0])

    # As many passes as reduce the largest width, 2^32, to 1.
    passes = next(n for n in range(1, 33) if (candidates + 1) ** n >= 2**32)
    return order_to_float(jax.lax.fori_loop(0, passes, narrow, (low, width))[0])
