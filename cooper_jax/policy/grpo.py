"""GRPO: the policy's update (arXiv 2402.03300).

1. `make_logprobs` computes the log-probabilities of a step's responses under a policy: the reference, or the
   policy before the updates.
2. `make_update` differentiates the loss (losses.py) over a minibatch, in microbatches, and applies the
   optimiser.
3. `update_on_rollouts` runs a step's epochs and minibatches.

Responses start at column P = S - T (prompts are left-padded), so the hidden states of columns P-1 .. S-2
predict them.  Old, reference and current log-probabilities are all those of softmax(logits / temperature).

    N  rows (prompt-major)   P  prompt tokens   T  response tokens   S = P + T   D  width
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.policy.losses import PolicyConfig, grpo_loss, token_weights
from cooper_jax.runtime import mesh, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params, PolicyBatch, TrainState

COUNTS = ("skipped",)  # metrics that are summed over a step's updates; the others are averaged

Metrics = dict[str, jax.Array]


# --- log-probabilities -------------------------------------------------------------------------------


def response_logprobs(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,  # i32[N, S]
    valid: jax.Array,  # bool[N, S]
    width: int,
    *,
    temperature: float,
    dtype: jnp.dtype,
    remat: bool,
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy (nats) of the last `width` tokens of each row, each f32[N, width].

    Both are those of softmax(logits / temperature).  At invalid tokens, which are read as token 0 (they may
    be outside the vocabulary), they are finite and mean nothing.  Raises ValueError unless 0 < width < S.
    """
    total = tokens.shape[1]
    if not 0 < width < total:
        raise ValueError(
            f"a response of {width} columns in rows of {total}: at least one prompt column must precede it"
        )
    tokens = jnp.where(valid, tokens, 0)
    hidden = transformer.hidden_states(params, config, tokens, valid, dtype=dtype, remat=remat, layout=layout)

    # The hidden state of a column predicts the next one, so the response's are shifted by one to the left.
    hidden = hidden[:, total - width - 1 : total - 1]  # [N, width, D]
    return transformer.token_logprobs(
        params, config, hidden, tokens[:, total - width :], temperature=temperature, layout=layout
    )


def make_logprobs(
    config: ModelConfig,
    layout: Layout,
    *,
    microbatch: int,
    dtype: str,
    temperature: float,
) -> Callable[[Params, jax.Array, jax.Array, int], jax.Array]:
    """The jitted (params, tokens i32[N, S], valid bool[N, S], width) -> f32[N, width].

    Log-probabilities of each row's last `width` tokens under softmax(logits / temperature), 0 at invalid
    tokens.  Rows run in microbatches whose composition depends on N alone.
    """

    def logprobs(params: Params, tokens: jax.Array, valid: jax.Array, width: int) -> jax.Array:
        def compute_rows(rows: dict[str, jax.Array]) -> jax.Array:
            row_logprobs, _ = response_logprobs(
                params,
                config,
                rows["tokens"],
                rows["valid"],
                width,
                temperature=temperature,
                dtype=jnp.dtype(dtype),
                remat=False,
                layout=layout,
            )
            return jnp.where(rows["valid"][:, -width:], row_logprobs, 0.0)

        return optim.map_rows(compute_rows, {"tokens": tokens, "valid": valid}, microbatch, layout)

    return jax.jit(logprobs, static_argnums=3)


# --- updates -----------------------------------------------------------------------------------------


def make_gradients(
    config: ModelConfig,
    cfg: PolicyConfig,
    layout: Layout,
    *,
    temperature: float,
    max_new_tokens: int,
) -> Callable[[Params, PolicyBatch], tuple[jax.Array, Params, Metrics]]:
    """A function (params, minibatch) -> (loss f32[], gradients, metrics f32[] each), for use inside jit.

    With a single update a step, the policy that sampled is the one that is differentiated.  The old
    log-probabilities are then those of this forward pass, so the ratio is exactly 1 and `old_logprobs` is not
    read.
    """
    dtype = jnp.dtype(cfg.dtype)
    single_update = count_updates(cfg) == 1
    shardings = mesh.make_shardings(layout, transformer.param_specs(config, head="logits"))

    def gradients(params: Params, batch: PolicyBatch) -> tuple[jax.Array, Params, Metrics]:
        mask = batch.response_mask  # bool[N, T]
        # Over the whole minibatch, before it is split into microbatches.
        weights = token_weights(mask, cfg.aggregation, max_new_tokens)

        def loss_fn(params: Params, piece: tuple[PolicyBatch, jax.Array]) -> tuple[jax.Array, Metrics]:
            rows, row_weights = piece
            logprobs, entropy = response_logprobs(
                params,
                config,
                rows.tokens,
                rows.valid,
                mask.shape[1],
                temperature=temperature,
                dtype=dtype,
                remat=cfg.remat,
                layout=layout,
            )

            m = rows.response_mask
            old = jax.lax.stop_gradient(logprobs) if single_update else rows.old_logprobs
            loss, sums = grpo_loss(logprobs, old, rows.ref_logprobs, rows.advantages, row_weights, m, cfg)
            sums["entropy"] = jnp.where(m, entropy, 0.0).sum()
            sums["rollout_mismatch"] = jnp.where(m, jnp.abs(old - rows.rollout_logprobs), 0.0).sum()
            return loss, sums

        loss, grads, sums = optim.accumulate_gradients(
            loss_fn, params, (batch, weights), cfg.microbatch, layout, shardings
        )
        return loss, grads, _reduce_metrics(sums, mask, batch.advantages)

    return gradients


