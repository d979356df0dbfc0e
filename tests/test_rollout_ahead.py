"""Rollouts one step ahead: the weights that they are sampled with, what a step makes of them, and how they end."""

import dataclasses
import threading
import time
import zlib

import jax
import numpy as np
import pytest
from tiny_steps import ALL_TERMS, B, Undecided, begun, config, host, solved, take_step

from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import grading, policy_stages
from cooper_jax.trainer.resume import save_checkpoint
from cooper_jax.trainer.rollout_ahead import copy_to_rollout
from cooper_jax.trainer.rollout_thread import PendingRollout, RolloutThread
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Verdict

# With this learning rate one update changes what is sampled.
FAST = ALL_TERMS | {
    "policy.optimiser.lr": 0.05,
    "policy.optimiser.warmup_steps": 0,
    "reward.warmup_updates": 0,
    "reward.updates": 1,
}
AHEAD = FAST | {"rollout.ahead": 1}
SLOW = pytest.mark.slow
MESHES = [pytest.param(*mesh, marks=SLOW) for mesh in ((1, "1x1x1"), (4, "4x1x1"), (4, "2x2x1"))]


def started(components, state):
    """The state at step 0 with the rollout's copy of the weights, and the components of a run that learns."""
    components = dataclasses.replace(solved(components), rule=Undecided())
    if components.rollout_thread is not None:
        state = dataclasses.replace(state, rollout_params=copy_to_rollout(components, state.policy.params))
    return components, state


def run_steps(components, state, count):
    """So many steps: the last state, and the metrics and record of each."""
    rows = []
    for _ in range(count):
        state, metrics, record = take_step(components, state)
        rows.append((metrics, record))
    return state, rows


def use_old_weights(monkeypatch, updates):
    """Let steps in sequence sample with the weights that were current so many updates before."""
    current = []
    sample = policy_stages.sample_responses

    def sample_with_old(components, params, *args, **options):
        current.append(jax.tree.map(lambda x: x.copy(), params))  # the original is donated to the update
        return sample(components, current[max(len(current) - 1 - updates, 0)], *args, **options)

    monkeypatch.setattr(policy_stages, "sample_responses", sample_with_old)


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.mark.parametrize("learners, rollout", MESHES)
def test_steps_equal_those_in_sequence_with_weights_one_update_old(build, monkeypatch, learners, rollout):
    """Bit for bit: the responses, both models, the replay and the metrics."""
    devices = learners * 2
    with build(devices, **AHEAD | {"mesh.rollout": rollout}) as built:
        state, rows = run_steps(*started(*built), 4)
        ahead = host((state.policy, state.reward))

    def run_in_sequence(updates):
        use_old_weights(monkeypatch, updates)
        with build(learners, **FAST | {"policy.correction": "token"}) as built:
            in_sequence, expected = run_steps(*started(*built), 4)
            return in_sequence, expected, host((in_sequence.policy, in_sequence.reward))

    expected_state, expected, arrays = run_in_sequence(updates=1)
    for (metrics, record), (expected_metrics, expected_record) in zip(rows, expected, strict=True):
        assert record.completions == expected_record.completions
        # Sums over another mesh's shards differ in the last bits, so that only equal meshes are equal.
        if rollout.endswith(f"{learners}x1x1"):
            np.testing.assert_equal(without_times(metrics), without_times(expected_metrics))
    assert state.position == expected_state.position and state.replay == expected_state.replay
    if rollout.endswith(f"{learners}x1x1"):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(ahead, arrays, strict=True))

    # The weights' age is what decides: with current ones the third step's responses are others.
    monkeypatch.undo()
    with build(learners, **FAST) as built:
        _, current = run_steps(*started(*built), 3)
    assert rows[0][1].completions == current[0][1].completions
    assert rows[2][1].completions != current[2][1].completions


def test_old_weights_are_seen_and_corrected(build):
    """The first step samples with the weights that it trains; from the second on the log-probabilities differ."""
    with build(2, **AHEAD | {"mesh.rollout": "1x1x1"}) as built:
        _, rows = run_steps(*started(*built), 3)
    mismatch = [metrics["policy/rollout_mismatch"] for metrics, _ in rows]
    assert mismatch[0] < 1e-5 and min(mismatch[1:]) > 1e-2
    assert rows[0][0]["policy/correction"] == pytest.approx(1, abs=1e-4)
    assert rows[2][0]["policy/correction"] != pytest.approx(1, abs=1e-3)
    for metrics, _ in rows:
        assert metrics["time/rollout_ahead"] > 0 and 0 <= metrics["time/rollout_overlap"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [{}, {"policy.lora.rank": 2}])
