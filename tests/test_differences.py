"""Where rollouts part: differences that are put in by hand, and margins computed another way."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from cooper_jax.kernels import gumbel
from cooper_jax.model import transformer
from cooper_jax.rollout import sampling_spec
from cooper_jax.rollout.differences import find_first_differences
from cooper_jax.types import Rollout

MODEL = tiny_models.config(vocab_size=60, width=16, head_dim=4, ffn=24)
SPEC = sampling_spec.SamplingSpec(
    temperature=0.7,
    top_k=0,
    top_p=1.0,
    max_new_tokens=5,
    group_size=2,
    eos_ids=(),
    segment=4,
    dtype="float32",
)
PROMPTS, POSITIONS, KEY = [[3, 5, 8], [21, 4, 4, 9]], [7, 3], jax.random.key(0)


def made(tokens, lengths) -> Rollout:
    mask = np.arange(5)[None, :] < np.array(lengths)[:, None]
    tokens = np.where(mask, tokens, 0).astype(np.int32)
    return Rollout(
        tokens=tokens, mask=mask, logprobs=-tokens.astype(np.float32), finished=np.zeros(len(tokens), bool)
    )


def differences(a, b, spec=SPEC, fused=False):
    params = tiny_models.random_params(MODEL)
    return find_first_differences(
        params, MODEL, tiny_models.one_device(), PROMPTS, POSITIONS, KEY, spec, a, b, fused=fused
    )


def logits_before(row: int, index: int, tokens) -> np.ndarray:
    """f64[V]: what the row's token at `index` was drawn from, by the whole forward pass."""
    line = np.array([[*PROMPTS[row // 2], *tokens[row][:index]]], np.int32)
    hidden = transformer.hidden_states(
        tiny_models.random_params(MODEL),
        MODEL,
        line,
        np.ones(line.shape, bool),
        dtype=jnp.float32,
        layout=tiny_models.one_device(),
    )
    return np.asarray(
        transformer.compute_logits(tiny_models.random_params(MODEL), MODEL, hidden)[0, -1], np.float64
    )


A = np.arange(20).reshape(4, 5) + 10
B = A.copy()
B[1, 2:] += 7
B[2, 4] = 3


def test_the_first_difference_of_each_row_is_found():
    assert differences(made(A, [5] * 4), made(A, [5] * 4)) == []
    found = differences(made(A, [5, 5, 5, 4]), made(B, [5, 5, 5, 2]))
    assert [(d.row, d.index, d.tokens) for d in found] == [
        (1, 2, (17, 24)),
        (2, 4, (24, 3)),
        (3, 2, (27, -1)),
    ]
    assert found[0].logprobs == (-17.0, -24.0)
    assert all(np.isfinite(d.margin) and 0 <= d.margin < 1 for d in found)


def test_the_greedy_margin_is_the_gap_of_the_two_largest_probabilities():
    found = differences(made(A, [5] * 4), made(B, [5] * 4), dataclasses.replace(SPEC, temperature=0.0))
    for d in found:
        z = logits_before(d.row, d.index, A)
        p = np.sort(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
        assert d.margin == pytest.approx(p[-1] - p[-2], abs=1e-6)


def test_the_race_s_margin_is_the_gap_of_the_two_best():
    found = differences(made(A, [5] * 4), made(B, [5] * 4), fused=True)
    keys = sampling_spec.make_row_keys(KEY, jnp.asarray(POSITIONS), 2)
    for d in found:
        words = np.asarray(sampling_spec.make_key_words(keys[d.row : d.row + 1], d.index))[0]
        noise = gumbel.gumbel_at(*(jnp.uint32(w) for w in words), jnp.arange(60, dtype=jnp.uint32))
        race = np.sort(logits_before(d.row, d.index, A) / 0.7 + np.asarray(noise, np.float64))
        assert d.margin == pytest.approx(race[-1] - race[-2], abs=1e-4)


def run(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "launch/compare_rollouts.py", "--config=configs/tiny.py"]
    command += ["--config.data.prompts_per_step=2", "--config.rollout.group_size=4", *arguments]
    command += ["--config.rollout.max_new_tokens=8", "--config.data.max_prompt_tokens=8"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_compares_two_settings():
    other = run("--other=rollout.max_rows=8", "--other=rollout.segment=3")
    assert other.returncode == 0, other.stderr
    assert "of 8 rows differ" in other.stdout
    assert int(other.stdout.split()[0]) <= 1, "rounding seldom tips a draw"
    coarse = run("--other=policy.arch.layers=2")
    assert "8 of 8 rows differ" in coarse.stdout and "margin" in coarse.stdout


@pytest.mark.slow
def test_what_cannot_be_is_named():
    few = run("--other=rollout.max_rows=3")
    assert few.returncode == 2 and "error: rollout: max_rows 3" in few.stderr
    wrong = run("--other=rollout.slots=3")
    assert wrong.returncode == 2 and wrong.stderr.strip().splitlines()[-1].startswith(
        "error: --other=rollout.slots=3"
    )
