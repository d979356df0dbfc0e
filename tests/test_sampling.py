"""The sampler, in all its forms, against distributions built by sorting, in float64."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cooper_jax.kernels import sampling as kernel
from cooper_jax.kernels import sampling_spans, sampling_statistics, sampling_tpu, sampling_triton
from cooper_jax.kernels.sampling_statistics import Rule
from cooper_jax.rollout import sampling_spec

MODES = {
    "temperature": dict(temperature=0.7, top_k=0, top_p=1.0),
    "top_k": dict(temperature=1.0, top_k=9, top_p=1.0),
    "top_p": dict(temperature=1.3, top_k=0, top_p=0.8),
    "min_p": dict(temperature=1.5, top_k=0, top_p=1.0, min_p=0.05),
    "both": dict(temperature=1.1, top_k=20, top_p=0.9),
    "all": dict(temperature=1.2, top_k=40, top_p=0.95, min_p=0.03),
}
GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0)
ALL = dict(temperature=1.0, top_k=0, top_p=1.0)  # all tokens, as they are
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
    return jax.jit(functools.partial(kernel.sample_logits, **mode))


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=pytest.mark.slow) if m in ("both", "top_p") else m for m in MODES]
)
def test_draws_follow_the_distribution(mode):
    """Chi-square over 4e4 draws from 240 tokens in two blocks, the last 10 columns padding.

    Tokens that should come up less than 5 times are pooled by tens of rarity, so that the tail is judged apart.
    """
    from scipy.stats import chisquare

    row = logits_of(1, 1, 250, 3.0)[0]
    row[240:] = -np.inf
    logits = jnp.broadcast_to(row[None, :], (10_000, 250))
    keys = jax.jit(sampling_spec.make_row_keys, static_argnums=2)(jax.random.key(2), jnp.arange(10_000), 1)
    rest = dict(max_new_tokens=1, group_size=1, eos_ids=(), segment=1, dtype="float32")
    draw = jax.jit(sampling_spec.sample_tokens, static_argnames="spec")
    spec = sampling_spec.SamplingSpec(**MODES[mode], **rest)
    tokens = np.concatenate([draw(logits, keys, t, spec).token for t in range(4)])
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
    for row, token, logprob, full_logprob, nats in zip(logits, *map(np.asarray, drawn[:4]), strict=True):
        full = distribution(row, temperature=temperature)
        if mode["temperature"] == 0:
            assert token == row.argmax() and logprob == 0
        else:
            np.testing.assert_allclose(logprob, np.log(distribution(row, **mode)[token]), atol=1e-5)
        np.testing.assert_allclose(full_logprob, np.log(full[token]), atol=1e-5)
        np.testing.assert_allclose(nats, entropy(full), atol=1e-5)


@pytest.mark.parametrize("mode", [GREEDY, *MODES.values()])
def test_logprobs_and_entropy_are_those_of_the_distribution(mode):
    """17,000 tokens are two groups of blocks."""
    logits, uniforms = logits_of(3, 16, 17_000), uniforms_of(4, 16)
    drawn = sampler(entropy=True, **mode)(logits, uniforms)
    check_draw(drawn, logits, mode)
    assert drawn.token.dtype == jnp.int32 and drawn.logprob.dtype == jnp.float32
    assert len(set(np.asarray(drawn.token).tolist())) > 8
    if mode not in (GREEDY, MODES["temperature"], MODES["all"]):
        return
    without = sampler(**mode)(logits, uniforms)
    assert without.entropy is None
    np.testing.assert_array_equal(without.token, drawn.token)
    np.testing.assert_allclose(without.logprob, drawn.logprob, rtol=1e-6)
    np.testing.assert_allclose(without.full_logprob, drawn.full_logprob, rtol=1e-6)


def test_where_nothing_is_cut_both_logprobs_are_one():
    drawn = sampler(**MODES["temperature"])(logits_of(3, 16, 17_000), uniforms_of(4, 16))
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
    """Probabilities 1/2, 1/4, 1/4: the last uniform chooses among them, 0.5 and 0.75 are the borders."""
    logits = np.log([[0.5, 0.25, 0.25]]).astype(np.float32)
    last = jnp.array([0.0, 0.49, 0.51, 0.74, 0.76, ALMOST_ONE])
    uniforms = jnp.stack([jnp.full(6, 0.9), jnp.full(6, 0.3), last], axis=1)
    tokens, logprobs, *_ = sampler(**ALL)(jnp.broadcast_to(logits, (6, 3)), uniforms)
    np.testing.assert_array_equal(tokens, [0, 0, 1, 1, 2, 2])
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]), atol=1e-6)


def test_draws_by_hand_over_groups():
    """Groups of 1/2, 3/8 and 1/8; the second one's blocks have 2/3 and 1/3, the first of them two equal tokens."""
    second = 128 * 128
    support = np.array([5, second + 7, second + 9, second + 300, 2 * second + 400])
    logits = np.full((1, 3 * second), -np.inf, np.float32)
    logits[0, support] = np.log([0.5, 0.125, 0.125, 0.125, 0.125])
    uniforms = [
        ([0.49, 0.9, 0.9], 0),
        ([0.51, 0.66, 0.49], 1),
        ([0.87, 0.0, 0.51], 2),
        ([0.6, 0.67, 0.1], 3),
        ([0.88, 0.0, 0.0], 4),
    ]
    bits = jnp.array([u for u, _ in uniforms])
    tokens, logprobs, *_ = sampler(**ALL)(jnp.broadcast_to(logits, (5, 3 * second)), bits)
    np.testing.assert_array_equal(tokens, support[[i for _, i in uniforms]])
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.125, 0.125, 0.125, 0.125]), atol=1e-6)


