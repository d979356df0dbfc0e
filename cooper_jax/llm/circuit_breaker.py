"""Requests to a server that does not answer fail at once, until a trial finds that it does.

After `FAILURES` requests in a row, over all threads, that reached no server or ran out of time, the breaker opens
for `FIRST_PAUSE` seconds: requests are not sent.  Then one request is a trial.  If it fails, too, the pause
doubles, up to `LONGEST_PAUSE`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FAILURES = 8
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0  # seconds


class CircuitBreaker:
    """Decides whether a request is sent; safe for several threads.  clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._pause = FIRST_PAUSE
        self._closed_until: float | None = None  # requests are refused before this time; None: none is
        self._trial = False  # one is in flight

    def admit(self) -> bool:
        """True if a request may be sent; its result must be reported."""
        with self._lock:
            if self._closed_until is None:
                return True
            if self._trial or self._clock() < self._closed_until:
                return False
            self._trial = True
            return True

    def report(self, answered: bool) -> None:
        """Report the result of an admitted request: whether the server answered, whatever it said."""
        with self._lock:
            self._trial = False
            if answered:
                self._failures, self._pause, self._closed_until = 0, FIRST_PAUSE, None
                return
            self._failures += 1
            if self._closed_until is not None:
                # The trial has failed, or one that was in flight when the breaker opened.
                if self._clock() >= self._closed_until:
                    self._pause = min(2 * self._pause, LONGEST_PAUSE)
                    self._closed_until = self._clock() + self._pause
            elif self._failures >= FAILURES:
                self._closed_until = self._clock() + self._pause
