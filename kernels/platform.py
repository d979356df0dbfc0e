"""Choice of a kernel implementation by platform, made when a program is traced.

xla                plain jnp, on any platform; the default on CPUs
tpu                Pallas through Mosaic
tpu_interpret      the tpu kernels interpreted on a CPU, with their copies and semaphores: for tests
triton             Pallas through Triton, for CUDA GPUs, if this jax has that backend (triton_backend.py)
triton_interpret   the triton kernels interpreted on a CPU: for tests
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import jax


class Implementation(NamedTuple):
    """A backend, and the way in which its kernels run."""

    backend: str  # xla, tpu or triton: the key of an operation's table of backends
    interpret: bool  # True: the Pallas kernel is interpreted on a CPU


IMPLEMENTATIONS = {
    "xla": Implementation("xla", interpret=False),
    "tpu": Implementation("tpu", interpret=False),
    "tpu_interpret": Implementation("tpu", interpret=True),
    "triton": Implementation("triton", interpret=False),
    "triton_interpret": Implementation("triton", interpret=True),
}
# jax's name for any GPU is "gpu", for NVIDIA's also "cuda".  Platforms that are not listed run plain jnp.
_OF_PLATFORM = {"tpu": "tpu", "gpu": "triton", "cuda": "triton"}


def default_implementation(platform: str | None = None) -> str:
    """Return the implementation for a platform ("cpu", "gpu", "tpu").  platform None: the default backend.

    It is xla where a GPU has no Pallas backend, with a message on stderr.
    """
    platform = jax.default_backend() if platform is None else platform
    name = _OF_PLATFORM.get(platform, "xla")
    return "xla" if name == "triton" and not _has_triton() else name


@functools.cache
def _has_triton() -> bool:
    """Return True if Pallas' backend for Triton can be imported; otherwise print the reason, once."""
    # Imported here: Pallas is slow to import, and the CPU does not need it.
    try:
        from cooper_jax.kernels import triton_backend  # noqa: F401
    except ImportError as error:
        print(f"warning: {error}; GPUs use plain XLA", file=sys.stderr, flush=True)
        return False
    return True


def is_pallas(implementation: str | None) -> bool:
    """Return True for Pallas kernels and False for plain jnp.

    Pallas kernels take packed caches (kv.py), read only the columns that count, and read a prompt's keys
    through an index; the compiler does not partition them over a mesh.  Raises ValueError for an unknown
    name.
    """
    return resolve_implementation(implementation).backend != "xla"


def resolve_implementation(implementation: str | None) -> Implementation:
    """Look up an implementation; None: the default backend's.  Raises ValueError for an unknown name."""
    name = default_implementation() if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]
