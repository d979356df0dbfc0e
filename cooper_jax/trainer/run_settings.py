"""Typed settings of a training run; reading them checks the whole config before anything is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.llm.chat import ChatConfig
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward.pairs.build_pairs import PairsConfig
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.rule.verifier import RuleConfig
from cooper_jax.runtime.optim import OptimiserConfig
from cooper_jax.settings import cross_checks
from cooper_jax.settings.setup_errors import Problems


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Typed settings of a training run, section by section."""

    policy: PolicyConfig
    policy_optimiser: OptimiserConfig
    reward: RewardUpdateConfig
    reward_optimiser: OptimiserConfig
    pairs: PairsConfig
    rule: RuleConfig
    assistant: ChatConfig | None  # None where nobody asks it
    imitation_optimiser: OptimiserConfig  # of the policy's supervised phase
    labels_optimiser: OptimiserConfig  # of the reward model's supervised phase

    @classmethod
    def from_config(cls, cfg: ConfigDict, *, with_assistant: bool = True) -> RunSettings:
        """Read and check a whole config.

        with_assistant: False for a job that asks no assistant, whose section need not be complete then.

        Raises SetupError with every setting that is out of its range or contradicts another.
        """
        problems = Problems()
        read: dict[str, Any] = {}

        # Each section is read by itself, so that the problems of all are reported at once.
        with problems.collect("config"):
            cross_checks.check_cross_sections(cfg)
        with problems.collect("policy"):
            read["policy"] = PolicyConfig.from_config(cfg.policy)
        with problems.collect("reward"):
            read["reward"] = RewardUpdateConfig.from_config(cfg.reward)
        with problems.collect("pairs"):
            read["pairs"] = PairsConfig.from_config(cfg.pairs)
        with problems.collect("rule"):
            read["rule"] = RuleConfig.from_config(cfg.rule)
        with problems.collect("assistant"):
            asked = with_assistant and cross_checks.asks_assistant(cfg)
            read["assistant"] = ChatConfig.from_config(cfg.assistant, "assistant") if asked else None
        for field, section, name in (
            ("policy_optimiser", cfg.policy.optimiser, "policy.optimiser"),
            ("reward_optimiser", cfg.reward.optimiser, "reward.optimiser"),
            ("imitation_optimiser", cfg.warmup.policy_optimiser, "warmup.policy_optimiser"),
            ("labels_optimiser", cfg.warmup.reward_optimiser, "warmup.reward_optimiser"),
        ):
            with problems.collect(name):
                read[field] = OptimiserConfig.from_config(section, name)

        problems.raise_if_any()
        return cls(**read)
