"""The transformer against transformers + torch, and against itself: padding, decoding, sharding, memory."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CASES, FAMILY_CASES, config, one_device, random_params, torch_model

from cooper_jax.configs import base
from cooper_jax.kernels import attention as face
from cooper_jax.kernels import matmul, reference
from cooper_jax.kernels.kv import Format
from cooper_jax.kernels.matmul import matmul_plain
from cooper_jax.model import generation, layers, transformer, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.rope import RopeScaling
from cooper_jax.runtime.mesh import Layout, init_params, make_mesh, make_shardings

TOKENS = 29


def rows(n: int, tokens: int = TOKENS, vocab: int = 61, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, vocab, (n, tokens)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=1)
def trunk_of(params, config, tokens, valid):
    return transformer.hidden_states(params, config, tokens, valid, dtype=jnp.float32, layout=one_device())


def hidden_of(params, config, tokens, valid=None):
    """The trunk in f32, compiled once a config and shape, whichever head the parameters have."""
    valid = np.ones(tokens.shape, bool) if valid is None else valid
    shared = {k: params[k] for k in ("embed", "layers", "final_norm")}
    return trunk_of(shared, config, jnp.asarray(tokens), jnp.asarray(valid))


def logits_of(params, config, tokens, valid=None):
    return transformer.compute_logits(params, config, hidden_of(params, config, tokens, valid))


# --- parity with transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_and_score_equal_transformers_whatever_the_padding(name, tmp_path):
    """Ragged rows.  transformers finds the last token by its pad id, we by `valid`; our padding may lie on
    either side or both, and be the eos that every row ends with."""
    torch = pytest.importorskip("torch")
    policy, classifier = torch_model(CASES[name]), torch_model(CASES[name], "score")
    policy.save_pretrained(tmp_path / "policy")
    classifier.save_pretrained(tmp_path / "reward")
    loaded = weights.load_weights(str(tmp_path / "policy"), layout=one_device())
    reward = weights.load_weights(str(tmp_path / "reward"), head="score", layout=one_device())
    assert loaded.config == reward.config == CASES[name] and reward.head_trained

    tokens, lengths = rows(4), np.array([29, 9, 1, 20])
    tokens[np.arange(4), lengths - 1] = 1
    right = np.arange(TOKENS)[None] < lengths[:, None]
    ids = torch.tensor(np.where(right, tokens, 0), dtype=torch.long)
    with torch.no_grad():
        their_logits = policy(ids, attention_mask=torch.tensor(right)).logits.numpy()
        their_scores = classifier(ids, attention_mask=torch.tensor(right)).logits.numpy()[:, 0]
    assert np.abs(their_logits).max() > 1  # a comparison of something
    for where in ("right", "left", "both"):
        for pad in (1, 7):
            start = {"right": 0 * lengths, "left": TOKENS - lengths, "both": (TOKENS - lengths) // 2}[where]
            columns = np.arange(TOKENS)[None] - start[:, None]
            valid = (columns >= 0) & (columns < lengths[:, None])
            padded = np.where(valid, np.take_along_axis(tokens, columns % TOKENS, axis=1), pad)
            ours = np.asarray(logits_of(loaded.params, loaded.config, padded, valid))
            np.testing.assert_allclose(ours[valid], their_logits[right], atol=1e-4, rtol=0)
            h = hidden_of(reward.params, reward.config, padded, valid)
            scores = transformer.score_last_token(reward.params, reward.config, h, jnp.asarray(valid))
            np.testing.assert_allclose(scores, their_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen2_untied", "gemma3"])
def test_gradients_equal_torch(name, tmp_path):
    """Of a weighted sum of log-probabilities; ours left-padded, with remat and chunks."""
    torch = pytest.importorskip("torch")
    c = (CASES | FAMILY_CASES)[name]
    model, tokens = torch_model(c), rows(2, 9)
    model.save_pretrained(tmp_path / "weights")
    weight = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    ids = torch.tensor(tokens, dtype=torch.long)
    lp = torch.log_softmax(model(ids).logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    (lp * torch.tensor(weight)).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    model.save_pretrained(tmp_path / "gradients")  # so that the table of names sorts them out
    expected = weights.load_weights(str(tmp_path / "gradients"), layout=one_device()).params

    padded = jnp.asarray(np.pad(tokens, ((0, 0), (5, 0)), constant_values=3))
    valid = jnp.broadcast_to((jnp.arange(14) >= 5)[None, :], (2, 14))

    @jax.jit
    @jax.grad
    def gradients(params):
        h = transformer.hidden_states(
            params, c, padded, valid, dtype=jnp.float32, remat=True, layout=one_device()
        )
        return jnp.vdot(
            weight, transformer.token_logprobs(params, c, h[:, 5:-1], tokens[:, 1:], layout=one_device())[0]
        )

    ours = gradients(weights.load_weights(str(tmp_path / "weights"), layout=one_device()).params)
    # A gradient near 0 is a sum of large terms, so its error is in proportion to the array's largest.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), ours, expected
    )


# --- padding ---------------------------------------------------------------------------------------------


def test_padding_anywhere_changes_no_bit():
    c = CASES["qwen2_tied"]
    params, tokens = random_params(c), rows(2, 10)
    alone = logits_of(params, c, tokens)
    for columns in (np.arange(4, 14), np.arange(10), np.r_[2:5, 9:16]):  # left, right, a gap in the middle
        for filler in (1, 60):
            padded = np.full((2, 16), filler, np.int32)
            valid = np.zeros((2, 16), bool)
            padded[:, columns], valid[:, columns] = tokens, True
            # Same computation on the same real tokens; only the row's length differs.
            np.testing.assert_allclose(
                logits_of(params, c, padded, valid)[:, columns], alone, atol=2e-6, rtol=1e-6
            )
            changed = np.where(valid, padded, 33)
            np.testing.assert_array_equal(
                logits_of(params, c, padded, valid)[:, columns],
                logits_of(params, c, changed, valid)[:, columns],
            )


def test_a_row_without_tokens_gives_no_nan():
    c = CASES["llama_tied"]
    params, tokens = random_params(c, "score"), jnp.asarray(rows(2, 8))
    valid = jnp.asarray([[False] * 8, [True] * 8])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params, weight):
        h = transformer.hidden_states(params, c, tokens, valid, dtype=jnp.float32, layout=one_device())
        return jnp.vdot(weight, transformer.score_last_token(params, c, h, valid)), h

    (_, h), grads = step(params, jnp.array([1.0, 1.0]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((h, grads)))
    (_, h), grads = step(params, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(grads["score"], h[0, 0], atol=1e-5)  # as documented: its first column


def test_bfloat16_stays_near_float32():
    c = CASES["llama_tied"]
    params, tokens = random_params(c), jnp.asarray(rows(2))
    half = jax.jit(
        lambda p: transformer.hidden_states(
            p, c, tokens, tokens >= 0, dtype=jnp.bfloat16, layout=one_device()
        )
    )(params)
    full = hidden_of(params, c, tokens)
    assert half.dtype == jnp.bfloat16
    assert transformer.compute_logits(params, c, half).dtype == jnp.float32
    assert np.abs(half.astype(jnp.float32) - full).max() < 0.05 * np.abs(full).max()


# --- attention -------------------------------------------------------------------------------------------


def qkv(n=2, tokens=40, heads=4, kv_heads=2, h=16, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=(n, tokens, heads_, h)), jnp.float32)
        for heads_ in (heads, kv_heads, kv_heads)
    )


def test_reference_attention_equals_a_loop():
    q, k, v = (np.asarray(x, np.float64) for x in qkv(n=1, tokens=5))
    out = np.zeros_like(q)
    for head in range(4):
        for i in range(5):
            z = k[0, : i + 1, head // 2] @ q[0, i, head] / 4.0  # sqrt(16)
            p = np.exp(z) / np.exp(z).sum()
            out[0, i, head] = p @ v[0, : i + 1, head // 2]
    ours = reference.reference_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(ours, out, atol=1e-6)


def test_a_window_hides_what_is_older():
    """Against a softmax over the keys of each query's window, a query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv(n=1, tokens=7, heads=1, kv_heads=1))
    out = np.zeros_like(q)
    for i in range(7):
        seen = slice(max(0, i - 2), i + 1)  # a window of 3
        p = np.exp(k[0, seen, 0] @ q[0, i, 0] / 4.0)
        out[0, i, 0] = p / p.sum() @ v[0, seen, 0]
    ours = reference.reference_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), window=3)
    np.testing.assert_allclose(ours, out, atol=1e-6)