def test_a_resumed_run_samples_the_next_step_again(build, tmp_path, adapters):
    changes = AHEAD | {"mesh.rollout": "2x1x1"} | adapters

    def run(path, count):
        with build(4, **changes) as (components, state):
            components, _ = started(components, state)
            with begun(components, state, path) as (state, run, kept):
                rows = []
                for _ in range(count):
                    state, metrics, record = take_step(components, state)
                    run.log(state.step, metrics)
                    rows.append((metrics, record))
                save_checkpoint(components, state, run, kept)
                arrays = host((state.policy, state.reward, state.rollout_params))
                return arrays, [record.completions for _, record in rows], state.position

    whole, texts, position = run(tmp_path / "whole", 4)
    _, first, _ = run(tmp_path / "parts", 2)
    parts, second, again = run(tmp_path / "parts", 2)
    assert first + second == texts and again == position
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, parts, strict=True))


@pytest.mark.slow
def test_the_base_of_adapters_is_copied_once(build):
    with build(2, **AHEAD | {"mesh.rollout": "1x1x1", "policy.lora.rank": 2}) as built:
        components, state = started(*built)
        before = state.rollout_params
        state, _ = run_steps(components, state, 2)
        assert state.rollout_params["embed"] is before["embed"]
        old, new = host(before["lora"]), host(state.rollout_params["lora"])
        assert any(a.tobytes() != b.tobytes() for a, b in zip(old, new, strict=True))


@pytest.mark.slow
def test_scores_are_those_of_the_updated_reward_model(build):
    """Also on devices of its own, which could score while the batch is sampled: it changes in between."""
    changes = AHEAD | {"mesh.rollout": "1x1x1", "mesh.reward": "1x1x1", "reward.optimiser.lr": 0.05}
    with build(3, **changes) as built:
        components, state = started(*built)
        state, _ = run_steps(components, state, 2)
        params = jax.tree.map(lambda x: x.copy(), state.reward.params)
        problems = state.pending_rollout.result().problems.row_problems
        _, ((_, record),) = run_steps(components, state, 1)
        logits = grading.compute_response_logits(components, params, problems, record.completions)
    np.testing.assert_allclose(record.rewards, 1 / (1 + np.exp(-logits)), atol=1e-5)


class ByText(Undecided):
    """A rule verifier that finds an eighth of all texts correct."""

    def submit(self, items):
        correct = [zlib.crc32(item[1].encode()) % 8 == 0 for item in items]
        return [Verdict.CORRECT if is_correct else Verdict.WRONG for is_correct in correct]


@pytest.mark.slow
def test_the_next_batch_begins_behind_a_refill(build):
    """Flat groups are replaced before the next step's problems are known, with the weights of the others."""
    changes = {"mesh.rollout": "1x1x1", "rollout.ahead": 1, "reward.arm": "rule", "policy.kl_coef": 0.0}
    with build(2, **changes | {"data.refill_prompts": 6, "data.synthetic_size": 40}) as built:
        components, state = started(*built)
        components = dataclasses.replace(components, rule=ByText())
        taken = []
        for _ in range(3):
            position = state.position
            state, metrics, _ = take_step(components, state)
            assert state.position - position == B + metrics["data/refill_prompts"]
            first = state.pending_rollout.result().problems.positions[0]
            assert first == state.position
            taken.append(metrics["data/refill_prompts"])
    assert max(taken) > 0, "nothing was replaced"


@pytest.mark.slow
def test_the_last_step_starts_no_rollout(build):
    with build(2, **AHEAD | {"mesh.rollout": "1x1x1", "steps": 2}) as built:
        components, state = started(*built)
        state, _ = run_steps(components, state, 1)
        assert state.pending_rollout is not None
        state, _ = run_steps(components, state, 1)
        assert state.pending_rollout is None


# --- how a batch ends --------------------------------------------------------------------------------


def test_an_error_of_the_thread_reaches_the_step(build, monkeypatch):
    with build(2, **AHEAD | {"mesh.rollout": "1x1x1"}) as built:
        components, state = started(*built)

        def fail(*_, **__):
            raise FloatingPointError("a row's logits are not finite")

        monkeypatch.setattr(policy_stages, "sample_responses", fail)
        with pytest.raises(FloatingPointError, match="not finite"):
            take_step(components, state)


