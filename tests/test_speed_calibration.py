"""Published speeds and the forecast: bounds by hand, leave-one-out on toy tables, what is said below 8 rows."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from cooper_jax.configs import tiny
from cooper_jax.launch import compile as compile_tool
from cooper_jax.model.lora import LoraConfig
from cooper_jax.perf import (
    aot_job,
    chips,
    published_speeds,
    roofline,
    speed_calibration,
    step_forecast,
)
from cooper_jax.perf.machine import Rates
from cooper_jax.perf.published_speeds import OWN, PUBLISHED, ROWS, SHAPES, SpeedRow
from cooper_jax.perf.step_forecast import HostAssumptions
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError

ROOT = Path(__file__).resolve().parents[1]


def row(**changes) -> SpeedRow:
    """An update of Llama 3.1 8B on 8 chips of v6e that takes a second."""
    values = dict(
        name="engine", kind="update", source="somewhere", model="Llama-3.1-8B", chip="v6e", devices=8, rows=8,
        prompt_tokens=0, response_tokens=100, seconds=1.0,
    )  # fmt: skip
    return SpeedRow(**values | changes)


def named(kind: str, engine: str) -> list[SpeedRow]:
    return [r for r in ROWS if r.kind == kind and r.name == engine]


# --- the rows ------------------------------------------------------------------------------------------------


def test_shapes_have_the_parameters_of_their_models():
    """Matrices of the layers and of the head; the model cards' numbers, in billions."""
    counts = {name: sum(roofline.count_weights(shape)) / 1e9 for name, shape in SHAPES.items()}
    expected = {
        "Qwen2.5-1.5B": 1.54, "Llama-3.2-1B": 1.24, "Llama-3.1-8B": 8.03 - 0.525, "Llama-3.1-70B": 70.55 - 1.05,
        "Llama-2-7B": 6.74 - 0.131, "Llama-2-70B": 68.98 - 0.262, "Mistral-7B": 7.24 - 0.131,
        "Qwen3-8B": 8.19 - 0.622, "MPT-1B": 1.316 - 0.004, "MPT-3B": 2.652 - 0.005, "MPT-7B": 6.659 - 0.008,
    }  # fmt: skip
    assert counts.keys() == expected.keys()
    for name, count in counts.items():
        assert count == pytest.approx(expected[name], rel=0.005), name


def test_rows_are_complete():
    for r in ROWS:
        assert r.kind in published_speeds.KINDS and r.model in SHAPES and r.chip in chips.CHIPS
        assert r.source and r.seconds > 0 and r.rows % r.group == 0
        # A bound above the measured time would be no bound.
        assert 0 < speed_calibration.bound_seconds(r) < r.seconds, r
    assert all(r.own for r in OWN) and not any(r.own for r in PUBLISHED)


def test_an_update_bound_by_hand():
    """6 FLOPs a weight and token, causal attention of 8 rows thrice, AdamW's 28 bytes a weight."""
    weights = sum(roofline.count_weights(SHAPES["Llama-3.1-8B"]))
    attention = 3 * 8 * 4 * 32 * 128 * 32 * 100 * 101 / 2
    compute = (6 * weights * 800 + attention) / (8 * 918e12)
    assert speed_calibration.bound_seconds(row()) == pytest.approx(compute + 28 * weights / (8 * 1638e9))


def test_a_decode_step_bound_by_hand():
    """A step of 8 rows in int8: 16 chips read a part of the weights each, and every row one key and value."""
    weights = sum(roofline.count_weights(SHAPES["Llama-3.1-70B"]))
    keys = 8 * 2 * 8 * 128 * 80 * 2
    [first, _] = named("rollout", "jax-llm-examples")
    assert speed_calibration.bound_seconds(first) == pytest.approx((weights + keys) / (16 * 819e9))


def test_fp8_doubles_the_compute_rate():
    prefill = row(kind="score", rows=1, prompt_tokens=2048, response_tokens=0, chip="h100", devices=1)
    fp8 = dataclasses.replace(prefill, peak_factor=2.0)
    assert speed_calibration.bound_seconds(prefill) == pytest.approx(2 * speed_calibration.bound_seconds(fp8))


