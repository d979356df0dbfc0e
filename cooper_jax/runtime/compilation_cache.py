"""The cache of compiled programs on disk."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next start of the same job compiles nothing.

    The folder is $JAX_COMPILATION_CACHE_DIR, or ~/.cache/cooper_jax/xla.  With several hosts, the first host
    writes.  A cache that the caller's program has chosen stays as it is.
    """
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds its options at run time
    if chosen and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        return
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "cooper_jax" / "xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    # JAX's default of one second would leave out most programs of configs/tiny.py.  A step also has about fifty of
    # some hundredths of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
