"""Typed settings of the rollout: the config's `rollout` section.

`make_sampling_spec` selects the settings of sampling, `make_engine_options` those of the engine and devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

from ml_collections import ConfigDict

from cooper_jax.kernels import kv
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.settings import bounds, typed_config

KERNELS = ("auto", "xla")
WEIGHT_PLACEMENTS = ("auto", "gathered", "sharded")
DTYPES = ("float32", "bfloat16")


class EngineOptions(TypedDict):
    """Keyword arguments of `engine.generate` that are the same for every rollout of a run."""

    max_rows: int | None
    memory_gib: float | None
    weight_placement: str
    implementation: str | None


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of the rollout: the config's `rollout` section."""

    # The responses.
    group_size: int  # G, responses per prompt
    max_new_tokens: int  # T, EOS included
    # Sampling.
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    # The decode batch.
    max_rows: int  # rows decoded at a time; 0: all rows of a step
    memory_gib: float  # of one device, for weights, caches and slots; 0: no limit
    segment: int  # tokens decoded between two checks for finished rows
    ahead: int  # updates by which the weights of training rollouts are old: 0 or 1
    # Number formats, kernels and placement.
    dtype: str  # of the rollout's weights and activations
    kernels: str  # auto or xla
    weight_placement: str  # of the rollout's copy of the weights: auto, gathered or sharded
    kv_dtype: str  # of the KV cache; "": as dtype

    def __post_init__(self) -> None:
        typed_config.raise_errors(
            [
                *bounds.find_out_of_bounds(self, "rollout"),
                *typed_config.find_unknown(self.dtype, "rollout.dtype", DTYPES),
                *typed_config.find_unknown(self.kernels, "rollout.kernels", KERNELS),
                *typed_config.find_unknown(
                    self.weight_placement, "rollout.weight_placement", WEIGHT_PLACEMENTS
                ),
                *typed_config.find_unknown(self.kv_dtype or self.dtype, "rollout.kv_dtype", kv.DTYPES),
            ]
        )

    @classmethod
    def from_config(cls, section: ConfigDict) -> RolloutConfig:
        """Read the `rollout` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "rollout")

    @property
    def is_float32(self) -> bool:
        """True if weights, activations and cache are float32."""
        return self.dtype == "float32" and (self.kv_dtype or self.dtype) == "float32"

    @property
    def samples_all_tokens(self) -> bool:
        """True if no top-k, top-p or min-p filters the tokens."""
        return self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0

    def make_sampling_spec(self, eos_ids: tuple[int, ...], **changes: Any) -> SamplingSpec:
        """Make the sampling settings of a training step.

        changes: fields of SamplingSpec to replace, for sampling other than a training step's.
        """
        spec = SamplingSpec(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            group_size=self.group_size,
            eos_ids=eos_ids,
            segment=self.segment,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
        )
        return dataclasses.replace(spec, **changes)

    def make_engine_options(self) -> EngineOptions:
        """Make the keyword arguments of `engine.generate` for limits, weight placement and kernels."""
        # A config has no None: 0 and "auto" stand for it.
        return EngineOptions(
            max_rows=self.max_rows or None,
            memory_gib=self.memory_gib or None,
            weight_placement=self.weight_placement,
            implementation=None if self.kernels == "auto" else self.kernels,
        )


def get_engine_options(cfg: ConfigDict) -> EngineOptions:
    """Make the engine's options from a whole config.  Raises SetupError for `rollout` values out of range."""
    return RolloutConfig.from_config(cfg.rollout).make_engine_options()
