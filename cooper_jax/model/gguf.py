"""GGUF files (llama.cpp's format): metadata, and a Llama model's tensors under their Hugging Face names.

1. `read_header` parses the key-value section and the tensor table; no tensor is touched.  Done here, since
   the `gguf` package's reader makes an array of every string of the vocabulary and takes ten times as long.
2. `model_config` derives the model's shape from them.
3. `open_model` gives each tensor's shape and a function that reads one: dequantised (`gguf.quants`) to f32,
   with the reordering undone that llama.cpp applies to the rows of q and k.

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

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32  # of the tensor data, where general.alignment does not say otherwise

# GGUF name -> Hugging Face name; blk.N.* stand for every layer.
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
    """Where a tensor lies; `shape` is in numpy's order (GGUF writes it backwards)."""

    shape: tuple[int, ...]
    kind: int  # gguf.GGMLQuantizationType
    offset: int  # bytes from the beginning of the file


@dataclasses.dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Metadata and tensor table of a GGUF file, version 2 or 3, little-endian; ValueError if it is none."""
    with open(path, "rb") as f:
        magic, version, count, pairs = struct.unpack("<4sIQQ", f.read(24).ljust(24, b"\0"))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path}: not a GGUF file of version 2 or 3 (begins with {magic!r}, {version})")
        try:
            metadata = {_string(f): _value(f, *_unpack(f, "I")) for _ in range(pairs)}
            rows = [_tensor_row(f) for _ in range(count)]
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError, RecursionError) as e:
            raise ValueError(f"{path}: its header is cut short or damaged near byte {f.tell()}: {e}") from e
        end = f.tell()
    step = metadata["general.alignment"] if "general.alignment" in metadata else _ALIGNMENT
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"{path}: general.alignment is {step!r}; it must be a positive integer")
    data = -(-end // step) * step
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise ValueError(f"{path}: the tensor {name} appears twice")
        tensors[name] = TensorInfo(shape, kind, data + offset)
    return Header(metadata, tensors)


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value section alone: hyperparameters, tokenizer, chat template."""
    return read_header(path).metadata


def _unpack(f: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack("<" + code, f.read(struct.calcsize("<" + code)))


def _string(f: BinaryIO) -> str:
    (size,) = _unpack(f, "Q")
    return _unpack(f, f"{size}s")[0].decode()


def _value(f: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(f)
    if kind != _ARRAY:
        return _unpack(f, _SCALARS[kind])[0]
    item, count = _unpack(f, "IQ")
    return (
        list(_unpack(f, f"{count}{_SCALARS[item]}"))
        if item in _SCALARS
        else [_value(f, item) for _ in range(count)]
    )


def _tensor_row(f: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(f)
    (dims,) = _unpack(f, "I")
    shape = _unpack(f, f"{dims}Q")[::-1]
    return name, shape, *_unpack(f, "IQ")


def read_model_config(header: Header, path: Path) -> ModelConfig:
    """The model's shape.  Raises ValueError for another architecture than llama, and for scaled rope."""
    meta = header.metadata

    def need(key: str) -> Any:
        if key not in meta:
            raise ValueError(f"{path}: its metadata lack {key}")
        return meta[key]

    def optional(key: str, otherwise: Any) -> Any:
        return meta[key] if key in meta else otherwise

    if need("general.architecture") != "llama":
        raise ValueError(
            f"{path}: architecture {meta['general.architecture']!r}; only llama is read from GGUF, "
            "use the model's Hugging Face directory"
        )
    scaling = optional("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in header.tensors:
        raise ValueError(
            f"{path}: scaled rotary positions are not read from GGUF; use the model's Hugging Face directory"
        )
    width, heads = need("llama.embedding_length"), need("llama.attention.head_count")
    head_dim = optional("llama.attention.key_length", width // heads)
    rotated = optional("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(f"{path}: {rotated} of {head_dim} head components are rotated; only all is built")
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
    """The special ids, in the words of Hugging Face's generation_config.json."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {ours: f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in names.items()}
    return {ours: header.metadata[key] for ours, key in keys.items() if key in header.metadata}


def open_tensors(
    path: Path, header: Header, config: ModelConfig
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """The tensors under Hugging Face names -> (their shapes, a function that reads one as f32)."""
    known = {_hf_name(name): name for name in header.tensors}
    heads = {"self_attn.q_proj.weight": config.heads, "self_attn.k_proj.weight": config.kv_heads}

    def read(name: str) -> np.ndarray:
        x = _dequantised(path, known[name], header.tensors[known[name]])
        for suffix, count in heads.items():
            if name.endswith(suffix):
                return unpermute_heads(x, count)
        return x

    return {hf: header.tensors[name].shape for hf, name in known.items()}, read


def _hf_name(name: str) -> str:
    """Hugging Face's name; what has none keeps its own, and is refused with the unknown keys."""
    if name in _MODEL:
        return _MODEL[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return name


def unpermute_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring components, Hugging Face component i with i + h / 2: rows [H h, D] of q
    or k from the first order to the second."""
    return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def _dequantised(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        kind = GGMLQuantizationType(info.kind)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path}: the tensor {name} is of the unknown type {info.kind}") from e
    row = info.shape[-1] // block * size  # bytes
    total = math.prod(info.shape[:-1]) * row
    if info.offset + total > path.stat().st_size:
        raise ValueError(
            f"{path}: the tensor {name} ends at byte {info.offset + total}, but the file has "
            f"{path.stat().st_size}: it is cut short"
        )
    raw = np.fromfile(path, np.uint8, count=total, offset=info.offset).reshape(*info.shape[:-1], row)
    try:
        return quants.dequantize(raw, kind).astype(np.float32, copy=False).reshape(info.shape)
    except NotImplementedError as e:
        raise ValueError(f"{path}: the gguf package cannot dequantise {kind.name} ({name})") from e
