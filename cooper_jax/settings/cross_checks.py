"""Checks of a config that concern several sections, made before anything is loaded.

What concerns one section alone is checked by its typed config (typed_config.py).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cooper_jax.settings.renamed_flags import describe_removed_values
from cooper_jax.settings.setup_errors import Problems


def weighs_pairs(reward: ConfigDict) -> bool:
    """True if the reward model's update reads pairs.  reward: the config's section."""
    return bool(reward.pair_weight or reward.pair_bce)


def updates_reward_model(cfg: ConfigDict) -> bool:
    """True if a run ever updates its reward model: at its steps, or in a warm-up before it is frozen."""
    return cfg.reward.arm == "cooper" or (cfg.reward.arm == "model" and cfg.reward.warmup_updates > 0)


def makes_pairs(cfg: ConfigDict) -> bool:
    """True if a step makes pairs."""
    return cfg.reward.arm == "cooper" and weighs_pairs(cfg.reward)


def asks_assistant(cfg: ConfigDict) -> bool:
    """True if a run has pairs whose negatives an assistant writes."""
    return updates_reward_model(cfg) and weighs_pairs(cfg.reward) and "assistant" in cfg.pairs.negatives


def check_cross_sections(cfg: ConfigDict) -> None:
    """Raise SetupError with every setting that contradicts one of another section.

    Values of one section are checked by its typed config; trainer/run_settings.py runs all checks.
    """
    problems = Problems()
    problems.need(cfg.seed >= 0, f"seed={cfg.seed}: it must be at least 0")
    problems.need(cfg.steps >= 0, f"steps={cfg.steps}: it must be at least 0")
    _check_training_sampling(cfg, problems)
    _check_models(cfg, problems)
    _check_reward_updates(cfg, problems)
    problems.raise_if_any()


def _check_training_sampling(cfg: ConfigDict, problems: Problems) -> None:
    """Training samples from the distribution whose log-probabilities the policy's loss computes."""
    r = cfg.rollout
    problems.need(
        r.top_k == 0 and r.top_p == 1.0 and r.min_p == 0.0,
        f"rollout.top_k={r.top_k}, rollout.top_p={r.top_p} and rollout.min_p={r.min_p}: the loss compares "
        "probabilities over the whole vocabulary, so training samples from it too; set top_k=0, top_p=1.0 and "
        "min_p=0.0 (evaluation has its own)",
    )
    problems.need(
        r.temperature > 0, f"rollout.temperature={r.temperature}: training samples, so it must be above 0"
    )


def _check_models(cfg: ConfigDict, problems: Problems) -> None:
    """Each model that the run's arm uses has weights, and no other has devices of its own."""
    for name in ("policy", "reward"):
        used = name == "policy" or cfg.reward.arm != "rule"
        problems.need(
            bool(cfg[name].weights) or not used,
            f"{name}.weights is empty: give --config.{name}.weights=DIR, a hub id or a .gguf file",
        )
    problems.need(
        not asks_assistant(cfg)
        or cfg.assistant.kind != "local"
        or cfg.assistant.weights not in ("", "random"),
        f"assistant.weights={cfg.assistant.weights!r}: a local assistant needs trained weights",
    )
    problems.need(
        not cfg.mesh.reward or cfg.reward.arm != "rule",
        f"mesh.reward={cfg.mesh.reward!r}: the rule arm has no reward model; leave it empty",
    )
    problems.need(
        not cfg.mesh.assistant or (cfg.assistant.kind == "local" and updates_reward_model(cfg)),
        f"mesh.assistant={cfg.mesh.assistant!r}: only the cooper arm with assistant.kind=local has one on devices",
    )


def _check_reward_updates(cfg: ConfigDict, problems: Problems) -> None:
    """The reward model's update has something to learn from, and each source of negatives is used."""
    problems.found += describe_removed_values("pairs.negatives", cfg.pairs.negatives)
    if not updates_reward_model(cfg):
        return
    negatives = tuple(cfg.pairs.negatives)
    problems.need(
        weighs_pairs(cfg.reward) or bool(cfg.reward.rollout_bce),
        "reward.pair_weight=0 and no other term: the reward model's update has nothing to learn from; set "
        "--config.reward.rollout_bce, or freeze it: --config.reward.arm=model --config.reward.warmup_updates=0",
    )
    problems.need(
        not weighs_pairs(cfg.reward) or len(negatives) <= cfg.pairs.per_prompt,
        f"pairs.negatives={negatives}: with pairs.per_prompt={cfg.pairs.per_prompt} the last is never used; set "
        f"--config.pairs.per_prompt={len(negatives)}",
    )
