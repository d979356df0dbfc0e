"""Weights read from Hugging Face directories and GGUF files into sharded parameters, f32 unless they are frozen.

1. `weight_files.resolve_source` turns a source (directory, hub id, .gguf file, "package:NAME/FILE.gguf",
   gs:// address of a directory or .gguf file) into a path.
2. `load_weights` reads its config and checks every tensor's name and shape against weight_table.py before it
   reads any weight.
3. Parameters are read one by one, converted and stacked over the layers.  On a mesh a host reads only
   the parts of its own devices, and needs memory for one part of one parameter at a time (GGUF: for one whole
   parameter).

With head "score", a causal-LM checkpoint gives its layers and a fresh score vector (`head_trained` is then
False); a *ForSequenceClassification checkpoint with one label also gives its score vector.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.model import gguf, weight_files
from cooper_jax.model.config import ARCHITECTURES, ModelConfig
from cooper_jax.model.file_schema import HeadFields
from cooper_jax.model.json_object import read_json
from cooper_jax.model.weight_table import Entry, make_entries
from cooper_jax.runtime import keys
from cooper_jax.runtime.mesh import Layout, init_params
from cooper_jax.settings.value_rules import read_record, show_value
from cooper_jax.types import Params

_ROWS_COMPARED = 8192  # of a stored head and the embedding, at a time

Index = tuple[slice, ...]  # a box within an array: a slice with bounds for each dimension


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that was read from a source."""

    config: ModelConfig
    params: Params
    head_trained: bool  # False: the source had no head of the kind asked for, so it is freshly initialised
    generation_config: dict[str, Any]


def load_weights(
    source: str,
    *,
    num_layers: int = 0,
    head: str = "logits",
    layout: Layout,
    vocab_multiple: int = 1,
    seed: int = 0,
    base_dtype: str = "float32",
) -> LoadedModel:
    """Read a model: parameters sharded by the layout, f32 by default.

    Args:
      source: see `weight_files.resolve_source`.
      num_layers: keep only the first layers (0: all).
      head: "logits" or "score".
      vocab_multiple: pads the embedding's rows (see ModelConfig).
      seed: of the score vector's initial values, if the source has none.
      base_dtype: see `transformer.set_base_dtype`.

    Raises ValueError, naming the file and the key, for a source that cannot be found or downloaded, an
    unsupported config, tensors that are unknown, duplicate, missing, of another shape than the config says, of
    another type or not finite, and for a stored head that differs from the embedding it is said to be.
    """
    # Read the config and the tensors' names and shapes: seconds, before the minutes that the tensors take.
    path = weight_files.resolve_source(source)
    if _is_gguf(path):
        header = gguf.read_header(path)
        config, is_classifier = gguf.read_model_config(header, path), False
        shapes, read = gguf.open_tensors(path, header, config)
        tensors = weight_files.TensorFiles(shapes, read, lambda name: path)
        generation_config = gguf.read_gguf_generation_config(header, path)
    else:
        hf = read_json(path / "config.json")
        config = ModelConfig.from_hf(hf, where=str(path / "config.json"))
        is_classifier = _is_classifier(hf, path / "config.json")
        tensors = weight_files.open_safetensors(path)
        generation_config = weight_files.read_generation_config(path, hf)
    if is_classifier and head == "logits":
        raise ValueError(
            f"{path}: a sequence classifier has no language-model head; load it with head='score'"
        )
    _check_tensors(tensors, config, "score" if is_classifier else "logits", path)
    _check_tied_head(tensors, config)

    # All tensors were checked, also those of layers that are dropped here.
    config = dataclasses.replace(config.keep_layers(num_layers), vocab_multiple=vocab_multiple)
    params: Params = {"layers": {}}
    for entry in make_entries(config, head, base_dtype):
        tree = params["layers"] if entry.stacked else params
        if entry.key == "score" and not is_classifier:
            key = keys.make_key(seed, "init_score_head")
            tree["score"] = init_params(key, {"score": entry.spec}, layout)["score"]
        else:
            tree[entry.key] = _place(entry, tensors, layout)
    return LoadedModel(config, params, is_classifier or head == "logits", generation_config)


