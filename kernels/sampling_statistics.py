"""What a draw needs to know about whole rows of logits: the definitions, and the plain-jnp form for every platform.

1. The peak, and masses exp((logit - peak) / temperature): between 0 and 1, the largest is 1.
2. A threshold on the logits, the highest of up to three: top-k's, top-p's on what top-k left, renormalised, and
   min-p's.  The first two are found by bisection over the bit patterns of f32: at most 32 passes over the row.
3. The masses at or above the threshold, summed over blocks of 128 tokens.

Sums must not depend on how a batch or a vocabulary is cut.  Within a block they have 128 terms: XLA cuts longer
ones differently for different batch sizes, which changes their last bit.  Over blocks, either every shard has all
blocks' sums and adds them up in steps of 128, or they are whole numbers: counts (top-k) and shares of the total in
steps of 2^-30 (top-p), whose sum is exact in any order.

N rows   V vocabulary, or a shard's contiguous columns of it: whole blocks   M blocks   W = 128 tokens in a block
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128
_ONE = 2**30  # the total, as integer shares count it


class Rule(NamedTuple):
    """What is asked for; static under jit."""

    temperature: float  # above 0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    entropy: bool = False

    @property
    def cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def depth(self) -> float:
        """How far below the peak min-p's threshold lies."""
        return -self.temperature * math.log(self.min_p)


class Statistics(NamedTuple):
    """Masses are relative to the peak's: exp((logit - peak) / temperature)."""

    peak: jax.Array  # f32[N]: the largest logit
    threshold: jax.Array  # f32[N]: a token is kept where its logit is not below this
    blocks: jax.Array  # f32[N, M]: the kept masses, over all shards
    full: jax.Array | None  # f32[N]: all masses, NaN where a logit is NaN or +inf; None: nothing is cut
    weighted: jax.Array | None  # f32[N]: the sum of mass * log(mass) over all tokens; None: not asked for


class Spans(NamedTuple):
    """What a kernel finds out about spans of columns; masses are relative to the span's peak."""

    peak: jax.Array  # f32[N, S]
    blocks: jax.Array  # f32[N, S, M']: the kept masses; behind the last block of all, zeros
    full: jax.Array  # f32[N, S]: all masses
    weighted: jax.Array  # f32[N, S]: the sum of mass * log(mass) over all tokens; only with Rule.entropy
    count: int  # M


def row_statistics(logits: jax.Array, rule: Rule, axis_name: str | None = None) -> Statistics:
    """Of logits f32[N, V]; with `axis_name`, of the rows whose shards of columns lie along that axis."""
    peak = jnp.max(logits, axis=-1)
    if axis_name is not None:
        peak = jax.lax.pmax(peak, axis_name)
    # Thresholds are found on the logits as they came and the temperature enters only here, after a subtraction: a
    # scaled copy would be computed anew in each fusion, with or without a fused multiply-add, and its ties and
    # thresholds would disagree in the last bit.
    z = (logits - peak[:, None]) * (1.0 / rule.temperature)
    mass = jnp.exp(z)  # f32[N, V]
    weighted = None
    if rule.entropy:
        weighted = sum_pairwise(gather_shards(_block_sums(jnp.where(mass > 0.0, mass * z, 0.0)), axis_name))
    if not rule.cuts:
        blocks = gather_shards(_block_sums(mass), axis_name)
        return Statistics(peak, jnp.full_like(peak, -jnp.inf), blocks, None, weighted)

    def over_shards(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    full = sum_pairwise(gather_shards(_block_sums(mass), axis_name))
    threshold = jnp.full_like(peak, -jnp.inf)
    if rule.top_k:

        def enough(v):  # a sum of ones is exact below 2^24
            count = jnp.sum(_block_sums((logits >= v[:, None]).astype(jnp.float32)), axis=-1)
            return over_shards(count) >= rule.top_k

        threshold = largest_threshold(peak, enough)
        mass = jnp.where(logits >= threshold[:, None], mass, 0.0)
    if rule.top_p < 1.0:
        total = sum_pairwise(gather_shards(_block_sums(mass), axis_name))
        grid = _ONE / total  # f32[N]

        def enough(v):
            kept = _block_sums(jnp.where(logits >= v[:, None], mass, 0.0))
            shares = jnp.round(kept * grid[:, None]).astype(jnp.int32)
            return over_shards(jnp.sum(shares, axis=-1)) >= math.ceil(rule.top_p * _ONE)

        threshold = jnp.maximum(threshold, largest_threshold(peak, enough))
    if rule.min_p > 0.0:
        threshold = jnp.maximum(threshold, peak - rule.depth)
    kept = _block_sums(jnp.where(logits >= threshold[:, None], mass, 0.0))
    return Statistics(peak, threshold, gather_shards(kept, axis_name), full, weighted)


def largest_threshold(peak: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest v at which enough(v) holds, found exactly: f32, of the shape of `peak`, the row's largest value.

    enough says whether the values at or above v suffice: it holds at -inf, fails above the peak and never turns
    from False to True as v grows.  So v is one of the row's values (a denormal equals 0 where the platform compares
    them so).
    """
    low = float_to_order(jnp.full_like(peak, -jnp.inf))
    high = float_to_order(peak) + 1

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        holds = enough(order_to_float(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    return order_to_float(jax.lax.fori_loop(0, 32, halve, (low, high))[0])


def float_to_order(x: jax.Array) -> jax.Array:
    """f32 -> i32 in the same order: comparing the integers compares the numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFF_FFFF, bits)


def order_to_float(order: jax.Array) -> jax.Array:
    """The inverse of `order`."""
    return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFF_FFFF, order), jnp.float32)


def gather_shards(blocks: jax.Array, axis_name: str | None) -> jax.Array:
    """A shard's [N, M / ways] -> [N, M], on each of them."""
    return blocks if axis_name is None else jax.lax.all_gather(blocks, axis_name, axis=1, tiled=True)


def sum_pairwise(x: jax.Array) -> jax.Array:
    """[.., M] -> [..]: halves are added until one is left.

    A reduction of few rows XLA:CPU orders by their number; additions of arrays have one order.  The barriers keep
    the levels apart: fused, each would compute all those below it again.
    """
    length = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
    while length > 1:
        length //= 2
        x = jax.lax.optimization_barrier(x[..., :length] + x[..., length:])
    return x[..., 0]


def _block_sums(x: jax.Array) -> jax.Array:
    """[N, V] -> [N, M]."""
    return jnp.sum(x.reshape(x.shape[0], -1, BLOCK), axis=-1)
