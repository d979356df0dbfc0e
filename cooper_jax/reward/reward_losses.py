"""Losses of the reward model's update, in logits, and how each term moves the two members of a pair.

z is a member's logit and p = sigmoid(z) its reward; + and - mark the positive and the negative.  The loss of
a pair is

    L(z+, z-) =  pair_weight  * -log sigmoid(s+ - s-)                the contrast, s = z or s = p
               + pair_bce     * (-log p+ - log(1 - p-)) / 2          pointwise, the mean of the members

Gradient descent pushes the positive's logit by -dL/dz+ and the negative's by -dL/dz-.  The mean of the two is
the *common* push: it acts on what both members share (a style, a shortcut).  Half their difference is the
*difference* push: it acts on what distinguishes them (the answer).

    common = -(dL/dz+ + dL/dz-) / 2          difference = -(dL/dz+ - dL/dz-) / 2

    term                  dL/dz+              dL/dz-             common
    contrast on logits    -g                  g                  0
    contrast on rewards   -g p+ (1 - p+)      g p- (1 - p-)      g (p+ (1 - p+) - p- (1 - p-)) / 2
    pointwise             -(1 - p+) / 2       p- / 2             (1 - p+ - p-) / 4

with g = sigmoid(s- - s+).  Three consequences:

* A contrast on logits cannot unlearn a shortcut that both members contain: its common push is 0, and its loss
  falls to 0 once the reward model distinguishes their answers.
* The common push of a contrast on rewards is negative if the positive is the more saturated member (its
  reward is closer to 0 or 1), positive if the negative is, and 0 if both are saturated.
* The common push of the pointwise term moves p+ + p- towards 1.  It has no factor p (1 - p), so it acts on
  saturated members too.

Sources: the contrast is Cooper's (arXiv 2508.05613), on logits as in its released code.  The pointwise term
is the cross-entropy with which the paper trains VerifyRM; applying it to the members of pairs is our
extension.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from cooper_jax.settings import bounds, typed_config

PAIR_LOSSES = ("logit", "sigmoid")


@dataclasses.dataclass(frozen=True)
class RewardUpdateConfig:
    """Settings of the reward model's updates: fields of the config's `reward` section."""

    # Computation.
    dtype: str  # of activations: float32 or bfloat16
    remat: bool  # recompute each layer's activations in the backward pass
    microbatch: int  # pairs, or labelled rows, per forward and backward pass
    packing: str  # rows hold several inputs (data/row_packing.py): one of PACKINGS

    # Terms on pairs; a weight of 0 removes the term.
    pair_loss: str  # the contrast: one of PAIR_LOSSES
    pair_weight: float  # weight of the contrast
    pair_bce: float  # weight of cross-entropy on the members of pairs

    # The term on labelled rollouts, see labelled_rollouts.py.
    rollout_bce: float  # weight of cross-entropy on rollouts that the rule has labelled
    rollout_rows: int  # maximum number of labelled rollouts per step
    replay: int  # number of labelled rollouts of earlier steps to keep, per class
    replay_rows: int  # maximum number of kept rollouts added to each update's rows

    # Number of updates.
    updates: int  # per policy step
    warmup_updates: int  # before the first policy step

    def __post_init__(self) -> None:
        # Ranges of single fields.
        errors = [
            *typed_config.find_unknown(self.pair_loss, "reward.pair_loss", PAIR_LOSSES),
            *typed_config.find_unknown(self.packing, "reward.packing", typed_config.PACKINGS),
            *bounds.find_out_of_bounds(self, "reward"),
        ]

        # Combinations of fields that would silently drop a term or keep rows that nothing reads.
        rows = self.rollout_rows
        if self.replay:
            rows += self.replay_rows
        if self.rollout_bce and rows < 1:
            errors.append(
                f"reward.rollout_rows={self.rollout_rows}: reward.rollout_bce={self.rollout_bce} needs rows; "
                "set --config.reward.rollout_rows=64"
            )
        replay_is_half_set = bool(self.replay) != bool(self.replay_rows)
        replay_is_unread = self.replay and not self.rollout_bce
        if replay_is_half_set or replay_is_unread:
            errors.append(
                f"reward.replay={self.replay}, reward.replay_rows={self.replay_rows}, "
                f"reward.rollout_bce={self.rollout_bce}: only the term rollout_bce reads replayed rows; "
                "set all three, or neither of the first two"
            )
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> RewardUpdateConfig:
        """Read the `reward` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "reward")

    @property
    def reads_pairs(self) -> bool:
        """True if some term of the loss is computed from pairs."""
        return bool(self.pair_weight or self.pair_bce)