@pytest.mark.parametrize("window", [1, 30, 33, 65])
def test_blocks_of_queries_with_a_window(monkeypatch, window):
    """Blocks of 32: their keys begin in the same block, in the one before, or at token 0."""
    monkeypatch.setattr(face, "QUERY_BLOCK", 32)
    blocked = functools.partial(face.causal_attention, implementation="xla", window=window)
    check_values_and_gradients(
        blocked, functools.partial(reference.reference_attention, window=window), qkv(tokens=65)
    )


def test_the_tpu_kernel_interpreted_with_a_window():
    kernel = functools.partial(face.causal_attention, implementation="splash_interpret", window=50)
    args = qkv(n=1, tokens=130, heads=2, kv_heads=1, h=64)
    check_values_and_gradients(kernel, functools.partial(reference.reference_attention, window=50), args)


def segments_of(n, tokens):
    """Rows of three sequences of uneven length and padding (0) behind them."""
    ends = np.array([[tokens // 3, tokens // 2, tokens - 9 + i] for i in range(n)])
    ids = (np.arange(tokens)[None, :, None] >= ends[:, None]).sum(axis=2) + 1
    return jnp.asarray(np.where(ids == 4, 0, ids), jnp.int32)


@pytest.mark.parametrize("window", [None, 20])
def test_sequences_of_one_row_equal_sequences_of_their_own(window):
    q, k, v = qkv(n=2, tokens=65)
    segments = segments_of(2, 65)
    found = reference.reference_attention(q, k, v, window=window, segments=(segments, segments))
    for n in range(2):
        for segment in (1, 2, 3):
            (columns,) = np.nonzero(np.asarray(segments)[n] == segment)
            alone = reference.reference_attention(
                *(x[n : n + 1, columns[0] : columns[-1] + 1] for x in (q, k, v)), window=window
            )
            np.testing.assert_allclose(found[n, columns], alone[0], atol=1e-6)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("implementation", ["xla", "splash_interpret"])
def test_kernels_keep_sequences_of_a_row_apart(monkeypatch, implementation, window):
    monkeypatch.setattr(face, "QUERY_BLOCK", 32)
    args = qkv(n=2, tokens=130, heads=2, kv_heads=1, h=64)
    segments = segments_of(2, 130)
    kernel = functools.partial(
        face.causal_attention, implementation=implementation, window=window, segments=segments
    )
    plain = functools.partial(reference.reference_attention, window=window, segments=(segments, segments))
    check_values_and_gradients(kernel, plain, args)


def test_a_window_saves_memory():
    """Of 1,024 tokens a block of queries reads 128 + 127 keys at most; without a window, up to 1,024."""
    args = qkv(n=1, tokens=1024, heads=2, kv_heads=1, h=8)

    def temporaries(window):
        loss = lambda a: face.causal_attention(*a, implementation="xla", window=window).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(args).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(128) < 0.6 * temporaries(None) and temporaries(1024) == temporaries(None)


@pytest.mark.parametrize("tokens", [64, 65])
def test_blocks_of_queries_equal_the_reference(monkeypatch, tokens):
    monkeypatch.setattr(face, "QUERY_BLOCK", 32)
    args = qkv(tokens=tokens)
    check_values_and_gradients(
        functools.partial(face.causal_attention, implementation="xla"), reference.reference_attention, args
    )


def test_the_tpu_kernel_interpreted_equals_the_reference():
    args = qkv(n=1, tokens=130, heads=2, kv_heads=1, h=64)
    kernel = functools.partial(face.causal_attention, implementation="splash_interpret")
    check_values_and_gradients(kernel, reference.reference_attention, args)


def check_values_and_gradients(f, g, args):
    weight = jnp.asarray(np.random.default_rng(5).normal(size=args[0].shape), jnp.float32)
    fv, fg = jax.jit(jax.value_and_grad(lambda a: jnp.vdot(f(*a), weight)))(args)
    gv, gg = jax.jit(jax.value_and_grad(lambda a: jnp.vdot(g(*a), weight)))(args)
    np.testing.assert_allclose(fv, gv, rtol=1e-5, atol=1e-4)
    for a, b in zip(fg, gg, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_xla_form_halves_the_memory():
    args = qkv(n=1, tokens=1024, heads=2, kv_heads=1, h=8)

    def temporaries(f):
        return jax.jit(jax.grad(f)).lower(args).compile().memory_analysis().temp_size_in_bytes

    blocked = temporaries(lambda a: face.causal_attention(*a, implementation="xla").sum())
    assert blocked < 0.6 * temporaries(lambda a: reference.reference_attention(*a).sum())


def test_the_choice_of_implementation(monkeypatch):
    assert face.default_implementation(jnp.dtype(jnp.float32), 64) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert face.default_implementation(jnp.dtype(jnp.bfloat16), 64) == "cudnn"
    assert face.default_implementation(jnp.dtype(jnp.float32), 64) == "xla"
    assert face.default_implementation(jnp.dtype(jnp.bfloat16), 60) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert face.default_implementation(jnp.dtype(jnp.bfloat16), 64) == "splash"
    with pytest.raises(ValueError, match="'fast' is none of"):
        face.causal_attention(*qkv(), implementation="fast")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_matmul_is_jaxs_own(dtype):
    rng = np.random.default_rng(0)
    x, w, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in ((3, 5, 8), (8, 6), (3, 5, 6)))
    ours, plain = (
        jax.jit(jax.grad(lambda x, w, f=f: jnp.vdot(weight, f(x, w)), (0, 1)))(x, w)
        for f in (matmul_plain, jnp.matmul)
    )
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype == dtype
        tolerance = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


# --- heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("multiple", [1, 16])
def test_token_logprobs_equal_log_softmax(temperature, multiple):
    """Values, entropy and gradients, with and without padded columns."""
    c = dataclasses.replace(CASES["llama_untied_one_kv_head"], vocab_multiple=multiple)
    params, targets = random_params(c), jnp.asarray(rows(3, 11))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, 11, c.width)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(3, 11)), jnp.float32)

    def ours(params, hidden):
        lp, entropy = transformer.token_logprobs(
            params, c, hidden, targets, temperature=temperature, layout=one_device()
        )
        return jnp.sum(weight * lp) + jnp.sum(entropy), (lp, entropy)

    def naive(params, hidden):
        z = hidden @ params["lm_head"][: c.vocab_size].T / temperature
        lp = jax.nn.log_softmax(z, axis=-1)
        entropy = -jnp.sum(jnp.exp(lp) * lp, axis=-1)
        chosen = jnp.take_along_axis(lp, targets[:, :, None], axis=-1)[:, :, 0]
        return jnp.sum(weight * chosen), (chosen, entropy)

    def step(f):
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, hidden)

    (_, values), grads = step(ours)
    (_, expected), expected_grads = step(naive)
    for a, b in zip(values, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-6)
    # No gradient through the entropy: ours added it to the loss, the naive form did not.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)