def _reduce_metrics(sums: Metrics, mask: jax.Array, advantages: jax.Array) -> Metrics:
    """A minibatch's metrics, f32[] each, from those of its microbatches, [M] each."""
    tokens = mask.sum().astype(jnp.float32)
    used_rows = mask.any(axis=1)  # bool[N]
    row_count = jnp.maximum(used_rows.sum(), 1).astype(jnp.float32)

    metrics = {}
    for name, x in sums.items():
        if name in ("loss", "pg_loss"):  # weighted sums
            metrics[name] = x.sum()
        elif name in ("ratio_min", "ratio_max"):
            extreme = x.min() if name == "ratio_min" else x.max()
            metrics[name] = jnp.where(tokens > 0, extreme, 1.0)
        else:  # sums over tokens
            metrics[name] = x.sum() / jnp.maximum(tokens, 1.0)
    metrics["advantage_mean"] = jnp.where(used_rows, advantages, 0.0).sum() / row_count
    metrics["advantage_abs"] = jnp.where(used_rows, jnp.abs(advantages), 0.0).sum() / row_count
    return metrics


def make_update(
    config: ModelConfig,
    cfg: PolicyConfig,
    opt: optim.Optimiser,
    layout: Layout,
    *,
    temperature: float,
    max_new_tokens: int,
) -> Callable[[TrainState, PolicyBatch], tuple[TrainState, Metrics]]:
    """The jitted (state, minibatch) -> (state, metrics); the state given is donated.

    A minibatch without any response token changes nothing.

    Args:
      temperature, max_new_tokens: the rollout's.

    Metrics, f32[]: loss, pg_loss, kl (nats a token), entropy (nats a token), clip_low, clip_high and
    dual_clip (shares of tokens), ratio_mean, ratio_min, ratio_max, rollout_mismatch (mean absolute difference
    of the old log-probabilities and the sampler's), advantage_mean, advantage_abs, and `optim.apply_update`'s
    grad_norm, lr and skipped.
    """
    gradients = make_gradients(config, cfg, layout, temperature=temperature, max_new_tokens=max_new_tokens)

    def update(state: TrainState, batch: PolicyBatch) -> tuple[TrainState, Metrics]:
        loss, grads, metrics = gradients(state.params, batch)
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=batch.response_mask.any())
        return state, metrics | update_metrics

    shardings = optim.state_shardings(opt, transformer.param_specs(config, head="logits"), layout)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, layout.replicated))


def count_updates(cfg: PolicyConfig) -> int:
    """The optimiser updates of a step; above 1, `old_logprobs` must be computed before the first."""
    return cfg.epochs * cfg.minibatches


@jax.jit
def _take_rows(batch: PolicyBatch, rows: jax.Array) -> PolicyBatch:
    """The batch's rows at positions i32[n]."""
    return jax.tree.map(lambda x: x[rows], batch)


def update_on_rollouts(
    state: TrainState,
    batch: PolicyBatch,
    key: jax.Array,
    cfg: PolicyConfig,
    update: Callable[[TrainState, PolicyBatch], tuple[TrainState, Metrics]],
) -> tuple[TrainState, Metrics]:
    """Make cfg.epochs passes over a step's rows in cfg.minibatches minibatches, with an update each.

    Minibatches are taken from a permutation of the rows, keyed by (key, epoch).  Rows of one prompt may be
    separated, since advantages are known by now.  With one minibatch the rows stay in order.  Metrics are
    averaged over the updates, except counts (summed) and ratio_min and ratio_max (extremes).

    Raises ValueError where cfg.minibatches does not divide the rows.
    """
    rows = batch.tokens.shape[0]
    if rows % cfg.minibatches:
        raise ValueError(f"policy.minibatches = {cfg.minibatches} does not divide the step's {rows} rows")

    each_update: list[Metrics] = []
    for epoch in range(cfg.epochs):
        if cfg.minibatches == 1:
            state, metrics = update(state, batch)
            each_update.append(metrics)
            continue
        order = jax.random.permutation(jax.random.fold_in(key, epoch), rows).reshape(cfg.minibatches, -1)
        # One minibatch is taken at a time: together they would hold the batch a second time.
        for i in range(cfg.minibatches):
            state, metrics = update(state, _take_rows(batch, order[i]))
            each_update.append(metrics)

    # A skipped update counts, an extreme stays one; everything else is averaged.
    reductions = {"ratio_min": jnp.min, "ratio_max": jnp.max} | dict.fromkeys(COUNTS, jnp.sum)
    step_metrics = {}
    for name in each_update[0]:
        values = jnp.stack([metrics[name] for metrics in each_update])  # [updates]
        step_metrics[name] = reductions.get(name, jnp.mean)(values)
    return state, step_metrics
