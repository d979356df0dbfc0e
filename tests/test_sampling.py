"""The sampler, in all its forms, against distributions built by sorting, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cooper_jax.rollout import sampling
from kernels import sampling as kernel
from kernels import sampling_spans, sampling_statistics, sampling_tpu, sampling_triton
from kernels.sampling_statistics import Rule

MODES = {
    "temperature": dict(temperature=0.7, top_k=0, top_p=1.0),
    "top_k": dict(temperature=1.0, top_k=9, top_p=1.0),
    "top_p": dict(temperature=1.3, top_k=0, top_p=0.8),
    "min_p": dict(temperature=1.5, top_k=0, top_p=1.0, min_p=0.05),
    "both": dict(temperature=1.1, top_k=20, top_p=0.9),
    "all": dict(temperature=1.2, top_k=40, top_p=0.95, min_p=0.03),
}
GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0)
INTERPRETED = ("tpu_interpret", "triton_interpret")
ALMOST_ONE = 1.0 - 2.0**-23  # the largest uniform there is


def distribution(logits, *, temperature, top_k=0, top_p=1.0, min_p=0.0):
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
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def entropy(p):
    return -np.sum(p[p > 0] * np.log(p[p > 0]))


def logits_of(seed, rows, vocabulary, spread=2.0):
    return np.random.default_rng(seed).normal(0, spread, (rows, vocabulary)).astype(np.float32)


def uniforms_of(seed, rows):
    return np.random.default_rng(seed).uniform(0, ALMOST_ONE, (rows, kernel.LEVELS)).astype(np.float32)


@functools.cache
def sampler(**mode):
    return jax.jit(functools.partial(kernel.sample, **mode))


@pytest.mark.parametrize("mode", MODES)
def test_draws_follow_the_distribution(mode):
    """Chi-square over 1e5 draws from 240 tokens in two blocks, the last 10 columns padding.

    Tokens that should come up less than 5 times are pooled by tens of rarity, so that the tail is judged apart.
    """
    from scipy.stats import chisquare

    row = logits_of(1, 1, 250, 3.0)[0]
    row[240:] = -np.inf
    logits = jnp.broadcast_to(row[None, :], (10_000, 250))
    keys = jax.jit(sampling.row_keys, static_argnums=2)(jax.random.key(2), jnp.arange(10_000), 1)
    rest = dict(max_new_tokens=1, group_size=1, eos_ids=(), segment=1, dtype="float32")
    draw = jax.jit(sampling.sample, static_argnames="spec")
    spec = sampling.SamplingSpec(**MODES[mode], **rest)
    tokens = np.concatenate([draw(logits, keys, t, spec).token for t in range(10)])
    expected = distribution(row, **MODES[mode]) * len(tokens)
    counts = np.bincount(tokens, minlength=250)
    assert not counts[expected == 0].any()
    pools = [np.array([i]) for i in np.flatnonzero(expected >= 5)]
    for power in range(-4, 1):
        pools.append(np.flatnonzero((expected < 5 * 10.0**power) & (expected >= 0.5 * 10.0**power)))
    counts, expected = (np.array([v[pool].sum() for pool in pools]) for v in (counts, expected))
    judged = expected >= 5
    assert judged.sum() > 5
    assert (counts[~judged] <= 20).all()
    counts, expected = (np.append(v[judged], v[~judged].sum()) for v in (counts, expected))
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    assert chisquare(counts, expected).pvalue > 1e-3


def check_draw(drawn, logits, mode):
    """Token, log-probabilities and entropy of each row against the float64 distribution."""
    temperature = mode["temperature"] or 1.0
    for row, token, logprob, full_logprob, nats in zip(logits, *map(np.asarray, drawn), strict=True):
        full = distribution(row, temperature=temperature)
        if mode["temperature"] == 0:
            assert token == row.argmax() and logprob == 0
        else:
            np.testing.assert_allclose(logprob, np.log(distribution(row, **mode)[token]), atol=1e-5)
        np.testing.assert_allclose(full_logprob, np.log(full[token]), atol=1e-5)
        np.testing.assert_allclose(nats, entropy(full), atol=1e-5)


@pytest.mark.parametrize("mode", [GREEDY, *MODES.values()])
def test_logprobs_and_entropy_are_those_of_the_distribution(mode):
    logits = logits_of(3, 64, 5000)
    drawn = sampler(entropy=True, **mode)(logits, uniforms_of(4, 64))
    check_draw(drawn, logits, mode)
    assert drawn.token.dtype == jnp.int32 and drawn.logprob.dtype == jnp.float32
    assert len(set(np.asarray(drawn.token).tolist())) > 20
    without = sampler(**mode)(logits, uniforms_of(4, 64))
    assert without.entropy is None
    np.testing.assert_array_equal(without.token, drawn.token)
    np.testing.assert_allclose(without.logprob, drawn.logprob, rtol=1e-6)
    np.testing.assert_allclose(without.full_logprob, drawn.full_logprob, rtol=1e-6)


def test_where_nothing_is_cut_both_logprobs_are_one():
    drawn = sampler(**MODES["temperature"])(logits_of(3, 64, 5000), uniforms_of(4, 64))
    np.testing.assert_array_equal(drawn.logprob, drawn.full_logprob)


def test_greedy_takes_the_first_of_the_largest():
    logits = logits_of(5, 16, 1000)
    logits[0, [40, 700]] = 50.0
    tokens, logprobs, *_ = sampler(**GREEDY)(logits, uniforms_of(0, 16))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert tokens[0] == 40
    np.testing.assert_array_equal(logprobs, 0.0)


@pytest.mark.parametrize(
    "mode",
    [
        dict(top_k=1, top_p=1.0),
        dict(top_k=0, top_p=1e-6),
        dict(top_k=1, top_p=0.5),
        dict(top_k=0, top_p=1.0, min_p=1.0),
    ],
)
def test_a_support_of_one_is_greedy(mode):
    logits = logits_of(6, 64, 1000)
    tokens, logprobs, *_ = sampler(temperature=1.5, **mode)(logits, uniforms_of(7, 64))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(logprobs, 0.0)


def test_draws_by_hand():
    """Probabilities 1/2, 1/4, 1/4: the second uniform chooses among them, 0.5 and 0.75 are the borders."""
    logits = np.log([[0.5, 0.25, 0.25]]).astype(np.float32)
    second = jnp.array([0.0, 0.49, 0.51, 0.74, 0.76, ALMOST_ONE])
    tokens, logprobs, *_ = kernel.sample(
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
        (dict(top_k=0, top_p=1.0, min_p=0.19), [0, 2, 4]),
        (dict(top_k=0, top_p=1.0, min_p=0.21), [0]),
        (dict(top_k=0, top_p=0.88, min_p=0.19), [0, 2, 4]),  # 0.89 before min-p, which would leave 0.84
    ],
)
def test_ties_at_a_threshold_are_all_kept(mode, support):
    p = np.array([0.6, 0.08, 0.12, 0.08, 0.12])
    u = (np.arange(400) + 0.5) / 400
    tokens, logprobs, *_ = kernel.sample(
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
    token, logprob, *_ = draw(logits, jnp.array([[ALMOST_ONE, ALMOST_ONE]]))
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
    token, logprob, *_ = sampler(**mode)(row[None], jnp.array([[u0, u1]], jnp.float32))
    p = distribution(row, **mode)
    assert p[token[0]] > 0
    np.testing.assert_allclose(logprob[0], np.log(p[token[0]]), atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize(
    "mode, vocabulary", [("temperature", 1000), ("temperature", 16_000), ("top_k", 1000), ("all", 16_000)]
)
def test_bit_equal_however_the_batch_is_cut(mode, vocabulary):
    logits, uniforms = logits_of(8, 12, vocabulary), uniforms_of(9, 12)
    draw = sampler(entropy=True, **MODES[mode])
    whole = draw(logits, uniforms)
    for rows in (slice(3, 4), slice(5, 12)):
        for a, b in zip(whole, draw(logits[rows], uniforms[rows]), strict=True):
            np.testing.assert_array_equal(a[rows], b)
    padded = np.pad(logits, ((0, 0), (0, 300)), constant_values=-np.inf)
    np.testing.assert_array_equal(draw(padded, uniforms)[0], whole[0])


@pytest.mark.parametrize("mode", [GREEDY, *MODES.values()])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_row_without_a_distribution_gives_nan(mode, bad):
    """64 rows of 1000: XLA:CPU's maximum passes over NaN when it is vectorised."""
    logits = logits_of(10, 64, 1000)
    logits[1, 17] = logits[3, 999] = logits[4, 640:] = bad
    logits[2] = -np.inf
    drawn = sampler(entropy=True, **mode)(logits, uniforms_of(11, 64))
    for numbers in drawn[1:]:
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(numbers)), [1, 2, 3, 4])
    np.testing.assert_array_equal(drawn.token[1:5], 0)
    logits[1:5] = 0.0
    np.testing.assert_array_equal(sampler(**mode)(logits, uniforms_of(11, 64)).token[5:], drawn.token[5:])