def test_token_logprobs_never_hold_all_logits():
    c = config(vocab_size=2**15)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), transformer.param_specs(c), one_device()))
    hidden, targets = jnp.ones((2, 128, c.width)), jnp.ones((2, 128), jnp.int32)

    def loss(params):
        return transformer.token_logprobs(params, c, hidden, targets, layout=one_device())[0].sum()

    for step in (loss, jax.grad(loss)):
        memory = jax.jit(step).lower(params).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2 * 128 * c.vocab_size * 4 / 2


def test_padded_vocabulary_has_no_probability():
    c = CASES["llama_tied"]
    padded = dataclasses.replace(c, vocab_multiple=16)
    assert (c.padded_vocab, padded.padded_vocab) == (61, 64)
    params = random_params(padded)
    z = logits_of(params, padded, rows(1))
    assert np.isneginf(z[..., 61:]).all()
    cut = params | {"embed": params["embed"][:61]}
    np.testing.assert_array_equal(z[..., :61], logits_of(cut, c, rows(1)))


# --- decoding --------------------------------------------------------------------------------------------


F32 = Format("float32", packed=False)


def decode(params, c, prompts, lengths, suffix, samples, layout):
    """Teacher-forced decoding -> (hidden of the prompts' last tokens, hidden [N, T, D])."""
    params = generation.prepare_generation(params, c, layout)
    static = dict(dtype=jnp.float32, kv_format=F32, layout=layout)
    first, kv = jax.jit(lambda p, t, n: generation.prefill_prompts(p, c, t, n, **static))(
        params, prompts, lengths
    )
    n = suffix.shape[0]
    plan = layers.make_decode_schedule(jnp.arange(n) // samples, lengths, samples, layout, "xla")
    oldest = jnp.zeros(n, jnp.int32)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, token, i, kv, cache):
        position = jnp.repeat(lengths, samples) + i
        return generation.decode_step(params, c, token, position, kv, plan, cache, oldest, i, **static)

    cache = generation.make_empty_suffix(c, params["layers"], *suffix.shape, F32)
    cache, out = tuple(map(generation.drop_stack_axis, cache)), []
    for i in range(suffix.shape[1]):
        h, cache = step(params, suffix[:, i], jnp.int32(i), kv, cache)
        out.append(h)
    return first, jnp.stack(out, axis=1)


