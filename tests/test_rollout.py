"""The rollout against transformers' `generate`, teacher forcing, and itself in other batches and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import one_device
from tiny_rollouts import (
    KEY,
    POSITIONS,
    PROMPTS,
    SPEC,
    TINY,
    assert_same,
    forced,
    params_of,
    rollout,
    rows_of,
    sampled,
    spec_of,
)

from cooper_jax.model import generation, transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout import batch_sizes
from cooper_jax.rollout.engine import copy_rollout_weights, decode_completions, generate
from cooper_jax.types import Rollout

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


@pytest.mark.parametrize(
    "change",
    [
        {},
        pytest.param(dict(temperature=0.6), marks=pytest.mark.slow),
        dict(temperature=1.4, top_k=8, top_p=0.9),
    ],
)
def test_logprobs_equal_teacher_forced_ones(change):
    spec = spec_of(**change)
    np.testing.assert_allclose(sampled(spec).logprobs, forced(sampled(spec), spec), atol=1e-5)


def test_the_logprobs_equal_those_of_the_loss():
    """`token_logprobs` at the same temperature: the ratio of the first update is 1."""
    spec = spec_of(temperature=0.6)
    r = sampled(spec)
    prompt = jnp.broadcast_to(jnp.asarray(PROMPTS[0])[None, :], (3, 4))
    tokens = jnp.concatenate([prompt, r.tokens[:3]], axis=1)
    valid = jnp.concatenate([jnp.ones((3, 4), bool), r.mask[:3]], axis=1)
    hidden = transformer.hidden_states(
        params_of(), TINY, tokens, valid, dtype=jnp.float32, layout=one_device()
    )[:, 3:-1]
    want, _ = transformer.token_logprobs(
        params_of(), TINY, hidden, r.tokens[:3], temperature=0.6, layout=one_device()
    )
    np.testing.assert_allclose(r.logprobs[:3], jnp.where(r.mask[:3], want, 0.0), atol=1e-5)


# --- what it may not depend on ---------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch():
    whole = sampled()
    assert_same(rollout(prompts=PROMPTS[2:3], positions=POSITIONS[2:3]), rows_of(whole, slice(6, 9)))
    turned = rollout(prompts=PROMPTS[::-1], positions=POSITIONS[::-1])
    assert_same(rows_of(turned, np.r_[9:12, 6:9, 3:6, 0:3]), whole)
    assert (rollout(positions=[0, 1, 2, 3]).tokens != whole.tokens).any(), "positions should matter"


def test_rows_do_not_depend_on_segments_or_on_other_prompts_lengths():
    whole = sampled()
    assert_same(rollout(spec_of(segment=64)), whole)
    # Prompts of 100 and 40 tokens beside: prefilled apart, and room for the longest in all.
    mixed = [[1] * 100, PROMPTS[0], [2] * 40, PROMPTS[2]]
    beside = rollout(prompts=mixed, positions=[9, 40, 8, 42])
    assert_same(rows_of(beside, slice(3, 6)), rows_of(whole, slice(3)))
    assert_same(rows_of(beside, slice(9, 12)), rows_of(whole, slice(6, 9)))
    np.testing.assert_allclose(beside.logprobs, forced(beside, prompts=mixed), atol=1e-5)


@pytest.mark.slow
def test_one_sample_a_prompt_is_the_first_of_the_group():
    assert_same(rollout(spec_of(group_size=1)), rows_of(sampled(), slice(0, 12, 3)))


def test_one_token():
    one = rollout(spec_of(max_new_tokens=1))
    np.testing.assert_array_equal(one.tokens, sampled().tokens[:, :1])
    assert one.mask.all()


# --- weights ---------------------------------------------------------------------------------------------


def test_weights_are_cast_once_and_norms_kept():
    cast = copy_rollout_weights(params_of(), TINY, one_device(), "bfloat16")
    assert isinstance(cast["layers"], tuple) and len(cast["layers"]) == TINY.layers
    assert cast["embed"].dtype == cast["layers"][0]["qkv"].dtype == jnp.bfloat16
    assert cast["layers"][1]["attn_norm"].dtype == cast["final_norm"].dtype == jnp.float32
    assert copy_rollout_weights(cast, TINY, one_device(), "bfloat16") is cast
    spec = spec_of(dtype="bfloat16", segment=64)
    r = jax.device_get(generate(cast, TINY, one_device(), PROMPTS, POSITIONS, KEY, spec))
    assert_same(r, rollout(spec))


def test_what_is_right_already_is_not_copied():
    weights = copy_rollout_weights(params_of(), TINY, one_device(), "float32")
    assert weights["embed"].unsafe_buffer_pointer() == params_of()["embed"].unsafe_buffer_pointer()


@pytest.mark.slow
def test_few_rows_read_panels(monkeypatch):
    """A rollout whose matrices have whole panels, with and without them; every decode step of it has few rows."""
    wide = tiny_models.config(vocab_size=128, width=64, head_dim=32, ffn=64, tied=False, vocab_multiple=64)
    shapes, decode = [], generation.decode_step

    def step(params, *args, **options):
        shapes.append([params["unembed"].shape, *(params["layers"][0][n].shape[1:] for n in ("qkv", "down"))])
        return decode(params, *args, **options)

    monkeypatch.setattr(generation, "decode_step", step)
    in_panels = rollout(config=wide)
    columns = (wide.heads + 2 * wide.kv_heads) * wide.head_dim
    assert columns % 64 == 0
    assert shapes[-1] == [(2, 64, 64), (columns // 64, 64, 64), (1, 64, 64)]

    other = dataclasses.replace(wide, max_len=255)  # so that nothing compiled is met again
    monkeypatch.setattr(batch_sizes, "PANEL_ROWS", 0)
    monkeypatch.setattr(batch_sizes, "FEWEST_IN_PANELS", 8)
    plain = rollout(config=other)
    assert shapes[-1] == [(64, 128), (64, columns), (64, 64)]
    assert_same(in_panels, plain)


@pytest.mark.slow
def test_a_loop_over_a_stack_equals_layers_apart(monkeypatch):
    """As models of more than LAYERS_ALONE layers run."""
    apart = sampled()
    monkeypatch.setattr(generation, "LAYERS_ALONE", 1)
    other = dataclasses.replace(TINY, max_len=255)  # so that nothing compiled is met again
    weights = copy_rollout_weights(params_of(), other, one_device(), "float32")
    (stack,) = weights["layers"]
    assert stack["q"].shape[0] == 2
    for slots in (None, 5):
        r = generate(weights, other, one_device(), PROMPTS, POSITIONS, KEY, SPEC, max_rows=slots)
        assert_same(jax.device_get(r), apart)


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, positions, spec, message",
    [
        ([], [], SPEC, "0 prompts"),
        ([[1]], [1, 2], SPEC, "1 prompts with 2 positions"),
        ([[1], []], [1, 2], SPEC, "prompt 1 is empty"),
        ([[1], [3, 60]], [1, 2], SPEC, "prompt 1 has ids from 3 to 60, but the model has 60"),
        ([[1]], [1], spec_of(eos_ids=(60,)), "EOS id 60"),
    ],
)
def test_bad_input_is_named(prompts, positions, spec, message):
    with pytest.raises(ValueError, match=message):
        rollout(spec, prompts, positions)


def test_nan_weights_are_not_sampled_from():
    params = params_of()
    broken = params | {"final_norm": params["final_norm"] * jnp.nan}
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(broken, TINY, one_device(), PROMPTS, POSITIONS, KEY, SPEC)


# --- text ------------------------------------------------------------------------------------------------


def test_text_loses_an_eos_that_was_sampled_and_nothing_else():
    rollout = Rollout(
        tokens=jnp.array([[5, 6, 7, 0], [7, 0, 0, 0], [5, 0, 6, 4]]),
        mask=jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool),
        logprobs=jnp.zeros((3, 4)),
        finished=jnp.array([True, True, False]),
    )
    decode = lambda ids: "-".join(map(str, ids))  # noqa: E731
    out = decode_completions(rollout, decode, (9, 7))
    assert [c.text for c in out] == ["5-6", "", "5-0-6-4"]
    assert [c.truncated for c in out] == [False, False, True]
    assert [c.tokens for c in out] == [3, 1, 4]
    with pytest.raises(ValueError, match="row 0 finished with token 7"):
        decode_completions(rollout, decode, (9,))


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
    got = jax.device_get(
        generate(from_torch(model, config), config, one_device(), PROMPTS, POSITIONS, KEY, spec)
    )
    assert [t[m].tolist() for t, m in zip(got.tokens, got.mask, strict=True)] == want
    assert got.finished.tolist() == [row[-1] in eos for row in want]
