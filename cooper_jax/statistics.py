"""Statistics of labels, scores and samples for evaluations.

1. `classification_figures`, `area_under_roc`, `cohens_kappa`: scikit-learn's definitions, NaN where
   undefined.
2. `calibration_curve`: predicted probabilities against observed frequencies.
3. `pass_at_k` and `majority_accuracy` of a problem's samples.
4. `bootstrap_interval`: a 95 % interval of any of these.  It resamples whole groups (questions, problems),
   because rows of one question are not independent.

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
    """A statistic with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def classification_figures(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """Compute accuracy, balanced_accuracy, precision, recall and f1.

    balanced_accuracy is NaN if one class is missing, precision if nothing is predicted positive, recall and
    f1 if nothing is positive.

    Args:
      labels, predictions: bool[N].
      weights: f64[N], one per row; None: all 1.
    """
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    w = np.ones(len(labels)) if weights is None else np.asarray(weights, float)
    true_positive = w[labels & predictions].sum()
    predicted_positive = w[predictions].sum()
    positive = w[labels].sum()
    negative = w.sum() - positive
    true_negative = w[~labels & ~predictions].sum()

    recall = true_positive / positive if positive else NAN
    balanced = (recall + true_negative / negative) / 2 if positive and negative else NAN
    return {
        "accuracy": float(w[labels == predictions].sum() / w.sum()) if w.sum() else NAN,
        "balanced_accuracy": float(balanced),
        "precision": float(true_positive / predicted_positive) if predicted_positive else NAN,
        "recall": float(recall),
        "f1": float(2 * true_positive / (predicted_positive + positive)) if positive else NAN,
    }


def area_under_roc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The probability that a positive scores above a negative, ties counting half; NaN without both classes.

    Args:
      labels: bool[N].
      scores: f64[N].
      weights: f64[N], one per row; None: all 1.
    """
    labels = np.asarray(labels, bool)
    used = np.ones(len(labels), bool) if weights is None else np.asarray(weights) > 0
    if labels[used].all() or not labels[used].any():
        return NAN
    weights = None if weights is None else weights[used]
    return float(metrics.roc_auc_score(labels[used], np.asarray(scores)[used], sample_weight=weights))


def cohens_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Cohen's kappa of two raters: (observed - expected agreement) / (1 - expected agreement).

    NaN without rows, and if both raters give one and the same rating to all rows.
    """
    if not len(a) or (len(set(a)) == 1 and set(a) == set(b)):
        return NAN
    return float(metrics.cohen_kappa_score(list(a), list(b)))


@dataclasses.dataclass(frozen=True)
class Bin:
    """The rows whose predicted probability lies in [low, high)."""

    low: float
    high: float
    count: int
    predicted: float  # mean probability
    observed: float  # share of positive labels


def calibration_curve(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10
) -> tuple[float, tuple[Bin, ...]]:
    """Compute (expected calibration error, non-empty bins of equal width).

    ECE = sum_b n_b / N |observed_b - predicted_b| (Guo et al. 2017, arXiv 1706.04599, eq. 3); NaN without
    rows.

    Args:
      labels: bool[N].
      probabilities: f64[N].
    """
    labels, p = np.asarray(labels, float), np.asarray(probabilities, float)
    bin_of_row = np.minimum((p * bins).astype(int), bins - 1)  # i64[N]; a probability of 1 is in the last bin
    curve = []
    for b in range(bins):
        rows = bin_of_row == b
        if rows.any():
            predicted, observed = float(p[rows].mean()), float(labels[rows].mean())
            curve.append(Bin(b / bins, (b + 1) / bins, int(rows.sum()), predicted, observed))

    if not len(p):
        return NAN, ()
    error = sum(b.count * abs(b.observed - b.predicted) for b in curve) / len(p)
    return float(error), tuple(curve)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that k samples, drawn without replacement from n, contain one of the c correct ones.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).  Raises ValueError if k or c is
    above n.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} correct: k is from 1 to {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_accuracy(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Correctness of the most frequent answer (maj@k), in [0, 1].

    Ties are averaged.  None stands for no answer and never wins.  An answer's correctness is the mean over
    the samples that gave it.
    """
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]
    correctness = []
    for winner in winners:
        own = [c for answer, c in zip(answers, correct, strict=True) if answer == winner]
        correctness.append(np.mean(own))
    return float(np.mean(correctness))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[Hashable],
    rng: np.random.Generator,
    resamples: int = 1000,
) -> Interval:
    """Compute the 2.5 % and 97.5 % quantiles of a statistic over resampled groups (cluster bootstrap).

    Args:
      statistic: f64[N] weights, the number of times that each row was drawn -> the statistic.  Resamples in
        which it is NaN are ignored.
      groups: the group of each row; groups are drawn with replacement, as many as there are.
    """
    _, members = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    value = float(statistic(np.ones(len(members))))
    count = members.max() + 1 if len(members) else 0
    if not count:
        return Interval(value, NAN, NAN)

    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # i64[resamples, groups]
    values = np.array([statistic(times[members].astype(float)) for times in draws])
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(value, NAN, NAN)
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(value, float(low), float(high))
