"""Runs after an alarm of the guard: what each action does, and that a resumed run is the uninterrupted one."""

import contextlib
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_steps import config

from cooper_jax.runtime import hosts
from cooper_jax.runtime.hosts import RunFault
from cooper_jax.trainer import hacking_guard, hacking_response, setup, step, train_loop
from cooper_jax.trainer.hacking_detector import Detector, Part

SERVICES = tiny_runs.ROOT / "tests/slow_services.py"
# The positions of the data rise by 6 a step, so that there is an alarm at step 4: 6 + 12 + 18 is above 20.
ALARM = 4
RISING = Detector((Part("data/position", 1.0),), averaged=1, memory=1, cap=99.0, slack=0.5, limit=20.0)
COOPER = {
    "rule.judge": f"{SERVICES}:judge",
    "assistant.kind": f"{SERVICES}:Rewriter",
    "data.prompts_per_step": 6,
    "rollout.group_size": 4,
    "pairs.negatives": ("assistant",),
    "reward.recipe": "",
    "steps": 7,
    "checkpoint.every": 2,
    "checkpoint.keep": 0,
}
MODEL = COOPER | {"reward.arm": "model"}


def observe_rising(state, number, metrics, responses):
    return hacking_guard.observe(state, number, metrics, detector=RISING)


@contextlib.contextmanager
def build_with_endings(cfg, path):
    """Components whose policy ends a response at every fourth token."""
    with setup.build_components(cfg, path) as (components, state):
        sampling = dataclasses.replace(components.policy.sampling, eos_ids=tuple(range(0, 600, 4)))
        policy = dataclasses.replace(components.policy, sampling=sampling)
        yield dataclasses.replace(components, policy=policy), state


# What runs here have in another form, as (module, name, value).
REPLACED = (
    (step, "observe", observe_rising),
    (hacking_response, "DETECTOR", RISING),
    (hacking_guard, "DETECTOR", RISING),
    (train_loop, "build_components", build_with_endings),
)


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """Two devices, services that do not wait, responses that end, and a signal that rises in every run."""
    for name in ("JUDGE_SECONDS", "REWRITE_SECONDS"):
        monkeypatch.setenv(name, "0")
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    for replacement in REPLACED:
        monkeypatch.setattr(*replacement)


def train(path, settings, **changes):
    train_loop.train(config(**settings | changes, run_dir=str(path)))
    return rows_of(path)


def rows_of(path, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
    return tiny_runs.timeless(rows)


def models(path, at):
    return {name: tiny_runs.parameters(path, at, name).tobytes() for name in ("policy", "reward")}


def train_in_parts(path, settings, monkeypatch, check, **changes):
    """Stop at a check for a SIGTERM, of which each step makes three, and start the same command again."""
    checks = []

    def stop_at_the_check():
        checks.append(None)
        if len(checks) == check:
            raise hosts.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(hosts, "raise_if_stopping", stop_at_the_check)
        with pytest.raises(hosts.Stopped):
            train(path, settings, **changes)
    stopped_at = len(rows_of(path))
    return stopped_at, train(path, settings, **changes)


def read_effects(rows, metric):
    return [int(row["step"]) for row in rows if row[metric]]


@pytest.mark.slow
def test_a_warning_changes_no_number(tmp_path, capsys):
    off = train(tmp_path / "off", MODEL, hacking_guard="off")
    warned = train(tmp_path / "warn", MODEL, hacking_guard="warn")
    without = [{k: v for k, v in row.items() if not k.startswith("guard/")} for row in warned]
    assert without == off and capsys.readouterr().out.count(f"warning: step {ALARM}") == 1
    assert [row["guard/alarms"] for row in warned] == [0, 0, 0, 1, 1, 1, 1]
    assert models(tmp_path / "off", 7) == models(tmp_path / "warn", 7)


@pytest.mark.slow
def test_after_a_fallback_the_reward_is_the_rules(tmp_path, monkeypatch):
    """Also where a step is completed behind the next rollout, and in a run that was stopped after the alarm."""
    rows = train(tmp_path / "whole", COOPER, hacking_guard="fallback")
    assert read_effects(rows, "guard/by_rule") == [5, 6, 7]
    assert [row["reward/mean"] == pytest.approx(row["rule/accuracy"], abs=1e-6) for row in rows] == [
        *[False] * ALARM, *[True] * 3
    ]  # fmt: skip
    assert all(0 < row["rule/accuracy"] < 1 for row in rows)
    assert rows == train(tmp_path / "sequence", COOPER, hacking_guard="fallback", overlap=False)
    stopped_at, again = train_in_parts(tmp_path / "parts", COOPER, monkeypatch, 15, hacking_guard="fallback")
    assert stopped_at in (ALARM, ALARM + 1) and again == rows
    assert models(tmp_path / "whole", 7) == models(tmp_path / "parts", 7) == models(tmp_path / "sequence", 7)


@pytest.mark.slow
def test_a_frozen_policy_waits_for_its_reward_model(tmp_path):
    rows = train(tmp_path, COOPER, hacking_guard="freeze", **{"checkpoint.every": 1})
    assert read_effects(rows, "guard/frozen") == [5, 6, 7]
    before, after = models(tmp_path, ALARM), models(tmp_path, 7)
    assert before["policy"] == after["policy"] and before["reward"] != after["reward"]
    assert models(tmp_path, ALARM - 1)["policy"] != before["policy"]
    assert "policy/lr" in rows[ALARM - 1] and "policy/lr" not in rows[ALARM]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [MODEL, COOPER])