@pytest.mark.parametrize("alone", [0, 8])
@pytest.mark.parametrize(("name", "samples"), [("llama3_rope", 1), ("qwen2_seven_to_one", 3)])
def test_decoding_equals_the_full_forward(name, samples, alone, monkeypatch):
    """One loop over a stack of all layers, or layers apart."""
    monkeypatch.setattr(generation, "LAYERS_ALONE", alone)
    c = CASES[name]
    params, prompts, lengths = random_params(c), jnp.asarray(rows(3, 7)), jnp.array([7, 1, 4])
    suffix = jnp.asarray(rows(3 * samples, 6, seed=samples))
    first, hidden = decode(params, c, prompts, lengths, suffix, samples, one_device())
    whole = jnp.concatenate([jnp.repeat(prompts, samples, axis=0), suffix], axis=1)
    real = jnp.arange(7)[None, :] < jnp.repeat(lengths, samples)[:, None]
    valid = jnp.concatenate([real, jnp.ones(suffix.shape, bool)], axis=1)
    full = hidden_of(params, c, whole, valid)
    np.testing.assert_allclose(hidden, full[:, 7:], atol=1e-5)
    np.testing.assert_allclose(
        transformer.compute_logits(params, c, hidden),
        transformer.compute_logits(params, c, full[:, 7:]),
        atol=1e-5,
    )
    last = full[jnp.arange(0, 3 * samples, samples), lengths - 1]
    np.testing.assert_allclose(first, last, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("alone", [0, 8])
def test_a_donated_cache_is_updated_in_place(alone, dtype, monkeypatch):
    """In a stack that a loop runs through, and in stacks of one; in a loop over tokens, as a rollout decodes."""
    monkeypatch.setattr(generation, "LAYERS_ALONE", alone)
    c, form = config(layers=4), Format(dtype, packed=False)
    params = generation.prepare_generation(random_params(c), c, one_device())
    assert len(params["layers"]) == (4 if alone else 1)
    cache = generation.make_empty_suffix(c, params["layers"], 4, 2048, form)
    prompt = generation.make_empty_suffix(c, params["layers"], 2, 4, form)
    plan = layers.make_decode_schedule(jnp.arange(4) // 2, jnp.array([4, 2]), 2, one_device(), "xla")
    token = jnp.ones(4, jnp.int32)

    def steps(cache, i):
        def step(i, cache):
            static = dict(dtype=jnp.float32, kv_format=form, layout=one_device())
            at = (plan, cache, jnp.zeros(4, jnp.int32), i)
            return generation.decode_step(params, c, token, token * i, prompt, *at, **static)[1]

        cache = jax.lax.fori_loop(i, i + 3, step, tuple(map(generation.drop_stack_axis, cache)))
        return tuple(generation.add_stack_axis(kv, len(params["layers"]) > 1) for kv in cache)

    memory = jax.jit(steps, donate_argnums=0).lower(cache, jnp.int32(3)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(cache))
    # A layer or two as they are read, in f32; no copy of all, though it were in int8.
    multiplied = 4 * 4 * 2048 * Format("float32", False).bytes_per_token(1, c.kv_heads, c.head_dim)
    assert memory.temp_size_in_bytes < multiplied / 2


@pytest.mark.parametrize("n", [1, 5, 24])
def test_products_with_panels_are_products(n):
    """Of one matrix, and of a matrix taken out of a stack."""
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(n, 24), (2, 24, 192)]))
    panels = matmul.to_panels(w)
    assert panels.shape == (2, 3, 24, 64)
    for i in range(2):
        want = np.asarray(x, np.float64) @ np.asarray(w[i], np.float64)
        np.testing.assert_allclose(matmul.matmul_cpu(x, panels[i]), want, atol=1e-5)
        np.testing.assert_allclose(matmul.matmul_cpu(x, w[i]), want, atol=1e-5)


