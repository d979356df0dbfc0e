"""Model families: what each one's config.json says, and how its architecture differs from Llama's.

A family is one entry of FAMILIES: data, and two small functions for the layers that differ from others of the
same model.  docs/adding_a_model.md tells how to add one.

`Layers` says, for every layer, which tokens it attends to and whether it rotates queries and keys:

    full        all tokens up to the query's own
    sliding     the last `window` of them, the query's own included
    unrotated   all, without rotary embeddings (NoPE)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cooper_jax.settings.value_rules import show_value

LAYER_TYPES = ("full", "sliding", "unrotated")

# Hugging Face's names of the types that `layer_types` lists.
_HF_LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}


class Layers(NamedTuple):
    """The layers' types.  types: one per layer; empty if all are full.  window: None without sliding layers."""

    types: tuple[str, ...] = ()
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family, in the terms of Hugging Face's config.json and of `ModelConfig`."""

    # Classes of transformers: a language model, and a sequence classifier with one label.
    causal_class: str
    score_class: str
    models: str  # published models, for the table in docs/models.md

    # config.json.
    defaults: dict[str, Any]  # of transformers, for keys that a file leaves out; None: derived from others
    supported: Mapping[str, tuple[Any, ...]]  # settings that change the computation: values that are built
    read_layers: Callable[[Mapping[str, Any]], Layers]  # from a file, with the defaults
    write_layers: Callable[[Layers, int], dict[str, Any]]  # the inverse; the int is the number of layers
    architecture: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of ModelConfig
    rope_theta: float = 10000.0  # default
    sliding_rope_theta: float | None = None  # default of sliding layers; None: as the other layers

    # GGUF: the architecture's name in llama.cpp; None: not read.
    gguf: str | None = None
    gguf_permuted: bool = False  # the rows of q and k are reordered, as llama.cpp does for Llama


# --- layers ----------------------------------------------------------------------------------------------


def _read_listed_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Read `layer_types`; raises ValueError for a type that is not built."""
    unknown = sorted(set(hf["layer_types"]) - set(_HF_LAYER_TYPES))
    if unknown:
        raise ValueError(
            f"layer_types has {show_value(unknown)}; only {' and '.join(_HF_LAYER_TYPES)} are supported"
        )
    if len(hf["layer_types"]) != hf["num_hidden_layers"]:
        raise ValueError(
            f"layer_types has {len(hf['layer_types'])} entries for {hf['num_hidden_layers']} layers"
        )
    return tuple(_HF_LAYER_TYPES[t] for t in hf["layer_types"])


def _write_listed_types(layers: Layers, count: int) -> list[str]:
    names = {ours: theirs for theirs, ours in _HF_LAYER_TYPES.items()}
    return [names[t] for t in layers.types or ("full",) * count]


def _make_layers(types: tuple[str, ...], window: int | None) -> Layers:
    """Make Layers of listed types; all full is written as no types.

    Raises ValueError for sliding layers without a window.
    """
    if "sliding" not in types:
        window = None
    elif window is None:
        raise ValueError("layer_types has sliding_attention, but sliding_window is None: give the window")
    return Layers(types if set(types) - {"full"} else (), window)


def _read_full_layers(hf: Mapping[str, Any]) -> Layers:
    """Read layers that are all full: a list of types may say so, and nothing else."""
    if hf["layer_types"] is not None and set(_read_listed_types(hf)) != {"full"}:
        raise ValueError("layer_types has sliding_attention; this family's windows are not supported")
    return Layers()


def _read_qwen_layers(hf: Mapping[str, Any]) -> Layers:
    """Read the layers of Qwen: with `use_sliding_window`, those from `max_window_layers` on slide."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    if hf["layer_types"] is not None:
        return _make_layers(_read_listed_types(hf), window)
    if window is None:
        return Layers()
    full = min(hf["max_window_layers"], hf["num_hidden_layers"])
    return _make_layers(("full",) * full + ("sliding",) * (hf["num_hidden_layers"] - full), window)


def _write_qwen_layers(layers: Layers, count: int) -> dict[str, Any]:
    if layers.window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": layers.window,
        "max_window_layers": layers.types.index("sliding"),
        "layer_types": _write_listed_types(layers, count),
    }


def _read_mistral_layers(hf: Mapping[str, Any]) -> Layers:
    """Read the layers of Mistral: all slide, or none."""
    if hf["layer_types"] is not None:
        raise ValueError(
            f"layer_types is {show_value(hf['layer_types'])}; Mistral's layers are all of one type: remove it, "
            "sliding_window says which"
        )
    if hf["sliding_window"] is None:
        return Layers()
    return Layers(("sliding",) * hf["num_hidden_layers"], hf["sliding_window"])


