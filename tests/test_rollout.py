"""The rollout against transformers' `generate`, teacher forcing, and itself on other batches and meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from configs import base
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout import engine
from cooper_jax.rollout import slots as programs
from cooper_jax.rollout.engine import SamplingSpec, completions, generate, rollout_weights
from cooper_jax.runtime.mesh import Layout, init_params, make_mesh, shardings
from cooper_jax.types import Rollout

TINY = tiny_models.config(vocab_size=60, width=16, head_dim=4, ffn=24, tied=False, vocab_multiple=8)
SPEC = SamplingSpec(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=9,
    group_size=3,
    eos_ids=(7, 9, 31),
    segment=4,
    dtype="float32",
)
PROMPTS = [[3, 5, 8, 13], [21], [2, 9, 2, 33, 17, 8, 50, 1, 11], [4, 44, 14, 41, 50, 6]]
POSITIONS = [40, 41, 42, 43]
KEY = jax.random.key(3)
MOST = tuple(i for i in range(60) if i % 3)  # EOS ids that end most rows within a few tokens
spec_of = functools.partial(dataclasses.replace, SPEC)


@functools.cache
def params_of():
    """Weights whose distributions are neither flat nor certain."""
    params = init_params(jax.random.key(0), transformer.param_specs(TINY))
    return params | {"lm_head": 1.6 * params["lm_head"]}


@functools.cache
def sampled(spec=SPEC) -> Rollout:
    return jax.device_get(generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec))


def rows_of(rollout, rows):
    return jax.tree.map(lambda x: np.asarray(x)[rows], rollout)


def count_traces(monkeypatch):
    """The model's functions, listed each time that they are traced: a compilation each."""
    traces = []
    for name in ("prefill", "decode_step"):
        plain = getattr(transformer, name)
        traced = lambda *a, plain=plain, name=name, **k: traces.append(name) or plain(*a, **k)  # noqa: E731
        monkeypatch.setattr(transformer, name, traced)
    return traces


def assert_same(a: Rollout, b: Rollout):
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


class Segments(list):
    """(rows, key length) of every segment that runs."""

    def __init__(self):
        super().__init__()
        self.columns = []  # decoded in each

    def steps(self):
        return int(sum(self.columns))


@pytest.fixture
def segments(monkeypatch):
    seen, run = Segments(), programs.segment

    def segment(weights, slots, requests, **static):
        before = int(slots.column)
        seen.append((slots.request.size, static["key_len"]))
        out = run(weights, slots, requests, **static)
        seen.columns.append(int(out[0].column) - before)
        return out

    monkeypatch.setattr(programs, "segment", segment)
    return seen


# --- what a rollout is -----------------------------------------------------------------------------------


def test_rows_end_with_their_first_eos_or_at_the_limit():
    r = sampled()
    assert r.tokens.shape == r.mask.shape == r.logprobs.shape == (12, 9) and r.finished.shape == (12,)
    for tokens, mask, logprobs, finished in zip(r.tokens, r.mask, r.logprobs, r.finished, strict=True):
        length = mask.sum()
        assert mask[:length].all() and not mask[length:].any()
        ends = np.isin(tokens[:length], SPEC.eos_ids)
        assert not ends[:-1].any() and ends[-1] == finished
        assert finished or length == 9
        assert (
            (tokens[length:] == 0).all() and (logprobs[length:] == 0).all() and (logprobs[:length] < 0).all()
        )
    last = r.tokens[r.finished, r.mask[r.finished].sum(1) - 1]
    assert len(set(last.tolist())) > 1, "more than one EOS id should have been met"
    assert 0 < r.finished.sum() < 12, "finished and truncated rows should both be there"
    assert len(np.unique(r.tokens[:3], axis=0)) == 3, "a prompt's samples should differ"
    assert r.tokens.max() < TINY.vocab_size


