"""Statistics of rows of logits for sampling: their definitions, and plain jnp for any platform.

1. The largest logit, and probabilities relative to that of its token: exp((logit - max) / temperature),
   between 0 and 1.
2. A threshold on the logits: the highest of the thresholds of top-k, of top-p (on the renormalised
   distribution that top-k left) and of min-p.  Those of top-k and top-p are found by bisection over the bit
   patterns of f32, in at most 32 passes over the row.
3. The relative probabilities at or above the threshold, summed over blocks of 128 tokens.

Sums must not depend on how a batch or a vocabulary is sharded.  A sum within a block has 128 terms: XLA
splits longer sums differently for different batch sizes, which changes their last bit.  For sums over blocks
there are two ways.  Either every shard gets the sums of all blocks and adds them in one order
(`sum_pairwise`), or the terms are integers, whose sum is exact in any order: counts (top-k) and shares of the
total in steps of 2^-30 (top-p).

N rows   V vocabulary, or a shard's contiguous columns of it: whole blocks   M blocks of 128 tokens   E spans
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128
ONE = 2**30  # the integer for a probability of 1 in the sums of top-p


class Rule(NamedTuple):
    """Temperature and filters of sampling; static under jit."""

    temperature: float  # above 0
    # Filters.
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    # Output.
    entropy: bool = False  # compute the sums for the entropy too

    @property
    def filters(self) -> bool:
        """True if some tokens may be filtered out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def min_p_depth(self) -> float:
        """Distance of min-p's threshold below the largest logit."""
        return -self.temperature * math.log(self.min_p)


class Statistics(NamedTuple):
    """Statistics of each row.  Probabilities are relative: p = exp((logit - max_logit) / temperature)."""

    max_logit: jax.Array  # f32[N]
    threshold: jax.Array  # f32[N]: tokens with a logit of at least this are kept

    # f32[N, M]: sums of p over the kept tokens of each block; all blocks, those of other shards included.
    block_sums: jax.Array
    # f32[N]: sum of p over all tokens, NaN where a logit is NaN or +inf.  None: nothing is filtered, so that
    # it is the sum of block_sums.
    full_sum: jax.Array | None
    # f32[N]: sum of p log p over all tokens, for the entropy.  None unless Rule.entropy.
    plogp_sum: jax.Array | None


class Spans(NamedTuple):
    """Statistics of spans of columns, with p relative to the span's own largest logit."""

    max_logit: jax.Array  # f32[N, E]
    # f32[N, E, blocks of a span]: sums of p over the kept tokens; 0 behind the last block.
    block_sums: jax.Array
    # f32[N, E]: sums of p and of p log p over all tokens of a span; the latter only with Rule.entropy.
    full_sum: jax.Array
    plogp_sum: jax.Array
    num_blocks: int  # M


