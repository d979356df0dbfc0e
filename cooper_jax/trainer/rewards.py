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

With `reward.functions` the config names the rewards itself: entries of this table, each applied to the reward
model's scores, and functions of the user's own (reward_functions.py).  They are then combined, not chained.

    N  rows (responses), prompt-major
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.user_code import is_user_code
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

    # Tokens before rollout.max_new_tokens in which a response loses up to 1 of its reward; 0: no penalty.
    overlong_tokens: int

    # Accept weights without a trained score head, whose rewards are noise.
    allow_untrained_head: bool

    # Rewards by name, in place of the arm's.
    functions: str  # keys of REWARDS and PATH.py:NAME, separated by commas; "": the arm's reward
    function_weights: str  # one number each, separated by commas; "": 1 each
    function_normalise: bool  # normalise each within its group before the weighted sum
    function_messages: bool  # prompts and completions as lists of messages
    function_timeout: float  # seconds per call of a user's function

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, "reward")
        errors += self._find_function_errors()
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

        # Rewards that are normalised one by one are not summed before the advantages.
        if self.overlong_tokens and self.function_normalise:
            errors.append(
                f"reward.overlong_tokens={self.overlong_tokens}: it is subtracted from the sum of the rewards, "
                "which reward.function_normalise=True does not use; leave one of them out"
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

    def _find_function_errors(self) -> list[str]:
        """Messages about `functions` and the settings that belong to it."""
        errors = []
        if not self.function_timeout > 0:
            errors.append(f"reward.function_timeout={self.function_timeout}: it must be above 0 seconds")
        if self.function_names:
            return [*errors, *self._find_name_errors(), *self._find_weight_errors()]

        for field in ("function_weights", "function_normalise", "function_messages"):
            if value := getattr(self, field):
                errors.append(f"reward.{field}={value}: it needs --config.reward.functions")
        return errors

    def _find_name_errors(self) -> list[str]:
        """Messages about names that are unknown or repeated, or that contradict the arm's settings."""
        errors, names = [], self.function_names
        for name in names:
            if name not in REWARDS and not is_user_code(name):
                errors.append(
                    f"reward.functions={self.functions!r}: {name!r} is none of {', '.join(REWARDS)}, and does "
                    "not have the form PATH.py:NAME"
                )
            elif self.arm == "rule" and name in REWARDS and name != "rule":
                errors.append(
                    f"reward.functions={self.functions!r}: {name} needs a reward model, which the rule arm does "
                    "not have: leave it out, or set --config.reward.arm=model"
                )
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            errors.append(f"reward.functions={self.functions!r}: {', '.join(repeated)} occurs twice")

        # These change the arm's reward, which the functions replace.
        for field in ("rule_or_model", "rule_then_model", "answer_required"):
            if getattr(self, field):
                errors.append(
                    f"reward.{field}=True: it does nothing beside reward.functions: leave it out, and name "
                    f"{field} among the functions"
                )
        return errors

    def _find_weight_errors(self) -> list[str]:
        """A message about weights that are no numbers, or not one for each function."""
        where = f"reward.function_weights={self.function_weights!r}"
        try:
            weights = self.weights
        except ValueError:
            return [f"{where}: give numbers, as in 1,0.5"]
        if len(weights) != len(self.function_names) or not all(map(math.isfinite, weights)):
            return [
                f"{where}: it has {len(weights)} numbers for {len(self.function_names)} functions; give each a "
                "finite number"
            ]
        return []

    @property
    def function_names(self) -> list[str]:
        """The entries of `functions`."""
        return [name.strip() for name in self.functions.split(",") if name.strip()]

    @property
    def weights(self) -> list[float]:
        """The weight of each of `function_names`.  Raises ValueError for text that is no number."""
        if not self.function_weights.strip():
            return [1.0] * len(self.function_names)
        return [float(weight) for weight in self.function_weights.split(",")]

    @property
    def has_model(self) -> bool:
        """True in the arms that have a reward model."""
        return self.arm != "rule"

    @property
    def reads_verdicts(self) -> bool:
        """True if the rewards depend on the rule's verdicts, which must then be awaited before the update."""
        return bool(self.function_names) or name_rewards(self) != ["model"]

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
      verdicts, completions: [N] each; `model` reads neither.

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


def penalise_length(
    completions: Sequence[Completion], max_new_tokens: int, overlong_tokens: int
) -> np.ndarray:
    """What is added to the rewards of long responses, f32[N] from -1 to 0 (DAPO, arXiv 2503.14476, eq. 13).

    With L = max_new_tokens and C = overlong_tokens: 0 up to L - C tokens, from there linearly down to -1 at L.
    """
    lengths = np.array([completion.tokens for completion in completions], np.float32)
    return -np.clip((lengths - (max_new_tokens - overlong_tokens)) / overlong_tokens, 0.0, 1.0)
