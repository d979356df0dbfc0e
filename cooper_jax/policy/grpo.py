"""GRPO: the policy's update.

1. `make_logprobs` scores a step's responses under a policy (the reference; the policy before the updates).
2. `make_update` differentiates the loss (losses.py) over a minibatch, in microbatches, and moves the state.
3. `train_step` goes over a step's epochs and minibatches.

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

COUNTS = ("skipped",)  # metrics that add up over a step's updates; the others are averaged

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
    hold what no vocabulary has), they are finite and mean nothing.
    """
    s = tokens.shape[1]
    if not 0 < width < s:
        raise ValueError(
            f"a response of {width} columns in rows of {s}: at least one prompt column must precede it"
        )
    tokens = jnp.where(valid, tokens, 0)
    hidden = transformer.hidden_states(params, config, tokens, valid, dtype=dtype, remat=remat, layout=layout)
    hidden = hidden[:, s - width - 1 : s - 1]
    return transformer.token_logprobs(
        params, config, hidden, tokens[:, s - width :], temperature=temperature, layout=layout
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

    Log-probabilities of each row's last `width` tokens under softmax(logits / temperature), 0 where they are
    invalid.  Rows run in microbatches whose composition depends on N alone.
    """

    def logprobs(params, tokens, valid, width):
        def run(rows):
            out, _ = response_logprobs(
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
            return jnp.where(rows["valid"][:, -width:], out, 0.0)

        return optim.map_rows(run, {"tokens": tokens, "valid": valid}, microbatch, layout)

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
    """(params, minibatch) -> (loss f32[], gradients, metrics f32[] each), for use inside jit.

    With a single update a step the policy that sampled is the one that is differentiated: the old log-probabilities
    are then this pass's own, so the ratio is exactly 1, and `old_logprobs` is not read.
    """
    dtype = jnp.dtype(cfg.dtype)
    single_update = count_updates(cfg) == 1
    places = mesh.make_shardings(layout, transformer.param_specs(config, head="logits"))

    def gradients(params, batch):
        mask = batch.response_mask
        weights = token_weights(mask, cfg.aggregation, max_new_tokens)

        def loss_fn(params, piece):
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
            loss_fn, params, (batch, weights), cfg.microbatch, layout, places
        )
        return loss, grads, _finish(sums, mask, batch.advantages)

    return gradients


def _finish(sums: Metrics, mask: jax.Array, advantages: jax.Array) -> Metrics:
    """Sums of the microbatches, [M] each, to a minibatch's metrics."""
    tokens = mask.sum().astype(jnp.float32)
    rows = mask.any(axis=1)
    count = jnp.maximum(rows.sum(), 1).astype(jnp.float32)
    out = {}
    for name, x in sums.items():
        if name in ("loss", "pg_loss"):
            out[name] = x.sum()
        elif name in ("ratio_min", "ratio_max"):
            extreme = x.min() if name == "ratio_min" else x.max()
            out[name] = jnp.where(tokens > 0, extreme, 1.0)
        else:
            out[name] = x.sum() / jnp.maximum(tokens, 1.0)
    out["advantage_mean"] = jnp.where(rows, advantages, 0.0).sum() / count
    out["advantage_abs"] = jnp.where(rows, jnp.abs(advantages), 0.0).sum() / count
    return out


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

    temperature: the rollout's.  A minibatch without any response token
    moves nothing.  Metrics, f32[]: loss, pg_loss, kl (nats a token), entropy (nats a token), clip_low,
    clip_high and dual_clip (shares of tokens), ratio_mean, ratio_min, ratio_max, rollout_mismatch (mean
    absolute difference of the old log-probabilities and the sampler's), advantage_mean, advantage_abs, and
    `optim.apply_update`'s grad_norm, lr and skipped.
    """
    gradients = make_gradients(config, cfg, layout, temperature=temperature, max_new_tokens=max_new_tokens)

    def update(state, batch):
        loss, grads, metrics = gradients(state.params, batch)
        state, moved = optim.apply_update(state, grads, loss, opt, enabled=batch.response_mask.any())
        return state, metrics | moved

    places = optim.state_shardings(opt, transformer.param_specs(config, head="logits"), layout)
    return jax.jit(update, donate_argnums=0, out_shardings=(places, layout.replicated))


def count_updates(cfg: PolicyConfig) -> int:
    """Optimiser updates that `train_step` makes; above 1, `old_logprobs` must be computed before the first."""
    return cfg.epochs * cfg.minibatches


@jax.jit
def _take_rows(batch: PolicyBatch, rows: jax.Array) -> PolicyBatch:
    """The batch's rows at i32[n] positions."""
    return jax.tree.map(lambda x: x[rows], batch)


def update_on_rollouts(
    state: TrainState,
    batch: PolicyBatch,
    key: jax.Array,
    cfg: PolicyConfig,
    update: Callable[[TrainState, PolicyBatch], tuple[TrainState, Metrics]],
) -> tuple[TrainState, Metrics]:
    """cfg.epochs passes over a step's rows in cfg.minibatches parts, an update each.

    Parts are cut from a permutation of rows (not of prompt groups: advantages are settled by now), fresh for
    each epoch and drawn from (key, epoch); with one part the rows stay in order.  Metrics are averaged over
    the updates, but for counts (added up) and ratio_min and ratio_max (extremes).

    Raises ValueError when the parts would be uneven.
    """
    n = batch.tokens.shape[0]
    if n % cfg.minibatches:
        raise ValueError(f"policy.minibatches = {cfg.minibatches} does not divide the step's {n} rows")
    seen = []
    for epoch in range(cfg.epochs):
        if cfg.minibatches == 1:
            parts = [batch]
        else:
            order = jax.random.permutation(jax.random.fold_in(key, epoch), n).reshape(cfg.minibatches, -1)
            parts = (_take_rows(batch, order[i]) for i in range(cfg.minibatches))
        for part in parts:
            state, metrics = update(state, part)
            seen.append(metrics)
    reduce = {"ratio_min": jnp.min, "ratio_max": jnp.max} | dict.fromkeys(COUNTS, jnp.sum)
    return state, {name: reduce.get(name, jnp.mean)(jnp.stack([m[name] for m in seen])) for name in seen[0]}