def test_a_run_goes_back_before_its_alarm_and_falls_back(tmp_path, monkeypatch, capsys, settings):
    # With checkpoints after steps 0 and 3 the alarm of step 4 takes the run back to step 3.
    changes = {"hacking_guard": "rollback", "checkpoint.every": 3}
    rows = train(tmp_path / "whole", settings, **changes)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert "going back to step 3" in capsys.readouterr().out
    abandoned = rows_of(tmp_path / "whole", "metrics.before_going_back_to_3.jsonl")
    assert abandoned[:3] == rows[:3] and [row["guard/alarms"] for row in abandoned] == [0, 0, 0, 1]
    assert read_effects(rows, "guard/by_rule") == [4, 5, 6, 7] and not abandoned[3]["guard/by_rule"]
    # The same responses, rewarded by the rule.
    assert abandoned[3]["rule/accuracy"] == rows[3]["rule/accuracy"] != abandoned[3]["reward/mean"]

    # Stopped before the first checkpoint that knows of it, and after that one.
    for number, check in enumerate((16, 22)):
        path = tmp_path / f"parts {number}"
        _, again = train_in_parts(path, settings, monkeypatch, check, **changes)
        assert again == rows and models(path, 7) == models(tmp_path / "whole", 7)


@pytest.mark.slow
def test_a_stopped_run_may_go_on_with_another_action(tmp_path):
    with pytest.raises(RunFault, match=f"step {ALARM}: .* is saved"):
        train(tmp_path, MODEL, hacking_guard="stop")
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [0, 2, ALARM] and len(rows_of(tmp_path)) == ALARM
    with pytest.raises(RunFault, match=f"step {ALARM}: "):
        train(tmp_path, MODEL, hacking_guard="stop")
    assert len(rows_of(tmp_path)) == ALARM, "no further step"
    rows = train(tmp_path, MODEL, hacking_guard="fallback")
    assert read_effects(rows, "guard/by_rule") == [5, 6, 7]


@pytest.mark.slow
def test_without_a_checkpoint_before_the_alarm_a_run_cannot_go_back(tmp_path):
    with pytest.raises(RunFault):
        train(tmp_path, MODEL, hacking_guard="stop")
    for at in (0, 2):
        (tmp_path / "checkpoints" / str(at)).rename(tmp_path / f"away {at}")
    with pytest.raises(RunFault, match=r"no checkpoint before the alarm of step 4 is left, only \[4\]"):
        train(tmp_path, MODEL, hacking_guard="rollback")


@pytest.mark.slow
def test_rewards_of_replaced_groups_are_the_rules_too(tmp_path):
    """Dynamic sampling grades groups before the step does."""
    changes = {"data.refill_prompts": 6, "hacking_guard": "fallback"}
    rows = train(tmp_path, COOPER, **changes)
    assert read_effects(rows, "guard/by_rule")
    for row in rows:
        is_rules = np.isclose(row["reward/mean"], row["rule/accuracy"], atol=1e-6)
        assert is_rules == bool(row["guard/by_rule"])


# launch/train.py in a process of its own, prepared as the runs above.
PROGRAM = """
import runpy, sys
sys.argv = {argv!r}
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_hacking_runs

for replacement in test_hacking_runs.REPLACED:
    setattr(*replacement)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_processes(path, processes, devices, **changes):
    """Train in processes.  Returns (the step to which they went back, their rows, those that they left)."""
    argv = tiny_runs.command(path, **changes)[1:]
    out = path.with_name(f"output of {path.name}")
    program = PROGRAM.format(argv=argv, root=str(tiny_runs.ROOT))
    started = tiny_runs.start_hosts(path, processes, devices, out, program=program)
    try:
        codes = [process.wait(200) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = (out / "0").read_text()
    assert codes == [0] * processes, said[-3000:]
    match = re.search(r"going back to step (\d+)", said)
    assert match, said[-3000:]
    return int(match[1]), rows_of(path), rows_of(path, f"metrics.before_going_back_to_{match[1]}.jsonl")


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
    """To the same step and with the same rows as one process on the same mesh."""
    changes = MODEL | {
        "steps": 5, "checkpoint.every": 2, "eval.every": 0, "hacking_guard": "rollback", "reward.recipe": "sigmoid",
        "supervised.policy_steps": 1, "supervised.reward_steps": 1,
    }  # fmt: skip
    two = run_processes(tmp_path / "two", 2, 2, **changes)
    one = run_processes(tmp_path / "one", 1, 4, **changes)
    assert two[0] == one[0] == 2
    for rows, expected in zip(two[1:], one[1:], strict=True):
        assert len(rows) == len(expected) > 2
        for row, other in zip(rows, expected, strict=True):
            for name, value in other.items():
                assert (row[name] is None) == (value is None), name
                assert value is None or row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert read_effects(two[1], "guard/by_rule") == [3, 4, 5]
    assert all(0 < row["rule/accuracy"] < 1 for row in two[1])
