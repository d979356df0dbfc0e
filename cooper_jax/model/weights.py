"""Weights in from where the world keeps them, and out to a directory that `transformers` loads unchanged.

1. `weight_files.resolve_source` turns a source (directory, hub id, .gguf file, "package:NAME/FILE.gguf", gs:// address of a
   directory or .gguf file) into a path.
2. `load` reads its config, checks every tensor's name and shape against one table, and only then reads: parameter
   by parameter, to f32, stacked over the layers.  On a mesh a host reads what its own devices hold, part by part,
   and has one device's part of one parameter in its memory at a time.  (GGUF: the whole of one parameter.)
3. `save` walks the same table the other way.

A causal-LM checkpoint opened with head "score" gives its trunk and a fresh score vector (`head_trained` is
then False); a *ForSequenceClassification checkpoint with one label brings its own.
"""

from __future__ import annotations

import dataclasses
import itertools
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

from cooper_jax.model import gguf, weight_files
from cooper_jax.model.config import ARCHITECTURES, ModelConfig
from cooper_jax.model.transformer import param_specs
from cooper_jax.runtime import keys
from cooper_jax.runtime.mesh import Layout, ParamSpec, init_params
from cooper_jax.types import Params

# Hugging Face's name, ours, and how many leading dimensions of ours are the matrix's inputs: torch keeps
# [out, in], we [in, out]; 0 keeps the order.  {} is the layer.
_LAYER = "model.layers.{}."
TABLE: tuple[tuple[str, str, int], ...] = (
    ("model.embed_tokens.weight", "embed", 0),
    ("model.norm.weight", "final_norm", 0),
    ("lm_head.weight", "lm_head", 0),
    ("score.weight", "score", 0),
    (_LAYER + "input_layernorm.weight", "attn_norm", 0),
    (_LAYER + "self_attn.q_proj.weight", "q", 1),
    (_LAYER + "self_attn.k_proj.weight", "k", 1),
    (_LAYER + "self_attn.v_proj.weight", "v", 1),
    (_LAYER + "self_attn.q_proj.bias", "q_bias", 0),
    (_LAYER + "self_attn.k_proj.bias", "k_bias", 0),
    (_LAYER + "self_attn.v_proj.bias", "v_bias", 0),
    (_LAYER + "self_attn.o_proj.weight", "o", 2),
    (_LAYER + "post_attention_layernorm.weight", "mlp_norm", 0),
    (_LAYER + "mlp.gate_proj.weight", "gate", 1),
    (_LAYER + "mlp.up_proj.weight", "up", 1),
    (_LAYER + "mlp.down_proj.weight", "down", 1),
)
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
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model as read: f32 parameters, and whether the head that was asked for came with them."""

    config: ModelConfig
    params: Params
    head_trained: bool
    generation_config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One row of TABLE for one model: a parameter and the tensors (one, or one a layer) that it becomes."""

    key: str
    names: tuple[str, ...]
    shape: tuple[int, ...]  # ours, of one layer
    hf_shape: tuple[int, ...]
    inputs: int
    spec: ParamSpec
    stacked: bool
    vocab: bool  # rows are tokens: ours are padded to a multiple


def _entries(config: ModelConfig, head: str) -> list[_Entry]:
    specs = param_specs(config, head)
    out = []
    for name, key, inputs in TABLE:
        stacked, vocab = "{}" in name, key in ("embed", "lm_head")
        tree = specs["layers"] if stacked else specs
        if key not in tree:
            continue
        shape = tree[key].shape[1:] if stacked else tree[key].shape
        if inputs:
            hf_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        elif vocab:
            hf_shape = (config.vocab_size, config.width)
        else:
            hf_shape = (1, config.width) if key == "score" else (math.prod(shape),)
        names = tuple(name.format(i) for i in range(config.layers)) if stacked else (name,)
        out.append(_Entry(key, names, shape, hf_shape, inputs, tree[key], stacked, vocab))
    return out


# --- in --------------------------------------------------------------------------------------------------


def load_weights(
    source: str,
    *,
    num_layers: int = 0,
    head: str = "logits",
    layout: Layout,
    vocab_multiple: int = 1,
    seed: int = 0,
) -> LoadedModel:
    """Read a model: f32 parameters, placed by the layout.

    num_layers: keep the first so many layers (0: all).  vocab_multiple: pad the embedding's rows (see
    ModelConfig).  seed: of the score vector, where the source has none.  Raises ValueError, naming the file
    and the key, for a source that cannot be found or fetched, an unsupported config, and tensors that are
    unknown, duplicate, missing or of another shape than the config says.
    """
    path = weight_files.resolve_source(source)
    if _is_gguf(path):
        header = gguf.read_header(path)
        config, classifier = gguf.read_model_config(header, path), False
        shapes, read = gguf.open_tensors(path, header, config)
        tensors = weight_files.TensorFiles(shapes, read, lambda name: path)
        generation = gguf.read_gguf_generation_config(header)
    else:
        hf = weight_files.read_json(path / "config.json")
        config = ModelConfig.from_hf(hf, where=str(path / "config.json"))
        classifier = _is_classifier(hf, path / "config.json")
        tensors, generation = (
            weight_files.open_safetensors(path),
            weight_files.read_generation_config(path, hf),
        )
    if classifier and head == "logits":
        raise ValueError(
            f"{path}: a sequence classifier has no language-model head; load it with head='score'"
        )
    _check(tensors, config, "score" if classifier else "logits", path)
    config = dataclasses.replace(config.keep_layers(num_layers), vocab_multiple=vocab_multiple)
    params: Params = {"layers": {}}
    for e in _entries(config, head):
        tree = params["layers"] if e.stacked else params
        if e.key == "score" and not classifier:
            key = keys.make_key(seed, "init_score_head")
            tree["score"] = init_params(key, {"score": e.spec}, layout)["score"]
        else:
            tree[e.key] = _place(e, tensors, layout)
    return LoadedModel(config, params, classifier or head == "logits", generation)


