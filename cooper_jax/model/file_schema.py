"""The fields that are read from model files: their types and bounds, each declared once.

Records (settings/value_rules.py) of the JSON files of a Hugging Face directory and of the metadata of a GGUF
file.  Fields of these files that no record declares are not read.  Bounds are a few times what published models
have, so that a damaged number is found before memory is asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cooper_jax.settings.value_rules import (
    REQUIRED,
    Anything,
    Either,
    Flag,
    ListOf,
    MapOf,
    Nullable,
    ObjectOf,
    OneOf,
    Real,
    Text,
    Whole,
    declare,
)

# Largest sizes of a model.
MAX_LAYERS = 1024
MAX_VOCAB = 2**22
_VOCAB_SIZE = Whole(1, MAX_VOCAB)
_WIDTH = Whole(1, 2**17)
_FFN = Whole(1, 2**20)
_LAYERS = Whole(1, MAX_LAYERS)
_HEADS = Whole(1, 1024)
_HEAD_DIM = Whole(2, 4096)
_LENGTH = Whole(1, 2**27)  # tokens: of a context or a window
_NORM_EPS = Real(0, 0.1, above=True)
_THETA = Real(1, 1e12, above=True)
_FACTOR = Real(0, 1e6, above=True)

_MODEL_TYPE = Text(pattern=r"[\w.-]{1,100}", words="a name of 1 to 100 letters, digits, _, - and dots")
_NAME = Text(longest=300, shortest=1, pattern=r"[^\x00-\x1f\x7f]+", words="a name of 1 to 300 characters")
_TOKEN_ID = Whole(0, MAX_VOCAB - 1)
_TOKEN_IDS = Nullable(Either((_TOKEN_ID, ListOf(_TOKEN_ID, longest=1000, shortest=1))))
# Llama's first files have -1 for "none".
_ID_OR_NONE = Nullable(Whole(-1, MAX_VOCAB - 1))


# --- config.json -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeFields:
    """Rotary embeddings: `rope_scaling`, or `rope_parameters` (transformers 5)."""

    rope_type: str | None = declare(Nullable(_NAME))
    type: str | None = declare(Nullable(_NAME))
    rope_theta: float | None = declare(Nullable(_THETA))
    factor: float | None = declare(Nullable(Real(1, 1e6)))
    low_freq_factor: float | None = declare(Nullable(_FACTOR))
    high_freq_factor: float | None = declare(Nullable(_FACTOR))
    original_max_position_embeddings: int | None = declare(Nullable(_LENGTH))
    partial_rotary_factor: float | None = declare(Nullable(Real(0, 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeByType(RopeFields):
    """`rope_parameters`, which may have one object for each type of layers."""

    full_attention: dict[str, Any] | None = declare(Nullable(ObjectOf(RopeFields)))
    sliding_attention: dict[str, Any] | None = declare(Nullable(ObjectOf(RopeFields)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """config.json, with the defaults of the family (families.py) for fields that it leaves out."""

    model_type: str = declare(_MODEL_TYPE, REQUIRED)

    # Sizes.
    vocab_size: int = declare(_VOCAB_SIZE, REQUIRED)
    hidden_size: int = declare(_WIDTH, REQUIRED)
    intermediate_size: int = declare(_FFN, REQUIRED)
    num_hidden_layers: int = declare(_LAYERS, REQUIRED)
    num_attention_heads: int = declare(_HEADS, REQUIRED)
    num_key_value_heads: int | None = declare(Nullable(_HEADS))  # None: as many as query heads
    head_dim: int | None = declare(Nullable(_HEAD_DIM))  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = declare(_LENGTH, REQUIRED)

    # The computation.
    rms_norm_eps: float = declare(_NORM_EPS, REQUIRED)
    tie_word_embeddings: bool = declare(Flag(), REQUIRED)
    query_pre_attn_scalar: float | None = declare(_FACTOR)
    rope_theta: float | None = declare(_THETA)
    rope_local_base_freq: float | None = declare(_THETA)
    rope_scaling: dict[str, Any] | None = declare(Nullable(ObjectOf(RopeFields)))
    rope_parameters: dict[str, Any] | None = declare(Nullable(ObjectOf(RopeByType)))

    # Layers that differ from each other.
    layer_types: list[str] | None = declare(Nullable(ListOf(_NAME, longest=MAX_LAYERS)))
    sliding_window: int | None = declare(Nullable(_LENGTH))
    use_sliding_window: bool | None = declare(Nullable(Flag()))
    max_window_layers: int | None = declare(Whole(0, MAX_LAYERS))
    sliding_window_pattern: int | None = declare(Whole(1, MAX_LAYERS))
    no_rope_layers: list[int] | None = declare(Nullable(ListOf(Whole(0, 1), longest=MAX_LAYERS)))
    no_rope_layer_interval: int | None = declare(Whole(1, MAX_LAYERS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadFields:
    """The fields of config.json that tell a language model from a classifier."""

    model_type: str = declare(_MODEL_TYPE, REQUIRED)
    architectures: list[str] | None = declare(Nullable(ListOf(_NAME, longest=100)))
    id2label: dict[Any, Any] | None = declare(Nullable(MapOf(Anything(), Anything())))
    num_labels: int | None = declare(Nullable(Whole(0, 2**20)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIdFields:
    """The ids of special tokens, in generation_config.json and config.json."""

    model_type: str | None = declare(Nullable(_MODEL_TYPE))  # transformers chooses a tokenizer's class by it

    bos_token_id: int | None = declare(_ID_OR_NONE)
    eos_token_id: int | list[int] | None = declare(_TOKEN_IDS)
    pad_token_id: int | None = declare(_ID_OR_NONE)


# --- the weights' index ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexFile:
    """model.safetensors.index.json: the file of each tensor.  Files are beside it, so names have no folders."""

    weight_map: dict[str, str] = declare(
        MapOf(
            _NAME,
            Text(longest=300, pattern=r"[\w][\w.-]*\.safetensors", words="the name of a .safetensors file"),
            shortest=1,
        ),
        REQUIRED,
    )


# --- tokenizers --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedTokenFields:
    """A token with the way in which it is found in text."""

    content: str = declare(Text(longest=10_000), REQUIRED)
    special: bool = declare(Flag(), False)
    single_word: bool = declare(Flag(), False)
    lstrip: bool = declare(Flag(), False)
    rstrip: bool = declare(Flag(), False)
    normalized: bool = declare(Flag(), False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedTokenRow(AddedTokenFields):
    """An entry of tokenizer.json's `added_tokens`."""

    id: int = declare(_TOKEN_ID, REQUIRED)


