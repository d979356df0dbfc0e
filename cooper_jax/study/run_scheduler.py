"""Scheduler of a study's runs: several processes at a time, until all have ended.

1. A free slot starts the first waiting run whose seed's start is complete.  Complete runs are not started
   again.
2. A run's output goes to log.txt in its folder.  If the run fails, the last lines of its log are reported,
   and the other runs continue.
3. A signal to the study is forwarded to its runs as SIGTERM, at which they save their last complete step.

With several slots each run is pinned to one core, which has a higher throughput than runs that compete for
all cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from cooper_jax.runtime.hosts import Stopped
from cooper_jax.study.study_plan import StudyRun

GRACE = 300.0  # seconds between SIGTERM and SIGKILL, in which runs save and end
PAUSE = 0.3  # seconds between two polls of the processes
TAIL = 12  # lines of a failed run's log that are shown


@dataclasses.dataclass
class RunningProcess:
    """A run whose process has not ended."""

    run: StudyRun
    process: subprocess.Popen
    began: float  # seconds of time.perf_counter
    steps_before: int  # steps done by earlier processes of the same run


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that failed, or that was not started because the run it waits for failed."""

    run: StudyRun
    reason: str

    def __str__(self) -> str:
        return f"{self.run.label}: {self.reason}"


@dataclasses.dataclass
class StudyStatus:
    """The runs of a study by status."""

    runs: Sequence[StudyRun]  # all of them
    jobs: int  # number of slots
    # Every run is in exactly one of these.
    complete: list[StudyRun] = dataclasses.field(default_factory=list)
    failed: list[Failure] = dataclasses.field(default_factory=list)
    running: dict[int, RunningProcess] = dataclasses.field(default_factory=dict)  # by slot, 0 .. jobs - 1
    waiting: list[StudyRun] = dataclasses.field(default_factory=list)


def run_study(runs: Sequence[StudyRun], jobs: int, watch: Callable[[StudyStatus], None]) -> list[Failure]:
    """Run all runs that are not complete; returns the failures.

    Args:
      runs: the runs, in the order in which they start.
      jobs: the number of processes at a time.
      watch: function that is called with the status at every poll.

    Raises Stopped after a signal, when all processes have ended.
    """
    status = StudyStatus(runs, jobs)
    for run in runs:
        (status.complete if run.is_complete() else status.waiting).append(run)

    # Signals are only recorded: an exception in the middle of starting a process could lose that process.
    with _record_signals() as received:
        try:
            while status.waiting or status.running:
                _fill_slots(status)
                watch(status)
                time.sleep(PAUSE)
                if received:
                    raise Stopped
                _collect_ended(status)
        finally:
            _terminate_all(status, received)
    watch(status)
    return status.failed


def _fill_slots(status: StudyStatus) -> None:
    """Start waiting runs in the free slots."""
    # A run can start when the start of its seed is complete; a failed start removes its runs from `waiting`.
    complete = {run.folder for run in status.complete}
    for slot in range(status.jobs):
        run = next((r for r in status.waiting if r.after is None or r.after in complete), None)
        if slot in status.running or run is None:
            continue
        status.waiting.remove(run)
        process = _start_process(run, slot, status.jobs)
        status.running[slot] = RunningProcess(run, process, time.perf_counter(), run.count_done())


def _start_process(run: StudyRun, slot: int, jobs: int) -> subprocess.Popen:
    """Start a run's process, pinned to the slot's core where there are several slots."""
    run.folder.mkdir(parents=True, exist_ok=True)
    pinned = jobs > 1 and hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if pinned else set()

    # Append to the log: an earlier process may have stopped before the last step.
    with open(run.folder / "log.txt", "ab") as log:
        log.write(f"$ {shlex.join(run.command)}\n".encode())
        log.flush()
        try:
            # A child process inherits the affinity of the thread that starts it.
            if pinned:
                os.sched_setaffinity(0, {sorted(cores)[slot % len(cores)]})
            # In a session of its own the run does not receive the terminal's Ctrl-C, only SIGTERM from here.
            return subprocess.Popen(
                run.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            if pinned:
                os.sched_setaffinity(0, cores)


def _collect_ended(status: StudyStatus) -> None:
    """Move the runs whose processes have ended to `complete` or `failed`.

    The runs that wait for a failed start fail as well.
    """
    for slot, running in list(status.running.items()):
        code, run = running.process.poll(), running.run
        if code is None:
            continue
        del status.running[slot]
        if code == 0 and run.is_complete():
            status.complete.append(run)
            continue

        # Exit code 0 before the last step is a failure too, such as a run that stopped after a signal.
        ended = f"ended with exit code {code}" if code else f"ended before step {run.steps}"
        log = run.folder / "log.txt"
        lines = log.read_text(errors="replace").splitlines()
        tail = "".join(f"\n    {line}" for line in lines[-TAIL:])
        status.failed.append(Failure(run, f"{ended}; {log} ends with{tail}"))

        for dependent in [r for r in status.waiting if r.after == run.folder]:
            status.waiting.remove(dependent)
            status.failed.append(Failure(dependent, f"not started, because {run.label} failed"))


@contextlib.contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Append SIGINT, SIGTERM and SIGHUP to a list instead of ending the process."""
    received: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, lambda number, _: received.append(number)) for name in names}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _terminate_all(status: StudyStatus, received: list[int]) -> None:
    """End the remaining processes by SIGTERM, and by SIGKILL after GRACE seconds or at another signal."""
    processes = [running.process for running in status.running.values()]
    for process in processes:
        if process.poll() is None:
            process.terminate()

    # A signal that arrived before this call has had its effect: only later ones end the wait.
    signals, deadline = len(received), time.perf_counter() + GRACE
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if len(received) > signals or time.perf_counter() > deadline:
            for process in processes:
                if process.poll() is None:
                    # The process leads its group, which includes the processes of its rule verifier.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
