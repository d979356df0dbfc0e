"""Caches: what is packed is unpacked, exactly or within half a step of int8, and takes the bytes that are said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cooper_jax.kernels import kv as caches
from cooper_jax.kernels.kv import Format

FORMS = [Format(dtype, packed) for dtype in caches.DTYPES for packed in (False, True)]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    shape=st.sampled_from([(1, 1), (3, 2), (2, 5, 2)]),
    head_dim=st.sampled_from([1, 4, 22]),
    exponent=st.integers(-30, 30),
)
def test_what_is_packed_is_unpacked(form, seed, shape, head_dim, exponent):
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((*shape, head_dim), np.float32) * np.float32(2.0**exponent) for _ in "kv")
    kv = caches.pack_kv(jnp.asarray(k), jnp.asarray(v), form)
    assert kv.packed == form.packed and all(x.dtype == form.dtype for x in kv.data)
    for got, x in zip(caches.unpack_kv(kv, jnp.float32), (k, v), strict=True):
        if form.dtype == "int8":
            # Half a step of each token and head's own scale; rounding in f32 adds a little.
            step = np.abs(x).max(axis=-1, keepdims=True) / 127
            assert (np.abs(got - x) <= 0.5001 * step).all()
        else:
            np.testing.assert_array_equal(got, x.astype(form.dtype).astype(np.float32))


def test_int8_uses_its_whole_range_and_keeps_zeros():
    x = jnp.array([[2.54, -1.27, 0.0], [0.0, 0.0, 0.0]])
    kv = caches.pack_kv(x, -x, Format("int8", packed=False))
    np.testing.assert_array_equal(kv.data[0], [[127, -64, 0], [0, 0, 0]])
    np.testing.assert_array_equal(kv.data[1], -kv.data[0])
    np.testing.assert_allclose(kv.scales[0], [0.02, 0.0], rtol=1e-6)
    assert np.isfinite(caches.unpack_kv(kv, jnp.float32)[0]).all()


def test_packed_keys_come_first():
    kv = caches.pack_kv(jnp.ones((1, 3)), jnp.zeros((1, 3)), Format("float32", packed=True))
    np.testing.assert_array_equal(kv.data[0], [[1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_arrays(form):
    """Of an empty cache, which has the structure and types of what is packed into it."""
    empty = caches.make_empty_kv((5, 7, 3, 11), 8, form)
    new = caches.pack_kv(jnp.ones((7, 3, 8)), jnp.ones((7, 3, 8)), form)
    assert jax.tree.structure(empty) == jax.tree.structure(new)
    for cache, one in zip(jax.tree.leaves(empty), jax.tree.leaves(new), strict=True):
        assert cache.dtype == one.dtype and not cache.any()
        assert cache.shape == (5, 7, 3, 11, *one.shape[2:])
    each = {"float32": 2 * 8 * 4, "bfloat16": 2 * 8 * 2, "int8": 2 * 8 + 2 * 4}[form.dtype]
    assert form.bytes_per_token(5, 3, 8) == 5 * 3 * each
    assert sum(x.nbytes for x in jax.tree.leaves(empty)) == 7 * 11 * form.bytes_per_token(5, 3, 8)