def _read_smollm3_layers(hf: Mapping[str, Any]) -> Layers:
    """Read the layers of SmolLM3: `no_rope_layers` has a 1 for each layer that rotates.

    Without it every `no_rope_layer_interval`-th does not rotate.
    """
    count, listed = hf["num_hidden_layers"], hf["no_rope_layers"]
    if listed is None:
        listed = [int((i + 1) % hf["no_rope_layer_interval"] != 0) for i in range(count)]
    if len(listed) < count:
        raise ValueError(f"no_rope_layers has {len(listed)} entries for {count} layers")
    _read_full_layers(hf)  # windows are refused; layers that do not rotate are listed as full
    types = tuple("full" if rotates else "unrotated" for rotates in listed[:count])
    return _make_layers(types, None)


def _write_smollm3_layers(layers: Layers, count: int) -> dict[str, Any]:
    types = layers.types or ("full",) * count
    return {"no_rope_layers": [int(t == "full") for t in types], "use_sliding_window": False}


def _read_gemma3_layers(hf: Mapping[str, Any]) -> Layers:
    """Read the layers of Gemma 3: every `sliding_window_pattern`-th is full, the others slide."""
    if hf["layer_types"] is not None:
        return _make_layers(_read_listed_types(hf), hf["sliding_window"])
    pattern = hf["sliding_window_pattern"]
    types = tuple("sliding" if (i + 1) % pattern else "full" for i in range(hf["num_hidden_layers"]))
    return _make_layers(types, hf["sliding_window"])


# --- the families ----------------------------------------------------------------------------------------

_COMMON: dict[str, Any] = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=None, layer_types=None)
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
# Families without these keys do not read them: Qwen 2 has the biases of q, k and v whatever its files say.
_ATTENTION_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,)}
_BIASES: dict[str, tuple[Any, ...]] = _ATTENTION_BIAS | {"mlp_bias": (False,)}
_QWEN = _COMMON | dict(
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)

# By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        causal_class="LlamaForCausalLM",
        score_class="LlamaForSequenceClassification",
        models="Llama 2, 3, 3.1, 3.2 (text), 3.3; SmolLM2; TinyLlama",
        defaults=_COMMON | dict(num_key_value_heads=None, max_position_embeddings=2048),
        supported=_SUPPORTED | _BIASES | {"use_sliding_window": (False,)},
        read_layers=_read_full_layers,
        write_layers=lambda layers, count: {"attention_bias": False, "mlp_bias": False},
        gguf="llama",
        gguf_permuted=True,
    ),
    "qwen2": Family(
        causal_class="Qwen2ForCausalLM",
        score_class="Qwen2ForSequenceClassification",
        models="Qwen2, Qwen2.5, Qwen2.5-Math, Qwen2.5-Coder; DeepSeek-R1-Distill-Qwen",
        defaults=_QWEN,
        supported=_SUPPORTED,
        read_layers=_read_qwen_layers,
        write_layers=_write_qwen_layers,
        architecture=dict(qkv_bias=True),
        gguf="qwen2",
    ),
    "qwen3": Family(
        causal_class="Qwen3ForCausalLM",
        score_class="Qwen3ForSequenceClassification",
        models="Qwen3 (dense)",
        defaults=_QWEN | dict(head_dim=128),
        supported=_SUPPORTED | _ATTENTION_BIAS,
        read_layers=_read_qwen_layers,
        write_layers=lambda layers, count: {"attention_bias": False} | _write_qwen_layers(layers, count),
        architecture=dict(qk_norm=True),
        gguf="qwen3",
    ),
    "mistral": Family(
        causal_class="MistralForCausalLM",
        score_class="MistralForSequenceClassification",
        models="Mistral 7B v0.1 to v0.3; Mistral Nemo",
        defaults=_COMMON | dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
        supported=_SUPPORTED,
        read_layers=_read_mistral_layers,
        write_layers=lambda layers, count: {"sliding_window": layers.window},
    ),
    "smollm3": Family(
        causal_class="SmolLM3ForCausalLM",
        score_class="SmolLM3ForSequenceClassification",
        models="SmolLM3",
        defaults=_COMMON
        | dict(
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            no_rope_layers=None,
            no_rope_layer_interval=4,
        ),
        supported=_SUPPORTED | _BIASES | {"use_sliding_window": (False,)},
        read_layers=_read_smollm3_layers,
        write_layers=_write_smollm3_layers,
        rope_theta=2e6,
    ),
    "gemma3_text": Family(
        causal_class="Gemma3ForCausalLM",
        score_class="Gemma3TextForSequenceClassification",
        models="Gemma 3 270M and 1B (text only)",
        defaults=_COMMON
        | dict(
            num_key_value_heads=4,
            head_dim=256,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
            sliding_window=4096,
            sliding_window_pattern=6,
            query_pre_attn_scalar=256,
        ),
        supported={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False,),
            "quantization_config": (None,),
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        read_layers=_read_gemma3_layers,
        write_layers=lambda layers, count: {
            "sliding_window": layers.window,
            "layer_types": _write_listed_types(layers, count),
        },
        architecture=dict(
            qk_norm=True,
            post_norms=True,
            norm_offset=1.0,
            activation="gelu_tanh",
            scaled_embedding=True,
        ),
        rope_theta=1e6,
        sliding_rope_theta=1e4,
        gguf="gemma3",
    ),
}
