"""GRPO's loss as pure functions of log-probabilities: the clipped surrogate with a KL term.

1. `token_weights` gives each response token's weight in the loss, normalised over the whole minibatch.
2. `kl_estimate` estimates the divergence from the reference at each token.
3. `grpo_loss` combines them into a weighted sum, so that the losses of microbatches add up.

Values outside the response mask are removed by `where`, never multiplied by 0: whatever is there, NaN
included, reaches neither loss nor gradient.

Departure: the released code averages over each rank's microbatch where we normalise over the minibatch.

    N  rows (prompt-major)   T  response tokens
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cooper_jax.settings import typed_config

ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")

# exp of a larger log-ratio is beyond every clip, and at 88 it overflows: inf * 0 in the backward pass.
LOG_RATIO_BOUND = 20.0

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Settings of the policy's update: the config's `policy` section."""

    dtype: str  # of the computation: float32 or bfloat16
    remat: bool  # recompute each layer's activations in the backward pass
    microbatch: int  # rows in one forward and backward pass
    epochs: int  # passes over a step's rollouts
    minibatches: int  # optimiser updates a pass
    std_normalise: bool  # divide advantages by the group's standard deviation
    std_eps: float
    std_floor: float
    aggregation: str
    clip_low: float
    clip_high: float
    dual_clip: float  # 0: off
    kl_coef: float
    kl_estimator: str
    kl_clamp: float  # 0: off

    def __post_init__(self) -> None:
        problems = [
            *typed_config.find_unknown(self.kl_estimator, "policy.kl_estimator", ESTIMATORS),
            *typed_config.find_unknown(self.aggregation, "policy.aggregation", AGGREGATIONS),
            *typed_config.find_small(self, "policy", 1, ("epochs", "minibatches", "microbatch")),
            *typed_config.find_small(self, "policy", 0, ("clip_low", "clip_high", "kl_coef", "kl_clamp")),
        ]
        if self.dual_clip and not self.dual_clip > 1.0 + self.clip_high:
            problems.append(
                f"policy.dual_clip={self.dual_clip}: it must exceed 1 + policy.clip_high = "
                f"{1.0 + self.clip_high}, or be 0 (off)"
            )
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> PolicyConfig:
        """Read the `policy` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "policy")


def kl_estimate(logprobs: jax.Array, ref: jax.Array, estimator: str, clamp: float) -> jax.Array:
    """Per-token estimates of KL(policy || reference) at tokens sampled from the policy, f32 like the inputs.

    With d = log policy - log ref, clipped to +-20 so that nothing overflows:

        k1 = d                     value unbiased;   gradient 0 in expectation: no penalty at all
        k2 = d^2 / 2               value biased;     gradient that of KL(policy || ref)
        k3 = exp(-d) - 1 + d       value unbiased;   gradient that of KL(ref || policy)
                                   never negative, low variance

    The estimate is clipped to +-clamp (0: not at all), as released; beyond, its gradient is 0.  "Gradient"
    above is the expected one of the estimate as a loss term, samples held fixed.  Source: Schulman 2020,
    "Approximating KL divergence", http://joschu.net/blog/kl-approx.html; k3 in GRPO: arXiv 2402.03300, eq. 4.
    Raises ValueError for another estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"policy.kl_estimator is {estimator!r}; it is one of {', '.join(ESTIMATORS)}")
    d = jnp.clip(logprobs - ref, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    estimate = {"k1": d, "k2": 0.5 * d**2, "k3": jnp.expm1(-d) + d}[estimator]
    return jnp.clip(estimate, -clamp, clamp) if clamp > 0 else estimate


def token_weights(mask: jax.Array, aggregation: str, max_new_tokens: int) -> jax.Array:
    """The weight of each response token in the loss: f32[N, T] from bool[N, T].

    Normalised over all N rows, so call it before they are split into microbatches:

        token_mean      1 / tokens of all rows                  as released; DAPO (arXiv 2503.14476)
        sequence_mean   1 / (the row's tokens * rows)           GRPO (arXiv 2402.03300, eq. 3)
        sequence_sum    1 / (rows * max_new_tokens)             Dr. GRPO (arXiv 2503.20783): no length bias

    Rows without a token are not counted.  Raises ValueError for another aggregation.
    """
    m = mask.astype(jnp.float32)  # [N, T]
    length = m.sum(axis=1, keepdims=True)  # [N, 1]
    rows = jnp.maximum((length > 0).sum(), 1).astype(jnp.float32)
    if aggregation == "token_mean":
        return m / jnp.maximum(m.sum(), 1.0)
    if aggregation == "sequence_mean":
        return m / (jnp.maximum(length, 1.0) * rows)
    if aggregation == "sequence_sum":
        return m / (rows * max_new_tokens)
    raise ValueError(f"policy.aggregation is {aggregation!r}; it is one of {', '.join(AGGREGATIONS)}")


def grpo_loss(
    logprobs: jax.Array,  # f32[N, T], the only argument that a gradient reaches
    old: jax.Array,  # f32[N, T]
    ref: jax.Array,  # f32[N, T]
    advantages: jax.Array,  # f32[N]
    weights: jax.Array,  # f32[N, T]
    mask: jax.Array,  # bool[N, T]
    cfg: PolicyConfig,
) -> tuple[jax.Array, Metrics]:
    """The clipped surrogate with the KL to the reference, summed with the given weights.

        r_t  = exp(log pi(y_t) - log pi_old(y_t))
        l_t  = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high))
        l_t  = min(l_t, -A dual_clip)   where A < 0      (PPO's dual clip: Ye et al. 2020, arXiv 1912.09729)
        loss = sum_t w_t (l_t + kl_coef KL_t)            (arXiv 2402.03300, eq. 3, negated)

    kl_coef 0 leaves the reference out of the loss altogether.

    Returns (loss f32[], sums over the masked tokens): loss and pg_loss are weighted sums; kl, ratio,
    clip_low, clip_high and dual_clip plain ones (the clips count tokens whose clipped branch is the one in
    the loss); ratio_min and ratio_max are extremes (infinities where no token is).
    """
    logprobs, old, ref = (jnp.where(mask, x, 0.0) for x in (logprobs, old, ref))
    weights = jnp.where(mask, weights, 0.0)

    # A row without a response token may have any advantage, NaN included.
    a = jnp.broadcast_to(jnp.where(mask.any(axis=1), advantages, 0.0)[:, None], mask.shape)

    log_ratio = jnp.clip(logprobs - jax.lax.stop_gradient(old), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = jnp.exp(log_ratio)

    # The pessimistic one of the two: the clip removes the gradient only where the ratio already moved too
    # far.
    plain = -a * ratio
    clipped = -a * jnp.clip(ratio, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high)
    per_token = jnp.maximum(plain, clipped)

    # With A < 0 the surrogate is unbounded in the ratio; the dual clip bounds it.
    dual = jnp.zeros_like(mask)
    if cfg.dual_clip:
        dual = (a < 0) & (ratio > cfg.dual_clip)
        per_token = jnp.where(dual, -a * cfg.dual_clip, per_token)

    divergence = kl_estimate(logprobs, jax.lax.stop_gradient(ref), cfg.kl_estimator, cfg.kl_clamp)
    pg_loss = (weights * per_token).sum()
    # kl_coef is a Python constant: at 0 the loss has no KL term at all.
    loss = pg_loss
    if cfg.kl_coef:
        loss = loss + cfg.kl_coef * (weights * divergence).sum()

    def total(x):
        return jnp.where(mask, x, 0.0).astype(jnp.float32).sum()

    return loss, {
        "loss": loss,
        "pg_loss": pg_loss,
        "kl": total(divergence),
        "ratio_mean": total(ratio),
        "ratio_min": jnp.where(mask, ratio, jnp.inf).min(),
        "ratio_max": jnp.where(mask, ratio, -jnp.inf).max(),
        "clip_low": total((a < 0) & (ratio < 1.0 - cfg.clip_low)),
        "clip_high": total((a > 0) & (ratio > 1.0 + cfg.clip_high)),
        "dual_clip": total(dual),
    }
