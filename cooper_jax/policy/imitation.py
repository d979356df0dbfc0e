"""The policy's short supervised phase before step 1: maximum likelihood of worked solutions.

Not in the paper, whose policies are instruction-tuned; a randomly initialised model needs it.

    N  rows   S  tokens of a row   T  its last columns, which may be imitated
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.policy.grpo import response_logprobs
from cooper_jax.policy.losses import token_weights
from cooper_jax.runtime import mesh, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params, TrainState

Metrics = dict[str, jax.Array]


def make_imitation_update(
    config: ModelConfig,
    layout: Layout,
    opt: optim.Optimiser,
    *,
    dtype: str,
    remat: bool,
    microbatch: int,
) -> Callable[[TrainState, jax.Array, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """The jitted (state, tokens i32[N, S], valid bool[N, S], response_mask bool[N, T]) -> (state, metrics).

        loss = - sum_t m_t log pi(y_t | y_<t) / sum_t m_t        over all rows: a token mean

    response_mask marks, among the last T <= S columns, the tokens to imitate.  With T = S its first column is
    ignored, since nothing precedes it.  Padding may be on either side.  The state given is donated.  Rows
    without a marked token have no weight, and a batch of such rows changes nothing.

    Metrics, f32[]: loss (nats a token), entropy (nats a token), tokens, and `optim.apply_update`'s grad_norm,
    lr and skipped.
    """
    specs = transformer.param_specs(config, head="logits")
    shardings = mesh.make_shardings(layout, specs)

    def update(
        state: TrainState, tokens: jax.Array, valid: jax.Array, response_mask: jax.Array
    ) -> tuple[TrainState, Metrics]:
        # The log-probabilities of S columns are S - 1: the first column is predicted by nothing.
        mask = response_mask[:, 1:] if response_mask.shape[1] == tokens.shape[1] else response_mask
        weights = token_weights(mask, "token_mean", mask.shape[1])

        def loss_fn(params: Params, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logprobs, entropy = response_logprobs(
                params,
                config,
                rows["tokens"],
                rows["valid"],
                mask.shape[1],
                temperature=1.0,
                dtype=jnp.dtype(dtype),
                remat=remat,
                layout=layout,
            )
            loss = -(rows["weights"] * jnp.where(rows["mask"], logprobs, 0.0)).sum()
            return loss, (rows["weights"] * jnp.where(rows["mask"], entropy, 0.0)).sum()

        rows = {"tokens": tokens, "valid": valid, "mask": mask, "weights": weights}
        loss, grads, entropy = optim.accumulate_gradients(
            loss_fn, state.params, rows, microbatch, layout, shardings
        )
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=mask.any())
        metrics = {"loss": loss, "entropy": entropy.sum(), "tokens": mask.sum().astype(jnp.float32)}
        return state, metrics | update_metrics

    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(optim.state_shardings(opt, specs, layout), layout.replicated),
    )
