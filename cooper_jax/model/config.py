"""The shape of a transformer, read from and written to Hugging Face's `config.json`.

All families share one architecture (RMSNorm, rotary embeddings, grouped-query attention, a gated feed-forward
block).  The fields of ModelConfig say where one differs; families.py says which fields a family sets.
Unsupported settings that would change the computation (another activation, another RoPE scaling, quantised
weights) raise ValueError.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cooper_jax.model.families import FAMILIES, LAYER_TYPES, Family, Layers
from cooper_jax.model.file_schema import ConfigFile, TokenIdFields
from cooper_jax.model.lora import LoraConfig
from cooper_jax.model.rope import Rope, Scaling, read_rope, write_scaling
from cooper_jax.settings.value_rules import find_record_problems, read_record, show_value

# Activations of the gated feed-forward block -> the names in config.json.
ACTIVATIONS = {"silu": {"hidden_act": "silu"}, "gelu_tanh": {"hidden_activation": "gelu_pytorch_tanh"}}

# max_position_embeddings on export of a model without a limit: without the key, transformers would take its
# default for the family.
_NO_MAX_LEN = 32768

# (family, head) -> the class of transformers that config.json names.
ARCHITECTURES = {(name, "logits"): family.causal_class for name, family in FAMILIES.items()}
ARCHITECTURES |= {(name, "score"): family.score_class for name, family in FAMILIES.items()}


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Properties in which the layers of one model may differ."""

    window: int | None  # tokens that a query attends to, its own included; None: all up to its own
    rope: Rope | None  # None: queries and keys are not rotated


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture and sizes; hashable, so that it can be a static argument of jit.

    `vocab_multiple` pads the embedding's rows to a multiple, so that they divide over a mesh.  The logits of
    padded rows are -inf, and the rows are removed on export.
    """

    family: str  # a key of families.FAMILIES

    # Sizes.
    vocab_size: int
    width: int
    layers: int
    heads: int  # of the queries
    kv_heads: int  # divides `heads` (grouped-query attention)
    head_dim: int
    ffn: int  # width of the gated feed-forward block

    # Rotary embeddings.
    rope_theta: float
    rope_scaling: Scaling

    # Variants of the architecture.
    norm_eps: float
    qkv_bias: bool
    tied: bool  # the language-model head is the embedding, transposed

    # Limits and padding.
    max_len: int | None  # trained context length (Hugging Face: max_position_embeddings); None: no limit
    vocab_multiple: int = 1

    # Further variants of the architecture.
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation
    post_norms: bool = False  # RMSNorm of what a block adds to the residual stream, too (sandwich norms)
    norm_offset: float = 0.0  # RMSNorm multiplies with offset + weight
    activation: str = "silu"  # of the feed-forward block's gate: a key of ACTIVATIONS
    scaled_embedding: bool = False  # embeddings are multiplied with sqrt(width)
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; None: head_dim

    # Layers that differ from each other; see families.py.
    layer_types: tuple[str, ...] = ()  # of families.LAYER_TYPES, one per layer; empty: all are full
    window: int | None = None  # tokens that a query of a sliding layer attends to, its own included
    # Base of sliding layers' rotary embeddings, which are not scaled; None: as in the other layers.
    sliding_rope_theta: float | None = None

    lora: LoraConfig | None = None  # adapters beside the layers' matrices, which are then frozen

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is none of {', '.join(sorted(FAMILIES))}")
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

        # Layers.
        if self.layer_types and len(self.layer_types) != self.layers:
            raise ValueError(
                f"{len(self.layer_types)} layer types for {self.layers} layers: give one for each"
            )
        if set(self.layer_types) - set(LAYER_TYPES):
            raise ValueError(f"layer types {sorted(set(self.layer_types))}: only {LAYER_TYPES} are known")
        if "sliding" in self.layer_types and (self.window is None or self.window < 1):
            raise ValueError(f"sliding layers with a window of {self.window}: it must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {sorted(ACTIVATIONS)}")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Each layer's kind."""
        rope = Rope(self.rope_theta, self.rope_scaling)
        sliding_rope = rope if self.sliding_rope_theta is None else Rope(self.sliding_rope_theta)
        kinds = {
            "full": LayerKind(None, rope),
            "sliding": LayerKind(self.window, sliding_rope),
            "unrotated": LayerKind(None, None),
        }
        return tuple(kinds[t] for t in self.layer_types or ("full",) * self.layers)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def base(self) -> ModelConfig:
        """The model without adapters."""
        return dataclasses.replace(self, lora=None)

    def keep_layers(self, n: int) -> ModelConfig:
        """Return the config of the model's first n layers; 0 keeps all.

        Raises ValueError if the model has fewer.
        """
        if n < 0 or n > self.layers:
            raise ValueError(
                f"num_layers is {n}, but the model has {self.layers} layers: use 0 to {self.layers}"
            )
        return dataclasses.replace(self, layers=n, layer_types=self.layer_types[:n]) if n else self

    @classmethod
    def from_arch(cls, arch: Any, vocab_size: int, vocab_multiple: int = 1) -> ModelConfig:
        """Make the config of a model with random weights; arch: a section `arch` of configs/base.py.

        The layers are those that the family has by default.  Raises ValueError for an unknown family.
        """
        family = _find_family(arch.family, "arch.family")
        layers = family.read_layers(family.defaults | {"num_hidden_layers": arch.layers})
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
            tied=arch.tied,
            max_len=None,
            vocab_multiple=vocab_multiple,
            query_pre_attn_scalar=arch.head_dim if "query_pre_attn_scalar" in family.defaults else None,
            layer_types=layers.types,
            window=layers.window,
            sliding_rope_theta=family.sliding_rope_theta if layers.window else None,
            **{"qkv_bias": False, **family.architecture},
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Convert Hugging Face's config.json, as written by transformers 4 or 5.

        Raises ValueError, naming `where` (the file) and the key, for an unknown model type, a missing key, a
        value outside its bounds (file_schema.py), or an unsupported setting.
        """
        # Refuse everything that this code would compute differently than transformers.
        name = str(hf.get("model_type"))
        if name in ("gemma3", "mistral3", "llama4"):
            raise ValueError(
                f"{where}: model_type {name!r} is a model of images and text; only text models are read: "
                f"{', '.join(sorted(FAMILIES))}"
            )
        family = _find_family(name, f"{where}: model_type")
        for key, allowed in family.supported.items():
            if key in hf and hf[key] not in allowed:
                raise ValueError(f"{where}: {key} is {show_value(hf[key])}; only {allowed[0]!r} is supported")

        # Keys that config.json leaves out have the defaults of transformers.
        file = read_record(ConfigFile, {**family.defaults, **hf}, where)
        heads, kv_heads, head_dim = file.num_attention_heads, file.num_key_value_heads, file.head_dim
        if head_dim is None and file.hidden_size % heads:
            raise ValueError(
                f"{where}: hidden_size {file.hidden_size} does not divide over {heads} heads "
                "(num_attention_heads); give head_dim"
            )
        rope, sliding_theta = _read_ropes(hf, where, family)

        # The checks of __post_init__ and of the layers do not know the file, so its name is added here.
        try:
            layers = family.read_layers(vars(file))
            return cls(
                family=name,
                vocab_size=file.vocab_size,
                width=file.hidden_size,
                layers=file.num_hidden_layers,
                heads=heads,
                kv_heads=heads if kv_heads is None else kv_heads,
                head_dim=file.hidden_size // heads if head_dim is None else head_dim,
                ffn=file.intermediate_size,
                rope_theta=rope.theta,
                rope_scaling=rope.scaling,
                norm_eps=file.rms_norm_eps,
                tied=file.tie_word_embeddings,
                max_len=file.max_position_embeddings,
                query_pre_attn_scalar=(
                    file.query_pre_attn_scalar if "query_pre_attn_scalar" in family.defaults else None
                ),
                layer_types=layers.types,
                window=layers.window,
                sliding_rope_theta=sliding_theta if layers.window else None,
                **{"qkv_bias": False, **family.architecture},
            )
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e

    def to_hf(self, architecture: str) -> dict[str, Any]:
        """Convert to config.json for `transformers`.

        RoPE is written under the keys of version 4, which version 5 reads, too.
        """
        family = FAMILIES[self.family]
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
            **ACTIVATIONS[self.activation],
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": write_scaling(self.rope_scaling),
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": _NO_MAX_LEN if self.max_len is None else self.max_len,
            "initializer_range": 0.02,
            "use_cache": True,
        }

        # What only some families have.
        if self.query_pre_attn_scalar is not None:
            out["query_pre_attn_scalar"] = self.query_pre_attn_scalar
        if self.sliding_rope_theta is not None:
            out["rope_local_base_freq"] = self.sliding_rope_theta
        return out | family.write_layers(Layers(self.layer_types, self.window), self.layers)


def find_config_problems(hf: dict[str, Any]) -> list[str]:
    """Write a message for each field of a config.json that is no value of its type, without those it lacks.

    For programs that read a directory's tokenizer: another program may have written a config.json for it alone.
    Models of other families are not checked.
    """
    problems = find_record_problems(TokenIdFields, hf)
    if str(hf.get("model_type")) in FAMILIES:
        problems += find_record_problems(ConfigFile, hf, partial=True)
    return list(dict.fromkeys(problems))


def _find_family(name: Any, what: str) -> Family:
    """Return a family by its name; raises ValueError, beginning with `what`, for another name."""
    if name not in FAMILIES:
        raise ValueError(f"{what} {show_value(name)} is none of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def _read_ropes(hf: dict[str, Any], where: str, family: Family) -> tuple[Rope, float | None]:
    """Read the rotary embeddings of a config.json -> (of full layers, the base of sliding layers or None).

    transformers 5 has one dict for each type of layers, version 4 the key `rope_local_base_freq`.
    """
    if family.sliding_rope_theta is None:
        return read_rope(hf, where, family.rope_theta), None

    by_type = hf.get("rope_parameters") or {}
    local = hf.get("rope_local_base_freq", family.sliding_rope_theta)
    if not set(by_type) & {"full_attention", "sliding_attention"}:
        return read_rope(hf, where, family.rope_theta), float(local)

    # The base of a dict within `rope_parameters` takes precedence over the top level.
    flat = {k: v for k, v in hf.items() if k != "rope_parameters"}
    full = read_rope(flat | {"rope_parameters": by_type.get("full_attention")}, where, family.rope_theta)
    sliding = by_type.get("sliding_attention")
    rope = read_rope({"rope_parameters": sliding}, where, float(local))
    if rope.scaling is not None:
        raise ValueError(
            f"{where}: rope_parameters.sliding_attention is {sliding}; only default is supported"
        )
    return full, rope.theta
