"""The shape of a transformer, read from and written to Hugging Face's `config.json`.

Two families share one architecture (RMSNorm, rotary embeddings, grouped-query attention, SwiGLU): "llama",
and "qwen2", which adds biases to q, k and v.  Unsupported settings that would change the computation (a
sliding window, another activation, another RoPE scaling, quantised weights) raise ValueError.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# Defaults of transformers for keys that config.json leaves out; None: derived from other keys.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(num_key_value_heads=None, max_position_embeddings=2048),
    "qwen2": dict(num_key_value_heads=32, max_position_embeddings=32768),
}
_HF_COMMON = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=None)
_HF_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Settings that change the computation, with the supported values.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}

# max_position_embeddings on export of a model without a limit: without the key, transformers would take its
# default for the family.
_NO_MAX_LEN = 32768

# (family, head) -> the class of transformers that config.json names.
ARCHITECTURES = {
    ("llama", "logits"): "LlamaForCausalLM",
    ("llama", "score"): "LlamaForSequenceClassification",
    ("qwen2", "logits"): "Qwen2ForCausalLM",
    ("qwen2", "score"): "Qwen2ForSequenceClassification",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of low rotary frequencies to longer contexts (Hugging Face: rope_type "llama3")."""

    factor: float  # by which the longest wavelengths are stretched
    # Bounds of the interpolation, in turns per original context length (see layers.rotary_angles).
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int  # context length of pre-training, tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture and sizes; hashable, so that it can be a static argument of jit.

    `vocab_multiple` pads the embedding's rows to a multiple, so that they divide over a mesh.  The logits of
    padded rows are -inf, and the rows are removed on export.
    """

    family: str  # llama | qwen2

    # Sizes.
    vocab_size: int
    width: int
    layers: int
    heads: int  # of the queries
    kv_heads: int  # divides `heads` (grouped-query attention)
    head_dim: int
    ffn: int  # width of the SwiGLU block

    # Rotary embeddings.
    rope_theta: float
    rope_scaling: RopeScaling | None

    # Variants of the architecture.
    norm_eps: float
    qkv_bias: bool
    tied: bool  # the language-model head is the embedding, transposed

    # Limits and padding.
    max_len: int | None  # trained context length (Hugging Face: max_position_embeddings); None: no limit
    vocab_multiple: int = 1

    def __post_init__(self):
        if self.family not in _HF_DEFAULTS:
            raise ValueError(f"model family {self.family!r} is none of {sorted(_HF_DEFAULTS)}")
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab_multiple")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model {name} is {getattr(self, name)}: it must be at least 1")

        # Each key/value head serves heads / kv_heads queries; RoPE rotates pairs of components.
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads do not divide over {self.kv_heads} key/value heads: "
                "heads must be a multiple of kv_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embeddings need an even one")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def keep_layers(self, n: int) -> ModelConfig:
        """Return the config of the model's first n layers; 0 keeps all.

        Raises ValueError if the model has fewer.
        """
        if n < 0 or n > self.layers:
            raise ValueError(
                f"num_layers is {n}, but the model has {self.layers} layers: use 0 to {self.layers}"
            )
        return dataclasses.replace(self, layers=n) if n else self

    @classmethod
    def from_arch(cls, arch: Any, vocab_size: int, vocab_multiple: int = 1) -> ModelConfig:
        """Make the config of a model with random weights; arch: a section `arch` of configs/base.py."""
        return cls(
            family=arch.family,
            vocab_size=vocab_size,
            width=arch.width,
            layers=arch.layers,
            heads=arch.heads,
            kv_heads=arch.kv_heads,
            head_dim=arch.head_dim,
            ffn=arch.ffn,
            rope_theta=arch.rope_theta,
            rope_scaling=None,
            norm_eps=1e-6,
            qkv_bias=arch.family == "qwen2",
            tied=arch.tied,
            max_len=None,
            vocab_multiple=vocab_multiple,
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Convert Hugging Face's config.json, as written by transformers 4 or 5.

        Raises ValueError, naming `where` (the file) and the key, for an unknown model type, a missing key, or
        an unsupported setting.
        """
        # Refuse everything that this code would compute differently than transformers.
        family = hf.get("model_type")
        if family not in _HF_DEFAULTS:
            raise ValueError(f"{where}: model_type {family!r} is none of {sorted(_HF_DEFAULTS)}")
        missing = [k for k in _HF_REQUIRED if k not in hf]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}")
        for key, allowed in _HF_FIXED.items():
            if key in hf and hf[key] not in allowed:
                raise ValueError(f"{where}: {key} is {hf[key]!r}; only {allowed[0]!r} is supported")
        layer_types = set(hf["layer_types"] or ()) if "layer_types" in hf else set()
        if layer_types - {"full_attention"}:
            raise ValueError(
                f"{where}: layer_types has {sorted(layer_types)}; only full_attention is supported"
            )

        # Keys that config.json leaves out have the defaults of transformers.
        full = {**_HF_COMMON, **_HF_DEFAULTS[family], **hf}
        heads, kv_heads, head_dim = full["num_attention_heads"], full["num_key_value_heads"], full["head_dim"]
        if head_dim is None and full["hidden_size"] % heads:
            raise ValueError(
                f"{where}: hidden_size {full['hidden_size']} does not divide over {heads} heads; "
                "give head_dim"
            )
        theta, scaling = _rope_from_hf(hf, where)

        # The checks of __post_init__ do not know the file, so its name is added here.
        try:
            return cls(
                family=family,
                vocab_size=full["vocab_size"],
                width=full["hidden_size"],
                layers=full["num_hidden_layers"],
                heads=heads,
                kv_heads=heads if kv_heads is None else kv_heads,
                head_dim=full["hidden_size"] // heads if head_dim is None else head_dim,
                ffn=full["intermediate_size"],
                rope_theta=theta,
                rope_scaling=scaling,
                norm_eps=full["rms_norm_eps"],
                qkv_bias=family == "qwen2",
                tied=full["tie_word_embeddings"],
                max_len=full["max_position_embeddings"],
            )
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e

    def to_hf(self, architecture: str) -> dict[str, Any]:
        """Convert to config.json for `transformers`.

        RoPE is written under the keys of version 4, which version 5 reads, too.
        """
        scaling = None
        if self.rope_scaling is not None:
            scaling = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_len,
            }

        out = {
            "architectures": [architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": _NO_MAX_LEN if self.max_len is None else self.max_len,
            "initializer_range": 0.02,
            "use_cache": True,
        }

        # The settings of _HF_FIXED that this family has.
        if self.family == "llama":
            out |= {"attention_bias": False, "mlp_bias": False}
        else:
            out |= {"use_sliding_window": False}
        return out


def _rope_from_hf(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Read RoPE's base and scaling from `rope_parameters` (transformers 5), or from version 4's two keys."""
    # Version 5 has the base and the scaling in one dict; version 4 has the base at the top level.
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if key in hf and hf[key] is not None:
            rope |= hf[key]
    # Later entries win: the dict, then the top level, then transformers' defaults.
    flat = {"rope_theta": 10000.0, "type": "default", **hf, **rope}
    theta = float(flat["rope_theta"])

    # Old files write "type" instead of "rope_type".
    kind = rope["rope_type"] if "rope_type" in rope else flat["type"]
    if kind == "default":
        return theta, None

    if kind != "llama3":
        raise ValueError(f"{where}: rope type {kind!r} is not supported; default and llama3 are")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [k for k in keys if k not in rope]
    if missing:
        raise ValueError(f"{where}: the llama3 rope scaling lacks {', '.join(missing)}")
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_len=int(rope["original_max_position_embeddings"]),
    )
    return theta, scaling
