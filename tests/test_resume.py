"""Resumed runs: the same steps bit for bit, in the memory of a fresh run."""

import gc
import json

import jax
import numpy as np
import pytest
from tiny_steps import B, begun, config, host, solved, steps, take_step

from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.run_directory import RunDirectory
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.resume import _go_back, save_checkpoint, start_or_resume


@pytest.mark.slow
def test_a_resumed_run_holds_no_more_memory_than_a_fresh_one(build, tmp_path):
    def live():
        gc.collect()  # arrays may share a buffer: a shard taken out of one does
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())

    def start(steps):
        with build() as (components, state), begun(components, state, tmp_path) as (state, run, kept):
            kept.wait()  # a save under way has copies of its own
            held = live() - before
            for _ in range(steps):
                state, metrics, _ = take_step(solved(components), state)
                run.log(state.step, metrics)
            if steps:
                save_checkpoint(components, state, run, kept)
            return held, host(state), (state.step, state.position)

    before = live()
    fresh, trained, place = start(1)
    resumed, restored, again = start(0)
    assert place == again == (1, B)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(trained, restored, strict=True))
    assert fresh * 0.95 < resumed < fresh * 1.05


@pytest.mark.slow
def test_a_resumed_run_measures_the_rewrites_of_a_whole_one(build, tmp_path):
    def run(path, count):
        with build() as (components, state), begun(components, state, path) as (state, run, kept):
            for _ in range(count):
                state, metrics, _ = take_step(solved(components), state)
                run.log(state.step, metrics)
            save_checkpoint(components, state, run, kept)
            return state.recent_rewrites

    whole = run(tmp_path / "whole", 2)
    first = run(tmp_path / "parts", 1)
    assert run(tmp_path / "parts", 1) == whole and len(whole.rewrites) > len(first.rewrites) > 0
    assert all(rewrite.negative == rewrite.positive + " not" for rewrite in whole.rewrites)


@pytest.mark.slow
def test_a_resumed_run_remembers_what_it_would_have(build, tmp_path):
    """One step, a restart and another are two steps, bit for bit: warm-up, replay and all terms included."""
    whole, metrics, replay, warm = steps(build, tmp_path / "whole", 2)
    steps(build, tmp_path / "parts", 1)
    parts, second, again, first = steps(build, tmp_path / "parts", 1)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, parts, strict=True))
    assert again == replay and first not in (warm, replay, Replay()) and warm != Replay()
    np.testing.assert_equal(second, metrics[1:])
    assert all(row["rm/updates"] == 2 and row["rm/rollout_rows"] > 0 for row in metrics)
    assert len(replay.correct) == 5 and metrics[1]["rm/rollout_rows"] > 6


@pytest.mark.slow
def test_a_run_goes_back_once_and_loses_nothing(build, tmp_path):
    """The steps after the chosen one are made again, the same; what they had left is there under other names."""

    def run(until, resume_step=-1):
        with build(resume_step=resume_step) as (components, state):
            directory = RunDirectory(tmp_path, config(), resume=True)
            with directory, Checkpoints(tmp_path, keep=0) as kept:
                state = start_or_resume(components, state, directory, kept)
                began = state.step
                while state.step < until:
                    state, metrics, _ = take_step(components, state)
                    directory.log(state.step, metrics)
                    save_checkpoint(components, state, directory, kept)
                return began, host(state.policy.params)

    def logged(name):
        return [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]

    _, third = run(3)
    began, again = run(2, resume_step=1)
    assert began == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "0", "1", "2", "2.abandoned", "3.abandoned"
    ]  # fmt: skip
    assert logged("metrics.jsonl") == [1, 2]
    assert logged("metrics.before_going_back_to_1.jsonl") == [1, 2, 3]

    # The same command, after it was preempted, goes on.
    began, finished = run(3, resume_step=1)
    assert began == 2
    assert all(a.tobytes() == b.tobytes() for a, b in zip(third, finished, strict=True))
    with RunDirectory(tmp_path, config(), resume=True) as directory, Checkpoints(tmp_path, keep=0) as kept:
        with pytest.raises(SetupError, match=r"resume_step.*no checkpoint of step 9; it has \[0, 1, 2, 3\]"):
            _go_back(9, directory, kept)


@pytest.mark.slow
def test_models_that_were_trained_with_another_tokenizer_are_refused(build, tmp_path):
    """Models from scratch read and write the pieces of the tokenizer in their run's directory."""
    first, second = tmp_path / "first", tmp_path / "second"
    with build() as (components, state), begun(components, state, first):
        pass
    second.mkdir()
    (first / "tokenizer_640.model").write_bytes(b"pieces")
    (second / "tokenizer_640.model").write_bytes(b"other pieces")

    def start():
        with build(**{"supervised.start_from": str(first)}) as (components, state):
            with begun(components, state, second) as (state, _, _):
                return state.step

    with pytest.raises(
        SetupError, match=r"start_from=.*first: its tokenizer_640.model is not the one of this run"
    ):
        start()
    (second / "tokenizer_640.model").write_bytes(b"pieces")
    assert start() == 0


@pytest.mark.slow
def test_each_model_may_start_from_a_run_of_its_own(build, tmp_path):
    """The policy of one run, and the reward model of another, or the run's own."""

    def start(name, **changes):
        with build(**changes) as (components, state):
            with begun(components, state, tmp_path / name) as (state, _, kept):
                kept.wait()
                return [
                    np.concatenate([np.ravel(x) for x in host(m.params)])
                    for m in (state.policy, state.reward)
                ]

    own = start("own", seed=3)
    first, second = start("first", seed=1), start("second", seed=2)
    both = {"supervised.start_from": str(tmp_path / "first"), "seed": 3}
    for name, source, reward in (
        ("start_from", "", first),
        ("reward_from", str(tmp_path / "second"), second),
        ("kept", "own", own),
    ):
        got = start(name, **both, **{"supervised.reward_from": source})
        np.testing.assert_array_equal(got[0], first[0])
        np.testing.assert_array_equal(got[1], reward[1])
    assert not np.array_equal(first[1], second[1]) and not np.array_equal(second[1], own[1])
    # Without start_from the policy is the run's own.
    got = start("alone", seed=3, **{"supervised.reward_from": str(tmp_path / "second")})
    np.testing.assert_array_equal(got[0], own[0])
    np.testing.assert_array_equal(got[1], second[1])
