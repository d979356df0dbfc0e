"""Export of adapters to a directory that `peft` loads: adapter_config.json and adapter_model.safetensors.

    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = peft.PeftModel.from_pretrained(base, DIRECTORY)

The directory has the adapters alone, and of a reward model its score head; the base's weights are not in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from cooper_jax.model.config import ModelConfig
from cooper_jax.model.lora import count_inputs
from cooper_jax.model.weight_export import DTYPES, replace_directory, write_json
from cooper_jax.model.weight_table import make_entries
from cooper_jax.runtime.optim import ADAPTERS
from cooper_jax.types import Params

_PREFIX = "base_model.model."  # of every tensor in a file of peft


def save_adapters(
    directory: str | Path, config: ModelConfig, params: Params, head: str, base: str, dtype: str = "float32"
) -> None:
    """Write a model's adapters, and its score head if it has one.

    The directory appears complete or not at all, and replaces an existing one.  Every array must be addressable
    from this host.

    Args:
      head: "logits" or "score".
      base: where the base's weights are, for adapter_config.json.
      dtype: "float32" or "bfloat16".

    Raises ValueError for a model without adapters, and for another dtype.
    """
    directory, lora = Path(directory), config.lora
    if lora is None:
        raise ValueError(f"{directory}: the model has no adapters; export it as a whole")
    if dtype not in DTYPES:
        raise ValueError(f"{directory}: dtype {dtype!r} is none of {sorted(DTYPES)}")
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head == "score" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # Modules that are trained and stored as a whole.
        "modules_to_save": ["score"] if head == "score" else None,
    }
    with replace_directory(directory) as new:
        write_json(new / "adapter_config.json", settings)
        tensors = {
            name: np.ascontiguousarray(x.astype(DTYPES[dtype]))
            for name, x in _iterate_tensors(config, params, head)
        }
        file = new / "adapter_model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        # safetensors writes files that only their owner can read; the other file has the umask's mode.
        shutil.copymode(new / "adapter_config.json", file)


def _iterate_tensors(config: ModelConfig, params: Params, head: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (peft's name, tensor) of each layer's adapters: A as [rank, in], B as [out, rank]."""
    names = {entry.key: entry.names for entry in make_entries(config, head)}
    for key, adapter in params[ADAPTERS].items():
        a, b = (np.asarray(jax.device_get(adapter[side])) for side in ("a", "b"))
        layers, rank = a.shape[0], a.shape[-1]
        assert a.ndim == 2 + count_inputs(key), "layers, inputs, rank"
        sides = {"A": a.reshape(layers, -1, rank), "B": b.reshape(layers, rank, -1)}
        for layer, name in enumerate(names[key]):
            module = _PREFIX + name.removesuffix(".weight")
            for side, x in sides.items():
                yield f"{module}.lora_{side}.weight", x[layer].T
    if head == "score":
        yield _PREFIX + "score.weight", np.asarray(jax.device_get(params["score"]))[None]
