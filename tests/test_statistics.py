import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from cooper_jax import statistics
from cooper_jax.statistics import Interval


def test_classification_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels, said, w = rng.random(200) < 0.3, rng.random(200) < 0.5, rng.integers(0, 4, 200)
    found = statistics.classification_figures(labels, said, w)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, said, average="binary", sample_weight=w
    )
    expected = {
        "accuracy": metrics.accuracy_score(labels, said, sample_weight=w),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, said, sample_weight=w),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_classification_by_hand():
    found = statistics.classification_figures([1, 1, 1, 0], [1, 0, 0, 1])
    assert found == pytest.approx(
        {"accuracy": 1 / 4, "balanced_accuracy": 1 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    )


def test_figures_without_ground():
    nothing = statistics.classification_figures([0, 0], [0, 0])
    assert nothing["accuracy"] == 1.0
    assert all(math.isnan(nothing[n]) for n in ("balanced_accuracy", "precision", "recall", "f1"))
    assert math.isnan(statistics.area_under_roc([1, 1], [0.1, 0.2]))
    assert math.isnan(statistics.area_under_roc([1, 0], [0.1, 0.2], np.array([1.0, 0.0])))
    assert math.isnan(statistics.cohens_kappa([], []))
    assert math.isnan(statistics.cohens_kappa(["a", "a"], ["a", "a"]))
    assert math.isnan(statistics.calibration_curve([], [])[0])


def test_auroc_by_hand():
    # Positives .9 and .5, negatives .5 and .1: of four comparisons three are won and one is tied.
    assert statistics.area_under_roc([1, 1, 0, 0], [0.9, 0.5, 0.5, 0.1]) == pytest.approx(3.5 / 4)
    # Without the positive at .5 all are won.
    assert statistics.area_under_roc([1, 1, 0, 0], [0.9, 0.5, 0.5, 0.1], np.array([1, 0, 2, 1])) == 1.0


def test_kappa_by_hand():
    # 45 + 25 of 100 agree; the raters say yes to 60 and 60: expected .36 + .16.
    a = ["yes"] * 60 + ["no"] * 40
    b = ["yes"] * 45 + ["no"] * 15 + ["yes"] * 15 + ["no"] * 25
    assert statistics.cohens_kappa(a, b) == pytest.approx((0.70 - 0.52) / (1 - 0.52))


def test_calibration_by_hand():
    error, bins = statistics.calibration_curve([0, 1, 1, 1], [0.1, 0.2, 1.0, 0.95], bins=2)
    assert [b.count for b in bins] == [2, 2]
    assert [b.predicted for b in bins] == pytest.approx([0.15, 0.975])
    assert [b.observed for b in bins] == [0.5, 1.0]
    assert error == pytest.approx(0.5 * 0.35 + 0.5 * 0.025)


def test_pass_at_k():
    assert statistics.pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert statistics.pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 3 of the 6 pairs hold it
    assert statistics.pass_at_k(4, 3, 2) == 1.0
    assert statistics.pass_at_k(4, 0, 4) == 0.0
    with pytest.raises(ValueError, match="from 1 to 4"):
        statistics.pass_at_k(4, 1, 5)


@pytest.mark.parametrize(
    "answers, correct, expected",
    [
        (["7", "7", "8"], [True, True, False], 1.0),
        (["8", "7", "8"], [False, True, False], 0.0),
        (["7", "8"], [True, False], 0.5),
        ([None, None, "7"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        (["7", "7", "8"], [True, False, False], 0.5),  # a judge that is not of one mind
    ],
)
def test_majority(answers, correct, expected):
    assert statistics.majority_accuracy(answers, correct) == expected


def test_bootstrap_draws_whole_groups():
    """Of 30 groups of 10 equal rows each, the interval is that of 30 draws, not of 300."""
    rng = np.random.default_rng(1)
    truth = rng.random(30) < 0.5
    rows, groups = np.repeat(truth, 10), np.repeat(np.arange(30), 10)
    found = statistics.bootstrap_interval(lambda w: (w * rows).sum() / w.sum(), groups, rng, 2000)
    p = truth.mean()
    assert found.value == pytest.approx(p)
    half = 1.96 * math.sqrt(p * (1 - p) / 30)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_bootstrap_without_ground():
    rng = np.random.default_rng(1)
    assert statistics.bootstrap_interval(lambda w: 0.5, ["a"], rng) == Interval(0.5, 0.5, 0.5)
    empty = statistics.bootstrap_interval(lambda w: math.nan, [], rng)
    assert all(math.isnan(x) for x in (empty.value, empty.low, empty.high))


def test_wilson_interval():
    """As scipy computes it, from counts."""
    for successes, count in ((0, 10), (1, 3), (64, 256), (10, 10)):
        expected = stats.binomtest(successes, count).proportion_ci(method="wilson")
        found = statistics.wilson_interval(successes / count, count)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-7)
        assert 0 <= found.low <= found.value <= found.high + 1e-12 and found.high <= 1
    assert math.isnan(statistics.wilson_interval(0.5, 0).low)
