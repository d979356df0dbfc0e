"""GGUF files (llama.cpp's format): metadata, and a model's tensors under their Hugging Face names.

1. `read_header` parses the key-value section and the tensor table without reading a tensor.  The reader of
   the `gguf` package takes ten times as long, because it makes an array of every string of the vocabulary.
2. `read_model_config` derives the model's shape from the header.
3. `open_tensors` returns each tensor's shape, and a function that reads one tensor: it dequantises to f32
   (`gguf.quants`) and undoes what llama.cpp's converter changes: the order of the rows of q and k in Llama's
   files, and the 1 that is added to Gemma's norms.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cooper_jax.model.config import ModelConfig
from cooper_jax.model.families import FAMILIES, Family, Layers
from cooper_jax.model.file_schema import MAX_VOCAB, GgufGeneral, GgufModel, GgufTokenIds
from cooper_jax.model.rope import LinearScaling, Rope, RopeScaling, Scaling, compute_frequencies
from cooper_jax.model.weight_files import check_finite, show_name
from cooper_jax.settings.value_rules import list_required, read_record, show_value

# Types of values in the key-value section, with struct's codes for the scalars.
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMS = 4  # of a tensor, in ggml
_LARGE = 2**20  # bytes: values of more are only read after a look at the file's size

# Errors in which a damaged length or type shows: an unknown code, too few bytes, no memory.
_DAMAGE = (
    struct.error,
    UnicodeDecodeError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
)

# GGUF name -> Hugging Face name; the second table has the names within a layer (blk.N.*).
_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The names within a layer that differ where blocks' outputs are normed, too.
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Llama 3's scaling of rotary frequencies, of which a file holds the result alone: each frequency's divisor.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = RopeScaling(factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)

# The kinds of Gemma 3's layers, which llama.cpp does not store.
_GEMMA3_PATTERN = 6  # every sixth layer is full
_GEMMA3_SLIDING_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Position and type of a tensor in the file; `shape` is in NumPy's order (GGUF's is reversed)."""

    shape: tuple[int, ...]
    kind: int  # gguf.GGMLQuantizationType
    offset: int  # bytes from the beginning of the file


