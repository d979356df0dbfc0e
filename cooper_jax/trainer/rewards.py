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

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.types import Completion, Verdict

RewardFunction = Callable[[np.ndarray | None, Sequence[Verdict], Sequence[Completion]], np.ndarray]


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


def name_rewards(cfg: ConfigDict) -> list[str]:
    """The names in REWARDS that a config asks for, in the order of their application.

    cfg: the config's `reward` section.
    """
    if cfg.arm == "rule":
        return ["rule"]
    names = ["model"]
    if cfg.rule_or_model:
        names.append("rule_or_model")
    if cfg.answer_required:
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
    """
    rewards = scores
    for name in names:
        rewards = REWARDS[name](rewards, verdicts, completions)
    return rewards
