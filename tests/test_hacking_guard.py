"""The guard against reward hacking: its signals by hand, its detector, and its state."""

import dataclasses
import json
import math

import numpy as np
import pytest

from cooper_jax.configs import tiny
from cooper_jax.runtime.hosts import RunFault
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import hacking_guard, hacking_response, hacking_signals
from cooper_jax.trainer.hacking_detector import DETECTOR, Detector, DetectorState, Part
from cooper_jax.trainer.hacking_guard import (
    GuardState,
    freezes_policy,
    mark_rolled_back,
    measure_guard,
    observe,
    replay,
    rewards_by_rule,
)
from cooper_jax.trainer.hacking_response import HackingResponse, RollBack
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Problem, Verdict

RIGHT, WRONG, NONE, UNREAD = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.UNRECOGNISED

# --- signals ---------------------------------------------------------------------------------------------------


def test_scores_and_advantages_against_the_rule_by_hand():
    verdicts = [RIGHT, WRONG, NONE, RIGHT, UNREAD]
    scores = np.array([0.9, 0.8, 0.1, 0.6, 0.99])
    advantages = np.array([1.0, 0.5, -2.0, 0.0, 5.0])
    found = hacking_signals.measure_against_rule(scores, advantages, verdicts)
    # The last response has no verdict.  Of the others two are correct, and their mean score is .6.
    assert found["hacking/accuracy"] == 0.5
    assert found["hacking/gap"] == pytest.approx(0.6 - 0.5)
    # Of all five responses the mean score is .678, and two are correct.
    assert found["hacking/unbacked"] == pytest.approx(0.678 - 0.4)
    # Of the four pairs of a correct and a wrong one, .6 against .8 alone is in the wrong order.
    assert found["hacking/auroc"] == pytest.approx(3 / 4)
    assert found["hacking/advantage_edge"] == pytest.approx(0.5 - -0.75)

    # The rule arm has no scores.
    assert set(hacking_signals.measure_against_rule(None, advantages, verdicts)) == {
        "hacking/accuracy", "hacking/advantage_edge"
    }  # fmt: skip
    undecided = hacking_signals.measure_against_rule(scores[:2], advantages[:2], [UNREAD, UNREAD])
    assert undecided.pop("hacking/unbacked") == pytest.approx(0.85), "nothing is backed"
    assert all(math.isnan(value) for value in undecided.values()) and len(undecided) == 4


def test_repetition_by_hand():
    # Trigrams with numbers made equal: "a b c" twice and "b c a", "c a b" once; "a b 0", "b 0 c"; none in "a b".
    found = hacking_signals.measure_repetition(["a b c a b c", "a b 7 c", "a b 12 c", "a b"])
    assert found["hacking/repeated"] == pytest.approx((1 / 4 + 0 + 0) / 3)
    assert found["hacking/common"] == pytest.approx(2 / 4)
    assert found["hacking/variety"] == pytest.approx(5 / 8)
    assert all(math.isnan(value) for value in hacking_signals.measure_repetition(["", "a b"]).values())


def test_of_many_responses_some_are_counted(monkeypatch):
    monkeypatch.setattr(hacking_signals, "COUNTED", 2)
    # The first and the last.
    found = hacking_signals.measure_repetition(["a b c", *["x y z"] * 5, "a b d"])
    assert found["hacking/common"] == 1 / 2 and found["hacking/variety"] == 1.0


def test_an_anchor_set_has_each_solution_beside_its_own_and_another_reference(build):
    with build() as (components, _):
        solved = [Problem(f"q{i}", str(i % 3), f"s{i}") for i in range(6)]
        components = dataclasses.replace(components, train=(Problem("without", "9"), *solved))
        problems, completions, labels = hacking_signals.choose_anchor(components, 4)
        texts = [(p.question, c.text) for p, c in zip(problems, completions, strict=True)]
        # Of six problems four, evenly spaced: 0, 1, 3 and 5, whose references are 0, 1, 0 and 2.
        assert texts == [
            ("q0", "s0"), ("q0", "s1"), ("q1", "s1"), ("q1", "s3"),
            ("q3", "s3"), ("q3", "s5"), ("q5", "s5"), ("q5", "s0"),
        ]  # fmt: skip
        assert labels.tolist() == [True, False] * 4
        nothing = dataclasses.replace(components, train=(Problem("without", "9"),))
        assert hacking_signals.choose_anchor(nothing, 4)[0] == []