@pytest.mark.parametrize("change", [{}, dict(temperature=0.6), dict(temperature=1.4, top_k=8, top_p=0.9)])
def test_logprobs_equal_teacher_forced_ones(change):
    """Through `trunk`, which shares neither cache, nor attention, nor positions' code path with decoding."""
    spec = spec_of(**change)
    r = sampled(spec)
    S = max(map(len, PROMPTS)) + r.tokens.shape[1]
    tokens, valid = np.zeros((12, S), np.int32), np.zeros((12, S), bool)
    for n in range(12):
        row = PROMPTS[n // 3] + r.tokens[n][r.mask[n]].tolist()
        tokens[n, : len(row)], valid[n, : len(row)] = row, True
    hidden = transformer.trunk(params_of(), TINY, tokens, valid, dtype=jnp.float32)
    logits = np.asarray(transformer.logits(params_of(), TINY, hidden), np.float64) / spec.temperature
    for n in range(12):
        first = len(PROMPTS[n // 3])
        for t in range(r.mask[n].sum()):
            z = logits[n, first + t - 1]
            p = np.exp(z - z.max())
            if spec.top_k:
                p[z < np.sort(z)[-spec.top_k]] = 0
            p /= p.sum()
            order = np.argsort(-z)
            dropped = order[np.cumsum(p[order]) - p[order] >= spec.top_p]
            p[dropped] = 0
            np.testing.assert_allclose(r.logprobs[n, t], np.log(p[r.tokens[n, t]] / p.sum()), atol=1e-5)


def test_the_logprobs_equal_those_of_the_loss():
    """`token_logprobs` at the same temperature: the ratio of the first update is 1."""
    spec = spec_of(temperature=0.6)
    r = sampled(spec)
    prompt = jnp.broadcast_to(jnp.asarray(PROMPTS[0])[None, :], (3, 4))
    tokens = jnp.concatenate([prompt, r.tokens[:3]], axis=1)
    valid = jnp.concatenate([jnp.ones((3, 4), bool), r.mask[:3]], axis=1)
    hidden = transformer.trunk(params_of(), TINY, tokens, valid, dtype=jnp.float32)[:, 3:-1]
    want, _ = transformer.token_logprobs(params_of(), TINY, hidden, r.tokens[:3], temperature=0.6)
    np.testing.assert_allclose(r.logprobs[:3], jnp.where(r.mask[:3], want, 0.0), atol=1e-5)


# --- what it may not depend on ---------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_batch():
    whole = sampled()
    alone = generate(params_of(), TINY, None, PROMPTS[2:3], POSITIONS[2:3], KEY, SPEC)
    assert_same(rows_of(alone, slice(None)), rows_of(whole, slice(6, 9)))
    turned = generate(params_of(), TINY, None, PROMPTS[::-1], POSITIONS[::-1], KEY, SPEC)
    assert_same(rows_of(turned, np.r_[9:12, 6:9, 3:6, 0:3]), whole)
    other = generate(params_of(), TINY, None, PROMPTS, [0, 1, 2, 3], KEY, SPEC)
    assert (np.asarray(other.tokens) != whole.tokens).any(), "positions should matter"


def test_rows_do_not_depend_on_bucket_segment_or_chunk(monkeypatch):
    whole = sampled()
    other = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec_of(segment=64))
    assert_same(other, whole)
    long = PROMPTS[:1] + [[1] * 40]  # another prompt bucket
    other = generate(params_of(), TINY, None, long, [40, 9], KEY, SPEC)
    assert_same(rows_of(other, slice(3)), rows_of(whole, slice(3)))


@pytest.mark.parametrize("slots", [1, 2, 5, 11])
def test_rows_do_not_depend_on_their_slots(slots, segments):
    """Fewer slots than rows: who ends makes room for the next, and every row is what it was."""
    whole = sampled()
    other = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, SPEC, max_rows=slots)
    assert_same(other, whole)
    lengths = whole.mask.sum(axis=1)
    # Slots wait for others at most until an eighth of them does, or a segment ends.
    least = -(-(lengths - 1).sum() // slots)
    assert least <= segments.steps() <= least + lengths.max() + SPEC.segment * len(lengths) // slots


def test_each_row_has_its_own_limit(segments):
    limits = np.array([1, 9, 2, 3, 1, 9, 4, 4, 5, 1, 1, 2])
    spec = spec_of(eos_ids=(7,))
    whole = sampled(spec)
    for slots in (None, 3):
        r = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec, limits=limits, max_rows=slots)
        length = np.minimum(limits, whole.mask.sum(axis=1))
        np.testing.assert_array_equal(r.mask, np.arange(9)[None, :] < length[:, None])
        np.testing.assert_array_equal(r.tokens, np.where(r.mask, whole.tokens, 0))
        np.testing.assert_array_equal(r.finished, whole.finished & (whole.mask.sum(axis=1) <= limits))
        np.testing.assert_allclose(r.logprobs, np.where(r.mask, whole.logprobs, 0), atol=1e-5)


def test_the_last_rows_move_into_fewer_slots(monkeypatch, segments):
    """One long row among 24: the batch is halved while it goes on, and it stays what it was."""
    monkeypatch.setattr(engine, "FEWEST_SLOTS", 3)
    spec = spec_of(group_size=6, max_new_tokens=40, eos_ids=())
    limits = np.full(24, 2)
    limits[[5, 17]] = 40, 25
    whole = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec)
    for slots in (None, 7):
        segments.clear()
        r = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec, limits=limits, max_rows=slots)
        np.testing.assert_array_equal(r.tokens, np.where(r.mask, whole.tokens, 0))
        np.testing.assert_array_equal(np.asarray(r.mask).sum(axis=1), limits)
        sizes = [rows for rows, _ in segments]
        assert sizes[-1] == 3 and sizes == sorted(sizes, reverse=True)