# --- kernels ---------------------------------------------------------------------------------------------

SMALL = st.sampled_from([5, 128, 300, 1024, 1200])
ODD = st.sampled_from([1, 3, 8, 11])


def check_interpreted(implementation, mode, rows, vocabulary, seed):
    """Equal to the xla form, and to the float64 distribution: two rows without one among them."""
    logits, uniforms = logits_of(seed, rows, vocabulary, 3.0), uniforms_of(seed, rows)
    logits[rows // 2, vocabulary // 2 :] = -np.inf
    want = sampler(entropy=True, implementation="xla", **mode)(logits, uniforms)
    got = sampler(entropy=True, implementation=implementation, **mode)(logits, uniforms)
    check_draw(got, logits, mode)
    np.testing.assert_array_equal(got.token, want.token)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    logits[0, -1], logits[rows - 1] = np.nan, -np.inf
    got = sampler(entropy=True, implementation=implementation, **mode)(logits, uniforms)
    assert all(np.isnan(numbers[np.array([0, rows - 1])]).all() for numbers in got[1:])


@pytest.mark.parametrize("implementation", INTERPRETED)
@settings(max_examples=6, deadline=None)
@given(st.sampled_from([GREEDY, *MODES.values()]), ODD, SMALL, st.integers(0, 2**31))
def test_kernels_equal_the_xla_form(implementation, mode, rows, vocabulary, seed):
    check_interpreted(implementation, mode, rows, vocabulary, seed)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize("mode", ["temperature", "all"])
@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_kernels_equal_the_xla_form_at_real_vocabularies(implementation, mode, vocabulary):
    check_interpreted(implementation, MODES[mode], 3, vocabulary, 20)


@pytest.mark.parametrize("kernels", [sampling_tpu, sampling_triton])
def test_thresholds_found_by_tallies_are_those_found_by_bisection(kernels):
    """Top-k's exactly; top-p's to a rounding of the mass."""
    logits = jnp.asarray(logits_of(21, 5, 384, 3.0))
    rule = Rule(0.9, top_k=70)
    got = sampling_spans.statistics(kernels, logits, rule, None, True)
    want = sampling_statistics.statistics(logits, rule)
    np.testing.assert_array_equal(got.threshold, want.threshold)
    np.testing.assert_array_equal(want.threshold, -np.sort(-logits, axis=1)[:, 69])
    got = sampling_spans.statistics(kernels, logits, Rule(0.9, top_p=0.7), None, True)
    for row, threshold in zip(np.asarray(logits), got.threshold, strict=True):
        p = distribution(row, temperature=0.9)
        assert p[row > threshold].sum() < 0.7 + 1e-6 and p[row >= threshold].sum() > 0.7 - 1e-6


def test_no_races():
    """The row tiles are copied in and out under the kernels' feet; the last one is not full."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    params = pltpu.InterpretParams(detect_races=True)
    logits = jnp.asarray(logits_of(22, 19, 640))
    peak = jnp.max(logits, axis=1)
    found = [
        sampling_tpu.statistics(logits, Rule(1.0, 9, 0.9, 0.1), params),
        sampling_tpu.span_sums(logits, peak - 1.0, Rule(1.0), params)[:-1],
        sampling_tpu.tally(logits, peak, peak[:, None] - jnp.arange(7.0)[None, :], 1.0, params),
    ]
    block = jnp.arange(19) % 5
    taken = sampling_tpu.take(logits, block, params)
    jax.block_until_ready((found, taken))
    assert not interpret_pallas_call.races.races_found
    np.testing.assert_array_equal(taken, logits.reshape(19, 5, 128)[jnp.arange(19), block])


# --- a vocabulary over several devices ---------------------------------------------------------------------


def sharded(ways, **mode):
    mesh = Mesh(np.array(jax.devices()[:ways]), ("tensor",))
    draw = functools.partial(kernel.sample, axis_name="tensor", **mode)
    specs = dict(in_specs=(P(None, "tensor"), P()), out_specs=P(), check_vma=False)
    return jax.jit(jax.shard_map(draw, mesh=mesh, **specs))


def logits_of_shards(rows, vocabulary):
    """With NaN, infinities and shards without tokens among them."""
    logits = logits_of(23, rows, vocabulary, 3.0)
    logits[0, vocabulary - 300 :] = np.nan
    logits[1] = -np.inf
    logits[2, 5] = np.inf
    logits[3, vocabulary // 4 :] = -np.inf
    logits[4, : vocabulary // 2] = -np.inf
    logits[5, [7, vocabulary - 7]] = logits[5].max() + 1.0  # a tie of two shards
    return logits


@pytest.mark.parametrize("mode", [GREEDY, *MODES.values()])
@pytest.mark.parametrize("vocabulary", [2048, 3000])
def test_bit_equal_however_the_vocabulary_is_cut(mode, vocabulary):
    """Shards of 3000 / 4 columns are not whole blocks."""
    logits, uniforms = logits_of_shards(24, vocabulary), uniforms_of(24, 24)
    whole = sampler(entropy=True, implementation="xla", **mode)(logits, uniforms)
    cut = sharded(4, entropy=True, implementation="xla", **mode)(logits, uniforms)
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize("mode", [GREEDY, MODES["temperature"], MODES["all"]])
def test_kernels_on_shards(implementation, mode):
    logits, uniforms = logits_of_shards(9, 768), uniforms_of(25, 9)
    whole = sampler(entropy=True, implementation="xla", **mode)(logits, uniforms)
    cut = sharded(2, entropy=True, implementation=implementation, **mode)(logits, uniforms)
    np.testing.assert_array_equal(whole.token, cut.token)
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_margins_by_hand():
    """Blocks of 0.75 and 0.25; the first one's tokens have 1/3 and 2/3 of it."""
    logits = np.full((4, 256), -np.inf, np.float32)
    logits[:, [3, 40, 200]] = np.log([0.25, 0.5, 0.25])
    uniforms = np.array([[0.70, 0.9], [0.1, 0.3], [0.8, 0.9], [0.1, 0.4]], np.float32)
    margin = jax.jit(functools.partial(kernel.margin, temperature=1.0, top_k=0, top_p=1.0))
    got = margin(logits, uniforms)
    np.testing.assert_allclose(got, [0.05, 1 / 3 - 0.3, 0.05, 0.4 - 1 / 3], atol=1e-6)
    greedy = kernel.margin(logits, uniforms, **GREEDY)
    np.testing.assert_allclose(greedy, 0.25, atol=1e-6)
    alone = kernel.margin(logits, uniforms, temperature=1.0, top_k=1, top_p=1.0)
    np.testing.assert_array_equal(alone, np.inf)


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

    def kth(x, k):
        return sampling_statistics.largest(
            jnp.max(x, axis=-1), lambda v: jnp.sum(x >= v[:, None], axis=-1) >= k
        )

    largest = jax.jit(kth)
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
        dict(min_p=-0.1),
        dict(min_p=1.1),
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
