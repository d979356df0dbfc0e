# bench-env: cooper
"""The rollout engine under the peers' benchmark harness: run it with the harness's --adapter-dir tests/bench."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import jax
import numpy as np

from cooper_jax.configs import base
from cooper_jax.model import weights
from cooper_jax.rollout import engine
from cooper_jax.runtime import device_layouts

SEGMENT = 16  # tokens between two looks of the host


def load(model_dir, W):
    layout = device_layouts.make_policy_layout(base.get_config())
    loaded = weights.load_weights(model_dir, layout=layout)
    params = engine.copy_rollout_weights(loaded.params, loaded.config, layout, W["dtype"])

    def run(P, L, temperature, seed):
        """P [n, prompt], equal rows adjacent, L [n] tokens each -> tokens [n, most of them]."""
        starts = [0, *(np.flatnonzero((P[1:] != P[:-1]).any(axis=1)) + 1)]
        group = len(P) // len(starts)
        spec = engine.SamplingSpec(
            temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=int(L.max()), group_size=group,
            eos_ids=(), segment=SEGMENT, dtype=W["dtype"],
        )  # fmt: skip
        rollout = engine.generate(
            params, loaded.config, layout, [P[i].tolist() for i in starts], range(len(starts)),
            jax.random.key(seed), spec, limits=L, max_rows=W["slots"],
        )  # fmt: skip
        return np.asarray(rollout.tokens)

    class Engine:
        versions = common.version("jax", "jaxlib", "flax")

        def greedy(self, P, n):
            return run(P, np.full(len(P), n), 0.0, 0)

        def generate(self, P, L, seed):
            tokens = run(P, L, W["temperature"], seed)
            return [t[:n] for t, n in zip(tokens, L, strict=True)]

    return Engine()


if __name__ == "__main__":
    common.main(load)
