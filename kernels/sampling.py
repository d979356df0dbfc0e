"""Sampling of tokens from logits without sorting the vocabulary.

Input: logits and three uniforms per row.  Output: a token and its log-probabilities per row.

1. Divide by the temperature (0 is greedy: the first of the largest logits).
2. Filter by top-k; then by top-p, on the renormalised distribution that top-k left; then by min-p, which
   keeps the tokens whose probability is at least min_p times the largest.  (`transformers` filters in this
   order.  vLLM applies min-p first, so its top-p renormalises over fewer tokens; without top-p both agree.)
3. Invert the CDF on three levels: choose a group of 128 blocks by its sum, a block of 128 tokens within the
   group, and a token within the block, each with its own uniform.  One uniform for all three levels would not
   be enough: it has steps of 2^-23, so rarer tokens could not be sampled, and a change of 1e-5 in the logits
   would change about fifty times as many tokens.  A vocabulary of one group leaves the first uniform unused.

`implementation` selects the backend of the passes over the vocabulary: sampling_statistics.py, which defines
the statistics, sampling_tpu.py or sampling_triton.py.  Step 3 is plain jnp on block sums and one block of
logits.

Ties.  Top-k keeps every token whose logit equals the k-th largest; top-p keeps every token whose logit equals
that of the last token it needs.  So the kept tokens never depend on the order of the vocabulary.

Logits that are not finite.  A row with a NaN or +inf among its logits, or with only -inf, has no
distribution: its token is 0 and its log-probabilities and entropy are NaN.  The caller checks for that.

Batch independence.  A row's result is a function of that row alone.  In the xla backend it is also the same
to the last bit whether the vocabulary is on one device or sharded over several (`axis_name`), with one
exception: if sharding pads a vocabulary of 128 blocks to more blocks, and so to a second group, the last bit
of log-probabilities and entropy may differ.

N rows   V vocabulary (columns of -inf are never drawn)   M blocks of 128 tokens
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cooper_jax.kernels import platform, sampling_spans, sampling_tpu
from cooper_jax.kernels.sampling_statistics import BLOCK, Rule, Statistics, row_statistics, sum_pairwise

LEVELS = 3  # uniforms per token: one for the group, one for the block, one for the token in the block
_NO_TOKEN = jnp.iinfo(jnp.int32).max  # above every vocabulary index, so that a minimum ignores it


class SampledTokens(NamedTuple):
    """One sampled token per row, with natural logarithms.

    The full softmax is softmax(logits / temperature) without any filter; greedy: softmax(logits).
    """

    token: jax.Array  # i32[N]
    logprob: jax.Array  # f32[N], under the filtered, renormalised softmax; greedy: 0
    full_logprob: jax.Array  # f32[N], under the full softmax
    entropy: jax.Array | None  # f32[N], in nats, of the full softmax; None unless requested
    # f32[N]: the filters keep the tokens whose logits are above it.  It is halfway between the last kept logit and
    # the first dropped one, so that rounding does not change the set; -inf: all are kept.  None: no filter
    threshold: jax.Array | None


def sample_logits(
    logits: jax.Array,  # f32[N, V]; with axis_name: this shard's contiguous columns [N, V / shards]
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
    """Sample one token per row.

    temperature, top_k (0: off), top_p (1: off), min_p (0: off): Python numbers, static under jit.
    axis_name: in shard_map, the mesh axis over which the vocabulary is sharded; all shards get the result.
    entropy: compute `SampledTokens.entropy` too.

    A vocabulary, or a shard of it, that is not a multiple of 128 tokens costs a copy of the logits: pad the
    head's rows.
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
    """Compute how close each row came to sampling another token: f32[N], to compare samples of two programs.

    Each level's uniform falls into an interval of the CDF.  Its distance to the nearer end, as a share of
    that level's total probability (of all groups, of the group, of the block), is the level's margin; the
    smallest of the three is returned.  Infinite where no other token could be sampled.  Greedy: the
    difference between the two largest probabilities.  Tokens that almost pass a filter are not considered.
    """
    return _sample(logits, uniforms, Rule(temperature, top_k, top_p, min_p), None, "xla")[1]


