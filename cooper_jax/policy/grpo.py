"""GRPO: the policy's update (arXiv 2402.03300).

1. `make_logprobs` makes the function that computes log-probabilities of a step's responses, under the
   reference or under the policy before the step's updates.
2. `make_update` makes the update on one minibatch: the gradient of the loss (losses.py), accumulated over
   microbatches, and the optimiser.
3. `update_on_rollouts` runs a step's epochs and minibatches.

Prompts are left-padded, so responses start at column P = S - T, and the hidden states of columns P-1 .. S-2
predict them.  Old, reference and current log-probabilities are all those of softmax(logits / temperature).

    N  rows, prompt-major   P  prompt tokens   T  response tokens   S = P + T   D  width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.policy import sampler_mismatch
from cooper_jax.policy.losses import PolicyConfig, policy_loss, token_weights
from cooper_jax.runtime import mesh, optim, packed_rows
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import PackedRows, Params, PolicyBatch, TrainState

# Reductions of a metric's values over the updates of a step; metrics that are not named here are averaged.
METRIC_REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "ratio_min": jnp.min,
    "ratio_max": jnp.max,
    "rollout_mismatch_max": jnp.max,
    "rollout_ratio_min": jnp.min,
    "rollout_ratio_max": jnp.max,
    "skipped": jnp.sum,
}

Metrics = dict[str, jax.Array]


# --- log-probabilities -------------------------------------------------------------------------------


def response_logprobs(
    params: Params,
    model_config: ModelConfig,
    tokens: jax.Array,  # i32[N, S]
    valid: jax.Array,  # bool[N, S]
    response_length: int,  # T
    *,
    temperature: float,
    dtype: jnp.dtype,
    remat: bool,
    layout: Layout,
    entropy_gradient: bool = False,
    thresholds: jax.Array | None = None,  # f32[N, T]
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy (nats) of the last T tokens of each row, each f32[N, T].

    Both are those of softmax(logits / temperature), with `thresholds` over the tokens whose logits are above them
    alone (`Rollout.thresholds`); the entropy has a gradient only if `entropy_gradient`.  At
    invalid tokens they are finite but meaningless.
    Raises ValueError unless 0 < T < S.
    """
    total = tokens.shape[1]
    if not 0 < response_length < total:
        raise ValueError(
            f"a response of {response_length} columns in rows of {total}: at least one prompt column must "
            "precede it"
        )

    # Padding ids may be outside the vocabulary; token 0 is a safe index into the embedding.
    tokens = jnp.where(valid, tokens, 0)
    hidden = transformer.hidden_states(
        params, model_config, tokens, valid, dtype=dtype, remat=remat, layout=layout
    )

    # A column's hidden state predicts the next column's token, so the slice is shifted left by one.  Slicing
    # before the output head saves the logits of the prompt, [N, P, V].
    hidden = hidden[:, total - response_length - 1 : total - 1]  # [N, T, D]
    return transformer.token_logprobs(
        params,
        model_config,
        hidden,
        tokens[:, total - response_length :],
        temperature=temperature,
        layout=layout,
        entropy_gradient=entropy_gradient,
        thresholds=thresholds,
    )


