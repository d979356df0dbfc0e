"""Which form of a kernel runs: chosen when a program is traced.

xla                              plain jnp, everywhere; the CPU's form
tpu, tpu_interpret               Pallas through Mosaic; interpreted, with its copies and semaphores, on a CPU
triton, triton_interpret         Pallas through Triton, for CUDA GPUs; interpreted on a CPU
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Implementation(NamedTuple):
    """One implementation of the kernels, taken apart."""

    form: str  # xla, tpu or triton: the key of an operation's table of forms
    interpret: bool  # a Pallas kernel is interpreted, on a CPU


IMPLEMENTATIONS = {
    "xla": Implementation("xla", interpret=False),
    "tpu": Implementation("tpu", interpret=False),
    "tpu_interpret": Implementation("tpu", interpret=True),
    "triton": Implementation("triton", interpret=False),
    "triton_interpret": Implementation("triton", interpret=True),
}
_OF_PLATFORM = {"tpu": "tpu", "gpu": "triton", "cuda": "triton"}


def default_implementation(platform: str | None = None) -> str:
    """The implementation for devices of a platform ("cpu", "gpu", "tpu"); None: of the default backend."""
    platform = jax.default_backend() if platform is None else platform
    return _OF_PLATFORM[platform] if platform in _OF_PLATFORM else "xla"


def is_pallas(implementation: str | None) -> bool:
    """Tell Pallas kernels from plain jnp.

    Pallas kernels read packed caches (kv.py), of them only the columns that they need, and a prompt's keys through
    an index; the compiler does not partition them over a mesh.  Raises ValueError as `resolve` does.
    """
    return resolve_implementation(implementation).form != "xla"


def resolve_implementation(implementation: str | None) -> Implementation:
    """The implementation of a name; None: the default backend's.  Raises ValueError for an unknown name."""
    chosen = default_implementation() if implementation is None else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {chosen!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[chosen]