@pytest.mark.parametrize("arm, measured", [("cooper", True), ("model", False), ("rule", False)])
def test_the_anchor_set_is_measured_where_the_reward_model_changes(build, monkeypatch, arm, measured):
    changes = {"hacking_anchor": 3, "reward.arm": arm, "reward.recipe": ""}
    with build(**changes) as (components, state):
        # Of three solutions beside two references each, all are judged correct.
        monkeypatch.setattr(
            hacking_signals, "compute_response_logits", lambda c, p, problems, texts: np.ones(len(texts))
        )
        found = hacking_signals.measure_anchor(components, state.reward_params)
        assert found == ({"hacking/anchor": 0.5} if measured else {})


# --- detector --------------------------------------------------------------------------------------------------

# One signal, in units of itself.
SUM = Detector((Part("a/b", 1.0),), averaged=2, memory=4, cap=9.0, slack=0.1, limit=0.55)


def follow(values, detector=SUM):
    """The detector's states after each of several steps; a value of several signals is a tuple."""
    state, found = DetectorState(), []
    for value in values:
        state = detector.observe(state, value if isinstance(value, tuple) else (value,))
        found.append(state)
    return found


def alarms_of(values, detector=SUM):
    """The steps at which there is an alarm, steps from 1."""
    return [step for step, state in enumerate(follow(values, detector), 1) if detector.is_alarmed(state)]


def test_the_cumulative_sum_by_hand():
    values = (0.2, 0.4, 0.7, 0.3, 0.9, 2.9, 0.9)
    # The past is .3.  Rises of .4, 0, .6, 2.6 and .6, each less the slack of .1; at most six times the limit.
    assert [state.excess for state in follow(values)] == pytest.approx([0, 0, 0.3, 0.2, 0.7, 3.2, 3.3])
    assert alarms_of(values) == [5, 6, 7]


@pytest.mark.parametrize(
    "values, alarms",
    [
        ([0.3] * 40, []),
        ([0.3, 0.3, 0.8] + [0.3] * 20, []),  # one odd step
        ([0.3, 0.3] + [0.39] * 60, []),  # a rise within the slack, for ever
        ([0.3, 0.3] + [0.5] * 8, [8, 9, 10]),  # a lasting one: .1 a step
        ([0.3, 0.3] + [0.1] * 40, []),  # the right direction
        ([0.3, 0.3] + [0.1] * 40 + [0.9] * 2, [43, 44]),  # which is not set off against a later rise
        ([0.9, 0.9] + [0.9] * 40, []),  # bad from the beginning
    ],
)
def test_a_lasting_rise_raises_an_alarm_and_nothing_else_does(values, alarms):
    assert alarms_of(values) == alarms


def test_a_slow_rise_is_no_hack_and_a_hack_is_not_the_new_past():
    # By .02 a step: the past is 3.5 steps old, so the rise is below the slack.
    slow = [0.02 * step for step in range(60)]
    assert alarms_of(slow) == []
    assert alarms_of(slow, dataclasses.replace(SUM, memory=40)) != [], (
        "against the first steps it would be one"
    )
    # Within the memory the oldest steps are averaged; none is added while there is an excess.
    assert follow([0.0, 0.2, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9])[-1].past == ((0.1,),) * 4
    assert alarms_of([0.3, 0.3, *[0.9] * 50]) == list(range(4, 53))


def test_an_alarm_ends_when_the_signal_has_been_back_for_a_while():
    bad, good = [0.9] * 30, [0.3] * 40
    # From the cap of 3.3 down by .1 a step: it is below the limit after 28 steps.
    assert alarms_of([0.3, 0.3, *bad, *good])[-1] == 2 + 30 + 27