# --- meshes ----------------------------------------------------------------------------------------------


def test_one_cpu_device_generates_with_the_fast_products():
    """The last bits differ from those of a mesh, where the products are plain; logits agree within 1e-5."""
    c = CASES["qwen2_seven_to_one"]
    prompts, lengths = jnp.asarray(rows(2, 7)), jnp.array([7, 4])
    suffix = jnp.asarray(rows(4, 5))

    def logits(layout):
        params = jax.device_put(random_params(c), make_shardings(layout, transformer.param_specs(c)))
        _, hidden = decode(params, c, prompts, lengths, suffix, 2, layout)
        params = generation.prepare_generation(params, c, layout)
        assert (transformer.UNEMBED in params) == layout.fast_cpu_products
        out = jax.jit(lambda p, h: transformer.compute_logits(p, c, h))(params, hidden.reshape(-1, c.width))
        return np.asarray(out)

    two = Layout(make_mesh(2, 1, 1, jax.devices()[:2]), tuple(base.get_config().mesh.rules))
    assert one_device().fast_cpu_products and not two.fast_cpu_products
    fast, plain = logits(one_device()), logits(two)
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(fast, plain, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def layout():
    return Layout(make_mesh(2, 2, 2), tuple(tuple(r) for r in base.get_config().mesh.rules))


def test_sharded_training_and_decoding_equal_unsharded(layout):
    """One key/value head over tensor=2: it is repeated."""
    c = dataclasses.replace(CASES["llama_untied_one_kv_head"], vocab_multiple=2)
    params, tokens = random_params(c), jnp.asarray(rows(8, 10))
    valid = jnp.arange(10)[None, :] >= jnp.arange(8)[:, None] % 4

    def loss(params, layout):
        h = transformer.hidden_states(params, c, tokens, valid, dtype=jnp.float32, remat=True, layout=layout)
        lp, _ = transformer.token_logprobs(params, c, h[:, :-1], tokens[:, 1:], layout=layout)
        return jnp.sum(jnp.where(valid[:, 1:], lp, 0.0)) / 80

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = step(params, one_device())
    spread = jax.device_put(params, make_shardings(layout, transformer.param_specs(c)))
    assert spread["layers"]["q"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    value_sharded, grads_sharded = step(spread, layout)
    np.testing.assert_allclose(value_sharded, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads_sharded, grads)

    prompts, suffix, lengths = tokens[:4, :5], tokens[:, 5:8], jnp.array([5, 2, 3, 1])
    alone = decode(params, c, prompts, lengths, suffix, 2, one_device())
    together = decode(spread, c, prompts, lengths, suffix, 2, layout)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (2, 2)])
