"""A probe that measures how well positives and rewrites can be told apart without the mathematics.

1. `RecentRewrites` keeps the last rewrites with their positives.  It is part of a checkpointed state, so
   that a resumed run measures the same pairs.
2. `measure_giveaways` fits a ridge regression to n-grams of words, lengths and layout, and reports its area
   under the ROC curve (AUROC) on held-out questions: 0.5 if nothing in them tells a rewrite from a positive.
   A rewrite and its positive are always on the same side of a split.
3. `describe_giveaways` writes the warning for a value above `WARN_ABOVE`.

Every digit counts as the same token: the probe sees the places and the lengths of numbers, not their values,
in which a rewrite has to differ.  Swaps and own answers are not measured: their members have the same text.

The result depends on the pairs alone: there are no random draws.  The paper has no such probe.

    R  rewrites   F  features
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cooper_jax.statistics import area_under_roc
from cooper_jax.types import Metrics, Pair

# An AUROC above this is reported.  With MIN_PAIRS pairs its standard deviation by chance is 0.03.
WARN_ABOVE = 0.6
MIN_PAIRS = 200
# With fewer pairs, or fewer questions than folds, the AUROC is undefined (NaN).
MIN_MEASURED = 50
FOLDS = 5
RIDGE = 0.3  # weight of the squared coefficients

# Words, LaTeX commands, numbers, single marks and line breaks are the tokens of the n-grams.  A hidden number is
# one token, and of a visible one each digit.
_TOKEN = r"\\?[A-Za-z]+|{number}|\n+|[^\w\s]"
_HIDDEN, _VISIBLE = _TOKEN.format(number="0+"), _TOKEN.format(number=r"\d")


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A rewrite and the solution that was rewritten."""

    question: str
    positive: str
    negative: str


@dataclasses.dataclass(frozen=True)
class RecentRewrites:
    """The last rewrites of a run, oldest first.  Immutable; part of a run's checkpointed state."""

    rewrites: tuple[Rewrite, ...] = ()

    # A new object, and not a change in place: a checkpoint of the state before the step stays valid.
    def append(self, pairs: Sequence[Pair | None], capacity: int) -> RecentRewrites:
        """A new memory with a step's rewrites added, cut to the newest `capacity`; 0 keeps none."""
        new = [
            Rewrite(pair.problem.question, pair.positive, pair.negative)
            for pair in pairs
            if pair is not None and pair.positive != pair.negative
        ]
        return RecentRewrites((*self.rewrites, *new)[-capacity:] if capacity else ())

    def to_json(self) -> list[list[str]]:
        """[question, positive, negative] of each rewrite."""
        return [[r.question, r.positive, r.negative] for r in self.rewrites]

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[str]]) -> RecentRewrites:
        """The memory that `to_json` returned as JSON."""
        return cls(tuple(Rewrite(*row) for row in rows))


def measure_giveaways(recent: RecentRewrites) -> Metrics:
    """The probe's AUROC on the rewrites, and their number."""
    return {
        "pairs/giveaway_auroc": compute_probe_auroc(recent.rewrites),
        "pairs/giveaway_pairs": float(len(recent.rewrites)),
    }


def describe_giveaways(metrics: Metrics) -> str:
    """A warning for an AUROC above WARN_ABOVE on enough pairs; "" if there is none to give."""
    auroc, count = metrics["pairs/giveaway_auroc"], int(metrics["pairs/giveaway_pairs"])
    if count < MIN_PAIRS or not auroc > WARN_ABOVE:
        return ""
    return (
        f"warning: pairs/giveaway_auroc={auroc:.2f}: n-grams, length and layout alone separate {count} rewrites "
        f"from their positives with AUROC {auroc:.2f} (0.5: not at all), and the reward model can learn them "
        "instead of the mathematics; read pairs in samples.jsonl, and change the assistant or its prompt"
    )


