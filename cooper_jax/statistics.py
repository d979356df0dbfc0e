"""Statistics of labels, scores and samples for evaluations.

1. `classification_figures`, `area_under_roc` and `cohens_kappa` follow scikit-learn's definitions and return
   NaN where those are undefined.
2. `calibration_curve` compares predicted probabilities with observed frequencies.
3. `pass_at_k` and `majority_accuracy` summarise the samples of one problem.
4. `bootstrap_interval` computes a 95 % interval of any statistic.  It resamples whole groups (questions,
   problems), because rows of one question are not independent.
5. `wilson_interval` computes one of a share, from the share and the number of trials alone.

    N  rows
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

# Undefined statistics are NaN, not 0 or an error: metrics.jsonl stores NaN as null and plots leave a gap.
NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float


def classification_figures(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """Compute accuracy, balanced_accuracy, precision, recall and f1.

    accuracy is NaN if all weights are 0, balanced_accuracy if a class is missing, precision if no row is
    predicted positive, recall and f1 if no label is positive.

    Args:
      labels, predictions: bool[N].
      weights: f64[N], one per row; None: all 1.
    """
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    row_weights = np.ones(len(labels)) if weights is None else np.asarray(weights, float)  # f64[N]

    # The weighted confusion matrix: the bootstrap's weights are the number of times that a row was drawn.
    true_positive = row_weights[labels & predictions].sum()
    predicted_positive = row_weights[predictions].sum()
    positive = row_weights[labels].sum()
    negative = row_weights.sum() - positive
    true_negative = row_weights[~labels & ~predictions].sum()
    agreeing = row_weights[labels == predictions].sum()

    # A ratio whose denominator is 0 is NaN; F1 is 2 TP / (predicted positives + positives).
    recall = true_positive / positive if positive else NAN
    balanced = (recall + true_negative / negative) / 2 if positive and negative else NAN
    return {
        "accuracy": float(agreeing / row_weights.sum()) if row_weights.sum() else NAN,
        "balanced_accuracy": float(balanced),
        "precision": float(true_positive / predicted_positive) if predicted_positive else NAN,
        "recall": float(recall),
        "f1": float(2 * true_positive / (predicted_positive + positive)) if positive else NAN,
    }


def area_under_roc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The probability that a random positive scores above a random negative; a tie counts one half.

    NaN unless both classes occur in rows of positive weight.

    Args:
      labels: bool[N].
      scores: f64[N].
      weights: f64[N], one per row; None: all 1.
    """
    labels = np.asarray(labels, bool)

    # A bootstrap resample gives weight 0 to rows that it did not draw; scikit-learn would count their class.
    used = np.ones(len(labels), bool) if weights is None else np.asarray(weights) > 0  # bool[N]
    if labels[used].all() or not labels[used].any():
        return NAN
    weights = None if weights is None else weights[used]
    # scikit-learn takes half of the time that every command needs to start, and few need it.
    from sklearn import metrics

    return float(metrics.roc_auc_score(labels[used], np.asarray(scores)[used], sample_weight=weights))


def cohens_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Cohen's kappa of two raters: (observed - expected agreement) / (1 - expected agreement).

    a, b: the raters' ratings, [N] each.  NaN without rows, and if both raters give one rating to all rows.
    """
    # With a single rating the expected agreement is 1, and kappa is 0 / 0.
    if not len(a) or (len(set(a)) == 1 and set(a) == set(b)):
        return NAN
    from sklearn import metrics

    return float(metrics.cohen_kappa_score(list(a), list(b)))


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bin of a calibration curve: the rows whose predicted probability is in [low, high)."""

    low: float
    high: float
    count: int  # rows
    predicted: float  # mean predicted probability
    observed: float  # share of positive labels


def calibration_curve(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10
) -> tuple[float, tuple[Bin, ...]]:
    """Compute the expected calibration error (ECE) and the non-empty bins of equal width.

        ECE = sum_b n_b / N |observed_b - predicted_b|        (Guo et al. 2017, arXiv 1706.04599, eq. 3)

    ECE is NaN without rows.

    Args:
      labels: bool[N].
      probabilities: f64[N], predicted probabilities of a positive label.
      bins: the number of bins that divide [0, 1].
    """
    labels, probabilities = np.asarray(labels, float), np.asarray(probabilities, float)

    # The last bin is closed: it includes a probability of exactly 1.
    bin_of_row = np.minimum((probabilities * bins).astype(int), bins - 1)  # i64[N]
    curve = []
    for index in range(bins):
        rows = bin_of_row == index  # bool[N]
        if rows.any():
            predicted, observed = float(probabilities[rows].mean()), float(labels[rows].mean())
            curve.append(Bin(index / bins, (index + 1) / bins, int(rows.sum()), predicted, observed))

    if not len(probabilities):
        return NAN, ()
    error = sum(b.count * abs(b.observed - b.predicted) for b in curve) / len(probabilities)
    return float(error), tuple(curve)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that k of a problem's samples, drawn without replacement, include a correct one.

        pass@k = 1 - C(n - c, k) / C(n, k)        n samples, c of them correct (arXiv 2107.03374, eq. 1)

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} correct: k is from 1 to {samples}")

    # math.comb is exact for integers and 0 where k > n - c, so that pass@k is then exactly 1.
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_accuracy(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """The correctness of the most frequent answer (maj@k), in [0, 1]; 0 if no sample has an answer.

    Answers with equally many samples are averaged.

    Args:
      answers: one per sample; None for a sample without an answer, which has no vote.
      correct: one per sample.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    highest_count = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == highest_count]

    # Samples with equal answers may be judged differently (one may time out), so each answer is averaged.
    correctness = []
    for winner in winners:
        winner_correct = [c for answer, c in zip(answers, correct, strict=True) if answer == winner]
        correctness.append(np.mean(winner_correct))
    return float(np.mean(correctness))


def wilson_interval(share: float, count: int) -> Interval:
    """Compute the 95 % Wilson score interval of a share of `count` independent trials.

    Unlike the normal approximation it stays within [0, 1] and is not empty at shares of 0 and 1 (Wilson 1927).
    NaN bounds if count is 0 or the share is NaN.
    """
    if count == 0 or math.isnan(share):
        return Interval(share, NAN, NAN)
    z = 1.959964  # the 97.5 % quantile of the normal distribution
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # Rounding may carry the bounds of 0 and 1 beyond them.
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[Hashable] | np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> Interval:
    """Compute a statistic with its 95 % interval over resampled groups (percentile cluster bootstrap).

    Args:
      statistic: a function of row weights f64[N], the number of times that each row was drawn.  Resamples
        for which it returns NaN are ignored.
      groups: the group of each row, [N].  A resample draws as many groups as exist, with replacement.
      rng: the source of the draws.
      resamples: the number of resamples.
    """
    _, group_of_row = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)  # i64[N]
    value = float(statistic(np.ones(len(group_of_row))))
    group_count = group_of_row.max() + 1 if len(group_of_row) else 0
    if not group_count:
        return Interval(value, NAN, NAN)

    # A resample is kept as the number of times that each group was drawn: all rows of a group share it.
    uniform = np.full(group_count, 1 / group_count)
    resample_counts = rng.multinomial(group_count, uniform, size=resamples)  # i64[resamples, groups]
    values = np.array([statistic(counts[group_of_row].astype(float)) for counts in resample_counts])

    # The 2.5 % and 97.5 % quantiles of the resamples in which the statistic is defined.
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(value, NAN, NAN)
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(value, float(low), float(high))
