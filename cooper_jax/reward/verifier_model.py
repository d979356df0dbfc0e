"""VerifyRM, the reward model: a transformer with one logit on the last token; its scores and its updates.

1. `make_score_fn` computes a logit z for each rendered (question, reference, completion) row; the reward is
   p = sigmoid(z).
2. Before RL, `make_bce_update` trains on labelled rows (arXiv 2508.05613, training of VerifyRM).
   `make_bce_accumulator` does the same for batches whose microbatches differ in width.
3. In every Cooper step, `make_reward_update` contrasts verified positives with negatives (the paper's second
   stage).  It can also train on rollouts that the rule has labelled (our extension).

There are two kinds of contrast.  The loss of a pair is -log sigmoid(s_pos - s_neg), and `reward.pair_loss`
chooses s.  The released code uses the raw logit z, although its rewards are sigmoid(z).

* "logit": s = z.  The gradients of the two members are equal and opposite, so the effect on what both share
  (a style, a shortcut) cancels to first order, and the loss can fall to 0.
* "sigmoid": s = sigmoid(z), the reward itself.  Each member's gradient has its own factor p (1 - p), so the
  effect on what both share does not cancel, and a member with p near 0 or 1 gets no gradient.  The loss stays
  between log(1 + 1/e) = .313 and log(1 + e) = 1.313.

reward_losses.py defines all losses and has a table of their gradients.

Departures from the released code: losses are normalised by the number of valid pairs in the whole batch
(there, the means of microbatches and ranks are averaged); a batch without a valid pair changes nothing.

    N  rows   B  pairs   m  rows or pairs of a microbatch   S  tokens of a row   D  width
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.reward import reward_losses
from cooper_jax.reward.reward_losses import RewardUpdateConfig, bce_loss, rewards_from_logits
from cooper_jax.runtime import mesh, optim, packed_rows
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import (
    LabelledBatch,
    PackedLabelled,
    PackedPairs,
    PackedRows,
    PairBatch,
    Params,
    ScoreBatch,
    TrainState,
)

Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, Metrics]]


# --- scores ------------------------------------------------------------------------------------------


def _compute_logits(
    params: Params,
    model_config: ModelConfig,
    batch: ScoreBatch,
    *,
    dtype: str,
    remat: bool,
    layout: Layout,
) -> jax.Array:
    """Logits f32[N].  The logit of a row without a valid token is finite but meaningless."""
    tokens = jnp.where(batch.valid, batch.tokens, 0)  # padding may hold ids outside the vocabulary
    hidden = transformer.hidden_states(
        params, model_config, tokens, batch.valid, dtype=jnp.dtype(dtype), remat=remat, layout=layout
    )
    return transformer.score_last_token(params, model_config, hidden, batch.valid)


def _compute_packed_logits(
    params: Params,
    model_config: ModelConfig,
    packed: PackedRows,  # one microbatch: leaves [R, ..]
    *,
    dtype: str,
    remat: bool,
    layout: Layout,
) -> jax.Array:
    """Logits f32[R * K] of the sequences of packed rows; where there is none, finite but meaningless."""
    hidden = transformer.packed_hidden_states(
        params,
        model_config,
        packed.tokens,
        packed.segments,
        packed.positions,
        dtype=jnp.dtype(dtype),
        remat=remat,
        layout=layout,
    )
    final = jnp.take_along_axis(hidden, packed.predictors[:, :, None], axis=1)  # [R, K, D]
    return transformer.score_hidden(params, final).reshape(-1)


def _mask_rows(batch: ScoreBatch, used: jax.Array) -> ScoreBatch:
    """Mark all tokens invalid in the rows where `used`, bool[N], is False.

    These rows then contribute no gradient, even if they contain NaN.
    """
    return dataclasses.replace(batch, valid=batch.valid & used[:, None])


def make_score_fn(
    model_config: ModelConfig,
    layout: Layout,
    *,
    dtype: str,
    microbatch: int,
) -> Callable[[Params, ScoreBatch], jax.Array]:
    """Make the jitted function (params, ScoreBatch [N, S]) -> logits z f32[N].

    Rows run in microbatches whose composition depends only on N, not on the order in which responses ended.
    Instead of a ScoreBatch it takes PackedRows, too, which have their own microbatches; then the logits are
    f32[2 * M * R], and the first of them are those of the sequences in order.
    """

    # The forward pass alone needs no rematerialisation; microbatches bound its activation memory.
    options: dict[str, Any] = dict(dtype=dtype, remat=False, layout=layout)

    def score(params: Params, batch: ScoreBatch | PackedRows) -> jax.Array:
        if isinstance(batch, PackedRows):
            return score_packed(params, batch)

        def score_rows(rows: ScoreBatch) -> jax.Array:
            return _compute_logits(params, model_config, rows, **options)

        return optim.map_rows(score_rows, batch, microbatch, layout)

    def score_packed(params: Params, packed: PackedRows) -> jax.Array:
        def score_microbatch(i: jax.Array, out: jax.Array) -> jax.Array:
            rows = packed_rows.take_microbatch(packed, i)
            logits = _compute_packed_logits(params, model_config, rows, **options)
            return packed_rows.set_rows(out, rows.rows.reshape(-1), logits)

        # There is room for each sequence, or pair of sequences, in a row of its own.
        microbatches, size = packed.tokens.shape[:2]
        count = microbatches if packed.count is None else packed.count
        out = jnp.zeros(2 * microbatches * size, jnp.float32)
        return jax.lax.fori_loop(0, count, score_microbatch, out)

    return jax.jit(score, compiler_options=layout.compiler_options)


# --- updates on labelled rows ------------------------------------------------------------------------


def make_bce_update(
    model_config: ModelConfig,
    cfg: RewardUpdateConfig,
    opt: optim.Optimiser,
    layout: Layout,
) -> Callable[[TrainState, ScoreBatch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """Make the jitted function (state, ScoreBatch [N, S], labels f32[N], weights f32[N]) -> (state, metrics).

    The loss is the weighted mean of the rows' cross-entropy.  Weights are non-negative; a row of weight 0 is
    left out, and if all weights are 0 the state does not change.  The input state is donated.

    Args:
      cfg: only dtype, remat and microbatch are read.

    Metrics, f32[]: loss, accuracy (weighted share of rows where z > 0 agrees with the label), and grad_norm,
    lr and skipped of `optim.apply_update`.
    """
    shardings = _param_shardings(model_config, layout)
    loss_fn = _make_bce_loss_fn(model_config, cfg, layout)

    def update(
        state: TrainState, batch: ScoreBatch, labels: jax.Array, weights: jax.Array
    ) -> tuple[TrainState, Metrics]:
        # Weights are normalised over the whole batch, so the sums of the microbatches add up to its mean.
        total = weights.sum()
        shares = weights / jnp.where(total > 0, total, 1.0)
        loss, grads, sums = optim.accumulate_gradients(
            loss_fn, state.params, (batch, labels, shares), cfg.microbatch, layout, shardings
        )

        # If all weights are 0, `enabled` keeps the old state without a decision of the host.
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=total > 0)
        row_metrics = {name: x.sum() for name, x in sums.items()}  # f32[microbatches] -> f32[]
        return state, {"loss": loss} | row_metrics | update_metrics

    return _jit_update(update, model_config, opt, layout)


def make_bce_accumulator(
    model_config: ModelConfig, cfg: RewardUpdateConfig, opt: optim.Optimiser, layout: Layout
) -> optim.Accumulator:
    """The update of `make_bce_update` split into microbatches, which may differ in width.

    A microbatch is (ScoreBatch [N, S], labels f32[N], shares f32[N]).  The shares of all microbatches of a
    batch must sum to 1; otherwise the loss is not their mean.  Metrics as in `make_bce_update`.

    Args:
      cfg: only dtype and remat are read.
    """
    specs = transformer.param_specs(model_config, head="score")
    return optim.make_accumulator(
        _make_bce_loss_fn(model_config, cfg, layout), ("accuracy",), opt, specs, layout
    )


def _make_bce_loss_fn(model_config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout) -> LossFn:
    """The loss function (params, (ScoreBatch, labels, shares)) -> (loss f32[], metrics).

    Loss and metrics are sums over the rows, weighted by their shares.
    """

    def loss_fn(
        params: Params, microbatch: tuple[ScoreBatch, jax.Array, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        rows, labels, shares = microbatch  # [m, S], f32[m], f32[m]

        # Padding rows have share 0; they must not reach the gradient even as NaN.
        rows = _mask_rows(rows, shares > 0)
        z = _compute_logits(
            params, model_config, rows, dtype=cfg.dtype, remat=cfg.remat, layout=layout
        )  # f32[m]
        return _bce_terms(z, labels, shares)

    return loss_fn


def _bce_terms(z: jax.Array, labels: jax.Array, shares: jax.Array) -> tuple[jax.Array, Metrics]:
    """The loss of rows, and the sum of their accuracies; all arguments f32[m]."""
    # z > 0 is a reward above one half.
    correct = (z > 0) == (labels > 0.5)
    return bce_loss(z, labels, shares), {"accuracy": (shares * correct).sum()}


# --- the update of a Cooper step ---------------------------------------------------------------------


class _PartOfUpdate(NamedTuple):
    """The pairs' part of one update's loss and gradient, or the labelled rows' part."""

    loss: jax.Array  # f32[]
    grads: Params
    enabled: jax.Array  # bool[]: False if no pair is valid, or all rows have weight 0
    metrics: Metrics


