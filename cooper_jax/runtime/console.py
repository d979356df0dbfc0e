"""What a job shows while it runs: lines that stay, and on a terminal a live line below them.

1. `print_line` prints a line that stays.
2. `begin_stage` and `open_activity` say what the job is doing.  On a terminal this is the live line, with the
   seconds since it began and the program that is being compiled; a thread redraws it.  What is `named` stays
   above it as a line with its seconds when it ends.  Elsewhere (a log file, a pipe) it is a plain line when it
   begins, and nothing is redrawn.
3. `set_status` adds figures to the live line; `show_detail` adds how far an activity is.

With `quiet`, only lines printed with `always` appear: warnings, rows of evaluations and results.  `CONSOLE` is the
process's own.  This module imports neither jax nor, unless the output is a terminal, rich: a job's first line
must not wait for them.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO, cast

# At run time rich is imported by the first live line.
if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

REDRAWS_PER_SECOND = 4
# Lines of a page, where the output is not a terminal.
PAGE_LINES = 24
# Narrower terminals have no room for the bar of steps.
BAR_FROM_COLUMNS = 110
BAR_COLUMNS = 20


@dataclasses.dataclass(eq=False)
class Activity:
    """Something that the job is doing."""

    text: str
    began: float  # seconds of the console's clock
    named: bool  # it has a line that stays
    compiled_before: int  # programs that were compiled before it began
    detail: str = ""  # how far it is


@dataclasses.dataclass(frozen=True)
class Status:
    """Figures of the live line: the latest metrics, and steps of a total."""

    text: str = ""
    done: int = 0
    total: int = 0  # 0: no bar


class Console:
    """The output of one process.  Its methods may be called from any thread.

    out: the stream; None: sys.stdout, looked up at each line.
    clock: a function that returns seconds.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._out, self._clock = out, clock
        self._lock = threading.RLock()
        self._quiet = self._silent = False
        self._live: Live | None = None
        self._view: Callable[[], RenderableType] | None = None
        # Innermost last; an activity of another thread may lie between.
        self._activities: list[Activity] = []
        self._stage: Activity | None = None
        self._status = Status()
        # The programs that are being compiled: thread -> (what, since when).
        self._compiling: dict[int, tuple[str, float]] = {}
        self._compiling_since = 0.0  # while any thread compiles
        self._compiled = 0
        self._compile_seconds = 0.0
        self.lines_printed = 0

    # --- settings ---

    def set_quiet(self, quiet: bool) -> None:
        """Show only lines that are printed with `always`."""
        self._quiet = quiet
        if quiet:
            self.close()

    def silence(self) -> None:
        """Show nothing from here on: this is not the process that prints."""
        self._silent = True
        self.close()

    @property
    def is_live(self) -> bool:
        """True if the output is a terminal on which a line can be redrawn."""
        return self._stream.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def page_lines(self) -> int:
        """The number of lines that a reader sees at a time."""
        return shutil.get_terminal_size((80, PAGE_LINES)).lines if self.is_live else PAGE_LINES

    @property
    def _stream(self) -> TextIO:
        if self._out is not None:
            return self._out
        # While a live line is shown, rich has replaced sys.stdout.
        return sys.stdout if self._live is None else cast(TextIO, self._live.console.file)

    # --- lines that stay ---

    def print_line(self, text: str, always: bool = False, style: str = "") -> None:
        """Print a text of one or more lines.

        always: even with `quiet`.  style: rich's, for a terminal, such as "bold".
        """
        with self._lock:
            if self._silent or (self._quiet and not always):
                return
            self.lines_printed += text.count("\n") + 1
            if self._live is None:
                print(text, file=self._stream, flush=True)
                return
            self._live.console.print(
                text, style=style or None, soft_wrap=True, markup=False, highlight=False, emoji=False
            )

    def print_unless_live(self, text: str) -> None:
        """Print a line of progress where no live line shows it."""
        if not self.is_live:
            self.print_line(text)

    # --- what the job is doing ---

    def begin_stage(self, text: str) -> None:
        """Name the next stage of the setup, which ends the one before."""
        with self._lock:
            self.end_stage()
            self._stage = self._begin(text, named=True)

    def end_stage(self, result: str = "") -> None:
        """End the stage of the setup.

        result: of the stage, to stand in its line on a terminal.
        """
        with self._lock:
            stage, self._stage = self._stage, None
            if stage is not None:
                self._end(stage, result)

    @contextlib.contextmanager
    def open_activity(self, text: str, named: bool = False) -> Iterator[None]:
        """Context of an activity; activities may nest.

        named: it has a line that stays.
        """
        activity = self._begin(text, named)
        try:
            yield
        except BaseException:
            # Its line would say that it is done.
            activity.named = False
            raise
        finally:
            self._end(activity)

    def show_detail(self, text: str) -> None:
        """Say on the live line how far the innermost activity is."""
        with self._lock:
            if self._activities:
                self._activities[-1].detail = text

    def set_status(self, text: str, done: int = 0, total: int = 0) -> None:
        """Set the figures of the live line, and its bar of done steps if there is a total."""
        self._status = Status(text, done, total)

    def set_view(self, view: Callable[[], RenderableType] | None) -> None:
        """Show the renderable that a function returns in place of the live line; None: the live line."""
        with self._lock:
            self._view = view
            self._open_live()

    def _begin(self, text: str, named: bool) -> Activity:
        with self._lock:
            activity = Activity(text, self._clock(), named, self._compiled)
            self._activities.append(activity)
            if self.is_live:
                self._open_live()
            elif named:
                self.print_line(f"{text} ...")
            return activity

    def _end(self, activity: Activity, result: str = "") -> None:
        with self._lock:
            self._activities.remove(activity)
            if not activity.named or not self.is_live:
                return
            parts = [f"{activity.text}  {format_seconds(self._clock() - activity.began)}"]
            if count := self._compiled - activity.compiled_before:
                parts.append(f"{count} {'program' if count == 1 else 'programs'} compiled")
            self.print_line(", ".join([*parts, result] if result else parts), style="dim")

    # --- compilations ---

    def begin_compilation(self, what: str) -> None:
        """Note that this thread has begun to compile a program, until `end_compilation`."""
        with self._lock:
            now = self._clock()
            if not self._compiling:
                self._compiling_since = now
            self._compiling[threading.get_ident()] = (what, now)

    def end_compilation(self, is_program: bool) -> None:
        """Note that this thread has ended what it began.

        is_program: a program is compiled now, and counted; otherwise it was traced, for example.
        """
        with self._lock:
            del self._compiling[threading.get_ident()]
            self._compiled += is_program
            if not self._compiling:
                self._compile_seconds += self._clock() - self._compiling_since

    @property
    def compile_seconds(self) -> float:
        """Seconds in which any thread traced or compiled something, since the process began."""
        return self._compile_seconds

    # --- the live line ---

    def _open_live(self) -> None:
        if self._live is not None or self._quiet or self._silent or not self.is_live:
            return
        from rich import console as rich_console
        from rich.live import Live

        self._live = Live(
            console=rich_console.Console(file=self._stream),
            get_renderable=self._render,
            refresh_per_second=REDRAWS_PER_SECOND,
            transient=True,
            # What libraries print appears above the live line, and what is not on this terminal stays elsewhere.
            redirect_stdout=self._out is None,
            redirect_stderr=self._out is None and sys.stderr.isatty(),
        )
        self._live.start(refresh=True)
        # A process that is killed would leave the terminal without a cursor.
        self._live.console.show_cursor(True)
        atexit.register(self.close)

    def close(self) -> None:
        """Remove the live line, and forget a stage that has not ended; the next activity opens the line again."""
        with self._lock:
            if self._stage is not None:
                self._activities.remove(self._stage)
                self._stage = None
            live, self._live = self._live, None
        if live is not None:
            live.stop()
            atexit.unregister(self.close)

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # The thread that redraws holds rich's lock here.  It must not wait for this object's lock, whose holder may
        # be waiting for rich's.
        live, view, status = self._live, self._view, self._status
        if view is not None:
            return view()
        text = self._describe_activity()
        width = live.console.width if live is not None else 0
        # What the job is doing comes first: the figures get the room that is left.
        parts: list[RenderableType] = [Text(text, style="bold", no_wrap=True, overflow="ellipsis")]
        room = width - len(text) - 2
        if status.total and room >= BAR_COLUMNS and width >= BAR_FROM_COLUMNS:
            parts.append(ProgressBar(total=status.total, completed=status.done, width=BAR_COLUMNS))
            room -= BAR_COLUMNS + 2
        if status.text and room > 1:
            shown = Text(status.text, no_wrap=True)
            shown.truncate(room, overflow="ellipsis")
            parts.append(shown)
        table = Table.grid(*([""] * len(parts)), padding=(0, 2, 0, 0))
        table.add_row(*parts)
        return table

    def _describe_activity(self) -> str:
        """What the job is doing, for how long, and what is being compiled."""
        now = self._clock()
        parts = []
        # Copies, since other threads change both.
        activities, compiling = list(self._activities), list(self._compiling.values())
        if activities:
            activity = activities[-1]
            parts.append(f"{activity.text} {format_seconds(now - activity.began)}")
            if activity.detail:
                parts.append(activity.detail)
        if compiling:
            what, since = compiling[0]
            parts.append(f"{what} {format_seconds(now - since)}")
        return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Format a duration for a reader: 1.4 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def escape_controls(text: str, keep: str = "\n") -> str:
    r"""Write control characters, and others that a terminal would act on or cannot show, as escapes like \x1b.

    keep: characters that stay as they are.
    """
    return "".join(
        char if char in keep or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


CONSOLE = Console()
