"""The rollout with kernels in it, interpreted, and with narrower caches: its log-probabilities are those of `trunk`."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_rollouts import KEY, POSITIONS, PROMPTS, TINY, forced, params_of, rollout, sampled, spec_of

from configs import base
from cooper_jax.model import transformer
from cooper_jax.rollout.engine import generate, rollout_weights
from cooper_jax.runtime.mesh import Layout, make_mesh, shardings

# The narrowest heads that the TPU kernel takes.
WIDE = dataclasses.replace(TINY, head_dim=64, heads=4, kv_heads=2, ffn=16)
KERNELS = ("tpu_interpret", "triton_interpret")
# Interpreted kernels are slow: a handful of tokens.
SHORT = spec_of(max_new_tokens=4, group_size=2, segment=3, eos_ids=(7,))
LIMITS = np.array([4, 3, 2, 4, 1, 4, 2, 3])


def check(r, spec, config=WIDE, limits=LIMITS, atol=1e-5):
    """What any rollout is: tokens as the policy gives them, as many as were asked for, ended by an EOS or a limit."""
    lengths = r.mask.sum(axis=1)
    assert (r.mask == (np.arange(r.mask.shape[1])[None, :] < lengths[:, None])).all()
    assert r.tokens.max() < config.vocab_size and not r.tokens[~r.mask].any()
    last = r.tokens[np.arange(len(lengths)), lengths - 1]
    np.testing.assert_array_equal(r.finished, np.isin(last, spec.eos_ids))
    np.testing.assert_array_equal(lengths[~r.finished], limits[~r.finished])
    np.testing.assert_allclose(r.logprobs, forced(r, spec, config=config), atol=atol)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("slots", [None, 3])
def test_kernels_draw_from_the_policy(implementation, slots):
    """The fused head, with slots in the order of the requests, or fewer and in any."""
    r = rollout(SHORT, config=WIDE, limits=LIMITS, max_rows=slots, implementation=implementation)
    check(r, SHORT)