def test_one_group_leaves_the_first_uniform_unused():
    logits, uniforms = logits_of(2, 12, 1000), uniforms_of(2, 12)
    draw = sampler(entropy=True, **MODES["temperature"])
    uniforms_too = np.concatenate([1 - uniforms[:, :1], uniforms[:, 1:]], axis=1)
    for a, b in zip(*map(jax.tree.leaves, (draw(logits, uniforms), draw(logits, uniforms_too))), strict=True):
        np.testing.assert_array_equal(a, b)


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
    tokens, logprobs, *_ = sampler(temperature=1.0, **mode)(
        np.broadcast_to(np.log(p).astype(np.float32)[None, :], (400, 5)),
        np.stack([np.zeros(400), np.zeros(400), u], axis=1).astype(np.float32),
    )
    np.testing.assert_array_equal(np.unique(tokens), support)
    np.testing.assert_allclose(logprobs, np.log(p[np.asarray(tokens)] / p[support].sum()), atol=1e-6)


def test_a_token_rarer_than_the_grid_of_one_uniform_is_within_reach():
    """Its share is 2^-42; a single uniform moves in steps of 2^-23."""
    second = 128 * 128
    tokens = np.array([3, second + 2, second + 130, second + 131])  # rarer from level to level
    logits = np.full((1, second + 256), -np.inf, np.float32)
    logits[0, tokens] = -np.log(2) * np.array([0, 14, 28, 42])
    uniforms = np.full((4, 3), ALMOST_ONE, np.float32)
    uniforms[[0, 1, 2], [0, 1, 2]] = 0.5
    drawn = sampler(**ALL)(jnp.broadcast_to(logits, (4, second + 256)), uniforms)
    np.testing.assert_array_equal(drawn.token, tokens)
    np.testing.assert_allclose(drawn.logprob, logits[0, tokens], rtol=1e-4, atol=1e-4)


