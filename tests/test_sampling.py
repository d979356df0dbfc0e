"""The sampler against distributions built by sorting, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cooper_jax.rollout import sampling
from kernels import sampling as kernel

MODES = {
    "temperature": dict(temperature=0.7, top_k=0, top_p=1.0),
    "top_k": dict(temperature=1.0, top_k=9, top_p=1.0),
    "top_p": dict(temperature=1.3, top_k=0, top_p=0.8),
    "both": dict(temperature=1.1, top_k=20, top_p=0.9),
}
ALMOST_ONE = 1.0 - 2.0**-23  # the largest uniform there is


def distribution(logits, *, temperature, top_k, top_p):
    """The probabilities that a row f[V] must be drawn with, by sorting."""
    x = np.asarray(logits, np.float64) / temperature
    p = np.exp(x - x.max())
    if 0 < top_k < len(x):
        p[x < np.sort(x)[::-1][top_k - 1]] = 0
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[x < x[order[before < top_p]].min()] = 0
    return p / p.sum()


def logits_of(seed, rows, vocabulary, spread=2.0):
    return np.random.default_rng(seed).normal(0, spread, (rows, vocabulary)).astype(np.float32)


def uniforms_of(seed, rows):
    return np.random.default_rng(seed).uniform(0, ALMOST_ONE, (rows, kernel.LEVELS)).astype(np.float32)


@functools.cache
def sampler(**mode):
    return jax.jit(functools.partial(kernel.sample, **mode))


@pytest.mark.parametrize("mode", MODES)
def test_draws_follow_the_distribution(mode):
    """Chi-square over 1e5 draws from 190 tokens in two blocks, the last 10 columns padding."""
    from scipy.stats import chisquare

    row = logits_of(1, 1, 200)[0]
    row[190:] = -np.inf
    logits = jnp.broadcast_to(row[None, :], (10_000, 200))
    keys = jax.jit(sampling.row_keys, static_argnums=2)(jax.random.key(2), jnp.arange(10_000), 1)
    rest = dict(max_new_tokens=1, group_size=1, eos_ids=(), segment=1, dtype="float32")
    draw = jax.jit(sampling.sample, static_argnames="spec")
    spec = sampling.SamplingSpec(**MODES[mode], **rest)
    tokens = np.concatenate([draw(logits, keys, t, spec)[0] for t in range(10)])
    expected = distribution(row, **MODES[mode]) * len(tokens)
    counts = np.bincount(tokens, minlength=200)
    assert not counts[expected == 0].any()
    rare = expected < 5
    counts, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    assert len(expected) > 5
    assert chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_are_those_of_the_distribution(mode):
    logits = logits_of(3, 64, 5000)
    tokens, logprobs = sampler(**MODES[mode])(logits, uniforms_of(4, 64))
    want = [np.log(distribution(row, **MODES[mode])[t]) for row, t in zip(logits, tokens, strict=True)]
    np.testing.assert_allclose(logprobs, want, atol=1e-5)
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    assert len(set(np.asarray(tokens).tolist())) > 20


def test_greedy_takes_the_first_of_the_largest():
    logits = logits_of(5, 16, 1000)
    logits[0, [40, 700]] = 50.0
    tokens, logprobs = sampler(temperature=0.0, top_k=0, top_p=1.0)(logits, uniforms_of(0, 16))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert tokens[0] == 40
    np.testing.assert_array_equal(logprobs, 0.0)


@pytest.mark.parametrize(
    "mode", [dict(top_k=1, top_p=1.0), dict(top_k=0, top_p=1e-6), dict(top_k=1, top_p=0.5)]
)
def test_a_support_of_one_is_greedy(mode):
    logits = logits_of(6, 64, 1000)
    tokens, logprobs = sampler(temperature=1.5, **mode)(logits, uniforms_of(7, 64))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(logprobs, 0.0)


def test_draws_by_hand():
    """Probabilities 1/2, 1/4, 1/4: the second uniform chooses among them, 0.5 and 0.75 are the borders."""
    logits = np.log([[0.5, 0.25, 0.25]]).astype(np.float32)
    second = jnp.array([0.0, 0.49, 0.51, 0.74, 0.76, ALMOST_ONE])
    tokens, logprobs = kernel.sample(
        jnp.broadcast_to(logits, (6, 3)),
        jnp.stack([jnp.full(6, 0.3), second], axis=1),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    np.testing.assert_array_equal(tokens, [0, 0, 1, 1, 2, 2])
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]), atol=1e-6)


@pytest.mark.parametrize(
    "mode, support",
    [
        (dict(top_k=2, top_p=1.0), [0, 2, 4]),  # the second largest is a tie of two
        (dict(top_k=3, top_p=1.0), [0, 2, 4]),
        (dict(top_k=4, top_p=1.0), [0, 1, 2, 3, 4]),
        (dict(top_k=0, top_p=0.59), [0]),
        (dict(top_k=0, top_p=0.7), [0, 2, 4]),  # one of the tie would do
        (dict(top_k=0, top_p=0.9), [0, 1, 2, 3, 4]),
        (dict(top_k=2, top_p=0.71), [0]),  # 0.6 / 0.84 = 0.714 once top-k has renormalised
        (dict(top_k=2, top_p=0.72), [0, 2, 4]),
    ],
)
def test_ties_at_a_threshold_are_all_kept(mode, support):
    p = np.array([0.6, 0.08, 0.12, 0.08, 0.12])
    u = (np.arange(400) + 0.5) / 400
    tokens, logprobs = kernel.sample(
        jnp.broadcast_to(np.log(p).astype(np.float32)[None, :], (400, 5)),
        jnp.stack([jnp.zeros(400), jnp.asarray(u, jnp.float32)], axis=1),
        temperature=1.0,
        **mode,
    )
    np.testing.assert_array_equal(np.unique(tokens), support)
    np.testing.assert_allclose(logprobs, np.log(p[np.asarray(tokens)] / p[support].sum()), atol=1e-6)


def test_a_token_rarer_than_the_grid_of_one_uniform_is_within_reach():
    """Its share is 2^-29; a single uniform moves in steps of 2^-23."""
    logits = np.full((1, 256), -np.inf, np.float32)
    logits[0, 3], logits[0, 130], logits[0, 131] = 0.0, -14 * np.log(2), -29 * np.log(2)
    draw = functools.partial(kernel.sample, temperature=1.0, top_k=0, top_p=1.0)
    token, logprob = draw(logits, jnp.array([[ALMOST_ONE, ALMOST_ONE]]))
    assert token[0] == 131
    np.testing.assert_allclose(logprob, -29 * np.log(2), rtol=1e-4)
    assert draw(logits, jnp.array([[ALMOST_ONE, 0.5]]))[0][0] == 130
    assert draw(logits, jnp.array([[0.5, ALMOST_ONE]]))[0][0] == 3


MODE = st.sampled_from(list(MODES.values()))
UNIFORM = st.one_of(st.just(0.0), st.just(ALMOST_ONE), st.floats(0, ALMOST_ONE, width=32))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), MODE, UNIFORM, UNIFORM, st.floats(0.01, 80.0), st.integers(0, 398))
def test_whatever_the_uniforms_the_token_is_of_the_support(seed, mode, u0, u1, spread, masked):
    row = logits_of(seed, 1, 400, spread)[0]
    row[np.random.default_rng(seed).permutation(400)[:masked]] = -np.inf
    token, logprob = sampler(**mode)(row[None], jnp.array([[u0, u1]], jnp.float32))
    p = distribution(row, **mode)
    assert p[token[0]] > 0
    np.testing.assert_allclose(logprob[0], np.log(p[token[0]]), atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize(
    "mode, vocabulary", [("temperature", 1000), ("temperature", 16_000), ("top_k", 1000), ("both", 16_000)]
)
def test_bit_equal_however_the_batch_is_cut(mode, vocabulary):
    logits, uniforms = logits_of(8, 12, vocabulary), uniforms_of(9, 12)
    draw = sampler(**MODES[mode])
    whole = draw(logits, uniforms)
    for rows in (slice(3, 4), slice(5, 12)):
        for a, b in zip(whole, draw(logits[rows], uniforms[rows]), strict=True):
            np.testing.assert_array_equal(a[rows], b)
    padded = np.pad(logits, ((0, 0), (0, 300)), constant_values=-np.inf)
    np.testing.assert_array_equal(draw(padded, uniforms)[0], whole[0])


@pytest.mark.parametrize("mode", [dict(temperature=0.0, top_k=0, top_p=1.0), *MODES.values()])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_row_without_a_distribution_gives_nan(mode, bad):
    logits = logits_of(10, 4, 300)
    logits[1, 17] = bad
    logits[2] = -np.inf
    tokens, logprobs = sampler(**mode)(logits, uniforms_of(11, 4))
    np.testing.assert_array_equal(np.isnan(logprobs), [False, True, True, False])
    np.testing.assert_array_equal(tokens[1:3], 0)
    logits[1:3] = 0.0
    np.testing.assert_array_equal(sampler(**mode)(logits, uniforms_of(11, 4))[0][::3], tokens[::3])


def test_bits_depend_on_prompt_sample_and_position_alone():
    key = jax.random.key(12)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(places, G, t):
        return sampling.uniforms(sampling.row_keys(key, places, G), t).reshape(len(places), G, kernel.LEVELS)

    full = draw(np.array([7, 100, 3]), 4, 6)
    np.testing.assert_array_equal(draw(np.array([100, 7]), 8, 6)[:, :4], full[np.array([1, 0])])
    later = draw(np.array([7, 100, 3]), 4, 7)
    assert len(np.unique(np.concatenate([full, later]))) == 2 * full.size
    assert 0 <= full.min() and full.max() < 1
    per_row = draw(np.array([7, 100, 3]), 4, np.repeat([6, 7, 6], 4))
    np.testing.assert_array_equal(per_row, [full[0], later[1], full[2]])


@pytest.mark.parametrize("key", [jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0)])
def test_keys_whose_bits_would_depend_on_the_batch_are_refused(key):
    with pytest.raises(ValueError, match="threefry2x32"):
        sampling.row_keys(key, jnp.arange(2), 2)


def test_thresholds_are_exact():
    """The k-th largest of numbers of every size, signed zeros and neighbours among them, to the last bit."""
    rng = np.random.default_rng(13)
    values = rng.normal(size=(8, 200)) * 10.0 ** rng.integers(-30, 30, (8, 200))
    values = values.astype(np.float32)
    values[:, :6] = [0.0, -0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), -np.inf, 1.0]
    largest = jax.jit(lambda x, k: kernel._largest(x, lambda kept: jnp.sum(kept, axis=-1) >= k))
    descending = -np.sort(-values, axis=-1)
    for k in (1, 2, 57, 100, 101, 199, 200):
        found = np.array(largest(values, k))
        found[np.abs(found) < np.finfo(np.float32).tiny] = 0  # denormals compare equal to 0 here
        np.testing.assert_array_equal(found, descending[:, k - 1])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(max_new_tokens=0),
        dict(group_size=0),
        dict(segment=0),
        dict(dtype="float16"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    right = dict(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=8, group_size=2)
    right |= dict(eos_ids=(1,), segment=4, dtype="float32")
    sampling.SamplingSpec(**right)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        sampling.SamplingSpec(**right | wrong)
