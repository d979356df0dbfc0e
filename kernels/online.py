"""Online softmax with Gumbel-max sampling or target scoring, over logits that arrive in pieces.

    accumulate_logits     the logits of one piece -> Accumulators
    merge_accumulators    Accumulators of some columns and of later columns -> Accumulators of both
    reduce_accumulators   Accumulators of many pieces, stacked on an axis -> Accumulators of all

Every implementation of the head's kernels is built from these three functions.  A piece is a chunk, tile,
lane, split or shard of the vocabulary.  With z the logits, already divided by the temperature, its
accumulators are

    m = max z    l = sum e^(z - m)    moment = sum e^(z - m) (z - m)

so that logsumexp = m + log l and the entropy is log l - moment / l.  A NaN or +inf among the logits makes l
NaN, and it stays NaN in every merge; if all logits are -inf, l stays 0.  So a row has a distribution exactly
where l > 0.

Sampling takes the argmax of the scores z + g, which are never rescaled, so the token does not depend on how
the vocabulary is divided into pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e38  # the least m: differences of two stay finite, and e^(-inf - m) is 0
NO_TOKEN = 2**31 - 1  # the token of an empty piece: above every vocabulary index


class Accumulators(NamedTuple):
    """Running state of each row: arrays of one shape, f32 except the token."""

    # The softmax and its entropy: see the equations above.
    m: jax.Array
    l: jax.Array
    moment: jax.Array
    # z of the best token (sampling) or of the row's target (scoring); -inf: not among the columns so far.
    logit: jax.Array
    # Sampling only: the largest z + g, and i32 the first token that has it.
    score: jax.Array | None = None
    token: jax.Array | None = None


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

    z: f32, -inf for columns that are not in the vocabulary.
    index: i32, the columns' vocabulary indices; broadcasts with z.
    score: f32, for sampling: z + g, whose argmax is the token.  None: score the target instead.
    target: i32, for scoring: each row's target; broadcasts with z.
    """
    m = jnp.maximum(jnp.max(z, axis=axis), LOWEST)
    shifted = z - jnp.expand_dims(m, axis)
    e = jnp.exp(shifted)
    l = jnp.sum(e, axis=axis)

    # e * shifted would be 0 * -inf = NaN in the columns outside the vocabulary.
    moment = jnp.sum(jnp.where(e > 0.0, e * shifted, 0.0), axis=axis)
    if score is None:
        # At most one column is the target: the maximum selects it.
        return Accumulators(m, l, moment, jnp.max(jnp.where(index == target, z, -jnp.inf), axis=axis))
    return Accumulators(m, l, moment, *_argmax(z, score, jnp.broadcast_to(index, z.shape), axis))


def merge_accumulators(a: Accumulators, b: Accumulators) -> Accumulators:
    """Merge two pieces, where b's columns come after a's: a tie between their scores goes to a."""
    # Both sums relative to the common maximum, as in flash attention.
    m = jnp.maximum(a.m, b.m)
    (l_a, moment_a), (l_b, moment_b) = _rescale(a, m), _rescale(b, m)
    l, moment = l_a + l_b, moment_a + moment_b
    if a.score is None or b.score is None:
        return Accumulators(m, l, moment, jnp.maximum(a.logit, b.logit))

    assert a.token is not None and b.token is not None  # set together with score
    b_wins = b.score > a.score
    return Accumulators(
        m,
        l,
        moment,
        logit=jnp.where(b_wins, b.logit, a.logit),
        score=jnp.where(b_wins, b.score, a.score),
        token=jnp.where(b_wins, b.token, a.token),
    )


def reduce_accumulators(acc: Accumulators, axis: int) -> Accumulators:
    """Merge the pieces that are stacked on an axis, in any order of their columns."""
    m = jnp.max(acc.m, axis=axis)
    l, moment = (jnp.sum(x, axis=axis) for x in _rescale(acc, jnp.expand_dims(m, axis)))
    if acc.score is None or acc.token is None:
        return Accumulators(m, l, moment, jnp.max(acc.logit, axis=axis))
    return Accumulators(m, l, moment, *_argmax(acc.logit, acc.score, acc.token, axis))


def _rescale(acc: Accumulators, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return l and moment relative to a larger maximum m: e^(z - m) = e^(acc.m - m) e^(z - acc.m)."""
    shift = acc.m - m
    scale = jnp.exp(shift)
    return scale * acc.l, scale * (acc.moment + acc.l * shift)


def _argmax(
    logit: jax.Array, score: jax.Array, token: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (logit, score, token) of the largest score; a tie goes to the smallest token."""
    # Made of maxima and minima, which every backend has, and which decide ties the same way on all of them.
    best = jnp.max(score, axis=axis)
    first = jnp.min(jnp.where(score == jnp.expand_dims(best, axis), token, NO_TOKEN), axis=axis)
    is_first = token == jnp.expand_dims(first, axis)
    return jnp.max(jnp.where(is_first, logit, -jnp.inf), axis=axis), best, first
