"""VerifyRM: a trunk with one logit on the last token, its scores and updates.

1. `make_score` reads rendered (question, reference, completion) rows and gives a logit z each.
2. `rewards` are p = sigmoid(z); `losses.py` has all losses, and how they move the members of a pair.
3. Before RL, `make_bce_update` trains on labelled rows (arXiv 2508.05613, training of VerifyRM), and
   `make_bce_accumulator` on batches whose microbatches differ in width.
4. In every Cooper step, `make_update` contrasts verified positives with negatives (its second stage), and may
   learn from rollouts that the rule has labelled (ours).

**Two contrasts, and they differ.**  The loss of a pair is -log sigmoid(s_pos - s_neg).  The released code
takes s = z, the raw logit, while its rewards are sigmoid(z).  "logit" is that: the two members are pushed
apart by equal and opposite amounts, so what both share (a style, a shortcut) cancels to first order, and the
loss falls to 0.  "sigmoid" takes s = sigmoid(z), the rewards themselves: each member's push carries its own p
(1 - p), so the common mode moves too, a saturated member stops moving, and the loss lies between log(1 + 1/e)
= .313 and log(1 + e) = 1.313.

Departures: losses are normalised by the number of valid pairs of the whole batch, where the released code
averages the means of microbatches and ranks; a batch without a valid pair moves nothing.

    N  rows   B  pairs   S  tokens of a row   D  width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


# --- scores ------------------------------------------------------------------------------------------


def _read(
    params: Params,
    config: ModelConfig,
    batch: ScoreBatch,
    *,
    dtype: str,
    remat: bool,
    layout: Layout,
) -> jax.Array:
    """Logits f32[N].  A row without a valid token gets a finite one that means nothing."""
    tokens = jnp.where(batch.valid, batch.tokens, 0)  # padding may hold what no vocabulary has
    hidden = transformer.hidden_states(
        params, config, tokens, batch.valid, dtype=jnp.dtype(dtype), remat=remat, layout=layout
    )
    return transformer.score_last_token(params, config, hidden, batch.valid)


def _blank(batch: ScoreBatch, used: jax.Array) -> ScoreBatch:
    """Empty the rows that do not count, bool[N]: what they held cannot reach a gradient even as NaN."""
    return batch.replace(valid=batch.valid & used[:, None])


def make_score_fn(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: str,
    microbatch: int,
) -> Callable[[Params, ScoreBatch], jax.Array]:
    """The jitted (params, ScoreBatch [N, S]) -> logits z f32[N].

    Rows run in microbatches whose composition depends on N alone, whatever finished first.
    """

    def score(params, batch):
        def run(rows):
            return _read(params, config, rows, dtype=dtype, remat=False, layout=layout)

        return optim.map_rows(run, batch, microbatch, layout)

    return jax.jit(score)


# --- updates -----------------------------------------------------------------------------------------


def make_bce_update(
    config: ModelConfig,
    cfg: RewardUpdateConfig,
    opt: optim.Optimiser,
    layout: Layout,
) -> Callable[[TrainState, ScoreBatch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """The jitted (state, ScoreBatch [N, S], labels f32[N], weights f32[N]) -> (state, metrics).

    Of cfg, dtype, remat and microbatch are read.  The loss is the mean weighted by `weights` (at least 0; 0
    leaves a row out); when all are 0 nothing moves.  The state given is donated.

    Metrics, f32[]: loss, accuracy (weighted share of rows whose z > 0 says what the label says) and
    `optim.apply_update`'s grad_norm, lr and skipped.
    """
    places, loss_fn = _places(config, layout), _bce(config, cfg, layout)

    def update(state, batch, labels, weights):
        total = weights.sum()
        share = weights / jnp.where(total > 0, total, 1.0)
        loss, grads, sums = optim.accumulate_gradients(
            loss_fn, state.params, (batch, labels, share), cfg.microbatch, layout, places
        )
        state, moved = optim.apply_update(state, grads, loss, opt, enabled=total > 0)
        return state, {"loss": loss} | {name: x.sum() for name, x in sums.items()} | moved

    return _jit(update, config, opt, layout)


def make_bce_accumulator(
    config: ModelConfig, cfg: RewardUpdateConfig, opt: optim.Optimiser, layout: Layout
) -> optim.Accumulator:
    """The same update in pieces, for batches whose microbatches differ in width.

    Rows are (ScoreBatch [N, S], labels f32[N], shares f32[N]); the shares of all microbatches of a batch add
    up to 1, or its loss is not the mean.  cfg and metrics: as `make_bce_update`'s; of cfg.microbatch nothing
    is read.
    """
    specs = transformer.param_specs(config, head="score")
    return optim.make_accumulator(_bce(config, cfg, layout), ("accuracy",), opt, specs, layout)


def _bce(config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout) -> Callable:
    """(params, (ScoreBatch, labels, shares)) -> (loss f32[], sums): weighted sums over the rows."""

    def loss_fn(params, piece):
        rows, y, w = piece
        z = _read(params, config, _blank(rows, w > 0), dtype=cfg.dtype, remat=cfg.remat, layout=layout)
        return bce_loss(z, y, w), {"accuracy": (w * ((z > 0) == (y > 0.5))).sum()}

    return loss_fn


def make_reward_update(
    config: ModelConfig,
    cfg: RewardUpdateConfig,
    opt: optim.Optimiser,
    layout: Layout,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted (state, PairBatch or None, LabelledBatch or None) -> (state, metrics): one optimiser step.

        loss = mean over the valid pairs of losses.pair_terms  +  rollout_bce * losses.bce_loss of the rows

    Pairs and rows are read where their terms weigh something, and cost nothing elsewhere; cfg.microbatch
    counts pairs in the one and rows in the other.  The mean is over the whole batch's valid pairs; masked
    pairs and rows of weight 0 count for nothing, whatever they hold; the rows' weights are taken as they are.
    Where neither a pair is valid nor a row weighs something, state and moments stay as they are.  The state
    given is donated.  Raises ValueError for members of different widths.

    Metrics, f32[]: loss and `optim.apply_update`'s grad_norm, lr and skipped; of pairs, means over the valid
    ones (0 without one): pair_loss and pair_bce (unweighted, and where they weigh something), margin (s_pos -
    s_neg, in the contrast's own units), accuracy (share with z_pos > z_neg), positive_mean and negative_mean
    (rewards), positive_saturation and negative_saturation (p (1 - p): 0 is saturated, .25 undecided),
    common_push and difference_push (losses.py), valid (pairs); of rows: rollout_bce, rollout_accuracy
    (weighted share of rows whose z > 0 says what the label says), rollout_rows.
    """
    places, rows_loss = _places(config, layout), _bce(config, cfg, layout)

    def pair_loss(params, piece):
        pairs, w = piece
        # Members side by side, [2 m, S]: one pass, and a pair stays on its shard.
        both = jax.tree.map(
            lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, a.shape[1]), pairs.positive, pairs.negative
        )
        both = _blank(both, jnp.repeat(pairs.mask, 2))
        z = _read(params, config, both, dtype=cfg.dtype, remat=cfg.remat, layout=layout)
        z_pos, z_neg = z[0::2], z[1::2]
        terms = reward_losses.pair_terms(z_pos, z_neg, cfg)
        loss = sum(weight * (w * term).sum() for weight, term in terms.values())
        p_pos, p_neg = rewards_from_logits(z_pos), rewards_from_logits(z_neg)
        s_pos, s_neg = (z_pos, z_neg) if cfg.pair_loss == "logit" else (p_pos, p_neg)
        d_pos, d_neg = reward_losses.pair_gradients(z_pos, z_neg, cfg)
        means = {name: term for name, (_, term) in terms.items()} | {
            "margin": s_pos - s_neg,
            "accuracy": z_pos > z_neg,
            "positive_mean": p_pos,
            "negative_mean": p_neg,
            "positive_saturation": p_pos * (1 - p_pos),
            "negative_saturation": p_neg * (1 - p_neg),
            "common_push": -(d_pos + d_neg) / 2,
            "difference_push": -(d_pos - d_neg) / 2,
        }
        return loss, {name: (w * x).sum() for name, x in means.items()}

    def of_pairs(params, batch):
        widths = batch.positive.tokens.shape[1], batch.negative.tokens.shape[1]
        if widths[0] != widths[1]:
            raise ValueError(f"positives are {widths[0]} tokens wide, negatives {widths[1]}: pad both alike")
        valid = batch.mask.sum().astype(jnp.float32)
        weights = batch.mask / jnp.maximum(valid, 1.0)
        loss, grads, sums = optim.accumulate_gradients(
            pair_loss, params, (batch, weights), cfg.microbatch, layout, places
        )
        return loss, grads, valid > 0, {"valid": valid} | {name: x.sum() for name, x in sums.items()}

    def of_rows(params, batch):
        piece = batch.rows, batch.labels, batch.weights
        loss, grads, sums = optim.accumulate_gradients(
            rows_loss, params, piece, cfg.microbatch, layout, places
        )
        total = batch.weights.sum()
        metrics = {
            "rollout_bce": loss,
            "rollout_accuracy": sums["accuracy"].sum() / jnp.where(total > 0, total, 1.0),
            "rollout_rows": (batch.weights > 0).sum().astype(jnp.float32),
        }
        weight = cfg.rollout_bce
        return weight * loss, jax.tree.map(lambda x: weight * x, grads), total > 0, metrics

    def update(state: TrainState, pairs: PairBatch | None = None, labelled: LabelledBatch | None = None):
        parts = []
        if pairs is not None and cfg.reads_pairs:
            parts.append(of_pairs(state.params, pairs))
        if labelled is not None and cfg.rollout_bce:
            parts.append(of_rows(state.params, labelled))
        if not parts:
            raise ValueError("a reward-model update needs pairs or labelled rows whose terms weigh something")
        loss, grads, enabled, metrics = parts[0]
        for more in parts[1:]:
            loss, grads = loss + more[0], jax.tree.map(jnp.add, grads, more[1])
            enabled, metrics = enabled | more[2], metrics | more[3]
        state, moved = optim.apply_update(state, grads, loss, opt, enabled=enabled)
        return state, {"loss": loss} | metrics | moved

    return _jit(update, config, opt, layout)


def _places(config: ModelConfig, layout: Layout) -> Any:
    return mesh.make_shardings(layout, transformer.param_specs(config, head="score"))


def _jit(update: Callable, config: ModelConfig, opt: optim.Optimiser, layout: Layout) -> Callable:
    """jit with the state donated and left where its parameters lie."""
    places = optim.state_shardings(opt, transformer.param_specs(config, head="score"), layout)
    return jax.jit(update, donate_argnums=0, out_shardings=(places, layout.replicated))
