"""The benchmark command: the roofline by hand, what it writes, what it says to bad arguments."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cooper_jax.configs import base
from cooper_jax.launch import bench as command
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import bench_programs, machine, roofline
from cooper_jax.perf.machine import Rates
from cooper_jax.settings.setup_errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
RATES = Rates(flops=100.0, bandwidth=10.0, measured={})
# The tiny config in seconds.
SMALL = {
    "data.prompts_per_step": 2, "data.max_prompt_tokens": 8, "rollout.group_size": 2, "rollout.max_new_tokens": 6,
    "rollout.segment": 3, "policy.arch.layers": 1, "reward.arch.layers": 1,
}  # fmt: skip


@pytest.fixture
def config() -> ModelConfig:
    """Two layers of width 4: two query heads and one key/value head of 2, feed-forward 8, ten tokens.

    A layer has 2 * 4 * 2 * 2 (q, o) + 2 * 4 * 1 * 2 (k, v) + 3 * 4 * 8 (feed-forward) = 144 weights; the layers
    have 288, the head 40.  A query with a key costs 4 * 2 layers * 2 heads * 2 = 32 flops.
    """
    arch = base.arch()
    arch.update(layers=2, width=4, heads=2, kv_heads=1, head_dim=2, ffn=8)
    return ModelConfig.from_arch(arch, vocab_size=10)


# --- the roofline ---------------------------------------------------------------------------------------


def test_weights_by_hand(config):
    assert roofline.count_weights(config) == (288, 40)


def test_rollout_roofline_by_hand(config):
    """One prompt of 3 tokens, two samples of 2 and 4 tokens, two slots, float32.

    Prefill: 3 tokens through 288 weights, one through the head, 1 + 2 + 3 keys: 2 * 288 * 3 + 2 * 40 + 32 * 6.
    Decoding: 1 + 3 tokens, which read 4 and 4, 5, 6 keys, so 4 * 2 * 328 + 32 * 19 flops.  In 3 steps (the longest
    row's) 328 weights are read, and for each of 19 keys a key and a value of 2 elements in 2 layers.
    """
    work = roofline.rollout_work(config, 1, 3, [2, 4], slots=2, weight_bytes=4, cache_bytes=4)
    assert work["prefill"] == roofline.Work(flops=2000, bytes=0)
    assert work["decode"] == roofline.Work(flops=3232, bytes=4 * (3 * 328 + 19 * 8))
    # 20 s; then 32.32 s of products hide behind 454.4 s of traffic.
    assert roofline.roofline_seconds(work, RATES) == pytest.approx(20 + 454.4)


def test_fewer_slots_than_rows_read_the_weights_more_often(config):
    one, two = (
        roofline.rollout_work(config, 1, 3, [2, 4], slots, weight_bytes=4, cache_bytes=1)["decode"]
        for slots in (1, 2)
    )
    assert one.bytes - two.bytes == 4 * 328  # 4 steps and not 3
    assert one.flops == two.flops


def test_score_and_update_rooflines_by_hand(config):
    """Rows of 3 + 2 and 3 + 4 tokens: 12 tokens, 6 with a logit, 15 + 28 keys.

    2 * 288 * 12 + 2 * 40 * 6 + 32 * 43 flops.
    """
    forward = roofline.score_work(config, 3, [2, 4])
    assert forward == {"forward": roofline.Work(flops=8768)}
    assert roofline.roofline_seconds(forward, RATES) == 87.68
    # The second row shares the prompt: 2 * 288 * 3 + 32 * 6 flops less.
    shared = {"forward": roofline.Work(flops=8768 - 1920)}
    assert roofline.score_work(config, 3, [2, 4], shared_prompts=1) == shared
    assert roofline.update_work(config, 3, [2, 4], shared_prompts=1)["passes"].flops == 3 * 6848
    # Thrice the forward pass; AdamW touches 328 weights of 4 bytes 7 times.
    moved = roofline.update_work(config, 3, [2, 4])
    assert moved == {"passes": roofline.Work(flops=3 * 8768), "optimiser": roofline.Work(bytes=7 * 328 * 4)}
    assert roofline.roofline_seconds(moved, RATES) == pytest.approx(263.04 + 918.4)
    twice = roofline.update_work(config, 3, [2, 4], epochs=2, updates=4)
    assert twice["passes"].flops == 2 * 3 * 8768 and twice["optimiser"].bytes == 4 * 7 * 328 * 4


def test_windows_in_the_roofline_by_hand(config):
    """Two layers, one with a window of 2: of 4 tokens it reads 1 + 2 + 2 + 2 keys, the other 1 + 2 + 3 + 4."""
    sliding = dataclasses.replace(config, layers=2, layer_types=("full", "sliding"), window=2)
    full = dataclasses.replace(config, layers=2)
    per_key = 4 * config.heads * config.head_dim
    [with_window], [without] = (roofline.score_work(c, 0, [4]).values() for c in (sliding, full))
    assert without.flops - with_window.flops == per_key * (10 - 7)

    # Decoding 2 tokens after a prompt of 3 and the first token: 4 + 5 keys, or 2 + 2.
    work = [
        roofline.rollout_work(c, 1, 3, [3], 1, weight_bytes=4, cache_bytes=4)["decode"]
        for c in (sliding, full)
    ]
    assert work[1].flops - work[0].flops == per_key * (9 - 4)
    assert work[1].bytes - work[0].bytes == 2 * config.kv_heads * config.head_dim * 4 * (9 - 4)


def test_pair_roofline_has_no_head(config):
    work = roofline.pair_update_work(config, [5, 7])
    assert work["passes"].flops == 3 * (2 * 288 * 12 + 32 * 43)


def test_the_better_rates_of_two_measurements_times_the_devices():
    both = Rates(1.0, 5.0, {"gemm": 1.0}).best(Rates(2.0, 4.0, {"gemm": 2.0}))
    assert both == Rates(2.0, 5.0, {"gemm": 2.0})
    assert both.times(4) == Rates(8.0, 20.0, {"gemm": 2.0})


def test_measured_rates(monkeypatch):
    """A cache's bandwidth counts where it holds the weights, the memory's where it does not."""
    monkeypatch.setattr(machine, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(machine, "SQUARE_SIDE", {"cpu": 64})
    monkeypatch.setattr(machine, "ARRAY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(machine, "read_last_level_cache", lambda: 2**16)
    found = {"read_dram": 3.0, "read_cache": 7.0}
    monkeypatch.setattr(
        machine, "_host_bandwidth", lambda name, size: {f"read_{name}": found[f"read_{name}"]}
    )
    small, large = (machine.measure_rates("float32", 4, 8, 16, size) for size in (100, 2**20))
    assert small.bandwidth == 7e9 and large.bandwidth == 3e9
    assert set(small.measured) == {"gemm_square_64", "gemm_model", "read_dram", "read_cache"}
    assert small.flops == 1e9 * max(small.measured["gemm_square_64"], small.measured["gemm_model"]) > 0


def test_host_bandwidth_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "TRIAL_SECONDS", 0.0)
    found = machine._host_bandwidth("cache", 2**16)
    assert set(found) == {"read_cache", "copy_cache"} and min(found.values()) > 0


# --- the workload --------------------------------------------------------------------------------------------


def test_ragged_lengths_are_seeded_and_within_their_limits():
    cfg = base.get_config()
    cfg.data.prompts_per_step, cfg.rollout.group_size, cfg.rollout.max_new_tokens = 64, 16, 200
    workload = bench_programs.make_workload(cfg, 50, prompt_tokens=5, ragged=True)
    again = bench_programs.make_workload(cfg, 50, prompt_tokens=5, ragged=True)
    assert workload.prompts.shape == (64, 5) and workload.prompts.max() < 50
    assert (workload.lengths == again.lengths).all() and workload.lengths.shape == (1024,)
    # P(l >= x) = 10 / x from 10 on: half are below 20, and a twentieth is cut off at 200.
    assert workload.lengths.min() >= 10 and workload.lengths.max() == 200
    assert abs((workload.lengths < 20).mean() - 0.5) < 0.05
    assert abs((workload.lengths == 200).mean() - 0.05) < 0.03
    cfg.seed = 1
    assert (
        bench_programs.make_workload(cfg, 50, prompt_tokens=5, ragged=True).lengths != workload.lengths
    ).any()
    even = bench_programs.make_workload(cfg, 50, prompt_tokens=5, ragged=False)
    assert (even.lengths == 200).all() and even.tokens == 1024 * 205


# --- the command -----------------------------------------------------------------------------------------


def run(*args: str, devices: int = 1) -> subprocess.CompletedProcess:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    command = [sys.executable, str(ROOT / "launch/bench.py"), *args]
    env = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def tiny(**changes) -> list[str]:
    values = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        f"--config={ROOT}/configs/tiny.py",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


@pytest.mark.parametrize(
    "kind, options, programs, devices",
    [
        ("rollout", ["--ragged"], ["rollout"], 1),
        pytest.param("score", ["--prompt_tokens=5"], ["score"], 1, marks=pytest.mark.slow),
        pytest.param("train", [], ["policy update", "reward-model update"], 2, marks=pytest.mark.slow),
    ],
)
def test_the_command(kind, options, programs, devices, tmp_path):
    out = tmp_path / "out.json"
    done = run(kind, *tiny(), *options, "--reps=2", f"--out={out}", devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert written["kind"] == kind and written["config"] == "tiny" and written["devices"] == devices
    assert written["mesh"] == {"data": 1, "fsdp": devices, "tensor": 1}
    assert written["prompts"] == 2 and written["group_size"] == 2 and written["max_new_tokens"] == 6
    assert written["ragged"] == ("--ragged" in options)
    assert written["prompt_tokens"] == (5 if kind == "score" else 8)
    assert [r["program"] for r in written["results"]] == programs
    for result in written["results"]:
        assert f"{result['program']}: " in done.stdout
        assert len(result["seconds"]) == 2 and result["median_seconds"] == np.median(result["seconds"])
        assert result["tokens_per_second"] == result["tokens"] / result["median_seconds"]
        assert result["first_call_seconds"] > 0 and result["memory"]["host_peak_bytes"] > 2**20
        bound = result["roofline"]
        assert bound["seconds"] == pytest.approx(sum(part["seconds"] for part in bound["parts"].values()))
        assert bound["share"] == pytest.approx(bound["seconds"] / result["median_seconds"])
        assert bound["devices"] == 1, "virtual devices share the cores"
        assert {"gemm_model", "read_dram", "copy_dram", "read_cache"} <= set(bound["measured"])
    first = written["results"][0]
    if kind == "rollout":
        assert 4 <= first["tokens"] <= 24 and set(first["phase_seconds"]) == {"prefill", "decode"}
    else:
        assert first["tokens"] == 4 * (written["prompt_tokens"] + 6) and first["phase_seconds"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, words",
    [
        (["sleep", *tiny()], "'sleep' is none of rollout, score, train"),
        (["rollout", *tiny(rollout__group_sizes=3)], "group_sizes"),
    ],
)
def test_a_bad_argument_is_told_in_one_line(args, words):
    done = run(*args)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "kind, config, changes, options, words",
    [
        ("rollout", "tiny", {}, {"reps": 0}, "--reps=0: it must be at least 1"),
        ("rollout", "tiny", {}, {"prompt_tokens": -1}, "--prompt_tokens=-1: it must be at least 0"),
        ("rollout", "tiny", {}, {"out": "/nowhere/out.json"}, "there is no directory /nowhere"),
        ("rollout", "tiny", {"rollout.group_size": 0}, {}, "rollout.group_size=0: it must be at least 1"),
        ("rollout", "tiny", {"rollout.dtype": "int8"}, {}, "rollout.dtype='int8': it is one of float32"),
        ("rollout", "qwen_1p5b", {}, {}, "policy.weights='Qwen/Qwen2.5-1.5B-Instruct' cannot be had"),
        ("score", "tiny", {"policy.weights": "/nowhere"}, {}, "policy.weights='/nowhere' cannot be had"),
        ("train", "tiny", {"mesh.data": 3}, {}, "--config.mesh.data"),
        ("train", "tiny", {"reward.weights": ""}, {}, "reward.weights is empty"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(kind, config, changes, options, words):
    """As the command says it, of which `bench` is all but the flags."""
    cfg = importlib.import_module(f"cooper_jax.configs.{config}").get_config()
    cfg.update_from_flattened_dict(changes)
    with pytest.raises(SetupError) as error:
        command.run_bench(kind, cfg, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_kind_must_be_named():
    done = run(*tiny())
    assert done.returncode == 2 and "name one of rollout, score, train" in done.stdout + done.stderr
