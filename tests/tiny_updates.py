"""Every update, the reference's scores and a rollout of a tiny model, laid out over any mesh.

As a program it is one process of several, over all their devices; process 0 writes what it found:

    python tests/tiny_updates.py OUT.npz DATA FSDP TENSOR
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models

from cooper_jax.configs import base
from cooper_jax.model import transformer
from cooper_jax.policy import grpo, imitation
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import reward_losses, verifier_model
from cooper_jax.rollout import engine, sampling_spec
from cooper_jax.runtime import hosts, optim
from cooper_jax.runtime.mesh import Layout, make_mesh, make_shardings
from cooper_jax.types import PairBatch, PolicyBatch, Rollout, ScoreBatch

# Fewer key/value heads than tensor shards, and a vocabulary that does not divide without padding.
MODEL = tiny_models.config(
    family="qwen2", width=32, heads=8, kv_heads=2, head_dim=8, ffn=48, vocab_size=61, vocab_multiple=8
)
ROWS, PROMPT, RESPONSE = 16, 7, 9
SPEC = sampling_spec.SamplingSpec(
    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=RESPONSE, group_size=4, eos_ids=(3, 5), segment=4,
    dtype="float32",
)  # fmt: skip
POSITIONS = [11, 12, 13, 17]


def key() -> jax.Array:
    """Not a constant: processes must have met before JAX makes its first array."""
    return jax.random.key(5)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(61, size=n).tolist() for n in (7, 3, 5, 1)]


def layout_of(data: int, fsdp: int, tensor: int, devices=None) -> Layout:
    return Layout(make_mesh(data, fsdp, tensor, devices), tuple(base.get_config().mesh.rules))


def config():
    """Nothing is clipped, so that the first moment is the gradient, times 1 - b1."""
    cfg = base.get_config()
    for section in (cfg.policy, cfg.reward):
        section.microbatch = 8
        section.optimiser.clip_norm = 1e9
        section.optimiser.lr = 1e-3
    cfg.policy.kl_coef = 0.1
    cfg.policy.entropy_coef = 0.1
    cfg.policy.epochs = 2  # so that an update reads the old log-probabilities that it is given
    return cfg


def params_of(head: str) -> dict:
    return jax.device_get(tiny_models.random_params(MODEL, head))


def results(layout: Layout) -> dict[str, np.ndarray]:
    """Losses, gradients (`grad/<update>/<parameter>`), scores, random bits and a rollout, on the host."""
    cfg = config()
    placed = {
        head: _placed(params_of(head), transformer.param_specs(MODEL, head), layout)
        for head in ("logits", "score")
    }
    rng = np.random.default_rng(0)
    tokens = rng.integers(61, size=(ROWS, PROMPT + RESPONSE), dtype=np.int32)
    valid = np.arange(PROMPT + RESPONSE)[None, :] >= rng.integers(PROMPT, size=(ROWS, 1))
    lengths = rng.integers(1, RESPONSE + 1, size=(ROWS, 1))
    mask = np.arange(RESPONSE)[None, :] < lengths
    valid[:, PROMPT:] &= mask
    noise = rng.normal(0, 0.3, (3, ROWS, RESPONSE)).astype(np.float32) - 4
    batch = PolicyBatch(
        tokens=tokens, valid=valid, response_mask=mask,
        advantages=rng.standard_normal(ROWS, np.float32),
        old_logprobs=noise[0], ref_logprobs=noise[1], rollout_logprobs=noise[2],
    )  # fmt: skip
    batch = _put(batch, layout)
    out = {}

    def update(name, make, head, section, *arrays):
        opt = optim.make_optimiser(optim.OptimiserConfig.from_config(section.optimiser, "optimiser"))
        state, metrics = make(opt)(optim.init_state(placed[head], opt), *arrays)
        (adam,) = (s for s in jax.tree.leaves(state.opt_state, is_leaf=_has_moments) if _has_moments(s))
        for path, mu in jax.tree.leaves_with_path(hosts.fetch_arrays(adam.mu)):
            out[f"grad/{name}/{jax.tree_util.keystr(path)}"] = mu / (1 - section.optimiser.b1)
        for key, value in jax.device_get(metrics).items():
            out[f"metric/{name}/{key}"] = np.asarray(value)

    common = dict(temperature=1.0, max_new_tokens=RESPONSE)
    update(
        "grpo",
        lambda opt: grpo.make_update(MODEL, PolicyConfig.from_config(cfg.policy), opt, layout, **common),
        "logits",
        cfg.policy,
        batch,
    )
    update(
        "imitation",
        lambda opt: imitation.make_imitation_update(MODEL, layout, opt, dtype="float32", remat=True, microbatch=8),
        "logits", cfg.policy, batch.tokens, batch.valid, batch.response_mask,
    )  # fmt: skip
    score_rows = ScoreBatch(batch.tokens, batch.valid)
    other = _put(ScoreBatch(np.flip(tokens, 0).copy(), np.flip(valid, 0).copy()), layout)
    labels = _put((np.arange(ROWS) % 2).astype(np.float32), layout)
    weights = _put(np.ones(ROWS, np.float32), layout)
    reward = reward_losses.RewardUpdateConfig.from_config(cfg.reward)
    update(
        "bce", lambda opt: verifier_model.make_bce_update(MODEL, reward, opt, layout),
        "score", cfg.reward, score_rows, labels, weights,
    )  # fmt: skip
    for kind in reward_losses.PAIR_LOSSES:
        of_kind = dataclasses.replace(reward, pair_loss=kind)
        pairs = PairBatch(score_rows, other, _put(np.arange(ROWS) % 3 > 0, layout))
        update(
            f"pairs_{kind}", lambda opt, c=of_kind: verifier_model.make_reward_update(MODEL, c, opt, layout),
            "score", cfg.reward, pairs,
        )  # fmt: skip
    logprobs = grpo.make_logprobs(MODEL, layout, microbatch=8, dtype="float32", temperature=1.0)
    out["logprobs"] = hosts.fetch_arrays(logprobs(placed["logits"], batch.tokens, batch.valid, RESPONSE))
    score = verifier_model.make_score_fn(MODEL, layout, dtype="float32", microbatch=8)
    out["score"] = hosts.fetch_arrays(score(placed["score"], score_rows))
    drawn = engine.generate(placed["logits"], MODEL, layout, prompts(), POSITIONS, key(), SPEC)
    out |= {f"rollout/{name}": getattr(drawn, name) for name in ("tokens", "mask", "logprobs", "finished")}
    places = _put(np.asarray(POSITIONS, np.int32), layout)
    words = jax.jit(
        lambda p, k: sampling_spec.make_key_words(
            sampling_spec.make_row_keys(k, p, SPEC.group_size), jnp.int32(2)
        )
    )
    out["bits"] = hosts.fetch_arrays(words(places, key()))
    return out


def rollout_of(found: dict[str, np.ndarray]) -> Rollout:
    return Rollout(
        **{name.removeprefix("rollout/"): x for name, x in found.items() if name.startswith("rollout/")}
    )


def _has_moments(x) -> bool:
    return hasattr(x, "mu")


def _placed(params, specs, layout: Layout):
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
        params,
        make_shardings(layout, specs),
    )


def _put(tree, layout: Layout):
    return layout.put(tree, "batch")


if __name__ == "__main__":
    hosts.start_hosts()
    with hosts.run_as_one():
        found = results(layout_of(*map(int, sys.argv[2:5])))
        if hosts.is_primary():
            np.savez(sys.argv[1], **found)
