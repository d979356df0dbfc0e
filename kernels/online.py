"""What has been seen of a row's logits: a softmax and a race, over columns that arrive in pieces.

    look    logits of one piece -> Seen
    join    Seen of some columns, Seen of later ones -> Seen of both
    along   Seen of many pieces, side by side on an axis -> one Seen

Every form of the head's kernels is made of these three: pieces are chunks, tiles, lanes, splits or shards of the
vocabulary.  The race compares numbers that no piece has rescaled, so its winner does not depend on the pieces.

With z the logits, already divided by the temperature, a piece holds

    peak = max z    mass = sum e^(z - peak)    moment = sum e^(z - peak) (z - peak)

so that logsumexp = peak + log mass and the entropy is log mass - moment / mass.  A NaN or +inf among the logits
makes the mass NaN, for good; nothing but -inf leaves it 0: a row has a distribution where mass > 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e38  # the least peak: differences of two stay finite, and e^(-inf - peak) is 0
NOWHERE = 2**31 - 1  # the index before there is one


class Accumulators(NamedTuple):
    """Arrays of one shape, f32 but for the index."""

    peak: jax.Array
    mass: jax.Array
    moment: jax.Array
    chosen: jax.Array  # z of the race's winner, or of the row's target; -inf: not among the columns seen
    score: jax.Array | None = None  # the race's best; None where a target is scored
    index: jax.Array | None = None  # i32, the first entry that reached it


def init_accumulator(shape: tuple[int, ...], race: bool) -> Accumulators:
    """No column yet: what `join` starts from."""
    zero, low = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)
    seen = Accumulators(jnp.full(shape, LOWEST, jnp.float32), zero, zero, low)
    return seen._replace(score=low, index=jnp.full(shape, NOWHERE, jnp.int32)) if race else seen


def update_accumulator(
    z: jax.Array, axis: int, *, index: jax.Array, score: jax.Array | None, target: jax.Array | None
) -> Accumulators:
    """Logits f32 (-inf: not there), reduced over `axis`.

    A race has scores, which decide; scoring has the row's `target`, which the index i32 (both broadcast with z)
    is compared with.
    """
    peak = jnp.maximum(jnp.max(z, axis=axis), LOWEST)
    below = z - jnp.expand_dims(peak, axis)
    e = jnp.exp(below)
    mass = jnp.sum(e, axis=axis)
    moment = jnp.sum(jnp.where(e > 0.0, e * below, 0.0), axis=axis)  # 0 and not NaN at -inf
    if score is None:
        return Accumulators(peak, mass, moment, jnp.max(jnp.where(index == target, z, -jnp.inf), axis=axis))
    return Accumulators(peak, mass, moment, *_winner(z, score, jnp.broadcast_to(index, z.shape), axis))


def merge_accumulators(a: Accumulators, b: Accumulators) -> Accumulators:
    """b's columns come after a's: of equal scores the first wins."""
    peak = jnp.maximum(a.peak, b.peak)
    (mass_a, moment_a), (mass_b, moment_b) = _to(peak, a), _to(peak, b)
    mass, moment = mass_a + mass_b, moment_a + moment_b
    if a.score is None:
        return Accumulators(peak, mass, moment, jnp.maximum(a.chosen, b.chosen))
    wins = b.score > a.score
    picked = (jnp.where(wins, y, x) for x, y in zip(a[3:], b[3:], strict=True))
    return Accumulators(peak, mass, moment, *picked)


def reduce_accumulators(seen: Accumulators, axis: int) -> Accumulators:
    """Pieces on an axis, in any order -> one."""
    peak = jnp.max(seen.peak, axis=axis)
    mass, moment = (jnp.sum(x, axis=axis) for x in _to(jnp.expand_dims(peak, axis), seen))
    if seen.score is None:
        return Accumulators(peak, mass, moment, jnp.max(seen.chosen, axis=axis))
    return Accumulators(peak, mass, moment, *_winner(seen.chosen, seen.score, seen.index, axis))


def _to(peak: jax.Array, seen: Accumulators) -> tuple[jax.Array, jax.Array]:
    """Mass and moment about a higher peak."""
    below = seen.peak - peak
    scale = jnp.exp(below)
    return scale * seen.mass, scale * (seen.moment + seen.mass * below)


def _winner(chosen, score, index, axis):
    """(chosen, score, index) of the largest score, the least index among equals."""
    best = jnp.max(score, axis=axis)
    first = jnp.min(jnp.where(score == jnp.expand_dims(best, axis), index, NOWHERE), axis=axis)
    won = index == jnp.expand_dims(first, axis)
    return jnp.max(jnp.where(won, chosen, -jnp.inf), axis=axis), best, first