def read_config(source: str, num_layers: int = 0) -> ModelConfig:
    """Read a model's shape without its tensors; raises the errors of `load_weights`."""
    path = weight_files.resolve_source(source)
    if _is_gguf(path):
        config = gguf.read_model_config(gguf.read_header(path), path)
    else:
        file = path / "config.json"
        config = ModelConfig.from_hf(read_json(file), where=str(file))
    return config.keep_layers(num_layers)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _assemble(entry: Entry, tensors: weight_files.TensorFiles) -> np.ndarray:
    """Read a whole parameter: f32, its layers stacked, padded vocabulary rows zero."""
    # Zeros: the padded vocabulary rows keep them.
    out = np.zeros(entry.spec.shape, np.float32)
    for i, name in enumerate(entry.names):
        x = tensors.read(name)
        target = out[i] if entry.stacked else out
        if entry.vocab:
            target[: len(x)] = x
        else:
            target[...] = (x.T if entry.inputs else x).reshape(entry.shape)
    return out


def _place(entry: Entry, tensors: weight_files.TensorFiles, layout: Layout) -> jax.Array:
    """Read a parameter onto the devices, one part at a time."""
    shape = entry.spec.shape
    sharding = layout.sharding(entry.spec.axes, shape)
    whole = _assemble(entry, tensors) if tensors.read_slice is None else None

    # Devices with the same part (replicas) share one read.
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, "every addressable device has a part"
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)

    # One read and one copy to the device per part.
    placed = []
    for bounds, devices in holders.items():
        index = tuple(slice(*b) for b in bounds)
        part = _part(entry, tensors, index) if whole is None else whole[index]
        part = part.astype(jnp.dtype(entry.spec.dtype), copy=False)
        copies = [jax.device_put(part, device) for device in devices]
        # Wait, so that this part can be freed before the next one is read.
        placed += jax.block_until_ready(copies)
        del part
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _part(entry: Entry, tensors: weight_files.TensorFiles, index: Index) -> np.ndarray:
    """Read the part of a parameter at `index`, and nothing else: equals `_assemble(...)[index]`."""
    out = np.zeros([s.stop - s.start for s in index], np.float32)
    if not entry.stacked:
        _fill(out, entry, tensors, entry.names[0], index)
        return out
    for target, name in zip(out, entry.names[index[0]], strict=True):
        _fill(target, entry, tensors, name, index[1:])
    return out


def _fill(
    target: np.ndarray, entry: Entry, tensors: weight_files.TensorFiles, name: str, index: Index
) -> None:
    """Read the part of one tensor at `index` into `target`; padded vocabulary rows are left as they are."""
    read_slice = tensors.read_slice
    assert read_slice is not None, "formats that are read whole go through _assemble"

    if entry.vocab:
        # The tensor ends before the padding.
        rows = slice(index[0].start, min(index[0].stop, entry.hf_shape[0]))
        if rows.start < rows.stop:  # else this part is all padding
            target[: rows.stop - rows.start] = read_slice(name, (rows, index[1]))
        return

    if entry.inputs:
        # The parameter is [in.., out..] with several axes on each side, the tensor a matrix [out, in].  A box
        # of the parameter is a few rectangles of the matrix: one per pair of runs.
        inputs = _runs(entry.shape[: entry.inputs], index[: entry.inputs])
        outputs = _runs(entry.shape[entry.inputs :], index[entry.inputs :])
        matrix = target.reshape(math.prod(target.shape[: entry.inputs]), -1)
        for (columns, i), (rows, o) in itertools.product(inputs, outputs):
            matrix[i, o] = read_slice(name, (rows, columns)).T
        return

    # A vector; the tensor of the score head is [1, D].
    vector, lead = target.reshape(-1), (slice(0, 1),) * (len(entry.hf_shape) - 1)
    for run, place in _runs(entry.shape, index):
        vector[place] = read_slice(name, (*lead, run)).reshape(-1)


def _runs(shape: tuple[int, ...], index: Index) -> list[tuple[slice, slice]]:
    """List the contiguous runs of a box within an array, as slices of (the flat array, the flat box)."""
    # Dimensions from `whole_from` on are covered completely, so a run spans all of them.
    whole_from = len(shape)
    while whole_from and index[whole_from - 1] == slice(0, shape[whole_from - 1]):
        whole_from -= 1
    if whole_from == 0:
        everything = slice(0, math.prod(shape))
        return [(everything, everything)]

    # One run per position in the dimensions before the last partial one.
    *outer, partial = index[:whole_from]
    inner = math.prod(shape[whole_from:])
    length = (partial.stop - partial.start) * inner
    runs = []
    for n, position in enumerate(itertools.product(*(range(s.start, s.stop) for s in outer))):
        row = int(np.ravel_multi_index(position, shape[: whole_from - 1])) if position else 0
        start = (row * shape[whole_from - 1] + partial.start) * inner
        runs.append((slice(start, start + length), slice(n * length, (n + 1) * length)))
    return runs


