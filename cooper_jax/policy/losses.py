"""The policy's loss as pure functions of log-probabilities: a policy-gradient loss plus a KL penalty.

1. `token_weights` computes each response token's weight in the loss, normalised over the whole minibatch.
2. `kl_estimate` estimates the KL divergence from the reference at each token.
3. `policy_loss` combines them with one of the losses per token (surrogates.py) into a weighted sum, so the
   losses of microbatches add up to the minibatch's.

Values outside the response mask are removed by `where`, not multiplied by 0, so a NaN at such a position
reaches neither the loss nor a gradient.

Departure from the released code: it normalises over each rank's microbatch, this code over the minibatch.

    N  rows, prompt-major   T  response tokens
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cooper_jax.policy.advantages import BASELINES, STDS
from cooper_jax.policy.sampler_mismatch import AUTO, CORRECTIONS
from cooper_jax.policy.surrogates import LOG_RATIO_BOUND, SURROGATES, ClipRange
from cooper_jax.settings import bounds, typed_config

ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Settings of the policy's update: the config's `policy` section."""

    # Computation.  These change memory, time and rounding, but not the definition of the loss.
    dtype: str  # of activations: float32 or bfloat16
    remat: bool  # recompute each layer's activations in the backward pass
    microbatch: int  # rows in one forward and backward pass
    packing: str  # rows hold several sequences (data/row_packing.py): one of PACKINGS
    share_prompts: bool  # with packing: responses to one prompt share it, where attention can do that

    # Updates: epochs * minibatches per step.
    epochs: int  # passes over a step's rollouts
    minibatches: int  # optimiser updates per pass

    algorithm: (
        str  # a name in ALGORITHMS (algorithms.py), or ""; its values have been written into the config
    )

    # Advantages (advantages.py).
    baseline: str  # what is subtracted from a reward: one of BASELINES
    std: str  # the standard deviation by which advantages are divided: one of STDS
    std_eps: float  # added to the standard deviation
    std_floor: float  # smaller standard deviations are replaced by this one before the division
    flat_std: float  # a group is flat if its rewards deviate by no more, or are all equal

    # Loss.
    loss: str  # one of SURROGATES (surrogates.py)
    aggregation: str  # one of AGGREGATIONS
    mask_truncated: bool  # truncated responses have no part in the loss
    mask_flat_groups: bool  # nor have flat groups, in the loss and in its normalisation
    clip_low: float  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float
    dual_clip: float  # bound on the ratio in the loss of tokens with negative advantages; 0: off
    kl_coef: float  # weight of the KL term; 0: no KL term and no reference policy
    kl_estimator: str  # one of ESTIMATORS
    kl_clamp: float  # bound of a token's KL estimate; 0: off
    entropy_coef: float  # weight of the entropy, which is maximised; 0: off

    # Difference between the sampler's and the learner's log-probabilities (sampler_mismatch.py).
    correction: str  # one of CORRECTIONS, or AUTO
    correction_cap: float  # bound of an importance weight

    def __post_init__(self) -> None:
        errors = [
            *typed_config.find_unknown(self.kl_estimator, "policy.kl_estimator", ESTIMATORS),
            *typed_config.find_unknown(self.aggregation, "policy.aggregation", AGGREGATIONS),
            *typed_config.find_unknown(self.loss, "policy.loss", tuple(SURROGATES)),
            *typed_config.find_unknown(self.baseline, "policy.baseline", BASELINES),
            *typed_config.find_unknown(self.std, "policy.std", STDS),
            *typed_config.find_unknown(self.packing, "policy.packing", typed_config.PACKINGS),
            *bounds.find_out_of_bounds(self, "policy"),
        ]
        errors += typed_config.find_unknown(self.correction, "policy.correction", (AUTO, *CORRECTIONS))
        # A smaller dual_clip would remove the gradient inside the clip range as well.
        if self.dual_clip and not self.dual_clip > 1.0 + self.clip_high:
            errors.append(
                f"policy.dual_clip={self.dual_clip}: it must exceed 1 + policy.clip_high = "
                f"{1.0 + self.clip_high}, or be 0 (off)"
            )
        # A group of equal rewards differs from the step's mean and has no deviation to be divided by.
        if self.baseline == "batch_mean" and self.std == "group":
            errors.append(
                "policy.baseline='batch_mean' with policy.std='group': groups of equal rewards have no standard "
                "deviation; set --config.policy.std=batch or none"
            )
        if self.dual_clip and self.loss == "cispo":
            errors.append(
                f"policy.dual_clip={self.dual_clip}: cispo clips its weights at both signs of the advantage; set "
                "--config.policy.dual_clip=0"
            )
        typed_config.raise_errors(errors)

    @property
    def has_reference(self) -> bool:
        """True if the loss has a KL term; without one no reference policy is held."""
        return self.kl_coef > 0

    @classmethod
    def from_config(cls, section: ConfigDict) -> PolicyConfig:
        """Read the `policy` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "policy")


def kl_estimate(logprobs: jax.Array, ref: jax.Array, estimator: str, clamp: float) -> jax.Array:
    """Per-token estimates of KL(policy || reference) at tokens sampled from the policy, f32[N, T].

    With d = log policy - log reference, clipped to +-20 against overflow:

        k1 = d                     value unbiased;   gradient 0 in expectation, so it penalises nothing
        k2 = d^2 / 2               value biased;     gradient that of KL(policy || reference)
        k3 = exp(-d) - 1 + d       value unbiased;   gradient that of KL(reference || policy)
                                   never negative, low variance

    "Gradient" means the expected gradient of the estimate as a loss term, with the samples held fixed.

    The estimate is clipped to +-clamp (0: no clipping), as in the released code; where it is clipped, its
    gradient is 0.  Sources: Schulman 2020, "Approximating KL divergence",
    http://joschu.net/blog/kl-approx.html; k3 in GRPO: arXiv 2402.03300, eq. 4.

    Args:
      logprobs, ref: log-probabilities under the policy and under the reference, f32[N, T].
      estimator: one of ESTIMATORS.

    Raises ValueError for another estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"policy.kl_estimator is {estimator!r}; it is one of {', '.join(ESTIMATORS)}")
    d = jnp.clip(logprobs - ref, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    # expm1 keeps precision near d = 0, where exp(-d) - 1 would cancel.
    estimate = {"k1": d, "k2": 0.5 * d**2, "k3": jnp.expm1(-d) + d}[estimator]
    return jnp.clip(estimate, -clamp, clamp) if clamp > 0 else estimate


def token_weights(mask: jax.Array, aggregation: str, max_new_tokens: int) -> jax.Array:
    """The weight of each response token in the loss: f32[N, T] from the response mask bool[N, T].

        token_mean      1 / tokens of all rows                  released code; DAPO (arXiv 2503.14476)
        sequence_mean   1 / (the row's tokens * rows)           GRPO (arXiv 2402.03300, eq. 3)
        sequence_sum    1 / (rows * max_new_tokens)             Dr. GRPO (arXiv 2503.20783): no length bias

    The weights are normalised over all N rows, so they are computed before the rows are split into
    microbatches.  Rows without a response token do not count as rows.  Raises ValueError for another
    aggregation.
    """
    ones = mask.astype(jnp.float32)  # [N, T]: 1 at response tokens, 0 elsewhere
    lengths = ones.sum(axis=1, keepdims=True)  # [N, 1]

    # Padding rows have no token.  The lower bounds avoid 0 / 0 in a batch without any token.
    rows = jnp.maximum((lengths > 0).sum(), 1).astype(jnp.float32)
    if aggregation == "token_mean":
        return ones / jnp.maximum(ones.sum(), 1.0)
    if aggregation == "sequence_mean":
        return ones / (jnp.maximum(lengths, 1.0) * rows)
    if aggregation == "sequence_sum":
        return ones / (rows * max_new_tokens)
    raise ValueError(f"policy.aggregation is {aggregation!r}; it is one of {', '.join(AGGREGATIONS)}")


def policy_loss(
    logprobs: jax.Array,  # f32[N, T]: under the policy; the only argument that is differentiated
    old: jax.Array,  # f32[N, T]: under the policy before the step's first update
    ref: jax.Array,  # f32[N, T]: under the reference
    advantages: jax.Array,  # f32[N]
    weights: jax.Array,  # f32[N, T]: from token_weights
    mask: jax.Array,  # bool[N, T]: response tokens
    cfg: PolicyConfig,
    correction: jax.Array | None = None,  # f32[N, T]: from correction_weights; None: 1
    entropy: jax.Array | None = None,  # f32[N, T]: of the policy at each token, differentiable
) -> tuple[jax.Array, Metrics]:
    """The policy-gradient loss plus the KL penalty, less the entropy bonus, as a weighted sum over tokens.

        loss = sum_t w_t (c_t l_t + kl_coef KL_t - entropy_coef H_t)

    with the correction c_t, l_t of SURROGATES[cfg.loss], and the entropy H_t (PPO, arXiv 1707.06347, eq. 9).  With
    `clip` this is GRPO's loss (arXiv 2402.03300, eq. 3, negated), with PPO's dual clip (Ye et al. 2020, arXiv
    1912.09729).  With kl_coef 0 `ref` is not read, and the sums have no kl.

    Returns (loss f32[], sums f32[] each).  In the sums, loss and pg_loss are weighted sums over the response
    tokens; kl, ratio_mean, clip_low, clip_high and dual_clip are unweighted sums, which the caller divides by
    the number of tokens; ratio_min and ratio_max are extremes (+-inf without any token).  The clip metrics
    count the tokens at which a clipped branch is l_t, so that l_t has no gradient (cispo: a bounded weight).
    """
    # Masked before any arithmetic: if x is NaN, the gradient of where(mask, f(x), 0) is NaN, too.
    logprobs, old, ref = (jnp.where(mask, x, 0.0) for x in (logprobs, old, ref))
    weights = jnp.where(mask, weights, 0.0)

    # A row without a response token may have any advantage, NaN included.
    row_advantages = jnp.where(mask.any(axis=1), advantages, 0.0)
    token_advantages = jnp.broadcast_to(row_advantages[:, None], mask.shape)  # [N, T]

    log_ratio = jnp.clip(logprobs - jax.lax.stop_gradient(old), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    bounds = ClipRange(cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    surrogate = SURROGATES[cfg.loss](logprobs, log_ratio, token_advantages, mask, bounds)

    def sum_tokens(values: jax.Array) -> jax.Array:
        return jnp.where(mask, values, 0.0).astype(jnp.float32).sum()

    pg_weights = weights if correction is None else weights * jnp.where(mask, correction, 0.0)
    pg_loss = (pg_weights * surrogate.loss).sum()
    loss, sums = pg_loss, {}
    if cfg.has_reference:
        divergence = kl_estimate(logprobs, jax.lax.stop_gradient(ref), cfg.kl_estimator, cfg.kl_clamp)
        loss = loss + cfg.kl_coef * (weights * divergence).sum()
        sums["kl"] = sum_tokens(divergence)
    if cfg.entropy_coef:
        assert entropy is not None, "an entropy bonus needs the entropy"
        loss = loss - cfg.entropy_coef * (weights * jnp.where(mask, entropy, 0.0)).sum()

    return loss, sums | {
        "loss": loss,
        "pg_loss": pg_loss,
        "ratio_mean": sum_tokens(surrogate.ratio),
        "ratio_min": jnp.where(mask, surrogate.ratio, jnp.inf).min(),
        "ratio_max": jnp.where(mask, surrogate.ratio, -jnp.inf).max(),
        "clip_low": sum_tokens(surrogate.clipped_low),
        "clip_high": sum_tokens(surrogate.clipped_high),
        "dual_clip": sum_tokens(surrogate.dual_clipped),
    }
