"""Figures of a judge on labelled rows over all bootstrap resamples at once; whole questions are resampled.

The weights of R resamples form one matrix, so a figure of all resamples takes a few matrix products.  The
difference of two judges is taken within each resample: rows that are hard for both do not widen its interval
(paired bootstrap).

    N  rows   R  resamples; row 0 of the matrix is the data themselves
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from cooper_jax.runtime import keys
from cooper_jax.statistics import Interval

FIGURES = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc")


class Resamples:
    """Bootstrap resamples of whole groups: each draws as many groups as there are, with replacement.

    `weights` f64[R + 1, N] counts how often each row is drawn; `groups` is the number of groups.
    """

    def __init__(self, groups: Sequence[Hashable], seed: int, resamples: int):
        """Draw the resamples.

        Args:
          groups: each row's group, [N].
          seed: of the draws.
          resamples: R.
        """
        # Drawing G of G groups with replacement is a multinomial draw of the groups' counts.
        _, members = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
        count = int(members.max()) + 1
        drawn = keys.make_generator(seed, "bootstrap").multinomial(
            count, np.full(count, 1 / count), resamples
        )
        self.groups = count
        # Row 0 has the weight 1 for every row: the data themselves.
        self.weights = np.concatenate([np.ones((1, len(members))), drawn[:, members]])

    def figures(self, labels: np.ndarray, yes: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
        """Compute all FIGURES, each f64[R + 1]; NaN where undefined (see statistics.classification_figures).

        Args:
          labels: bool[N], True for a correct completion.
          yes: bool[N], the judge's decisions.
          scores: f64[N], for AUROC; only their order matters, and ties count half.
        """
        # Weighted counts in every resample, f64[R + 1] each.
        w = self.weights
        true_positives, predicted, positives = (w @ x for x in (labels & yes, yes, labels))
        rows = w @ np.ones(len(labels))
        negatives, true_negatives = rows - positives, w @ (~labels & ~yes)
        recall = _divide(true_positives, positives)

        return {
            "accuracy": _divide(true_positives + true_negatives, rows),
            "balanced_accuracy": (recall + _divide(true_negatives, negatives)) / 2,
            "precision": _divide(true_positives, predicted),
            "recall": recall,
            "f1": _divide_f1(true_positives, predicted, positives),
            "auroc": self._compute_auroc(labels, scores),
        }

    def mean(self, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Compute the mean of values f64[N] over the rows of a mask bool[N], in each resample: f64[R + 1]."""
        return _divide(self.weights @ np.where(mask, values, 0.0), self.weights @ mask)

    def f1(self, labels: np.ndarray, yes: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Compute F1 of the decisions on the rows of a mask, in each resample: f64[R + 1].

        labels, yes, mask: bool[N]; labels and yes as in `figures`.

        NaN where none of these rows has a correct completion.
        """
        true_positives, predicted, positives = (
            self.weights @ (x & mask) for x in (labels & yes, yes, labels)
        )
        return _divide_f1(true_positives, predicted, positives)

    def _compute_auroc(self, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Compute the share of (positive, negative) pairs with the positive scored higher, f64[R + 1].

        Ties count half.
        """
        # Sorting once serves all resamples: they differ in weights only, not in scores.
        order = np.argsort(scores, kind="stable")
        w, sorted_labels = self.weights[:, order], labels[order]

        # Rows of equal score form a group: within it, positives and negatives tie.
        starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
        positives, negatives = (
            np.add.reduceat(w * x, starts, axis=1) for x in (sorted_labels, ~sorted_labels)
        )  # f64[R + 1, distinct scores]

        # Each positive beats all negatives of lower groups, and half of those in its own.
        lower = np.cumsum(negatives, axis=1) - negatives / 2
        won = (positives * lower).sum(1)
        return _divide(won, positives.sum(1) * negatives.sum(1))


def compute_interval(values: np.ndarray) -> Interval:
    """Compute a figure's 95 % interval from its values f64[R + 1] on the data and on the resamples.

    The limits are NaN if the figure is NaN on the data or on every resample.
    """
    # Percentile bootstrap, over the resamples on which the figure is defined.
    resampled = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(resampled):
        return Interval(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(values[0]), float(low), float(high))


def _divide_f1(true_positives: np.ndarray, predicted: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Compute F1 from counts; NaN where there are no positives."""
    return np.where(positives > 0, _divide(2 * true_positives, predicted + positives), np.nan)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide a by b; NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)