def test_the_cache_is_shifted_when_its_columns_end(monkeypatch):
    """A few slots and many short rows: the write column runs off, and comes back, while a long row goes on."""
    shifts, shift = [], programs.shift
    monkeypatch.setattr(programs, "shift", lambda s, by, **k: shifts.append(by) or shift(s, by, **k))
    spec = spec_of(group_size=16, max_new_tokens=24, eos_ids=())
    limits = np.random.default_rng(0).integers(1, 6, 64)
    limits[[3, 20, 40]] = 24
    whole = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec)
    r = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec, limits=limits, max_rows=3)
    np.testing.assert_array_equal(np.asarray(r.mask).sum(axis=1), limits)
    np.testing.assert_array_equal(r.tokens, np.where(r.mask, whole.tokens, 0))
    np.testing.assert_allclose(r.logprobs, np.where(r.mask, whole.logprobs, 0), atol=1e-5)
    assert len(shifts) >= 2 and min(shifts) > 0


def test_one_sample_a_prompt_is_the_first_of_the_group():
    one = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec_of(group_size=1))
    assert_same(one, rows_of(sampled(), slice(0, 12, 3)))


def test_one_token():
    one = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec_of(max_new_tokens=1))
    np.testing.assert_array_equal(one.tokens, sampled().tokens[:, :1])
    assert np.asarray(one.mask).all()


def test_a_mesh_gives_the_same(monkeypatch):
    """2 x 2 x 2 devices; five prompts are padded to eight, two a shard."""
    cfg = base.get_config()
    layout = Layout(make_mesh(2, 2, 2), tuple(cfg.mesh.rules))
    params = jax.device_put(params_of(), shardings(layout, transformer.param_specs(TINY)))
    prompts, positions = PROMPTS + [[30, 31]], POSITIONS + [44]
    traces = count_traces(monkeypatch)
    meshed = generate(params, TINY, layout, prompts, positions, KEY, SPEC)
    assert meshed.tokens.shape[0] == 15
    assert_same(rows_of(meshed, slice(12)), sampled())
    generate(params, TINY, layout, prompts, positions, jax.random.key(7), SPEC)
    assert traces == ["prefill", "decode_step", "decode_step"], "none in the second step"
    # Two slots a shard, each with its shard's own queue of six.
    slots = generate(params, TINY, layout, prompts, positions, KEY, SPEC, max_rows=8)
    assert_same(rows_of(slots, slice(12)), sampled())


