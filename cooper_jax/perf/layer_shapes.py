"""Sizes of one layer, its activations and the head on one device: what the budgets of memory and bytes count with.

They follow from the model's shape and from the mesh alone.

D width   H query heads   K key/value heads   h head_dim   F feed-forward width   V padded vocabulary
t ways of the tensor axis   g ways of the fsdp axis
"""

from __future__ import annotations

import dataclasses
import math

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.runtime.mesh import Layout, ParamSpec


@dataclasses.dataclass(frozen=True)
class LayerShapes:
    """Elements on one device.  Activations are those of one token."""

    # Activations.
    width: int  # D
    queries: int  # H h / t
    keys: int  # K h / t, at least one head
    ffn: int  # F / t
    # Weights, as they are multiplied: gathered over fsdp, sharded over tensor.
    matrices: dict[str, int]  # a layer's, by name
    head: int  # V D / t
    vocabulary: int  # V / t
    gather_ways: int  # g: devices over which a layer's matrices are gathered; 1: they are not

    @property
    def layer(self) -> int:
        """Weights of a layer's matrices."""
        return sum(self.matrices.values())


def shape_layer(config: ModelConfig, layout: Layout) -> LayerShapes:
    """Compute the sizes on one device of a layout."""
    heads_ways = layout.ways(layout.spec(("heads",), (config.heads,))[0])
    ffn_ways = layout.ways(layout.spec(("ffn",), (config.ffn,))[0])
    vocab_ways = layout.ways(layout.spec(("vocab",), (config.padded_vocab,))[0])
    kv_heads = max(config.kv_heads // heads_ways, 1)

    base = dataclasses.replace(config, lora=None)
    specs = transformer.param_specs(base)["layers"]
    gathered = dataclasses.replace(layout, rules=(("embed", None), *layout.rules))
    matrices = {
        name: _count_shard(spec, gathered)
        for name, spec in specs.items()
        if len(spec.shape) > 2 and not name.endswith("bias")
    }
    return LayerShapes(
        width=config.width,
        queries=config.heads * config.head_dim // heads_ways,
        keys=kv_heads * config.head_dim,
        ffn=config.ffn // ffn_ways,
        matrices=matrices,
        head=config.padded_vocab * config.width // vocab_ways,
        vocabulary=config.padded_vocab // vocab_ways,
        gather_ways=layout.first_ways("embed"),
    )


def _count_shard(spec: ParamSpec, layout: Layout) -> int:
    """Count the elements of one layer of a stacked parameter on one device."""
    shard = layout.sharding(spec.axes, spec.shape).shard_shape(spec.shape)
    return math.prod(shard) // spec.shape[0]
