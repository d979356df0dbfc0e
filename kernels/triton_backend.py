"""Pallas' backend for Triton, imported here alone: jax deprecates it, and a later jax will not have it."""

from __future__ import annotations

import jax

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError as error:
    raise ImportError(
        f"jax {jax.__version__} has no Pallas backend for Triton, with which the kernels for NVIDIA GPUs are "
        "compiled: set --config.rollout.kernels=xla, or install jax 0.10 or 0.11"
    ) from error

__all__ = ["plgpu"]
