"""Sizes of memory on this machine: an accelerator's memory, and the CPU's largest cache.

Batch sizes and the placement of weights are planned with these.
"""

from __future__ import annotations

from pathlib import Path

import jax

MIB = 2**20

# Assumed if the operating system does not report the CPU's caches.
DEFAULT_CACHE_BYTES = 16 * MIB

# Suffixes of the sizes that Linux reports.
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def read_device_memory(device: jax.Device) -> int | None:
    """Return the bytes of an accelerator's memory; None if the platform does not report them (CPUs).

    Asks a local device of the same platform, because `device` may belong to another host.  All devices of a
    run are alike, so every host plans with the same number.
    """
    stats = jax.local_devices(backend=device.platform)[0].memory_stats()
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def read_last_level_cache() -> int:
    """Return the bytes of the CPU's largest cache; DEFAULT_CACHE_BYTES if Linux does not report it."""
    # One folder per cache of core 0: index0, index1, ... (L1 data, L1 instruction, L2, L3).
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [file.read_text().strip() for file in files]  # "32768K"
    return max(
        (int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS),
        default=DEFAULT_CACHE_BYTES,
    )
