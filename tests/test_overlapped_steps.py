"""Host work beside device work: the same numbers as in sequence, whoever is slow."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_steps import config

from cooper_jax.runtime import hosts
from cooper_jax.trainer import setup, train_loop

SERVICES = tiny_runs.ROOT / "tests/slow_services.py"
SLOW = {
    "rule.judge": f"{SERVICES}:judge",
    "assistant.kind": f"{SERVICES}:Rewriter",
    "data.prompts_per_step": 6,
    "rollout.group_size": 4,
    "pairs.per_prompt": 2,
    "pairs.negatives": ("assistant", "own_answer"),
    "reward.recipe": "",
}


@pytest.fixture
def uneven_services(monkeypatch):
    """Services whose results come in another order than they were asked for."""
    monkeypatch.setenv("JUDGE_SECONDS", "0.01")
    monkeypatch.setenv("REWRITE_SECONDS", "0.1")
    monkeypatch.setenv("UNEVEN_SECONDS", "1")


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(autouse=True)
def responses_that_end(monkeypatch):
    """A quarter of all tokens ends a response: an untrained policy has responses that are not truncated, too."""

    @contextlib.contextmanager
    def build(cfg, path):
        with setup.build_components(cfg, path) as (components, state):
            sampling = dataclasses.replace(components.policy.sampling, eos_ids=tuple(range(0, 600, 4)))
            policy = dataclasses.replace(components.policy, sampling=sampling)
            yield dataclasses.replace(components, policy=policy), state

    monkeypatch.setattr(train_loop, "build_components", build)


def models(run_dir, step):
    return {name: tiny_runs.parameters(run_dir, step, name) for name in ("policy", "reward")}


@pytest.mark.slow
def test_ten_steps_are_the_same_in_sequence(tmp_path, uneven_services):
    """Bit for bit, with evaluations and checkpoints in between; every step makes pairs and moves both models."""
    changes = SLOW | {"steps": 10, "eval.every": 4, "checkpoint.every": 3, "checkpoint.keep": 0}
    for overlap in (True, False):
        cfg = config(**changes, overlap=overlap, run_dir=str(tmp_path / str(overlap)))
        train_loop.train(cfg)
    beside, in_turn = tmp_path / "True", tmp_path / "False"

    rows = tiny_runs.timeless(tiny_runs.metrics(beside))
    assert rows == tiny_runs.timeless(tiny_runs.metrics(in_turn))
    steps = [row for row in rows if row["step"]]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert sum(row["pairs/valid"] for row in steps) >= 10
    for step in (3, 6, 9, 10):
        whole, other = models(beside, step), models(in_turn, step)
        for name, values in whole.items():
            assert values.tobytes() == other[name].tobytes(), (step, name)
    assert not np.array_equal(models(beside, 3)["reward"], models(beside, 6)["reward"])
    assert (beside / "samples.jsonl").read_bytes() == (in_turn / "samples.jsonl").read_bytes()


# A step checks three times for a SIGTERM: before it, after the scores, and before the policy's update.
@pytest.mark.slow
@pytest.mark.parametrize("check", [10, 12])
def test_a_stopped_run_completes_its_last_step_and_goes_on_bit_for_bit(
    tmp_path, uneven_services, monkeypatch, check
):
    """Step 3 still waits for its pairs before the rollout of step 4; before the update of step 4 it is complete."""
    changes = SLOW | {"steps": 5, "checkpoint.every": 5, "checkpoint.keep": 0}
    whole, parted = (config(**changes, run_dir=str(tmp_path / name)) for name in ("whole", "parted"))
    train_loop.train(whole)

    checks = []

    def stop_at_the_check():
        checks.append(None)
        if len(checks) == check:
            raise hosts.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(hosts, "raise_if_stopping", stop_at_the_check)
        with pytest.raises(hosts.Stopped):
            train_loop.train(parted)
    assert {path.name for path in (tmp_path / "parted/checkpoints").iterdir()} >= {"0", "3"}
    train_loop.train(parted)
    rows = [tiny_runs.timeless(tiny_runs.metrics(tmp_path / name)) for name in ("whole", "parted")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]][-5:] == [1, 2, 3, 4, 5]
    resumed = models(tmp_path / "parted", 5)
    for name, values in models(tmp_path / "whole", 5).items():
        assert values.tobytes() == resumed[name].tobytes()


@pytest.mark.slow
def test_two_processes_give_the_same_in_sequence(tmp_path, uneven_services):
    """Each makes the pairs of its own problems, in its own time."""
    changes = {name.replace(".", "__"): value for name, value in SLOW.items()}
    changes |= {"steps": 6, "reward__rollout_bce": 0.0, "eval__every": 0, "checkpoint__every": 6}
    for overlap in (True, False):
        processes = tiny_runs.start_hosts(
            tmp_path / str(overlap), 2, 2, tmp_path / f"out {overlap}", overlap=overlap, **changes
        )
        assert [process.wait(600) for process in processes] == [0, 0]
    beside, in_turn = tmp_path / "True", tmp_path / "False"
    rows = tiny_runs.timeless(tiny_runs.metrics(beside))
    assert rows == tiny_runs.timeless(tiny_runs.metrics(in_turn)) and len(rows) >= 6
    assert sum(row.get("pairs/valid", 0) for row in rows) > 20
    for name, values in models(beside, 6).items():
        assert values.tobytes() == models(in_turn, 6)[name].tobytes()
