"""Online softmax with Gumbel-max sampling or target scoring, over logits that arrive in pieces.

    accumulate_logits     the logits of one piece -> Accumulators
    merge_accumulators    Accumulators of some columns and of later ones -> Accumulators of both
    reduce_accumulators   Accumulators of many pieces, side by side on an axis -> one

Every implementation of the head's kernels is made of these three; pieces are chunks, tiles, lanes, splits or
shards of the vocabulary.  With z the logits, already divided by the temperature, a piece holds

    m = max z    l = sum e^(z - m)    moment = sum e^(z - m) (z - m)

so that logsumexp = m + log l and the entropy is log l - moment / l.  A NaN or +inf among the logits makes l
NaN, for good; if all logits are -inf, l stays 0.  So a row has a distribution exactly where l > 0.

Sampling takes the argmax of scores z + g that no piece has rescaled, so the token does not depend on the
pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e38  # the least m: differences of two stay finite, and e^(-inf - m) is 0
NO_TOKEN = 2**31 - 1  # the token before any logit


class Accumulators(NamedTuple):
    """Arrays of one shape, f32 but for the token."""

    m: jax.Array
    l: jax.Array
    moment: jax.Array
    logit: jax.Array  # z of the best token, or of the row's target; -inf: not among the columns so far
    score: jax.Array | None = None  # sampling: the best z + g; None where a target is scored
    token: jax.Array | None = None  # sampling: i32, the first token with that score


def init_accumulators(shape: tuple[int, ...], sampling: bool) -> Accumulators:
    """Make the accumulators of no columns: the neutral element of `merge_accumulators`."""
    zero, low = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)
    acc = Accumulators(m=jnp.full(shape, LOWEST, jnp.float32), l=zero, moment=zero, logit=low)
    if sampling:
        acc = acc._replace(score=low, token=jnp.full(shape, NO_TOKEN, jnp.int32))
    return acc


def accumulate_logits(
    z: jax.Array, axis: int, *, index: jax.Array, score: jax.Array | None, target: jax.Array | None
) -> Accumulators:
    """Reduce the logits of one piece over `axis`.

    z: f32; -inf: not in the vocabulary.  index: i32, the entries' vocabulary indices; it broadcasts with z.
    score: sampling: the scores whose argmax is the token.  target: scoring: each row's target, which
      broadcasts too.
    """
    m = jnp.maximum(jnp.max(z, axis=axis), LOWEST)
    centred = z - jnp.expand_dims(m, axis)
    e = jnp.exp(centred)
    l = jnp.sum(e, axis=axis)
    moment = jnp.sum(jnp.where(e > 0.0, e * centred, 0.0), axis=axis)  # 0 and not NaN at -inf
    if score is None:
        return Accumulators(m, l, moment, jnp.max(jnp.where(index == target, z, -jnp.inf), axis=axis))
    return Accumulators(m, l, moment, *_argmax(z, score, jnp.broadcast_to(index, z.shape), axis))


def merge_accumulators(a: Accumulators, b: Accumulators) -> Accumulators:
    """Merge two pieces of which b's columns come after a's: of equal scores the first wins."""
    m = jnp.maximum(a.m, b.m)
    (l_a, moment_a), (l_b, moment_b) = _rescale(a, m), _rescale(b, m)
    l, moment = l_a + l_b, moment_a + moment_b
    if a.score is None or b.score is None:
        return Accumulators(m, l, moment, jnp.maximum(a.logit, b.logit))

    assert a.token is not None and b.token is not None  # sampling has both fields
    wins = b.score > a.score
    return Accumulators(
        m,
        l,
        moment,
        logit=jnp.where(wins, b.logit, a.logit),
        score=jnp.where(wins, b.score, a.score),
        token=jnp.where(wins, b.token, a.token),
    )


def reduce_accumulators(acc: Accumulators, axis: int) -> Accumulators:
    """Merge pieces that lie along an axis, in any order."""
    m = jnp.max(acc.m, axis=axis)
    l, moment = (jnp.sum(x, axis=axis) for x in _rescale(acc, jnp.expand_dims(m, axis)))
    if acc.score is None or acc.token is None:
        return Accumulators(m, l, moment, jnp.max(acc.logit, axis=axis))
    return Accumulators(m, l, moment, *_argmax(acc.logit, acc.score, acc.token, axis))


def _rescale(acc: Accumulators, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return l and moment relative to a larger m."""
    shift = acc.m - m
    scale = jnp.exp(shift)
    return scale * acc.l, scale * (acc.moment + acc.l * shift)


def _argmax(
    logit: jax.Array, score: jax.Array, token: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (logit, score, token) of the largest score; of equal scores, the least token's."""
    best = jnp.max(score, axis=axis)
    first = jnp.min(jnp.where(score == jnp.expand_dims(best, axis), token, NO_TOKEN), axis=axis)
    is_first = token == jnp.expand_dims(first, axis)
    return jnp.max(jnp.where(is_first, logit, -jnp.inf), axis=axis), best, first