def make_reward_update(
    model_config: ModelConfig,
    cfg: RewardUpdateConfig,
    opt: optim.Optimiser,
    layout: Layout,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Make the jitted function (state, PairBatch or None, LabelledBatch or None) -> (state, metrics).

    Instead of these it takes PackedPairs and PackedLabelled, too.  These have their own microbatches, and no masked
    pair or row of weight 0 may be among their sequences.

    One call is one optimiser step on

        loss = mean over the valid pairs of the weighted sum of reward_losses.pair_terms
               + rollout_bce * bce_loss of the rows

    * Pairs are read only if pair_weight or pair_bce is not 0, and rows only if rollout_bce is not 0.  Data
      that are not read cost no computation.
    * The mean is over the valid pairs of the whole batch.  The rows' weights are not normalised.
    * Masked pairs and rows of weight 0 change nothing, whatever they contain.  If all are masked or of weight
      0, parameters and optimiser moments do not change.
    * A microbatch is cfg.microbatch pairs, or cfg.microbatch rows.
    * The input state is donated.

    Raises ValueError if positives and negatives differ in width, and if neither pairs nor rows are read.

    Metrics, f32[]:
      both         loss; grad_norm, lr and skipped of `optim.apply_update`
      pairs        means over the valid pairs, 0 if there is none:
                     pair_loss, pair_bce: unweighted; present if their weight is not 0
                     margin: s_pos - s_neg, logits or rewards depending on the contrast
                     accuracy: share with z_pos > z_neg
                     positive_mean, negative_mean: rewards
                     positive_saturation, negative_saturation: p (1 - p), which is 0 for a saturated member
                       and .25 for an undecided one
                     common_push, difference_push: see reward_losses.py
                   valid: the number of valid pairs
      rows         rollout_bce: unweighted
                   rollout_accuracy: weighted share of rows where z > 0 agrees with the label
                   rollout_rows: the number of rows with a weight
    """
    pairs_gradients = _make_pairs_gradients(model_config, cfg, layout)
    rows_gradients = _make_rows_gradients(model_config, cfg, layout)

    def compute_pairs_part(params: Params, batch: PairBatch | PackedPairs) -> _PartOfUpdate:
        # The mean over the valid pairs; the maximum avoids 0 / 0 if there are none.
        valid = batch.mask.sum().astype(jnp.float32)
        weights = batch.mask / jnp.maximum(valid, 1.0)  # f32[B]
        loss, grads, sums = pairs_gradients(params, batch, weights)
        metrics = {"valid": valid} | {name: x.sum() for name, x in sums.items()}
        return _PartOfUpdate(loss, grads, valid > 0, metrics)

    def compute_rows_part(params: Params, batch: LabelledBatch | PackedLabelled) -> _PartOfUpdate:
        loss, grads, sums = rows_gradients(params, batch)

        # The metrics report the loss without its weight rollout_bce.  The update uses it with the weight.
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
        state: TrainState,
        pairs: PairBatch | PackedPairs | None = None,
        labelled: LabelledBatch | PackedLabelled | None = None,
    ) -> tuple[TrainState, Metrics]:
        # These conditions are evaluated at trace time, so a term of weight 0 is not compiled.
        parts = []
        if pairs is not None and cfg.reads_pairs:
            parts.append(compute_pairs_part(state.params, pairs))
        if labelled is not None and cfg.rollout_bce:
            parts.append(compute_rows_part(state.params, labelled))
        if not parts:
            raise ValueError("a reward-model update needs pairs or labelled rows whose terms have a weight")

        # The gradient of a sum of losses is the sum of their gradients, so one optimiser step serves both
        # parts.
        loss, grads, enabled, metrics = parts[0]
        for part in parts[1:]:
            loss, grads = loss + part.loss, jax.tree.map(jnp.add, grads, part.grads)
            enabled, metrics = enabled | part.enabled, metrics | part.metrics
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=enabled)
        return state, {"loss": loss} | metrics | update_metrics

    return _jit_update(update, model_config, opt, layout)


# (loss f32[], gradients, sums by microbatch f32[M] each)
_Gradients = tuple[jax.Array, Params, Metrics]


def _make_pairs_gradients(
    model_config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout
) -> Callable[[Params, PairBatch | PackedPairs, jax.Array], _Gradients]:
    """The function (params, pairs, weights f32[B]) -> loss, gradients and sums of the pairs."""
    shardings = _param_shardings(model_config, layout)
    loss_fn = _make_pairs_loss_fn(model_config, cfg, layout)
    accumulate_packed = _make_packed_accumulator(model_config, cfg, layout)
    terms = functools.partial(_pair_terms, cfg=cfg)

    def gradients(params: Params, batch: PairBatch | PackedPairs, weights: jax.Array) -> _Gradients:
        if isinstance(batch, PackedPairs):
            return accumulate_packed(params, batch.rows, (weights,), terms, together=2)

        # The members of a pair are stacked into one array later, so they need one width.
        width, negative_width = batch.positive.tokens.shape[1], batch.negative.tokens.shape[1]
        if width != negative_width:
            raise ValueError(f"positives are {width} tokens wide, negatives {negative_width}: pad both alike")
        return optim.accumulate_gradients(
            loss_fn, params, (batch, weights), cfg.microbatch, layout, shardings
        )

    return gradients


def _make_rows_gradients(
    model_config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout
) -> Callable[[Params, LabelledBatch | PackedLabelled], _Gradients]:
    """The function (params, labelled rows) -> loss, gradients and sums of the rows."""
    shardings = _param_shardings(model_config, layout)
    loss_fn = _make_bce_loss_fn(model_config, cfg, layout)
    accumulate_packed = _make_packed_accumulator(model_config, cfg, layout)

    def gradients(params: Params, batch: LabelledBatch | PackedLabelled) -> _Gradients:
        per_row = batch.labels, batch.weights
        if isinstance(batch, PackedLabelled):
            return accumulate_packed(params, batch.rows, per_row, _bce_terms, together=1)
        return optim.accumulate_gradients(
            loss_fn, params, (batch.rows, *per_row), cfg.microbatch, layout, shardings
        )

    return gradients


def _make_packed_accumulator(
    model_config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout
) -> Callable[..., _Gradients]:
    """Make the function that computes loss, gradients and sums of packed pairs, or of packed labelled rows.

    It takes (params, PackedRows, a tuple of arrays [units], terms, together).  A unit is a pair (together=2) or a
    row (together=1); terms is (logits f32[n, together] or f32[n], the units' values [n] ..) -> (loss, metrics).
    """
    shardings = _param_shardings(model_config, layout)

    def accumulate(
        params: Params,
        packed: PackedRows,
        per_unit: tuple[jax.Array, ...],
        terms: Callable[..., tuple[jax.Array, Metrics]],
        together: int,
    ) -> _Gradients:
        per_unit = packed_rows.replicate(per_unit, layout)

        def loss_fn(params: Params, rows: PackedRows) -> tuple[jax.Array, Metrics]:
            z = _compute_packed_logits(
                params, model_config, rows, dtype=cfg.dtype, remat=cfg.remat, layout=layout
            )
            # Negative where there is no sequence: // rounds down.
            units = rows.rows.reshape(-1)[::together] // together
            z = z if together == 1 else z.reshape(-1, together)
            return terms(z, *packed_rows.take_or_zero(per_unit, units))

        return optim.accumulate_first(
            loss_fn, params, dataclasses.replace(packed, count=None), packed.count, shardings
        )

    return accumulate


def _make_pairs_loss_fn(model_config: ModelConfig, cfg: RewardUpdateConfig, layout: Layout) -> LossFn:
    """The loss function (params, (PairBatch, weights)) -> (loss f32[], metrics).

    Loss and metrics are sums over the pairs, weighted by `weights`, f32[m].
    """

    def loss_fn(params: Params, microbatch: tuple[PairBatch, jax.Array]) -> tuple[jax.Array, Metrics]:
        pairs, weights = microbatch  # [m], f32[m]

        # Interleave the members, [2 m, S]: one forward pass computes both, and no pair is split over shards.
        rows = jax.tree.map(
            lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, a.shape[1]), pairs.positive, pairs.negative
        )
        rows = _mask_rows(rows, jnp.repeat(pairs.mask, 2))
        z = _compute_logits(params, model_config, rows, dtype=cfg.dtype, remat=cfg.remat, layout=layout)
        return _pair_terms(z.reshape(-1, 2), weights, cfg=cfg)

    return loss_fn


def _pair_terms(z: jax.Array, weights: jax.Array, *, cfg: RewardUpdateConfig) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of pairs, summed with their weights, f32[m].

    z: f32[m, 2], the logits of the positives and of the negatives.
    """
    # Logits where there is no pair have weight 0; they must not reach the gradient even as NaN.
    z = jnp.where((weights > 0)[:, None], z, 0.0)
    z_pos, z_neg = z[:, 0], z[:, 1]

    terms = reward_losses.pair_terms(z_pos, z_neg, cfg)
    # `terms` is not empty, since pairs are read only if a term has a weight.  The sum is thus an array.
    weighted_terms = [term_weight * (weights * term).sum() for term_weight, term in terms.values()]
    loss = cast(jax.Array, sum(weighted_terms))

    # Metrics of each pair, f32[m]; the margin is in the units of the contrast.
    p_pos, p_neg = rewards_from_logits(z_pos), rewards_from_logits(z_neg)
    s_pos, s_neg = p_pos, p_neg
    if cfg.pair_loss == "logit":
        s_pos, s_neg = z_pos, z_neg
    grad_pos, grad_neg = reward_losses.pair_gradients(z_pos, z_neg, cfg)
    by_pair = {name: term for name, (_, term) in terms.items()} | {
        "margin": s_pos - s_neg,
        "accuracy": z_pos > z_neg,
        "positive_mean": p_pos,
        "negative_mean": p_neg,
        "positive_saturation": p_pos * (1 - p_pos),
        "negative_saturation": p_neg * (1 - p_neg),
        "common_push": -(grad_pos + grad_neg) / 2,
        "difference_push": -(grad_pos - grad_neg) / 2,
    }
    return loss, {name: (weights * x).sum() for name, x in by_pair.items()}


def _param_shardings(model_config: ModelConfig, layout: Layout) -> Any:
    return mesh.make_shardings(layout, transformer.param_specs(model_config, head="score"))


def _jit_update(
    update: Callable, model_config: ModelConfig, opt: optim.Optimiser, layout: Layout
) -> Callable:
    """Jit an update; the input state is donated, and the new one has the same shardings."""
    # Donation halves the memory of parameters and optimiser state, which are by far the largest arrays.
    shardings = optim.state_shardings(opt, transformer.param_specs(model_config, head="score"), layout)
    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(shardings, layout.replicated),
        compiler_options=layout.compiler_options,
    )