def row_statistics(logits: jax.Array, rule: Rule, axis_name: str | None = None) -> Statistics:
    """Compute the statistics of logits f32[N, V].

    axis_name: the mesh axis over which the rows' columns are sharded.
    """
    max_logit = jnp.max(logits, axis=-1)
    if axis_name is not None:
        max_logit = jax.lax.pmax(max_logit, axis_name)

    # The temperature divides differences only; thresholds are found on the logits as given.  XLA would
    # recompute a scaled copy of the logits in each fusion, with or without a fused multiply-add, and the last
    # bit of ties and thresholds would differ between fusions.
    z = (logits - max_logit[:, None]) * (1.0 / rule.temperature)
    p = jnp.exp(z)  # f32[N, V]

    plogp_sum = None
    if rule.entropy:
        plogp_sum = sum_pairwise(gather_shards(sum_blocks(jnp.where(p > 0.0, p * z, 0.0)), axis_name))
    if not rule.filters:
        block_sums = gather_shards(sum_blocks(p), axis_name)
        return Statistics(max_logit, jnp.full_like(max_logit, -jnp.inf), block_sums, None, plogp_sum)

    def sum_over_shards(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    full_sum = sum_pairwise(gather_shards(sum_blocks(p), axis_name))

    # Top-k: the largest v with at least k logits at or above it.
    threshold = jnp.full_like(max_logit, -jnp.inf)
    if rule.top_k:

        def keeps_k(v):
            # A sum of ones is exact in f32 below 2^24.
            count = jnp.sum(sum_blocks((logits >= v[:, None]).astype(jnp.float32)), axis=-1)
            return sum_over_shards(count) >= rule.top_k

        threshold = largest_threshold(max_logit, keeps_k)
        p = jnp.where(logits >= threshold[:, None], p, 0.0)

    # Top-p: the largest v whose tokens have a share of at least top_p in the total that top-k left.
    if rule.top_p < 1.0:
        total = sum_pairwise(gather_shards(sum_blocks(p), axis_name))
        scale = ONE / total  # f32[N]

        def keeps_p(v):
            kept = sum_blocks(jnp.where(logits >= v[:, None], p, 0.0))
            shares = jnp.round(kept * scale[:, None]).astype(jnp.int32)
            return sum_over_shards(jnp.sum(shares, axis=-1)) >= math.ceil(rule.top_p * ONE)

        threshold = jnp.maximum(threshold, largest_threshold(max_logit, keeps_p))

    # Min-p, whose threshold needs no search: p >= min_p is logit >= max_logit + temperature * log(min_p).
    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, max_logit - rule.min_p_depth)

    kept = sum_blocks(jnp.where(logits >= threshold[:, None], p, 0.0))
    return Statistics(max_logit, threshold, gather_shards(kept, axis_name), full_sum, plogp_sum)


def largest_threshold(max_logit: jax.Array, keeps_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Find the largest f32 v at which keeps_enough(v) is True, exactly: f32, of the shape of `max_logit`.

    keeps_enough(v) is True if the row's values at or above v suffice.  It must be True at -inf and False
    above the row's largest value, and never turn from False to True as v grows.  So the result is one of the
    row's values (where a platform compares denormals as 0, it is equal to one in that sense).
    """
    # Bisection over the integers in the order of f32 numbers: True at low, False at high.
    low = float_to_order(jnp.full_like(max_logit, -jnp.inf))
    high = float_to_order(max_logit) + 1

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        holds = keeps_enough(order_to_float(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    return order_to_float(jax.lax.fori_loop(0, 32, halve, (low, high))[0])


def float_to_order(x: jax.Array) -> jax.Array:
    """Map f32 to i32 in the same order: comparing the integers compares the numbers."""
    # Bit patterns of negative numbers grow with their magnitude: all bits but the sign are inverted.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFF_FFFF, bits)


def order_to_float(order: jax.Array) -> jax.Array:
    """Invert `float_to_order`."""
    return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFF_FFFF, order), jnp.float32)


def gather_shards(block_sums: jax.Array, axis_name: str | None) -> jax.Array:
    """All-gather the shards' block sums: [N, M / shards] on each shard -> [N, M] on every shard."""
    if axis_name is None:
        return block_sums
    return jax.lax.all_gather(block_sums, axis_name, axis=1, tiled=True)


def sum_pairwise(x: jax.Array) -> jax.Array:
    """Sum [.., M] -> [..] by adding one half of the array to the other until one number is left.

    The order of additions in XLA:CPU's own reduction depends on the number of rows; here it does not.
    """
    # Zeros up to a power of two.  The barriers prevent fusion, in which each level would compute all the
    # levels before it again.
    length = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
    while length > 1:
        length //= 2
        x = jax.lax.optimization_barrier(x[..., :length] + x[..., length:])
    return x[..., 0]


def sum_blocks(x: jax.Array) -> jax.Array:
    """Sum the tokens of each block: [N, V] -> [N, M]."""
    return jnp.sum(x.reshape(x.shape[0], -1, BLOCK), axis=-1)