def rewards_from_logits(z: ArrayLike) -> jax.Array:
    """Logits -> rewards in (0, 1), p = sigmoid(z): f32 of the same shape."""
    return jax.nn.sigmoid(z)


def bce_loss(z: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of binary cross-entropies: f32[] from f32[N] logits, labels in [0, 1] and weights.

        loss = - sum_i w_i (y_i log sigmoid(z_i) + (1 - y_i) log(1 - sigmoid(z_i)))

    Rows of weight 0 contribute nothing to loss or gradient, even if their logit is NaN.
    """
    # Mask the inputs and not only the result: 0 * NaN is NaN, in the backward pass too.
    used = weights > 0
    z = jnp.where(used, z, 0.0)
    y = jnp.where(used, labels, 0.0)

    # log(1 - sigmoid(z)) = log_sigmoid(-z), which does not overflow for large z.
    nll = -(y * jax.nn.log_sigmoid(z) + (1.0 - y) * jax.nn.log_sigmoid(-z))
    return (jnp.where(used, weights, 0.0) * nll).sum()


def contrast_loss(z_pos: jax.Array, z_neg: jax.Array, kind: str) -> jax.Array:
    """Contrastive loss of each pair: f32[B] from f32[B] logits.

        loss = - log sigmoid(s_pos - s_neg),   s = z ("logit") or sigmoid(z) ("sigmoid")

    kind: one of PAIR_LOSSES.  Raises SetupError (a ValueError) for another kind.

    The module's docstring lists the gradients.
    """
    typed_config.raise_errors(typed_config.find_unknown(kind, "reward.pair_loss", PAIR_LOSSES))
    if kind == "logit":
        return -jax.nn.log_sigmoid(z_pos - z_neg)

    # The difference of two rewards is within (-1, 1), so this loss never reaches 0.
    return -jax.nn.log_sigmoid(rewards_from_logits(z_pos) - rewards_from_logits(z_neg))


def pointwise_pair_loss(z_pos: jax.Array, z_neg: jax.Array) -> jax.Array:
    """Pointwise cross-entropy of each pair, the mean over its two members: f32[B] from f32[B] logits.

    loss = -(log sigmoid(z_pos) + log(1 - sigmoid(z_neg))) / 2
    """
    return -(jax.nn.log_sigmoid(z_pos) + jax.nn.log_sigmoid(-z_neg)) / 2


def pair_terms(
    z_pos: jax.Array, z_neg: jax.Array, cfg: RewardUpdateConfig
) -> dict[str, tuple[float, jax.Array]]:
    """The terms of a pair's loss L: metric name -> (weight, unweighted loss f32[B]).

    Terms of weight 0 are left out and cost nothing.
    """
    terms = {}
    if cfg.pair_weight:
        terms["pair_loss"] = cfg.pair_weight, contrast_loss(z_pos, z_neg, cfg.pair_loss)
    if cfg.pair_bce:
        terms["pair_bce"] = cfg.pair_bce, pointwise_pair_loss(z_pos, z_neg)
    return terms


def pair_gradients(
    z_pos: jax.Array, z_neg: jax.Array, cfg: RewardUpdateConfig
) -> tuple[jax.Array, jax.Array]:
    """The gradients (dL/dz_pos, dL/dz_neg) of each pair's total loss, f32[B] each, for metrics.

    Computed in closed form, as the weighted sum of the rows of the table in the module's docstring.  jax.grad
    of the weighted sum of `pair_terms` differs by rounding (up to 7e-7).
    """
    # The contrast.
    p_pos, p_neg = rewards_from_logits(z_pos), rewards_from_logits(z_neg)
    if cfg.pair_loss == "logit":
        g = cfg.pair_weight * rewards_from_logits(z_neg - z_pos)
        grad_pos, grad_neg = -g, g
    else:
        g = cfg.pair_weight * rewards_from_logits(p_neg - p_pos)
        grad_pos, grad_neg = -g * p_pos * (1 - p_pos), g * p_neg * (1 - p_neg)

    # The pointwise term.
    return grad_pos - cfg.pair_bce * (1 - p_pos) / 2, grad_neg + cfg.pair_bce * p_neg / 2
