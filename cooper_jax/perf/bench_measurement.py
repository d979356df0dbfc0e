"""Measurement of a benchmark program (bench_programs.py) on this machine, beside its roofline."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.perf import bench_programs, machine, roofline
from cooper_jax.settings.setup_errors import setup_errors


def measure_program(
    program: bench_programs.BenchProgram, reps: int, devices: int | None = None
) -> dict[str, Any]:
    """Time a program and compute its roofline; returns the result as launch/bench.py --out writes it.

    devices: that the program runs on; None: all.
    """
    # The rates are measured on matrix products of the program's own shapes and type.
    config, dtype = program.config, program.dtype
    weight_bytes = sum(roofline.count_weights(config)) * jnp.dtype(dtype).itemsize
    product_shapes = dtype, program.rows, config.width, config.ffn, weight_bytes
    rates_before = machine.measure_rates(*product_shapes)

    # The first call compiles.  Errors of the setup, such as a lack of memory, arise in it.
    with setup_errors(program.name):
        first = bench_programs.time_call(program.call, 0)
    seconds = [bench_programs.time_call(program.call, i) for i in range(1, reps + 1)]
    median = float(np.median(seconds))

    # Decoding cannot be timed by itself: it continues from the prefill's caches.
    phases = {}
    if program.prefill is not None:
        bench_programs.time_call(program.prefill, 0)  # compiles
        prefill = float(np.median([bench_programs.time_call(program.prefill, i) for i in range(1, reps + 1)]))
        phases = {"prefill": prefill, "decode": median - prefill}

    # Clock rates change with temperature and load, so the rates are measured again.
    device_rates = rates_before.best(machine.measure_rates(*product_shapes))
    # The virtual devices of a CPU share its cores, and the rates were measured with all cores.
    if devices is None:
        devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    rates = device_rates.times(devices)
    bound = roofline.roofline_seconds(program.work, rates)
    parts = {
        name: dataclasses.asdict(work) | {"seconds": work.seconds(rates)}
        for name, work in program.work.items()
    }

    return {
        "program": program.name,
        "dtype": dtype,
        "tokens": program.tokens,
        "tokens_are": program.counted,
        "tokens_per_second": program.tokens / median,
        "first_call_seconds": first,
        "seconds": seconds,
        "median_seconds": median,
        "phase_seconds": phases,
        "roofline": {
            "seconds": bound,
            "share": bound / median,
            "parts": parts,
            "flops_per_second": rates.flops,
            "bytes_per_second": rates.bandwidth,
            "devices": devices,
            "measured": device_rates.measured,
        },
        "memory": machine.peak_memory(),
    }


def format_result(result: dict[str, Any]) -> str:
    """Format a result of `measure_program` as a table."""
    bound = result["roofline"]
    repetitions = f"median of {len(result['seconds'])}"
    lines = [
        f"{result['program']}: {result['tokens_per_second']:,.0f} tokens/s "
        f"({result['tokens']:,} {result['tokens_are']}, {result['dtype']})",
        f"{'':20}{'seconds':>10}{'roofline':>10}{'share':>8}",
        f"{'first call':20}{result['first_call_seconds']:10.3f}",
        f"{repetitions:20}{result['median_seconds']:10.4f}{bound['seconds']:10.4f}{bound['share']:8.0%}",
    ]

    # Parts are listed if there are several; only those of a rollout have times of their own.
    parts = bound["parts"] if len(bound["parts"]) > 1 else {}
    for name, part in parts.items():
        measured, share = "", ""
        if name in result["phase_seconds"]:
            seconds = result["phase_seconds"][name]
            measured, share = f"{seconds:.4f}", f"{part['seconds'] / seconds:.0%}"
        lines.append(f"{'  ' + name:20}{measured:>10}{part['seconds']:10.4f}{share:>8}")

    rates = f"{bound['flops_per_second'] / 1e9:,.0f} GFLOP/s, {bound['bytes_per_second'] / 1e9:,.0f} GB/s"
    if bound["devices"] > 1:
        rates += f": {bound['devices']} devices at the measured rates of one"
    memory = ", ".join(
        f"{name.removesuffix('_bytes')} {size / 2**20:,.0f} MiB" for name, size in result["memory"].items()
    )
    return "\n".join([*lines, f"rates: {rates}", f"memory: {memory.replace('_', ' ')}"])
