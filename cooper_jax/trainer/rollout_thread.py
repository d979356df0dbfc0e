"""The thread in which a rollout runs beside the rest of a step (rollout_ahead.py)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import jax

from cooper_jax.runtime import hosts

T = TypeVar("T")

# A function that samples a batch.  It calls its argument between two decode segments.
Sample = Callable[[Callable[[], None]], T]

_POLL = 0.2  # seconds between two looks at whether the run is to stop


class Cancelled(Exception):
    """The run ends, and no step will take what is being sampled."""


class PendingRollout(Generic[T]):
    """A rollout in its thread; `result` waits for it."""

    def __init__(self, sample: Callable[[], T]):
        """Start `sample` in a thread."""
        self._sample = sample
        self._results: list[T] = []  # one entry once it has ended, unless it failed
        self._error: BaseException | None = None
        self._start_time = time.perf_counter()
        self.seconds = 0.0  # that the sampling took; set once it has ended

        # A daemon: an error elsewhere must be able to end the process.
        self._thread = threading.Thread(target=self._run, daemon=True, name="rollout")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._sample())
        except BaseException as error:
            # A thread's exception would only be printed: `result` raises it in the caller's thread.
            self._error = error
        self.seconds = time.perf_counter() - self._start_time

    def result(self) -> T:
        """Wait for the rollout.

        Raises the exception that ended it, and hosts.Stopped after a SIGTERM in a run of one process.
        """
        while self._thread.is_alive():
            self._thread.join(_POLL)
            hosts.raise_if_stopping_alone()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def wait(self) -> None:
        """Wait until the thread has ended, whatever its result is."""
        self._thread.join()


class RolloutThread:
    """Runs rollouts in a thread, one at a time."""

    def __init__(self) -> None:
        self._pending: PendingRollout | None = None
        self._cancelled = threading.Event()

    def start(self, sample: Sample[T]) -> PendingRollout[T]:
        """Start a rollout, and return without waiting.  The one before must have been taken."""
        assert self._pending is None, "the rollout of another step has not been taken"
        pending = PendingRollout(lambda: sample(self._raise_if_cancelled))
        self._pending = pending
        return pending

    def take(self, pending: PendingRollout[T]) -> T:
        """Wait for the rollout that `start` returned; another one can be started then."""
        result = pending.result()
        self._pending = None
        return result

    def close(self) -> None:
        """End a rollout that no step will take.

        Several hosts would leave it after different segments, and one of them would wait for the others'
        devices for ever.  They sample it to its end.
        """
        if jax.process_count() == 1:
            self._cancelled.set()
        if self._pending is not None:
            self._pending.wait()

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled


@contextlib.contextmanager
def open_rollout_thread(ahead: int) -> Iterator[RolloutThread | None]:
    """Make the thread of a run with rollout.ahead=1, None for one with 0; end it on exit."""
    if not ahead:
        yield None
        return
    thread = RolloutThread()
    try:
        yield thread
    finally:
        thread.close()
