# bench-env: cooper
"""Log-probabilities under the peers' benchmark harness: run it with the harness's --adapter-dir tests/bench."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import numpy as np
import packing

from cooper_jax.configs import base
from cooper_jax.data import row_packing
from cooper_jax.model import weights
from cooper_jax.policy import grpo
from cooper_jax.runtime import device_layouts


def load(model_dir, W):
    layout = device_layouts.make_policy_layout(base.get_config())
    loaded = weights.load_weights(model_dir, layout=layout)
    section = base.get_config().policy
    section.microbatch = W.get("micro_batch") or W["n_prompts"] * W["group"]
    logprobs = grpo.make_packed_logprobs(loaded.config, layout, dtype=W["dtype"], temperature=1.0)
    plan = packing.choose_plan(W, loaded.config, layout, section)

    class Engine:
        versions = common.version("jax", "jaxlib", "flax")

        def score(self, P, C, L):
            """Prompts P [N, P] and completions C [N, T], of which L [N] tokens are real -> f32[N, T]."""
            real = np.arange(C.shape[1])[None, :] < np.asarray(L)[:, None]
            tokens = np.concatenate([P, C], axis=1)
            valid = np.concatenate([np.ones(P.shape, bool), real], axis=1)
            packed = row_packing.pack_policy_rows(tokens, valid, C.shape[1], plan)
            return np.asarray(logprobs(loaded.params, layout.put(packed, None, "batch"), real))

    return Engine()


if __name__ == "__main__":
    common.main(load)
