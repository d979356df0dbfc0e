"""Small random models of all families, ours and transformers', with the same weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cooper_jax.configs import base
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.families import FAMILIES
from cooper_jax.model.rope import LinearScaling, RopeScaling
from cooper_jax.model.transformer import param_specs
from cooper_jax.runtime import device_layouts
from cooper_jax.runtime.mesh import Layout, is_spec


@functools.cache
def one_device() -> Layout:
    """The layout of a run on one device, as a trainer makes it."""
    return device_layouts.make_layouts(base.get_config(), jax.devices()[:1])["policy"]


def config(**changes) -> ModelConfig:
    base = dict(
        family="llama",
        vocab_size=61,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=48,
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-6,
        qkv_bias=False,
        tied=True,
        max_len=256,
    )
    family = FAMILIES[changes.get("family", "llama")]
    return ModelConfig(**(base | family.architecture | changes))


CASES = {
    "llama_tied": config(),
    "llama_untied_one_kv_head": config(tied=False, kv_heads=1, norm_eps=1e-5),
    # Original context 16: at 24 tokens some frequencies are kept, some blended, some stretched.
    "llama3_rope": config(
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), rope_theta=500.0, head_dim=16, layers=3
    ),
    "llama_head_dim_apart_from_width": config(head_dim=22, heads=2, kv_heads=2),
    "qwen2_tied": config(family="qwen2", rope_theta=1e6),
    "qwen2_untied": config(family="qwen2", tied=False, norm_eps=1e-5, layers=1),
    "qwen2_seven_to_one": config(family="qwen2", width=56, heads=14, kv_heads=2, head_dim=4),
}


# The other families, and what only some models of a family have.  Windows are shorter than the rows of the tests.
# Gemma's layers are a pattern that repeats and a rest.
FAMILY_CASES = {
    "llama_linear_rope": config(rope_scaling=LinearScaling(4.0), layers=1),
    "qwen2_windows": config(family="qwen2", layer_types=("full", "sliding"), window=5),
    "qwen3": config(family="qwen3", tied=False, head_dim=16, rope_theta=1e6),
    "mistral": config(family="mistral", tied=False, norm_eps=1e-5, layers=1),
    "mistral_window": config(family="mistral", tied=False, layer_types=("sliding",) * 2, window=6),
    "smollm3": config(family="smollm3", rope_theta=5e3, layer_types=("full", "unrotated")),
    "gemma3": config(
        family="gemma3_text", layers=5, head_dim=16, heads=2, kv_heads=1, rope_theta=1e6,
        rope_scaling=LinearScaling(8.0), query_pre_attn_scalar=24, window=5,
        layer_types=("sliding", "full", "sliding", "full", "sliding"), sliding_rope_theta=100.0,
    ),
}  # fmt: skip


def random_params(config: ModelConfig, head: str = "logits", seed: int = 0):
    """Parameters in which nothing is zero or one, so that no norm or bias can go missing unseen."""
    rng = np.random.default_rng(seed)

    def make(spec):
        mean = 1.0 if spec.init == "ones" else 0.0
        return jnp.asarray(rng.normal(mean, 0.1, spec.shape), jnp.float32)

    return jax.tree.map(make, param_specs(config, head), is_leaf=is_spec)


def torch_model(config: ModelConfig, head: str = "logits", pad_token_id: int = 0):
    """transformers' model of this shape with random weights, the same each time; skips where torch is absent."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    common = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        max_position_embeddings=config.max_len,
        pad_token_id=pad_token_id,
        eos_token_id=1,
        num_labels=1,
    )
    name = {
        "llama": "Llama",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "mistral": "Mistral",
        "smollm3": "SmolLM3",
        "gemma3_text": "Gemma3Text",
    }[config.family]
    hf = getattr(transformers, f"{name}Config")(**common, **_layer_settings(config))
    if head == "logits":
        name = name.removesuffix("Text")
    kind = {"logits": "ForCausalLM", "score": "ForSequenceClassification"}[head]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, name + kind)(hf).eval()
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return model


def _layer_settings(config: ModelConfig) -> dict:
    """The settings of transformers' config that tell its layers apart: written by hand, apart from ours."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if isinstance(s := config.rope_scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": s.factor}
    elif s is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_len,
        }
    types = ["sliding_attention" if t == "sliding" else "full_attention" for t in config.layer_types]
    if config.family == "gemma3_text":
        sliding = {"rope_type": "default", "rope_theta": config.sliding_rope_theta}
        return dict(
            rope_parameters={"full_attention": rope, "sliding_attention": sliding},
            layer_types=types,
            sliding_window=config.window,
            query_pre_attn_scalar=config.query_pre_attn_scalar,
        )
    if config.family == "mistral":
        return dict(rope_parameters=rope, sliding_window=config.window)
    if config.family == "smollm3":
        return dict(rope_parameters=rope, no_rope_layers=[int(t == "full") for t in config.layer_types])
    if config.window is not None:
        windows = dict(use_sliding_window=True, sliding_window=config.window, layer_types=types)
        return dict(rope_parameters=rope) | windows
    return dict(rope_parameters=rope)
