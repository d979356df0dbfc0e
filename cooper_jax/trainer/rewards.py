"""The policy's rewards: a table of named reward functions.

Each function takes (scores f32[N], verdicts [N], completions [N]) and returns rewards f32[N].
`compute_rewards` applies the functions that the config selects, in order; the rewards of one are the scores
of the next:

    rule              1 if the rule verifier's verdict is `correct`, else 0; it reads no scores
    model             the reward model's score: the sigmoid of its logit, which reward.calibrated calibrates
    rule_or_model     the maximum of the score and the rule's reward
    rule_then_model   the rule's reward where its verdict is decidable, the score where it abstains
    answer_required   0 if the response is truncated or has no answer, else the score

The paper's rewards are `rule` alone and `model` alone.  The others are controls that the paper does not have;
`rule_or_model` and `rule_then_model` exclude each other.

    N  rows (responses), prompt-major
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.settings import typed_config
from cooper_jax.types import Completion, Verdict

# The arms of the paper's comparison: rewards of the rule, of a frozen reward model, of an updated one.
ARMS = ("rule", "model", "cooper")

# (scores f32[N], verdicts [N], completions [N]) -> rewards f32[N]
RewardFunction = Callable[[np.ndarray, Sequence[Verdict], Sequence[Completion]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Settings of the rewards and of the reward model's inputs: part of the config's `reward` section.

    The settings of the reward model's updates are in reward/reward_losses.py.
    """

    arm: str  # one of ARMS
    recipe: str  # a name in RECIPES (recipes.py), or ""; its values have been written into the config
    max_tokens: int  # longest reward-model input

    calibrated: bool  # calibrate the logits as stored beside the weights (reward/calibration.py)

    # Controls.
    rule_or_model: bool  # see the module's docstring
    rule_then_model: bool
    answer_required: bool
    shuffle_labels: bool  # exchange a pair's members with probability 1/2

    # Accept weights without a trained score head, whose rewards are noise.
    allow_untrained_head: bool

    def __post_init__(self) -> None:
        errors = typed_config.find_below_minimum(self, "reward", 1, ("max_tokens",))
        if self.arm not in ARMS:
            errors.append(f"reward.arm is {self.arm!r}; it is one of {', '.join(ARMS)}")

        # These change a reward model's rewards.  In the rule arm they would have no effect.
        names = ("calibrated", "rule_or_model", "rule_then_model", "answer_required")
        changing = [name for name in names if getattr(self, name)]
        if self.arm == "rule" and changing:
            errors.append(
                f"reward.{' and reward.'.join(changing)}: the rule arm has no reward model whose rewards "
                "could be changed; leave it out, or set --config.reward.arm=model"
            )

        # One takes the model's word for all that the rule does not accept, the other only where it abstains.
        if self.rule_or_model and self.rule_then_model:
            errors.append(
                "reward.rule_or_model=True and reward.rule_then_model=True exclude each other: they differ in "
                "the reward of a response that the rule finds wrong (the score, or 0); leave one of them out"
            )
        typed_config.raise_errors(errors)

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


# --- reward functions --------------------------------------------------------------------------------
#
# All have one signature, so that any of them can follow any other; most ignore an argument.


def reward_rule(
    scores: np.ndarray | None, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """1 for a response whose verdict is `correct`, else 0.  Responses on which the rule abstains get 0."""
    return np.array([v is Verdict.CORRECT for v in verdicts], np.float32)


def reward_model(
    scores: np.ndarray, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """The reward model's scores, unchanged."""
    return scores


def reward_rule_or_model(
    scores: np.ndarray, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """1 for a response whose verdict is `correct`, else the score (a score is at most 1)."""
    return np.maximum(scores, reward_rule(None, verdicts, completions))


def reward_rule_then_model(
    scores: np.ndarray, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """The rule's reward, 1 or 0, for a response whose verdict is decidable, else the score.

    `correct`, `wrong` and `no_answer` are decidable; the rule abstains by `unrecognised` and `timeout`.
    """
    decided = [verdict.decidable for verdict in verdicts]
    return np.where(decided, reward_rule(None, verdicts, completions), scores)


def require_answer(
    scores: np.ndarray, verdicts: Sequence[Verdict], completions: Sequence[Completion]
) -> np.ndarray:
    """0 for a response that is truncated or whose verdict is `no_answer`, else the score."""
    rows = zip(verdicts, completions, strict=True)
    unanswered = [c.truncated or v is Verdict.NO_ANSWER for v, c in rows]
    return np.where(unanswered, np.float32(0), scores)


REWARDS: dict[str, RewardFunction] = {
    "rule": reward_rule,
    "model": reward_model,
    "rule_or_model": reward_rule_or_model,
    "rule_then_model": reward_rule_then_model,
    "answer_required": require_answer,
}


# --- selection and application -----------------------------------------------------------------------


def name_rewards(config: RewardConfig) -> list[str]:
    """The names in REWARDS that a config selects, in the order in which they are applied."""
    if config.arm == "rule":
        return ["rule"]
    names = ["model"]
    if config.rule_or_model:
        names.append("rule_or_model")
    if config.rule_then_model:
        names.append("rule_then_model")
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

    Args:
      names: keys of REWARDS, applied in order.
      scores: the reward model's, f32[N]; None in the rule arm.
      verdicts, completions: [N] each.

    Raises ValueError if a reward needs scores and `scores` is None.
    """
    first, *others = names

    # `rule` is the only reward function that accepts None as scores.
    if first == "rule":
        rewards = reward_rule(scores, verdicts, completions)
    elif scores is None:
        raise ValueError(f"the reward {first} needs the scores of a reward model, and scores is None")
    else:
        rewards = REWARDS[first](scores, verdicts, completions)
    for name in others:
        rewards = REWARDS[name](rewards, verdicts, completions)
    return rewards
