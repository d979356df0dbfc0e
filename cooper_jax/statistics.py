"""Statistics of labels, scores and samples: what evaluations report.

1. `classification`, `auroc`, `kappa`: scikit-learn's, with NaN where a figure has nothing to stand on.
2. `calibration`: how often what a probability says comes true.
3. `pass_at_k` and `majority` of a problem's samples.
4. `bootstrap`: a 95 % interval of any of these, resampling whole groups (questions, problems): rows of one
   question are not independent.

    N  rows
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from sklearn import metrics

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with the interval that holds it in 95 of 100 resamplings."""

    value: float
    low: float
    high: float


def classification_figures(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """accuracy, balanced_accuracy, precision, recall, f1 of bool[N] predictions against bool[N] labels.

    balanced_accuracy is NaN where one class is missing, precision where nothing is called positive, recall and f1
    where nothing is.
    """
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    w = np.ones(len(labels)) if weights is None else np.asarray(weights, float)
    hits, said, positive = (w[x].sum() for x in (labels & predictions, predictions, labels))
    negative = w.sum() - positive
    rejected = w[~labels & ~predictions].sum()
    recall = hits / positive if positive else NAN
    return {
        "accuracy": float(w[labels == predictions].sum() / w.sum()) if w.sum() else NAN,
        "balanced_accuracy": float((recall + rejected / negative) / 2) if positive and negative else NAN,
        "precision": float(hits / said) if said else NAN,
        "recall": float(recall),
        "f1": float(2 * hits / (said + positive)) if positive else NAN,
    }


def area_under_roc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The chance that a positive's score is above a negative's, ties counting half; NaN without both."""
    labels = np.asarray(labels, bool)
    used = np.ones(len(labels), bool) if weights is None else np.asarray(weights) > 0
    if labels[used].all() or not labels[used].any():
        return NAN
    weights = None if weights is None else weights[used]
    return float(metrics.roc_auc_score(labels[used], np.asarray(scores)[used], sample_weight=weights))


def cohens_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Cohen's kappa of two raters: (observed - expected agreement) / (1 - expected); NaN where both always say
    one and the same, or there is no row."""
    if not len(a) or (len(set(a)) == 1 and set(a) == set(b)):
        return NAN
    return float(metrics.cohen_kappa_score(list(a), list(b)))


@dataclasses.dataclass(frozen=True)
class Bin:
    """Rows whose probability lies in [low, high): how many, what they say on average, and what came true."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


def calibration_curve(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10
) -> tuple[float, tuple[Bin, ...]]:
    """(expected calibration error, reliability): ECE = sum_b n_b / N |observed_b - predicted_b|, over bins of
    equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3); NaN without rows.  Empty bins are left out."""
    labels, p = np.asarray(labels, float), np.asarray(probabilities, float)
    place = np.minimum((p * bins).astype(int), bins - 1)
    table = tuple(
        Bin(b / bins, (b + 1) / bins, int(rows.sum()), float(p[rows].mean()), float(labels[rows].mean()))
        for b in range(bins)
        if (rows := place == b).any()
    )
    error = sum(b.count * abs(b.observed - b.predicted) for b in table) / len(p) if len(p) else NAN
    return float(error), table


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that k of a problem's samples, drawn without replacement, hold a correct one:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).  Raises ValueError for k > n."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} correct: k is from 1 to {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_accuracy(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is correct (maj@k), in [0, 1]: ties share, None is no answer and never
    wins, and an answer's correctness is the mean over the samples that gave it."""
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [a for a, n in counts.items() if n == most]
    right = [np.mean([c for a, c in zip(answers, correct, strict=True) if a == winner]) for winner in winners]
    return float(np.mean(right))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[Hashable],
    rng: np.random.Generator,
    resamples: int = 1000,
) -> Interval:
    """The 2.5 % and 97.5 % quantiles of a statistic over resamplings of whole groups (cluster bootstrap).

    Args:
      statistic: f64[N] weights, how often each row was drawn -> the figure.  Resamples in which it is NaN are
        left out.
      groups: the group of each row; groups are drawn with replacement, as many as there are.
    """
    _, members = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    value = float(statistic(np.ones(len(members))))
    count = members.max() + 1 if len(members) else 0
    if not count:
        return Interval(value, NAN, NAN)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    found = np.array([statistic(times[members].astype(float)) for times in drawn])
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(value, NAN, NAN)
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(value, float(low), float(high))
