"""Which form of a kernel runs: chosen when a program is traced.

xla                              plain jnp, everywhere; the CPU's form
tpu, tpu_interpret               Pallas through Mosaic; interpreted, with its copies and semaphores, on a CPU
triton, triton_interpret         Pallas through Triton, for CUDA GPUs; interpreted on a CPU
"""

from __future__ import annotations

import jax

IMPLEMENTATIONS = ("xla", "tpu", "tpu_interpret", "triton", "triton_interpret")
_OF_PLATFORM = {"tpu": "tpu", "gpu": "triton", "cuda": "triton"}


def default(platform: str | None = None) -> str:
    """The implementation for devices of a platform ("cpu", "gpu", "tpu"); None: of the default backend."""
    platform = jax.default_backend() if platform is None else platform
    return _OF_PLATFORM[platform] if platform in _OF_PLATFORM else "xla"


def resolve(implementation: str | None) -> str:
    """A name that exists.  Raises ValueError for another."""
    chosen = default() if implementation is None else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {chosen!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return chosen