_TOKEN = Either((Text(longest=10_000), ObjectOf(AddedTokenFields)))
_VOCAB = MapOf(Text(longest=10_000), _TOKEN_ID, shortest=1)
_TEMPLATE = Text(longest=200_000)
_TOKEN_LIST = Nullable(ListOf(_TOKEN, longest=MAX_VOCAB))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokensFile:
    """special_tokens_map.json, and these fields of tokenizer_config.json."""

    bos_token: Any = declare(Nullable(_TOKEN))
    eos_token: Any = declare(Nullable(_TOKEN))
    unk_token: Any = declare(Nullable(_TOKEN))
    pad_token: Any = declare(Nullable(_TOKEN))
    sep_token: Any = declare(Nullable(_TOKEN))
    cls_token: Any = declare(Nullable(_TOKEN))
    mask_token: Any = declare(Nullable(_TOKEN))
    additional_special_tokens: Any = declare(_TOKEN_LIST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedTemplate:
    """One of several chat templates."""

    name: str = declare(_NAME, REQUIRED)
    template: str = declare(_TEMPLATE, REQUIRED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplateFile:
    """chat_template.json."""

    chat_template: str = declare(_TEMPLATE, REQUIRED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfigFile(SpecialTokensFile):
    """tokenizer_config.json."""

    tokenizer_class: str | None = declare(Nullable(_NAME))
    chat_template: Any = declare(
        Nullable(Either((_TEMPLATE, ListOf(ObjectOf(NamedTemplate), longest=100, shortest=1))))
    )
    added_tokens_decoder: dict[str, Any] | None = declare(
        MapOf(Text(pattern=r"[0-9]{1,7}", words="a token's id in digits"), ObjectOf(AddedTokenFields))
    )
    extra_special_tokens: Any = declare(
        Nullable(Either((ListOf(_TOKEN, longest=MAX_VOCAB), MapOf(_NAME, _TOKEN))))
    )
    add_bos_token: bool | None = declare(Nullable(Flag()))
    add_eos_token: bool | None = declare(Nullable(Flag()))
    add_prefix_space: bool | None = declare(Nullable(Flag()))
    clean_up_tokenization_spaces: bool | None = declare(Nullable(Flag()))
    split_special_tokens: bool | None = declare(Flag())
    legacy: bool | None = declare(Nullable(Flag()))
    # transformers writes 1e30 for "no limit".
    model_max_length: float | None = declare(Nullable(Real(1, 1e31)))
    padding_side: str | None = declare(Nullable(_NAME))
    truncation_side: str | None = declare(Nullable(_NAME))
    model_input_names: list[str] | None = declare(Nullable(ListOf(_NAME, longest=20)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceModel:
    """tokenizer.json's `model`; what else it has is read by the tokenizers library."""

    type: str | None = declare(Nullable(_NAME))
    merges: list[Any] | None = declare(Nullable(ListOf(Anything(), longest=2**24)))
    # Pieces with their ids, or pieces with their scores (unigram models).
    vocab: Any = declare(
        Either((_VOCAB, ListOf(ListOf(Anything(), longest=2, shortest=2), longest=MAX_VOCAB, shortest=1))),
        REQUIRED,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytePairModel:
    """The settings of a byte-pair `model` beside its pieces."""

    # With another share the same text is encoded differently each time.
    dropout: float | None = declare(Nullable(Real(0, 0)))
    # The tokenizers library (0.23) aborts the process for pieces that are shorter than the prefix.
    continuing_subword_prefix: str | None = declare(Nullable(OneOf(("",))))
    end_of_word_suffix: str | None = declare(Nullable(OneOf(("", "</w>"))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplatePart:
    """A special token of tokenizer.json's `post_processor`, which writes it before or behind each text."""

    ids: list[int] = declare(ListOf(_TOKEN_ID, longest=10, shortest=1), REQUIRED)
    tokens: list[str] = declare(ListOf(Text(longest=10_000), longest=10, shortest=1), REQUIRED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateRules:
    """A `post_processor` of the type TemplateProcessing."""

    single: list[Any] = declare(ListOf(Anything(), longest=100), REQUIRED)
    special_tokens: dict[str, Any] = declare(MapOf(Text(longest=10_000), ObjectOf(TemplatePart)), REQUIRED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """tokenizer.json; its rules are read by the tokenizers library."""

    version: str | None = declare(_NAME)
    model: dict[str, Any] = declare(ObjectOf(PieceModel), REQUIRED)
    added_tokens: list[dict[str, Any]] | None = declare(
        Nullable(ListOf(ObjectOf(AddedTokenRow), longest=MAX_VOCAB))
    )


VOCAB_FILE = _VOCAB  # vocab.json and added_tokens.json, as a whole


# --- GGUF --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufGeneral:
    """Metadata that every file has."""

    architecture: str | None = declare(_NAME, key="general.architecture")
    alignment: int = declare(Whole(1, 2**20), 32, key="general.alignment")  # bytes: of the tensors' data


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufModel:
    """Metadata of the model, without the architecture's name before the first dot."""

    block_count: int = declare(_LAYERS, REQUIRED)
    context_length: int = declare(_LENGTH, REQUIRED)
    embedding_length: int = declare(_WIDTH, REQUIRED)
    feed_forward_length: int = declare(_FFN, REQUIRED)
    heads: int = declare(_HEADS, REQUIRED, key="attention.head_count")
    kv_heads: int | None = declare(_HEADS, key="attention.head_count_kv")
    norm_eps: float = declare(_NORM_EPS, REQUIRED, key="attention.layer_norm_rms_epsilon")
    key_length: int | None = declare(_HEAD_DIM, key="attention.key_length")
    rotated: int | None = declare(_HEAD_DIM, key="rope.dimension_count")
    theta: float | None = declare(_THETA, key="rope.freq_base")
    scaling: str | None = declare(_NAME, key="rope.scaling.type")
    scaling_factor: float | None = declare(Real(1, 1e6), key="rope.scaling.factor")
    window: int | None = declare(Whole(0, 2**27), key="attention.sliding_window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTokenIds:
    """Ids of special tokens, without "tokenizer.ggml." before them."""

    bos_token_id: int | None = declare(_TOKEN_ID)
    eos_token_id: int | None = declare(_TOKEN_ID)
    eot_token_id: int | None = declare(_TOKEN_ID)
    unknown_token_id: int | None = declare(_TOKEN_ID)
    padding_token_id: int | None = declare(_TOKEN_ID)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTokenizer(GgufTokenIds):
    """Metadata of the tokenizer, without "tokenizer.ggml." before them."""

    model: str = declare(_NAME, REQUIRED)
    pre: str = declare(_NAME, REQUIRED)
    tokens: list[str] = declare(ListOf(Text(longest=10_000), longest=MAX_VOCAB, shortest=1), REQUIRED)
    token_type: list[int] = declare(ListOf(Whole(0, 100), longest=MAX_VOCAB), REQUIRED)
    merges: list[str] = declare(
        ListOf(
            Text(longest=20_000, pattern=r"(?s).+ .+", words="two pieces with a space between them"),
            longest=2**24,
        ),
        REQUIRED,
    )
    add_bos_token: bool | None = declare(Flag())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTemplate:
    """The chat template of a tokenizer."""

    chat_template: str | None = declare(_TEMPLATE, key="tokenizer.chat_template")
