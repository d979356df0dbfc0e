"""Labelled rows of the reward model's update: which, how many, with what weights, and what is remembered."""

import dataclasses
import json

import numpy as np
import pytest

from cooper_jax.configs import base
from cooper_jax.reward import labelled_rollouts
from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.types import Completion, Problem, Triple, Verdict

C, W, N, U, T = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.UNRECOGNISED, Verdict.TIMEOUT


EMPTY = Replay()


def choose(verdicts, scores, memory=EMPTY, step=1, seed=0, position=0, truncated=(), **fields):
    cfg = base.get_config().reward
    cfg.update({"rollout_bce": 1.0} | fields)
    cfg = RewardUpdateConfig.from_config(cfg)
    rows = range(len(verdicts))
    return labelled_rollouts.choose_rows(
        [Problem(f"q{n}", str(n)) for n in rows],
        [Completion(f"row {n}", truncated=n in truncated) for n in rows],
        verdicts,
        np.asarray(scores, np.float32),
        memory,
        cfg,
        seed=seed,
        step=step,
        position=position,
    )


def numbers(triples, label=None):
    return [int(t.question[1:]) for t in triples if label is None or t.label == label]


def test_what_the_rule_decides_is_labelled_and_no_more():
    verdicts = [C, W, N, U, T, C]
    drawn, replay = choose(verdicts, [0.5] * 6)
    assert sorted(numbers(drawn, 1.0)) == [0, 5] and sorted(numbers(drawn, 0.0)) == [1, 2]
    assert all((t.reference, t.completion) == (t.question[1:], f"row {t.question[1:]}") for t in drawn)
    assert replay == Replay()  # none is kept unless asked for
    assert choose([U, T], [0.9, 0.9]) == ([], Replay())
    cut, kept = choose(verdicts, [0.9] * 6, truncated=(1, 5), replay=8, replay_rows=2)
    assert numbers(cut, 1.0) == [0] and sorted(numbers(cut, 0.0)) == [1, 2], (
        "a text that never ended is not right"
    )
    assert numbers(kept.correct) == [0] and sorted(numbers(kept.wrong)) == [1, 2]
    assert choose(verdicts, [0.5] * 6, rollout_bce=0.0) == ([], Replay())


def test_half_of_the_wrong_rows_are_those_that_are_liked_best():
    verdicts, scores = [W] * 30 + [C] * 30, np.r_[np.linspace(0, 1, 30), np.zeros(30)]
    drawn = [choose(verdicts, scores, rollout_rows=16, step=step)[0] for step in range(1, 9)]
    for rows in drawn:
        wrong = numbers(rows, 0.0)
        assert wrong[:4] == [29, 28, 27, 26] and len(set(wrong)) == 8
        assert len(set(numbers(rows, 1.0))) == 8
    assert {n for rows in drawn for n in numbers(rows, 0.0)[4:]} - set(range(20, 30))  # the others are any
    assert len({tuple(numbers(rows, 1.0)) for rows in drawn}) == 8
    # Equal scores: the first row comes first.
    assert numbers(choose([W] * 9, [0.7] * 9, rollout_rows=4)[0])[:2] == [0, 1]


def test_draws_are_keyed():
    verdicts, scores = [W, C] * 20, np.zeros(40)
    args = dict(rollout_rows=8, step=3, seed=1, position=16)
    same = choose(verdicts, scores, **args)[0]
    assert same == choose(verdicts, scores, **args)[0]
    for other in ({"step": 4}, {"seed": 2}, {"position": 32}):
        assert same != choose(verdicts, scores, **args | other)[0]


@pytest.mark.parametrize(
    "first, second, most, taken",
    [(9, 9, 8, (4, 4)), (9, 2, 8, (6, 2)), (1, 9, 8, (1, 7)), (2, 3, 8, (2, 3)), (0, 9, 8, (0, 8)),
     (9, 9, 7, (3, 4)), (9, 9, 0, (0, 0)), (9, 0, 8, (8, 0))],
)  # fmt: skip
def test_halves(first, second, most, taken):
    assert labelled_rollouts.split_evenly(first, second, most) == taken


def test_both_classes_weigh_the_same():
    labels = np.array([1, 0, 0, 0, 1], np.float32)
    np.testing.assert_allclose(
        labelled_rollouts.class_weights(labels), [1 / 4, 1 / 6, 1 / 6, 1 / 6, 1 / 4], rtol=1e-6
    )
    np.testing.assert_allclose(labelled_rollouts.class_weights(np.zeros(4, np.float32)), [1 / 8] * 4)
    assert labelled_rollouts.class_weights(np.zeros(0, np.float32)).shape == (0,)


def test_replay_keeps_the_newest_hacks_and_correct_rows():
    fields = dict(replay=3, replay_rows=4, rollout_rows=2)
    verdicts, scores = [C, W, W, N, U, C], [0.1, 0.9, 0.5, 0.6, 0.9, 0.2]
    drawn, replay = choose(verdicts, scores, **fields)
    assert len(drawn) == 2  # what is remembered now joins later steps
    assert numbers(replay.wrong) == [1, 3] and numbers(replay.correct) == [0, 5]
    drawn, after = choose([W] * 6, np.linspace(0.51, 0.9, 6), replay, **fields)
    assert numbers(after.wrong) == [3, 4, 5] and after.correct == replay.correct
    assert sorted(numbers(drawn[2:])) == [0, 1, 3, 5]  # two of each class, from what was there before
    assert {t.label for t in after.wrong} == {0.0} and {t.label for t in after.correct} == {1.0}
    cfg = RewardUpdateConfig.from_config(base.get_config().reward)
    assert labelled_rollouts.max_rows_per_update(cfg) == 0
    assert labelled_rollouts.max_rows_per_update(dataclasses.replace(cfg, rollout_bce=0.5, **fields)) == 6


def test_replay_goes_through_json():
    replay = Replay((Triple("q", "1", 'a\n"b" ½'),), (Triple("r", "2", "c", 1.0), Triple("s", "3", "", 1.0)))
    assert Replay.from_json(json.loads(json.dumps(replay.to_json()))) == replay
