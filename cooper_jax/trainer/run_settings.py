"""Typed settings of a training run.  Reading them checks the whole config before any file is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.data.data_config import DataConfig
from cooper_jax.llm.chat import ChatConfig
from cooper_jax.model.model_source import ModelSource
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward.assistants import RewriteConfig
from cooper_jax.reward.pairs.pair_task import PairsConfig
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.rollout.rollout_config import RolloutConfig
from cooper_jax.rule.verifier import RuleConfig
from cooper_jax.runtime.device_layouts import MeshConfig
from cooper_jax.runtime.optim import OptimiserConfig
from cooper_jax.runtime.profiler import read_profile_steps
from cooper_jax.settings import cross_checks
from cooper_jax.settings.setup_errors import ErrorCollector
from cooper_jax.trainer.loop_config import (
    CheckpointConfig,
    EvalConfig,
    FaultConfig,
    GuardConfig,
    LogConfig,
    SupervisedConfig,
)
from cooper_jax.trainer.rewards import RewardConfig


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Typed settings of a training run.

    A config section that several modules read is split into one dataclass per module.
    """

    # The run.
    name: str
    seed: int
    steps: int
    run_dir: str  # "": runs/<name>
    resume: bool
    resume_step: int  # go back to this checkpoint; -1: resume from the newest
    exact: bool  # rollouts are corrected until they are what the learner samples (rollout/exact.py)
    overlap: bool  # host work runs beside device work (step.py); the numbers are the same without it
    profile: tuple[int, int]  # first and last step of a profiler trace; (0, 0): none

    # Problems and their responses.
    data: DataConfig
    rollout: RolloutConfig

    # The config's `policy` section.
    policy: PolicyConfig
    policy_model: ModelSource
    policy_optimiser: OptimiserConfig

    # The config's `reward` section.
    reward: RewardConfig
    reward_update: RewardUpdateConfig
    reward_model: ModelSource
    reward_optimiser: OptimiserConfig

    # Contrastive pairs, verdicts, and the assistant that writes negatives.
    pairs: PairsConfig
    rule: RuleConfig
    assistant: ChatConfig | None  # None if the run asks no assistant
    assistant_model: ModelSource  # used by an assistant of kind `local`
    rewrite: RewriteConfig  # the requests to the assistant

    # Supervised phases before step 1.
    supervised: SupervisedConfig
    imitation_optimiser: OptimiserConfig  # of the policy's phase
    labels_optimiser: OptimiserConfig  # of the reward model's phase

    # Devices, and the training loop around the steps.
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    faults: FaultConfig
    guard: GuardConfig

    @property
    def holds_reference(self) -> bool:
        """True if the reference policy has parameters of its own: with adapters it is their base."""
        return self.policy.has_reference and self.policy_model.lora is None

    @classmethod
    def from_config(cls, cfg: ConfigDict, *, with_assistant: bool = True) -> RunSettings:
        """Read and check a whole config.

        with_assistant: False for a job that asks no assistant.  The config's `assistant` section may then be
          incomplete.

        Raises SetupError that lists every setting that is out of range or contradicts another.
        """
        errors = ErrorCollector()
        values: dict[str, Any] = {
            name: cfg[name]
            for name in ("name", "seed", "steps", "run_dir", "resume", "resume_step", "exact", "overlap")
        }
        with errors.collect("profile"):
            values["profile"] = read_profile_steps(cfg)
        with errors.collect("config"):
            cross_checks.check_cross_sections(cfg)

        # Sections are read one by one, each under its own `collect`, so that one error reports all problems.
        sections: dict[str, Callable[[], Any]] = {
            "data": lambda: DataConfig.from_config(cfg.data),
            "rollout": lambda: RolloutConfig.from_config(cfg.rollout),
            "policy": lambda: PolicyConfig.from_config(cfg.policy),
            "policy_model": lambda: ModelSource.from_config(cfg.policy, "policy"),
            "reward": lambda: RewardConfig.from_config(cfg.reward),
            "reward_update": lambda: RewardUpdateConfig.from_config(cfg.reward),
            "reward_model": lambda: ModelSource.from_config(cfg.reward, "reward"),
            "pairs": lambda: PairsConfig.from_config(cfg.pairs),
            "rule": lambda: RuleConfig.from_config(cfg.rule),
            "assistant_model": lambda: ModelSource.from_config(cfg.assistant, "assistant"),
            "rewrite": lambda: RewriteConfig.from_config(cfg.assistant),
            "supervised": lambda: SupervisedConfig.from_config(cfg.supervised),
            "mesh": lambda: MeshConfig.from_config(cfg.mesh),
            "eval": lambda: EvalConfig.from_config(cfg.eval),
            "checkpoint": lambda: CheckpointConfig.from_config(cfg.checkpoint),
            "log": lambda: LogConfig.from_config(cfg.log),
            "faults": lambda: FaultConfig.from_config(cfg),
            "guard": lambda: GuardConfig.from_config(cfg),
        }
        for field, read_section in sections.items():
            with errors.collect(field):
                values[field] = read_section()

        # The assistant's address and key are required only by runs that ask it.
        with errors.collect("assistant"):
            asked = with_assistant and cross_checks.asks_assistant(cfg)
            values["assistant"] = ChatConfig.from_config(cfg.assistant, "assistant") if asked else None

        # Optimisers share one dataclass, so messages get the name of the section that each was read from.
        for field, section, name in (
            ("policy_optimiser", cfg.policy.optimiser, "policy.optimiser"),
            ("reward_optimiser", cfg.reward.optimiser, "reward.optimiser"),
            ("imitation_optimiser", cfg.supervised.policy_optimiser, "supervised.policy_optimiser"),
            ("labels_optimiser", cfg.supervised.reward_optimiser, "supervised.reward_optimiser"),
        ):
            with errors.collect(name):
                values[field] = OptimiserConfig.from_config(section, name)

        errors.raise_if_any()
        return cls(**values)
