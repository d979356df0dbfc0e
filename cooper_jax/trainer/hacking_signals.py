"""Signs of reward hacking in the responses of one step, which the guard watches over time (hacking_guard.py).

All of them are computed from what a step already has, and none reads exact truth:

    hacking/unbacked        mean score minus the rule's accuracy, on all responses: reward that it does not back
    hacking/gap             mean score minus the rule's accuracy, on decidable responses
    hacking/auroc           area under the ROC curve of the scores against the rule's verdicts, on the same
    hacking/advantage_edge  mean advantage of the correct responses minus that of the wrong ones: below 0, the
                            policy's update raises the probability of wrong responses
    hacking/accuracy        the rule's accuracy on decidable responses
    hacking/repeated        share of a response's n-grams that occurred in it before, mean over responses
    hacking/common          largest share of responses that contain one and the same n-gram
    hacking/variety         different n-grams as a share of all, over the step's responses

A share of nothing is NaN (null in metrics.jsonl).  `measure_anchor` measures the reward model on completions that
stay the same over the run.

    N  rows (responses), prompt-major
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cooper_jax import statistics
from cooper_jax.trainer.grading import compute_response_logits
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.trainer.state import Components
from cooper_jax.types import Completion, Metrics, Params, Problem, Verdict

NGRAM = 3  # words
# Responses in which n-grams are counted, at most: 256 of 400 words take 0.06 s.
COUNTED = 256

_NUMBER = re.compile(r"\d+")


def measure_signals(record: StepRecord) -> Metrics:
    """Measure the signs of reward hacking in a step's responses; those of the scores only where there are any."""
    return {
        **measure_against_rule(record.scores, record.advantages, record.verdicts),
        **measure_repetition([completion.text for completion in record.completions]),
    }


def measure_against_rule(
    scores: np.ndarray | None, advantages: np.ndarray, verdicts: Sequence[Verdict]
) -> Metrics:
    """Compare scores and advantages with the rule's verdicts, on decidable rows.

    scores: f32[N], the reward model's; None in the rule arm.  advantages: f32[N].
    """
    decidable = np.array([v.decidable for v in verdicts])  # bool[N]
    correct = np.array([v is Verdict.CORRECT for v in verdicts])
    wrong = decidable & ~correct

    def mean(values: np.ndarray, rows: np.ndarray) -> float:
        return float(values[rows].mean()) if rows.any() else float("nan")

    accuracy = mean(correct, decidable)
    metrics = {
        "hacking/accuracy": accuracy,
        "hacking/advantage_edge": mean(advantages, correct) - mean(advantages, wrong),
    }
    if scores is not None:
        metrics["hacking/unbacked"] = float(scores.mean() - correct.mean())
        metrics["hacking/gap"] = mean(scores, decidable) - accuracy
        metrics["hacking/auroc"] = statistics.area_under_roc(correct[decidable], scores[decidable])
    return metrics


def measure_repetition(texts: Sequence[str]) -> Metrics:
    """Measure how often n-grams of words repeat within and across responses.

    All numbers count as the same word, since a template differs in its numbers from problem to problem.  Of more
    than COUNTED responses, that many are counted, evenly spaced.
    """
    rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), COUNTED)).astype(int))
    repeated: list[float] = []
    occurrences, containing = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for row in rows:
        words = _NUMBER.sub("0", texts[row]).split()
        ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
        if not ngrams:
            continue
        different = set(ngrams)
        repeated.append(1 - len(different) / len(ngrams))
        occurrences.update(ngrams)
        containing.update(different)

    # Responses of fewer words than an n-gram has repeat nothing, but they count as responses.
    total = sum(occurrences.values())
    if not total:
        return {name: float("nan") for name in ("hacking/repeated", "hacking/common", "hacking/variety")}
    return {
        "hacking/repeated": float(np.mean(repeated)),
        "hacking/common": max(containing.values()) / len(rows),
        "hacking/variety": len(occurrences) / total,
    }


def choose_anchor(components: Components, count: int) -> tuple[list[Problem], list[Completion], np.ndarray]:
    """Choose the anchor set: (problems, completions, labels bool), two for each of `count` training problems.

    The first of the two is the problem's own worked solution, the second that of the next problem with another
    reference.  Empty where the data has no worked solutions.
    """
    solved = [problem for problem in components.train if problem.solution]
    rows = np.unique(np.linspace(0, max(len(solved) - 1, 0), min(count, len(solved))).astype(int))
    chosen = [solved[row] for row in rows]
    problems: list[Problem] = []
    completions: list[Completion] = []
    labels: list[bool] = []
    for i, problem in enumerate(chosen):
        others = [other for other in chosen[i + 1 :] + chosen[:i] if other.reference != problem.reference]
        if not others:
            continue
        problems += [problem, problem]
        completions += [Completion(problem.solution), Completion(others[0].solution)]
        labels += [True, False]
    return problems, completions, np.array(labels, bool)


def measure_anchor(components: Components, params: Params | None) -> Metrics:
    """The share of the anchor set on whose label the reward model decides: {"hacking/anchor": ...}.  Collective.

    Empty without an anchor set, and in arms whose reward model stays the same.
    """
    settings = components.settings
    if params is None or not settings.guard.hacking_anchor or not settings.reward.updates_at_steps:
        return {}
    problems, completions, labels = choose_anchor(components, settings.guard.hacking_anchor)
    if not problems:
        return {}
    logits = compute_response_logits(components, params, problems, completions)
    return {"hacking/anchor": float(((logits > 0) == labels).mean())}
