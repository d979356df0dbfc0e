"""The statistics of a draw on a CUDA GPU: a row is cut into spans that as many programs hold in registers.

    grid       (N, S), S = ceil(M / 64)
    logits     64 blocks of 128: 32 kB, 64 registers a thread of 4 warps
    span_sums  reads the logits once: a span's own peak and, relative to it, its blocks' sums.  Spans are put in
               terms of the row's peak afterwards, on [N, M] (see sampling_spans.py)
    tally      reads the logits once: for 15 thresholds, how many tokens reach them, or what mass

A row of 152K tokens is 608 kB, more than a multiprocessor's registers, and 256 rows are three times the L2 cache.
So a search, which cannot pass over fast memory, takes 4 bits of its answer from each of 8 readings instead of one.

N rows   V vocabulary, whole blocks   M blocks   S spans   C thresholds
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cooper_jax.kernels.sampling_statistics import BLOCK, Rule, Spans

SPAN = 64  # blocks
CANDIDATES = 15  # thresholds that one reading of the logits tries
_PARAMETERS = plgpu.CompilerParams(num_warps=4, num_stages=1)


def span_sums(
    logits: jax.Array,  # f32[N, V]
    threshold: jax.Array | None,  # f32[N]; None: nothing is cut
    rule: Rule,
    interpret: bool,
) -> Spans:
    """Blocks' sums of kept masses, and sums over all tokens, relative to each span's peak."""
    rows, vocabulary = logits.shape
    spans = pl.cdiv(vocabulary, SPAN * BLOCK)
    each = jax.ShapeDtypeStruct((rows, spans), jnp.float32)
    blocks, peak, full, weighted = pl.pallas_call(
        functools.partial(_span_sums, rule=rule, cut=threshold is not None),
        grid=(rows, spans),
        out_shape=[jax.ShapeDtypeStruct((rows, spans * SPAN), jnp.float32), each, each, each],
        compiler_params=_PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=6 * rows * vocabulary,
            transcendentals=rows * vocabulary,
            bytes_accessed=4 * rows * (vocabulary + vocabulary // BLOCK),
        ),
        interpret=interpret,
        name="sampling_span_sums",
    )(_by_block(logits), jnp.zeros((rows,), jnp.float32) if threshold is None else threshold)
    return Spans(peak, blocks.reshape(rows, spans, SPAN), full, weighted, vocabulary // BLOCK)


def _span_sums(
    logits,  # inputs: f32[N, M, W]
    threshold,  # f32[N]
    blocks,  # outputs: f32[N, S * SPAN]
    peak,  # f32[N, S]
    full,  # f32[N, S]
    weighted,  # f32[N, S]
    *,
    rule: Rule,
    cut: bool,
):
    row, span = pl.program_id(0), pl.program_id(1)
    x = _span(logits, row, span)  # f32[SPAN, W]
    top = jnp.max(x)
    z = (x - jnp.where(top == -jnp.inf, 0.0, top)) * (1.0 / rule.temperature)
    mass = jnp.exp(z)
    kept = jnp.where(x >= threshold[row], mass, 0.0) if cut else mass
    blocks[row, pl.ds(span * SPAN, SPAN)] = jnp.sum(kept, axis=1)
    peak[row, span] = top
    full[row, span] = jnp.sum(mass)
    weighted[row, span] = jnp.sum(jnp.where(mass > 0.0, mass * z, 0.0)) if rule.entropy else 0.0


def tally_thresholds(
    logits: jax.Array,  # f32[N, V]
    peak: jax.Array,  # f32[N]
    thresholds: jax.Array,  # f32[N, CANDIDATES]
    temperature: float | None,  # None: count
    interpret: bool,
) -> jax.Array:
    """By span, the mass or the number of the tokens that reach each threshold: f32[N, S, CANDIDATES]."""
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
    )(_by_block(logits), peak, thresholds)


def _tally(
    logits,  # inputs: f32[N, M, W]
    peak,  # f32[N]
    thresholds,  # f32[N, C]
    sums,  # outputs: f32[N, S, C]
    *,
    temperature: float | None,
):
    row, span = pl.program_id(0), pl.program_id(1)
    x = _span(logits, row, span)  # f32[SPAN, W]
    mass = jnp.ones_like(x) if temperature is None else jnp.exp((x - peak[row]) * (1.0 / temperature))
    for i in range(CANDIDATES):
        sums[row, span, i] = jnp.sum(jnp.where(x >= thresholds[row, i], mass, 0.0))


def _span(logits, row, span) -> jax.Array:
    """[SPAN, W], -inf behind the end of the vocabulary."""
    block = span * SPAN + jnp.arange(SPAN)
    here = jnp.broadcast_to((block < logits.shape[1])[:, None], (SPAN, BLOCK))
    return plgpu.load(logits.at[row, pl.ds(span * SPAN, SPAN), :], mask=here, other=-jnp.inf)


def _by_block(logits: jax.Array) -> jax.Array:
    """[N, M, W]: no copy where rows are contiguous."""
    return logits.reshape(logits.shape[0], -1, BLOCK)
