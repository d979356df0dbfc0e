"""Every model family against transformers: logits, scores, greedy rollouts, and exports that load again."""

import dataclasses
import functools

import family_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY_CASES, one_device, torch_model
from tiny_rollouts import KEY, spec_of

from cooper_jax.configs import base
from cooper_jax.model import generation, layer_loops, transformer, weight_export, weights
from cooper_jax.model.config import LayerKind, ModelConfig
from cooper_jax.model.families import FAMILIES
from cooper_jax.model.rope import LinearScaling, Rope
from cooper_jax.rollout.engine import generate

TOKENS = 24
NEW = 12  # tokens of a rollout: more than any window
PROMPTS = [[3, 5, 8, 13, 21, 34, 55, 1], [21, 2, 9], [4, 44, 14, 41, 50, 6, 17, 8, 11, 30, 2]]


@functools.partial(jax.jit, static_argnums=1)
def hidden_of(params, config, tokens, valid):
    return transformer.hidden_states(params, config, tokens, valid, dtype=jnp.float32, layout=one_device())


def logits_and_scores(model, reward, tokens, valid):
    """Ours: f32[N, S, V] of the policy and f32[N] of the classifier; one program runs both trunks."""
    shared = [{k: m.params[k] for k in ("embed", "layers", "final_norm")} for m in (model, reward)]
    hidden = [hidden_of(p, model.config, jnp.asarray(tokens), jnp.asarray(valid)) for p in shared]
    logits = transformer.compute_logits(model.params, model.config, hidden[0])
    scores = transformer.score_last_token(reward.params, reward.config, hidden[1], jnp.asarray(valid))
    return np.asarray(logits), np.asarray(scores)


def load(directory, head="logits"):
    return weights.load_weights(str(directory), head=head, layout=one_device())


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_logits_and_scores_equal_transformers(name, tmp_path):
    """Read from what transformers saves, with ragged rows; then what we export, which transformers reads."""
    torch = pytest.importorskip("torch")
    import transformers

    c = FAMILY_CASES[name]
    policy, classifier = torch_model(c), torch_model(c, "score")
    policy.save_pretrained(tmp_path / "policy")
    classifier.save_pretrained(tmp_path / "reward")
    model, reward = load(tmp_path / "policy"), load(tmp_path / "reward", "score")
    assert model.config == reward.config == c and reward.head_trained

    # Right-padded for transformers, with its pad id; left-padded for us, with another.
    lengths = np.array([TOKENS, 9, 1])
    tokens = np.random.default_rng(1).integers(2, c.vocab_size, (3, TOKENS))
    right = np.arange(TOKENS)[None] < lengths[:, None]
    ids, mask = torch.tensor(np.where(right, tokens, 0)), torch.tensor(right)
    left = right[:, ::-1]
    padded = np.full(tokens.shape, 7)
    padded[left] = tokens[right]
    logits, scores = logits_and_scores(model, reward, padded, left)
    with torch.no_grad():
        their_logits = policy(ids, attention_mask=mask).logits.numpy()
        their_scores = classifier(ids, attention_mask=mask).logits.numpy()[:, 0]
    assert np.abs(their_logits).max() > 1  # a comparison of something
    np.testing.assert_allclose(logits[left], their_logits[right], atol=1e-4, rtol=0)
    np.testing.assert_allclose(scores, their_scores, atol=1e-4, rtol=0)

    # Out: the same logits and scores, bit for bit, in the same library.
    for loaded, head, auto, want in (
        (model, "logits", transformers.AutoModelForCausalLM, their_logits[right]),
        (reward, "score", transformers.AutoModelForSequenceClassification, their_scores),
    ):
        out = tmp_path / f"{head}_out"
        weight_export.save_pretrained(out, loaded.config, loaded.params, head, pad_token_id=0)
        again, info = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            got = again.eval()(ids, attention_mask=mask).logits.numpy()
        np.testing.assert_array_equal(got[right] if head == "logits" else got[:, 0], want)
        assert load(out, head).config == c


