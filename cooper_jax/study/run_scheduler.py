"""Scheduler of a study's runs: several processes at a time, until all have ended.

1. A free slot starts the first waiting run for which the starts that it needs are complete.  Complete runs are
   not started again.
2. A run's output goes to log.txt in its folder.  If the run fails, the last lines of its log are reported,
   and the other runs continue.
3. A signal to the study is forwarded to its runs as SIGTERM, at which they save their last complete step.
4. A slot that would be idle because the arms wait for a reward model compiles their programs for the cache.  As
   soon as an arm can use the slot, this process gets a SIGTERM; its folder is deleted.

With several slots each run is pinned to one core, which has a higher throughput than runs that compete for
all cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

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

    # The run that only compiles: None if there is none, or if it has been started.
    compile_run: StudyRun | None = None
    # Its process by slot, until a run takes the slot or the process ends.
    compiling: dict[int, RunningProcess] = dataclasses.field(default_factory=dict)
    # Its process after a SIGTERM, until it ends.
    ending: list[RunningProcess] = dataclasses.field(default_factory=list)

    @property
    def processes(self) -> list[subprocess.Popen]:
        """All processes that may be running."""
        everything = (*self.running.values(), *self.compiling.values(), *self.ending)
        return [running.process for running in everything]


def run_study(
    runs: Sequence[StudyRun],
    jobs: int,
    watch: Callable[[StudyStatus], None],
    compile_run: StudyRun | None = None,
) -> list[Failure]:
    """Run all runs that are not complete; returns the failures.

    Args:
      runs: the runs, in the order in which they start.
      jobs: the number of processes at a time.
      watch: function that is called with the status at every poll.
      compile_run: what a slot does that would be idle although runs wait, once.

    Raises Stopped after a signal, when all processes have ended.
    """
    status = StudyStatus(runs, jobs, compile_run=compile_run)
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
    # A failed start removes the runs that need it from `waiting`.
    complete = {run.folder for run in status.complete}
    # A slot that compiles is taken last.
    for slot in sorted(range(status.jobs), key=lambda slot: slot in status.compiling):
        run = next((r for r in status.waiting if complete.issuperset(r.after)), None)
        if slot in status.running or run is None:
            continue
        if slot in status.compiling:
            # It ends within a program or two, and until then shares the core.
            status.compiling[slot].process.terminate()
            status.ending.append(status.compiling.pop(slot))
        status.waiting.remove(run)
        process = _start_process(run, slot, status.jobs)
        status.running[slot] = RunningProcess(run, process, time.perf_counter(), run.count_done())
    _start_compiling(status, complete)


def _start_compiling(status: StudyStatus, complete: Collection[Path]) -> None:
    """Start the run that only compiles if a slot is idle although runs wait."""
    run = status.compile_run
    idle = [slot for slot in range(status.jobs) if slot not in status.running]
    if run is None or not idle or not status.waiting or not set(complete).issuperset(run.after):
        return
    status.compile_run = None
    shutil.rmtree(run.folder, ignore_errors=True)  # of a command that was killed
    process = _start_process(run, idle[0], status.jobs)
    status.compiling[idle[0]] = RunningProcess(run, process, time.perf_counter(), 0)


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
    _collect_compiling(status)
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

        for dependent in [r for r in status.waiting if run.folder in r.after]:
            status.waiting.remove(dependent)
            status.failed.append(Failure(dependent, f"not started, because {run.label} failed"))


def _collect_compiling(status: StudyStatus) -> None:
    """Delete the folder of the run that only compiles when its process has ended, however it ended.

    If it failed, the arms compile their programs themselves, and show why if they fail, too.
    """
    for slot, running in list(status.compiling.items()):
        if running.process.poll() is not None:
            status.ending.append(status.compiling.pop(slot))
    for running in list(status.ending):
        if running.process.poll() is not None:
            status.ending.remove(running)
            shutil.rmtree(running.run.folder, ignore_errors=True)


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
    processes = status.processes
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
    _collect_compiling(status)
