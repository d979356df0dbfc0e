"""Reward hacking in a training run: the onset, the guard's alarms, and the reward model's confusion at each step.

The *onset* is defined where exact truth is known: the first of two evaluations in a row whose held-out accuracy
is at least DROP below the highest accuracy so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cooper_jax.report.curves import Point, to_number
from cooper_jax.study.records import EVALUATED, JUDGED

DROP = 0.05  # 5 points
IN_A_ROW = 2

# Parts of all responses, in the order in which the page stacks them.
CONFUSION = ("true_positive", "false_negative", "false_positive", "true_negative", "undecided")


def name_truth(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str | None:
    """The metric that is the held-out accuracy by exact truth; None where truth is not known.

    Synthetic problems have exact truth, and a user's judge is the truth of its task (`rule.judge`).
    """
    if any(EVALUATED["accuracy"] in row for row in rows):
        return EVALUATED["accuracy"]
    rule = config.get("rule")
    if isinstance(rule, Mapping) and rule.get("judge"):
        return JUDGED["accuracy"]
    return None


def find_onset(points: Sequence[Point]) -> int | None:
    """The step of the onset; None if there is none.

    points: held-out accuracy at each evaluation, ascending in step.
    """
    highest, low_steps = float("-inf"), []
    for step, accuracy in points:
        if accuracy is None:
            continue
        # In floating point .60 - .55 is more than .05, and .65 - .60 less: a drop of exactly DROP counts.
        if accuracy <= highest - DROP + 1e-9:
            low_steps.append(step)
            if len(low_steps) == IN_A_ROW:
                return low_steps[0]
        else:
            low_steps = []
        highest = max(highest, accuracy)
    return None


def find_alarms(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps at which the guard raised an alarm, ascending; none for a run without one.

    A run that has gone back to a checkpoint before an alarm counts it at its first step after that.
    """
    steps, before = [], 0.0
    for row in rows:
        alarms = to_number(row.get("guard/alarms"))
        if alarms is None:
            continue
        if alarms > before:
            steps.append(int(row["step"]))
        before = alarms
    return steps


def find_first_step(rows: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The first step at which a metric is above 0; None if it never is."""
    return next((int(row["step"]) for row in rows if (to_number(row.get(metric)) or 0.0) > 0), None)


def measure_confusion(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The shares of CONFUSION among all responses of each step: the reward model's decision against the rule's.

    A score above 1/2 is a positive.  Undecided are the responses on which the rule abstains.  Empty for runs
    without a reward model.
    """
    confusion: dict[str, list[Point]] = {name: [] for name in CONFUSION}
    for row in rows:
        shares = _split_responses(row)
        if shares is not None:
            for name, share in zip(CONFUSION, shares, strict=True):
                confusion[name].append((int(row["step"]), share))
    return confusion if confusion["undecided"] else {}


def _split_responses(row: Mapping[str, Any]) -> tuple[float, ...] | None:
    """A step's shares, in the order of CONFUSION; None if the row does not have them."""
    if not {"rm/false_positive_rate", "rm/false_negative_rate", "rule/decidable"} <= row.keys():
        return None
    correct, decidable = to_number(row.get("rule/accuracy")), to_number(row["rule/decidable"])
    if correct is None or decidable is None:
        return None
    # A rate over no response is null.
    false_positive = to_number(row["rm/false_positive_rate"]) or 0.0
    false_negative = to_number(row["rm/false_negative_rate"]) or 0.0
    wrong = decidable - correct
    return (
        correct * (1 - false_negative),
        correct * false_negative,
        wrong * false_positive,
        wrong * (1 - false_positive),
        1 - decidable,
    )
