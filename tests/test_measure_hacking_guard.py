"""The detector of the guard: learned from stored runs by the command in the docs, and what it does on others."""

import dataclasses
import math

import guard_runs
import measure_hacking_guard as measure
import pytest
from guard_runs import Run, read_rows
from measure_hacking_guard import apply_detector, measure_separation
from tiny_runs import ROOT

from cooper_jax.trainer.hacking_detector import DETECTOR, Detector, Part

STORED = ROOT / "docs/results/guard.jsonl"
LEARNED, OTHERS = {10, 11, *range(20, 25), *range(30, 40)}, set(range(40, 50))
GAP, LENGTH = "hacking/gap", "response/tokens_mean"


def make_run(arm, seed, gaps, truths, tokens=None):
    """A run whose held-out accuracy is measured every five steps."""
    rows = [{"step": 0, "truth": truths[0]}]
    for step, gap in enumerate(gaps, 1):
        truth = truths[step // 5] if step % 5 == 0 else None
        length = 10.0 if tokens is None else tokens[step - 1]
        reward = {GAP: gap, "hacking/unbacked": gap, "rm/rule_agreement": 1 - gap}
        rows.append({"step": step, "truth": truth, LENGTH: length, **reward})
    return Run(arm, seed, tuple(rows))


NOISE = [0.2, 0.3] * 10
SOUND = make_run("robust", 1, NOISE, [0.3, 0.4, 0.4, 0.5, 0.5], [10.0, 11.0] * 10)
# The gap rises from step 9 on, and responses become shorter.  The onset is at step 15.
HACKED = make_run(
    "frozen", 1, NOISE[:8] + [0.6, 0.7] * 6, [0.3, 0.4, 0.4, 0.3, 0.2], [10.0, 11.0] * 4 + [6.0] * 12
)


def test_rows_are_the_same_after_they_were_stored(tmp_path):
    path = tmp_path / "rows.jsonl"
    gone = make_run("rule", 2, [math.nan, 0.123456], [0.25])
    guard_runs.write_rows([SOUND, gone], path)
    stored, other = read_rows(path)
    assert (stored.arm, stored.seed, stored.onset) == ("robust", 1, None)
    assert stored.read(GAP) == SOUND.read(GAP) and len(stored.rows) == 21
    assert other.read(GAP) == [(2, 0.1235)]
    path.write_text('{"arm": "rule"}\n')
    with pytest.raises(ValueError, match="does not name columns"):
        read_rows(path)


def test_separation_by_hand():
    assert HACKED.onset == 15 and SOUND.onset is None
    # Moving means minus the beginning, .24.
    changes = dict(measure.list_changes(HACKED.read(GAP), Part(GAP, 1.0)))
    assert changes[6] == pytest.approx(0.3 - 0.24)
    assert changes[9] == pytest.approx((0.3 + 0.2 + 0.3 + 0.6) / 4 - 0.24)
    assert changes[13] == pytest.approx((0.6 + 0.7) * 2 / 5 + 0.6 / 5 - 0.24)
    # Of the hacked run the steps 6 to 14 count: 6 to 8 are as in the other run, and the later six above all of it.
    twice = measure_separation([HACKED, SOUND], GAP)
    same = [x for step, x in measure.list_changes(SOUND.read(GAP), Part(GAP, 1.0))]
    wins = sum(6 for _ in same) + sum((x > y) + (x == y) / 2 for x in same[:3] for y in same)
    assert twice == pytest.approx(wins / (9 * len(same)))
    assert math.isnan(measure_separation([SOUND], GAP)), "one kind of runs"


def test_the_learned_detectors_warn_of_the_hack_alone():
    single, guard = measure.learn_single([HACKED, SOUND], GAP), measure.learn_guard([HACKED, SOUND])
    # The noise: differences of .1 from step to step, over the square root of 2; lengths are relative.
    assert [part.scale for part in single.detector.parts] == [0.071]
    of_length = pytest.approx(1 / 10.4 / 2**0.5, abs=1e-3)
    assert [part.scale for part in guard.detector.parts] == [0.071, 0.071, of_length]
    for learned in (single, guard):
        assert learned.margin > 1
        hacked, sound = (apply_detector(run, learned.detector) for run in (HACKED, SOUND))
        assert hacked.is_warning and 9 <= hacked.alarm < 15 and hacked.lead == 15 - hacked.alarm
        assert sound.alarm is None and sound.lead is None
        # The limit lies between the two kinds of runs.
        open_ended = dataclasses.replace(learned.detector, limit=math.inf)
        highest = [apply_detector(run, open_ended).highest for run in (SOUND, HACKED)]
        assert highest[0] < learned.detector.limit < highest[1]
    assert measure.learn_single([SOUND], GAP) is None
    assert measure.learn_single([HACKED, SOUND], "policy/kl") is None
    with pytest.raises(ValueError, match="runs with an onset and runs without one"):
        measure.learn_guard([SOUND])


def test_a_limit_may_tolerate_alarms_on_some_runs_without_an_onset():
    odd = make_run("robust", 5, NOISE[:5] + [1.0] * 15, [0.3, 0.4, 0.4, 0.4, 0.4])
    parts, runs = (Part(GAP, 0.071),), [HACKED, SOUND, odd]
    strict, tolerant = (measure.learn_limit(runs, parts, math.inf, 1.5, tolerated) for tolerated in (0, 1))
    assert strict.margin < 1 < tolerant.margin
    assert apply_detector(odd, strict.detector).alarm is None
    assert apply_detector(odd, tolerant.detector).alarm is not None
    assert apply_detector(HACKED, tolerant.detector).is_warning
    assert apply_detector(SOUND, tolerant.detector).alarm is None
    assert tolerant == measure.learn_limit([HACKED, SOUND], parts, math.inf, 1.5)


def test_signals_that_do_not_separate_get_a_limit_without_false_alarms():
    alike = make_run("frozen", 4, NOISE[:10] + [0.3] * 10, [0.3, 0.4, 0.3, 0.3, 0.2])
    odd = make_run("robust", 5, NOISE[:5] + [1.0] * 15, [0.3, 0.4, 0.4, 0.4, 0.4])
    learned = measure.learn_single([alike, odd], GAP)
    assert alike.onset == 10 and learned.margin < 1
    assert apply_detector(odd, learned.detector).alarm is None


def test_a_run_that_ends_where_an_onset_may_be_teaches_nothing(capsys):
    """At its last evaluation it is as low as at an onset, and has no alarm of its own to count as false."""
    high = [0.3, 0.4, 0.4, 0.4]
    undecided = make_run("frozen", 6, NOISE[:10] + [0.9] * 10, [*high, 0.34])
    assert undecided.onset is None and undecided.is_undecided
    assert not make_run("frozen", 6, NOISE, [*high, 0.36]).is_undecided
    assert not HACKED.is_undecided and not SOUND.is_undecided

    measure.print_learned([HACKED, SOUND])
    learned = capsys.readouterr().out
    measure.print_learned([HACKED, SOUND, undecided])
    assert capsys.readouterr().out == learned.replace("0 undecided", "1 undecided")
    measure.print_evaluation([SOUND, undecided])
    assert "false alarms on 0 of 0 without; 1 undecided" in capsys.readouterr().out


def test_an_alarm_after_the_onset_is_no_warning():
    late = make_run("frozen", 3, NOISE[:16] + [0.9] * 4, [0.3, 0.4, 0.2, 0.2, 0.2])
    outcome = apply_detector(late, Detector((Part(GAP, 1.0),), 5, 20, 9.0, 0.1, 0.5))
    assert late.onset == 10 and outcome.alarm == 17 and outcome.lead == -7 and not outcome.is_warning


def test_the_guards_detector_is_the_one_that_the_stored_runs_give(capsys):
    runs = [run for run in read_rows(STORED) if run.seed in LEARNED]
    assert {run.seed for run in runs} == LEARNED
    measure.print_learned(runs)
    assert capsys.readouterr().out.splitlines()[-1] == str(DETECTOR)


def test_what_the_guard_does_on_seeds_that_set_no_threshold():
    """What docs/hacked.md says: it warns of every hack before its onset, and of one run without an onset."""
    runs = [run for run in read_rows(STORED) if run.seed in OTHERS]
    outcomes = {(run.arm, run.seed): apply_detector(run, DETECTOR) for run in runs}
    assert outcomes.keys() == {(arm, seed) for arm in ("frozen", "robust") for seed in OTHERS}
    # One policy with a frozen reward model has no onset within these steps.
    hacked = {(run.arm, run.seed) for run in runs if run.onset is not None}
    assert hacked == {("frozen", seed) for seed in OTHERS - {41}}
    assert {key for key, outcome in outcomes.items() if outcome.is_warning} == hacked
    alarmed = {key for key, outcome in outcomes.items() if outcome.alarm is not None}
    assert alarmed - hacked == {("frozen", 41)}


def test_seeds_on_the_command_line():
    assert measure.parse_seeds("1,3,10-12") == {1, 3, 10, 11, 12}
