"""Long forms of what docs/reliability.md promises: many steps, many kills, many lost hosts.

    python tests/measure_endurance.py flat --steps=2000
    python tests/measure_endurance.py kills --cycles=50
    python tests/measure_endurance.py losses --cycles=10

flat    one run; memory, open files, threads and processes must not grow; the trend of step time is printed, which
        depends on what else the machine does
kills   a run that is killed at random moments and started again, compared bit for bit with an uninterrupted one
losses  the same with two processes, of which a random one is killed

The runs are those of tests/tiny_runs.py.  --out=DIR keeps their folders.  Exit code 1: a run failed, or differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import numpy as np
import tiny_runs

from cooper_jax.runtime import hosts

SAMPLING_SECONDS = 0.2  # between two looks at a process
BATCHES = 20  # batch means, from which a slope's interval is computed
MEMORY_GROWTH = 0.1  # share by which resident memory may grow after the first tenth of the steps
T_QUANTILE = 2.10  # Student's 97.5 % quantile with BATCHES - 2 degrees of freedom
NOTICE_SECONDS = 60.0  # in which the other process must end after one was killed
RUN_SECONDS = 1800.0  # limit of a start that is not killed
# Of a run that is killed: every step is saved, and every step is compared.
KILLED = {"checkpoint__every": 1, "checkpoint__keep": 2, "eval__every": 0}


class EnduranceError(Exception):
    """A run failed, or differs from the uninterrupted one."""


@dataclasses.dataclass(frozen=True)
class Slope:
    """A linear trend with its 95 % interval."""

    start: float  # the line's value at the first point
    change: float  # from the first point to the last
    margin: float  # half of the interval of `change`


def fit_slope(values: np.ndarray) -> Slope:
    """Fit a line to values f64[N] at equal distances, by means of BATCHES batches.

    Raises EnduranceError for fewer values.

    Neighbouring values depend on each other; means of long batches hardly do.
    """
    if len(values) < BATCHES:
        raise EnduranceError(f"{len(values)} values are too few for a trend: give more --steps")
    means = np.asarray([batch.mean() for batch in np.array_split(values, BATCHES)])
    x = np.linspace(0.0, 1.0, BATCHES)
    centred = x - x.mean()
    slope = float(centred @ means / (centred @ centred))
    residuals = means - means.mean() - slope * centred
    error = np.sqrt(residuals @ residuals / (BATCHES - 2) / (centred @ centred))
    return Slope(float(means.mean() - slope * x.mean()), slope, T_QUANTILE * float(error))


# --- many steps ---


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a process and its children hold."""

    step: int  # steps logged
    memory: float  # MB, resident, of the process
    workers: float  # MB, resident, of its children together
    files: int  # open files
    threads: int
    processes: int  # children


def read_usage(process: int, step: int) -> Usage:
    """Read a process's usage from /proc.  Raises OSError after its end."""
    folder = Path("/proc") / str(process)
    fields = read_status(process)
    if "VmRSS" not in fields:
        raise ProcessLookupError(f"process {process} has ended")
    # Each thread has a list of the processes that it started.
    children = [
        child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()
    ]
    return Usage(
        step=step,
        memory=read_memory(fields),
        workers=sum(read_memory(read_status(int(child))) for child in children),
        files=len(os.listdir(folder / "fd")),
        threads=int(fields["Threads"]),
        processes=len(children),
    )


