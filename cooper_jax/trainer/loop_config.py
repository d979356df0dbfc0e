"""Typed settings of what surrounds the steps: supervised phases, evaluation, checkpoints and logs."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from cooper_jax.settings import typed_config

Habit = tuple[float, float]  # shares of right and of wrong solutions with the habit (data/synthetic.py)


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """Settings of the supervised phases before step 1: the config's `supervised` section without its optimisers."""

    start_from: str  # a run directory whose models at step 0 are taken instead; "": run the phases
    policy_steps: int  # updates on worked solutions
    policy_batch: int
    policy_corrupt: float  # share of demonstrations with a corrupted step (synthetic problems)
    policy_habit: Habit
    reward_habit: Habit
    reward_steps: int  # updates of binary cross-entropy on labelled triples
    reward_batch: int
    reward_data: str  # a file of triples; "": they are built from worked solutions

    def __post_init__(self) -> None:
        problems = [
            *typed_config.find_small(self, "supervised", 1, ("policy_batch", "reward_batch")),
            *typed_config.find_small(self, "supervised", 0, ("policy_steps", "reward_steps")),
        ]
        if self.reward_batch % 2:
            problems.append(
                f"supervised.reward_batch={self.reward_batch}: it must be even: right and wrong come in pairs"
            )
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> SupervisedConfig:
        """Read the `supervised` section.  Raises SetupError for values out of range."""
        habits = {name: tuple(section[name]) for name in ("policy_habit", "reward_habit")}
        return typed_config.read_section(cls, section, "supervised", **habits)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Settings of the periodic evaluation: the config's `eval` section."""

    every: int  # steps; 0: never
    problems: int  # of data.eval, at most
    samples: int  # responses a problem
    temperature: float
    top_p: float
    greedy: bool  # evaluate greedy responses as well
    reward_rows: int  # synthetic problems: labelled rows on which the reward model is measured; 0: none

    def __post_init__(self) -> None:
        problems = [
            *typed_config.find_small(self, "eval", 1, ("problems", "samples")),
            *typed_config.find_small(self, "eval", 0, ("every", "reward_rows", "temperature")),
        ]
        if not 0 < self.top_p <= 1:
            problems.append(f"eval.top_p={self.top_p}: it must be above 0 and at most 1 (off)")
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> EvalConfig:
        """Read the `eval` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "eval")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Settings of checkpoints: the config's `checkpoint` section."""

    every: int  # steps
    keep: int  # newest ones; 0 keeps all

    def __post_init__(self) -> None:
        typed_config.raise_problems(
            [
                *typed_config.find_small(self, "checkpoint", 1, ("every",)),
                *typed_config.find_small(self, "checkpoint", 0, ("keep",)),
            ]
        )

    @classmethod
    def from_config(cls, section: ConfigDict) -> CheckpointConfig:
        """Read the `checkpoint` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "checkpoint")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Settings of logs: the config's `log` section."""

    samples_every: int  # steps between dumps of samples; 0: never
    samples: int  # problems in a dump
    pair_motion: bool  # measure how far each update of the reward model moves its pairs' logits
    tensorboard: bool

    def __post_init__(self) -> None:
        typed_config.raise_problems(typed_config.find_small(self, "log", 0, ("samples_every", "samples")))

    @classmethod
    def from_config(cls, section: ConfigDict) -> LogConfig:
        """Read the `log` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "log")
