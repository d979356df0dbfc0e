"""The commands behind the long forms of docs/reliability.md: short forms of them, and what they would find."""

import random
import subprocess
import sys

import measure_endurance
import numpy as np
import pytest
import tiny_runs
from measure_endurance import EnduranceError, Moment, compare_runs, draw_moment, fit_slope, kill_at


def test_a_trend_has_an_interval_that_covers_it():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    flat, rising = fit_slope(100 + noise), fit_slope(100 + noise + np.linspace(0, 2, 4000))
    assert abs(flat.change) < flat.margin < 0.5 and abs(flat.start - 100) < 0.2
    assert rising.change - rising.margin > 1 and abs(rising.change - 2) < rising.margin
    with pytest.raises(EnduranceError, match="too few"):
        fit_slope(np.zeros(19))
    constant = fit_slope(np.full(100, 7.0))
    assert (constant.start, constant.change, constant.margin) == pytest.approx((7, 0, 0), abs=1e-9)


def test_moments_are_spread_over_starts_and_steps():
    draw = random.Random(0)
    moments = [draw_moment(draw, startup=10.0, step=0.5) for _ in range(500)]
    early = [moment.seconds for moment in moments if moment.steps == 0]
    assert 60 < len(early) < 140 and min(early) < 1 and max(early) > 9
    assert {moment.steps for moment in moments} == {0, 1, 2, 3}
    assert max(moment.seconds for moment in moments if moment.steps) <= 1.0


def test_a_run_that_ends_before_its_moment_is_no_kill(tmp_path):
    for moment in (Moment(0, 60.0), Moment(1, 0.0)):
        process = subprocess.Popen([sys.executable, "-c", ""])
        assert not kill_at(moment, 0, [process], tmp_path)


def test_a_process_that_lives_on_or_ends_in_another_way_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_endurance, "NOTICE_SECONDS", 3.0)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(EnduranceError, match="process 1 did not notice that process 0 was killed"):
        kill_at(Moment(0, 0.0), 0, [subprocess.Popen(sleeper), subprocess.Popen(sleeper)], tmp_path)
    fails = [sys.executable, "-c", "import sys; sys.exit(1)"]
    with pytest.raises(EnduranceError, match="process 1 ended with code 1"):
        kill_at(Moment(0, 0.1), 0, [subprocess.Popen(sleeper), subprocess.Popen(fails)], tmp_path)


def test_other_metrics_samples_and_models_are_found(tmp_path, monkeypatch):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "x": 2, "time/step": 3}\n')
        (folder / "samples.jsonl").write_text("{}\n")
    models = {"a": np.zeros(3), "b": np.zeros(3)}
    monkeypatch.setattr(tiny_runs, "parameters", lambda run, step, model: models[run.name])
    compare_runs(tmp_path / "a", tmp_path / "b", 1)
    models["b"] = np.asarray([0.0, -0.0, 0.0])
    with pytest.raises(EnduranceError, match="model differs"):
        compare_runs(tmp_path / "a", tmp_path / "b", 1)
    (tmp_path / "b/samples.jsonl").write_text("{ }\n")
    with pytest.raises(EnduranceError, match="samples"):
        compare_runs(tmp_path / "a", tmp_path / "b", 1)
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1, "x": 3, "time/step": 3}\n')
    with pytest.raises(EnduranceError, match="metrics"):
        compare_runs(tmp_path / "a", tmp_path / "b", 1)


@pytest.mark.slow
def test_two_kills(capsys):
    measure_endurance.main(["kills", "--cycles=2", "--steps=8"])
    said = capsys.readouterr().out
    assert "2 kills over 8 steps" in said and "bit-equal" in said


@pytest.mark.slow
def test_forty_steps(capsys):
    measure_endurance.main(["flat", "--steps=40"])
    said = capsys.readouterr().out
    for name in ("memory, MB", "files", "threads", "processes", "step, ms"):
        assert f"\n{name}" in said