MODE = st.sampled_from(list(MODES.values()))
UNIFORM = st.one_of(st.just(0.0), st.just(ALMOST_ONE), st.floats(0, ALMOST_ONE, width=32))
MASKED = st.one_of(st.integers(0, 16_598), st.integers(16_500, 16_598))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), MODE, st.tuples(UNIFORM, UNIFORM, UNIFORM), st.floats(0.01, 80.0), MASKED)
def test_whatever_the_uniforms_the_token_is_of_the_support(seed, mode, uniforms, spread, masked):
    """Two groups of blocks."""
    row = logits_of(seed, 1, 16_600, spread)[0]
    row[np.random.default_rng(seed).permutation(16_600)[:masked]] = -np.inf
    token, logprob, *_ = sampler(**mode)(row[None], np.array([uniforms], np.float32))
    p = distribution(row, **mode)
    assert p[token[0]] > 0
    np.testing.assert_allclose(logprob[0], np.log(p[token[0]]), atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize(
    "mode, vocabulary", [("temperature", 1000), ("temperature", 16_300), ("all", 17_000)]
)
def test_bit_equal_however_the_batch_is_cut(mode, vocabulary):
    """Padding makes 16,300 columns two groups of blocks instead of one."""
    logits, uniforms = logits_of(8, 12, vocabulary), uniforms_of(9, 12)
    draw = sampler(entropy=True, **MODES[mode])
    whole = draw(logits, uniforms)
    for rows in (slice(3, 4), slice(5, 12)):
        for a, b in zip(*map(jax.tree.leaves, (whole, draw(logits[rows], uniforms[rows]))), strict=True):
            np.testing.assert_array_equal(a[rows], b)
    padded = np.pad(logits, ((0, 0), (0, 300)), constant_values=-np.inf)
    np.testing.assert_array_equal(draw(padded, uniforms).token, whole.token)


@pytest.mark.parametrize("mode", [GREEDY, *MODES.values()])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_row_without_a_distribution_gives_nan(mode, bad):
    """64 rows of 1000: XLA:CPU's maximum passes over NaN when it is vectorised."""
    logits = logits_of(10, 64, 1000)
    logits[1, 17] = logits[3, 999] = logits[4, 640:] = bad
    logits[2] = -np.inf
    drawn = sampler(entropy=True, **mode)(logits, uniforms_of(11, 64))
    for numbers in jax.tree.leaves(drawn)[1:]:
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(numbers)), [1, 2, 3, 4])
    np.testing.assert_array_equal(drawn.token[1:5], 0)
    logits[1:5] = 0.0
    again = sampler(entropy=True, **mode)(logits, uniforms_of(11, 64))
    np.testing.assert_array_equal(again.token[5:], drawn.token[5:])


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
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    logits[0, -1], logits[rows - 1] = np.nan, -np.inf
    got = sampler(entropy=True, implementation=implementation, **mode)(logits, uniforms)
    assert all(np.isnan(numbers[np.array([0, rows - 1])]).all() for numbers in jax.tree.leaves(got)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", INTERPRETED)
@settings(max_examples=4, deadline=None)
@given(st.sampled_from([GREEDY, *MODES.values()]), ODD, SMALL, st.integers(0, 2**31))
def test_kernels_equal_the_xla_form(implementation, mode, rows, vocabulary, seed):
    check_interpreted(implementation, mode, rows, vocabulary, seed)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize("mode", ["temperature", "all"])
@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_kernels_equal_the_xla_form_at_real_vocabularies(implementation, mode, vocabulary):
    check_interpreted(implementation, MODES[mode], 3, vocabulary, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [sampling_tpu, sampling_triton])
def test_thresholds_found_by_tallies_are_those_found_by_bisection(kernels):
    """Top-k's exactly; top-p's to a rounding of the mass."""
    logits = jnp.asarray(logits_of(21, 5, 384, 3.0))
    rule = Rule(0.9, top_k=70)
    got = sampling_spans.span_statistics(kernels, logits, rule, None, True)
    want = sampling_statistics.row_statistics(logits, rule)
    np.testing.assert_array_equal(got.threshold, want.threshold)
    np.testing.assert_array_equal(want.threshold, -np.sort(-logits, axis=1)[:, 69])
    got = sampling_spans.span_statistics(kernels, logits, Rule(0.9, top_p=0.7), None, True)
    for row, threshold in zip(np.asarray(logits), got.threshold, strict=True):
        p = distribution(row, temperature=0.9)
        assert p[row > threshold].sum() < 0.7 + 1e-6 and p[row >= threshold].sum() > 0.7 - 1e-6


@pytest.mark.slow
def test_no_races():
    """The row tiles are copied in and out under the kernels' feet; the last one is not full."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    params = pltpu.InterpretParams(detect_races=True)
    logits = jnp.asarray(logits_of(22, 19, 640))
    peak = jnp.max(logits, axis=1)
    found = [
        sampling_tpu.tpu_statistics(logits, Rule(1.0, 9, 0.9, 0.1), params),
        sampling_tpu.span_sums(logits, peak - 1.0, Rule(1.0), params)[:-1],
        sampling_tpu.tally_thresholds(logits, peak, peak[:, None] - jnp.arange(7.0)[None, :], 1.0, params),
    ]
    block = jnp.arange(19) % 5
    taken = sampling_tpu.take_block(logits, block, params)
    jax.block_until_ready((found, taken))
    assert not interpret_pallas_call.races.races_found
    np.testing.assert_array_equal(taken, logits.reshape(19, 5, 128)[jnp.arange(19), block])


# --- a vocabulary over several devices ---------------------------------------------------------------------


def sharded(ways, **mode):
    mesh = Mesh(np.array(jax.devices()[:ways]), ("tensor",))
    draw = functools.partial(kernel.sample_logits, axis_name="tensor", **mode)
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


@pytest.mark.parametrize(
    "mode, vocabulary",
    [(GREEDY, 3000), (MODES["all"], 2048), (MODES["temperature"], 3000)]
    + [(mode, 17_000) for mode in MODES.values()],
)
def test_bit_equal_however_the_vocabulary_is_cut(mode, vocabulary):
    """Shards of 3000 / 4 and 17,000 / 4 columns are not whole blocks; the latter make two groups of blocks."""
    logits, uniforms = logits_of_shards(12, vocabulary), uniforms_of(24, 12)
    whole = sampler(entropy=True, implementation="xla", **mode)(logits, uniforms)
    cut = sharded(4, entropy=True, implementation="xla", **mode)(logits, uniforms)
    for a, b in zip(*map(jax.tree.leaves, (whole, cut)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_bit_equal_in_optimised_programs():
    """The same two tests again: the optimiser regroups sums by the number of rows, if it is let."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        [*command, "-k", "bit_equal_however"],
        env=os.environ | {"COOPER_OPTIMISE": "1", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]


@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize("mode", [GREEDY, pytest.param(MODES["all"], marks=pytest.mark.slow)])
def test_kernels_on_shards(implementation, mode):
    logits, uniforms = logits_of_shards(9, 768), uniforms_of(25, 9)
    whole = sampler(entropy=True, implementation="xla", **mode)(logits, uniforms)
    cut = sharded(2, entropy=True, implementation=implementation, **mode)(logits, uniforms)
    np.testing.assert_array_equal(whole.token, cut.token)
    for a, b in zip(*map(jax.tree.leaves, (whole, cut)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_margins_by_hand():
    """Groups of 0.8 and 0.2; the first one's blocks have 0.75 and 0.25, the first of them tokens of 1/3 and 2/3."""
    logits = np.full((5, 128 * 128 + 256), -np.inf, np.float32)
    logits[:, [3, 40, 200, 128 * 128 + 7]] = np.log([0.2, 0.4, 0.2, 0.2])
    uniforms = [[0.1, 0.70, 0.9], [0.1, 0.1, 0.3], [0.1, 0.8, 0.9], [0.79, 0.1, 0.4], [0.9, 0.1, 0.4]]
    uniforms = np.array(uniforms, np.float32)

    def margin(**mode):
        return jax.jit(functools.partial(kernel.sampling_margin, **mode))(logits, uniforms)

    np.testing.assert_allclose(margin(**ALL), [0.05, 1 / 3 - 0.3, 0.05, 0.01, 0.1], atol=1e-6)
    np.testing.assert_allclose(margin(**GREEDY), 0.2, atol=1e-6)
    np.testing.assert_array_equal(margin(temperature=1.0, top_k=1, top_p=1.0), np.inf)


def test_bits_depend_on_prompt_sample_and_position_alone():
    key = jax.random.key(12)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(places, G, t):
        return sampling_spec.draw_uniforms(sampling_spec.make_row_keys(key, places, G), t).reshape(
            len(places), G, kernel.LEVELS
        )

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
        sampling_spec.make_row_keys(key, jnp.arange(2), 2)


def test_thresholds_are_exact():
    """The k-th largest of numbers of every size, signed zeros and neighbours among them, to the last bit."""
    rng = np.random.default_rng(13)
    values = rng.normal(size=(8, 200)) * 10.0 ** rng.integers(-30, 30, (8, 200))
    values = values.astype(np.float32)
    values[:, :6] = [0.0, -0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), -np.inf, 1.0]

    def kth(x, k):
        return sampling_statistics.largest_threshold(
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
    sampling_spec.SamplingSpec(**right)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        sampling_spec.SamplingSpec(**right | wrong)