def packed_response_logprobs(
    params: Params,
    model_config: ModelConfig,
    packed: PackedRows,  # one microbatch: leaves [R, ..]
    response_length: int,  # T
    *,
    temperature: float,
    dtype: jnp.dtype,
    remat: bool,
    layout: Layout,
    entropy_gradient: bool = False,
    thresholds: jax.Array | None = None,  # f32[R * K, T]
) -> tuple[jax.Array, jax.Array]:
    """`response_logprobs` of the sequences of packed rows, each f32[R * K, T].

    Row r * K + k is sequence k of row r, from its first response token on; behind its last one, and where there is
    no sequence, the values are finite but meaningless.
    """
    hidden = transformer.packed_hidden_states(
        params,
        model_config,
        packed.tokens,
        packed.segments,
        packed.positions,
        packed.prefixes,
        dtype=dtype,
        remat=remat,
        layout=layout,
    )
    # The head computes response tokens alone: [R, C, D] -> [R, Q, D].
    predictors = packed.predictors
    hidden = jnp.take_along_axis(hidden, predictors[:, :, None], axis=1)

    # Place t of sequence k is column first[k] + t of the response tokens.
    assert packed.first is not None and packed.targets is not None, (
        "these rows were packed for a reward model"
    )
    rows, sequences = packed.first.shape
    last = predictors.shape[1] - 1
    places = jnp.minimum(packed.first[:, :, None] + jnp.arange(response_length)[None, None], last)
    places = places.reshape(rows, -1)  # i32[R, K * T]
    if thresholds is not None:
        # The inverse: the sequence of a response token and its place in the response.
        begins = (packed.first[:, None, :] <= jnp.arange(last + 1)[None, :, None]) & (
            packed.rows[:, None] >= 0
        )
        sequence = jnp.maximum(begins.sum(axis=-1) - 1, 0)  # i32[R, Q]
        place = jnp.arange(last + 1)[None] - jnp.take_along_axis(packed.first, sequence, axis=1)
        index = sequence * response_length + jnp.clip(place, 0, response_length - 1)
        thresholds = jnp.take_along_axis(thresholds.reshape(rows, -1), index, axis=1)

    found = transformer.token_logprobs(
        params,
        model_config,
        hidden,
        packed.targets,
        temperature=temperature,
        layout=layout,
        entropy_gradient=entropy_gradient,
        thresholds=thresholds,
    )
    logprobs, entropy = (
        jnp.take_along_axis(x, places, axis=1).reshape(rows * sequences, response_length) for x in found
    )
    return logprobs, entropy


def make_packed_logprobs(
    model_config: ModelConfig, layout: Layout, *, dtype: str, temperature: float
) -> Callable[[Params, PackedRows, jax.Array], jax.Array]:
    """`make_logprobs` for packed rows: (params, packed, mask bool[N, T]) -> log-probabilities f32[N, T].

    They are 0 outside the mask.
    """

    def logprobs(params: Params, packed: PackedRows, mask: jax.Array) -> jax.Array:
        mask = layout.constrain(mask, None, None)

        def compute_microbatch(i: jax.Array, out: jax.Array) -> jax.Array:
            microbatch = packed_rows.take_microbatch(packed, i)
            found, _ = packed_response_logprobs(
                params,
                model_config,
                microbatch,
                mask.shape[1],
                temperature=temperature,
                dtype=jnp.dtype(dtype),
                remat=False,
                layout=layout,
            )
            return packed_rows.set_rows(out, microbatch.rows.reshape(-1), found)

        count = len(packed.tokens) if packed.count is None else packed.count
        out = jax.lax.fori_loop(0, count, compute_microbatch, jnp.zeros(mask.shape, jnp.float32))
        return layout.constrain(jnp.where(mask, out, 0.0), "batch", None)

    return jax.jit(logprobs, compiler_options=layout.compiler_options)


def make_logprobs(
    model_config: ModelConfig,
    layout: Layout,
    *,
    microbatch: int,
    dtype: str,
    temperature: float,
) -> Callable[[Params, jax.Array, jax.Array, int], jax.Array]:
    """The jitted function (params, tokens i32[N, S], valid bool[N, S], T) -> log-probabilities f32[N, T].

    It computes the log-probabilities of each row's last T tokens under softmax(logits / temperature),
    and 0 at invalid tokens.  Rows are computed in microbatches whose composition depends on N alone.
    """

    def logprobs(params: Params, tokens: jax.Array, valid: jax.Array, response_length: int) -> jax.Array:
        # Microbatches bound the memory of activations; no gradient is taken, so remat would save nothing.
        def compute_rows(rows: dict[str, jax.Array]) -> jax.Array:
            row_logprobs, _ = response_logprobs(
                params,
                model_config,
                rows["tokens"],
                rows["valid"],
                response_length,
                temperature=temperature,
                dtype=jnp.dtype(dtype),
                remat=False,
                layout=layout,
            )
            return jnp.where(rows["valid"][:, -response_length:], row_logprobs, 0.0)

        return optim.map_rows(compute_rows, {"tokens": tokens, "valid": valid}, microbatch, layout)

    # The response length T sets the output's shape, so each length is compiled once.
    return jax.jit(logprobs, static_argnums=3, compiler_options=layout.compiler_options)


