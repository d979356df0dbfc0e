"""Progress of a study: the state of every run, and what each running one is doing.

On a terminal this is a table that is redrawn; elsewhere a line at every change:

7/12 runs, 2 running, 3 waiting  seed_10/robust 40/100 48%  seed_11/rule 20/100 52%  ETA 0:41:10
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cooper_jax.runtime.console import CONSOLE, Console, escape_controls, format_seconds
from cooper_jax.study.arms import START
from cooper_jax.study.records import read_accuracy, read_whole_rows
from cooper_jax.study.run_scheduler import StudyStatus
from cooper_jax.study.study_plan import StudyRun

if TYPE_CHECKING:
    from rich.console import RenderableType

EVERY = 2.0  # seconds between two reads of the runs' files
LOG_TAIL = 4096  # bytes of a run's log in which its last line is looked for


@dataclasses.dataclass(frozen=True)
class RunState:
    """What is shown of a run."""

    label: str
    state: str  # running | failed | waiting | complete
    done: str = ""  # steps of all, as in 40/100; starts have none
    accuracy: float | None = None  # the newest on held-out problems
    seconds: float | None = None  # of its process
    doing: str = ""  # the last line of its log


class ProgressBoard:
    """Shows a study's status, and is called at every poll; `close` removes the table.

    clock: a function that returns seconds.
    """

    def __init__(self, console: Console = CONSOLE, clock: Callable[[], float] = time.perf_counter):
        self._console, self._clock = console, clock
        self._last_read = -EVERY
        # The last printed status, so that a log gets a line only for a change.
        self._printed: tuple = ()
        self._failures_printed = 0
        self._shown: tuple[str, list[RunState]] = ("", [])
        # (seconds, steps) of processes that have ended, by START for starts and "" for other runs, and of
        # those still running.  Earlier invocations do not count: they may have been on another machine.
        self._ended: dict[str, list[tuple[float, int]]] = {START: [], "": []}
        self._running: dict[StudyRun, tuple[float, int]] = {}

    def __call__(self, status: StudyStatus) -> None:
        """Show the status if the runs have changed or EVERY seconds have passed."""
        # Reading the runs' files at every poll would cost more than the poll itself.
        started = {running.run for running in status.running.values()}
        recent = self._clock() < self._last_read + EVERY
        if status.running and recent and started == set(self._running):
            return
        self._last_read = self._clock()

        # Processes that have ended since the last call keep their pace for the estimate.
        for run in set(self._running) - started:
            self._ended[START if run.is_start else ""].append(self._running.pop(run))
        self._print_failures(status)

        states = self._list_running(status)
        headline = self._describe_counts(status)
        ends = [RunState(failure.run.label, "failed") for failure in status.failed]
        ends += [RunState(run.label, "waiting") for run in status.waiting]
        ends += [RunState(run.label, "complete") for run in status.complete]
        self._shown = (headline, [*states, *ends])
        if self._console.is_live:
            self._console.set_view(self._render)
            return

        # A new step alone is no change, to keep logs short.
        parts = [_describe_running(state) for state in states]
        changes = (len(status.complete), len(status.failed), tuple((s.label, s.accuracy) for s in states))
        if changes != self._printed:
            counts, left = headline.rsplit("  ", 1)
            self._console.print_line("  ".join([counts, *parts, left]))
        self._printed = changes

    def close(self) -> None:
        """Remove the table."""
        self._console.set_view(None)
        self._console.close()

    def _list_running(self, status: StudyStatus) -> list[RunState]:
        """The states of the running runs, whose pace is noted."""
        states = []
        for running in status.running.values():
            run = running.run
            step, accuracy = _read_progress(run)
            seconds = self._clock() - running.began
            self._running[run] = (seconds, step - running.steps_before)
            done = "" if run.is_start else f"{step}/{run.steps}"
            doing = read_last_line(run.folder / "log.txt")
            states.append(RunState(run.label, "running", done, accuracy, seconds, doing))
        for compiling in status.compiling.values():
            seconds = self._clock() - compiling.began
            states.append(RunState("the arms' programs", "compiling", seconds=seconds))
        return states

    def _describe_counts(self, status: StudyStatus) -> str:
        counts = [f"{len(status.complete)}/{len(status.runs)} runs"]
        groups = (("running", status.running), ("waiting", status.waiting), ("failed", status.failed))
        counts += [f"{len(group)} {name}" for name, group in groups if group]
        return f"{', '.join(counts)}  ETA {self._estimate_time_left(status)}"

    def _render(self) -> RenderableType:
        """The table of the runs: as many as there is room for, the running ones first."""
        from rich.table import Table
        from rich.text import Text

        headline, states = self._shown
        table = Table(title=headline, title_justify="left", box=None, padding=(0, 2, 0, 0), expand=True)
        for heading in ("run", "state", "step", "held-out", "time"):
            table.add_column(heading, no_wrap=True)
        table.add_column("doing", no_wrap=True, overflow="ellipsis", ratio=1)
        # The title, the headings and the line that says how many are left out.
        room = max(self._console.page_lines - 4, 1)
        for state in states[:room]:
            accuracy = "" if state.accuracy is None else f"{state.accuracy:.0%}"
            seconds = "" if state.seconds is None else format_seconds(state.seconds)
            cells = (state.label, state.state, state.done, accuracy, seconds, state.doing)
            table.add_row(*map(Text, cells), style="" if state.state == "running" else "dim")
        if len(states) > room:
            table.add_row(Text(f"and {len(states) - room} more"))
        return table

    def _print_failures(self, status: StudyStatus) -> None:
        """Print the failures since the last call, each on a line of its own."""
        for failure in status.failed[self._failures_printed :]:
            self._console.print_line(f"failed: {failure}", always=True)
        self._failures_printed = len(status.failed)

    def _estimate_time_left(self, status: StudyStatus) -> str:
        """Estimate the time left as h:mm:ss from the mean pace of starts and steps; "?" if it is unknown."""
        starts_left, steps_left = 0, 0
        for run in (*status.waiting, *(running.run for running in status.running.values())):
            if run.is_start:
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
            paces = [*self._ended[""], *(pace for run, pace in self._running.items() if not run.is_start)]
            steps_done = sum(steps for _, steps in paces)
            if not steps_done:
                return "?"
            seconds += steps_left * sum(spent for spent, _ in paces) / steps_done

        # The work is shared by the slots, of which some stay free at the end.
        slots = min(status.jobs, len(status.waiting) + len(status.running))
        return str(datetime.timedelta(seconds=round(seconds / max(slots, 1))))


def _describe_running(state: RunState) -> str:
    parts = [state.label, state.done, "" if state.accuracy is None else f"{state.accuracy:.0%}"]
    text = " ".join(filter(None, parts))
    return f"{text} ({state.doing})" if state.doing else text


def read_last_line(log: Path) -> str:
    """The last line of a run's log that says what it is doing; "" if there is none.

    Indented lines are rows of tables and samples.
    """
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - LOG_TAIL, 0))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not line.startswith((" ", "$ "))]
    return escape_controls(said[-1], keep="").removesuffix(" ...") if said else ""


def _read_progress(run: StudyRun) -> tuple[int, float | None]:
    """Read the last step of a run, and its newest held-out accuracy, if any."""
    rows = read_whole_rows(run.folder / "metrics.jsonl")
    accuracies = [accuracy for row in rows if (accuracy := read_accuracy(row)) is not None]
    step = int(rows[-1]["step"]) if rows else 0
    return step, accuracies[-1] if accuracies else None