def make_lively(model):
    """Make the layers matter, norms and attention too: with small weights a tied model repeats its last token."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.2 if "layers" in name else 0.03
            if "norm" in name:
                scale = 3.0 if "q_norm" in name else 1.0
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def greedy_of_transformers(model) -> list[list[int]]:
    """Each prompt alone, without padding."""
    import torch

    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        rows.append(out[0, len(prompt) :].tolist())
    return rows


# Layers that are all alike, or each in a stack of its own, are run by code that test_rollout.py covers.
@pytest.mark.parametrize(
    ("name", "alone", "slots"),
    [
        ("qwen3", 8, None),
        ("smollm3", 8, None),
        ("mistral_window", 0, 2),
        pytest.param("gemma3", 8, 2, marks=pytest.mark.slow),
        ("gemma3", 0, None),
    ],
)
def test_greedy_rollouts_equal_generate(name, alone, slots, tmp_path, monkeypatch):
    """alone 0: all layers in one stack, through which a loop runs.  slots 2: of three prompts one waits."""
    pytest.importorskip("torch")
    monkeypatch.setattr(generation, "LAYERS_ALONE", alone)
    model = make_lively(torch_model(FAMILY_CASES[name]))
    model.save_pretrained(tmp_path / "m")
    want = greedy_of_transformers(model)
    assert len(set(sum(want, []))) > 7, "rows that repeat a token show little"

    loaded = load(tmp_path / "m")
    spec = spec_of(temperature=0.0, group_size=1, max_new_tokens=NEW, eos_ids=(), segment=NEW)
    positions = range(len(PROMPTS))
    rollout = generate(
        loaded.params, loaded.config, one_device(), PROMPTS, list(positions), KEY, spec, max_rows=slots
    )
    assert jax.device_get(rollout.tokens).tolist() == want


# --- configs as published ----------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, max_position_embeddings=32768,
)  # fmt: skip


def test_gemma_3_reads_the_same_from_both_generations_of_config_json():
    """As google/gemma-3-1b-it publishes it, for transformers 4, and as version 5 writes it."""
    older = SIZES | dict(
        model_type="gemma3_text", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=None, sliding_window=512, sliding_window_pattern=6,
        attn_logit_softcapping=None, final_logit_softcapping=None,
    )  # fmt: skip
    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)]
    newer = {
        k: v for k, v in older.items() if not k.startswith("rope") and k != "sliding_window_pattern"
    } | dict(
        layer_types=types,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    c = ModelConfig.from_hf(older)
    assert c == ModelConfig.from_hf(newer) == ModelConfig.from_hf(c.to_hf("Gemma3ForCausalLM"))
    assert (
        c.tied
        and c.layer_kinds[0] == LayerKind(512, Rope(1e4))
        and c.layer_kinds[5] == LayerKind(None, Rope(1e6))
    )
    assert c.keep_layers(7).layer_types == ("sliding",) * 5 + ("full", "sliding")
    scaled = newer | dict(rope_scaling=None, rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, "sliding_attention": None,
    })  # fmt: skip
    assert ModelConfig.from_hf(scaled).layer_kinds[5].rope == Rope(1e6, LinearScaling(8.0))
    scaled["rope_parameters"]["sliding_attention"] = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="sliding_attention is .*only default is supported"):
        ModelConfig.from_hf(scaled)


def test_layers_that_config_json_leaves_out_are_those_of_transformers():
    """Four layers of every family, made from transformers' own defaults for the layers."""
    pytest.importorskip("torch")
    import transformers

    for name, settings in {
        "Qwen2": {}, "Qwen3": dict(use_sliding_window=True, sliding_window=9, max_window_layers=3),
        "Mistral": {}, "SmolLM3": {}, "Gemma3Text": dict(sliding_window=9),
    }.items():  # fmt: skip
        theirs = getattr(transformers, f"{name}Config")(**SIZES | settings | {"num_hidden_layers": 8})
        left_out = ("layer_types", "no_rope_layers")
        c = ModelConfig.from_hf({k: v for k, v in theirs.to_dict().items() if k not in left_out})
        assert c == ModelConfig.from_hf(theirs.to_dict()), name
        if name == "SmolLM3":
            assert [t == "full" for t in c.layer_types] == list(map(bool, theirs.no_rope_layers))
            assert c.rope_theta == 2e6
        elif name == "Mistral":
            assert c.layer_types == ("sliding",) * 8 and c.window == theirs.sliding_window == 4096
        else:
            want = tuple(t.removesuffix("_attention") for t in theirs.layer_types)
            assert (c.layer_types or ("full",) * 8) == want, name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_from_scratch_is_exported_as_it_computes(name):
    """With the layers that its family has by default, whatever transformers' defaults for other fields."""
    arch = base.arch()
    arch.update(family=name, layers=8)
    c = ModelConfig.from_arch(arch, vocab_size=100)
    again = ModelConfig.from_hf(c.to_hf(FAMILIES[name].causal_class))
    assert dataclasses.replace(again, max_len=None) == c
    assert len(set(c.layer_kinds)) == (2 if name in ("smollm3", "gemma3_text") else 1)


# --- layers of several kinds -------------------------------------------------------------------------------

A, B = LayerKind(None, Rope(1.0)), LayerKind(4, Rope(2.0))


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ((A,) * 28, [((A,), 28)]),
        ((B,) * 5 + (A,), [((B,), 5), ((A,), 1)]),
        (((B,) * 5 + (A,)) * 4 + (B,) * 2, [((B,) * 5 + (A,), 4), ((B,), 2)]),
        ((A, A, A, B) * 9, [((A, A, A, B), 9)]),
        ((A,) * 28 + (B,) * 8, [((A,), 28), ((B,), 8)]),
        ((A, B, A), [((A,), 1), ((B,), 1), ((A,), 1)]),
    ],
)
def test_layers_are_cut_into_few_loops(kinds, groups):
    """Gemma 3 1B's bodies have 7 layers, SmolLM3's 4, those of layers that are all alike 1."""
    found = layer_loops.group_layers(kinds)
    assert [(g.kinds, g.repeats) for g in found] == groups
    assert sum((g.kinds * g.repeats for g in found), ()) == kinds


def test_loops_visit_every_layer_once_and_in_order():
    kinds = (B, A) * 3 + (B,)
    weights = {"w": jnp.arange(1.0, 8.0)}

    def scanned(x, w, kind):
        x = 10 * x + w["w"] + (0 if kind is A else 0.5)
        return x, x

    x, outputs = layer_loops.make_layer_scan(scanned)(jnp.float32(0), weights, kinds)
    want = [0.0]
    for i, kind in enumerate(kinds):
        want.append(10 * want[-1] + i + 1 + (0 if kind is A else 0.5))
    np.testing.assert_allclose(outputs, want[1:])
    assert x == outputs[-1]

    def looped(i, x, kind):
        return 10 * x + weights["w"][i] + (0 if kind is A else 0.5)

    np.testing.assert_allclose(layer_loops.loop_layers(looped, jnp.float32(0), kinds), want[-1])


# --- the documentation -------------------------------------------------------------------------------------


def test_the_table_of_models_is_that_of_the_code():
    """docs/models.md; `python tests/family_table.py --write` renews it."""
    assert family_table.read_table() == family_table.format_table()
