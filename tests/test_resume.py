"""Resumed runs: the same steps bit for bit, in the memory of a fresh run."""

import gc

import jax
import numpy as np
import pytest
from tiny_steps import B, begun, host, solved, steps

from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.resume import save_checkpoint
from cooper_jax.trainer.step import cooper_step


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
                state, metrics, _ = cooper_step(solved(components), state, PhaseTimer())
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
                state, metrics, _ = cooper_step(solved(components), state, PhaseTimer())
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
