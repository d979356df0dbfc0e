"""The policy's supervised phase before step 1: maximum likelihood of worked solutions.

The paper has no such phase, because its policies are instruction-tuned.  A randomly initialised model needs
one: without it hardly any response would be correct, and GRPO would have no signal.

    N  rows   S  tokens of a row   T  last columns of a row, which may contain tokens to imitate
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

        loss = - sum_t m_t log pi(y_t | y_<t) / sum_t m_t        m the response_mask, sums over all rows

    response_mask marks the tokens to imitate among the last T <= S columns.  If T = S its first column is
    ignored, since no token precedes it.  Padding may be on either side.  The input state is donated.  Rows
    without a marked token have no weight; a batch without any marked token leaves the state unchanged.

    Metrics, f32[]: loss (nats a token), entropy (nats a token), tokens, and `optim.apply_update`'s grad_norm,
    lr and skipped.
    """
    # Gradients are accumulated in the sharding of the parameters.
    specs = transformer.param_specs(config, head="logits")
    shardings = mesh.make_shardings(layout, specs)

    def update(
        state: TrainState, tokens: jax.Array, valid: jax.Array, response_mask: jax.Array
    ) -> tuple[TrainState, Metrics]:
        # The first column of a row has no predecessor that could predict it.
        mask = response_mask[:, 1:] if response_mask.shape[1] == tokens.shape[1] else response_mask

        # Normalised over the whole batch, so that the losses of microbatches add up to the token mean.
        weights = token_weights(mask, "token_mean", mask.shape[1])

        def loss_fn(params: Params, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # `where` comes before the product: 0 * NaN at a padding token would be NaN.
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
        loss, grads, entropies = optim.accumulate_gradients(
            loss_fn, state.params, rows, microbatch, layout, shardings
        )
        state, update_metrics = optim.apply_update(state, grads, loss, opt, enabled=mask.any())
        metrics = {"loss": loss, "entropy": entropies.sum(), "tokens": mask.sum().astype(jnp.float32)}
        return state, metrics | update_metrics

    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(optim.state_shardings(opt, specs, layout), layout.replicated),
        compiler_options=layout.compiler_options,
    )
