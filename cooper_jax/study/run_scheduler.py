"""Carries out a study's runs: some processes at once, until all have ended.

1. The first run in the order that can begin takes a free place; those that are complete are not started again.
2. What a run says goes to log.txt in its folder.  Of one that fails the end of that is told; the others go on.
3. A signal is passed on as SIGTERM, at which runs save their last whole step.

With several places each run keeps to one core: together they fill a machine better than each with all its cores.
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

GRACE = 300.0  # seconds that runs have, after a signal, to save and to end
PAUSE = 0.3  # seconds between two looks at the runs
TAIL = 12  # lines of a log that are shown


@dataclasses.dataclass
class Working:
    """A run under way."""

    run: StudyRun
    process: subprocess.Popen
    began: float  # seconds of time.perf_counter
    had: int  # steps that were done before


@dataclasses.dataclass(frozen=True)
class Failure:
    run: StudyRun
    what: str

    def __str__(self) -> str:
        return f"{self.run.label}: {self.what}"


@dataclasses.dataclass
class Standing:
    """Where a study stands."""

    runs: Sequence[StudyRun]
    jobs: int
    complete: list[StudyRun] = dataclasses.field(default_factory=list)
    failed: list[Failure] = dataclasses.field(default_factory=list)
    working: dict[int, Working] = dataclasses.field(default_factory=dict)  # by place, 0 .. jobs - 1
    waiting: list[StudyRun] = dataclasses.field(default_factory=list)


def run_study(runs: Sequence[StudyRun], jobs: int, watch: Callable[[Standing], None]) -> list[Failure]:
    """Run what is not complete, `jobs` at once.

    watch: is shown the standing again and again.  Raises Stopped when a signal came and all runs have ended.
    """
    now = Standing(runs, jobs)
    for run in runs:
        (now.complete if run.complete() else now.waiting).append(run)
    with _signals() as heard:
        try:
            while now.waiting or now.working:
                _begin(now)
                watch(now)
                time.sleep(PAUSE)
                if heard:
                    raise Stopped
                _collect(now)
        finally:
            _stop(now, heard)
    watch(now)
    return now.failed


def _begin(now: Standing) -> None:
    """Fill the free places."""
    ready = {run.folder for run in now.complete}
    for place in range(now.jobs):
        run = next((r for r in now.waiting if r.after is None or r.after in ready), None)
        if place in now.working or run is None:
            continue
        now.waiting.remove(run)
        now.working[place] = Working(run, _start(run, place, now.jobs), time.perf_counter(), run.done())


def _start(run: StudyRun, place: int, jobs: int) -> subprocess.Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    pinned = jobs > 1 and hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if pinned else set()
    with open(run.folder / "log.txt", "ab") as log:
        log.write(f"$ {shlex.join(run.command)}\n".encode())
        log.flush()
        try:
            if pinned:  # what this thread starts inherits its cores
                os.sched_setaffinity(0, {sorted(cores)[place % len(cores)]})
            # A session of its own: a terminal's Ctrl-C reaches it by way of us alone, as SIGTERM.
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


def _collect(now: Standing) -> None:
    """Take note of what has ended; what waited for a run that failed fails with it."""
    for place, work in list(now.working.items()):
        code = work.process.poll()
        if code is None:
            continue
        del now.working[place]
        if code == 0 and work.run.complete():
            now.complete.append(work.run)
            continue
        ended = f"ended with exit code {code}" if code else f"ended before step {work.run.steps}"
        lines = (work.run.folder / "log.txt").read_text(errors="replace").splitlines()
        tail = "".join(f"\n    {line}" for line in lines[-TAIL:])
        now.failed.append(Failure(work.run, f"{ended}; {work.run.folder / 'log.txt'} ends with{tail}"))
        for run in [r for r in now.waiting if r.after == work.run.folder]:
            now.waiting.remove(run)
            now.failed.append(Failure(run, f"not started, for {work.run.label} failed"))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals to end, as they come, in place of what they would do."""
    heard: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, lambda number, _: heard.append(number)) for name in names}
    try:
        yield heard
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _stop(now: Standing, heard: list[int]) -> None:
    """End what is still running: by SIGTERM; after GRACE, or a second signal, by SIGKILL."""
    working = [work.process for work in now.working.values()]
    for process in working:
        if process.poll() is None:
            process.terminate()
    signals, last = len(heard), time.perf_counter() + GRACE
    while any(process.poll() is None for process in working):
        time.sleep(0.1)
        if len(heard) > signals or time.perf_counter() > last:
            for process in working:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its rule workers, too
                    process.wait()
