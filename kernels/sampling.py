"""Draw tokens from logits without sorting the vocabulary.

What flows through: logits and three uniforms a row in; a token and its log-probabilities a row out.

1. Divide by the temperature (0 is greedy: the first of the largest logits).
2. Keep: top-k, then top-p on what top-k left, renormalised, then min-p: the tokens whose probability is at least
   min_p times the largest one's.  (`transformers` cuts in this order.  vLLM applies min-p before the other two, so
   that its top-p sees a smaller, renormalised rest; without top-p the two agree.)
3. Inverse CDF in three levels: a group of 128 blocks by its sum, a block of 128 tokens within the group, a token
   within the block, each with a uniform of its own.  One uniform for all would not do: it moves on a grid of 2^-23,
   so rarer tokens would be out of reach, and a change of 1e-5 in the logits would move some fifty times as many
   draws.  A vocabulary of one group leaves the first uniform unused.

`implementation` chooses who makes the passes over the vocabulary: sampling_statistics.py, which defines what
they find out, sampling_tpu.py or sampling_triton.py.  The draw is plain jnp on block sums and one block of logits.

Ties.  Top-k keeps every token whose logit equals the k-th largest; top-p keeps every token whose logit equals
that of the last one it needs.  So what is kept never depends on the order of the vocabulary.

Not a number.  A row with a NaN or +inf among its logits, or with nothing but -inf, has no distribution: its
token is 0 and its log-probabilities and entropy are NaN, for the caller to see.

Batch independence.  A row's result is a function of that row alone; and, in the xla form, the same to the last bit
whether its columns lie on one device or on several (`axis_name`).  One exception: a vocabulary of 128 blocks that
shards pad to more, and so to a second group, may differ in the last bit of log-probabilities and entropy.

N rows   V vocabulary (columns of -inf are never drawn)   M blocks   W = 128 tokens in a block
G groups of 128 blocks
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cooper_jax.kernels import platform, sampling_spans, sampling_tpu, sampling_triton
from cooper_jax.kernels.sampling_statistics import BLOCK, Rule, Statistics, row_statistics, sum_pairwise

LEVELS = 3  # uniforms that one draw consumes: for the group, the block and the token
_NO_TOKEN = jnp.iinfo(jnp.int32).max


class SampledTokens(NamedTuple):
    """Natural logarithms.  The full softmax is that of logits / temperature, nothing cut; greedy: of the logits."""

    token: jax.Array  # i32[N]
    logprob: jax.Array  # f32[N], under the distribution drawn from; greedy: 0, for it has one token
    full_logprob: jax.Array  # f32[N], under the full softmax
    entropy: jax.Array | None  # f32[N], in nats, of the full softmax; None: not asked for


def sample_logits(
    logits: jax.Array,  # f32[N, V]; with axis_name: this shard's contiguous columns [N, V / ways]
    uniforms: jax.Array,  # f32[N, LEVELS], in [0, 1)
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    axis_name: str | None = None,
    entropy: bool = False,
    implementation: str | None = None,
) -> SampledTokens:
    """One token a row.

    temperature, top_k (0: off), top_p (1: off) and min_p (0: off) are Python numbers, static under jit.  Inside
    shard_map, `axis_name` names the mesh axis over which the vocabulary is sharded; all its shards get the result.
    A vocabulary, or a shard, that is not whole blocks of 128 costs copies of the logits: pad the head's rows.
    """
    rule = Rule(temperature, top_k, top_p, min_p, entropy)
    return _sample(logits, uniforms, rule, axis_name, implementation)[0]


def sampling_margin(
    logits: jax.Array,  # f32[N, V]
    uniforms: jax.Array,  # f32[N, LEVELS]
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
) -> jax.Array:
    """How near a row came to another token, f32[N]: for judging draws that differ between two programs.

    The smallest, over all levels, of the distances from the uniform to the borders of what it fell on; a share of
    the probability at that level (of all groups, of the group, of the block).  Infinite where there was nothing
    else to draw.  Greedy: the difference in probability between the two largest.  A token at the edge of what is
    kept is not seen.
    """
    return _sample(logits, uniforms, Rule(temperature, top_k, top_p, min_p), None, "xla")[1]


def _sample(logits, uniforms, rule, axis_name, implementation) -> tuple[SampledTokens, jax.Array]:
    """The draw and its margin; what is not used of them costs nothing under jit."""
    logits = _whole_blocks(logits.astype(jnp.float32), axis_name)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * logits.shape[1]
    if rule.temperature == 0.0:
        return _greedy(logits, first, rule, axis_name, implementation)
    s = _statistics(logits, rule, axis_name, implementation)
    block, gap = _draw_block(s.blocks, uniforms)
    column = block * BLOCK - first  # i32[N]: where the block begins, if it is here
    x = _block_of(logits, column, implementation)  # f32[N, W]
    z = (x - s.peak[:, None]) * (1.0 / rule.temperature)
    lane, inner_gap = _draw(jnp.where(x >= s.threshold[:, None], jnp.exp(z), 0.0), uniforms[:, 2])
    z = jnp.take_along_axis(z, lane[:, None], axis=1)[:, 0]
    if axis_name is not None:  # the shard that has the block tells the others
        has = (column >= 0) & (column < logits.shape[1])
        lane, z = (jax.lax.psum(jnp.where(has, value, 0), axis_name) for value in (lane, z))

    total = sum_pairwise(s.blocks)
    full = total if s.full is None else s.full
    valid = full > 0.0  # False for NaN, which any mass carries here (XLA:CPU's maximum passes over it)
    drawn = SampledTokens(
        token=jnp.where(valid, block * BLOCK + lane, 0),
        logprob=jnp.where(valid, z - jnp.log(total), jnp.nan),
        full_logprob=jnp.where(valid, z - jnp.log(full), jnp.nan),
        entropy=_entropy(full, s.weighted),
    )
    return drawn, jnp.minimum(gap, inner_gap)


def _greedy(logits, first, rule, axis_name, implementation) -> tuple[SampledTokens, jax.Array]:
    """The probabilities beside the token need one more pass, which nobody makes who does not use them."""
    peak = jnp.max(logits, axis=-1)  # XLA:CPU's maximum passes over NaN
    if axis_name is not None:
        peak = jax.lax.pmax(peak, axis_name)
    # XLA:CPU's argmax takes ten times as long as this.
    column = first + jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    column = jnp.where(logits == peak[:, None], column, _NO_TOKEN)
    token = jnp.min(jnp.where(jnp.isnan(logits), -1, column), axis=-1)
    if axis_name is not None:
        token = jax.lax.pmin(token, axis_name)
    valid = (token >= 0) & (token < _NO_TOKEN) & (jnp.abs(peak) < jnp.inf)
    s = _statistics(logits, Rule(1.0, entropy=rule.entropy), axis_name, implementation)
    full = sum_pairwise(s.blocks)
    drawn = SampledTokens(
        token=jnp.where(valid, token, 0),
        logprob=jnp.where(valid, 0.0, jnp.nan),
        full_logprob=jnp.where(valid, -jnp.log(full), jnp.nan),
        entropy=_entropy(full, s.weighted),
    )
    two = jax.lax.top_k(logits, 2)[0]
    return drawn, -jnp.expm1(two[:, 1] - two[:, 0]) / full


def _entropy(full: jax.Array, weighted: jax.Array | None) -> jax.Array | None:
    """log(full) - weighted / full, NaN where full is."""
    return None if weighted is None else jnp.log(full) - weighted / full


def _statistics(logits, rule, axis_name, implementation) -> Statistics:
    form, interpret = platform.resolve_implementation(implementation)
    return _STATISTICS[form](logits, rule, axis_name, interpret)


def _statistics_tpu(logits, rule, axis_name, interpret) -> Statistics:
    if axis_name is None:
        return sampling_tpu.tpu_statistics(logits, rule, interpret)
    return sampling_spans.span_statistics(sampling_tpu, logits, rule, axis_name, interpret)


_STATISTICS = {
    "xla": lambda logits, rule, axis_name, interpret: row_statistics(logits, rule, axis_name),
    "tpu": _statistics_tpu,
    "triton": functools.partial(sampling_spans.span_statistics, sampling_triton),
}


def _block_of(logits: jax.Array, column: jax.Array, implementation: str | None) -> jax.Array:
    """f32[N, BLOCK]: each row's block that begins at `column` i32[N]; any block where it is not here."""
    column = jnp.clip(column, 0, logits.shape[1] - BLOCK)
    form, interpret = platform.resolve_implementation(implementation)
    return _TAKE_BLOCK[form](logits, column, interpret)


