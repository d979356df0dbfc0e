"""What a step tells its user: rewards, verdicts, lengths, and the signal that a reward model is being hacked.

The hacking signal compares the reward model with the rule on *decidable* rows, those whose verdict is correct,
wrong or no_answer: a rising false-positive rate means that the policy has found what its judge likes better
than the truth.  A share over no rows is NaN (null in metrics.jsonl).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from cooper_jax.types import Completion, Metrics, Pair, Problem, Verdict


def share(hits: np.ndarray, among: np.ndarray) -> float:
    """The share of rows `among` that are `hits`; NaN when there are none."""
    return float((hits & among).sum() / among.sum()) if among.any() else float("nan")


def verdict_metrics(verdicts: Sequence[Verdict]) -> Metrics:
    """Share of rows with each verdict; `rule/accuracy` is that of the correct ones."""
    counts, n = Counter(verdicts), max(len(verdicts), 1)
    out = {f"rule/{v.value}": counts[v] / n for v in Verdict if v is not Verdict.CORRECT}
    return out | {
        "rule/accuracy": counts[Verdict.CORRECT] / n,
        "rule/decidable": sum(counts[v] for v in Verdict if v.decidable) / n,
    }


def hacking_metrics(rewards: np.ndarray, verdicts: Sequence[Verdict]) -> Metrics:
    """The reward model (positive: reward above one half) against the rule, on decidable rows.

    rewards: f32[N], sigmoid of the reward model's logits, before this step's update.
    """
    decidable = np.array([v.decidable for v in verdicts])
    correct = np.array([v is Verdict.CORRECT for v in verdicts])
    positive, wrong = rewards > 0.5, decidable & ~correct

    def mean(rows):
        return float(rewards[rows].mean()) if rows.any() else float("nan")

    return {
        "rm/false_positive_rate": share(positive, wrong),
        "rm/false_negative_rate": share(~positive, correct),
        "rm/rule_agreement": share(positive == correct, decidable),
        "rm/mean_on_correct": mean(correct),
        "rm/mean_on_wrong": mean(wrong),
        "rm/mean": float(rewards.mean()),
    }


def response_metrics(completions: Sequence[Completion]) -> Metrics:
    lengths = np.array([c.tokens for c in completions])
    return {
        "response/tokens_mean": float(lengths.mean()),
        "response/tokens_max": float(lengths.max()),
        "response/truncated": float(np.mean([c.truncated for c in completions])),
    }


def pair_metrics(pairs: Sequence[Pair | None], refused: Counter) -> Metrics:
    """How many of the asked-for pairs were made, and why the others were not."""
    asked = max(len(pairs), 1)
    valid = sum(p is not None for p in pairs)
    return {"pairs/valid": float(valid), "pairs/valid_share": valid / asked} | {
        f"pairs/refused_{reason}": float(n) for reason, n in sorted(refused.items())
    }


def oracle_metrics(
    oracle: Callable[[Problem, str], bool] | None,
    problems: Sequence[Problem],
    completions: Sequence[Completion],
) -> Metrics:
    """Exact truth, where the problems have it (synthetic ones), also by subject: it measures and never trains."""
    if oracle is None:
        return {}
    right = np.array([oracle(p, c.text) for p, c in zip(problems, completions, strict=True)])
    subjects = np.array([p.subject for p in problems])
    of_subjects = {f"oracle/accuracy_{s}": share(right, subjects == s) for s in sorted({*subjects} - {""})}
    return {"oracle/accuracy": float(right.mean())} | of_subjects
