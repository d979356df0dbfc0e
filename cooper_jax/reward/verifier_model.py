"""VerifyRM: a transformer with one logit on the last token, its scores and its updates.

1. `make_score_fn` reads rendered (question, reference, completion) rows and gives a logit z each; the reward
   is p = sigmoid(z).
2. Before RL, `make_bce_update` trains on labelled rows (arXiv 2508.05613, training of VerifyRM), and
   `make_bce_accumulator` on batches whose microbatches differ in width.
3. In every Cooper step, `make_reward_update` contrasts verified positives with negatives (the paper's second
   stage), and may learn from rollouts that the rule has labelled (ours).

**There are two contrasts, and they differ.**  The loss of a pair is -log sigmoid(s_pos - s_neg).  The
released code takes s = z, the raw logit, while its rewards are sigmoid(z).

* "logit" is s = z.  The two members are moved by equal and opposite amounts, so what both share (a style, a
  shortcut) cancels to first order, and the loss falls to 0.
* "sigmoid" is s = sigmoid(z), the rewards themselves.  Each member's gradient has its own factor p (1 - p),
  so the common mode moves too, a saturated member stops moving, and the loss lies between log(1 + 1/e) = .313
  and log(1 + e) = 1.313.

reward_losses.py has all losses, and a table of how they move the members of a pair.

Departures from the released code: losses are normalised by the number of valid pairs of the whole batch
(there: the means of microbatches and ranks are averaged); a batch without a valid pair changes nothing.

    N  rows   B  pairs   m  pairs of a microbatch   S  tokens of a row   D  width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.reward import reward_losses
from cooper_jax.reward.reward_losses import RewardUpdateConfig, bce_loss, rewards_from_logits
from cooper_jax.runtime import mesh, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import LabelledBatch, PairBatch, Params, ScoreBatch, TrainState

Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, Metrics]]


# --- scores ------------------------------------------------------------------------------------------


def _compute_logits(
    params: Params,
    config: ModelConfig,
    batch: ScoreBatch,
    *,
    dtype: str,
    remat: bool,
    layout: Layout,
) -> jax.Array:
    """Logits f32[N].  A row without a valid token gets a finite value that means nothing."""
    tokens = jnp.where(batch.valid, batch.tokens, 0)  # padding may hold ids outside the vocabulary
    hidden = transformer.hidden_states(
        params, config, tokens, batch.valid, dtype=jnp.dtype(dtype), remat=remat, layout=layout
    )
    return transformer.score_last_token(params, config, hidden, batch.valid)


def _mask_rows(batch: ScoreBatch, used: jax.Array) -> ScoreBatch:
    """Empty the rows that are not used, bool[N]: their contents, NaN included, then reach no gradient."""
    return dataclasses.replace(batch, valid=batch.valid & used[:, None])


def make_score_fn(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: str,
    microbatch: int,
) -> Callable[[Params, ScoreBatch], jax.Array]:
    """The jitted (params, ScoreBatch [N, S]) -> logits z f32[N].

    Rows run in microbatches whose composition depends on N alone, in whatever order responses ended.
    """

    def score(params: Params, batch: ScoreBatch) -> jax.Array:
        def score_rows(rows: ScoreBatch) -> jax.Array:
            return _compute_logits(params, config, rows, dtype=dtype, remat=False, layout=layout)

        return optim.map_rows(score_rows, batch, microbatch, layout)

    return jax.jit(score)


# --- updates on labelled rows ------------------------------------------------------------------------


def make_bce_update(
    config: ModelConfig,
    cfg: RewardUpdateConfig,
    opt: optim.Optimiser,
    layout: Layout,
) -> Callable[[TrainState, ScoreBatch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """The jitted (state, ScoreBatch [N, S], labels f32[N], weights f32[N]) -> (state, metrics).

    The loss is the mean over the rows weighted by `weights` (at least 0; 0 leaves a row out); when all are 0
    nothing changes.  The state given is donated.

    Args:
      cfg: only dtype, remat and microbatch are read.

    Metrics, f32[]: loss, accuracy (weighted share of rows where z > 0 agrees with the label) and
    `optim.apply_update`'s grad_norm, lr and skipped.
    """
    shardings = _param_shardings(config, layout)
    loss_fn = _make_bce_loss_fn(config, cfg, layout)

    def update(
        state: TrainState, batch: ScoreBatch, labels: jax.Array, weights: jax.Array
    ) -> tuple[TrainState, Metrics]:
        # Shares of the whole batch, so that the losses of microbatches add up to the mean.
        total = weights.sum()
        shares = weights / jnp.where(total > 0, total, 1.0)
        loss, grads, sums = optim.accumulate_gradients(
            loss_fn, state.params, (batch, labels, shares), cfg.microbatch, layout, shardings
        )
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=total > 0)
        row_metrics = {name: x.sum() for name, x in sums.items()}  # [M] microbatches -> f32[]
        return state, {"loss": loss} | row_metrics | update_metrics

    return _jit_update(update, config, opt, layout)


def make_bce_accumulator(
    config: ModelConfig, cfg: RewardUpdateConfig, opt: optim.Optimiser, layout: Layout
) -> optim.Accumulator:
    """The same update in pieces, for batches whose microbatches differ in width.

    Rows are (ScoreBatch [N, S], labels f32[N], shares f32[N]).  The shares of all microbatches of a batch
    must sum to 1, or its loss is not the mean.  Metrics as in `make_bce_update`.

    Args:
      cfg: only dtype and remat are read.
    """
    specs = transformer.param_specs(config, head="score")
    return optim.make_accumulator(_make_bce_loss_fn(config, cfg, layout), ("accuracy",), opt, specs, layout)


def _make_bce_loss_fn(config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout) -> LossFn:
    """(params, (ScoreBatch, labels, shares)) -> (loss f32[], sums): weighted sums over the rows."""

    def loss_fn(params: Params, piece: tuple[ScoreBatch, jax.Array, jax.Array]) -> tuple[jax.Array, Metrics]:
        rows, labels, shares = piece
        rows = _mask_rows(rows, shares > 0)
        z = _compute_logits(params, config, rows, dtype=cfg.dtype, remat=cfg.remat, layout=layout)  # f32[m]
        correct = (z > 0) == (labels > 0.5)
        return bce_loss(z, labels, shares), {"accuracy": (shares * correct).sum()}

    return loss_fn


# --- the update of a Cooper step ---------------------------------------------------------------------


class _PartOfUpdate(NamedTuple):
    """The contribution of pairs, or of labelled rows, to one update."""

    loss: jax.Array  # f32[]
    grads: Params
    enabled: jax.Array  # bool[]: some pair is valid, or some row has a weight
    metrics: Metrics


def make_reward_update(
    config: ModelConfig,
    cfg: RewardUpdateConfig,
    opt: optim.Optimiser,
    layout: Layout,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted (state, PairBatch or None, LabelledBatch or None) -> (state, metrics): one optimiser step.

        loss = mean over the valid pairs of reward_losses.pair_terms  +  rollout_bce * bce_loss of the rows

    Pairs and rows are read only where a term of theirs has a weight, and cost nothing otherwise;
    cfg.microbatch counts pairs for the one and rows for the other.  The mean is over the whole batch's valid
    pairs.  Masked pairs and rows of weight 0 change nothing, whatever they hold; the rows' weights are not
    normalised.  Without a valid pair and a row with a weight, state and moments stay as they are.  The state
    given is donated.

    Raises ValueError for positives and negatives of different widths, and where there is nothing to update
    on.

    Metrics, f32[]:
      loss, and `optim.apply_update`'s grad_norm, lr and skipped.  Of pairs, means over the valid ones (0
      without one): pair_loss and pair_bce (unweighted, where they have a weight), margin (s_pos - s_neg, in
      the contrast's own units), accuracy (share with z_pos > z_neg), positive_mean and negative_mean
      (rewards), positive_saturation and negative_saturation (p (1 - p): 0 is saturated, .25 undecided),
      common_push and difference_push (reward_losses.py); and valid, their number.  Of rows: rollout_bce,
      rollout_accuracy (weighted share of rows where z > 0 agrees with the label), and rollout_rows, their
      number.
    """
    shardings = _param_shardings(config, layout)
    rows_loss_fn = _make_bce_loss_fn(config, cfg, layout)
    pairs_loss_fn = _make_pairs_loss_fn(config, cfg, layout)

    def use_pairs(params: Params, batch: PairBatch) -> _PartOfUpdate:
        widths = batch.positive.tokens.shape[1], batch.negative.tokens.shape[1]
        if widths[0] != widths[1]:
            raise ValueError(f"positives are {widths[0]} tokens wide, negatives {widths[1]}: pad both alike")

        # The mean over the whole batch's valid pairs: each has the same weight in whichever microbatch it is.
        valid = batch.mask.sum().astype(jnp.float32)
        weights = batch.mask / jnp.maximum(valid, 1.0)  # f32[B]
        loss, grads, sums = optim.accumulate_gradients(
            pairs_loss_fn, params, (batch, weights), cfg.microbatch, layout, shardings
        )
        metrics = {"valid": valid} | {name: x.sum() for name, x in sums.items()}
        return _PartOfUpdate(loss, grads, valid > 0, metrics)

    def use_rows(params: Params, batch: LabelledBatch) -> _PartOfUpdate:
        loss, grads, sums = optim.accumulate_gradients(
            rows_loss_fn,
            params,
            (batch.rows, batch.labels, batch.weights),
            cfg.microbatch,
            layout,
            shardings,
        )
        total = batch.weights.sum()
        metrics = {
            "rollout_bce": loss,
            "rollout_accuracy": sums["accuracy"].sum() / jnp.where(total > 0, total, 1.0),
            "rollout_rows": (batch.weights > 0).sum().astype(jnp.float32),
        }
        weight = cfg.rollout_bce
        weighted_grads = jax.tree.map(lambda x: weight * x, grads)
        return _PartOfUpdate(weight * loss, weighted_grads, total > 0, metrics)

    def update(
        state: TrainState, pairs: PairBatch | None = None, labelled: LabelledBatch | None = None
    ) -> tuple[TrainState, Metrics]:
        parts = []
        if pairs is not None and cfg.reads_pairs:
            parts.append(use_pairs(state.params, pairs))
        if labelled is not None and cfg.rollout_bce:
            parts.append(use_rows(state.params, labelled))
        if not parts:
            raise ValueError("a reward-model update needs pairs or labelled rows whose terms have a weight")

        # The gradient of a sum of losses is the sum of their gradients: one optimiser step for both.
        loss, grads, enabled, metrics = parts[0]
        for part in parts[1:]:
            loss, grads = loss + part.loss, jax.tree.map(jnp.add, grads, part.grads)
            enabled, metrics = enabled | part.enabled, metrics | part.metrics
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=enabled)
        return state, {"loss": loss} | metrics | update_metrics

    return _jit_update(update, config, opt, layout)


