"""VerifyRM: a trunk with one logit on the last token, its rewards, losses and updates.

1. `make_score` reads rendered (question, reference, completion) rows and gives a logit z each.
2. `rewards` are p = sigmoid(z).
3. Before RL, `make_bce_update` trains on labelled rows (arXiv 2508.05613, training of VerifyRM), and
   `make_bce_accumulator` on batches whose microbatches differ in width.
4. In every Cooper step, `make_pair_update` contrasts verified positives with rewritten negatives (its
   second stage).

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
from cooper_jax.runtime import mesh, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import PairBatch, Params, ScoreBatch, TrainState

PAIR_LOSSES = ("logit", "sigmoid")

Metrics = dict[str, jax.Array]


# --- scores and losses -------------------------------------------------------------------------------


def rewards(z: jax.Array) -> jax.Array:
    """Logits -> rewards in (0, 1), p = sigmoid(z): f32 of the same shape."""
    return jax.nn.sigmoid(z)


def bce_loss(z: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted binary cross-entropy, summed: f32[] of f32[N] logits, labels in [0, 1] and weights.

        loss = - sum_i w_i (y_i log sigmoid(z_i) + (1 - y_i) log(1 - sigmoid(z_i)))

    Rows of weight 0 count for nothing, whatever their logit.
    """
    used = weights > 0
    z = jnp.where(used, z, 0.0)
    y = jnp.where(used, labels, 0.0)
    nll = -(y * jax.nn.log_sigmoid(z) + (1.0 - y) * jax.nn.log_sigmoid(-z))
    return (jnp.where(used, weights, 0.0) * nll).sum()


def pair_loss(z_pos: jax.Array, z_neg: jax.Array, kind: str) -> jax.Array:
    """Contrastive loss of each pair: f32[B] of f32[B] logits.

        loss = - log sigmoid(s_pos - s_neg),   s = z ("logit") or sigmoid(z) ("sigmoid")

    Gradients, with g = sigmoid(s_neg - s_pos) and p = sigmoid(z):

        "logit"      d/dz_pos = -g                       d/dz_neg = g
        "sigmoid"    d/dz_pos = -g p_pos (1 - p_pos)     d/dz_neg = g p_neg (1 - p_neg)

    Raises ValueError for another kind.
    """
    if kind == "logit":
        return -jax.nn.log_sigmoid(z_pos - z_neg)
    if kind == "sigmoid":
        return -jax.nn.log_sigmoid(rewards(z_pos) - rewards(z_neg))
    raise ValueError(f"reward.pair_loss is {kind!r}; it is one of {', '.join(PAIR_LOSSES)}")


def _read(
    params: Params,
    config: ModelConfig,
    batch: ScoreBatch,
    *,
    dtype: str,
    remat: bool,
    layout: Layout | None,
) -> jax.Array:
    """Logits f32[N].  A row without a valid token gets a finite one that means nothing."""
    tokens = jnp.where(batch.valid, batch.tokens, 0)  # padding may hold what no vocabulary has
    hidden = transformer.trunk(
        params, config, tokens, batch.valid, dtype=jnp.dtype(dtype), remat=remat, layout=layout
    )
    return transformer.score(params, config, hidden, batch.valid)


def _blank(batch: ScoreBatch, used: jax.Array) -> ScoreBatch:
    """Empty the rows that do not count, bool[N]: what they held cannot reach a gradient even as NaN."""
    return batch.replace(valid=batch.valid & used[:, None])