def read_config(source: str, num_layers: int = 0) -> ModelConfig:
    """The shape of a model, as `load` would give it, without reading a tensor.  Raises as `load` does."""
    path = weight_files.resolve_source(source)
    if _is_gguf(path):
        config = gguf.read_model_config(gguf.read_header(path), path)
    else:
        config = ModelConfig.from_hf(
            weight_files.read_json(path / "config.json"), where=str(path / "config.json")
        )
    return config.keep_layers(num_layers)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _assemble(e: _Entry, tensors: weight_files.TensorFiles) -> np.ndarray:
    """One parameter on the host: f32, its layers stacked, padded vocabulary rows zero."""
    out = np.zeros(e.spec.shape, np.float32)
    for i, name in enumerate(e.names):
        x = tensors.read(name)
        target = out[i] if e.stacked else out
        if e.vocab:
            target[: len(x)] = x
        else:
            target[...] = (x.T if e.inputs else x).reshape(e.shape)
    return out


def _place(e: _Entry, tensors: weight_files.TensorFiles, layout: Layout) -> jax.Array:
    """One parameter on the devices."""
    shape = e.spec.shape
    sharding = layout.sharding(e.spec.axes, shape)
    whole = _assemble(e, tensors) if tensors.read_slice is None else None
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    placed = []
    for bounds, devices in holders.items():  # replicas share what is read once
        index = tuple(slice(*b) for b in bounds)
        part = _part(e, tensors, index) if whole is None else whole[index]
        copies = [jax.device_put(part, device) for device in devices]
        placed += jax.block_until_ready(copies)  # else the next part is read while this one is still held
        del part
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _part(e: _Entry, tensors: weight_files.TensorFiles, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a parameter at `index`, as `_assemble` would give it, without reading more than that."""
    out = np.zeros([s.stop - s.start for s in index], np.float32)
    if not e.stacked:
        _fill(out, e, tensors, e.names[0], index)
        return out
    for target, name in zip(out, e.names[index[0]], strict=True):
        _fill(target, e, tensors, name, index[1:])
    return out


def _fill(
    target: np.ndarray, e: _Entry, tensors: weight_files.TensorFiles, name: str, index: tuple[slice, ...]
) -> None:
    """Read a part of one tensor into its place; padded vocabulary rows are left as they are."""
    if e.vocab:
        rows = slice(index[0].start, min(index[0].stop, e.hf_shape[0]))
        if rows.start < rows.stop:
            target[: rows.stop - rows.start] = tensors.read_slice(name, (rows, index[1]))
    elif e.inputs:
        inputs = _runs(e.shape[: e.inputs], index[: e.inputs])
        outputs = _runs(e.shape[e.inputs :], index[e.inputs :])
        flat = target.reshape(math.prod(target.shape[: e.inputs]), -1)
        for columns, i in inputs:
            for rows, o in outputs:
                flat[i, o] = tensors.read_slice(name, (rows, columns)).T
    else:
        flat, first = target.reshape(-1), (slice(0, 1),) * (len(e.hf_shape) - 1)
        for run, at in _runs(e.shape, index):
            flat[at] = tensors.read_slice(name, (*first, run)).reshape(-1)


def _runs(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[slice, slice]]:
    """A box within an array, both flattened: its unbroken runs, each with its place in the box."""
    cut = len(shape)  # the dimensions from here on are whole
    while cut and index[cut - 1] == slice(0, shape[cut - 1]):
        cut -= 1
    if cut == 0:
        return [(slice(0, math.prod(shape)),) * 2]
    *outer, last = index[:cut]
    inner = math.prod(shape[cut:])
    length = (last.stop - last.start) * inner
    out = []
    for n, place in enumerate(itertools.product(*(range(s.start, s.stop) for s in outer))):
        row = int(np.ravel_multi_index(place, shape[: cut - 1])) if place else 0
        start = (row * shape[cut - 1] + last.start) * inner
        out.append((slice(start, start + length), slice(n * length, (n + 1) * length)))
    return out


def _check(tensors: weight_files.TensorFiles, config: ModelConfig, head: str, path: Path) -> None:
    """Every tensor the config asks for is there, in its shape, and no other."""
    wanted = {name: e.hf_shape for e in _entries(config, head) for name in e.names}
    tolerated = {"lm_head.weight"} if config.tied else set()  # some writers store the tied head again
    missing = [n for n in wanted if n not in tensors.shapes]
    if missing:
        raise ValueError(
            f"{path}: {_some(missing)} missing, which its config asks for ({config.family}, {config.layers} "
            f"layers, {'tied' if config.tied else 'untied'}): config and weights do not belong together"
        )
    unknown = [
        n
        for n in tensors.shapes
        if n not in wanted and n not in tolerated and not n.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        raise ValueError(
            f"{tensors.where(unknown[0])}: {_some(unknown)} unknown for a {config.family} model of "
            f"{config.layers} layers with a {head} head: config and weights do not belong together"
        )
    for name, shape in wanted.items():
        if tuple(tensors.shapes[name]) != shape:
            raise ValueError(
                f"{tensors.where(name)}: {name} has the shape {tuple(tensors.shapes[name])}, but the config "
                f"says {shape}: config and weights do not belong together"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_classifier(hf: dict[str, Any], file: Path) -> bool:
    """Whether the architecture is a sequence classifier (with one label, or ValueError)."""
    architecture = (hf["architectures"] or [""])[0] if "architectures" in hf else ""
    if architecture == ARCHITECTURES[hf["model_type"], "logits"]:
        return False
    if architecture != ARCHITECTURES[hf["model_type"], "score"]:
        raise ValueError(
            f"{file}: architectures is {[architecture]}; expected one of "
            f"{[name for (family, _), name in ARCHITECTURES.items() if family == hf['model_type']]}"
        )
    labels = len(hf["id2label"]) if "id2label" in hf else hf["num_labels"] if "num_labels" in hf else 2
    if labels != 1:
        raise ValueError(f"{file}: the classifier has {labels} labels; a reward model has 1 (num_labels=1)")
    return True


# --- out -------------------------------------------------------------------------------------------------


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
    """Write a directory that AutoModelForCausalLM (head "logits") or AutoModelForSequenceClassification
    (head "score", one label) loads: config.json, safetensors, generation_config.json, the tokenizer's files.

    A score head needs `pad_token_id`: transformers scores the last token that is not it.  dtype: float32 or
    bfloat16.  The directory appears whole or not at all; one that is there is replaced.  Every array must be
    addressable from this host.
    """
    directory = Path(directory)
    if dtype not in _DTYPES:
        raise ValueError(f"{directory}: dtype {dtype!r} is none of {sorted(_DTYPES)}")
    if head == "score" and pad_token_id is None:
        raise ValueError(
            f"{directory}: a score head needs pad_token_id, or transformers cannot find the last token"
        )
    if pad_token_id is not None and not 0 <= pad_token_id < config.vocab_size:
        raise ValueError(
            f"{directory}: pad_token_id {pad_token_id} is outside the {config.vocab_size} tokens"
        )
    architecture = ARCHITECTURES[config.family, head]
    hf = config.to_hf(architecture) | {"torch_dtype": dtype}
    hf |= {k: v for k, v in (generation_config or {}).items() if k in ("bos_token_id", "eos_token_id")}
    if pad_token_id is not None:
        hf["pad_token_id"] = pad_token_id
    if head == "score":
        hf |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}

    directory.parent.mkdir(parents=True, exist_ok=True)
    new, old = (directory.with_name(f".{directory.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        new.mkdir()
        (new / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        if generation_config:
            text = json.dumps(generation_config, indent=2) + "\n"
            (new / "generation_config.json").write_text(text, encoding="utf-8")
        for name in _TOKENIZER_FILES:
            if tokenizer_dir is not None and (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, new / name)
        _write_shards(new, _entries(config, head), params, _DTYPES[dtype], max_shard_bytes)
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(
    directory: Path, entries: list[_Entry], params: Params, dtype: Any, max_shard_bytes: int
) -> None:
    """Tensors in the table's order, into as few files as the limit allows; one parameter is held at a time."""
    sizes = [(n, math.prod(e.hf_shape) * np.dtype(dtype).itemsize) for e in entries for n in e.names]
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    tensors = _hf_tensors(entries, params, dtype)
    files = {}
    for i, names in enumerate(shards):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(next(tensors) for _ in names), directory / file, metadata={"format": "pt"})
        # safetensors lets the owner alone read what it writes; a file of our own has what the umask allows.
        shutil.copymode(directory / "config.json", directory / file)
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in sizes)}, "weight_map": files}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _hf_tensors(entries: list[_Entry], params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    for e in entries:
        tree = params["layers"] if e.stacked else params
        whole = np.asarray(jax.device_get(tree[e.key]))
        for i, name in enumerate(e.names):
            x = whole[i] if e.stacked else whole
            if e.vocab:
                x = x[: e.hf_shape[0]]
            elif e.inputs:
                x = x.reshape(e.hf_shape[::-1]).T
            yield name, np.ascontiguousarray(x.reshape(e.hf_shape).astype(dtype))