# --- what it costs ---------------------------------------------------------------------------------------


def test_segments_cover_the_limit_and_stop_when_all_rows_have_ended(segments):
    r = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec_of(eos_ids=()))
    assert segments == [(12, 4), (12, 8)] and segments.steps() == 8
    assert np.asarray(r.mask).all() and not np.asarray(r.finished).any()
    segments.clear(), segments.columns.clear()
    r = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec_of(segment=2, eos_ids=MOST))
    slowest = np.asarray(r.mask).sum(1).max()
    # Inside its last segment too, decoding ends with the last row.
    assert (
        segments == [(12, 2), (12, 4), (12, 6)][: -(-(slowest - 1) // 2)] and segments.steps() == slowest - 1
    )
    segments.clear()
    r = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec_of(eos_ids=tuple(range(60))))
    assert segments == [] and np.asarray(r.finished).all() and np.asarray(r.mask).sum() == 12


def test_nothing_is_compiled_twice(monkeypatch):
    spec = spec_of(max_new_tokens=6)  # of this test alone
    traces = count_traces(monkeypatch)
    generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec)
    assert traces == ["prefill", "decode_step", "decode_step"]
    changed = jax.tree.map(lambda x: x * 1.01, params_of())
    generate(changed, TINY, None, [[1, 2], [3], [4] * 32, [5]], [7, 8, 9, 10**6], jax.random.key(1), spec)
    weights = rollout_weights(changed, TINY, None, "float32")
    generate(weights, TINY, None, PROMPTS, POSITIONS, KEY, dataclasses.replace(spec))
    assert len(traces) == 3


def test_sizes_are_few_and_fit():
    assert [engine._bucket(n) for n in (1, 7, 8, 9, 12, 13, 100, 128, 129)] == [
        1,
        7,
        8,
        10,
        12,
        14,
        112,
        128,
        160,
    ]
    assert engine._slots_a_shard(64, 2, None) == 64
    assert engine._slots_a_shard(64, 2, 1000) == 64
    assert engine._slots_a_shard(64, 2, 31) == 15
    with pytest.raises(ValueError, match="max_rows 1 .* 2 batch shards"):
        engine._slots_a_shard(64, 2, 1)


def test_weights_are_cast_once_and_norms_kept():
    cast = rollout_weights(params_of(), TINY, None, "bfloat16")
    assert cast["embed"].dtype == cast["layers"]["q"].dtype == jnp.bfloat16
    assert cast["layers"]["attn_norm"].dtype == cast["final_norm"].dtype == jnp.float32
    r = generate(cast, TINY, None, PROMPTS, POSITIONS, KEY, spec_of(dtype="bfloat16"))
    again = generate(params_of(), TINY, None, PROMPTS, POSITIONS, KEY, spec_of(dtype="bfloat16"))
    assert_same(r, again)
    same = rollout_weights(cast, TINY, None, "bfloat16")
    assert same["embed"].unsafe_buffer_pointer() == cast["embed"].unsafe_buffer_pointer()


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, positions, spec, message",
    [
        ([], [], SPEC, "0 prompts"),
        ([[1]], [1, 2], SPEC, "1 prompts with 2 positions"),
        ([[1], []], [1, 2], SPEC, "prompt 1 is empty"),
        ([[1], [3, 60]], [1, 2], SPEC, "prompt 1 holds the ids 3 to 60, but the model has 60"),
        ([[1]], [1], spec_of(eos_ids=(60,)), "EOS id 60"),
    ],
)
def test_bad_input_is_named(prompts, positions, spec, message):
    with pytest.raises(ValueError, match=message):
        generate(params_of(), TINY, None, prompts, positions, KEY, spec)


