"""Draw tokens from logits without sorting the vocabulary: the plain-jnp form, for every platform.

What flows through: logits and two uniforms a row in; a token and its log-probability a row out.

1. Divide by the temperature (0 is greedy: the first of the largest logits).
2. Top-k: a threshold on the logits.  Top-p: a further threshold on what top-k left, renormalised.  Each is found
   by bisection over the bit patterns of f32, at most 32 passes over the row and exact: no tolerance anywhere.
3. Inverse CDF in two levels: first a block of 128 tokens by its sum, then a token within the block, each with a
   uniform of its own.  One uniform for both would not do: it moves on a grid of 2^-23, so rarer tokens would
   be out of reach, and a change of 1e-5 in the logits would move many more draws.

Ties.  Top-k keeps every token whose logit equals the k-th largest; top-p keeps every token whose logit equals
that of the last one it needs.  So what is kept never depends on the order of the vocabulary.

Not a number.  A row with a NaN or +inf among its logits, or with nothing but -inf, has no distribution: its
token is 0 and its log-probability is NaN, for the caller to see.

Batch independence.  A row's result is a function of that row alone.  Sums are taken over at most 128 terms
at a time: XLA cuts longer ones differently for different batch sizes, which changes their last bit.

N rows   V vocabulary (columns of -inf are never drawn)   M blocks   W = 128 tokens in a block
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128
LEVELS = 2  # uniforms that one draw consumes


def sample(
    logits: jax.Array,  # f32[N, V]
    uniforms: jax.Array,  # f32[N, LEVELS], in [0, 1)
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """Tokens i32[N] and their natural log-probabilities f32[N] under the distribution drawn from.

    temperature, top_k (0: off) and top_p (1: off) are Python numbers, static under jit.  Top-k is applied
    first, top-p to the renormalised rest.  Greedy log-probabilities are 0: the distribution has one token.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        valid = jnp.isfinite(jnp.max(logits, axis=-1))
        return jnp.where(valid, token, 0), jnp.where(valid, 0.0, jnp.nan)

    # The thresholds are found on the logits as they came and the temperature enters only here, after an exact
    # subtraction: a scaled copy would be computed anew in each fusion, with or without a fused multiply-add,
    # and its ties and thresholds would disagree in the last bit.
    peak = jnp.max(logits, axis=-1, keepdims=True)  # f32[N, 1]; NaN where any logit is
    mass = jnp.exp((logits - peak) * (1.0 / temperature))  # f32[N, V]; the largest is 1
    if 0 < top_k < logits.shape[-1]:
        kth = _largest(logits, lambda kept: _sum(kept.astype(jnp.float32)) >= top_k)
        mass = jnp.where(logits >= kth[:, None], mass, 0.0)
    if top_p < 1.0:
        needed = top_p * _sum(mass)
        last = _largest(logits, lambda kept: _sum(jnp.where(kept, mass, 0.0)) >= needed)
        mass = jnp.where(logits >= last[:, None], mass, 0.0)

    blocks = _blocks(mass)  # f32[N, M, W]
    block, total = _draw(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # f32[N, W]
    lane, _ = _draw(within, uniforms[:, 1])
    drawn = jnp.take_along_axis(within, lane[:, None], axis=1)[:, 0]  # f32[N], above 0
    valid = total > 0.0  # False for NaN: the peak carries it from any column to all of them
    token = jnp.where(valid, block * BLOCK + lane, 0)
    return token, jnp.where(valid, jnp.log(drawn) - jnp.log(total), jnp.nan)


def _draw(mass: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index whose running sum exceeds uniform * total, i32[N], and the total, f32[N].

    mass f32[N, M] is not negative, uniform f32[N].  Rounding of the running sums can neither select an index
    without mass nor run off the end.
    """
    running = jnp.cumsum(mass, axis=-1)
    total = running[:, -1]
    some = mass > 0.0
    hit = some & (running > (uniform * total)[:, None])
    last = mass.shape[-1] - 1 - jnp.argmax(some[:, ::-1], axis=-1)
    index = jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last)
    return index.astype(jnp.int32), total


def _largest(values: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest v, f32[N], for which enough(values >= v) holds; found exactly.

    values f32[N, V]; enough maps bool[N, V] to bool[N], holds when all is kept, fails when nothing is, and never
    turns from False to True as v grows.  v equals one of the row's values (a denormal equals 0 where the
    platform compares them so).
    """
    rows = values.shape[0]
    low = _to_order(jnp.full((rows,), -jnp.inf, jnp.float32))  # enough holds here
    high = _to_order(jnp.max(values, axis=-1)) + 1  # and fails here

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        holds = enough(values >= _from_order(middle)[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return _from_order(low)


_SIGN = 0x8000_0000


def _to_order(x: jax.Array) -> jax.Array:
    """f32 -> u32 in the same order: comparing the integers compares the numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= jnp.uint32(_SIGN), ~bits, bits | jnp.uint32(_SIGN))


def _from_order(order: jax.Array) -> jax.Array:
    """The inverse of `_to_order`."""
    bits = jnp.where(order >= jnp.uint32(_SIGN), order & ~jnp.uint32(_SIGN), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _sum(x: jax.Array) -> jax.Array:
    """[N, V] -> [N], in steps of at most BLOCK terms (see "Batch independence" above)."""
    while x.shape[-1] > 1:
        x = jnp.sum(_blocks(x), axis=-1)
    return x[:, 0]


def _blocks(x: jax.Array) -> jax.Array:
    """[N, V] -> [N, M, BLOCK], padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % BLOCK)))
    return x.reshape(x.shape[0], -1, BLOCK)