# --- updates -----------------------------------------------------------------------------------------


def make_gradients(
    model_config: ModelConfig,
    cfg: PolicyConfig,
    layout: Layout,
    *,
    temperature: float,
    max_new_tokens: int,
    sampler_agrees: bool = True,
    reads_old_logprobs: bool = False,
) -> Callable[..., tuple[jax.Array, Params, Metrics]]:
    """A function (params, minibatch) -> (loss f32[], gradients, metrics f32[] each), to be called inside jit.

    A third argument: see `make_update`.
    If a step has a single update, the policy that sampled the responses is the one that is differentiated.
    The old log-probabilities are then those of this forward pass: the ratio is exactly 1, and `old_logprobs`
    is not read (unless reads_old_logprobs).
    """
    dtype = jnp.dtype(cfg.dtype)
    method = sampler_mismatch.choose_correction(cfg.correction, sampler_agrees)
    single_update = count_updates(cfg) == 1 and not reads_old_logprobs
    shardings = mesh.make_shardings(layout, transformer.param_specs(model_config, head="logits"))

    def gradients(
        params: Params, batch: PolicyBatch, packed: PackedRows | None = None
    ) -> tuple[jax.Array, Params, Metrics]:
        mask = batch.response_mask  # bool[N, T]
        response_length = mask.shape[1]
        options: dict[str, Any] = dict(
            temperature=temperature,
            dtype=dtype,
            remat=cfg.remat,
            layout=layout,
            entropy_gradient=cfg.entropy_coef > 0,
        )

        # Normalised over the whole minibatch, before it is split into microbatches.
        weights = token_weights(mask, cfg.aggregation, max_new_tokens)  # f32[N, T]

        def loss_of_rows(
            params: Params, microbatch: tuple[PolicyBatch, jax.Array]
        ) -> tuple[jax.Array, Metrics]:
            rows, row_weights = microbatch
            logprobs, entropy = response_logprobs(
                params,
                model_config,
                rows.tokens,
                rows.valid,
                response_length,
                thresholds=rows.thresholds,
                **options,
            )
            return compute_loss(logprobs, entropy, rows, row_weights)

        def compute_loss(
            logprobs: jax.Array, entropy: jax.Array, rows: PolicyBatch, row_weights: jax.Array
        ) -> tuple[jax.Array, Metrics]:
            row_mask = rows.response_mask
            old = jax.lax.stop_gradient(logprobs) if single_update else rows.old_logprobs
            # A growing mismatch means that the rollout engine samples from another policy.
            mismatch = old - rows.rollout_logprobs
            correction = None
            if method != "none":
                correction = sampler_mismatch.correction_weights(
                    mismatch, row_mask, method, cfg.correction_cap
                )
            loss, sums = policy_loss(
                logprobs,
                old,
                rows.ref_logprobs,
                rows.advantages,
                row_weights,
                row_mask,
                cfg,
                correction,
                entropy=entropy,
            )
            if correction is not None:
                sums["correction"] = correction.sum()
            sums["entropy"] = jax.lax.stop_gradient(jnp.where(row_mask, entropy, 0.0).sum())
            return loss, sums | sampler_mismatch.measure_mismatch(mismatch, row_mask)

        if packed is None:
            loss, grads, sums = optim.accumulate_gradients(
                loss_of_rows, params, (batch, weights), cfg.microbatch, layout, shardings
            )
            return loss, grads, _reduce_metrics(sums, mask, batch.advantages)

        # A packed row may hold sequences of any shard, so every device has what the loss reads of all rows: a few
        # numbers for each token.
        per_row = packed_rows.replicate((batch.without_tokens(), weights), layout)

        def loss_of_packed(params: Params, microbatch: PackedRows) -> tuple[jax.Array, Metrics]:
            rows, row_weights = packed_rows.take_or_zero(per_row, microbatch.rows.reshape(-1))
            logprobs, entropy = packed_response_logprobs(
                params, model_config, microbatch, response_length, thresholds=rows.thresholds, **options
            )
            return compute_loss(logprobs, entropy, rows, row_weights)

        loss, grads, sums = optim.accumulate_first(
            loss_of_packed, params, dataclasses.replace(packed, count=None), packed.count, shardings
        )
        if packed.count is not None:
            used = jnp.arange(len(sums["loss"])) < packed.count
            sums["ratio_min"] = jnp.where(used, sums["ratio_min"], jnp.inf)
            sums["ratio_max"] = jnp.where(used, sums["ratio_max"], -jnp.inf)
        return loss, grads, _reduce_metrics(sums, mask, batch.advantages)

    return gradients


