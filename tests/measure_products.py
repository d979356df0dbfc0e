"""The rate of matrix products in float32 on this machine's CPU: XLA's and, where torch is installed, torch's.

    taskset -c 0 python tests/measure_products.py
    taskset -c 0 python tests/measure_products.py --shapes=32x512x1408,4x512x512

A shape is ROWS x CONTRACTED x COLUMNS.  On a CPU, most of the time of rollouts and updates is such products, so
their rate bounds both.  Printed are medians of --reps; the two libraries alternate, so that a busy machine slows
both.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

# Of a model of 512 x 1408 with 16,384 tokens: an update's rows, and a decoding step's, with its head.
SHAPES = "7168x512x1408,512x512x1408,32x512x1408,32x512x16384,8x512x1408"
SECONDS = 0.1  # of each repetition, at least


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call, as the mean over SECONDS of calls."""
    begun, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < SECONDS:
        call()
        calls += 1
    return spent / calls


def make_xla(left: np.ndarray, right: np.ndarray) -> Callable[[], object]:
    """A call of the compiled product."""
    a, b = jnp.asarray(left), jnp.asarray(right)
    product = jax.jit(jnp.dot).lower(a, b).compile()
    return lambda: product(a, b).block_until_ready()


def make_torch(left: np.ndarray, right: np.ndarray) -> Callable[[], object]:
    """A call of torch's product into memory that is there."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    a, b = torch.from_numpy(left), torch.from_numpy(right)
    out = torch.empty(a.shape[0], b.shape[1])
    return lambda: torch.mm(a, b, out=out)


def main() -> None:
    """Print a table with a row for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help="ROWSxCONTRACTEDxCOLUMNS, separated by commas")
    parser.add_argument("--reps", type=int, default=9, help="repetitions of each")
    options = parser.parse_args()
    libraries = {"XLA": make_xla} | ({"torch": make_torch} if importlib.util.find_spec("torch") else {})

    print("| product | " + " | ".join(f"{name}, GFLOP/s" for name in libraries) + " |")
    print("| --- |" + " --: |" * len(libraries))
    for shape in options.shapes.split(","):
        rows, contracted, columns = map(int, shape.split("x"))
        rng = np.random.default_rng(0)
        operands = [
            rng.normal(size=size).astype(np.float32) for size in ((rows, contracted), (contracted, columns))
        ]
        calls = {name: make(*operands) for name, make in libraries.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.reps):
            for name, call in calls.items():
                times[name].append(time_call(call))
        work = 2e-9 * rows * contracted * columns
        rates = [f"{work / statistics.median(seconds):.0f}" for seconds in times.values()]
        print(f"| {shape} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
