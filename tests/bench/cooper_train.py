# bench-env: cooper
"""The policy's update under the peers' benchmark harness: run it with the harness's --adapter-dir tests/bench."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import jax
import numpy as np
import packing

from cooper_jax.configs import base
from cooper_jax.data import row_packing
from cooper_jax.model import weights
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.runtime import device_layouts, optim
from cooper_jax.types import PolicyBatch


def policy_section(W, B):
    """The harness's loss: a mean over each row, one clip, k3 as it is; AdamW without warm-up or norm clipping."""
    section = base.get_config().policy
    section.dtype = W["dtype"]
    section.remat = bool(W.get("remat"))
    section.microbatch = W.get("micro_batch") or W["n_prompts"] * W["group"]
    section.aggregation = "sequence_mean"
    section.clip_low = section.clip_high = B["epsilon"]
    section.dual_clip = 0.0
    section.kl_coef = B["beta"]
    section.kl_clamp = 0.0
    section.optimiser.update(lr=B["lr"], weight_decay=B["weight_decay"], warmup_steps=0, clip_norm=1e9)
    return section


def load(model_dir, W):
    layout = device_layouts.make_policy_layout(base.get_config())
    loaded = weights.load_weights(model_dir, layout=layout)
    section = policy_section(W, common.train_batch(W, loaded.config.vocab_size))
    optimiser = optim.make_optimiser(optim.OptimiserConfig.from_config(section.optimiser, "policy.optimiser"))
    update = grpo.make_update(
        loaded.config,
        PolicyConfig.from_config(section),
        optimiser,
        layout,
        temperature=1.0,
        max_new_tokens=W["new_tokens"],
    )
    state = optim.init_state(loaded.params, optimiser)
    plan = packing.choose_plan(W, loaded.config, layout, section)

    class Engine:
        versions = common.version("jax", "jaxlib", "flax", "optax")

        def step(self, B):
            nonlocal state
            mask = B["completion_mask"].astype(bool)
            blank = np.zeros(mask.shape, np.float32)
            batch = PolicyBatch(
                tokens=np.concatenate([B["prompt_ids"], B["completion_ids"]], axis=1),
                valid=np.concatenate([np.ones(B["prompt_ids"].shape, bool), mask], axis=1),
                response_mask=mask,
                advantages=B["advantages"],
                old_logprobs=blank,
                ref_logprobs=B["ref_logps"],
                rollout_logprobs=blank,
            )
            packed = row_packing.pack_policy_rows(batch.tokens, batch.valid, mask.shape[1], plan)
            state, metrics = update(state, batch.without_tokens(), layout.put(packed, None, "batch"))
            jax.block_until_ready(state)
            return float(metrics["loss"]), float(metrics["grad_norm"])

    return Engine()


if __name__ == "__main__":
    common.main(load)
