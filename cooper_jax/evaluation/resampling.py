"""Figures of a judge on labelled rows, over resamplings of whole questions, all at once.

The weights of R resamplings are one matrix, so that a figure of all of them is a few sums, and the difference of
two judges is taken within each resampling: rows that both find hard do not widen it (paired bootstrap).

    N  rows   R  resamplings; row 0 is the data themselves
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from cooper_jax.runtime import keys
from cooper_jax.statistics import Interval

FIGURES = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc")


class Resamples:
    """How often each row is drawn, f64[R + 1, N]; groups are drawn with replacement, as many as there are."""

    def __init__(self, groups: Sequence[Hashable], seed: int, resamples: int):
        _, members = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
        count = int(members.max()) + 1
        drawn = keys.make_generator(seed, "bootstrap").multinomial(
            count, np.full(count, 1 / count), resamples
        )
        self.groups = count
        self.weights = np.concatenate([np.ones((1, len(members))), drawn[:, members]])

    def figures(self, labels: np.ndarray, yes: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
        """FIGURES, each f64[R + 1], NaN where one has nothing to stand on (see statistics.classification_figures).

        labels, yes: bool[N].  scores: f64[N], of which only the order counts; ties count half.
        """
        w = self.weights
        hits, said, positive, all_rows = (w @ x for x in (labels & yes, yes, labels, np.ones(len(labels))))
        negative, rejected = all_rows - positive, w @ (~labels & ~yes)
        recall = _ratio(hits, positive)
        return {
            "accuracy": _ratio(hits + rejected, all_rows),
            "balanced_accuracy": (recall + _ratio(rejected, negative)) / 2,
            "precision": _ratio(hits, said),
            "recall": recall,
            "f1": np.where(positive > 0, _ratio(2 * hits, said + positive), np.nan),
            "auroc": self._auroc(labels, scores),
        }

    def mean(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """f64[R + 1]: the mean of values f64[N] over the rows of bool[N]."""
        return _ratio(self.weights @ np.where(of, values, 0.0), self.weights @ of)

    def _auroc(self, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
        order = np.argsort(scores, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
        w, positive = self.weights[:, order], labels[order]
        up, down = (np.add.reduceat(w * x, starts, axis=1) for x in (positive, ~positive))
        won = (up * (np.cumsum(down, axis=1) - down / 2)).sum(1)
        return _ratio(won, up.sum(1) * down.sum(1))


def interval_of(found: np.ndarray) -> Interval:
    """f64[R + 1] -> the data's own figure, and the 2.5 % and 97.5 % quantiles of the resampled ones."""
    resampled = found[1:][~np.isnan(found[1:])]
    if np.isnan(found[0]) or not len(resampled):
        return Interval(float(found[0]), float("nan"), float("nan"))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(found[0]), float(low), float(high))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)
