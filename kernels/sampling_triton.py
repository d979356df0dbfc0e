"""Sampling statistics on a CUDA GPU: each program processes one span of a row in registers.

    grid              (N, E), E = ceil(M / 64)
    logits            64 blocks of 128 tokens: 32 kB, 64 registers in each thread of 4 warps
    span_sums         reads the logits once: a span's largest logit and the block sums relative to it.  Spans
                      are rescaled to the row's largest logit afterwards, on [N, M] (see sampling_spans.py)
    tally_thresholds  reads the logits once: counts the tokens at or above 15 thresholds, or sums their
                      probabilities

A row of 152K tokens has 608 kB, more than the registers of a multiprocessor, and 256 rows have three times
the size of the L2 cache.  So every pass of a search reads slow memory, and a pass with 15 thresholds gives
4 bits of the result instead of one: 8 passes instead of 32.

N rows   V vocabulary, whole blocks   M blocks of 128 tokens   E spans   X candidate thresholds
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cooper_jax.kernels.sampling_statistics import BLOCK, Rule, Spans
from cooper_jax.kernels.triton_backend import plgpu

SPAN = 64  # blocks of a span
CANDIDATES = 15  # X: thresholds that one pass over the logits tries
_PARAMETERS = plgpu.CompilerParams(num_warps=4, num_stages=1)


def span_sums(
    logits: jax.Array,  # f32[N, V]
    threshold: jax.Array | None,  # f32[N]; None: nothing is filtered
    rule: Rule,
    interpret: bool,
) -> Spans:
    """Sum the kept probabilities of each block and of each span, relative to the span's largest logit."""
    rows, vocabulary = logits.shape
    spans = pl.cdiv(vocabulary, SPAN * BLOCK)
    per_span = jax.ShapeDtypeStruct((rows, spans), jnp.float32)

    # The kernel always takes a threshold, but does not read it unless `filtered`.
    filtered = threshold is not None
    if threshold is None:
        threshold = jnp.zeros((rows,), jnp.float32)

    block_sums, max_logit, full_sum, plogp_sum = pl.pallas_call(
        functools.partial(_span_sums, rule=rule, filtered=filtered),
        grid=(rows, spans),
        out_shape=[
            jax.ShapeDtypeStruct((rows, spans * SPAN), jnp.float32),
            per_span,
            per_span,
            per_span,
        ],
        compiler_params=_PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=6 * rows * vocabulary,
            transcendentals=rows * vocabulary,
            bytes_accessed=4 * rows * (vocabulary + vocabulary // BLOCK),
        ),
        interpret=interpret,
        name="sampling_span_sums",
    )(_by_block(logits), threshold)
    return Spans(
        max_logit=max_logit,
        block_sums=block_sums.reshape(rows, spans, SPAN),
        full_sum=full_sum,
        plogp_sum=plogp_sum,
        num_blocks=vocabulary // BLOCK,
    )


def _span_sums(
    # inputs
    logits,  # f32[N, M, 128]
    threshold,  # f32[N]
    # outputs
    block_sums,  # f32[N, E * SPAN]
    max_logit,  # f32[N, E]
    full_sum,  # f32[N, E]
    plogp_sum,  # f32[N, E]
    *,
    rule: Rule,
    filtered: bool,
):
    row, span = pl.program_id(0), pl.program_id(1)
    x = _load_span(logits, row, span)  # f32[SPAN, 128]

    # A span may have only -inf: its probabilities are 0, not NaN.
    m = jnp.max(x)
    z = (x - jnp.where(m == -jnp.inf, 0.0, m)) * (1.0 / rule.temperature)
    p = jnp.exp(z)

    # Blocks are rows of x, so the sums of all blocks are one reduction.
    kept = jnp.where(x >= threshold[row], p, 0.0) if filtered else p
    block_sums[row, pl.ds(span * SPAN, SPAN)] = jnp.sum(kept, axis=1)
    max_logit[row, span] = m
    full_sum[row, span] = jnp.sum(p)
    plogp_sum[row, span] = jnp.sum(jnp.where(p > 0.0, p * z, 0.0)) if rule.entropy else 0.0


def tally_thresholds(
    logits: jax.Array,  # f32[N, V]
    max_logit: jax.Array,  # f32[N]
    thresholds: jax.Array,  # f32[N, X]
    temperature: float | None,  # None: count tokens
    interpret: bool,
) -> jax.Array:
    """Sum each span's probabilities, or count its tokens, at or above each threshold: f32[N, E, X]."""
    rows, vocabulary = logits.shape
    spans = pl.cdiv(vocabulary, SPAN * BLOCK)
    return pl.pallas_call(
        functools.partial(_tally, temperature=temperature),
        grid=(rows, spans),
        out_shape=jax.ShapeDtypeStruct((rows, spans, CANDIDATES), jnp.float32),
        compiler_params=_PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=3 * CANDIDATES * rows * vocabulary,
            transcendentals=rows * vocabulary,
            bytes_accessed=4 * rows * vocabulary,
        ),
        interpret=interpret,
        name="sampling_tally",
    )(_by_block(logits), max_logit, thresholds)


def _tally(
    # inputs
    logits,  # f32[N, M, 128]
    max_logit,  # f32[N]
    thresholds,  # f32[N, X]
    # outputs
    sums,  # f32[N, E, X]
    *,
    temperature: float | None,
):
    row, span = pl.program_id(0), pl.program_id(1)
    x = _load_span(logits, row, span)  # f32[SPAN, 128]
    if temperature is None:
        p = jnp.ones_like(x)
    else:
        p = jnp.exp((x - max_logit[row]) * (1.0 / temperature))

    # The logits and their exponentials stay in registers for all X thresholds.
    for i in range(CANDIDATES):
        sums[row, span, i] = jnp.sum(jnp.where(x >= thresholds[row, i], p, 0.0))


def _load_span(logits, row, span) -> jax.Array:
    """Load a span f32[SPAN, 128], with -inf behind the end of the vocabulary."""
    # The vocabulary is whole blocks, so one mask bit per block is enough.
    block = span * SPAN + jnp.arange(SPAN)
    mask = jnp.broadcast_to((block < logits.shape[1])[:, None], (SPAN, BLOCK))
    return plgpu.load(logits.at[row, pl.ds(span * SPAN, SPAN), :], mask=mask, other=-jnp.inf)


def _by_block(logits: jax.Array) -> jax.Array:
    """Reshape to [N, M, 128], which copies nothing where rows are contiguous."""
    return logits.reshape(logits.shape[0], -1, BLOCK)