def compute_probe_auroc(rewrites: Sequence[Rewrite], digits_visible: bool = False) -> float:
    """The mean over the folds of the AUROC of positives against negatives of held-out questions.

    NaN for fewer than MIN_MEASURED rewrites, or fewer questions than folds.

    Args:
      digits_visible: each digit is a token of its own, so the values of numbers count too.  False in a run.
    """
    # Folds are split by question, since a question's texts share words that others do not have.
    number_of: dict[str, int] = {}
    for rewrite in rewrites:
        number_of.setdefault(rewrite.question, len(number_of))
    if len(rewrites) < MIN_MEASURED or len(number_of) < FOLDS:
        return math.nan
    fold_of_pair = np.array([number_of[rewrite.question] % FOLDS for rewrite in rewrites])  # i64[R]

    # Labels and features: all positives, then all negatives.
    texts = [r.positive for r in rewrites] + [r.negative for r in rewrites]
    if not digits_visible:
        texts = [_hide_numbers(text) for text in texts]
    labels = np.repeat([1, 0], len(rewrites))  # i64[2R]
    folds = np.tile(fold_of_pair, 2)  # i64[2R]
    similarity = _compare_texts(texts, _VISIBLE if digits_visible else _HIDDEN)  # f64[2R, 2R]
    return float(np.mean([_compute_fold_auroc(similarity, labels, folds == i) for i in range(FOLDS)]))


def _compare_texts(texts: Sequence[str], token: str) -> np.ndarray:
    """Inner products of the texts' features: n-grams, layout and a constant, f64[texts, texts]."""
    ngrams = _count_ngrams(texts, token)
    layout = np.array([_measure_layout(text) for text in texts])  # f64[texts, F]
    layout = (layout - layout.mean(0)) / np.maximum(layout.std(0), 1e-6)

    # Both kinds of features weigh alike: a text's n-grams have length 1, and so has its layout on average.
    return (ngrams @ ngrams.T).toarray() + layout @ layout.T / layout.shape[1] + 1.0


def _count_ngrams(texts: Sequence[str], token: str) -> Any:
    """Logarithmic counts of one and two tokens in a row, scaled to length 1: a sparse f64[texts, 2^16].

    token: the pattern of a token.
    """
    # Hashing needs no vocabulary, so one pass serves all folds and no fold sees another's n-grams.
    # Imported here because it is slow to import (statistics.py).
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize

    hashing = HashingVectorizer(
        token_pattern=token, ngram_range=(1, 2), n_features=1 << 16, alternate_sign=False, norm=None
    )
    counts = hashing.transform(texts)
    counts.data = np.log1p(counts.data)
    return normalize(counts)


def _compute_fold_auroc(similarity: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> float:
    """Fit a ridge regression of the labels to the other rows; its AUROC on the held-out ones.

    Args:
      similarity: f64[2R, 2R], inner products of the rows' features.
      labels: 1 for a positive, 0 for a negative, [2R].
      held_out: bool[2R].
    """
    # In the dual form the number of unknowns is that of the rows, and the solution is exact.
    train = ~held_out
    ridge = similarity[np.ix_(train, train)] + RIDGE * np.eye(int(train.sum()))
    weights = np.linalg.solve(ridge, labels[train] - 0.5)
    decision = similarity[np.ix_(held_out, train)] @ weights

    # Equal texts must tie, although a matrix product may round them differently.
    return area_under_roc(labels[held_out] == 1, decision.round(6))


def _hide_numbers(text: str) -> str:
    """The text with 0 for every digit."""
    return re.sub(r"\d", "0", text)


def _measure_layout(text: str) -> list[float]:
    """Lengths and layout of a text, F numbers; counts are logarithmic."""
    lines = text.split("\n")
    counts = [
        len(text),
        len(text.split()),
        len(lines),
        sum(not line.strip() for line in lines),  # empty lines
        max(map(len, lines)),
        len(re.findall(r"\d+", text)),  # numbers
        len(re.findall(r"\d", text)),
        len(re.findall(r"[A-Z]", text)),
        len(re.findall(r"[.!?](?:\s|$)", text)),  # sentences
        *(text.count(mark) for mark in ("\\", "$", "=", "*", "#", "`", "(", ",", "  ", "\\boxed")),
        len(re.findall(r"^\s*(?:[-*]|\d+[.)])\s", text, re.MULTILINE)),  # items of lists
    ]
    ends_with_mark = float(text.rstrip()[-1:] in (".", "!", "?"))
    return [*(math.log1p(count) for count in counts), ends_with_mark]