def read_status(process: int) -> dict[str, str]:
    """The fields of a process's status in /proc.  Raises OSError after its end."""
    lines = (Path("/proc") / str(process) / "status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)


def read_memory(status: dict[str, str]) -> float:
    """Resident MB; 0 for a process that is ending."""
    return int(status["VmRSS"].split()[0]) / 1e3 if "VmRSS" in status else 0.0


def measure_flatness(folder: Path, steps: int) -> None:
    """Run many steps, and print the trends of what the process holds and of the time a step takes."""
    path, usages = folder / "run", []
    changes = {"steps": steps, "eval__every": 100, "checkpoint__every": 100, "checkpoint__keep": 2}
    command = tiny_runs.command(path, **changes, log__samples_every=50)
    with open(folder / "out", "wb") as file:
        process = subprocess.Popen(
            command, env=tiny_runs.environment(), stdout=file, stderr=subprocess.STDOUT
        )
    with ended([process]):
        while process.poll() is None:
            with contextlib.suppress(OSError):
                usages.append(read_usage(process.pid, count_steps(path)))
            time.sleep(SAMPLING_SECONDS)
    if process.returncode != 0:
        raise EnduranceError(f"exit code {process.returncode}: {(folder / 'out').read_text()[-2000:]}")

    # The first tenth fills caches and the allocator's pools.
    warm = [usage for usage in usages if steps // 10 <= usage.step < steps]
    # Step 0 has none.
    seconds = [row["time/step"] for row in tiny_runs.metrics(path) if row["step"] > steps // 10]
    print(f"{steps} steps; trends from step {steps // 10} to {steps}, of {len(warm)} looks at the process")
    print(f"{'':14} {'at the start':>14} {'change':>10}   95 % interval")
    growing = []
    for name in ("memory", "workers", "files", "threads", "processes"):
        slope = fit_slope(np.asarray([getattr(usage, name) for usage in warm], float))
        print_slope(name, slope)
        # Of memory, what the allocators keep may still grow a little.
        allowed = MEMORY_GROWTH * slope.start if name in ("memory", "workers") else 1
        if slope.change - slope.margin > allowed:
            growing.append(name)
    print_slope("step, ms", fit_slope(1e3 * np.asarray(seconds)))
    if growing:
        raise EnduranceError(f"the run holds more and more: {', '.join(growing)}")


def print_slope(name: str, slope: Slope) -> None:
    """Print a trend as a row."""
    low, high = slope.change - slope.margin, slope.change + slope.margin
    shown = f"{name}, MB" if name in ("memory", "workers") else name
    print(f"{shown:14} {slope.start:14.1f} {slope.change:+10.2f}   {low:+.2f} to {high:+.2f}")


# --- many kills ---


def count_steps(path: Path) -> int:
    """Number of rows of a run's metrics."""
    log = path / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def start_run(
    path: Path, processes: int, out: Path, steps: int, start: Path | None
) -> list[subprocess.Popen]:
    """Start the processes of a run; what they print goes to files in `out`.

    start: a run whose models at step 0 are taken, so that no start trains them again.
    """
    changes = KILLED | {"steps": steps}
    if start is not None:
        changes["supervised__start_from"] = start
    if processes > 1:
        return tiny_runs.start_hosts(path, processes, 2, out, **changes)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "0", "wb") as file:
        command = tiny_runs.command(path, **changes)
        return [subprocess.Popen(command, env=tiny_runs.environment(), stdout=file, stderr=subprocess.STDOUT)]


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen]) -> Iterator[None]:
    """Context after which no process is left."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish_run(processes: list[subprocess.Popen], out: Path) -> None:
    """Wait for the end of a run.  Raises EnduranceError unless all steps are complete."""
    with ended(processes):
        codes = [process.wait(RUN_SECONDS) for process in processes]
    if any(codes):
        raise EnduranceError(f"exit codes {codes}: {(out / '0').read_text()[-2000:]}")


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a process is killed: `seconds` after it logged `steps` steps since its start."""

    steps: int
    seconds: float


def draw_moment(draw: random.Random, startup: float, step: float) -> Moment:
    """Draw the moment of a kill: one in five is before the first step.

    Args:
      startup: seconds until the first step.
      step: seconds of a step.
    """
    if draw.random() < 0.2:
        return Moment(0, draw.uniform(0.0, startup))
    return Moment(draw.randrange(1, 4), draw.uniform(0.0, 2.0 * step))