def test_attention_over_a_mesh_equals_the_reference(heads, layout):
    """Key/value heads divided over tensor=2, or repeated until they are."""
    args = qkv(n=4, tokens=6, heads=heads[0], kv_heads=heads[1])
    run = jax.jit(lambda q, k, v: layers.sharded_causal_attention(q, k, v, layout))
    np.testing.assert_allclose(run(*args), reference.reference_attention(*args), atol=1e-6)


# --- configs ---------------------------------------------------------------------------------------------

QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
}


def test_config_reads_both_generations_of_config_json():
    c = ModelConfig.from_hf(QWEN)
    assert (c.head_dim, c.kv_heads, c.qkv_bias, c.tied, c.rope_theta) == (128, 2, True, True, 1e6)
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    flat = {k: v for k, v in QWEN.items() if k != "rope_theta"} | {"model_type": "llama"}
    older = ModelConfig.from_hf(flat | {"rope_theta": 5e5, "rope_scaling": llama3})
    newer = ModelConfig.from_hf(flat | {"rope_parameters": llama3 | {"rope_theta": 5e5}})
    assert older == newer
    assert newer.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192) and newer.rope_theta == 5e5
    for either in (c, newer):
        assert ModelConfig.from_hf(either.to_hf("x")) == either


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is none of"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"model_type": "llama", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["sliding_attention"] * 28}, "sliding_window is None: give the window"),
        ({"layer_types": ["full_attention"] * 27}, "27 entries for 28 layers"),
        ({"layer_types": ["chunked_attention"] * 28}, r"layer_types has \['chunked_attention'\]; only full"),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0},
            "sliding_window is 0: it must be a whole number from 1",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": None, "sliding_window": 8},
            "max_window_layers is None: it must be a whole number",
        ),
        ({"model_type": "gemma3"}, "'gemma3' is a model of images and text"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "smollm3", "layer_types": ["sliding_attention"] * 28}, "windows are not supported"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 28"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"]},
            "Mistral's layers are all of one type",
        ),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"model_type": "gemma3_text", "hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; only default"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"num_key_value_heads": 5}, "12 query heads do not divide over 5"),
        ({"hidden_size": 1537}, "hidden_size 1537 does not divide over 12"),
        ({"head_dim": 127}, "head_dim is 127"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_config_refuses_what_is_not_built(change, message):
    with pytest.raises(ValueError, match=f"^dir/config.json: .*{message}"):
        ModelConfig.from_hf(QWEN | change, where="dir/config.json")


def test_config_from_arch_and_its_layers():
    arch = base.arch()
    c = ModelConfig.from_arch(arch, vocab_size=100, vocab_multiple=64)
    assert (c.width, c.heads, c.qkv_bias, c.padded_vocab) == (arch.width, arch.heads, False, 128)
    assert c.keep_layers(1).layers == 1 and c.keep_layers(0) == c
    with pytest.raises(ValueError, match="num_layers is 3, but the model has 2"):
        c.keep_layers(3)
    with pytest.raises(ValueError, match="'value' is none of"):
        transformer.param_specs(c, "value")


def test_every_parameter_has_an_axis_name_a_dimension():
    for c in CASES.values():
        for head in ("logits", "score"):
            specs = transformer.param_specs(c, head)
            for spec in jax.tree.leaves(specs, is_leaf=lambda x: hasattr(x, "axes")):
                assert len(spec.shape) == len(spec.axes)
            assert ("lm_head" in specs) == (head == "logits" and not c.tied)
            assert ("score" in specs) == (head == "score")


def test_kernels_import_nothing_of_ours():
    for module in (face, reference):
        source = inspect.getsource(module).replace("cooper_jax.kernels", "")
        assert "cooper_jax" not in source and "configs" not in source