def test_signals_that_fall_or_change():
    falling = dataclasses.replace(SUM, parts=(Part("a/b", 1.0, -1),))
    assert alarms_of([0.9, 0.9, 0.2, 0.2], falling) == [3, 4] and alarms_of([0.9, 0.9, 0.2, 0.2]) == []
    # In units of the scale; relative to the past where either direction counts.
    assert Part("a/b", 0.5).measure(3.0, 2.0) == 2.0 and Part("a/b", 0.5, -1).measure(3.0, 2.0) == -2.0
    assert [Part("a/b", 0.5, 0).measure(value, 2.0) for value in (3.0, 1.0, 2.0)] == [1.0, 1.0, 0.0]
    assert Part("a/b", 0.5, 0).measure(3.0, 0.0) == 0.0


def test_one_signal_alone_raises_no_alarm():
    both = Detector((Part("a/b", 1.0), Part("c/d", 1.0)), 2, 20, cap=0.5, slack=0.5, limit=0.4)
    calm, first, second = (0.3, 0.3), (99.0, 0.3), (0.3, 99.0)
    assert alarms_of([calm] * 2 + [first] * 20, both) == alarms_of([calm] * 2 + [second] * 20, both) == []
    assert alarms_of([calm] * 2 + [(99.0, 0.6)] * 3, both) == [4, 5], "and a little of the other"
    # What falls is set off against what rises.
    assert alarms_of([calm] * 2 + [(99.0, -99.0)] * 20, both) == []
    assert DETECTOR.cap <= DETECTOR.slack and len(DETECTOR.parts) > 1


@pytest.mark.parametrize("responses", [32, 256, 2048])
def test_noise_raises_no_alarm_whatever_the_number_of_responses(responses):
    """The noise of a step's means falls with the root of its number of responses, and so do the scales."""
    rng = np.random.default_rng(0)
    factor = (256 / responses) ** 0.5
    state = GuardState()
    for step in range(1, 1001):
        metrics = {
            "hacking/unbacked": 0.2 + 0.055 * factor * rng.normal(),
            "rm/rule_agreement": 0.8 + 0.049 * factor * rng.normal(),
            "response/tokens_mean": 30 * (1 + 0.033 * factor * rng.normal()),
        }
        state = observe(state, step, metrics, responses)
    assert state.alarms == 0
    # The same change is a hack where the noise is small.
    for step in range(1001, 1011):
        metrics = {
            "hacking/unbacked": 0.2 + 8 * 0.055 * factor,
            "rm/rule_agreement": 0.8,
            "response/tokens_mean": 30 * (1 + 8 * 0.033 * factor),
        }
        state = observe(state, step, metrics, responses)
    assert state.alarms == 1


# --- state -----------------------------------------------------------------------------------------------------


def guard_after(values):
    state = GuardState()
    for step, value in enumerate(values, 1):
        state = observe(state, step, {"a/b": value}, detector=SUM)
    return state


TWO_ALARMS = [0.3, 0.3, *[0.9] * 4, *[0.3] * 20, *[0.9] * 4]


def test_alarms_are_counted_when_they_are_raised():
    state = guard_after(TWO_ALARMS)
    assert (state.alarms, state.first_alarm, state.is_alarmed) == (2, 4, True)
    ended = guard_after(TWO_ALARMS[:-4])
    assert (ended.alarms, ended.first_alarm, ended.is_alarmed) == (1, 4, False)


