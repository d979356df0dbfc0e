"""Sampling with settings of each row gives a row what sampling with its settings gives a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from cooper_jax.kernels import sampling, sampling_rows

SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.0),
    dict(temperature=0.7, top_p=0.8),
    dict(temperature=1.3, top_k=5),
    dict(temperature=1.5, min_p=0.05),
    dict(temperature=1.2, top_k=40, top_p=0.95, min_p=0.03),
    dict(temperature=0.6, top_k=1),
    dict(temperature=2.0, top_p=1.0),
]


def make_rows(vocabulary: int):
    """Logits and uniforms of 16 rows for each of SETTINGS, and the settings."""
    rng = np.random.default_rng(0)
    rows = [setting for setting in SETTINGS for _ in range(16)]
    logits = rng.normal(0, 2, (len(rows), vocabulary)).astype(np.float32)
    uniforms = rng.random((len(rows), sampling.LEVELS)).astype(np.float32)
    made = [sampling_rows.make_row_settings(**setting) for setting in rows]
    return logits, uniforms, jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *made)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [100, 128 * 130])
def test_each_row_gets_the_sample_of_its_settings(vocabulary):
    logits, uniforms, settings = make_rows(vocabulary)
    found = jax.jit(sampling_rows.sample_rows)(logits, uniforms, settings)
    for i, setting in enumerate(SETTINGS):
        rows = slice(16 * i, 16 * i + 16)
        options = {"top_k": 0, "top_p": 1.0} | setting
        alone = sampling.sample_logits(logits[rows], uniforms[rows], **options)
        np.testing.assert_array_equal(found.token[rows], alone.token, err_msg=str(setting))


def test_log_probabilities_are_the_models_own():
    logits, uniforms, settings = make_rows(300)
    found = jax.jit(sampling_rows.sample_rows)(logits, uniforms, settings)
    x = logits.astype(np.float64)
    wanted = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found.logprob, wanted[np.arange(len(x)), found.token], atol=1e-5)


def test_rows_whose_logits_are_not_finite_are_marked():
    """And the other rows stay as they were."""
    logits, uniforms, settings = make_rows(300)
    broken = logits.copy()
    broken[::16, 7], broken[1::16, 8] = np.nan, np.inf
    found = jax.jit(sampling_rows.sample_rows)(broken, uniforms, settings)
    is_broken = np.isin(np.arange(len(logits)) % 16, [0, 1])
    np.testing.assert_array_equal(np.isnan(found.logprob), is_broken)
    assert (np.asarray(found.token)[is_broken] == 0).all()
    whole = jax.jit(sampling_rows.sample_rows)(logits, uniforms, settings)
    np.testing.assert_array_equal(found.token[~is_broken], whole.token[~is_broken])


def test_a_sharded_vocabulary_gives_the_same():
    logits, uniforms, settings = make_rows(128 * 8)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    columns = PartitionSpec(None, "tensor")

    def sample(logits, uniforms, settings):
        return sampling_rows.sample_rows(logits, uniforms, settings, axis_name="tensor")

    sharded = jax.shard_map(
        sample,
        mesh=mesh,
        in_specs=(columns, PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    found = jax.jit(sharded)(logits, uniforms, settings)
    alone = jax.jit(sampling_rows.sample_rows)(logits, uniforms, settings)
    np.testing.assert_array_equal(found.token, alone.token)
    np.testing.assert_allclose(found.logprob, alone.logprob, atol=1e-5)
