"""The difference between the sampler's and the learner's log-probabilities: measured, and corrected in the loss.

A rollout in bfloat16, or with an int8 cache, samples from another distribution mu than the pi_old that the
learner computes with the same weights.  So does a rollout whose weights are older (trainer/rollout_ahead.py).
The policy gradient is then biased, and the clip, which compares pi with
pi_old, does not see it.  With d_t = log pi_old(y_t) - log mu(y_t) at each response token:

1. `measure_mismatch` counts |d_t| in a histogram and finds the extreme ratios of whole responses, exp(sum d_t).
2. `correction_weights` makes the weights of the settings `policy.correction`, which multiply the loss per token:

    none            1
    token           min(exp(d_t), cap)                        truncated importance sampling of each token
    sequence        min(exp(sum over t of d_t), cap)          of the response: its tokens share one weight
    token_mask      1 if 1 / cap <= exp(d_t) <= cap, else 0   tokens that the two disagree about have no part
    sequence_mask   the same for exp(sum over t of d_t)       nor have such responses

Only `sequence` with an infinite cap removes the bias; its variance grows with the length.  A cap, and weights of
single tokens, leave some of the bias in exchange (truncated importance sampling: Ionides 2008).

    N  rows   T  response tokens
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

CORRECTIONS = ("none", "token", "sequence", "token_mask", "sequence_mask")
# Beside these: token if the rollout computes in another type than float32 or with older weights, else none.
AUTO = "auto"

# Edges of the histogram of |d|, in nats: 8 to a decade, so that a quantile is known to a factor of 1.33.
EDGES = np.concatenate([[0.0], 10 ** np.linspace(-6, 1, 57)]).astype(np.float32)
QUANTILES = {"p50": 0.5, "p99": 0.99}

# Log-ratios are clipped to +-20, beyond any cap, so that exp does not overflow.
_BOUND = 20.0

Metrics = dict[str, jax.Array]


def choose_correction(setting: str, sampler_agrees: bool) -> str:
    """The correction of a setting, which may be AUTO.

    sampler_agrees: True if the sampler computes in float32, with the weights that the step starts from.
    """
    if setting != AUTO:
        return setting
    return "none" if sampler_agrees else "token"


def correction_weights(difference: jax.Array, mask: jax.Array, correction: str, cap: float) -> jax.Array:
    """Weights of the loss per token, f32[N, T] and at least 0; 0 outside the mask.

    Args:
      difference: d, f32[N, T]; read inside the mask only.  The weights have no gradient.
      mask: bool[N, T].
      correction: one of CORRECTIONS.
      cap: above 1.

    Raises ValueError for another correction.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"policy.correction is {correction!r}; it is one of {', '.join(CORRECTIONS)}")
    if correction == "none":
        return mask.astype(jnp.float32)

    log_ratio = jnp.where(mask, jax.lax.stop_gradient(difference), 0.0)
    if correction.startswith("sequence"):
        log_ratio = jnp.broadcast_to(log_ratio.sum(axis=1, keepdims=True), mask.shape)
    ratio = jnp.exp(jnp.clip(log_ratio, -_BOUND, _BOUND))
    if correction.endswith("mask"):
        ratio = ((ratio >= 1.0 / cap) & (ratio <= cap)).astype(jnp.float32)
    return jnp.where(mask, jnp.minimum(ratio, cap), 0.0)


def measure_mismatch(difference: jax.Array, mask: jax.Array) -> Metrics:
    """Sums over the response tokens of some rows, which `reduce_mismatch` combines.

    difference: d, f32[N, T]; read inside the mask only.
    """
    difference = jnp.where(mask, jax.lax.stop_gradient(difference), 0.0)
    size = jnp.abs(difference)
    # The comparisons are fused with the sum, so that [N, T, edges] never exists.
    beyond = (size[..., None] > EDGES[None, None]) & mask[..., None]
    totals = difference.sum(axis=1)
    used = mask.any(axis=1)
    return {
        "mismatch_sum": size.sum(),
        "mismatch_beyond": beyond.astype(jnp.float32).sum(axis=(0, 1)),  # f32[edges]
        "mismatch_max": size.max(),
        "mismatch_row_min": jnp.where(used, totals, 0.0).min(),
        "mismatch_row_max": jnp.where(used, totals, 0.0).max(),
    }


def reduce_mismatch(sums: Metrics, tokens: jax.Array) -> Metrics:
    """Combine the results of `measure_mismatch`, stacked along a first axis [M], into metrics, f32[] each.

    tokens: f32[], their number.  The `mismatch_...` entries are removed from `sums`.

    rollout_mismatch is the mean of |d| in nats, _p50, _p99 and _max its quantiles (rounded up to an edge) and
    maximum; rollout_ratio_min and _max are the extremes of a response's exp(sum d), 1 among them.
    """
    beyond = sums.pop("mismatch_beyond").sum(axis=0)  # f32[edges]
    metrics = {
        "rollout_mismatch": sums.pop("mismatch_sum").sum() / jnp.maximum(tokens, 1.0),
        "rollout_mismatch_max": sums.pop("mismatch_max").max(),
        "rollout_ratio_min": jnp.exp(sums.pop("mismatch_row_min").min()),
        "rollout_ratio_max": jnp.exp(sums.pop("mismatch_row_max").max()),
    }
    for name, quantile in QUANTILES.items():
        # The first edge beyond which there is at most the rest of the tokens; the last one if there is none.
        fits = beyond <= (1.0 - quantile) * tokens
        index = jnp.where(fits.any(), jnp.argmax(fits), len(EDGES) - 1)
        metrics[f"rollout_mismatch_{name}"] = jnp.asarray(EDGES)[index]
    return metrics
