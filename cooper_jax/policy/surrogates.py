"""Policy-gradient losses per token, before they are weighted and summed: the table of `policy.loss`.

    r_t  = exp(log pi(y_t) - log pi_old(y_t))        the probability ratio of a token
    s    = exp(mean over t of log r_t)               that of a response: the geometric mean of its tokens'

    clip         max(-A r_t, -A clip(r_t)), at most -A dual_clip where A < 0     PPO (arXiv 1707.06347, eq. 7)
    gspo         max(-A s, -A clip(s))              GSPO (arXiv 2507.18071, eq. 5): one ratio for each response
    gspo_token   as gspo, with the gradient of A at each token                  (arXiv 2507.18071, eq. 13)
    cispo        -stop_gradient(clip(r_t)) A log pi(y_t)       CISPO (arXiv 2506.13585, eq. 4)

where clip(x) is x between 1 - clip_low and 1 + clip_high.  In the first three a response or token outside the
range has no gradient if its advantage would push it further out; in `cispo` every token keeps its gradient,
with a bounded weight.  The dual clip (arXiv 1912.09729) bounds the ratio of the first three.

`gspo` and `gspo_token` have equal values and gradients as long as a response has a single advantage, as here.

    N  rows   T  response tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Log-ratios are clipped to +-20, far beyond every clip range.  Without a bound exp overflows in f32 above 88,
# and the backward pass multiplies inf by 0.
LOG_RATIO_BOUND = 20.0


@dataclasses.dataclass(frozen=True)
class ClipRange:
    """Bounds of the ratio."""

    low: float  # the ratio is clipped to [1 - low, 1 + high]
    high: float
    dual: float  # bound on the ratio in the loss of tokens with negative advantages; 0: off

    def clip(self, ratio: jax.Array) -> jax.Array:
        """Clip a ratio of any shape to [1 - low, 1 + high]."""
        return jnp.clip(ratio, 1.0 - self.low, 1.0 + self.high)


@dataclasses.dataclass(frozen=True)
class SurrogateLoss:
    """The loss of each token and what the metrics report about it, f32[N, T] or bool[N, T] each."""

    loss: jax.Array
    ratio: jax.Array  # the ratio that the loss clips
    clipped_low: (
        jax.Array
    )  # True where the lower bound takes the gradient (cispo: where it bounds the weight)
    clipped_high: jax.Array  # the same of the upper bound
    dual_clipped: jax.Array


# (log-probabilities, log-ratios, advantages, response mask, clip range) -> SurrogateLoss.  All arrays are
# [N, T]; values outside the mask are finite and without meaning.
Surrogate = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, ClipRange], SurrogateLoss]


def clip_ratio(ratio: jax.Array, advantages: jax.Array, bounds: ClipRange) -> SurrogateLoss:
    """The clipped surrogate of ratios [N, T] of any kind, negated.

    The maximum of the two losses is PPO's pessimistic bound.
    """
    loss = jnp.maximum(-advantages * ratio, -advantages * bounds.clip(ratio))

    # At negative advantages the clipped surrogate has no upper bound in the ratio; the dual clip adds one.
    dual_clipped = jnp.zeros(ratio.shape, bool)
    if bounds.dual:
        dual_clipped = (advantages < 0) & (ratio > bounds.dual)
        loss = jnp.where(dual_clipped, -advantages * bounds.dual, loss)
    return SurrogateLoss(
        loss,
        ratio,
        clipped_low=(advantages < 0) & (ratio < 1.0 - bounds.low),
        clipped_high=(advantages > 0) & (ratio > 1.0 + bounds.high),
        dual_clipped=dual_clipped,
    )


def clip_tokens(
    logprobs: jax.Array, log_ratio: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> SurrogateLoss:
    """PPO's and GRPO's loss: each token's ratio is clipped by itself."""
    return clip_ratio(jnp.exp(log_ratio), advantages, bounds)


def clip_responses(
    logprobs: jax.Array, log_ratio: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> SurrogateLoss:
    """GSPO's loss: all tokens of a response share one ratio."""
    mean = _mean_over_response(log_ratio, mask)
    return clip_ratio(jnp.broadcast_to(jnp.exp(mean), mask.shape), advantages, bounds)


def clip_responses_by_token(
    logprobs: jax.Array, log_ratio: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> SurrogateLoss:
    """GSPO-token's loss: the response's ratio in value, each token's own log-probability in gradient."""
    mean = jax.lax.stop_gradient(_mean_over_response(log_ratio, mask))
    own_gradient = log_ratio - jax.lax.stop_gradient(log_ratio)  # 0 in value
    return clip_ratio(jnp.exp(mean + own_gradient), advantages, bounds)


def clip_weights(
    logprobs: jax.Array, log_ratio: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> SurrogateLoss:
    """CISPO's loss: REINFORCE with a clipped importance weight, which has no gradient of its own."""
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    return SurrogateLoss(
        -bounds.clip(ratio) * advantages * logprobs,
        ratio,
        clipped_low=ratio < 1.0 - bounds.low,
        clipped_high=ratio > 1.0 + bounds.high,
        dual_clipped=jnp.zeros(mask.shape, bool),
    )


def _mean_over_response(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of [N, T] over each row's response tokens, [N, 1]; 0 for a row without any."""
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.where(mask, values, 0.0).sum(axis=1, keepdims=True) / lengths


SURROGATES: dict[str, Surrogate] = {
    "clip": clip_tokens,
    "gspo": clip_responses,
    "gspo_token": clip_responses_by_token,
    "cispo": clip_weights,
}