def _check_tensors(tensors: weight_files.TensorFiles, config: ModelConfig, head: str, path: Path) -> None:
    """Raise ValueError unless the tensors are exactly those that the config requires, with their shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for entry in make_entries(config, head):
        expected |= dict.fromkeys(entry.names, entry.hf_shape)

    missing = [name for name in expected if name not in tensors.shapes]
    if missing:
        raise ValueError(
            f"{path}: {_some(missing)} missing, which its config asks for ({config.family}, {config.layers} "
            f"layers, {'tied' if config.tied else 'untied'}): config and weights do not belong together"
        )

    # A tensor that is not read would be left out of the computation without an error.
    unknown = []
    for name in tensors.shapes:
        # Some programs store the tied head a second time, old versions of transformers the rotary
        # frequencies.
        ignored = name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")
        if name not in expected and not ignored:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{tensors.where(unknown[0])}: {_some(unknown)}, which a {config.family} model of "
            f"{config.layers} layers with a {head} head does not have: config and weights do not belong together"
        )

    for name, shape in expected.items():
        if tuple(tensors.shapes[name]) != shape:
            raise ValueError(
                f"{tensors.where(name)}: {name} has the shape {tuple(tensors.shapes[name])}, but the config "
                f"says {shape}: config and weights do not belong together"
            )


def _check_tied_head(tensors: weight_files.TensorFiles, config: ModelConfig) -> None:
    """Raise ValueError if a tied model's files have a head that differs from the embedding.

    Reading the model without it would give other logits than its authors'.
    """
    name = "lm_head.weight"
    if not config.tied or name not in tensors.shapes:
        return
    embedding = "model.embed_tokens.weight"
    shapes = [tuple(tensors.shapes[n]) for n in (name, embedding)]
    differ = shapes[0] != shapes[1]
    if not differ:
        # A part of the rows at a time: both together may take gigabytes.
        parts = [slice(i, i + _ROWS_COMPARED) for i in range(0, shapes[0][0], _ROWS_COMPARED)]
        differ = not all(
            np.array_equal(_read_rows(tensors, name, part), _read_rows(tensors, embedding, part))
            for part in parts
        )
    if differ:
        raise ValueError(
            f"{tensors.where(name)}: {name} differs from {embedding}, although the config says "
            "tie_word_embeddings=true: set it to false in config.json if the model has a head of its own"
        )


def _read_rows(tensors: weight_files.TensorFiles, name: str, rows: slice) -> np.ndarray:
    """Read some rows of a matrix."""
    if tensors.read_slice is None:
        return tensors.read(name)[rows]
    count, columns = tensors.shapes[name]
    return tensors.read_slice(name, (slice(rows.start, min(rows.stop, count)), slice(0, columns)))


def _some(names: list[str]) -> str:
    """List the first three names and the number of the others, for a message."""
    return ", ".join(map(weight_files.show_name, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _is_classifier(hf: dict[str, Any], file: Path) -> bool:
    """Tell whether config.json (`hf`) describes a sequence classifier; ValueError unless it has one label."""
    fields = read_record(HeadFields, hf, str(file))
    known = [name for (family, _), name in ARCHITECTURES.items() if family == fields.model_type]
    if not fields.architectures:
        raise ValueError(
            f"{file}: it has no architectures, so whether this is a language model or a classifier is unknown: "
            f'add "architectures": ["{known[0]}"] for a language model'
        )
    architecture = fields.architectures[0]
    if architecture == ARCHITECTURES[fields.model_type, "logits"]:
        return False
    if architecture != ARCHITECTURES[fields.model_type, "score"]:
        raise ValueError(f"{file}: architectures is {show_value([architecture])}; expected one of {known}")

    # transformers writes id2label or num_labels only if there are not 2 labels, its default.
    labels = 2
    if fields.id2label is not None:
        labels = len(fields.id2label)
    elif fields.num_labels is not None:
        labels = fields.num_labels
    if labels != 1:
        raise ValueError(f"{file}: the classifier has {labels} labels; a reward model has 1 (num_labels=1)")
    return True