@dataclasses.dataclass(frozen=True)
class Header:
    """A file's key-value section and tensor table."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read metadata and tensor table of a GGUF file of version 2 or 3, little-endian.

    Raises ValueError for another or a damaged file, and for a tensor that appears twice.
    """
    with open(path, "rb") as f:
        # A shorter file is padded with zeros, so that the check of the first bytes can name what it is not.
        magic, version, count, pairs = struct.unpack("<4sIQQ", f.read(24).ljust(24, b"\0"))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path}: not a GGUF file of version 2 or 3 (begins with {magic!r}, {version})")
        try:
            metadata, twice = _read_pairs(f, pairs)
            rows = [_read_tensor_row(f) for _ in range(count)]
        except _DAMAGE as e:
            raise ValueError(f"{path}: its header is truncated or damaged near byte {f.tell()}: {e}") from e
        end = f.tell()
    if twice:
        raise ValueError(f"{path}: its metadata have {show_value(twice)} twice")

    # Tensor data begin at the next multiple of the alignment, to which the table's offsets are relative.
    alignment = read_record(GgufGeneral, metadata, str(path)).alignment
    data = -(-end // alignment) * alignment

    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise ValueError(f"{path}: the tensor {show_name(name)} appears twice")
        tensors[name] = TensorInfo(shape, kind, data + offset)
    return Header(metadata, tensors)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the key-value section: hyperparameters, tokenizer, chat template."""
    return read_header(path).metadata


def _read_pairs(f: BinaryIO, count: int) -> tuple[dict[str, Any], str | None]:
    """Read the key-value section -> (its pairs, a key that occurs twice or None)."""
    pairs: dict[str, Any] = {}
    twice = None
    for _ in range(count):
        key = _read_string(f)
        if key in pairs:
            twice = key
        try:
            pairs[key] = _read_value(f, *_unpack(f, "I"))
        except _DAMAGE as error:
            raise EOFError(f"{show_value(key)}: {error}") from error
    return pairs, twice


def _unpack(f: BinaryIO, code: str) -> tuple[Any, ...]:
    size = struct.calcsize("<" + code)
    # A damaged count may ask for more memory than there is, before a byte is read.
    if size > _LARGE and size > (left := os.fstat(f.fileno()).st_size - f.tell()):
        raise EOFError(f"{size} bytes are announced, and {left} are left")
    return struct.unpack("<" + code, f.read(size))


def _read_string(f: BinaryIO) -> str:
    # A length in bytes, then UTF-8 without a terminator.
    (size,) = _unpack(f, "Q")
    return _unpack(f, f"{size}s")[0].decode()


def _read_value(f: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_string(f)
    if kind != _ARRAY:
        return _unpack(f, _SCALARS[kind])[0]

    # An array: the items' type and number, then the items.  Scalars (token types, scores) are read in one
    # call.
    item_kind, count = _unpack(f, "IQ")
    if item_kind in _SCALARS:
        return list(_unpack(f, f"{count}{_SCALARS[item_kind]}"))
    return [_read_value(f, item_kind) for _ in range(count)]


def _read_tensor_row(f: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """Read the next row of the tensor table -> (name, shape, type, offset)."""
    name = _read_string(f)
    (dims,) = _unpack(f, "I")
    if dims > _MAX_DIMS:
        raise OverflowError(f"a tensor of {dims} dimensions")
    shape = _unpack(f, f"{dims}Q")[::-1]
    return name, shape, *_unpack(f, "IQ")


def read_model_config(header: Header, path: Path) -> ModelConfig:
    """Derive the model's shape from a header; `path` is for messages.

    Raises ValueError for an architecture that is not read, scaled RoPE other than linear and Llama 3's, and
    missing keys.
    """
    meta = header.metadata
    by_gguf_name = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
    arch = _need(meta, path, "general.architecture")
    if arch not in by_gguf_name:
        raise ValueError(
            f"{path}: general.architecture {show_value(arch)}; only {', '.join(sorted(by_gguf_name))} are read "
            "from GGUF, use the model's Hugging Face directory"
        )
    name = by_gguf_name[arch]
    family = FAMILIES[name]

    own = {key.removeprefix(f"{arch}."): value for key, value in meta.items() if key.startswith(f"{arch}.")}
    if missing := [key for key in list_required(GgufModel) if key not in own]:
        raise ValueError(f"{path}: its metadata lack {', '.join(f'{arch}.{key}' for key in missing)}")
    fields = read_record(GgufModel, own, str(path), prefix=f"{arch}.")

    # llama.cpp can rotate a part of each head only.
    width, heads = fields.embedding_length, fields.heads
    head_dim = width // heads if fields.key_length is None else fields.key_length
    rotated = head_dim if fields.rotated is None else fields.rotated
    if rotated != head_dim:
        raise ValueError(
            f"{path}: {arch}.rope.dimension_count is {rotated}: {rotated} of {head_dim} head components are "
            "rotated; only all is supported"
        )

    # The vocabulary's size is the embedding's number of rows: the key for it is optional.
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path}: the tensor token_embd.weight is missing")

    embedding = header.tensors["token_embd.weight"].shape
    if len(embedding) != 2 or not 1 <= embedding[0] <= MAX_VOCAB:
        raise ValueError(
            f"{path}: the tensor token_embd.weight has the shape {embedding}: it must be a matrix of 1 to "
            f"{MAX_VOCAB} rows"
        )

    layers = _read_layers(fields, path, arch)
    theta = float(family.rope_theta if fields.theta is None else fields.theta)
    with _naming_the_file(path):
        return ModelConfig(
            family=name,
            vocab_size=embedding[0],
            width=width,
            layers=fields.block_count,
            heads=heads,
            kv_heads=heads if fields.kv_heads is None else fields.kv_heads,
            head_dim=head_dim,
            ffn=fields.feed_forward_length,
            rope_theta=theta,
            rope_scaling=_read_scaling(header, fields, path, arch, Rope(theta), head_dim),
            norm_eps=fields.norm_eps,
            tied="output.weight" not in header.tensors,
            max_len=fields.context_length,
            query_pre_attn_scalar=_read_query_scalar(family, width, heads, head_dim, fields.block_count),
            layer_types=layers.types,
            window=layers.window,
            sliding_rope_theta=_GEMMA3_SLIDING_THETA if layers.window else None,
            **{"qkv_bias": False, **family.architecture},
        )


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Context in which the checks of ModelConfig, which do not know the file, get its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def _need(meta: dict[str, Any], path: Path, key: str) -> Any:
    if key not in meta:
        raise ValueError(f"{path}: its metadata lack {key}")
    return meta[key]


def _read_layers(fields: GgufModel, path: Path, arch: str) -> Layers:
    """Derive the layers' types: only Gemma 3's differ, in a pattern that llama.cpp has in its code."""
    if arch != "gemma3":
        if fields.window:
            raise ValueError(
                f"{path}: {arch}.attention.sliding_window is {fields.window}: only Gemma 3's windows are read "
                "from GGUF; use the model's Hugging Face directory"
            )
        return Layers()
    if not fields.window:
        raise ValueError(f"{path}: gemma3.attention.sliding_window is {fields.window}: it must be at least 1")
    pattern = {
        "num_hidden_layers": fields.block_count,
        "sliding_window": fields.window,
        "sliding_window_pattern": _GEMMA3_PATTERN,
    }
    family = FAMILIES["gemma3_text"]
    return family.read_layers(family.defaults | pattern)


def _read_query_scalar(family: Family, width: int, heads: int, head_dim: int, layers: int) -> float | None:
    """Derive Gemma 3's `query_pre_attn_scalar`, which llama.cpp does not store: head_dim but in the 27B model."""
    if "query_pre_attn_scalar" not in family.defaults:
        return None
    return width // heads if layers == 62 else head_dim


def _read_scaling(
    header: Header, fields: GgufModel, path: Path, arch: str, rope: Rope, head_dim: int
) -> Scaling:
    """Read RoPE's scaling: linear from the metadata, Llama 3's from the divisors of the frequencies.

    The divisors are compared with those of the scaling that is derived from them; others raise ValueError.
    """
    kind = "none" if fields.scaling is None else fields.scaling
    if _ROPE_FACTORS in header.tensors:
        factors = _dequantise(path, _ROPE_FACTORS, header.tensors[_ROPE_FACTORS])
        scaling = dataclasses.replace(_LLAMA3, factor=float(factors.max(initial=1.0)))
        plain = compute_frequencies(rope, head_dim)
        scaled = compute_frequencies(dataclasses.replace(rope, scaling=scaling), head_dim)
        if factors.shape == plain.shape and np.allclose(plain / scaled, factors, rtol=1e-4):
            return scaling
    elif kind == "linear":
        if fields.scaling_factor is None:
            raise ValueError(f"{path}: its metadata lack {arch}.rope.scaling.factor")
        return LinearScaling(float(fields.scaling_factor))
    elif kind == "none":
        return None
    raise ValueError(
        f"{path}: {arch}.rope.scaling.type: scaled rotary embeddings ({kind}, or {_ROPE_FACTORS}) other than "
        "linear and those of Llama 3 "
        "are not read from GGUF; use the model's Hugging Face directory"
    )


def read_gguf_generation_config(header: Header, path: Path) -> dict[str, int]:
    """Return the ids of special tokens under the keys of Hugging Face's generation_config.json.

    path: for messages.
    """
    prefix = "tokenizer.ggml."
    own = {key.removeprefix(prefix): value for key, value in header.metadata.items() if prefix in key}
    ids = read_record(GgufTokenIds, own, str(path), prefix)
    named = {"bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id}
    named["pad_token_id"] = ids.padding_token_id
    return {name: value for name, value in named.items() if value is not None}


def open_tensors(
    path: Path, header: Header, config: ModelConfig
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Index the tensors by Hugging Face names -> (their shapes, a function that reads one as f32)."""
    # The divisors of the rotary frequencies have been read with the config.
    tensors = {name: info for name, info in header.tensors.items() if name != _ROPE_FACTORS}
    gguf_names = {_hf_name(name, config): name for name in tensors}
    permuted_heads = {}
    if FAMILIES[config.family].gguf_permuted:
        permuted_heads = {
            "self_attn.q_proj.weight": config.heads,
            "self_attn.k_proj.weight": config.kv_heads,
        }

    def read(name: str) -> np.ndarray:
        x = _dequantise(path, gguf_names[name], tensors[gguf_names[name]])
        check_finite(x, f"{path}: {gguf_names[name]}")
        for suffix, count in permuted_heads.items():
            if name.endswith(suffix):
                return unpermute_heads(x, count)
        # llama.cpp stores what the norm multiplies with.
        if config.norm_offset and name.endswith("norm.weight"):
            return x - np.float32(config.norm_offset)
        return x

    return {hf: tensors[name].shape for hf, name in gguf_names.items()}, read


def _hf_name(name: str, config: ModelConfig) -> str:
    """Return the Hugging Face name; an unknown tensor keeps its name, which `load_weights` rejects later."""
    if name in _MODEL:
        return _MODEL[name]
    in_layer = _LAYER | _POST_NORMS if config.post_norms else _LAYER
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in in_layer:
        return f"model.layers.{parts[1]}.{in_layer[parts[2]]}.{parts[3]}"
    return name


def unpermute_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows [H h, D] of q or k from llama.cpp's order of head components to Hugging Face's.

    RoPE pairs neighbouring components in llama.cpp, and component i with i + h / 2 in Hugging Face's models.
    """
    # [H, h / 2, 2, D] -> [H, 2, h / 2, D]
    return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def _dequantise(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    """Read one tensor from the file as f32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        kind = GGMLQuantizationType(info.kind)
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path}: the tensor {name} is of the unknown type {info.kind}") from e

    # Values are quantised in blocks along the last axis; a row is a whole number of blocks.  np.fromfile
    # returns fewer bytes at the end of a file without an error, so a truncated file is found here.
    row_bytes = info.shape[-1] // block_values * block_bytes
    total = math.prod(info.shape[:-1]) * row_bytes
    if info.offset + total > path.stat().st_size:
        raise ValueError(
            f"{path}: the tensor {name} ends at byte {info.offset + total}, but the file has "
            f"{path.stat().st_size}: it is truncated"
        )
    raw = np.fromfile(path, np.uint8, count=total, offset=info.offset).reshape(*info.shape[:-1], row_bytes)
    try:
        return quants.dequantize(raw, kind).astype(np.float32, copy=False).reshape(info.shape)
    except NotImplementedError as e:
        raise ValueError(f"{path}: the gguf package cannot dequantise {kind.name} ({name})") from e
