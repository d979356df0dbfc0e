"""Progress of a study: a line that is updated on a terminal, or a new line at every change in a log.

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
from cooper_jax.study.records import read_accuracy, read_whole_rows
from cooper_jax.study.run_scheduler import StudyStatus
from cooper_jax.study.study_plan import StudyRun

EVERY = 2.0  # seconds between two reads of the runs' files


class ProgressBoard:
    """Printer of a study's status, called at every poll; `close` ends the updated line.

    out: the stream to print to; stdout if None.  clock: a function that returns seconds.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.perf_counter):
        self._out = sys.stdout if out is None else out
        self._clock = clock
        self._last_read = -EVERY
        # The last printed status, so that a log gets a line only for a change.
        self._printed: tuple = ()
        self._failures_printed = 0
        # (seconds, steps) of processes that have ended, by START for starts and "" for other runs, and of
        # those still running.  Earlier invocations do not count: they may have been on another machine.
        self._ended: dict[str, list[tuple[float, int]]] = {START: [], "": []}
        self._running: dict[StudyRun, tuple[float, int]] = {}

    def __call__(self, status: StudyStatus) -> None:
        """Print the status if the runs have changed or EVERY seconds have passed."""
        # Reading the runs' files at every poll would cost more than the poll itself.
        started = {running.run for running in status.running.values()}
        recent = self._clock() < self._last_read + EVERY
        if status.running and recent and started == set(self._running):
            return
        self._last_read = self._clock()

        # Processes that have ended since the last call keep their pace for the estimate.
        for run in set(self._running) - started:
            self._ended[START if run.arm == START else ""].append(self._running.pop(run))
        self._print_failures(status)

        # A part of the line for each running process.
        shown: list[str] = []
        accuracies: list[tuple[StudyRun, float | None]] = []
        for running in status.running.values():
            run = running.run
            step, accuracy = _read_progress(run)
            self._running[run] = (self._clock() - running.began, step - running.steps_before)
            text = run.label if run.arm == START else f"{run.label} {step}/{run.steps}"
            shown.append(text if accuracy is None else f"{text} {accuracy:.0%}")
            accuracies.append((run, accuracy))

        # A terminal's line is overwritten: return to its start and clear it.
        counts = f"{len(status.complete)}/{len(status.runs)} runs"
        line = "  ".join([counts, *shown, f"ETA {self._estimate_time_left(status)}"])
        changes = (len(status.complete), len(status.failed), tuple(accuracies))
        if self._out.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=self._out, flush=True)
        elif changes != self._printed:  # a new step alone is no change, to keep logs short
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
        """Estimate the time left as h:mm:ss from the mean pace of starts and steps; "?" if it is unknown."""
        starts_left, steps_left = 0, 0
        for run in (*status.waiting, *(running.run for running in status.running.values())):
            if run.arm == START:
                starts_left += 1
            else:
                steps_left += run.steps - run.count_done()

        # Seconds of all remaining work, if it ran in one slot.
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

        # The work is shared by the slots, of which some stay free at the end.
        slots = min(status.jobs, len(status.waiting) + len(status.running))
        return str(datetime.timedelta(seconds=round(seconds / max(slots, 1))))


def _read_progress(run: StudyRun) -> tuple[int, float | None]:
    """Read the last step of a run, and its newest held-out accuracy, if any."""
    rows = read_whole_rows(run.folder / "metrics.jsonl")
    accuracies = [accuracy for row in rows if (accuracy := read_accuracy(row)) is not None]
    step = int(rows[-1]["step"]) if rows else 0
    return step, accuracies[-1] if accuracies else None
