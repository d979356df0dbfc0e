"""Named random streams: pinned, distinct, and independent of everything but their arguments."""

import itertools

import jax
import numpy as np
import pytest

from cooper_jax.runtime import keys

SEEDS = (0, 1, 2, 2**32 - 1)
IDS = ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**32 - 1,), (0, 0, 0))


def words(key) -> tuple[int, ...]:
    return tuple(int(w) for w in jax.random.key_data(key))


def test_pinned_values():
    """Recorded once: a change here changes every recorded run, and is a mistake unless it is the purpose."""
    assert words(keys.make_key(0, "rollout", 3)) == (3931371263, 624381574)
    assert words(keys.make_key(2**32 - 1, "shuffle", 2**32 - 1, 0)) == (803640428, 770660173)
    drawn = keys.make_generator(0, "shuffle", 3).integers(0, 2**63, 3)
    assert drawn.tolist() == [7851919263204689591, 9135291285536028558, 141253325506171341]


def test_the_same_under_another_default_generator():
    before = words(keys.make_key(5, "pairs", 1))
    with jax.default_prng_impl("rbg"):
        assert words(keys.make_key(5, "pairs", 1)) == before


def test_streams_never_collide():
    cases = list(itertools.product(SEEDS, keys.STREAMS, IDS))
    assert len({words(keys.make_key(s, n, *i)) for s, n, i in cases}) == len(cases)
    drawn = {keys.make_generator(s, n, *i).bytes(16) for s, n, i in cases}
    assert len(drawn) == len(cases)
    assert len(set(keys.STREAMS.values())) == len(keys.STREAMS)  # no number is used twice


def test_finer_ids_may_be_folded_in_under_jit():
    coarse = keys.make_key(3, "rollout", 7)
    assert coarse.shape == () and jax.dtypes.issubdtype(coarse.dtype, jax.dtypes.prng_key)
    folded = jax.jit(lambda key, i: jax.random.fold_in(key, i))(coarse, np.uint32(2**31 + 5))
    assert words(folded) == words(keys.make_key(3, "rollout", 7, 2**31 + 5))


@pytest.mark.parametrize("make", [keys.make_key, keys.make_generator])
def test_wrong_arguments(make):
    with pytest.raises(KeyError, match="no random stream is called 'rolout'.*rollout, sampler, shuffle"):
        make(0, "rolout")
    with pytest.raises(ValueError, match="seed is -1, and must be from 0 to 4294967295"):
        make(-1, "rollout")
    with pytest.raises(ValueError, match=r"ids\[1\] is 4294967296"):
        make(0, "rollout", 0, 2**32)
    with pytest.raises(TypeError):
        make(0, "rollout", 1.5)


def test_numpy_integers_are_integers():
    assert words(keys.make_key(np.int64(1), "rollout", np.uint32(2))) == words(keys.make_key(1, "rollout", 2))
    a, b = keys.make_generator(np.int64(1), "rollout", np.uint32(2)), keys.make_generator(1, "rollout", 2)
    assert a.bytes(16) == b.bytes(16)
