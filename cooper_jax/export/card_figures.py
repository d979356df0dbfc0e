"""Held-out figures of a run for a model card, with their intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from cooper_jax.export.run_facts import RunFacts, hide_folders
from cooper_jax.statistics import NAN, Interval, wilson_interval

# Metric -> its name in the card.  Shares of all responses to the held-out problems.
_POLICY_SHARES = {
    "eval/oracle/accuracy": "accuracy by exact truth",
    "eval/rule/accuracy": "accuracy by the rule verifier",
    "eval/greedy/oracle/accuracy": "accuracy of greedy responses, by exact truth",
    "eval/greedy/rule/accuracy": "accuracy of greedy responses, by the rule verifier",
}
# The reward model on the policy's responses; the number of rows that decide them is not recorded.
_REWARD_SHARES = {
    "eval/rm/rule_agreement": "agreement with the rule verifier on the policy's responses",
    "eval/rm/false_positive_rate": "wrong responses that are scored as correct",
    "eval/rm/false_negative_rate": "correct responses that are scored as wrong",
}
# The reward model on labelled synthetic completions.
_REWARD_SETS = {
    "eval/rm_original/accuracy": "accuracy on labelled completions like its training data",
    "eval/rm_balanced/accuracy": "accuracy on labelled completions balanced over correctness and habit",
}
# A reward model's training.
_TRAINING_FIGURES = {
    "eval/accuracy": "accuracy",
    "eval/balanced_accuracy": "balanced accuracy",
    "eval/auroc": "area under the ROC curve",
    "eval/ece": "expected calibration error",
}
_TRAINING_SHARES = ("eval/accuracy",)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure at the run's first evaluation and at that of the exported weights."""

    name: str
    data: str  # the held-out data
    start_step: int
    step: int
    at_start: Interval
    at_step: Interval  # NaN bounds: no interval

    def show_start(self) -> str:
        """The figure at the start, as text."""
        return _show(self.at_start)

    def show_step(self) -> str:
        """The figure of the exported weights, as text."""
        return _show(self.at_step)


def list_figures(facts: RunFacts) -> list[Figure]:
    """The figures that the run has; none without an evaluation up to the exported step."""
    if not facts.evaluations:
        return []
    first, last = facts.evaluations[0], facts.evaluations[-1]
    figures = []
    for metric, (name, trials) in _choose_metrics(facts, last).items():
        if metric not in last:
            continue
        figures.append(
            Figure(
                name=name,
                data=_name_held_out(facts),
                start_step=int(first["step"]),
                step=int(last["step"]),
                at_start=wilson_interval(first.get(metric, NAN), trials),
                at_step=wilson_interval(last[metric], trials),
            )
        )
    return figures


def _choose_metrics(facts: RunFacts, row: Mapping[str, float]) -> dict[str, tuple[str, int]]:
    """Metric -> (its name, the number of independent trials; 0: unknown, so that there is no interval)."""
    if facts.is_reward_training:
        return {
            metric: (name, facts.held_out_questions if metric in _TRAINING_SHARES else 0)
            for metric, name in _TRAINING_FIGURES.items()
        }
    if facts.model == "policy":
        problems = int(row.get("eval/problems", 0))
        return {metric: (name, problems) for metric, name in _POLICY_SHARES.items()}
    rows = facts.config.eval.reward_rows
    return {metric: (name, 0) for metric, name in _REWARD_SHARES.items()} | {
        metric: (name, rows) for metric, name in _REWARD_SETS.items()
    }


def _name_held_out(facts: RunFacts) -> str:
    """The held-out data in a few words."""
    cfg = facts.config
    if facts.is_reward_training:
        return hide_folders(cfg.train_rm.eval_data) or "part of the training file"
    if cfg.data.eval:
        return hide_folders(cfg.data.eval)
    return "synthetic problems" if facts.is_synthetic else "part of the training file"


def _show(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "-"
    if math.isnan(interval.low):
        return f"{interval.value:.3f}"
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"