def make_score(
    config: ModelConfig,
    layout: Layout | None,
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
    cfg: Any,
    opt: optim.Optimiser,
    layout: Layout | None,
) -> Callable[[TrainState, ScoreBatch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """The jitted (state, ScoreBatch [N, S], labels f32[N], weights f32[N]) -> (state, metrics).

    cfg: the config's `reward` section (dtype, remat, microbatch).  The loss is the mean weighted by `weights`
    (at least 0; 0 leaves a row out); when all are 0 nothing moves.  The state given is donated.

    Metrics, f32[]: loss, accuracy (weighted share of rows whose z > 0 says what the label says) and
    `optim.apply`'s grad_norm, lr and skipped.
    """
    places, loss_fn = _places(config, layout), _bce(config, cfg, layout)

    def update(state, batch, labels, weights):
        total = weights.sum()
        share = weights / jnp.where(total > 0, total, 1.0)
        loss, grads, sums = optim.accumulate(
            loss_fn, state.params, (batch, labels, share), cfg.microbatch, layout, places
        )
        state, moved = optim.apply(state, grads, loss, opt, enabled=total > 0)
        return state, {"loss": loss} | {name: x.sum() for name, x in sums.items()} | moved

    return _jit(update, config, opt, layout)


def make_bce_accumulator(
    config: ModelConfig, cfg: Any, opt: optim.Optimiser, layout: Layout | None
) -> optim.Accumulator:
    """The same update in pieces, for batches whose microbatches differ in width.

    Rows are (ScoreBatch [N, S], labels f32[N], shares f32[N]); the shares of all microbatches of a batch add up to
    1, or its loss is not the mean.  cfg and metrics: as `make_bce_update`'s; of cfg.microbatch nothing is read.
    """
    specs = transformer.param_specs(config, head="score")
    return optim.make_accumulator(_bce(config, cfg, layout), ("accuracy",), opt, specs, layout)


def _bce(config: ModelConfig, cfg: Any, layout: Layout | None) -> Callable:
    """(params, (ScoreBatch, labels, shares)) -> (loss f32[], sums): weighted sums over the rows."""

    def loss_fn(params, piece):
        rows, y, w = piece
        z = _read(params, config, _blank(rows, w > 0), dtype=cfg.dtype, remat=cfg.remat, layout=layout)
        return bce_loss(z, y, w), {"accuracy": (w * ((z > 0) == (y > 0.5))).sum()}

    return loss_fn


def make_pair_update(
    config: ModelConfig,
    cfg: Any,
    opt: optim.Optimiser,
    layout: Layout | None,
) -> Callable[[TrainState, PairBatch], tuple[TrainState, Metrics]]:
    """The jitted (state, PairBatch) -> (state, metrics).

    cfg: the config's `reward` section (dtype, remat, microbatch in pairs, pair_loss).  The loss is the mean
    over the valid pairs of the whole batch; masked pairs weigh nothing, whatever they hold.  Without a valid
    pair state and moments stay as they are and every metric is 0.  The state given is donated.  Raises
    ValueError for another pair_loss, and for members of different widths.

    Metrics, f32[]: pair_loss, margin (mean s_pos - s_neg, in the contrast's own units), accuracy (share with
    z_pos > z_neg), positive_mean and negative_mean (rewards), valid (pairs), and `optim.apply`'s grad_norm,
    lr and skipped.
    """
    kind = cfg.pair_loss
    if kind not in PAIR_LOSSES:
        raise ValueError(f"reward.pair_loss is {kind!r}; it is one of {', '.join(PAIR_LOSSES)}")
    places = _places(config, layout)

    def update(state, batch):
        widths = batch.positive.tokens.shape[1], batch.negative.tokens.shape[1]
        if widths[0] != widths[1]:
            raise ValueError(f"positives are {widths[0]} tokens wide, negatives {widths[1]}: pad both alike")
        valid = batch.mask.sum().astype(jnp.float32)
        weights = batch.mask / jnp.maximum(valid, 1.0)

        def loss_fn(params, piece):
            pairs, w = piece
            # Members side by side, [2 m, S]: one pass, and a pair stays on its shard.
            both = jax.tree.map(
                lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, a.shape[1]), pairs.positive, pairs.negative
            )
            both = _blank(both, jnp.repeat(pairs.mask, 2))
            z = _read(params, config, both, dtype=cfg.dtype, remat=cfg.remat, layout=layout)
            z_pos, z_neg = z[0::2], z[1::2]
            loss = (w * pair_loss(z_pos, z_neg, kind)).sum()
            p_pos, p_neg = rewards(z_pos), rewards(z_neg)
            s_pos, s_neg = (z_pos, z_neg) if kind == "logit" else (p_pos, p_neg)
            sums = {
                "margin": w * (s_pos - s_neg),
                "accuracy": w * (z_pos > z_neg),
                "positive_mean": w * p_pos,
                "negative_mean": w * p_neg,
            }
            return loss, {name: x.sum() for name, x in sums.items()}

        loss, grads, sums = optim.accumulate(
            loss_fn, state.params, (batch, weights), cfg.microbatch, layout, places
        )
        state, moved = optim.apply(state, grads, loss, opt, enabled=valid > 0)
        means = {name: x.sum() for name, x in sums.items()}
        return state, {"pair_loss": loss, "valid": valid} | means | moved

    return _jit(update, config, opt, layout)


def _places(config: ModelConfig, layout: Layout | None) -> Any:
    return None if layout is None else mesh.shardings(layout, transformer.param_specs(config, head="score"))


def _jit(update: Callable, config: ModelConfig, opt: optim.Optimiser, layout: Layout | None) -> Callable:
    """jit with the state donated, and on a mesh left where its parameters lie."""
    if layout is None:
        return jax.jit(update, donate_argnums=0)
    places = optim.state_shardings(opt, transformer.param_specs(config, head="score"), layout)
    return jax.jit(update, donate_argnums=0, out_shardings=(places, layout.replicated))
