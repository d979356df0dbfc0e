"""The head's kernels: every form against the plain one, and that one against float64 formulas of its own.

The independent race is NumPy's: jax's own threefry primitive gives its bits, and its logarithms are float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.extend.random import threefry2x32_p
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from scipy.stats import chi2

from cooper_jax.kernels import gumbel, head, head_tpu, head_triton, online

KERNELS = ("tpu_interpret", "triton_interpret")
FORMS = ("xla", *KERNELS)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# So that a few rows and a thousand entries have several tiles, splits and chunks.
SMALL = (
    (head, "CHUNK", 2**10),
    (head, "LARGE_CHUNK", 2**10),
    (head_tpu, "ROWS", 16),
    (head_tpu, "HEAD_BYTES", 0),
    (head_triton, "ROWS", dict(draw=16, greedy=16, score=16)),
    (head_triton, "PROGRAMS", 6),
)
REAL = [(module, name, getattr(module, name)) for module, name, _ in SMALL]


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in SMALL:
            patch.setattr(module, name, value)
        yield


@functools.partial(jax.jit, static_argnames=("temperature", "vocab_size", "implementation"))
def sample(hidden, weights, words, *, temperature=1.0, vocab_size=None, implementation="xla"):
    vocab_size = vocab_size or weights.shape[0]
    return head.head_sample(
        hidden,
        weights,
        words,
        temperature=temperature,
        vocab_size=vocab_size,
        implementation=implementation,
    )


@functools.partial(
    jax.jit, static_argnames=("temperature", "vocab_size", "implementation", "entropy_gradient")
)
def logprobs(
    hidden,
    weights,
    targets,
    *,
    temperature=1.0,
    vocab_size=None,
    implementation="xla",
    entropy_gradient=False,
):
    vocab_size = vocab_size or weights.shape[0]
    return head.head_logprobs(
        hidden,
        weights,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        implementation=implementation,
        entropy_gradient=entropy_gradient,
    )


def inputs(seed, rows, width, vocabulary, dtype="float32", spread=2.0):
    """hidden [N, D] and head [V, D], whose logits deviate by about `spread`, and key words u32[N, 2]."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, width))
    weights = rng.normal(size=(vocabulary, width)) * spread * width**-0.5
    words = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    return jnp.asarray(hidden, dtype), jnp.asarray(weights, dtype), jnp.asarray(words)


def exact_logits(hidden, weights):
    """float64[N, V]."""
    return np.asarray(hidden, np.float64) @ np.asarray(weights, np.float64).T


def exact_logprobs(z):
    """log softmax f64[N, V] and entropy f64[N]."""
    z = z - z.max(-1, keepdims=True)
    logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return logs, -(np.exp(logs) * logs).sum(-1)


