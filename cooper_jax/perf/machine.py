"""Measured rates of this machine for the roofline: matrix products, memory bandwidth; and peak memory use.

Each rate is the best of several trials, because a roofline is an upper bound on speed.  One device is
measured; `Rates.times` scales the result to several.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.runtime.device_memory import MIB, read_last_level_cache

GB = 1e9
TRIALS = 5
TRIAL_SECONDS = 0.05  # a trial repeats the measured call for at least this long
MAX_MODEL_ROWS = 1024  # of a model's matrix product; more rows would not raise its FLOP/s

# Sizes by platform: "cpu", or "other" for accelerators.
SQUARE_SIDE = {"cpu": 1024, "other": 8192}  # side of the large square matrix product
REPEATS = {"cpu": 1, "other": 16}  # products (or passes over memory) in one call, to amortise its dispatch
ARRAY_BYTES = {"cpu": 256 * MIB, "other": 512 * MIB}  # larger than any cache


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak rates that the roofline divides by."""

    flops: float  # flop/s
    bandwidth: float  # byte/s
    measured: dict[str, float]  # every measurement of one device by name: GFLOP/s or GB/s

    def times(self, devices: int) -> Rates:
        """The rates of several such devices; `measured` stays that of one."""
        return dataclasses.replace(self, flops=self.flops * devices, bandwidth=self.bandwidth * devices)

    def best(self, other: Rates) -> Rates:
        """The larger of two measurements of one machine, since other load can only slow it down."""
        return Rates(
            max(self.flops, other.flops),
            max(self.bandwidth, other.bandwidth),
            {name: max(value, other.measured[name]) for name, value in self.measured.items()},
        )


def measure_rates(dtype: str, rows: int, width: int, ffn: int, weight_bytes: int) -> Rates:
    """Measure the default device: matrix products in `dtype`, and memory bandwidth.

    Args:
      rows, width, ffn: shape of a model's matrix products, [rows, width] @ [width, ffn] and back.  They are
        timed in addition to a large square product, and the faster of the two is the peak.
      weight_bytes: bytes read by one forward pass.  If they fit in the CPU's last-level cache, its bandwidth
        may be the peak.
    """
    # Compute.  On a CPU a model's product can be faster than the square one, if its weights fit in a cache.
    platform = "cpu" if jax.default_backend() == "cpu" else "other"
    side, repeats = SQUARE_SIDE[platform], REPEATS[platform]
    measured = {
        f"gemm_square_{side}": _measure_gemm(dtype, side, side, side, repeats),
        "gemm_model": _measure_gemm(dtype, min(rows, MAX_MODEL_ROWS), width, ffn, repeats),
    }
    flops = max(measured.values())

    # Memory.
    if platform == "cpu":
        cache_bytes = read_last_level_cache()
        bandwidths = _host_bandwidth("dram", max(ARRAY_BYTES["cpu"], 8 * cache_bytes))
        # Arrays of half the cache, because other processes use a part of it as well.
        cached = _host_bandwidth("cache", cache_bytes // 2)
        measured |= bandwidths | cached
        if weight_bytes <= cache_bytes * 3 // 4:
            bandwidths |= cached
    else:
        bandwidths = _device_bandwidth(ARRAY_BYTES["other"], repeats)
        measured |= bandwidths

    return Rates(flops * GB, max(bandwidths.values()) * GB, measured)


def peak_memory() -> dict[str, int]:
    """Bytes: peak resident memory of this process, and peak device memory where the platform reports it."""
    # The unit of ru_maxrss: bytes on macOS, KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}

    # CPUs report no memory statistics.  The fullest device is the one that limits a run.
    device_peaks = []
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            device_peaks.append(stats["peak_bytes_in_use"])
    if device_peaks:
        peaks["device_peak_bytes"] = max(device_peaks)
    return peaks


def _best_seconds(call: Callable[[], object]) -> float:
    """Seconds per call, in the best of TRIALS."""
    # The first call compiles, and is not timed.
    call()
    trials = []
    for _ in range(TRIALS):
        start, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < TRIAL_SECONDS or not count:
            call()
            count += 1
        trials.append(elapsed / count)
    return min(trials)


def _measure_gemm(dtype: str, m: int, k: int, n: int, repeats: int) -> float:
    """Measure GFLOP/s of [m, k] @ [k, n] @ [n, k], `repeats` times in sequence."""
    # Scaled by 1 / sqrt of the contracted size, so that repeated products do not overflow.
    rng = np.random.default_rng(0)
    x, a, b = (
        jnp.asarray(rng.standard_normal(shape, np.float32) * shape[0] ** -0.5, jnp.dtype(dtype))
        for shape in ((m, k), (k, n), (n, k))
    )

    @jax.jit
    def run(x, a, b):
        return jax.lax.fori_loop(0, repeats, lambda _, y: (y @ a) @ b, x)

    return 4 * m * k * n * repeats / _best_seconds(lambda: run(x, a, b).block_until_ready()) / GB


def _host_bandwidth(name: str, size: int) -> dict[str, float]:
    """Measure GB/s of reading and of copying `size` / 2 bytes, on all cores available to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source, target = (np.array_split(np.ones(size // 8, np.float32), cores) for _ in range(2))

    # NumPy releases the GIL in these operations.  A copy both reads and writes `size` / 2 bytes.
    with ThreadPoolExecutor(cores) as pool:

        def time_on_all_cores(fn, *parts):
            return _best_seconds(lambda: list(pool.map(fn, *parts)))

        read = size / 2 / time_on_all_cores(np.max, source)
        copy = size / time_on_all_cores(np.copyto, target, source)
    return {f"read_{name}": read / GB, f"copy_{name}": copy / GB}


def _device_bandwidth(size: int, repeats: int) -> dict[str, float]:
    """Measure GB/s of a = a / 2 + b over device arrays of `size` bytes each: two reads and a write."""
    a = b = jnp.ones(size // 4, jnp.float32)

    @jax.jit
    def run(a, b):
        return jax.lax.fori_loop(0, repeats, lambda _, a: 0.5 * a + b, a)

    return {"triad": 3 * size * repeats / _best_seconds(lambda: run(a, b).block_until_ready()) / GB}
