"""A thread that gives rows to one tracker, so that no failure or delay of it reaches the run.

1. `put` never waits and never raises.  The thread opens the tracker and gives it the rows in their order.
2. A call that raises is repeated after PAUSES.  If all its attempts fail, its row is left out and
   counted as a failure.  After FAILURES_IN_A_ROW such rows, or if the tracker cannot be opened, it is switched off
   until the next start.
3. A row that finds WAITING_ROWS others waiting is left out and counted as well.
4. `take_messages` returns what there is to tell the user: the first failure, and that the tracker was switched off.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cooper_jax.runtime.trackers.tracker import Samples, Tracker

# Seconds before the second and each further attempt of a call, and of opening a tracker.
PAUSES = (1.0, 10.0)
OPEN_PAUSES = (10.0, 60.0, 600.0)
FAILURES_IN_A_ROW = 3
WAITING_ROWS = 1000
_MESSAGE_LENGTH = 300  # characters of an exception's message that are shown


@dataclasses.dataclass(frozen=True)
class Row:
    """What one call of a tracker gets: a step's metrics or samples, or the figures of an update of a phase."""

    step: int
    metrics: Mapping[str, float] | None = None
    samples: Samples = ()
    phase: str = ""  # before step 1, of which `metrics` are the figures and `step` is the update


class TrackerThread:
    """Opens a tracker, gives it rows and closes it, in a thread of its own.

    Args:
      name: the tracker's, for messages.
      open_tracker: makes the tracker; called in the thread.
      backlog: rows that come before those of `put`, as many as there are.
      on_row: called in the thread after the tracker has taken a row.
    """

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        backlog: Iterable[Row] = (),
        on_row: Callable[[Row], None] = lambda row: None,
    ):
        self.name = name
        self._open, self._on_row = open_tracker, on_row
        self._rows = collections.deque(backlog)
        self._limit = len(self._rows) + WAITING_ROWS

        # Shared with the thread; `_changed` guards these fields and announces changes.
        self._changed = threading.Condition()
        self._failures = 0  # calls and rows
        self._messages: list[str] = []
        self._closing = False
        self._is_off = False

        # A daemon: a tracker that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """Calls that failed at every attempt, and rows that were left out."""
        with self._changed:
            return self._failures

    def put(self, row: Row) -> None:
        """Pass a row to the thread; it is left out and counted if the tracker is off or too slow."""
        with self._changed:
            if self._is_off:
                self._failures += 1
            elif len(self._rows) >= self._limit:
                self._add_failure(f"{WAITING_ROWS} rows wait for it, so the next ones are left out")
            else:
                self._rows.append(row)
                self._changed.notify_all()

    def take_messages(self) -> list[str]:
        """What happened since the last call, one line each."""
        with self._changed:
            messages, self._messages = self._messages, []
        return messages

    def begin_close(self) -> None:
        """Let the thread end after the rows that wait; failing calls are not repeated from now on."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def wait(self, deadline: float) -> None:
        """Wait for the end of the thread until a time of `time.monotonic`; then it is left behind and counted."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            if self._thread.is_alive():
                left = len(self._rows)
                self._failures += left + 1
                self._messages.append(
                    f"{self.name} has not ended and is left behind; {left} rows wait for it"
                )

    # --- in the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        opened: list[Tracker] = []
        if not self._attempt("cannot be opened", lambda: opened.append(self._open()), OPEN_PAUSES):
            self._switch_off("it cannot be opened")
            return
        failed_in_a_row = 0
        while (row := self._next_row()) is not None:
            failed_in_a_row = 0 if self._give(opened[0], row) else failed_in_a_row + 1
            if failed_in_a_row == FAILURES_IN_A_ROW:
                self._switch_off(f"{FAILURES_IN_A_ROW} calls in a row failed")
                break
        self._attempt("cannot be closed", opened[0].close)

    def _next_row(self) -> Row | None:
        """Wait for a row; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._closing)
            if not self._rows:
                return None
            self._limit = max(WAITING_ROWS, self._limit - 1)
            return self._rows.popleft()

    def _give(self, tracker: Tracker, row: Row) -> bool:
        """Give a row to the tracker; False if that failed."""
        what, metrics = f"failed at step {row.step}", row.metrics
        if metrics is None:
            taken = self._attempt(what, lambda: tracker.log_samples(row.step, row.samples))
        elif row.phase:
            taken = self._attempt(what, lambda: tracker.log_phase(row.phase, row.step, metrics))
        else:
            taken = self._attempt(what, lambda: tracker.log(row.step, metrics))
        return taken and self._attempt(f"{what} (its state)", lambda: self._on_row(row))

    def _attempt(self, what: str, call: Callable[[], Any], pauses: Sequence[float] | None = None) -> bool:
        """Call until it succeeds, with pauses (default: PAUSES) in between; count a failure and return False if
        no attempt succeeds."""
        for pause in (*(PAUSES if pauses is None else pauses), None):
            try:
                call()
                return True
            # A library or a user's file may raise anything, SystemExit included; it ends neither thread nor run.
            except BaseException as error:
                text = " ".join(str(error).split())[:_MESSAGE_LENGTH]
                said = f"{type(error).__name__}: {text}" if text else type(error).__name__
            with self._changed:
                if pause is None or self._changed.wait_for(lambda: self._closing, pause):
                    break
        with self._changed:
            self._add_failure(f"{what}: {said}")
        return False

    def _add_failure(self, text: str) -> None:
        """Count a failure, of which the first is told; the caller holds the lock."""
        self._failures += 1
        if self._failures == 1:
            self._messages.append(f"{self.name} {text}; the run continues, and failures are counted")

    def _switch_off(self, reason: str) -> None:
        with self._changed:
            self._is_off = True
            self._failures += len(self._rows)
            self._rows.clear()
            self._messages.append(f"{self.name} is off until the next start of the run: {reason}")
