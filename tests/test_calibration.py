"""Calibration of a reward model's logits: the fit, the cross-fit, its file, and the rewards of a run."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_steps import B, G, config, score

from cooper_jax.reward import calibration
from cooper_jax.reward.calibration import Calibration
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import grading, policy_stages, run_calibration
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Completion

FITTED = Calibration(2.5, 0.75, 40, 18, 0.2, 0.05, 0.06)

# Ten rows of logit 3, nine of them correct, and four of logit -1, one of them correct.  Two logits leave the fit
# no freedom: (3 - b) / T = log(9 / 1) and (-1 - b) / T = log(1 / 3).
LOGITS = np.array([3.0] * 10 + [-1.0] * 4, np.float32)
LABELS = np.array([1] * 9 + [0] + [1] + [0] * 3)
TEMPERATURE = 4 / (np.log(9) + np.log(3))
THRESHOLD = 3 - TEMPERATURE * np.log(9)


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z, np.float64)))


# --- the fit ------------------------------------------------------------------------------------------------


def test_a_fit_by_hand():
    found = calibration.fit_calibration(LABELS, LOGITS, [str(i) for i in range(14)])
    assert (found.temperature, found.threshold) == pytest.approx((TEMPERATURE, THRESHOLD), rel=1e-5)
    assert (found.rows, found.positives) == (14, 10)
    # Before: bins of 10 rows and of 4.  After: the shares are met exactly.
    before = (10 * abs(0.9 - sigmoid(3)) + 4 * abs(0.25 - sigmoid(-1))) / 14
    assert found.ece_before == pytest.approx(before) and found.ece_after == pytest.approx(0, abs=1e-5)


def test_a_fit_finds_the_temperature_and_the_threshold_that_made_the_labels():
    rng = np.random.default_rng(0)
    z = rng.normal(-1, 6, 40_000)
    y = rng.random(len(z)) < sigmoid((z + 2) / 3)
    found = calibration.fit_calibration(y, z, [str(i % 900) for i in range(len(z))])
    assert found.temperature == pytest.approx(3, rel=0.05) and found.threshold == pytest.approx(-2, abs=0.15)
    assert found.ece_before > 0.1 and found.ece_after < 0.01 and found.ece_cross_fitted < 0.015


@pytest.mark.parametrize(
    "labels, logits, message",
    [
        ([1, 1, 1], [0, 1, 2], "all 3 rows have the same label"),
        (
            [0, 0, 1, 1],
            [-1, 0, 2, 3],
            r"2 correct rows \(2 to 3\) and of 2 wrong rows \(-1 to 0\) do not overlap",
        ),
        ([1, 1, 0, 0], [-1, 0, 2, 3], "do not overlap"),
        ([0, 1, 0, 1], [-1, 0, 0, 1], "do not overlap"),  # they meet in one point
        ([0, 1, 0, 1], [2, 2, 2, 2], "do not overlap"),
        ([1, 1, 0, 1, 0, 0], [0, 1, 0.5, 2, 3, 4], "temperature is not positive"),
    ],
)
def test_rows_without_a_fit_are_refused(labels, logits, message):
    with pytest.raises(ValueError, match=message):
        calibration.fit_calibration(np.array(labels), np.array(logits, np.float32), ["a", "b"] * 3)


def test_each_question_is_calibrated_by_the_fit_of_the_others():
    """Two questions: the rows of one get the temperature and the threshold of the other, by hand."""
    other = np.array([1] * 4 + [0] + [1] * 2 + [0] * 6)
    z = np.concatenate([LOGITS, [2.0] * 5 + [0.0] * 8])
    y = np.concatenate([LABELS, other])
    questions = ["What is 1 + 1?"] * 14 + ["What is 2 + 2?"] * 13
    found = calibration.cross_fit_logits(y, z, questions)
    # Of the other: (2 - b) / T = log 4, -b / T = log(2 / 6).
    t = 2 / (np.log(4) + np.log(3))
    np.testing.assert_allclose(found[:14], (LOGITS - t * np.log(3)) / t, rtol=1e-5)
    np.testing.assert_allclose(found[14:], (z[14:] - THRESHOLD) / TEMPERATURE, rtol=1e-5, atol=1e-6)
    whole = calibration.fit_calibration(y, z, questions)
    assert whole.ece_cross_fitted == pytest.approx(
        calibration.statistics.calibration_curve(y, sigmoid(found))[0]
    )
    assert whole.ece_cross_fitted > whole.ece_after


def test_a_fold_without_a_fit_leaves_the_cross_fitted_error_out():
    z, y = np.concatenate([LOGITS, [1.0, 5.0]]), np.concatenate([LABELS, [1, 1]])
    questions = ["a"] * 14 + ["b"] * 2
    with pytest.raises(ValueError, match="without fold . of 2: all 2 rows have the same label"):
        calibration.cross_fit_logits(y, z, questions)
    assert calibration.fit_calibration(y, z, questions).ece_cross_fitted is None
    with pytest.raises(ValueError, match="1 question"):
        calibration.cross_fit_logits(LABELS, LOGITS, ["a"] * 14)


def test_folds_hold_whole_questions_in_equal_numbers():
    rng = np.random.default_rng(1)
    questions = [f"How many {n} ?" for n in rng.integers(0, 23, 400)]
    folds = calibration.assign_folds(questions)
    by_question = {q: {f for f, other in zip(folds, questions, strict=True) if other == q} for q in questions}
    assert all(len(found) == 1 for found in by_question.values())
    sizes = np.bincount([min(found) for found in by_question.values()])
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1 and sizes.sum() == 23
    # Neither the order of rows nor the layout of a question matters.
    order = rng.permutation(400)
    assert (calibration.assign_folds([questions[i].upper() + " " for i in order]) == folds[order]).all()
    assert sorted(calibration.assign_folds(["a", "b"])) == [0, 1]


def test_a_logistic_regression_with_a_ridge_is_at_its_minimum():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 3)), rng.random(50) < 0.5
    w = calibration.fit_logistic(x, y, ridge=2.0)
    np.testing.assert_allclose(x.T @ (sigmoid(x @ w) - y) + 2.0 * w, 0, atol=1e-5)
    separable = np.array([[1.0], [-1.0]])
    assert np.isfinite(calibration.fit_logistic(separable, np.array([True, False]), ridge=1e-3)).all()
    # Two equal columns have no single minimum without a ridge.
    with pytest.raises(
        ValueError, match="on 50 rows, .* of them correct, did not converge .* ridge=0: .* fit to more"
    ):
        calibration.fit_logistic(np.ones((50, 2)), y)


# --- its use and its file -----------------------------------------------------------------------------------


def test_a_logit_above_the_threshold_is_a_reward_above_a_half():
    z = np.array([0.75, 0.7500001, 0.7499999, 3.25, -1.75], np.float32)
    found = calibration.apply_calibration(z, FITTED)
    assert found.dtype == np.float32 and np.sign(found).tolist() == [0, 1, -1, 1, -1]
    assert found[3:].tolist() == [1, -1]
    assert calibration.apply_calibration(z, None) is z


def test_the_file(tmp_path):
    for fitted in (FITTED, dataclasses.replace(FITTED, ece_cross_fitted=None)):
        calibration.write_calibration(tmp_path, fitted)
        assert calibration.read_calibration(tmp_path) == fitted
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert content["temperature"] == 2.5 and content["threshold"] == 0.75 and content["rows"] == 40
    with pytest.raises(
        FileNotFoundError, match=r"absent/calibration.json is not there: .*train_rm.*calibrated=False"
    ):
        calibration.read_calibration(tmp_path / "absent")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature=0.0: it must be a number above 0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"temperature": "1"}, "field 'temperature' is '1', not a number"),
        ({"version": 2}, "its version is 2, and this code reads version 1"),
        ({"more": 1}, "its fields are"),
    ],
)
def test_a_damaged_file_is_named(change, message, tmp_path):
    content = json.loads(calibration.encode_calibration(FITTED)) | change
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        calibration.read_calibration(tmp_path)
    assert str(tmp_path / "calibration.json") in str(error.value)


# --- runs ---------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_calibration_that_it_began_with(tmp_path):
    weights, run_dir = tmp_path / "weights", tmp_path / "run"
    weights.mkdir()
    run_dir.mkdir()
    settings = RunSettings.from_config(config(**{"reward.calibrated": True, "reward.weights": str(weights)}))
    with pytest.raises(SetupError, match=r"^reward.calibrated=True: .*weights/calibration.json is not there"):
        run_calibration.load_run_calibration(settings, run_dir)

    # The file of an earlier start without a checkpoint is replaced.
    calibration.write_calibration(run_dir, dataclasses.replace(FITTED, threshold=9.0))
    calibration.write_calibration(weights, FITTED)
    assert run_calibration.load_run_calibration(settings, run_dir) == FITTED
    assert calibration.read_calibration(run_dir) == FITTED

    # With a checkpoint, what has become of the weights' directory does not matter.
    (run_dir / "checkpoints" / "0").mkdir(parents=True)
    calibration.write_calibration(weights, dataclasses.replace(FITTED, threshold=9.0))
    assert run_calibration.load_run_calibration(settings, run_dir) == FITTED

    settings = RunSettings.from_config(config(**{"reward.weights": str(weights)}))
    assert run_calibration.load_run_calibration(settings, tmp_path / "absent") is None


@pytest.mark.parametrize("own_devices", [False, True])
def test_a_calibrated_run_rewards_with_calibrated_scores(build, own_devices):
    """On shared devices and on devices of its own, where a reward model scores during the rollout."""
    meshes = {"mesh.data": 1, "mesh.reward": "1x1x1"} if own_devices else {}
    with build(2 if own_devices else 1, **meshes) as (components, state):
        problems = policy_stages.take_problems(components, first=0)
        texts = [[Completion(f"{b} and {g} #### {b}") for g in range(G)] for b in range(B)]
        whole = sum(texts, [])
        logits = score(components, state.reward, problems.row_problems, whole)

        bundle = dataclasses.replace(components.reward, calibration=FITTED)
        components = dataclasses.replace(components, reward=bundle)
        grader = grading.ResponseGrader(components, problems, state.reward_params)
        for b in range(B):
            grader.add_group(b, texts[b])
        expected = sigmoid((logits - 0.75) / 2.5)
        np.testing.assert_allclose(grader.collect_scores(state.reward_params), expected, atol=1e-6)
        assert np.abs(expected - sigmoid(logits)).max() > 0.01
        np.testing.assert_allclose(
            score(components, state.reward, problems.row_problems, whole), (logits - 0.75) / 2.5, atol=1e-5
        )


def test_components_have_the_calibration_beside_the_weights(build, tmp_path, monkeypatch):
    """Of random weights it is found nowhere, so it is put in their place."""
    monkeypatch.setattr(calibration, "read_calibration", lambda place: FITTED)
    with build(**{"reward.calibrated": True}) as (components, _):
        assert components.reward.calibration == FITTED
    with build() as (components, _):
        assert components.reward.calibration is None
