"""Choice of a kernel implementation by platform, made when a program is traced.

xla                              plain jnp, on any platform; the CPU's default
tpu, tpu_interpret               Pallas through Mosaic; interpreted on a CPU, with its copies and semaphores
triton, triton_interpret         Pallas through Triton, for CUDA GPUs; interpreted on a CPU
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Implementation(NamedTuple):
    """Parts of an implementation's name."""

    backend: str  # xla, tpu or triton: the key of an operation's table of backends
    interpret: bool  # the Pallas kernel is interpreted on a CPU


IMPLEMENTATIONS = {
    "xla": Implementation("xla", interpret=False),
    "tpu": Implementation("tpu", interpret=False),
    "tpu_interpret": Implementation("tpu", interpret=True),
    "triton": Implementation("triton", interpret=False),
    "triton_interpret": Implementation("triton", interpret=True),
}
_OF_PLATFORM = {"tpu": "tpu", "gpu": "triton", "cuda": "triton"}


def default_implementation(platform: str | None = None) -> str:
    """Return the implementation for a platform ("cpu", "gpu", "tpu"); None: the default backend's."""
    platform = jax.default_backend() if platform is None else platform
    return _OF_PLATFORM.get(platform, "xla")


def is_pallas(implementation: str | None) -> bool:
    """Tell Pallas kernels from plain jnp.

    Pallas kernels read packed caches (kv.py), only the columns of them that they need, and a prompt's keys
    through an index; the compiler does not partition them over a mesh.  Raises ValueError as
    `resolve_implementation` does.
    """
    return resolve_implementation(implementation).backend != "xla"


def resolve_implementation(implementation: str | None) -> Implementation:
    """Look up an implementation; None: the default backend's.  Raises ValueError for an unknown name."""
    chosen = default_implementation() if implementation is None else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {chosen!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[chosen]