def _sample(
    logits: jax.Array, uniforms: jax.Array, rule: Rule, axis_name: str | None, implementation: str | None
) -> tuple[SampledTokens, jax.Array]:
    """Return the sampled tokens and their margins f32[N]; under jit, an unused result costs nothing."""
    logits = pad_to_blocks(logits.astype(jnp.float32), axis_name)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * logits.shape[1]
    if rule.temperature == 0.0:
        return _sample_greedy(logits, first, rule, axis_name, implementation)

    # Levels 1 and 2, on sums that every shard has: all shards choose the same block.
    stats = _compute_statistics(logits, rule, axis_name, implementation)
    block, block_margin = _draw_block(stats.block_sums, uniforms)

    # Level 3, on the 128 logits of that block.
    column = block * BLOCK - first  # i32[N]: the block's first column, if this shard has it
    x = _get_block(logits, column, implementation)  # f32[N, 128]
    z = (x - stats.max_logit[:, None]) * (1.0 / rule.temperature)
    kept = jnp.where(x >= stats.threshold[:, None], jnp.exp(z), 0.0)
    lane, lane_margin = _draw_index(kept, uniforms[:, 2])
    z = jnp.take_along_axis(z, lane[:, None], axis=1)[:, 0]
    if axis_name is not None:
        # The shard that has the block sends its result to the others: theirs count as zeros in the sum.
        has_block = (column >= 0) & (column < logits.shape[1])
        lane, z = (jax.lax.psum(jnp.where(has_block, value, 0), axis_name) for value in (lane, z))

    kept_sum = sum_pairwise(stats.block_sums)
    full_sum = kept_sum if stats.full_sum is None else stats.full_sum

    # Sums propagate a NaN, which is not above 0; XLA:CPU's maximum ignores it, so max_logit does not tell.
    valid = full_sum > 0.0
    threshold = None
    if rule.filters:
        threshold = jnp.where(valid, _separate_kept(logits, stats.threshold, axis_name), jnp.nan)
    sampled = SampledTokens(
        token=jnp.where(valid, block * BLOCK + lane, 0),
        logprob=jnp.where(valid, z - jnp.log(kept_sum), jnp.nan),
        full_logprob=jnp.where(valid, z - jnp.log(full_sum), jnp.nan),
        entropy=_entropy(full_sum, stats.plogp_sum),
        threshold=threshold,
    )
    return sampled, jnp.minimum(block_margin, lane_margin)


def _separate_kept(logits: jax.Array, threshold: jax.Array, axis_name: str | None) -> jax.Array:
    """Compute `SampledTokens.threshold` from the filters' threshold f32[N], at or above which tokens are kept."""
    kept = logits >= threshold[:, None]
    last_kept = jnp.min(jnp.where(kept, logits, jnp.inf), axis=-1)
    first_dropped = jnp.max(jnp.where(kept, -jnp.inf, logits), axis=-1)
    if axis_name is not None:
        last_kept = jax.lax.pmin(last_kept, axis_name)
        first_dropped = jax.lax.pmax(first_dropped, axis_name)
    halfway = first_dropped + 0.5 * (last_kept - first_dropped)
    return jnp.where(first_dropped == -jnp.inf, -jnp.inf, halfway)


def _sample_greedy(
    logits: jax.Array,
    first: jax.Array | int,  # the vocabulary index of the first column
    rule: Rule,
    axis_name: str | None,
    implementation: str | None,
) -> tuple[SampledTokens, jax.Array]:
    """Take the first of the largest logits.

    full_logprob, entropy and the margin need one more pass over the logits, which jit drops if they are not
    used.
    """
    max_logit = jnp.max(logits, axis=-1)  # XLA:CPU's maximum ignores NaN
    if axis_name is not None:
        max_logit = jax.lax.pmax(max_logit, axis_name)

    # The smallest index with the largest logit; -1 marks a NaN.  XLA:CPU's argmax takes ten times as long.
    column = first + jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    column = jnp.where(logits == max_logit[:, None], column, _NO_TOKEN)
    token = jnp.min(jnp.where(jnp.isnan(logits), -1, column), axis=-1)
    if axis_name is not None:
        token = jax.lax.pmin(token, axis_name)

    # The full softmax of a greedy draw has temperature 1.
    valid = (token >= 0) & (token < _NO_TOKEN) & (jnp.abs(max_logit) < jnp.inf)
    stats = _compute_statistics(logits, Rule(1.0, entropy=rule.entropy), axis_name, implementation)
    full_sum = sum_pairwise(stats.block_sums)
    sampled = SampledTokens(
        token=jnp.where(valid, token, 0),
        logprob=jnp.where(valid, 0.0, jnp.nan),
        full_logprob=jnp.where(valid, -jnp.log(full_sum), jnp.nan),
        entropy=_entropy(full_sum, stats.plogp_sum),
        threshold=None,
    )

    # p1 - p2 = (1 - e^(z2 - z1)) / sum e^(z - z1).
    top_two = jax.lax.top_k(logits, 2)[0]
    return sampled, -jnp.expm1(top_two[:, 1] - top_two[:, 0]) / full_sum


def _entropy(full_sum: jax.Array, plogp_sum: jax.Array | None) -> jax.Array | None:
    """Compute the entropy log(full_sum) - plogp_sum / full_sum, NaN where full_sum is NaN."""
    return None if plogp_sum is None else jnp.log(full_sum) - plogp_sum / full_sum


def _compute_statistics(
    logits: jax.Array, rule: Rule, axis_name: str | None, implementation: str | None
) -> Statistics:
    backend, interpret = platform.resolve_implementation(implementation)
    return _STATISTICS[backend](logits, rule, axis_name, interpret)


def _xla_statistics(logits: jax.Array, rule: Rule, axis_name: str | None, interpret: bool) -> Statistics:
    return row_statistics(logits, rule, axis_name)


