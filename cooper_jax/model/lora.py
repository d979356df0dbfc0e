"""LoRA (arXiv 2106.09685): a frozen model with low-rank adapters beside some of its matrices.

A matrix W [in, out] of a layer becomes W + s A B, with A [in, rank], B [rank, out] and

    s = alpha / rank            LoRA
    s = alpha / sqrt(rank)      rank-stabilised LoRA (arXiv 2312.03732)

(`peft` stores both transposed, and writes s B A.)  B starts at zero, so that the model starts as its base.

1. `adapter_specs` declares the adapters, which are the entry "lora" of a model's parameters.
2. In training the layers compute x W + s (x A) B (model/layers.py), so that no gradient of W is computed.  Of the
   base's parameters only a score head is trained (optim.select_trained).
3. `merge_adapters` adds the adapters to the matrices, for rollouts and for export.

The reference policy is the base: the same arrays, without the adapters (`ModelConfig.base`).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cooper_jax.runtime.mesh import ParamSpec
from cooper_jax.runtime.optim import ADAPTERS
from cooper_jax.settings import bounds, typed_config
from cooper_jax.types import Params

# Matrices that can have adapters, by the names that `peft` uses; a parameter's key is the name without "_proj".
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Settings of a model's adapters: the `lora` section of `policy` and `reward`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of TARGETS
    rslora: bool
    base_dtype: str  # of the frozen weights, except norms: float32 or bfloat16
    name: str = dataclasses.field(default="lora", compare=False)  # of the section, for messages

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, self.name)
        if not self.targets:
            errors.append(f"{self.name}.targets is empty: name matrices, as in q_proj,v_proj")
        for target in self.targets:
            errors += typed_config.find_unknown(target, f"{self.name}.targets", TARGETS)
        if len(set(self.targets)) < len(self.targets):
            errors.append(f"{self.name}.targets={','.join(self.targets)}: a name occurs twice")
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict, name: str) -> LoraConfig | None:
        """Read a `lora` section; None if its rank is 0.  name: the section's dotted name.

        Raises SetupError for values out of range.
        """
        if section.get("rank") == 0:
            return None
        targets = tuple(target.strip() for target in section.get("targets", "").split(",") if target.strip())
        return typed_config.read_section(cls, section, name, name=name, targets=targets)

    @property
    def scale(self) -> float:
        """The factor s of the product of the adapters."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the adapted matrices in a layer's parameters."""
        return tuple(target.removesuffix("_proj") for target in self.targets)


def count_inputs(key: str) -> int:
    """The number of axes of a layer's matrix that are its inputs: o [H, h, D] has two, the others one."""
    return 2 if key == "o" else 1


def adapter_specs(config: LoraConfig, layers: dict[str, ParamSpec]) -> dict[str, dict[str, ParamSpec]]:
    """Declare the adapters of a model's layers: key -> {"a": [L, in.., rank], "b": [L, rank, out..]}.

    A is drawn with the variance 1 / (3 inputs) of `peft`'s initial values, B is zero.

    layers: the declarations of the layers' parameters, whose first axis is L.
    """
    specs = {}
    for key in config.keys:
        matrix = layers[key]
        split = 1 + count_inputs(key)  # behind the layer axis and the inputs
        inputs, outputs = matrix.shape[1:split], matrix.shape[split:]
        specs[key] = {
            "a": ParamSpec(
                (matrix.shape[0], *inputs, config.rank),
                (*matrix.axes[:split], None),
                scale=(3 * math.prod(inputs)) ** -0.5,
            ),
            "b": ParamSpec(
                (matrix.shape[0], config.rank, *outputs),
                (matrix.axes[0], None, *matrix.axes[split:]),
                "zeros",
            ),
        }
    return specs


def merge_adapters(params: Params, config: LoraConfig) -> Params:
    """Add the adapters to their matrices, in f32: parameters of the base model, without "lora"."""
    layers = dict(params["layers"])
    for key, adapter in params[ADAPTERS].items():
        # [L, in.., rank] x [L, rank, out..] -> [L, in.., out..]
        a, b = (adapter[name].astype(jnp.float32) for name in ("a", "b"))
        product = jax.lax.dot_general(
            a, b, (((a.ndim - 1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
        )
        layers[key] = layers[key].astype(jnp.float32) + config.scale * product
    base = {name: value for name, value in params.items() if name != ADAPTERS}
    return base | {"layers": layers}