def _make_pairs_loss_fn(config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout) -> LossFn:
    """(params, (PairBatch, weights)) -> (loss f32[], sums): weighted sums over the pairs."""

    def loss_fn(params: Params, piece: tuple[PairBatch, jax.Array]) -> tuple[jax.Array, Metrics]:
        pairs, weights = piece  # [m], f32[m]

        # The members of a pair side by side, [2 m, S]: one forward pass, and a pair stays on its shard.
        rows = jax.tree.map(
            lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, a.shape[1]), pairs.positive, pairs.negative
        )
        rows = _mask_rows(rows, jnp.repeat(pairs.mask, 2))
        z = _compute_logits(params, config, rows, dtype=cfg.dtype, remat=cfg.remat, layout=layout)
        z_pos, z_neg = z[0::2], z[1::2]  # f32[m]

        terms = reward_losses.pair_terms(z_pos, z_neg, cfg)
        weighted_terms = [term_weight * (weights * term).sum() for term_weight, term in terms.values()]
        loss = cast(jax.Array, sum(weighted_terms))  # some term has a weight, or no pairs are read

        p_pos, p_neg = rewards_from_logits(z_pos), rewards_from_logits(z_neg)
        # The contrast's own scores: logits, or rewards.
        s_pos, s_neg = (z_pos, z_neg) if cfg.pair_loss == "logit" else (p_pos, p_neg)
        d_pos, d_neg = reward_losses.pair_gradients(z_pos, z_neg, cfg)
        each_pair = {name: term for name, (_, term) in terms.items()} | {
            "margin": s_pos - s_neg,
            "accuracy": z_pos > z_neg,
            "positive_mean": p_pos,
            "negative_mean": p_neg,
            "positive_saturation": p_pos * (1 - p_pos),
            "negative_saturation": p_neg * (1 - p_neg),
            "common_push": -(d_pos + d_neg) / 2,
            "difference_push": -(d_pos - d_neg) / 2,
        }
        return loss, {name: (weights * x).sum() for name, x in each_pair.items()}

    return loss_fn


def _param_shardings(config: ModelConfig, layout: Layout) -> Any:
    return mesh.make_shardings(layout, transformer.param_specs(config, head="score"))


def _jit_update(update: Callable, config: ModelConfig, opt: optim.Optimiser, layout: Layout) -> Callable:
    """Jit an update with its state donated; the new state keeps the old one's shardings."""
    shardings = optim.state_shardings(opt, transformer.param_specs(config, head="score"), layout)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, layout.replicated))
