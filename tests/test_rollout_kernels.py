"""The rollout with kernels in it, interpreted, and with narrower caches: log-probabilities are those of `trunk`."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_rollouts import (
    KEY,
    POSITIONS,
    PROMPTS,
    TINY,
    assert_same,
    forced,
    params_of,
    rollout,
    sampled,
    spec_of,
)

from cooper_jax.configs import base
from cooper_jax.model import generation, transformer
from cooper_jax.rollout.engine import generate
from cooper_jax.runtime.mesh import Layout, make_mesh, make_shardings

# The narrowest heads that the TPU kernel takes.
WIDE = dataclasses.replace(TINY, head_dim=64, heads=4, kv_heads=2, ffn=16)
BOTH_KERNELS = (pytest.param("tpu_interpret", marks=pytest.mark.slow), "triton_interpret")
# Interpreted kernels are slow: a handful of tokens.
SHORT = spec_of(max_new_tokens=4, group_size=2, segment=3, eos_ids=(7,))
LIMITS = np.array([4, 3, 2, 4, 1, 4, 2, 3])


def check(r, spec, config=WIDE, limits=LIMITS, atol=1e-5):
    """What any rollout is: drawn from the policy, as many tokens as were asked for, ended by an EOS or a limit."""
    lengths = r.mask.sum(axis=1)
    assert (r.mask == (np.arange(r.mask.shape[1])[None, :] < lengths[:, None])).all()
    assert r.tokens.max() < config.vocab_size and not r.tokens[~r.mask].any()
    last = r.tokens[np.arange(len(lengths)), lengths - 1]
    np.testing.assert_array_equal(r.finished, np.isin(last, spec.eos_ids))
    np.testing.assert_array_equal(lengths[~r.finished], limits[~r.finished])
    np.testing.assert_allclose(r.logprobs, forced(r, spec, config=config), atol=atol)


@functools.cache
def drawn(implementation, slots=None):
    return rollout(SHORT, config=WIDE, limits=LIMITS, max_rows=slots, implementation=implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BOTH_KERNELS)
@pytest.mark.parametrize("slots", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_kernels_draw_from_the_policy(implementation, slots):
    """The fused head; slots in the order of the requests, or fewer and in any.  The same noise, the same rows."""
    r = drawn(implementation, slots)
    check(r, SHORT)
    assert_same(r, drawn("triton_interpret"))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ("tpu_interpret", "triton_interpret"))
def test_kernels_in_a_loop_over_a_stack(implementation, monkeypatch):
    """As models of many layers run: the layer is an index.  From a distribution that is cut, and from logits."""
    monkeypatch.setattr(generation, "LAYERS_ALONE", 1)
    config = dataclasses.replace(WIDE, max_len=255)  # so that nothing compiled is met again
    spec = dataclasses.replace(SHORT, temperature=0.8, top_k=8, top_p=0.9)
    r = rollout(spec, config=config, limits=LIMITS, max_rows=3, implementation=implementation)
    check(r, spec, config)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BOTH_KERNELS)
def test_kernels_with_windows(implementation):
    """A window of three tokens: within the prompt, over both caches, or within the suffix; three slots."""
    config = dataclasses.replace(WIDE, layer_types=("full", "sliding"), window=3, sliding_rope_theta=100.0)
    r = rollout(SHORT, config=config, limits=LIMITS, max_rows=3, implementation=implementation)
    check(r, SHORT, config)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BOTH_KERNELS)
@pytest.mark.parametrize("change", [{}, pytest.param(dict(top_k=8, top_p=0.9), marks=pytest.mark.slow)])
def test_kernels_over_a_mesh(implementation, change):
    """2 x 1 x 2 devices: rows and heads are cut, and the vocabulary; three slots for four requests a shard."""
    layout = Layout(make_mesh(2, 1, 2, jax.devices()[:4]), tuple(base.get_config().mesh.rules))
    params = jax.device_put(params_of(WIDE), make_shardings(layout, transformer.param_specs(WIDE)))
    spec = dataclasses.replace(SHORT, **change)
    r = generate(
        params, WIDE, layout, PROMPTS, POSITIONS, KEY, spec,
        limits=LIMITS, max_rows=6, implementation=implementation,
    )  # fmt: skip
    r = jax.device_get(r)
    check(r, spec)
    if spec == SHORT:
        assert_same(r, drawn("triton_interpret"))


def test_greedy_kernels():
    spec = dataclasses.replace(SHORT, temperature=0.0)
    check(rollout(spec, config=WIDE, limits=LIMITS, implementation="triton_interpret"), spec)


# --- narrower caches -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrower_caches_stay_near(dtype):
    """Entries are off by at most 1/256 of themselves, or 1/254 of the largest: 0.02 in log-probability, measured.

    First tokens are exact: prompts are prefilled without a look at the cache.
    """
    spec = spec_of(kv_dtype=dtype)
    r = sampled(spec)
    error = np.abs(r.logprobs - forced(r, spec))
    check(r, spec, TINY, np.full(12, 9), atol=0.04)
    assert error[:, 0].max() < 1e-5 < 1e-4 < error[:, 1:].max()


@pytest.mark.slow
def test_kernels_read_int8():
    """A prompt of two blocks of columns, which scales along lanes must fill."""
    prompts = [*PROMPTS[:3], [5, 11, 30, 2] * 34]
    spec = dataclasses.replace(SHORT, kv_dtype="int8")
    one, other = (
        rollout(spec, prompts, config=WIDE, limits=LIMITS, max_rows=3, implementation=name)
        for name in ("tpu_interpret", "triton_interpret")
    )
    assert_same(one, other)
    np.testing.assert_allclose(one.logprobs, forced(one, spec, prompts, WIDE), atol=0.04)