@pytest.mark.parametrize(
    "index, tokens, per_second", [(0, 256 * 512, 80_000), (1, 1024 * 512, 108_000), (4, 64 * 1024, 243_000)]
)
def test_our_rows_have_the_rooflines_of_the_docs(index, tokens, per_second):
    """At the rates that were measured on the card (docs/compile.md), in whole per cents of the measured speed."""
    work = speed_calibration.count_work(OWN[index])
    bound = roofline.roofline_seconds(work, Rates(0.72e15, 2.77e12, {}))
    assert tokens / bound == pytest.approx(per_second, rel=0.02)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind 'training' is none of rollout, score, update"):
        speed_calibration.count_work(row(kind="training"))


# --- the fit -------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    """Efficiencies of 0.4, 0.1 and 0.2 of one kind, 0.5 of another."""
    kinds, efficiencies = ["a", "a", "b", "a"], [0.4, 0.1, 0.5, 0.2]
    assert speed_calibration.fit_efficiencies(kinds, efficiencies) == pytest.approx({"a": 0.2, "b": 0.5})
    left_out = speed_calibration.leave_one_out(kinds, efficiencies)
    assert left_out[2] is None
    assert [left_out[0], left_out[1], left_out[3]] == pytest.approx(
        [math.sqrt(0.02), math.sqrt(0.08), math.sqrt(0.04)]
    )
    # With the first two of one engine.
    elsewhere = speed_calibration.leave_one_out(kinds, efficiencies, ["x", "x", "x", "y"])
    assert elsewhere[:3] == pytest.approx([0.2, 0.2, None]) and elsewhere[3] == pytest.approx(0.2)


def test_errors_are_factors_in_either_direction():
    """Three rows of the same work in 1, 2 and 4 s: the others' means are 2.83, 2 and 1.41 s."""
    calibration = speed_calibration.calibrate([row(seconds=s, name=f"e{s}") for s in (1.0, 2.0, 4.0)])
    predicted = [c.predicted for c in calibration.rows]
    assert predicted == pytest.approx([math.sqrt(8), 2.0, math.sqrt(2)])
    assert [c.error for c in calibration.rows] == pytest.approx([math.sqrt(8), 1.0, math.sqrt(8)])
    assert calibration.median_error() == pytest.approx(math.sqrt(8))
    bound = speed_calibration.bound_seconds(row())
    assert calibration.efficiencies["update"] == pytest.approx(bound / 2.0)


def test_own_rows_are_counted_apart():
    calibration = speed_calibration.calibrate([row(seconds=s, own=s > 1) for s in (1.0, 1.0, 2.0)])
    assert calibration.published == 2
    assert calibration.median_error(own=True) == pytest.approx(2.0)
    assert calibration.median_error(own=False) == pytest.approx(math.sqrt(2))
    assert calibration.median_error(own=False, kind="score") is None


def test_below_eight_published_rows_nothing_is_forecast():
    seven = [row() for _ in range(7)]
    ours = [row(own=True) for _ in range(5)]
    calibration = speed_calibration.calibrate(seven + ours)
    assert not calibration.usable
    assert "no forecast: 7 published rows, of which at least 8 are needed" in speed_calibration.describe_fit(
        calibration
    )
    assert speed_calibration.calibrate([*seven, row()]).usable


def test_the_error_on_the_published_rows():
    calibration = speed_calibration.calibrate()
    assert calibration.usable and calibration.published == len(PUBLISHED) >= 8
    errors = [c.error for c in calibration.rows if not c.row.own]
    assert calibration.median_error(own=False) == statistics.median(errors) <= 2.0
    assert calibration.efficiencies.keys() == set(published_speeds.KINDS)