def _slice_block(logits: jax.Array, column: jax.Array, interpret: bool) -> jax.Array:
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (BLOCK,)))(logits, column)


_TAKE_BLOCK = {
    "xla": _slice_block,
    "tpu": lambda logits, column, interpret: sampling_tpu.take_block(logits, column // BLOCK, interpret),
    "triton": _slice_block,
}


def _draw_block(blocks: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A group, then a block within it: the block i32[N] and the margin f32[N], of masses f32[N, M]."""
    if blocks.shape[1] <= BLOCK:
        return _draw(blocks, uniforms[:, 1])
    blocks = jnp.pad(blocks, ((0, 0), (0, -blocks.shape[1] % BLOCK)))
    blocks = blocks.reshape(blocks.shape[0], -1, BLOCK)  # f32[N, G, 128]
    group, gap = _draw(sum_pairwise(blocks), uniforms[:, 0])
    # A gather would be a loop over rows on a TPU; a sum of one term and zeros is exact.
    here = jnp.arange(blocks.shape[1])[None, :] == group[:, None]
    block, inner_gap = _draw(jnp.sum(jnp.where(here[:, :, None], blocks, 0.0), axis=1), uniforms[:, 1])
    return group * BLOCK + block, jnp.minimum(gap, inner_gap)


def _draw(mass: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index whose running sum exceeds uniform * total, i32[N]; and the margin, f32[N].

    mass f32[N, M] is not negative, uniform f32[N].  Rounding of the running sums can neither select an index
    without mass nor run off the end.
    """
    running = jnp.cumsum(mass, axis=-1)
    total = running[:, -1]
    target = uniform * total
    some = mass > 0.0
    hit = some & (running > target[:, None])
    last = mass.shape[-1] - 1 - jnp.argmax(some[:, ::-1], axis=-1)
    index = jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last)
    upper = jnp.take_along_axis(running, index[:, None], axis=1)[:, 0]
    lower = upper - jnp.take_along_axis(mass, index[:, None], axis=1)[:, 0]
    above = jnp.where(upper < total, upper - target, jnp.inf)
    below = jnp.where(lower > 0.0, target - lower, jnp.inf)
    return index.astype(jnp.int32), jnp.maximum(jnp.minimum(above, below), 0.0) / total


def _whole_blocks(logits: jax.Array, axis_name: str | None) -> jax.Array:
    """Columns of -inf until the vocabulary is whole blocks, and as many of them on each shard.

    Shards whose columns are not whole blocks drop the beginning of their columns, which belongs to a block of the
    shard before them, and get the beginning of the next one's.
    """
    rows, columns = logits.shape
    if columns % BLOCK == 0:
        return logits
    ways = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    blocks = -(-columns * ways // BLOCK)
    width = -(-blocks // ways) * BLOCK  # of a shard that has whole blocks
    more = width - columns  # shard i begins i * more columns further on and ends (i + 1) * more further on
    behind = jnp.full((rows, ways * more), -jnp.inf, jnp.float32)
    if ways == 1:
        return jnp.concatenate([logits, behind], axis=1)
    if ways * more > columns:
        raise ValueError(f"a vocabulary of {columns * ways} columns is too small for {ways} shards: pad it")
    shard = jax.lax.axis_index(axis_name)
    sent = jax.lax.ppermute(logits[:, : ways * more], axis_name, [(i + 1, i) for i in range(ways - 1)])
    longer = jnp.concatenate([logits, jnp.where(shard == ways - 1, behind, sent)], axis=1)
    return jax.lax.dynamic_slice_in_dim(longer, shard * more, width, axis=1)
