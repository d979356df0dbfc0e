"""Checks of a config that concern several sections, made before anything is loaded.

What concerns one section alone is checked by its typed config (typed_config.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from cooper_jax.settings.renamed_flags import describe_removed_values
from cooper_jax.settings.setup_errors import Problems

ARMS = ("rule", "model", "cooper")
AT_LEAST_1 = (
    "data.prompts_per_step", "data.max_prompt_tokens", "data.bucket", "data.synthetic_size",
    "rollout.group_size", "rollout.max_new_tokens", "rollout.segment", "reward.max_tokens",
    "policy.vocab_multiple", "reward.vocab_multiple", "assistant.vocab_multiple",
    "supervised.policy_batch", "supervised.reward_batch", "checkpoint.every", "eval.problems", "eval.samples",
)  # fmt: skip
AT_LEAST_0 = (
    "seed", "steps", "rollout.max_rows", "rollout.memory_gib", "supervised.policy_steps", "supervised.reward_steps",
    "checkpoint.keep", "data.eval_from_train", "eval.every", "eval.reward_rows", "log.samples", "log.samples_every",
)  # fmt: skip


def weighs_pairs(reward: ConfigDict) -> bool:
    """Whether the reward model's update reads pairs.  reward: the config's section."""
    return bool(reward.pair_weight or reward.pair_bce)


def updates_reward_model(cfg: ConfigDict) -> bool:
    """Whether a run ever updates its reward model: at its steps, or in a warm-up before it is frozen."""
    return cfg.reward.arm == "cooper" or (cfg.reward.arm == "model" and cfg.reward.warmup_updates > 0)


def makes_pairs(cfg: ConfigDict) -> bool:
    """Whether a step makes pairs."""
    return cfg.reward.arm == "cooper" and weighs_pairs(cfg.reward)


def asks_assistant(cfg: ConfigDict) -> bool:
    """Whether a run has pairs whose negatives an assistant writes."""
    return updates_reward_model(cfg) and weighs_pairs(cfg.reward) and "assistant" in cfg.pairs.negatives


def _check_update(cfg: ConfigDict, need: Callable[[bool, str], None]) -> None:
    """What contradicts itself in the reward model's update."""
    r, negatives = cfg.reward, tuple(cfg.pairs.negatives)
    if r.arm == "rule":
        given = [name for name in ("rule_or_model", "answer_required") if r[name]]
        need(
            not given,
            f"reward.{' and reward.'.join(given)}: the rule arm has no reward model whose rewards could be "
            "changed; leave it out, or set --config.reward.arm=model",
        )
    if not updates_reward_model(cfg):
        return
    need(
        weighs_pairs(r) or bool(r.rollout_bce),
        "reward.pair_weight=0 and no other term: the reward model's update has nothing to learn from; set "
        "--config.reward.rollout_bce, or freeze it: --config.reward.arm=model --config.reward.warmup_updates=0",
    )
    need(
        not weighs_pairs(r) or len(negatives) <= cfg.pairs.per_prompt,
        f"pairs.negatives={negatives}: with pairs.per_prompt={cfg.pairs.per_prompt} the last is never used; set "
        f"--config.pairs.per_prompt={len(negatives)}",
    )


def check_cross_sections(cfg: ConfigDict) -> None:
    """Raise SetupError with every setting that contradicts another, or is out of its range.

    Values of the sections that have a typed config are checked there; run_settings.py runs all checks.
    """
    problems = Problems()
    need = problems.need
    r, p = cfg.rollout, cfg.policy
    need(cfg.reward.arm in ARMS, f"reward.arm is {cfg.reward.arm!r}; it is one of {', '.join(ARMS)}")
    need(
        r.top_k == 0 and r.top_p == 1.0 and r.min_p == 0.0,
        f"rollout.top_k={r.top_k}, rollout.top_p={r.top_p} and rollout.min_p={r.min_p}: the loss compares "
        "probabilities over the whole vocabulary, so training samples from it too; set top_k=0, top_p=1.0 and "
        "min_p=0.0 (evaluation has its own)",
    )
    problems.found += describe_removed_values("pairs.negatives", cfg.pairs.negatives)
    placements = ("auto", "gathered", "sharded")
    need(
        r.weight_placement in placements,
        f"rollout.weight_placement={r.weight_placement!r}: it is one of {', '.join(placements)}",
    )
    need(
        not cfg.mesh.reward or cfg.reward.arm != "rule",
        f"mesh.reward={cfg.mesh.reward!r}: the rule arm has no reward model; leave it empty",
    )
    need(
        not cfg.mesh.assistant or (cfg.assistant.kind == "local" and updates_reward_model(cfg)),
        f"mesh.assistant={cfg.mesh.assistant!r}: only the cooper arm with assistant.kind=local has one on devices",
    )
    need(r.kernels in ("auto", "xla"), f"rollout.kernels={r.kernels!r}: it is auto or xla")
    need(r.temperature > 0, f"rollout.temperature={r.temperature}: training samples, so it must be above 0")
    for name in AT_LEAST_1:
        value = functools.reduce(getattr, name.split("."), cfg)
        need(value >= 1, f"{name}={value}: it must be at least 1")
    for name in AT_LEAST_0:
        value = functools.reduce(getattr, name.split("."), cfg)
        need(value >= 0, f"{name}={value}: it must be at least 0")
    _check_update(cfg, need)
    need(
        cfg.supervised.reward_batch % 2 == 0,
        f"supervised.reward_batch={cfg.supervised.reward_batch}: it must be even: right and wrong come in pairs",
    )
    need(
        cfg.data.format != "synthetic" or not (cfg.data.train or cfg.data.eval),
        f"data.train={cfg.data.train!r}, data.eval={cfg.data.eval!r}: data.format=synthetic reads no file; set "
        "--config.data.format=auto",
    )
    need(
        not asks_assistant(cfg)
        or cfg.assistant.kind != "local"
        or cfg.assistant.weights not in ("", "random"),
        f"assistant.weights={cfg.assistant.weights!r}: a local assistant needs trained weights",
    )
    for name, section in (("policy", p), ("reward", cfg.reward), ("assistant", cfg.assistant)):
        need(
            section.dtype in ("float32", "bfloat16"),
            f"{name}.dtype={section.dtype!r}; it is float32 or bfloat16",
        )
    for name in ("policy", *(["reward"] if cfg.reward.arm != "rule" else [])):
        need(
            bool(cfg[name].weights),
            f"{name}.weights is empty: give --config.{name}.weights=DIR, a hub id or a .gguf file",
        )
    need(
        bool(cfg.data.train) or cfg.data.format == "synthetic",
        "data.train is empty: give --config.data.train=FILE",
    )
    problems.raise_if_any()
