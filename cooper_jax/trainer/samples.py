"""Samples of a step for samples.jsonl: what was asked, answered, judged and paired."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from cooper_jax.types import Completion, Pair, Problem, Verdict


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """A step on the host; rows are prompt-major."""

    problems: list[Problem]  # [B]
    completions: list[Completion]  # [N]
    verdicts: list[Verdict]  # [N]
    rewards: np.ndarray  # f32[N]
    advantages: np.ndarray  # f32[N]
    pairs: list[Pair | None]  # [B * per_prompt], prompt-major; empty in arms that make no pairs
    refused: Counter[str]  # why the others are None


def select_samples(record: StepRecord, count: int) -> list[dict[str, Any]]:
    """`count` problems of a step as JSON objects: those with a valid pair first, then the others."""
    problems = len(record.problems)
    group_size = len(record.completions) // problems
    per_prompt = len(record.pairs) // problems

    valid_pairs: list[list[Pair]] = []
    for b in range(problems):
        slots = record.pairs[b * per_prompt : (b + 1) * per_prompt]
        valid_pairs.append([pair for pair in slots if pair is not None])

    order = sorted(range(problems), key=lambda b: not valid_pairs[b])  # stable
    out = []
    for b in order[:count]:
        problem = record.problems[b]
        rows = range(b * group_size, (b + 1) * group_size)
        out.append(
            {
                "id": problem.id,
                "question": problem.question,
                "reference": problem.reference,
                "responses": [_describe_response(record, n) for n in rows],
                "pairs": [_describe_pair(pair) for pair in valid_pairs[b]],
            }
        )
    return out


def _describe_response(record: StepRecord, n: int) -> dict[str, Any]:
    return {
        "text": record.completions[n].text,
        "truncated": record.completions[n].truncated,
        "verdict": record.verdicts[n].value,
        "reward": float(record.rewards[n]),
        "advantage": float(record.advantages[n]),
    }


def _describe_pair(pair: Pair) -> dict[str, str]:
    return {
        "positive": pair.positive,
        "positive_reference": pair.positive_reference or pair.problem.reference,
        "negative": pair.negative,
        "negative_reference": pair.negative_reference or pair.problem.reference,
    }