def test_nan_weights_are_not_sampled_from():
    params = params_of()
    broken = params | {"final_norm": params["final_norm"] * jnp.nan}
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(broken, TINY, None, PROMPTS, POSITIONS, KEY, SPEC)


# --- text ------------------------------------------------------------------------------------------------


def test_text_loses_an_eos_that_was_sampled_and_nothing_else():
    rollout = Rollout(
        tokens=jnp.array([[5, 6, 7, 0], [7, 0, 0, 0], [5, 0, 6, 4]]),
        mask=jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool),
        logprobs=jnp.zeros((3, 4)),
        finished=jnp.array([True, True, False]),
    )
    decode = lambda ids: "-".join(map(str, ids))  # noqa: E731
    out = completions(rollout, decode, (9, 7))
    assert [c.text for c in out] == ["5-6", "", "5-0-6-4"]
    assert [c.truncated for c in out] == [False, False, True]
    assert [c.tokens for c in out] == [3, 1, 4]
    with pytest.raises(ValueError, match="row 0 finished with token 7"):
        completions(rollout, decode, (9,))


# --- transformers ----------------------------------------------------------------------------------------


def from_torch(model, config):
    """A transformers state dict as our parameters: written out here, apart from the library's own table."""
    s = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    D, H, K, h = config.width, config.heads, config.kv_heads, config.head_dim
    shapes = dict(q=(D, H, h), k=(D, K, h), v=(D, K, h), o=(H, h, D))

    def stack(name, bias=False):
        of = [s[f"model.layers.{i}.{name}"] for i in range(config.layers)]
        return jnp.stack([jnp.asarray(w if w.ndim == 1 else w.T) for w in of])

    layers = {n: stack(f"self_attn.{n}_proj.weight").reshape(-1, *shape) for n, shape in shapes.items()}
    layers |= {n: stack(f"mlp.{n}_proj.weight") for n in ("gate", "up", "down")}
    layers["attn_norm"] = stack("input_layernorm.weight")
    layers["mlp_norm"] = stack("post_attention_layernorm.weight")
    if config.qkv_bias:
        layers |= {f"{n}_bias": stack(f"self_attn.{n}_proj.bias").reshape(-1, *shapes[n][1:]) for n in "qkv"}
    params = {"embed": s["model.embed_tokens.weight"], "layers": layers, "final_norm": s["model.norm.weight"]}
    if not config.tied:
        params["lm_head"] = s["lm_head.weight"]
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen2", False)])
def test_greedy_equals_transformers_generate(family, tied):
    """Ragged prompts, several EOS ids; transformers runs each prompt alone, without padding."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
    model_class = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}[family]
    hf = kind(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        pad_token_id=None,
    )
    model = model_class(hf).eval()
    config = ModelConfig.from_hf(hf.to_dict())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name and "norm" not in name:
                p.normal_(0, 1.2)  # far from the identity, or a tied model repeats its last token

    def reference(eos):
        out = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            full = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=24,
                eos_token_id=eos,
                pad_token_id=0,
            )
            out.append(full[0, len(prompt) :].tolist())
        return out

    free = reference(None)
    assert all(len(set(row)) > 5 for row in free), "rows that repeat a token show little"
    eos = (free[0][15], free[2][6])
    want = reference(list(eos))
    assert any(len(row) < 24 for row in want)
    spec = spec_of(temperature=0.0, group_size=1, max_new_tokens=24, eos_ids=eos, segment=15)
    got = jax.device_get(generate(from_torch(model, config), config, None, PROMPTS, POSITIONS, KEY, spec))
    assert [t[m].tolist() for t, m in zip(got.tokens, got.mask, strict=True)] == want
    assert got.finished.tolist() == [row[-1] in eos for row in want]