def test_a_signal_that_is_missing_says_nothing_and_the_others_count():
    both = Detector((Part("a/b", 1.0), Part("c/d", 1.0, -1)), 2, 20, cap=0.5, slack=0.5, limit=0.4)
    assert both.read({"a/b": 1.0, "c/d": math.nan}) == (1.0, None) and both.read({"e/f": 1.0}) is None
    # The rule reads nothing any more: the second signal is gone, the first counts by itself.
    alone = dataclasses.replace(both, slack=0.2)
    assert alarms_of([(0.3, 0.9)] * 2 + [(0.9, None)] * 4, alone) == [4, 5, 6]
    assert alarms_of([(0.3, 0.9)] * 2 + [(0.9, None)] * 4, both) == [], "one signal alone raises no alarm"
    # An alarm ends, too.
    calm = [(0.3, None)] * 30
    assert alarms_of([(0.3, 0.9)] * 2 + [(0.9, 0.3)] * 4 + calm, both)[-1] < 36
    # A past in which it was missing compares nothing, one in which it was measured at times does.
    assert alarms_of([(0.3, None)] * 2 + [(0.9, 0.1)] * 9, both) == []
    assert alarms_of([(0.3, None), (0.3, 0.9)] + [(0.9, 0.3)] * 2, both) == [3, 4]


def test_a_step_without_the_signal_changes_nothing():
    state = guard_after(TWO_ALARMS)
    assert observe(state, 99, {"c/d": 9.0}, detector=SUM) is state
    assert observe(state, 99, {"a/b": math.nan}, detector=SUM) is state


def test_stored_rows_give_the_state_of_the_run():
    values = [*TWO_ALARMS[:8], math.nan, *TWO_ALARMS[8:]]
    rows = [{"step": 0, "eval/rule/accuracy": 0.5}]
    rows += [{"step": step, "a/b": None if math.isnan(x) else x} for step, x in enumerate(values, 1)]
    assert replay(rows, detector=SUM) == guard_after(values)
    assert replay(rows[:6], detector=SUM) != guard_after(values)


def test_a_state_survives_json(monkeypatch):
    monkeypatch.setattr(hacking_guard, "DETECTOR", SUM)
    for values in (TWO_ALARMS, [0.1 + 0.2], []):
        state = guard_after(values)
        assert GuardState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_the_past_of_other_signals_is_left_out():
    """A run goes on with a later version, whose detector watches other signals."""
    watched = tuple(part.signal for part in DETECTOR.parts)
    state = GuardState()
    for step in range(1, 8):
        state = observe(state, step, dict.fromkeys(watched, 0.5))
    stored = json.loads(json.dumps(dataclasses.replace(state, alarms=1, first_alarm=3).to_json()))
    assert GuardState.from_json(stored).detector == state.detector != DetectorState()
    stored["detector"]["past"] = [values[1:] for values in stored["detector"]["past"]]
    resumed = GuardState.from_json(stored)
    assert resumed == GuardState(alarms=1, first_alarm=3)
    observe(resumed, 8, dict.fromkeys(watched, 0.5))
    # An alarm that lasts still stops the run, with a message.
    alarmed = GuardState.from_json(stored | {"is_alarmed": True})
    with pytest.raises(RunFault, match=f"step 8: .* by {watched[0]} and"):
        HackingResponse("stop", alarmed).act(8, alarmed, lambda: None)


def test_what_an_alarm_changes_depends_on_the_action():
    calm, alarmed, ended = GuardState(), guard_after(TWO_ALARMS), guard_after(TWO_ALARMS[:-4])
    gone_back = mark_rolled_back(calm, alarmed)
    assert (gone_back.alarms, gone_back.first_alarm, gone_back.detector) == (2, 4, calm.detector)
    by_rule = {
        action: [rewards_by_rule(state, action) for state in (calm, alarmed, ended, gone_back)]
        for action in ("off", "warn", "freeze", "stop", "fallback", "rollback")
    }
    assert by_rule.pop("fallback") == [False, True, True, True], "for the rest of the run"
    assert by_rule.pop("rollback") == [False, False, False, True]
    assert not any(sum(by_rule.values(), []))
    assert freezes_policy(alarmed, "freeze") and not freezes_policy(ended, "freeze")
    assert not freezes_policy(alarmed, "warn")


