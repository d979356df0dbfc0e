"""GGUF files (llama.cpp's format): metadata, and a Llama model's tensors under their Hugging Face names.

1. `read_header` parses the key-value section and the tensor table without reading a tensor.  The reader of
   the `gguf` package takes ten times as long, because it makes an array of every string of the vocabulary.
2. `read_model_config` derives the model's shape from the header.
3. `open_tensors` returns each tensor's shape, and a function that reads one tensor: it dequantises to f32
   (`gguf.quants`) and undoes llama.cpp's reordering of the rows of q and k.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cooper_jax.model.config import ModelConfig

# Types of values in the key-value section, with struct's codes for the scalars.
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32  # bytes: alignment of the tensor data in files without the key general.alignment

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
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


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
        # A damaged length or type shows as one of many errors: an unknown code, too few bytes, no memory.
        try:
            metadata = {_read_string(f): _read_value(f, *_unpack(f, "I")) for _ in range(pairs)}
            rows = [_read_tensor_row(f) for _ in range(count)]
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError, RecursionError) as e:
            raise ValueError(f"{path}: its header is truncated or damaged near byte {f.tell()}: {e}") from e
        end = f.tell()

    # Tensor data begin at the next multiple of the alignment, to which the table's offsets are relative.
    alignment = metadata["general.alignment"] if "general.alignment" in metadata else _ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment is {alignment!r}; it must be a positive integer")
    data = -(-end // alignment) * alignment

    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise ValueError(f"{path}: the tensor {name} appears twice")
        tensors[name] = TensorInfo(shape, kind, data + offset)
    return Header(metadata, tensors)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the key-value section: hyperparameters, tokenizer, chat template."""
    return read_header(path).metadata


def _unpack(f: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack("<" + code, f.read(struct.calcsize("<" + code)))


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
    shape = _unpack(f, f"{dims}Q")[::-1]
    return name, shape, *_unpack(f, "IQ")


def read_model_config(header: Header, path: Path) -> ModelConfig:
    """Derive the model's shape from a header; `path` is for messages.

    Raises ValueError for an architecture other than llama, scaled RoPE, and missing keys.
    """
    meta = header.metadata

    def need(key: str) -> Any:
        if key not in meta:
            raise ValueError(f"{path}: its metadata lack {key}")
        return meta[key]

    def optional(key: str, default: Any) -> Any:
        return meta[key] if key in meta else default

    # Refuse settings that would change the computation.  Llama 3's RoPE scaling is stored as a tensor.
    if need("general.architecture") != "llama":
        raise ValueError(
            f"{path}: architecture {meta['general.architecture']!r}; only llama is read from GGUF, "
            "use the model's Hugging Face directory"
        )
    scaling = optional("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in header.tensors:
        raise ValueError(
            f"{path}: scaled rotary embeddings are not read from GGUF; use the model's Hugging Face directory"
        )

    # llama.cpp can rotate a part of each head only.
    width, heads = need("llama.embedding_length"), need("llama.attention.head_count")
    head_dim = optional("llama.attention.key_length", width // heads)
    rotated = optional("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{path}: {rotated} of {head_dim} head components are rotated; only all is supported"
        )

    # The vocabulary's size is the embedding's number of rows: the key for it is optional.
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path}: the tensor token_embd.weight is missing")

    return ModelConfig(
        family="llama",
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        width=width,
        layers=need("llama.block_count"),
        heads=heads,
        kv_heads=optional("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=need("llama.feed_forward_length"),
        rope_theta=float(optional("llama.rope.freq_base", 10000.0)),
        rope_scaling=None,
        norm_eps=need("llama.attention.layer_norm_rms_epsilon"),
        qkv_bias=False,
        tied="output.weight" not in header.tensors,
        max_len=need("llama.context_length"),
    )


def read_gguf_generation_config(header: Header) -> dict[str, int]:
    """Return the ids of special tokens under the keys of Hugging Face's generation_config.json."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {ours: f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in names.items()}
    return {ours: header.metadata[key] for ours, key in keys.items() if key in header.metadata}


def open_tensors(
    path: Path, header: Header, config: ModelConfig
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Index the tensors by Hugging Face names -> (their shapes, a function that reads one as f32)."""
    gguf_names = {_hf_name(name): name for name in header.tensors}
    permuted_heads = {"self_attn.q_proj.weight": config.heads, "self_attn.k_proj.weight": config.kv_heads}

    def read(name: str) -> np.ndarray:
        x = _dequantise(path, gguf_names[name], header.tensors[gguf_names[name]])
        for suffix, count in permuted_heads.items():
            if name.endswith(suffix):
                return unpermute_heads(x, count)
        return x

    return {hf: header.tensors[name].shape for hf, name in gguf_names.items()}, read


def _hf_name(name: str) -> str:
    """Return the Hugging Face name; an unknown tensor keeps its name, which `load_weights` rejects later."""
    if name in _MODEL:
        return _MODEL[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
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