def _reduce_metrics(sums: Metrics, mask: jax.Array, advantages: jax.Array) -> Metrics:
    """Combine the microbatches' sums, f32[microbatches] each, into the minibatch's metrics, f32[] each."""
    tokens = mask.sum().astype(jnp.float32)
    used_rows = mask.any(axis=1)  # bool[N]: False at padding rows
    row_count = jnp.maximum(used_rows.sum(), 1).astype(jnp.float32)

    metrics = sampler_mismatch.reduce_mismatch(sums, tokens)
    for name, values in sums.items():
        if name in ("loss", "pg_loss"):
            # The token weights are normalised over the minibatch already.
            metrics[name] = values.sum()
        elif name in ("ratio_min", "ratio_max"):
            # Without any token the extremes are infinite; 1 is the ratio of an unchanged policy.
            extreme = values.min() if name == "ratio_min" else values.max()
            metrics[name] = jnp.where(tokens > 0, extreme, 1.0)
        else:
            metrics[name] = values.sum() / jnp.maximum(tokens, 1.0)

    # Advantages are one per row, so their means are over rows, not over tokens.
    metrics["advantage_mean"] = jnp.where(used_rows, advantages, 0.0).sum() / row_count
    metrics["advantage_abs"] = jnp.where(used_rows, jnp.abs(advantages), 0.0).sum() / row_count
    return metrics