@pytest.mark.slow
def test_the_docs_have_what_the_command_prints(tmp_path):
    out = tmp_path / "estimates.json"
    done = subprocess.run(
        [sys.executable, ROOT / "launch/check_estimates.py", f"--out={out}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    docs = (ROOT / "docs/compile.md").read_text()
    for line in done.stdout.splitlines():
        assert line in docs, line
    written = json.loads(out.read_text())
    assert written["published"] == len(PUBLISHED) and len(written["rows"]) == len(ROWS)


@pytest.mark.slow
def test_the_command_refuses_in_one_line(tmp_path):
    for words, complaint in (
        (["--oot=x"], "--oot: there is no such flag; did you mean --out?"),
        (["rows"], "unexpected arguments"),
        (["--out=/nowhere/x.json"], "--out=/nowhere/x.json: "),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "launch/check_estimates.py", *words], capture_output=True, text=True
        )
        assert done.returncode == 2 and complaint in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


# --- the forecast --------------------------------------------------------------------------------------------


def make_job(**changes):
    """The tiny run on eight devices of v5e's speeds."""
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
    topology = dataclasses.replace(chips.find_topology("cpu:8"), chip=chips.CHIPS["v5e"])
    cfg = aot_job.drop_data(cfg)
    layout = device_layouts.make_layouts(cfg, topology.devices)["policy"]
    return aot_job.describe_job(cfg, layout, topology.chip.memory), topology


def forecast(compiled=None, assumptions=HostAssumptions(), calibration=None, **changes):  # noqa: B008
    job, topology = make_job(**changes)
    compiled = compiled or dict.fromkeys(step_forecast.KIND_OF_PHASE, 0.0)
    calibration = calibration or speed_calibration.calibrate()
    return step_forecast.forecast_step(job, topology, compiled, assumptions, calibration)


def test_phases_are_bounds_over_efficiencies():
    """tiny: 256 responses of 32 + 32 tokens; the bound of log-probabilities is that of launch/bench.py's score."""
    made = forecast()
    efficiencies = speed_calibration.calibrate().efficiencies
    job, _ = make_job()
    score = roofline.score_work(job.policy, 32, [32] * 256)
    expected = roofline.roofline_seconds(score, Rates(8 * 197e12, 8 * 819e9, {}))
    assert made.bounds["logprobs"] == pytest.approx(expected)
    assert made.phases["logprobs"] == pytest.approx(expected / efficiencies["score"])
    assert made.phases["policy"] == pytest.approx(made.bounds["policy"] / efficiencies["update"])
    # A shard decodes 2 of the 16 prompts, with all the weights on its one device.
    work = roofline.rollout_work(job.policy, 2, 32, [32] * 32, 32, weight_bytes=4, cache_bytes=4)
    own = roofline.roofline_seconds(work, Rates(197e12, 819e9, {}))
    assert made.phases["rollout"] == pytest.approx(own / efficiencies["rollout"])


def test_a_phase_takes_at_least_what_its_compiled_programs_do():
    compiled = dict.fromkeys(step_forecast.KIND_OF_PHASE, 0.0) | {"policy": 100.0}
    assert forecast(compiled).phases["policy"] == 100.0


def test_arms_have_their_phases_and_items():
    compiled = dict.fromkeys(("rollout", "logprobs", "policy"), 0.0)
    made = forecast(compiled, reward__arm="rule")
    assert list(made.phases) == ["rollout", "logprobs", "policy"]
    assert [item.name for item in made.items] == ["verdicts", "checkpoint", "evaluation"]
    assert [item.name for item in forecast(assistant__kind="openai").items] == [
        "verdicts", "tokenising", "assistant", "checkpoint", "evaluation",
    ]  # fmt: skip


def test_host_items_by_hand():
    """256 verdicts of 1 s on 4 workers; 64 requests of 10 s, 16 at once; inputs of 96 tokens."""
    assumptions = HostAssumptions(
        verdict_seconds=1.0, rule_workers=4, assistant_seconds=10.0, assistant_requests=4.0, tokenise_us=1000.0,
        checkpoint_gb_per_second=0.001,
    )  # fmt: skip
    compiled = dict.fromkeys(step_forecast.KIND_OF_PHASE, 0.0) | {
        "score": 10.0,
        "logprobs": 5.0,
        "policy": 30.0,
    }
    changes = dict(assistant__kind="openai", assistant__concurrency=16, pairs__per_prompt=1, eval__every=0)
    made = forecast(compiled, assumptions, **changes)
    items = {item.name: item for item in made.items}
    # Both are awaited behind the next rollout, of a fraction of a second.
    rollout = made.phases["rollout"]
    assert 0 < rollout < 1
    assert items["verdicts"].seconds == 64.0 and items["assistant"].seconds == 40.0
    assert items["verdicts"].waiting == pytest.approx(64.0 - 45.0 - rollout)
    assert items["assistant"].waiting == pytest.approx(40.0 - 30.0 - rollout)
    job, _ = make_job(**changes)
    assert items["tokenising"].waiting == pytest.approx(256 * job.reward_tokens * 1e-3)
    weights = sum(roofline.count_weights(job.policy)) + sum(roofline.count_weights(job.reward))
    assert items["checkpoint"].waiting == pytest.approx(12 * weights / 1e6 / 20)
    assert items["evaluation"].waiting == 0
    assert made.waiting == pytest.approx(sum(item.waiting for item in made.items))
    assert made.seconds == pytest.approx(sum(made.phases.values()) + made.waiting)


@pytest.mark.parametrize(
    "changes, verdicts, assistant",
    [
        ({"overlap": False}, 64.0, 40.0),
        ({"reward__rule_or_model": True}, 64.0 - 15.0, 10.0),  # the rewards wait for the verdicts
        ({"reward__arm": "rule"}, 64.0 - 5.0, None),
        ({"reward__arm": "model"}, 64.0 - 45.0, None),  # nothing is left for the next rollout
    ],
)
def test_what_the_devices_wait_for(changes, verdicts, assistant):
    assumptions = HostAssumptions(
        verdict_seconds=1.0, rule_workers=4, assistant_seconds=10.0, assistant_requests=4.0
    )
    compiled = {"rollout": 0.0, "score": 10.0, "logprobs": 5.0, "policy": 30.0, "reward": 0.0}
    if changes.get("reward__arm") == "rule":
        compiled = {name: compiled[name] for name in ("rollout", "logprobs", "policy")}
    if changes.get("reward__arm") == "model":
        compiled.pop("reward")
    settings = dict(assistant__kind="openai", assistant__concurrency=16, pairs__per_prompt=1, eval__every=0)
    made = forecast(compiled, assumptions, **settings | changes)
    items = {item.name: item.waiting for item in made.items}
    behind = made.phases["rollout"] if "reward__rule_or_model" in changes else 0.0
    assert items["verdicts"] == pytest.approx(verdicts)
    assert items.get("assistant") == (None if assistant is None else pytest.approx(assistant - behind))


def test_a_rollout_ahead_runs_beside_the_rest():
    made = dataclasses.replace(forecast(), ahead=True, phases={"rollout": 50.0, "policy": 30.0}, items=())
    assert made.seconds == made.device_seconds == 50.0
    longer = dataclasses.replace(made, phases={"rollout": 20.0, "policy": 30.0})
    assert longer.seconds == 30.0


def test_no_forecast_without_rows(capsys):
    few = speed_calibration.calibrate([row() for _ in range(7)])
    assert forecast(calibration=few) is None


def test_adapters_have_no_gradients_of_frozen_weights():
    """Two thirds of the products, and no AdamW over the weights."""
    full = SHAPES["Llama-3.2-1B"]
    adapters = dataclasses.replace(full, lora=LoraConfig(4, 8.0, ("q_proj",), False, "float32"))
    work = [roofline.update_work(config, 8, [8]) for config in (full, adapters)]
    assert work[1]["passes"].flops == pytest.approx(work[0]["passes"].flops * 2 / 3)
    assert work[0]["optimiser"].bytes > 0 and work[1]["optimiser"] == roofline.Work()


# --- assumptions and the printed table -----------------------------------------------------------------------


def test_assumptions_are_read():
    read = step_forecast.parse_assumptions(["verdict_seconds=0.5", "assistant_concurrency=128"])
    assert read == HostAssumptions(verdict_seconds=0.5, assistant_concurrency=128)
    assert step_forecast.parse_assumptions([]) == HostAssumptions()


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("verdicts=1", "'verdicts' is none of verdict_seconds, rule_workers"),
        ("rule_workers=1.5", "'1.5' is no int"),
        ("verdict_seconds", "'' is no float"),
        ("assistant_seconds=-1", "it must be at least 0"),
        ("assistant_seconds=nan", "it must be at least 0"),
        ("checkpoint_gb_per_second=0", "it must be above 0"),
    ],
)
def test_assumptions_that_are_none(text, complaint):
    with pytest.raises(SetupError, match=f"--assume={text}: {complaint}"):
        step_forecast.parse_assumptions([text])


def test_the_printed_forecast(monkeypatch):
    made, calibration = forecast(), speed_calibration.calibrate()
    text = step_forecast.format_forecast(made, calibration, steps=3600, devices=8)
    assert f"a step at published efficiencies: {made.seconds:.1f} s" in text
    assert f"3600 steps: {made.seconds:,.1f} h, {8 * made.seconds:,.1f} device-hours" in text
    assert "256 x 12 ms / 2 workers" in text and speed_calibration.describe_fit(calibration) in text

    step = compile_tool.StepEstimate((), 1, 0.1, 1)
    monkeypatch.setattr(
        speed_calibration, "calibrate", lambda: dataclasses.replace(calibration, rows=calibration.rows[:7])
    )
    assert compile_tool._format_forecast(step, 1, 1).startswith("no forecast: 7 published rows")
