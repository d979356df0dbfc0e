"""The policy's rewards: a table of named functions.

Each function takes (scores f32[N], verdicts [N], completions [N]) and returns rewards f32[N].  `compute_rewards`
applies the functions that the config names in their order, each to what the one before returned:

    rule              1 for what the rule verifier finds correct, 0 for everything else; it reads no score
    model             the reward model's score, sigmoid of its logit
    rule_or_model     the greater of the score so far and the rule's reward
    answer_required   the score so far, but 0 where a response is truncated or has no answer

The paper's arms are `rule` alone and `model` alone.  `rule_or_model` and `answer_required` are controls (ours).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.settings import typed_config
from cooper_jax.types import Completion, Verdict

ARMS = ("rule", "model", "cooper")

RewardFunction = Callable[[np.ndarray, Sequence[Verdict], Sequence[Completion]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Settings of the rewards and of the reward model's inputs: fields of the config's `reward` section.

    Those of its updates are in reward/reward_losses.py.
    """

    arm: str  # one of ARMS
    recipe: str  # a name in RECIPES (recipes.py), whose values are in the config already; "": none
    max_tokens: int  # of a reward-model input
    rule_or_model: bool
    answer_required: bool
    shuffle_labels: bool  # a pair's members are exchanged with probability 1/2
    allow_untrained_head: bool

    def __post_init__(self) -> None:
        problems = typed_config.find_small(self, "reward", 1, ("max_tokens",))
        if self.arm not in ARMS:
            problems.append(f"reward.arm is {self.arm!r}; it is one of {', '.join(ARMS)}")
        controls = [name for name in ("rule_or_model", "answer_required") if getattr(self, name)]
        if self.arm == "rule" and controls:
            problems.append(
                f"reward.{' and reward.'.join(controls)}: the rule arm has no reward model whose rewards could be "
                "changed; leave it out, or set --config.reward.arm=model"
            )
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> RewardConfig:
        """Read the `reward` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "reward")

    @property
    def has_model(self) -> bool:
        """True in the arms that have a reward model."""
        return self.arm != "rule"

    @property
    def updates_at_steps(self) -> bool:
        """True in the arm that updates its reward model at each step."""
        return self.arm == "cooper"


def reward_rule(
    scores: np.ndarray | None, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """1 for a response that is verified correct, 0 for every other; an abstention of the rule earns nothing."""
    return np.array([v is Verdict.CORRECT for v in verdicts], np.float32)


def reward_model(
    scores: np.ndarray, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """The reward model's scores as they are."""
    return scores


def reward_rule_or_model(
    scores: np.ndarray, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """1 where the rule verifier finds the response correct, the score elsewhere."""
    return np.maximum(scores, reward_rule(None, verdicts, completions))


def require_answer(
    scores: np.ndarray, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """0 for a response that is truncated or in which the rule verifier finds no answer, the score elsewhere."""
    rows = zip(verdicts, completions, strict=True)
    unanswered = [c.truncated or v is Verdict.NO_ANSWER for v, c in rows]
    return np.where(unanswered, np.float32(0), scores)


REWARDS: dict[str, RewardFunction] = {
    "rule": reward_rule,
    "model": reward_model,
    "rule_or_model": reward_rule_or_model,
    "answer_required": require_answer,
}


def name_rewards(config: RewardConfig) -> list[str]:
    """The names in REWARDS that a config asks for, in the order of their application."""
    if config.arm == "rule":
        return ["rule"]
    names = ["model"]
    if config.rule_or_model:
        names.append("rule_or_model")
    if config.answer_required:
        names.append("answer_required")
    return names


def compute_rewards(
    names: Sequence[str],
    scores: np.ndarray | None,
    verdicts: Sequence[Verdict],
    completions: Sequence[Completion],
) -> np.ndarray:
    """The rewards f32[N] of a step's responses.

    names: keys of REWARDS, applied in turn.  scores: the reward model's, f32[N]; None in the rule arm, whose reward
    reads none.

    Raises ValueError for a reward that needs scores where there are none.
    """
    first, *others = names
    if first == "rule":
        rewards = reward_rule(scores, verdicts, completions)
    elif scores is None:
        raise ValueError(f"the reward {first} needs a reward model's scores, and there are none")
    else:
        rewards = REWARDS[first](scores, verdicts, completions)
    for name in others:
        rewards = REWARDS[name](rewards, verdicts, completions)
    return rewards
