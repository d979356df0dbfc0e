"""Where a study stands, for whoever waits: a live line on a terminal, elsewhere a line whenever something happened.

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
from cooper_jax.study.run_scheduler import Standing
from cooper_jax.study.study_plan import StudyRun

EVERY = 2.0  # seconds between two looks at the runs' files


class Board:
    """Shows standings; `close` ends the live line."""

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.perf_counter):
        self._out = sys.stdout if out is None else out
        self._clock = clock
        self._looked = -EVERY
        self._told: tuple = ()
        self._failed = 0
        # (seconds, steps) in this life: of the starts and the other runs that have ended, and of those under way.
        self._ended: dict[str, list[tuple[float, int]]] = {START: [], "": []}
        self._seen: dict[StudyRun, tuple[float, int]] = {}

    def __call__(self, now: Standing) -> None:
        started = {work.run for work in now.working.values()}
        if now.working and self._clock() < self._looked + EVERY and started == set(self._seen):
            return
        self._looked = self._clock()
        for run in set(self._seen) - started:
            self._ended[START if run.arm == START else ""].append(self._seen.pop(run))
        for failure in now.failed[self._failed :]:
            self._say(f"failed: {failure}")
        self._failed = len(now.failed)
        shown, at = [], []
        for work in now.working.values():
            step, accuracy = _standing(work.run)
            self._seen[work.run] = (self._clock() - work.began, step - work.had)
            text = work.run.label if work.run.arm == START else f"{work.run.label} {step}/{work.run.steps}"
            shown.append(text if accuracy is None else f"{text} {accuracy:.0%}")
            at.append((work.run, accuracy))
        line = "  ".join([f"{len(now.complete)}/{len(now.runs)} runs", *shown, f"ETA {self._left(now)}"])
        happened = (len(now.complete), len(now.failed), tuple(at))
        if self._out.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=self._out, flush=True)
        elif happened != self._told:
            print(line, file=self._out, flush=True)
        self._told = happened

    def close(self) -> None:
        if self._out.isatty():
            print(file=self._out)

    def _say(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self._out.isatty() else text, file=self._out, flush=True)

    def _left(self, now: Standing) -> str:
        """The time left as h:mm:ss, by the pace of this life's starts and steps; ? before it is known."""
        starts, steps = 0.0, 0.0  # that are left
        for run in (*now.waiting, *(work.run for work in now.working.values())):
            if run.arm == START:
                starts += 1
            else:
                steps += run.steps - run.done()
        seconds = 0.0
        if starts:
            ended = [spent for spent, _ in self._ended[START]]
            if not ended:
                return "?"
            seconds += starts * sum(ended) / len(ended)
        if steps:
            paces = [*self._ended[""], *(pace for run, pace in self._seen.items() if run.arm != START)]
            made = sum(done for _, done in paces)
            if not made:
                return "?"
            seconds += steps * sum(spent for spent, _ in paces) / made
        places = min(now.jobs, len(now.waiting) + len(now.working))
        return str(datetime.timedelta(seconds=round(seconds / max(places, 1))))


def _standing(run: StudyRun) -> tuple[int, float | None]:
    """The last step, and the newest held-out accuracy where there is one."""
    rows = read_whole_rows(run.folder / "metrics.jsonl")
    found = [row[EVALUATED["accuracy"]] for row in rows if EVALUATED["accuracy"] in row]
    return (int(rows[-1]["step"]) if rows else 0), (found[-1] if found else None)