def kill_at(moment: Moment, victim: int, processes: list[subprocess.Popen], path: Path) -> bool:
    """Kill a process at a moment; False if the run ended before.

    Raises EnduranceError if the others go on, or end with a code that is not documented.
    """
    with ended(processes):
        wanted = count_steps(path) + moment.steps
        while count_steps(path) < wanted:
            if any(process.poll() is not None for process in processes):
                return False
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[victim].wait(moment.seconds)
            return False
        processes[victim].send_signal(signal.SIGKILL)
        for i, process in enumerate(processes):
            if i == victim:
                continue
            try:
                code = process.wait(NOTICE_SECONDS)
            except subprocess.TimeoutExpired:
                raise EnduranceError(f"process {i} did not notice that process {victim} was killed") from None
            # JAX itself aborts the others where the first process is killed, and those that still wait for one
            # to connect.
            if code not in (hosts.LOST, -signal.SIGABRT):
                raise EnduranceError(f"process {i} ended with code {code} after process {victim} was killed")
        return True


def compare_runs(path: Path, whole: Path, steps: int) -> None:
    """Raises EnduranceError unless two runs have the same metrics, samples and models."""
    if tiny_runs.timeless(tiny_runs.metrics(path)) != tiny_runs.timeless(tiny_runs.metrics(whole)):
        raise EnduranceError("the metrics differ")
    if (path / "samples.jsonl").read_bytes() != (whole / "samples.jsonl").read_bytes():
        raise EnduranceError("the samples differ")
    for model in ("policy", "reward"):
        found, wanted = (tiny_runs.parameters(run, steps, model) for run in (path, whole))
        if found.tobytes() != wanted.tobytes():
            raise EnduranceError(f"the {model} model differs")


def measure_kills(folder: Path, cycles: int, steps: int, processes: int, seed: int) -> None:
    """Kill a run `cycles` times at random moments, let it finish, and compare it with an uninterrupted one."""
    draw = random.Random(seed)
    start = folder / "start"
    finish_run(start_run(start, 1, folder / "start_out", 0, None), folder / "start_out")
    whole, out = folder / "whole", folder / "whole_out"
    began = time.monotonic()
    finish_run(start_run(whole, processes, out, steps, start), out)
    total = time.monotonic() - began
    if not sum(row["pairs/valid"] for row in tiny_runs.metrics(whole)):
        raise EnduranceError("no step made a pair, so the reward model was never updated")

    seconds = [row["time/step"] for row in tiny_runs.metrics(whole) if row["step"] > 0]
    step, startup = float(np.median(seconds)), total - sum(seconds)

    path, reached = folder / "run", []
    for cycle in range(cycles):
        started = start_run(path, processes, folder / f"out_{cycle}", steps, start)
        moment, victim = draw_moment(draw, startup, step), draw.randrange(processes)
        if not kill_at(moment, victim, started, path):
            break
        reached.append(count_steps(path))
    out = folder / "out_last"
    finish_run(start_run(path, processes, out, steps, start), out)
    compare_runs(path, whole, steps)
    print(f"{len(reached)} kills over {steps} steps, after {', '.join(map(str, reached))}")
    print("metrics, samples and both models are bit-equal to those of the uninterrupted run")
    if len(reached) < cycles:
        raise EnduranceError(f"the run ended after {len(reached)} of {cycles} kills: give more --steps")


def main(arguments: list[str]) -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("flat", "kills", "losses"))
    parser.add_argument("--steps", type=int, help="default: 2000 for flat, ten for each kill")
    parser.add_argument("--cycles", type=int, help="kills; default: 50, or 10 for losses")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder, which must not exist")
    options = parser.parse_args(arguments)
    cycles = options.cycles or (10 if options.what == "losses" else 50)
    with contextlib.ExitStack() as stack:
        folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.out:
            folder.mkdir(parents=True)
        try:
            if options.what == "flat":
                measure_flatness(folder, options.steps or 2000)
            else:
                processes = 2 if options.what == "losses" else 1
                measure_kills(folder, cycles, options.steps or 10 * cycles, processes, options.seed)
        except EnduranceError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
