"""Metrics of a step's responses: rewards, verdicts, lengths, pairs, and the signal of reward hacking.

The hacking signal compares the reward model with the rule verifier on *decidable* rows, those whose verdict
is correct, wrong or no_answer.  A rising false-positive rate means that the policy has found wrong responses
that the reward model scores as correct.

A share of an empty set of rows is NaN (null in metrics.jsonl).

    N  rows (responses), prompt-major
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from cooper_jax.policy.advantages import measure_deviations
from cooper_jax.trainer.hacking_signals import measure_signals
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.types import Completion, Metrics, Pair, Problem, Verdict

Oracle = Callable[[Problem, str], bool]  # (problem, response text) -> correct

# A group whose rewards have a smaller standard deviation counts as nearly equal.
FLAT_STD = 0.05


def measure_step(record: StepRecord, scores: np.ndarray | None, oracle: Oracle | None) -> Metrics:
    """Compute all metrics of a step's responses.

    scores: the reward model's, f32[N], before the step's update; None in the rule arm.
    """
    # Rows are prompt-major, so row n belongs to problem n // G.
    group_size = len(record.completions) // len(record.problems)
    row_problems = [record.problems[n // group_size] for n in range(len(record.completions))]
    metrics = {
        "reward/mean": float(record.rewards.mean()),
        "reward/std": float(record.rewards.std()),
        "reward/flat_group_share": measure_flat_groups(record.rewards, record.advantages, group_size),
        **measure_verdicts(record.verdicts),
        **measure_responses(record.completions),
        **measure_pairs(record.pairs, record.refused),
        **measure_oracle(oracle, row_problems, record.completions),
    }
    if scores is not None:
        metrics |= measure_hacking(scores, record.verdicts)
    return metrics | measure_signals(record)


def compute_share(hits: np.ndarray, among: np.ndarray) -> float:
    """The share of the rows in `among` that are also in `hits`, both bool[N]; NaN if `among` is empty."""
    return float((hits & among).sum() / among.sum()) if among.any() else float("nan")


def measure_flat_groups(rewards: np.ndarray, advantages: np.ndarray, group_size: int) -> float:
    """The share of the sum of |advantage| that comes from groups with nearly equal rewards; 0 if the sum is 0.

    Divided by their own standard deviation, differences of a reward model's scores that are noise get advantages
    as large as any (policy.std_floor bounds them).

    rewards, advantages: f32[N].
    """
    deviations = measure_deviations(rewards, group_size)
    mass = np.abs(advantages).reshape(-1, group_size).sum(axis=1)
    return float(mass[deviations < FLAT_STD].sum() / mass.sum()) if mass.sum() > 0 else 0.0


def measure_verdicts(verdicts: Sequence[Verdict]) -> Metrics:
    """The share of rows with each verdict; the share of correct rows is called `rule/accuracy`."""
    counts, rows = Counter(verdicts), max(len(verdicts), 1)

    # Abstentions count as not correct, so accuracy is a lower bound where the rule cannot decide.
    metrics = {f"rule/{v.value}": counts[v] / rows for v in Verdict if v is not Verdict.CORRECT}
    metrics["rule/accuracy"] = counts[Verdict.CORRECT] / rows
    metrics["rule/decidable"] = sum(counts[v] for v in Verdict if v.decidable) / rows
    return metrics


def measure_hacking(scores: np.ndarray, verdicts: Sequence[Verdict]) -> Metrics:
    """Compare the reward model's scores with the rule's verdicts, on decidable rows.

    scores: f32[N], sigmoid of the reward model's logits, before this step's update.  A score above 1/2 is a
      positive.
    """
    decidable = np.array([v.decidable for v in verdicts])  # bool[N]
    correct = np.array([v is Verdict.CORRECT for v in verdicts])
    positive, wrong = scores > 0.5, decidable & ~correct

    def mean(rows: np.ndarray) -> float:
        return float(scores[rows].mean()) if rows.any() else float("nan")

    # The rates are those of a confusion matrix in which the rule is the truth.
    return {
        "rm/false_positive_rate": compute_share(positive, wrong),
        "rm/false_negative_rate": compute_share(~positive, correct),
        "rm/rule_agreement": compute_share(positive == correct, decidable),
        "rm/mean_on_correct": mean(correct),
        "rm/mean_on_wrong": mean(wrong),
        "rm/mean": float(scores.mean()),
    }


def measure_responses(completions: Sequence[Completion]) -> Metrics:
    """Lengths in sampled tokens, and the share of responses that reached the length limit."""
    lengths = np.array([c.tokens for c in completions])
    return {
        "response/tokens_mean": float(lengths.mean()),
        "response/tokens_max": float(lengths.max()),
        "response/truncated": float(np.mean([c.truncated for c in completions])),
    }


def measure_pairs(pairs: Sequence[Pair | None], refused: Counter[str]) -> Metrics:
    """Count the valid pairs among those requested, and the reasons for which the others were refused."""
    valid = sum(pair is not None for pair in pairs)
    metrics = {"pairs/valid": float(valid), "pairs/valid_share": valid / max(len(pairs), 1)}
    for reason, count in sorted(refused.items()):
        metrics[f"pairs/refused_{reason}"] = float(count)
    return metrics


def measure_oracle(
    oracle: Oracle | None, problems: Sequence[Problem], completions: Sequence[Completion]
) -> Metrics:
    """Accuracy by exact truth, over all responses and by subject; empty if oracle is None.

    problems: [N], the problem of each completion.
    """
    if oracle is None:
        return {}
    correct = np.array([oracle(p, c.text) for p, c in zip(problems, completions, strict=True)])  # bool[N]
    subjects = np.array([p.subject for p in problems])

    # Beside `rule/accuracy` this shows how often the rule itself errs.
    metrics = {"oracle/accuracy": float(correct.mean())}
    for subject in sorted({*subjects} - {""}):
        metrics[f"oracle/accuracy_{subject}"] = compute_share(correct, subjects == subject)
    return metrics