def make_update(
    model_config: ModelConfig,
    cfg: PolicyConfig,
    opt: optim.Optimiser,
    layout: Layout,
    *,
    temperature: float,
    max_new_tokens: int,
    sampler_agrees: bool = True,
    reads_old_logprobs: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted function (state, minibatch) -> (state, metrics); the input state is donated.

    With a third argument, PackedRows of the minibatch's sequences, the model computes on these; the minibatch then
    needs no tokens (`without_tokens`).
    A minibatch without any response token leaves the state unchanged.

    Args:
      temperature, max_new_tokens: those of the rollout.
      sampler_agrees: True if the sampler computes in float32, with the weights that the step starts from; read with
        policy.correction=auto.
      reads_old_logprobs: also where a step has a single update.

    Metrics, f32[] each: loss, pg_loss, kl and entropy (nats per token), clip_low, clip_high and dual_clip
    (shares of tokens), ratio_mean, ratio_min, ratio_max, those of `reduce_mismatch`, correction (the mean weight,
    if there are weights), advantage_mean, advantage_abs, and `optim.apply_update`'s
    grad_norm, lr and skipped.
    """
    gradients = make_gradients(
        model_config,
        cfg,
        layout,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        sampler_agrees=sampler_agrees,
        reads_old_logprobs=reads_old_logprobs,
    )

    def update(
        state: TrainState, batch: PolicyBatch, packed: PackedRows | None = None
    ) -> tuple[TrainState, Metrics]:
        loss, grads, metrics = gradients(state.params, batch, packed)
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=batch.response_mask.any())
        return state, metrics | update_metrics

    # Donation saves a second copy of parameters and optimiser state.  It works only if the output state has
    # the shardings of the input, so `out_shardings` states them.
    shardings = optim.state_shardings(opt, transformer.param_specs(model_config, head="logits"), layout)
    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(shardings, layout.replicated),
        compiler_options=layout.compiler_options,
    )


def count_updates(cfg: PolicyConfig) -> int:
    """The number of optimiser updates in a step.

    If it is above 1, `old_logprobs` must be computed before the first update.
    """
    return cfg.epochs * cfg.minibatches


@jax.jit
def _take_rows(batch: PolicyBatch, rows: jax.Array) -> PolicyBatch:
    """Select rows of a batch.  rows: i32[n], their indices."""
    return jax.tree.map(lambda x: x[rows], batch)


def update_on_rollouts(
    state: TrainState,
    batch: PolicyBatch,
    key: jax.Array,
    cfg: PolicyConfig,
    update: Callable[..., tuple[TrainState, Metrics]],
    pack: Callable[[np.ndarray], PackedRows] | None = None,
) -> tuple[TrainState, Metrics]:
    """Make cfg.epochs passes over a step's rows, each with one update per minibatch.

    Minibatches are slices of a permutation of the rows that is keyed by (key, epoch).  They may separate rows
    of one prompt, since advantages are computed beforehand.  With a single minibatch the rows keep their
    order.  METRIC_REDUCTIONS says how the metrics of several updates become one.

    pack: packs the sequences of these rows of the batch, i64[n], for an update on packed rows; None: not packed.

    Raises ValueError if cfg.minibatches does not divide the number of rows.
    """
    rows = batch.response_mask.shape[0]
    if rows % cfg.minibatches:
        raise ValueError(f"policy.minibatches = {cfg.minibatches} does not divide the step's {rows} rows")

    def run_update(state: TrainState, minibatch: PolicyBatch, chosen: np.ndarray):
        packed = [] if pack is None else [pack(chosen)]
        return update(state, minibatch, *packed)

    # All permutations are fetched before the first update: later the host would have to wait for it.
    orders: list[np.ndarray] = []
    if cfg.minibatches > 1:
        epoch_keys = [jax.random.fold_in(key, epoch) for epoch in range(cfg.epochs)]
        orders = [
            np.asarray(jax.random.permutation(k, rows)).reshape(cfg.minibatches, -1) for k in epoch_keys
        ]

    metrics_by_update: list[Metrics] = []
    for epoch in range(cfg.epochs):
        # A single minibatch has all rows: a permutation would only change the order of its sums.
        if cfg.minibatches == 1:
            state, metrics = run_update(state, batch, np.arange(rows))
            metrics_by_update.append(metrics)
            continue

        # Minibatches are selected one at a time: all of them at once would be a second copy of the batch.
        for chosen in orders[epoch]:
            state, metrics = run_update(state, _take_rows(batch, jnp.asarray(chosen)), chosen)
            metrics_by_update.append(metrics)

    # Metrics are reduced on the device.  If the host read them after each update, it would have to wait for
    # that update before it could start the next one.
    step_metrics = {}
    for name in metrics_by_update[0]:
        values = jnp.stack([metrics[name] for metrics in metrics_by_update])  # [updates]
        step_metrics[name] = METRIC_REDUCTIONS.get(name, jnp.mean)(values)
    return state, step_metrics
