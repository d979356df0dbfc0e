"""Typed settings of the training loop around the steps: supervised phases, evaluation, checkpoints, logs."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from cooper_jax.runtime.trackers.tracker_choice import find_name_errors
from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.cross_checks import OWN

# The shares of correct and of wrong solutions with the habit, a word that correlates with correctness in the
# demonstrations without causing it (data/synthetic.py).
Habit = tuple[float, float]

FAULT_ACTIONS = ("stop", "skip")

# What follows an alarm of the guard against reward hacking (hacking_guard.py).
GUARD_ACTIONS = ("off", "warn", "freeze", "rollback", "fallback", "stop")


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """Settings of the supervised phases before step 1: the `supervised` section without its optimisers."""

    # A run directory from which the models at step 0 are loaded instead; "": run the phases.
    start_from: str
    # The reward model alone: a run directory, OWN, or "": that of start_from, if there is one.
    reward_from: str

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
        errors = bounds.find_out_of_bounds(self, "supervised")
        if self.reward_batch % 2:
            errors.append(
                f"supervised.reward_batch={self.reward_batch}: it must be even, since each correct triple is "
                "followed by a wrong one"
            )
        typed_config.raise_errors(errors)

    @property
    def reward_source(self) -> str:
        """The run directory from which the reward model is loaded; "": it is not loaded from a run."""
        if self.reward_from == OWN:
            return ""
        return self.reward_from or self.start_from

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
        typed_config.raise_errors(bounds.find_out_of_bounds(self, "eval"))

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
        typed_config.raise_errors(bounds.find_out_of_bounds(self, "checkpoint"))

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

    # Measure how well the last rewrites can be told from their positives without the mathematics.
    giveaway_every: int  # steps between measurements; 0: never
    giveaway_pairs: int  # rewrites that are measured, at most

    show_samples: int  # steps between responses that are shown on the terminal; 0: never

    to: str  # trackers, separated by commas (runtime/trackers)

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, "log")
        errors += find_name_errors(self.to)
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> LogConfig:
        """Read the `log` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "log")

    @property
    def rewrites_kept(self) -> int:
        """The number of last rewrites that a run keeps for the measurement of giveaways."""
        return self.giveaway_pairs if self.giveaway_every else 0


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """Settings of faults: fields of the config's first level."""

    faults: str  # one of FAULT_ACTIONS
    faults_in_a_row: int  # with skip: steps in a row with a value that is not finite, at most
    idle_steps: int  # steps in a row without a due update of the reward model, at most; 0: any number

    def __post_init__(self) -> None:
        typed_config.raise_errors(
            [
                *typed_config.find_unknown(self.faults, "faults", FAULT_ACTIONS),
                *bounds.find_out_of_bounds(self, ""),
            ]
        )

    @classmethod
    def from_config(cls, cfg: ConfigDict) -> FaultConfig:
        """Read the fields of a whole config.  Raises SetupError for values out of range."""
        return cls(faults=cfg.faults, faults_in_a_row=cfg.faults_in_a_row, idle_steps=cfg.idle_steps)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Settings of the guard against reward hacking: fields of the config's first level."""

    hacking_guard: str  # one of GUARD_ACTIONS
    hacking_anchor: int  # problems whose worked solutions are the anchor set (hacking_signals.py); 0: none

    def __post_init__(self) -> None:
        errors = typed_config.find_unknown(self.hacking_guard, "hacking_guard", GUARD_ACTIONS)
        if self.hacking_anchor < 0:
            errors.append(f"hacking_anchor={self.hacking_anchor}: it must be at least 0")
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, cfg: ConfigDict) -> GuardConfig:
        """Read the fields of a whole config.  Raises SetupError for values out of range."""
        return cls(hacking_guard=cfg.hacking_guard, hacking_anchor=cfg.hacking_anchor)
