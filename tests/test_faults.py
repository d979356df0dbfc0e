"""Faults that no restart mends: what is not finite is named and never saved; updates that never come end a run."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
import tiny_runs
from tiny_steps import begun

from cooper_jax.configs import base
from cooper_jax.llm import probe
from cooper_jax.llm.chat import ChatConfig
from cooper_jax.llm.chat_replies import Failure
from cooper_jax.runtime import finiteness
from cooper_jax.runtime.hosts import FAULT, RunFault
from cooper_jax.trainer.fault_watch import FaultWatch
from cooper_jax.trainer.loop_config import FaultConfig
from cooper_jax.trainer.resume import save_checkpoint
from cooper_jax.types import Completion

GOOD = {"reward/mean": 0.5, "rm/mean": 0.5, "policy/skipped": 0.0, "rm/skipped": 0.0, "rm/updates": 1.0}


def watch(faults="skip", faults_in_a_row=2, idle_steps=3, updates_reward=True) -> FaultWatch:
    return FaultWatch(FaultConfig(faults, faults_in_a_row, idle_steps), updates_reward)


def never():
    raise AssertionError("nothing is saved")


# The largest values that settings may have: each update multiplies the weights by a thousand.
OVERFLOWING = {
    "policy.optimiser.lr": 10.0, "policy.optimiser.weight_decay": 100.0, "policy.optimiser.warmup_steps": 0,
}  # fmt: skip


def test_values_that_are_not_finite_are_counted_by_name():
    tree = {
        "a": jnp.array([1.0, jnp.nan, jnp.inf]),
        "b": {"c": jnp.ones((2, 2), jnp.bfloat16), "d": jnp.array([-jnp.inf], jnp.bfloat16)},
        "count": jnp.arange(3),
    }
    assert finiteness.count_non_finite(tree) == {"a": 2, "b.d": 1}
    assert finiteness.count_non_finite({"c": jnp.ones(3)}) == {}


def test_values_are_counted_by_one_program(monkeypatch):
    """Hosts that run several programs with sums over all of them may wait for each other for ever."""
    runs = []
    count = finiteness._count_each
    monkeypatch.setattr(finiteness, "_count_each", lambda arrays: runs.append(len(arrays)) or count(arrays))
    finiteness.count_non_finite({"a": jnp.ones(3), "b": [jnp.ones(2), jnp.ones((2, 2))], "c": jnp.arange(3)})
    assert runs == [3]


@pytest.mark.parametrize("model", ["policy", "reward"])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(build, tmp_path, model, part):
    with build() as (components, state):
        with begun(components, state, tmp_path) as (state, run, kept):
            kept.wait()
            assert kept.steps() == [0]
            whole = getattr(state, model)
            leaves, tree = jax.tree.flatten(getattr(whole, part))
            i = next(i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1)
            leaves[i] = leaves[i].at[0, 0].set(jnp.nan)
            bad = state.replace(step=1, **{model: whole.replace(**{part: jax.tree.unflatten(tree, leaves)})})
            with pytest.raises(
                RunFault, match=rf"step 1: 1 values of {model}\.{part}.* .step 0 is the newest"
            ):
                save_checkpoint(components, bad, run, kept)
            kept.wait()
            assert kept.steps() == [0]


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"reward/mean": float("nan")}, "rewards are not finite"),
        ({"rm/mean": float("inf")}, "scores of the reward model are not finite"),
        ({"policy/skipped": 1.0}, "loss or gradients of the policy's update are not finite"),
        ({"rm/skipped": 2.0}, "loss or gradients of the reward model's update are not finite"),
    ],
)
def test_stop_ends_at_the_first_and_skip_after_several_in_a_row(bad, words, capsys):
    with pytest.raises(RunFault, match=f"step 4: {words}; the run ends"):
        watch("stop").check(4, GOOD | bad, never)
    skipping = watch("skip")
    for step in (1, 2):
        skipping.check(step, GOOD | bad, never)
    assert capsys.readouterr().out.count(words) == 2
    skipping.check(3, GOOD, never)  # a good step begins the count again
    for step in (4, 5):
        skipping.check(step, GOOD | bad, never)
    with pytest.raises(RunFault, match=f"step 6: {words} in 3 steps in a row"):
        skipping.check(6, GOOD | bad, never)


def test_updates_that_never_come_end_the_run_with_its_state_saved():
    idle = GOOD | {"rm/updates": 0.0, "pairs/refused_http_401": 4.0, "pairs/refused_no_positive": 2.0}
    saved = []
    counting = watch()
    for step in (1, 2):
        counting.check(step, idle, never)
    counting.check(3, GOOD, never)
    for step in (4, 5):
        counting.check(step, idle, never)
    # Without a positive there was nothing to ask the assistant for: such a step counts neither way.
    counting.check(6, GOOD | {"rm/updates": 0.0, "pairs/refused_no_positive": 6.0}, never)
    with pytest.raises(RunFault, match="no update for 3 steps.*http_401 12, no_positive 6"):
        counting.check(7, idle, lambda: saved.append(7))
    assert saved == [7]
    # Whoever starts the run again has all its steps.
    assert counting.to_json()["idle"] == 0
    frozen, allowed = watch(updates_reward=False), watch(idle_steps=0)
    for step in range(9):
        frozen.check(step, idle, never)
        allowed.check(step, idle, never)


def test_the_counts_go_on_from_those_of_a_checkpoint():
    idle = GOOD | {"rm/updates": 0.0, "pairs/refused_http_401": 4.0}
    counting = watch()
    for step in (1, 2):
        counting.check(step, idle | {"rm/mean": float("nan")}, never)
    stored = json.loads(json.dumps(counting.to_json()))

    resumed = watch()
    resumed.restore(stored)
    with pytest.raises(RunFault, match="not finite in 3 steps in a row"):
        resumed.check(3, idle | {"rm/mean": float("nan")}, never)
    resumed.restore(stored)
    with pytest.raises(RunFault, match="no update for 3 steps.*http_401 12"):
        resumed.check(3, idle, lambda: None)
    resumed.restore({})  # of a checkpoint of an earlier version
    resumed.check(3, idle, never)


def test_steps_without_a_response_to_make_a_pair_of_are_warned_of(capsys):
    """The run goes on: a weak policy may find its first correct response late."""
    barren, counting = GOOD | {"rm/updates": 0.0, "pairs/refused_no_positive": 6.0}, watch()
    for step in range(1, 8):
        counting.check(step, barren, never)
    printed = capsys.readouterr().out
    assert [f"step {step}: the reward model got no update for {step} steps" in printed for step in (3, 5, 6)] == [
        True, False, True
    ]  # fmt: skip
    counting.check(8, GOOD, never)
    counting.check(9, barren, never)
    watch(idle_steps=0).check(1, barren, never)
    assert capsys.readouterr().out == ""


def test_a_server_that_is_starting_is_waited_for(monkeypatch, capsys):
    """Connections are refused and 503 is answered before the model is loaded; a wrong key is not waited for."""
    replies = [Failure("connection"), Failure("http_503"), Completion("ready", False, 1)]
    asked = []

    def ask(self, conversations, ids, limits):
        asked.append((self._cfg.retries, self._cfg.timeout))
        return [replies[min(len(asked), len(replies)) - 1]]

    monkeypatch.setattr(probe.OpenAIChat, "ask", ask)
    clock = [0.0]
    monkeypatch.setattr(probe.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(probe.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    section = base.get_config().assistant
    section.kind, section.url, section.model = "openai", "http://127.0.0.1:9/v1", "m"
    cfg = ChatConfig.from_config(section, "assistant")
    probe.probe_server(cfg, start_timeout=60.0)
    assert len(asked) == 3
    assert "waiting for http://127.0.0.1:9/v1" in capsys.readouterr().out

    asked.clear()
    with pytest.raises(ValueError, match="connection.*start_timeout"):
        probe.probe_server(cfg)
    assert len(asked) == 1

    asked.clear()
    replies[:] = [Failure("connection")]
    with pytest.raises(ValueError, match="connection"):
        probe.probe_server(cfg, start_timeout=7.0)
    # At 0, 2, 4, 6 and 7 seconds, none of them repeated, each within what is left.
    assert asked == [(0, 7.0), (0, 5.0), (0, 3.0), (0, 1.0), (0, 1.0)]

    asked.clear()
    replies[:] = [Failure("http_401")]
    with pytest.raises(ValueError, match="http_401"):
        probe.probe_server(cfg, start_timeout=60.0)
    assert len(asked) == 1


@pytest.mark.slow
def test_runs_end_with_code_70_and_good_checkpoints(tmp_path):
    """A dead assistant is named at the start, or after some steps; so are weights that overflow."""
    dead = {
        "assistant.kind": "openai", "assistant.url": "http://127.0.0.1:9/v1", "assistant.model": "m",
        "assistant.retries": 0, "eval.every": 0,
    }  # fmt: skip
    tiny_runs.assert_refused(tmp_path / "probe", "127.0.0.1:9", "connection", "assistant.probe=False", **dead)

    done = tiny_runs.run(tmp_path / "dead", **dead | {"assistant.probe": False, "idle_steps": 1, "steps": 20})
    said = done.stdout + done.stderr
    assert done.returncode == FAULT and "Traceback" not in said, said
    assert "no update for 1 steps" in done.stderr and "connection" in done.stderr
    step = len(tiny_runs.metrics(tmp_path / "dead"))
    assert (tmp_path / f"dead/checkpoints/{step}").is_dir()

    done = tiny_runs.run(tmp_path / "overflow", **OVERFLOWING | {"eval.every": 0, "steps": 30})
    said = done.stdout + done.stderr
    assert done.returncode == FAULT and "Traceback" not in said and "not finite" in done.stderr, said
    assert json.loads((tmp_path / "overflow/config.json").read_text())["policy"]["optimiser"]["lr"] == 10
    assert (tmp_path / "overflow/checkpoints/0").is_dir()
