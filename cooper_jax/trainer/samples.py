"""Records of a step's text, and the samples of it that are written to samples.jsonl.

B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax.types import Completion, Pair, Problem, Verdict


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """The text and the rewards of one step, on the host."""

    problems: list[Problem]  # [B]

    # One per response.
    completions: list[Completion]  # [N]
    verdicts: list[Verdict]  # [N]
    rewards: np.ndarray  # f32[N]
    advantages: np.ndarray  # f32[N]

    # Contrastive pairs; both are empty in arms that make no pairs.
    pairs: list[Pair | None]  # [B * per_prompt], prompt-major; None if no valid pair was found
    refused: Counter[str]  # reason -> number of pairs that are None for it

    # The rewards of which `rewards` are the sum, f32[N] each; empty without reward.functions.
    rewards_by_name: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    sampled_tokens: int = 0  # also those of groups that were replaced

    # For samples.jsonl alone.
    scores: np.ndarray | None = None  # f32[N], the reward model's; None in arms without one
    prompt_tokens: Sequence[Sequence[int]] = ()  # [B]


def select_samples(
    record: StepRecord,
    count: int,
    oracle: Callable[[Problem, str], bool] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> list[dict[str, Any]]:
    """Describe `count` problems of a step as JSON objects: problems with a valid pair first, then others.

    Args:
      oracle: (problem, response) -> correct, exactly; None where this is not known.
      decode: tokens -> text, for the prompts; None: the objects have no prompts.
    """
    problem_count = len(record.problems)
    group_size = len(record.completions) // problem_count
    per_prompt = len(record.pairs) // problem_count

    valid_pairs: list[list[Pair]] = []  # [B]
    for index in range(problem_count):
        slots = record.pairs[index * per_prompt : (index + 1) * per_prompt]
        valid_pairs.append([pair for pair in slots if pair is not None])

    # False sorts before True, and sorting is stable: both parts keep the order of the step.
    order = sorted(range(problem_count), key=lambda index: not valid_pairs[index])
    samples = []
    for index in order[:count]:
        problem = record.problems[index]
        rows = range(index * group_size, (index + 1) * group_size)
        sample: dict[str, Any] = {"id": problem.id, "question": problem.question}
        if decode is not None:
            sample["prompt"] = decode(record.prompt_tokens[index])
        sample["reference"] = problem.reference
        sample["responses"] = [_describe_response(record, row, problem, oracle) for row in rows]
        sample["pairs"] = [_describe_pair(pair) for pair in valid_pairs[index]]
        samples.append(sample)
    return samples


def _describe_response(
    record: StepRecord, row: int, problem: Problem, oracle: Callable[[Problem, str], bool] | None
) -> dict[str, Any]:
    # NumPy scalars are not JSON values, so they are converted to Python floats.
    described: dict[str, Any] = {
        "text": record.completions[row].text,
        "truncated": record.completions[row].truncated,
        "verdict": record.verdicts[row].value,
        "reward": float(record.rewards[row]),
        "advantage": float(record.advantages[row]),
    }
    # The score differs from the reward where the reward is that of other functions.
    if record.scores is not None:
        described["score"] = float(record.scores[row])
    if oracle is not None:
        described["truth"] = bool(oracle(problem, record.completions[row].text))
    if record.rewards_by_name:
        described["rewards"] = {name: float(values[row]) for name, values in record.rewards_by_name.items()}
    return described


def _describe_pair(pair: Pair) -> dict[str, str]:
    # Both references are written even if they are the problem's, so that each input is complete by itself.
    return {
        "positive": pair.positive,
        "positive_reference": pair.positive_reference or pair.problem.reference,
        "negative": pair.negative,
        "negative_reference": pair.negative_reference or pair.problem.reference,
    }
