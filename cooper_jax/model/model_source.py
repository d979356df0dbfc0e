"""Typed settings of a model's weights, tokenizer and compute type, in `policy` and other config sections."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from cooper_jax.model.lora import LoraConfig
from cooper_jax.settings import bounds, typed_config

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ArchConfig:
    """The shape of a model made from scratch: a model section's `arch`."""

    family: str  # a key of families.FAMILIES

    # Sizes; see `ModelConfig`.
    layers: int
    vocab_size: int  # pieces of the sentencepiece model that is trained for it
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    rope_theta: float
    tied: bool  # the output head is the embedding, transposed


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's weights, tokenizer and compute type: fields of a model's section, such as `policy`."""

    # A directory, a hub id, a .gguf file, package:NAME/FILE.gguf, or "random" for the shape in `arch`.
    weights: str
    tokenizer: str  # "": the one that comes with the weights

    # Changes to the model as stored.
    num_layers: int  # keep only the first layers; 0 keeps all
    vocab_multiple: int  # the vocabulary is padded to a multiple of this
    dtype: str  # of the computation: float32 or bfloat16

    arch: ArchConfig  # used with random weights only
    lora: LoraConfig | None  # adapters to be trained in place of the weights
    name: str = dataclasses.field(compare=False)  # of the section, for messages

    def __post_init__(self) -> None:
        typed_config.raise_errors(
            [
                *bounds.find_out_of_bounds(self, self.name),
                *bounds.find_out_of_bounds(self.arch, f"{self.name}.arch"),
            ]
        )

    @classmethod
    def from_config(cls, section: ConfigDict, name: str) -> ModelSource:
        """Read a section; name: "policy", "reward" or another model's section.

        Raises SetupError for values out of range.
        """
        arch = typed_config.read_section(ArchConfig, section.arch, f"{name}.arch")
        lora = read_lora(section, name)
        return typed_config.read_section(cls, section, name, name=name, arch=arch, lora=lora)


def read_lora(section: ConfigDict, name: str) -> LoraConfig | None:
    """Read the adapters' settings of a model's section; None for a model that is not trained, or without any.

    Raises SetupError for values out of range.
    """
    return LoraConfig.from_config(section.lora, f"{name}.lora") if "lora" in section else None
