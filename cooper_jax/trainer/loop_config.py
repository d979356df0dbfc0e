"""Typed settings of the training loop around the steps: supervised phases, evaluation, checkpoints, logs."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from cooper_jax.settings import typed_config

# The shares of correct and of wrong solutions with the habit, a word that correlates with correctness in the
# demonstrations without causing it (data/synthetic.py).
Habit = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """Settings of the supervised phases before step 1: the `supervised` section without its optimisers."""

    # A run directory from which the models at step 0 are loaded instead; "": run the phases.
    start_from: str

    # The policy's phase: imitation of worked solutions.
    policy_steps: int  # updates; 0: skip the phase
    policy_batch: int  # solutions per update
    policy_corrupt: float  # share of demonstrations with a corrupted step (synthetic problems)
    policy_habit: Habit  # in demonstrations (synthetic problems)

    # The reward model's phase: binary cross-entropy on labelled triples.
    reward_habit: Habit  # in labelled completions (synthetic problems)
    reward_steps: int  # updates; 0: skip the phase
    reward_batch: int  # triples per update
    reward_data: str  # a file of triples; "": they are built from worked solutions

    def __post_init__(self) -> None:
        errors = [
            *typed_config.find_below_minimum(self, "supervised", 1, ("policy_batch", "reward_batch")),
            *typed_config.find_below_minimum(self, "supervised", 0, ("policy_steps", "reward_steps")),
        ]
        if self.reward_batch % 2:
            errors.append(
                f"supervised.reward_batch={self.reward_batch}: it must be even, since each correct triple is "
                "followed by a wrong one"
            )
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> SupervisedConfig:
        """Read the `supervised` section.  Raises SetupError for values out of range."""
        # The config may contain lists; tuples keep the settings hashable.
        habits = {name: tuple(section[name]) for name in ("policy_habit", "reward_habit")}
        return typed_config.read_section(cls, section, "supervised", **habits)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Settings of the periodic evaluation: the config's `eval` section."""

    # Schedule and size.
    every: int  # steps between evaluations; 0: never
    problems: int  # held-out problems, at most
    samples: int  # responses per problem

    # Sampling, independent of the rollout's so that evaluations of different runs are comparable.
    temperature: float
    top_p: float  # 1: off
    greedy: bool  # evaluate greedy responses as well

    # Labelled rows on which the reward model is measured (synthetic problems); 0: none.
    reward_rows: int

    def __post_init__(self) -> None:
        errors = [
            *typed_config.find_below_minimum(self, "eval", 1, ("problems", "samples")),
            *typed_config.find_below_minimum(self, "eval", 0, ("every", "reward_rows", "temperature")),
        ]
        if not 0 < self.top_p <= 1:
            errors.append(f"eval.top_p={self.top_p}: it must be above 0 and at most 1 (off)")
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> EvalConfig:
        """Read the `eval` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "eval")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Settings of checkpoints: the config's `checkpoint` section."""

    every: int  # steps between checkpoints; the last step is always saved
    keep: int  # number of newest checkpoints that are kept; 0: all

    def __post_init__(self) -> None:
        typed_config.raise_errors(
            [
                *typed_config.find_below_minimum(self, "checkpoint", 1, ("every",)),
                *typed_config.find_below_minimum(self, "checkpoint", 0, ("keep",)),
            ]
        )

    @classmethod
    def from_config(cls, section: ConfigDict) -> CheckpointConfig:
        """Read the `checkpoint` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "checkpoint")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Settings of logs: the config's `log` section."""

    # samples.jsonl.
    samples_every: int  # steps between dumps of samples; 0: never
    samples: int  # problems per dump

    # Measure how far a step's updates of the reward model move the logits of its pairs.  This costs two more
    # forward passes over the pairs.
    pair_motion: bool

    tensorboard: bool  # write TensorBoard event files, too

    def __post_init__(self) -> None:
        typed_config.raise_errors(
            typed_config.find_below_minimum(self, "log", 0, ("samples_every", "samples"))
        )

    @classmethod
    def from_config(cls, section: ConfigDict) -> LogConfig:
        """Read the `log` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "log")