def _tpu_statistics(logits: jax.Array, rule: Rule, axis_name: str | None, interpret: bool) -> Statistics:
    # A whole row fits into VMEM, but a search in a kernel cannot add up sums of other shards.
    if axis_name is None:
        return sampling_tpu.tpu_statistics(logits, rule, interpret)
    return sampling_spans.span_statistics(sampling_tpu, logits, rule, axis_name, interpret)


def _triton_statistics(logits: jax.Array, rule: Rule, axis_name: str | None, interpret: bool) -> Statistics:
    from cooper_jax.kernels import sampling_triton

    return sampling_spans.span_statistics(sampling_triton, logits, rule, axis_name, interpret)


_STATISTICS: dict[str, Callable[..., Statistics]] = {
    "xla": _xla_statistics,
    "tpu": _tpu_statistics,
    "triton": _triton_statistics,
}


def _get_block(logits: jax.Array, column: jax.Array, implementation: str | None) -> jax.Array:
    """Take each row's block at `column` i32[N] -> f32[N, 128]; an arbitrary block if another shard has it."""
    # Columns of other shards are out of range: clipped, and dropped by the caller.
    column = jnp.clip(column, 0, logits.shape[1] - BLOCK)
    backend, interpret = platform.resolve_implementation(implementation)
    if backend == "tpu":
        return sampling_tpu.take_block(logits, column // BLOCK, interpret)
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (BLOCK,)))(logits, column)


def _draw_block(block_sums: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw a group of 128 blocks, then a block in it, from sums f32[N, M]: block i32[N], margin f32[N]."""
    # A vocabulary of up to 2^14 tokens is one group.
    if block_sums.shape[1] <= BLOCK:
        return _draw_index(block_sums, uniforms[:, 1])

    block_sums = jnp.pad(block_sums, ((0, 0), (0, -block_sums.shape[1] % BLOCK)))
    block_sums = block_sums.reshape(block_sums.shape[0], -1, BLOCK)  # f32[N, groups, 128]
    group, group_margin = _draw_index(sum_pairwise(block_sums), uniforms[:, 0])

    # The group's block sums, selected by a masked sum: on a TPU a gather would be a loop over rows.  A sum of
    # one term and zeros is exact.
    is_drawn = jnp.arange(block_sums.shape[1])[None, :] == group[:, None]
    in_group = jnp.sum(jnp.where(is_drawn[:, :, None], block_sums, 0.0), axis=1)
    block, block_margin = _draw_index(in_group, uniforms[:, 1])
    return group * BLOCK + block, jnp.minimum(group_margin, block_margin)


def _draw_index(p: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw an index from p f32[N, M] by the inverse CDF, uniform f32[N]: index i32[N], margin f32[N].

    The index is the first whose running sum exceeds uniform * total.  Rounding of the running sums can
    neither select an index of probability 0 nor one past the end.
    """
    # If rounding leaves no running sum above the target, the last possible index is drawn.
    cdf = jnp.cumsum(p, axis=-1)
    total = cdf[:, -1]
    target = uniform * total
    possible = p > 0.0
    hit = possible & (cdf > target[:, None])
    last = p.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    index = jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last)

    # The margin: the distance to the interval's nearer end, except ends with no index of p > 0 beyond them.
    upper = jnp.take_along_axis(cdf, index[:, None], axis=1)[:, 0]
    lower = upper - jnp.take_along_axis(p, index[:, None], axis=1)[:, 0]
    above = jnp.where(upper < total, upper - target, jnp.inf)
    below = jnp.where(lower > 0.0, target - lower, jnp.inf)
    return index.astype(jnp.int32), jnp.maximum(jnp.minimum(above, below), 0.0) / total


def pad_to_blocks(logits: jax.Array, axis_name: str | None) -> jax.Array:
    """Append columns of -inf until every shard has the same number of whole blocks.

    The vocabulary is divided anew: a shard passes its first columns, which complete a block of the previous
    shard, to that shard, and receives the first columns of the next shard.
    """
    rows, columns = logits.shape
    if columns % BLOCK == 0:
        return logits

    # With `extra` more columns on every shard, the columns of shard i begin i * extra columns later than
    # before, and end (i + 1) * extra columns later.
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    blocks = -(-columns * shards // BLOCK)
    width = -(-blocks // shards) * BLOCK
    extra = width - columns
    padding = jnp.full((rows, shards * extra), -jnp.inf, jnp.float32)
    if axis_name is None or shards == 1:
        return jnp.concatenate([logits, padding], axis=1)

    # Columns come from the next shard alone.
    if shards * extra > columns:
        raise ValueError(
            f"a vocabulary of {columns * shards} columns is too small for {shards} shards: pad the head's "
            f"rows to a multiple of {shards * BLOCK}"
        )

    # Every shard appends shards * extra columns, the number that the last shard needs: shapes are static.
    shard = jax.lax.axis_index(axis_name)
    to_previous = [(i + 1, i) for i in range(shards - 1)]
    received = jax.lax.ppermute(logits[:, : shards * extra], axis_name, to_previous)
    extended = jnp.concatenate([logits, jnp.where(shard == shards - 1, padding, received)], axis=1)
    return jax.lax.dynamic_slice_in_dim(extended, shard * extra, width, axis=1)