@pytest.mark.slow
def test_a_run_that_ends_cancels_the_rollout(build, monkeypatch):
    """Between two segments, and before the services that it uses are closed."""
    before = set(threading.enumerate())
    ended = []
    with build(2, **AHEAD | {"mesh.rollout": "1x1x1", "rollout.segment": 1}) as built:
        components, state = started(*built)
        state, _ = run_steps(components, state, 1)
        state.pending_rollout.result()

        sample = policy_stages.sample_responses

        def sample_for_ever(*args, between_segments, **options):
            try:
                while True:
                    sample(*args, between_segments=between_segments, **options)
            finally:
                ended.append(components.rule)

        monkeypatch.setattr(policy_stages, "sample_responses", sample_for_ever)
        state, _ = run_steps(components, state, 1)
        assert not ended
    assert len(ended) == 1
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "rollout"]


def test_sigterm_ends_the_wait(monkeypatch):
    """Behind the segment that is running, though the rollout goes on."""
    end = threading.Event()

    def sample(begin_segment):
        begin_segment()
        end.wait()

    def stop():
        raise hosts.Stopped

    monkeypatch.setattr(hosts, "raise_if_stopping", stop)
    pending = PendingRollout(sample)
    with pytest.raises(hosts.Stopped):
        pending.result()
    end.set()


def test_sigterm_is_looked_for_once_a_segment(monkeypatch):
    """Also for segments that have passed: so processes that wait for different times call it equally often."""
    calls = []
    monkeypatch.setattr(hosts, "raise_if_stopping", lambda: calls.append(1))
    thread = RolloutThread()
    pending = thread.start(lambda begin_segment: [begin_segment() for _ in range(5)])
    pending._thread.join()
    assert thread.take(pending) == [None] * 5 and len(calls) == 5


@pytest.mark.parametrize("behind", [0, 3])
def test_a_pause_holds_all_hosts_behind_the_same_segment(monkeypatch, behind):
    """Another host has begun as many segments more, which this one has to run as well."""
    begun, started = [], threading.Event()

    def sample(begin_segment):
        while True:
            begin_segment()
            begun.append(1)
            started.set()
            time.sleep(0.001)

    held = []

    def exchange(name, own):
        time.sleep(0.05)  # the thread is held meanwhile
        assert len(begun) == own
        held.append(own + behind)
        return [own, own + behind]

    monkeypatch.setattr(hosts, "exchange_json", exchange)
    thread = RolloutThread()
    thread.start(sample)
    started.wait()
    with thread.pause():
        time.sleep(0.05)
        assert [len(begun)] == held
    until = time.monotonic() + 10
    while len(begun) < held[0] + 5:
        assert time.monotonic() < until, "the rollout does not go on"
        time.sleep(0.001)
    thread.cancel()
    ended = len(begun)
    assert ended == held[1]
    time.sleep(0.02)
    assert len(begun) == ended


def test_one_rollout_at_a_time():
    thread, end = RolloutThread(), threading.Event()
    thread.start(lambda begin_segment: end.wait())
    with pytest.raises(AssertionError, match="another step"):
        thread.start(lambda begin_segment: None)
    end.set()  # it has no further segment, so that this waits for its end
    thread.cancel()
    assert thread.take(thread.start(lambda begin_segment: 7)) == 7
    with thread.pause():
        pass  # nothing runs


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout.ahead": 1}, "rollout.ahead=1: the next step is sampled on devices of its own"),
        ({"mesh.rollout": "1x1x1"}, "mesh.rollout='1x1x1' with rollout.ahead=0: these devices would be idle"),
        ({"rollout.ahead": 2, "mesh.rollout": "1x1x1"}, "rollout.ahead=2"),
        ({"rollout.ahead": 1, "mesh.rollout": "1x1x1", "exact": True}, "exact=True with rollout.ahead=1"),
        ({"rollout.ahead": 1, "mesh.rollout": "1x1x1", "rollout.top_p": 0.9}, "rollout.ahead=1 with top_k=0"),
        ({"rollout.ahead": 1, "mesh.rollout": "four"}, "mesh.rollout"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_ahead_is_refused(build, changes, message):
    with pytest.raises(SetupError, match=message.replace(".", r"\.")):
        RunSettings.from_config(config(**changes))
        with build(2, **changes):
            pass


def test_a_loss_without_correction_warns(build, capsys):
    with build(2, **AHEAD | {"mesh.rollout": "1x1x1", "policy.correction": "none"}):
        pass
    assert "warning: rollout.ahead=1 with policy.correction=none" in capsys.readouterr().out
