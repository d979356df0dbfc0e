"""Export of a model to a directory that `transformers` loads: config.json, safetensors, tokenizer files.

The directory is written under a temporary name and renamed at the end, so an interrupted export leaves the
previous one in place.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from cooper_jax.model.config import ARCHITECTURES, ModelConfig
from cooper_jax.model.lora import merge_adapters
from cooper_jax.model.weight_table import Entry, make_entries
from cooper_jax.types import Params

# Files of a tokenizer directory that are copied, if they exist.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def save_pretrained(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    head: str,
    *,
    tokenizer_dir: str | Path | None = None,
    generation_config: dict[str, Any] | None = None,
    pad_token_id: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model for AutoModelForCausalLM ("logits") or AutoModelForSequenceClassification ("score").

    The directory appears complete or not at all, and replaces an existing one.  Every array must be
    addressable from this host.  Adapters are added to their matrices (adapter_export.py writes them alone).

    Args:
      tokenizer_dir: directory whose tokenizer files are copied.
      generation_config: its contents; its special ids also go to config.json.
      pad_token_id: required with a score head: transformers scores the last token that differs from it.
      dtype: "float32" or "bfloat16".
      max_shard_bytes: limit for one safetensors file, unless a single tensor is larger.

    Raises ValueError for another dtype, and for a pad_token_id that is missing or outside the vocabulary.
    """
    directory = Path(directory)
    if config.lora is not None:
        params = merge_adapters(params, config.lora)
    _check_arguments(directory, config, head, pad_token_id, dtype)
    hf = _make_hf_config(config, head, generation_config or {}, pad_token_id, dtype)

    with replace_directory(directory) as new:
        write_json(new / "config.json", hf)
        if generation_config:
            write_json(new / "generation_config.json", generation_config)
        if tokenizer_dir is not None:
            _copy_tokenizer(Path(tokenizer_dir), new)
        _write_shards(new, make_entries(config, head), params, DTYPES[dtype], max_shard_bytes)


@contextlib.contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Yield a new directory to be filled, which then replaces `directory`; after an error that one stays."""
    # Directories cannot be replaced atomically: the old one is renamed, and renamed back after an error.  The
    # process id keeps two exports to the same place apart.
    directory.parent.mkdir(parents=True, exist_ok=True)
    new, old = (directory.with_name(f".{directory.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        new.mkdir()
        yield new
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        # Ctrl-C, too, must leave the previous export in place and no partial one behind.
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_arguments(
    directory: Path, config: ModelConfig, head: str, pad_token_id: int | None, dtype: str
) -> None:
    """Raise ValueError for arguments of `save_pretrained` with which the export could not be loaded."""
    if dtype not in DTYPES:
        raise ValueError(f"{directory}: dtype {dtype!r} is none of {sorted(DTYPES)}")
    if head == "score" and pad_token_id is None:
        raise ValueError(
            f"{directory}: a score head needs pad_token_id, or transformers cannot find the last token"
        )
    if pad_token_id is not None and not 0 <= pad_token_id < config.vocab_size:
        raise ValueError(
            f"{directory}: pad_token_id {pad_token_id} is outside the {config.vocab_size} tokens"
        )


def _make_hf_config(
    config: ModelConfig, head: str, generation_config: dict[str, Any], pad_token_id: int | None, dtype: str
) -> dict[str, Any]:
    """Make the contents of config.json."""
    architecture = ARCHITECTURES[config.family, head]
    hf = config.to_hf(architecture) | {"torch_dtype": dtype}

    # Older versions of transformers read the special ids from config.json.
    hf |= {k: v for k, v in generation_config.items() if k in ("bos_token_id", "eos_token_id")}
    if pad_token_id is not None:
        hf["pad_token_id"] = pad_token_id
    if head == "score":
        # One label: transformers then computes one logit per row instead of two classes.
        hf |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file with indents."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_shards(
    directory: Path, entries: list[Entry], params: Params, dtype: Any, max_shard_bytes: int
) -> None:
    """Write the tensors in the table's order; a file is closed before it would exceed the limit.

    Needs host memory for one file's tensors and one whole parameter at a time.
    """
    # Assign tensors to files before any is written: the number of files is part of their names.
    shards: list[list[str]] = [[]]
    shard_bytes = total_bytes = 0
    for entry in entries:
        tensor_bytes = math.prod(entry.hf_shape) * np.dtype(dtype).itemsize
        for name in entry.names:
            if shards[-1] and shard_bytes + tensor_bytes > max_shard_bytes:
                shards.append([])
                shard_bytes = 0
            shards[-1].append(name)
            shard_bytes += tensor_bytes
            total_bytes += tensor_bytes

    # Tensors come one by one from the devices, in the order in which they were assigned.
    tensors = _iterate_tensors(entries, params, dtype)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        save_file(dict(next(tensors) for _ in names), directory / file, metadata={"format": "pt"})
        # safetensors writes files that only their owner can read; config.json has the umask's mode.
        shutil.copymode(directory / "config.json", directory / file)
        weight_map |= dict.fromkeys(names, file)

    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _iterate_tensors(entries: list[Entry], params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (Hugging Face name, tensor) of every entry, in order; one parameter is fetched at a time."""
    for entry in entries:
        tree = params["layers"] if entry.stacked else params
        parameter = np.asarray(jax.device_get(tree[entry.key]))
        for i, name in enumerate(entry.names):
            x = parameter[i] if entry.stacked else parameter
            if entry.vocab:
                # Without the padding of the vocabulary.
                x = x[: entry.hf_shape[0]]
            elif entry.inputs:
                # [in, out] -> [out, in]
                x = x.reshape(entry.hf_shape[::-1]).T
            yield name, np.ascontiguousarray(x.reshape(entry.hf_shape).astype(dtype))
