"""What this machine can do, measured: the rate of matrix products, the bandwidth of memory, the memory used.

Each figure is the best of several tries, as a bound needs.  One device is measured; `Rates.times` gives several.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

GB = 1e9
MIB = 2**20
TRIES = 5
TRY_SECONDS = 0.05  # a try repeats what is measured for at least so long
MOST_ROWS = 1024  # of a model's matrix product: more would not be faster
# Sizes by platform, "cpu" or another.
SQUARE = {"cpu": 1024, "other": 8192}  # side of a large matrix product
CHAIN = {"cpu": 1, "other": 16}  # products (or sweeps of memory) in one call: its start must not count
ARRAY = {"cpu": 256 * MIB, "other": 512 * MIB}  # beyond every cache


@dataclasses.dataclass(frozen=True)
class Rates:
    flops: float  # flop/s
    bandwidth: float  # byte/s
    measured: dict[str, float]  # each measurement: GFLOP/s or GB/s, by name, of one device

    def times(self, devices: int) -> Rates:
        return dataclasses.replace(self, flops=self.flops * devices, bandwidth=self.bandwidth * devices)

    def best(self, other: Rates) -> Rates:
        """Of two measurements of one machine the better figures: what else it did can only have slowed it."""
        return Rates(
            max(self.flops, other.flops),
            max(self.bandwidth, other.bandwidth),
            {name: max(value, other.measured[name]) for name, value in self.measured.items()},
        )


def measure_rates(dtype: str, rows: int, width: int, ffn: int, weight_bytes: int) -> Rates:
    """The rates of the default device, for matrix products in `dtype`.

    rows, width, ffn: a model's products, [rows, width] with [width, ffn] and back, are tried beside a large square
    one.  weight_bytes: what a pass reads; where the CPU's last cache holds it, its bandwidth counts
    if it is the larger.
    """
    platform = "cpu" if jax.default_backend() == "cpu" else "other"
    side = SQUARE[platform]
    found = {f"gemm_square_{side}": _gemm(dtype, side, side, side, CHAIN[platform])}
    found["gemm_model"] = _gemm(dtype, min(rows, MOST_ROWS), width, ffn, CHAIN[platform])
    if platform == "cpu":
        cache = last_level_cache()
        bandwidths = _host_bandwidth("dram", max(ARRAY["cpu"], 8 * cache))
        # Half the cache: a whole one is shared with whatever else runs.
        cached = _host_bandwidth("cache", cache // 2)
        found |= bandwidths | cached
        if weight_bytes <= cache * 3 // 4:
            bandwidths |= cached
    else:
        found |= (bandwidths := _device_bandwidth(ARRAY["other"], CHAIN["other"]))
    gemms = (rate for name, rate in found.items() if name.startswith("gemm"))
    return Rates(max(gemms) * GB, max(bandwidths.values()) * GB, found)


def peak_memory() -> dict[str, int]:
    """Bytes: the most this process has held, and where the platform tells, the most of any device's memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    out = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [s for d in jax.local_devices() if (s := d.memory_stats()) and "peak_bytes_in_use" in s]
    return out | ({"device_peak_bytes": max(s["peak_bytes_in_use"] for s in stats)} if stats else {})


def device_memory(device: jax.Device) -> int | None:
    """Bytes of an accelerator's memory, the same on every host; None where the platform does not tell (CPUs)."""
    stats = jax.local_devices(backend=device.platform)[0].memory_stats()
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache; 16 MiB where Linux does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=16 * MIB)


def _best(call: Callable[[], object]) -> float:
    """Seconds of one call, in the best of TRIES."""
    call()
    tries = []
    for _ in range(TRIES):
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < TRY_SECONDS or not count:
            call()
            count += 1
        tries.append(passed / count)
    return min(tries)


def _gemm(dtype: str, m: int, k: int, n: int, chain: int) -> float:
    """GFLOP/s of [m, k] x [k, n] x [n, k], one after the other."""
    kind = jnp.dtype(dtype)
    rng = np.random.default_rng(0)
    x, a, b = (
        jnp.asarray(rng.standard_normal(shape, np.float32) * shape[0] ** -0.5, kind)
        for shape in ((m, k), (k, n), (n, k))
    )

    @jax.jit
    def run(x, a, b):
        return jax.lax.fori_loop(0, chain, lambda _, y: (y @ a) @ b, x)

    return 4 * m * k * n * chain / _best(lambda: run(x, a, b).block_until_ready()) / GB


def _host_bandwidth(name: str, size: int) -> dict[str, float]:
    """GB/s of reading arrays of `size` bytes, and of copying half into half, by every core that we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source, target = (np.array_split(np.ones(size // 8, np.float32), cores) for _ in range(2))
    with ThreadPoolExecutor(cores) as pool:  # NumPy lets go of the interpreter while it works

        def each(fn, *parts):
            return _best(lambda: list(pool.map(fn, *parts)))

        read = size / 2 / each(np.max, source)
        copy = size / each(np.copyto, target, source)
    return {f"read_{name}": read / GB, f"copy_{name}": copy / GB}


def _device_bandwidth(size: int, chain: int) -> dict[str, float]:
    """GB/s of a = a / 2 + b on a device's arrays of `size` bytes: two reads and a write."""
    a = b = jnp.ones(size // 4, jnp.float32)

    @jax.jit
    def run(a, b):
        return jax.lax.fori_loop(0, chain, lambda _, a: 0.5 * a + b, a)

    return {"triad": 3 * size * chain / _best(lambda: run(a, b).block_until_ready()) / GB}