def test_metrics_tell_what_was_in_effect_in_the_step():
    alarmed = guard_after(TWO_ALARMS)
    first = measure_guard(GuardState(), alarmed, "fallback")
    assert first["guard/alarm"] == 1 and first["guard/alarms"] == 2 and first["guard/by_rule"] == 0
    assert first["guard/excess"] == pytest.approx(alarmed.detector.excess)
    assert measure_guard(alarmed, alarmed, "fallback")["guard/by_rule"] == 1
    assert measure_guard(alarmed, alarmed, "freeze")["guard/frozen"] == 1


# --- responses -------------------------------------------------------------------------------------------------


def never():
    raise AssertionError("nothing is saved")


def act_on(action, values, save=never):
    """What a run says and does after each step of a sequence."""
    response, state = HackingResponse(action, GuardState()), GuardState()
    for step, value in enumerate(values, 1):
        state = observe(state, step, {"a/b": value}, detector=SUM)
        response.act(step, state, save)


@pytest.fixture
def one_signal(monkeypatch):
    """The guard with the detector of these tests."""
    monkeypatch.setattr(hacking_response, "DETECTOR", SUM)


def test_a_warning_is_said_once_for_each_alarm(one_signal, capsys):
    act_on("warn", TWO_ALARMS)
    said = capsys.readouterr().out
    assert (
        said.count("warning: step 4:") == said.count("warning: step 28:") == 1 and said.count("warning") == 2
    )
    assert said.count("has ended") == 1 and "1.0 of 0.55 by a/b (0.3 before)" in said
    act_on("off", TWO_ALARMS)
    assert capsys.readouterr().out == ""


def test_stop_saves_the_step_and_names_the_signal(one_signal, capsys):
    saved = []
    with pytest.raises(RunFault, match=r"step 4: .* by a/b .*hacking_guard=fallback"):
        act_on("stop", TWO_ALARMS, lambda: saved.append(True))
    assert saved == [True] and "the run ends" in capsys.readouterr().out


def test_a_run_goes_back_once(one_signal):
    alarmed = guard_after(TWO_ALARMS)
    with pytest.raises(RollBack):
        HackingResponse("rollback", GuardState()).act(20, alarmed, never)
    # A run that resumes after an alarm makes up for it; one that has gone back does not go back again.
    with pytest.raises(RollBack):
        HackingResponse("rollback", alarmed).act(20, alarmed, never)
    HackingResponse("rollback", alarmed).act(20, mark_rolled_back(alarmed, alarmed), never)


# --- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hacking_guard": "panic"}, "hacking_guard='panic': it is one of off, warn, freeze"),
        ({"hacking_anchor": -1}, "hacking_anchor=-1: it must be at least 0"),
        ({"hacking_guard": "fallback", "reward.arm": "rule", "reward.recipe": ""}, "rule arm has no reward model"),
        ({"hacking_guard": "stop", "reward.arm": "rule", "reward.recipe": ""}, "rule arm has no reward model"),
        ({"hacking_guard": "freeze", "reward.arm": "model", "reward.recipe": ""}, "nothing changes any more"),
        ({"hacking_guard": "fallback", "reward.functions": "model"}, "would replace your functions"),
        ({"hacking_guard": "rollback", "checkpoint.keep": 1}, "checkpoint.keep=1"),
    ],
)  # fmt: skip
def test_a_guard_that_can_do_nothing_is_refused(changes, message):
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(changes)
    with pytest.raises(SetupError, match=message):
        RunSettings.from_config(cfg)


@pytest.mark.parametrize(
    "changes",
    [
        {"hacking_guard": "warn", "reward.arm": "rule", "reward.recipe": ""},
        {"hacking_guard": "freeze"},
        {"hacking_guard": "rollback", "checkpoint.keep": 0},
        {"hacking_guard": "fallback", "reward.arm": "model", "reward.recipe": ""},
    ],
)
def test_a_guard_that_can_act_is_not(changes):
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(changes)
    RunSettings.from_config(cfg)


def test_the_default_watches_and_changes_nothing():
    assert RunSettings.from_config(tiny.get_config()).guard.hacking_guard == "warn"
