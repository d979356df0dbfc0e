"""Progress of a study: a live line on a terminal, elsewhere a line at every change.

7/12 runs  seed_10/robust 40/100 48%  seed_11/rule 20/100 52%  ETA 0:41:10
"""

from __future__ import annotations

import datetime
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from cooper_jax.study.arms import START
from cooper_jax.study.records import EVALUATED, read_whole_rows
from cooper_jax.study.run_scheduler import StudyStatus
from cooper_jax.study.study_plan import StudyRun

EVERY = 2.0  # seconds between two reads of the runs' files


class ProgressBoard:
    """Prints the status of a study; `close` ends the live line.

    out: stdout if None.  clock: seconds.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.perf_counter):
        self._out = sys.stdout if out is None else out
        self._clock = clock
        self._last_read = -EVERY
        self._printed: tuple = ()
        self._failures_printed = 0
        # (seconds, steps) of processes that have ended, starts apart from other runs, and of those still
        # running.  Only this process's own are known: earlier ones may have run on another machine.
        self._ended: dict[str, list[tuple[float, int]]] = {START: [], "": []}
        self._running: dict[StudyRun, tuple[float, int]] = {}

    def __call__(self, status: StudyStatus) -> None:
        """Print the status if the runs have changed or EVERY seconds have passed."""
        started = {running.run for running in status.running.values()}
        recent = self._clock() < self._last_read + EVERY
        if status.running and recent and started == set(self._running):
            return
        self._last_read = self._clock()
        for run in set(self._running) - started:
            self._ended[START if run.arm == START else ""].append(self._running.pop(run))
        self._print_failures(status)

        shown: list[str] = []
        accuracies: list[tuple[StudyRun, float | None]] = []
        for running in status.running.values():
            run = running.run
            step, accuracy = _read_progress(run)
            self._running[run] = (self._clock() - running.began, step - running.steps_before)
            text = run.label if run.arm == START else f"{run.label} {step}/{run.steps}"
            shown.append(text if accuracy is None else f"{text} {accuracy:.0%}")
            accuracies.append((run, accuracy))

        counts = f"{len(status.complete)}/{len(status.runs)} runs"
        line = "  ".join([counts, *shown, f"ETA {self._estimate_time_left(status)}"])
        changes = (len(status.complete), len(status.failed), tuple(accuracies))
        if self._out.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=self._out, flush=True)
        elif changes != self._printed:  # steps alone are no change: a log would have a line for each
            print(line, file=self._out, flush=True)
        self._printed = changes

    def close(self) -> None:
        """End the live line."""
        if self._out.isatty():
            print(file=self._out)

    def _print_failures(self, status: StudyStatus) -> None:
        """Print the failures since the last call, each on a line of its own."""
        clear = "\r\x1b[K" if self._out.isatty() else ""
        for failure in status.failed[self._failures_printed :]:
            print(f"{clear}failed: {failure}", file=self._out, flush=True)
        self._failures_printed = len(status.failed)

    def _estimate_time_left(self, status: StudyStatus) -> str:
        """The time left as h:mm:ss, by the mean pace of starts and steps so far; ? before it is known."""
        starts_left, steps_left = 0, 0
        for run in (*status.waiting, *(running.run for running in status.running.values())):
            if run.arm == START:
                starts_left += 1
            else:
                steps_left += run.steps - run.count_done()

        seconds = 0.0
        if starts_left:
            ended = [spent for spent, _ in self._ended[START]]
            if not ended:
                return "?"
            seconds += starts_left * sum(ended) / len(ended)
        if steps_left:
            paces = [*self._ended[""], *(pace for run, pace in self._running.items() if run.arm != START)]
            steps_done = sum(steps for _, steps in paces)
            if not steps_done:
                return "?"
            seconds += steps_left * sum(spent for spent, _ in paces) / steps_done

        slots = min(status.jobs, len(status.waiting) + len(status.running))
        return str(datetime.timedelta(seconds=round(seconds / max(slots, 1))))


def _read_progress(run: StudyRun) -> tuple[int, float | None]:
    """The last step of a run, and its newest held-out accuracy, if any."""
    rows = read_whole_rows(run.folder / "metrics.jsonl")
    accuracies = [row[EVALUATED["accuracy"]] for row in rows if EVALUATED["accuracy"] in row]
    step = int(rows[-1]["step"]) if rows else 0
    return step, accuracies[-1] if accuracies else None
