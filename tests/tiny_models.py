"""Small random models of both families, ours and transformers', with the same weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cooper_jax.configs import base
from cooper_jax.model.config import ModelConfig, RopeScaling
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
        qkv_bias=changes.get("family") == "qwen2",
        tied=True,
        max_len=256,
    )
    return ModelConfig(**(base | changes))


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


def random_params(config: ModelConfig, head: str = "logits", seed: int = 0):
    """Parameters in which nothing is zero or one, so that no norm or bias can go missing unseen."""
    rng = np.random.default_rng(seed)

    def make(spec):
        mean = 1.0 if spec.init == "ones" else 0.0
        return jnp.asarray(rng.normal(mean, 0.1, spec.shape), jnp.float32)

    return jax.tree.map(make, param_specs(config, head), is_leaf=is_spec)


def torch_model(config: ModelConfig, head: str = "logits", pad_token_id: int = 0):
    """transformers' model of this shape with random weights; skips where torch is absent."""
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
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (s := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_len,
        }
    name = {"llama": "Llama", "qwen2": "Qwen2"}[config.family]
    hf = getattr(transformers, f"{name}Config")(**common, rope_parameters=rope)
    kind = {"logits": "ForCausalLM", "score": "ForSequenceClassification"}[head]
    model = getattr(transformers, name + kind)(hf).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model