def exact_noise(words, index):
    """Gumbel noise f64[N, V] by jax's own threefry primitive and float64 logarithms."""
    k0, k1 = (jnp.broadcast_to(words[:, i : i + 1], (len(words), len(index))) for i in range(2))
    count = jnp.asarray(index // 256 * 128 + index % 128, jnp.uint32)
    count = jnp.broadcast_to(count[None, :], k0.shape)
    pair = threefry2x32_p.bind(k0, k1, jnp.full_like(count, gumbel.DOMAIN), count)
    return exact_gumbel(np.where(index % 256 < 128, *(np.asarray(x) for x in pair)))


def exact_gumbel(bits):
    """u32 -> f64: the uniform is rounded to f32, as it says, and nothing else is."""
    u = np.minimum(((bits.astype(np.float64) + 0.5) / 2**32).astype(np.float32), 1 - 2**-24)
    return -np.log(-np.log1p(-u.astype(np.float64)))


# --- the noise -----------------------------------------------------------------------------------------


def test_the_hash_is_threefry():
    words = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (4, 1000), dtype=np.uint32))
    for ours, theirs in zip(jax.jit(gumbel.threefry2x32)(*words), threefry2x32_p.bind(*words), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_noise_is_resolved_where_it_decides_rare_tokens():
    """Its largest values stand for shares down to 2^-33, each of the last bits apart; its least is finite."""
    bits = np.concatenate([np.arange(4096), 2 ** np.arange(12, 32), [2**32 - 1]]).astype(np.uint32)
    got = np.asarray(jax.jit(gumbel.gumbel_from_bits)(bits), np.float64)
    np.testing.assert_allclose(got, exact_gumbel(bits), rtol=0, atol=3e-6)
    assert got[0] > 32.9 * np.log(2) and (np.diff(got[:4096]) < 0).all()
    assert got[-1] == pytest.approx(-np.log(24 * np.log(2)), abs=1e-5)


def test_both_ways_to_the_noise_agree():
    words = jnp.asarray([[3, 4], [5, 6]], jnp.uint32)
    noise = jax.jit(head._noise, static_argnames=("size", "aligned"))
    for first, size in ((0, 1000), (512, 256)):
        pairs = noise(words, jnp.int32(first), size, aligned=True)
        np.testing.assert_array_equal(pairs, noise(words, jnp.int32(first), size, aligned=False))
        np.testing.assert_allclose(pairs, exact_noise(words, np.arange(first, first + size)), atol=3e-6)


# --- every form against the plain one and against float64 ---------------------------------------------------


def check(implementation, seed, rows, width, vocabulary, padding, temperature, dtype):
    """Tokens, log-probabilities and entropies of a form; the race is NumPy's own on float64 logits."""
    atol = TOLERANCE[dtype]
    real = max(vocabulary - padding, 1)
    hidden, weights, words = inputs(seed, rows, width, vocabulary, dtype)
    exact = exact_logits(hidden, weights)[:, :real]
    logs, entropy = exact_logprobs(exact / (temperature or 1.0))
    at = np.arange(rows)

    static = dict(temperature=temperature, vocab_size=real, implementation=implementation)
    drawn = sample(hidden, weights, words, **static)
    noise = exact_noise(words, np.arange(real)) if temperature else 0.0
    race = exact / (temperature or 1.0) + noise
    token = np.asarray(drawn.token)
    assert token.dtype == np.int32 and (0 <= token).all() and (token < real).all()
    # The token that wins, unless the race is a dead heat to within rounding.
    assert (race.max(-1) - race[at, token] <= 2 * TOLERANCE["float32"]).all()
    np.testing.assert_allclose(drawn.logprob, logs[at, token] if temperature else 0.0 * at, atol=atol)
    np.testing.assert_allclose(drawn.entropy, entropy, atol=atol)

    if temperature:
        targets = np.random.default_rng(seed).integers(0, real, rows)
        got = logprobs(hidden, weights, jnp.asarray(targets, jnp.int32), **static)
        np.testing.assert_allclose(got[0], logs[at, targets], atol=atol)
        np.testing.assert_allclose(got[1], entropy, atol=atol)
    if implementation != "xla":
        plain = sample(hidden, weights, words, **static | dict(implementation="xla"))
        for ours, theirs in zip(drawn, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=atol)


SHAPES = dict(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    width=st.sampled_from([8, 24, 64, 130]),
    vocabulary=st.integers(1, 1100),
    padding=st.sampled_from([0, 1, 5, 300]),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@settings(max_examples=6, deadline=None)
@given(**SHAPES)
def test_the_plain_form_is_the_formula(**shape):
    check("xla", **shape)


@pytest.mark.parametrize("implementation", KERNELS)
@settings(max_examples=3, deadline=None)
@given(**SHAPES)
def test_kernels_are_the_formula(implementation, **shape):
    check(implementation, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_whole_vocabularies(implementation, vocabulary, monkeypatch):
    for module, name, value in REAL:
        monkeypatch.setattr(module, name, value)
    for temperature, dtype in ((1.0, "float32"), (0.0, "bfloat16")):
        check(implementation, 14, 24, 64, vocabulary, 271, temperature, dtype)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_gives_nan(implementation, temperature):
    _, _, words = inputs(0, 5, 8, 300)
    weights = jnp.full((300, 8), 2.0).at[7].set(2.5)
    hidden = jnp.zeros((5, 8)).at[:, 0].set(jnp.array([1.0, jnp.nan, 3e38, -3e38, 1.0]))
    static = dict(temperature=temperature, implementation=implementation)
    drawn = sample(hidden, weights, words, **static)
    np.testing.assert_array_equal(np.isnan(drawn.logprob), [False, True, True, True, False])
    np.testing.assert_array_equal(np.isnan(drawn.entropy), [False, True, True, True, False])
    np.testing.assert_array_equal(drawn.token[1:4], 0)
    if temperature:
        logs = logprobs(hidden, weights, jnp.full(5, 9), **static)[0]
        np.testing.assert_array_equal(np.isnan(logs), [False, True, True, True, False])
    else:
        assert drawn.token[0] == drawn.token[4] == 7


@pytest.mark.parametrize("implementation", FORMS)
def test_one_nan_among_the_logits_is_enough(implementation):
    """Wherever it lies: in the first tile, in the last, beside the winner; but not in the padding."""
    hidden, weights, words = inputs(1, 3, 8, 1000)
    for at, bad in ((0, True), (700, True), (899, True), (900, False)):
        broken = weights.at[at].set(jnp.nan)
        drawn = sample(hidden, broken, words, vocab_size=900, implementation=implementation)
        assert np.isnan(drawn.logprob).all() == bad and np.isnan(drawn.logprob).any() == bad


@pytest.mark.parametrize("implementation", FORMS)
def test_greedy_takes_the_first_of_the_largest(implementation):
    hidden, weights, words = inputs(2, 4, 8, 1000)
    weights = weights.at[jnp.array([40, 168, 700])].set(10.0 * hidden[0])
    drawn = sample(hidden, weights, words, temperature=0.0, implementation=implementation)
    assert drawn.token[0] == 40
    np.testing.assert_array_equal(drawn.logprob, 0.0)


# --- the draw ------------------------------------------------------------------------------------------


def from_logits(z, rows):
    """hidden [rows, 8] and head [V, 8] with the logits `z` in every row."""
    weights = jnp.zeros((len(z), 8)).at[:, 0].set(jnp.asarray(z, jnp.float32))
    return jnp.ones((rows, 8)), weights


def test_draws_follow_the_distribution():
    """Chi-square at 1e5 draws; the tail, whose cells expect under 5, is one cell."""
    draws, temperature = 100_000, 0.7
    z = np.random.default_rng(3).normal(size=300) * 2
    words = jnp.stack([jnp.arange(draws, dtype=jnp.uint32), jnp.full(draws, 11, jnp.uint32)], axis=1)
    tokens = sample(*from_logits(z, draws), words, temperature=temperature, vocab_size=290).token
    counts = np.bincount(tokens, minlength=300)
    assert not counts[290:].any()
    expected = np.exp(exact_logprobs(z[:290] / temperature)[0]) * draws
    rare = expected < 5
    assert 5 < rare.sum() < 280
    counts, expected = (np.append(v[:290][~rare], v[:290][rare].sum()) for v in (counts, expected))
    assert chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1) > 1e-3


@pytest.mark.parametrize("implementation", FORMS)
def test_a_token_rarer_than_the_grid_of_one_uniform_is_within_reach(implementation):
    """Its share is 2^-30.  The key was searched for: it gives entry 133 noise of 20.3 and entry 5 of -1.0."""
    z = np.full(256, -200.0)
    z[5], z[133] = 0.0, -30 * np.log(2)
    words = jnp.array([[25809, 15127], [25809, 15128]], jnp.uint32)
    drawn = sample(*from_logits(z, 2), words, implementation=implementation)
    np.testing.assert_array_equal(drawn.token, [133, 5])
    np.testing.assert_allclose(drawn.logprob, [-30 * np.log(2), 0.0], atol=1e-5)


@pytest.mark.slow
def test_noise_of_1e_5_in_the_logits_hardly_moves_a_draw():
    """Few of 10,000 draws from peaked logits change.  (One uniform over a whole CDF: 50.)"""
    rng = np.random.default_rng(4)
    z = rng.permutation(-1.5 * np.log(1.0 + np.arange(2000)))
    hidden, weights = from_logits(z, 10_000)
    words = jnp.asarray(rng.integers(0, 2**32, (10_000, 2), dtype=np.uint32))
    noisy = weights.at[:, 1].set(jnp.asarray(1e-5 * rng.normal(size=2000), jnp.float32))
    flips = np.sum(np.asarray(sample(hidden, weights, words).token != sample(hidden, noisy, words).token))
    assert flips <= 5


def test_a_row_does_not_depend_on_the_batch():
    hidden, weights, words = inputs(5, 12, 32, 3000)
    whole = sample(hidden, weights, words)
    for rows in (slice(3, 4), slice(5, 12)):
        cut = sample(hidden[rows], weights, words[rows])
        np.testing.assert_array_equal(cut.token, whole.token[rows])
        np.testing.assert_allclose(cut.logprob, whole.logprob[rows], atol=2e-6)


def test_other_words_draw_other_tokens():
    hidden, weights = from_logits(np.zeros(4096), 1)
    tokens = [sample(hidden, weights, jnp.array([w], jnp.uint32)).token[0] for w in ((1, 2), (2, 1), (1, 3))]
    assert len(set(map(int, tokens))) == 3


# --- over shards of the vocabulary ------------------------------------------------------------------------


def sharded(function, ways, implementation, out_specs, **static):
    """`function` over a mesh with the head cut into `ways` shards of its rows."""
    mesh = Mesh(np.array(jax.devices()[:ways]), ("tensor",))
    body = functools.partial(function, axis_name="tensor", implementation=implementation, **static)
    specs = (P(), P("tensor"), P())
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation, ways, vocabulary, padding",
    [
        ("xla", 4, 1024, 0),
        ("xla", 4, 1200, 309),  # 300 a shard: hashes are not shared; the last shard has padding alone
        ("triton_interpret", 2, 1024, 100),
        ("triton_interpret", 2, 600, 0),
        ("tpu_interpret", 2, 1024, 100),
        ("tpu_interpret", 2, 600, 0),
    ],
)
def test_shards_of_the_vocabulary_draw_the_same_tokens(implementation, ways, vocabulary, padding):
    hidden, weights, words = inputs(6, 6, 16, vocabulary)
    for temperature in (0.8, 0.0)[: 2 if implementation == "xla" else 1]:
        static = dict(temperature=temperature, vocab_size=vocabulary - padding)
        split = sharded(head.head_sample, ways, implementation, P(), **static)(hidden, weights, words)
        whole = sample(hidden, weights, words, **static)
        np.testing.assert_array_equal(split.token, whole.token)
        np.testing.assert_allclose(split.logprob, whole.logprob, atol=3e-6)
        np.testing.assert_allclose(split.entropy, whole.entropy, atol=3e-6)


def test_shards_of_the_vocabulary_score_and_learn_alike():
    hidden, weights, _ = inputs(7, 9, 16, 1200)
    targets = jnp.array([0, 5, 299, 300, 301, 599, 890, 700, 3])
    static = dict(temperature=0.9, vocab_size=891, entropy_gradient=True)
    split = sharded(head.head_logprobs, 4, "xla", (P(), P()), **static)
    for ours, theirs in zip(
        split(hidden, weights, targets), logprobs(hidden, weights, targets, **static), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)
    slope = jnp.arange(9.0) - 3.0

    def gradients(function):
        def loss(hidden, weights):
            logs, entropy = function(hidden, weights, targets)
            return jnp.sum(slope * logs) + jnp.sum(slope[::-1] * entropy)

        return jax.grad(loss, (0, 1))(hidden, weights)

    for ours, theirs in zip(gradients(split), gradients(functools.partial(logprobs, **static)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "thresholds"])
@pytest.mark.parametrize(
    "implementation, ways, spans_mesh",
    [("xla", 8, True), ("tpu_interpret", 2, True), ("tpu_interpret", 8, True), ("tpu_interpret", 8, False)],
)
def test_shards_of_the_width_score_and_learn_alike(implementation, ways, spans_mesh, cut):
    """FSDP: each device has some columns of the head, and some rows; a TPU's kernel reads [D, V].

    A gradient that lands on another device's columns would show.
    """
    hidden, weights, _ = inputs(12, 16, 32, 700)
    targets, slope = jnp.arange(16) * 37, jnp.cos(jnp.arange(16.0))
    static = dict(temperature=0.9, vocab_size=650, entropy_gradient=True)
    thresholds = jnp.full(16, 0.3) if cut else None
    mesh = Mesh(np.array(jax.devices()[:ways]), ("fsdp",))

    def run(hidden, weights, targets, thresholds):
        return head.head_logprobs(
            hidden, weights, targets, thresholds=thresholds, width_axis="fsdp", spans_mesh=spans_mesh,
            implementation=implementation, **static,
        )  # fmt: skip

    rows = P("fsdp")
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(rows, P(None, "fsdp"), rows, rows), out_specs=(rows, rows), check_vma=False
    )

    def loss(function):
        def sum_rows(hidden, weights):
            logs, entropy = function(hidden, weights, targets, thresholds)
            return jnp.sum(slope * logs) + jnp.sum(slope[::-1] * entropy), (logs, entropy)

        return jax.jit(jax.value_and_grad(sum_rows, (0, 1), has_aux=True))

    def whole(hidden, weights, targets, thresholds):
        return head.head_logprobs(
            hidden, weights, targets, thresholds=thresholds, implementation="xla", **static
        )

    for ours, theirs in zip(
        jax.tree.leaves(loss(split)(hidden, weights)),
        jax.tree.leaves(loss(whole)(hidden, weights)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


# --- the gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    "dtype, head_dtype", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("entropy_gradient", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gradient_is_that_of_the_naive_formula(implementation, dtype, head_dtype, entropy_gradient):
    hidden, weights, _ = inputs(8, 20, 24, 700)
    hidden, weights = hidden.astype(dtype), weights.astype(head_dtype)
    targets = jnp.arange(20) * 31
    slope = jnp.cos(jnp.arange(20.0))
    static = dict(temperature=0.7, vocab_size=600)

    def naive(hidden, weights):
        z = hidden.astype(jnp.float32) @ weights.astype(dtype).astype(jnp.float32).T / 0.7
        logs = jax.nn.log_softmax(z[:, :600])
        entropy = -jnp.sum(jnp.exp(logs) * logs, axis=1)
        return jnp.sum(slope * logs[jnp.arange(20), targets]) + entropy_gradient * jnp.sum(slope * entropy)

    def ours(hidden, weights):
        logs, entropy = logprobs(
            hidden,
            weights,
            targets,
            **static,
            implementation=implementation,
            entropy_gradient=entropy_gradient,
        )
        # Without entropy_gradient nothing flows through the entropy.
        return jnp.sum(slope * logs) + jnp.sum(slope * entropy)

    want = jax.jit(jax.grad(naive, (0, 1)))(hidden, weights)
    got = jax.jit(jax.grad(ours, (0, 1)))(hidden, weights)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=TOLERANCE[dtype])
    assert not np.asarray(got[1], np.float32)[600:].any()


def test_a_target_outside_the_vocabulary_scores_minus_infinity():
    hidden, weights, _ = inputs(9, 3, 8, 300)
    logs, _ = logprobs(hidden, weights, jnp.array([-1, 280, 5]), vocab_size=280)
    np.testing.assert_array_equal(np.isneginf(logs), [True, True, False])


# --- races between copies and computation ----------------------------------------------------------------


def races_found():
    """What the last interpreted kernel's race detector says; jax shows it nowhere else but on stdout."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def test_the_race_detector_detects():
    from jax.experimental import pallas as pl

    def kernel(x, out, semaphore):
        copy = pltpu.make_async_copy(x, out, semaphore)
        copy.start()
        out[...] = jnp.ones_like(out)
        copy.wait()

    x = jnp.zeros((8, 128))
    params = pltpu.InterpretParams(detect_races=True)
    call = pl.pallas_call(kernel, out_shape=x, scratch_shapes=[pltpu.SemaphoreType.DMA], interpret=params)
    # From jax 0.12 on a race is an error; before, it was a flag.
    try:
        jax.block_until_ready(call(x))
    except jax.errors.JaxRuntimeError as error:
        assert "RACE DETECTED" in str(error)
    else:
        assert races_found()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["draw", "score"])
@pytest.mark.parametrize("rows, cores", [(17, 1), (9, 2)])
def test_no_races(mode, rows, cores):
    """One row tile takes both cores, a half of the vocabulary each."""
    hidden, weights, words = inputs(10, rows, 24, 600)
    ids = jnp.arange(rows)[:, None] if mode == "score" else words
    static = dict(mode=mode, temperature=1.0, aligned=True)
    bounds = jnp.array([0, 590])
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    lanes = jax.jit(functools.partial(head_tpu.stream_head, **static, interpret=params))(
        hidden, weights, ids, bounds
    )
    jax.block_until_ready(lanes)
    assert not races_found()
    plain = jax.jit(functools.partial(head._xla, **static))(hidden, weights, ids, bounds)
    for ours, theirs in zip(
        online.reduce_accumulators(lanes, -1), online.reduce_accumulators(plain, -1), strict=True
    ):
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [-0.1, float("nan")])
def test_temperatures_that_mean_nothing_are_refused(temperature):
    hidden, weights, words = inputs(11, 2, 8, 20)
    with pytest.raises(ValueError, match="temperature is"):
        sample(hidden, weights, words, temperature=temperature)
    with pytest.raises(ValueError, match="temperature is"):
        logprobs(hidden, weights, jnp.zeros(2, jnp.int32), temperature=temperature)
