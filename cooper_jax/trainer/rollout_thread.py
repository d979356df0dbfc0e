"""The thread in which a rollout runs beside the rest of a step (rollout_ahead.py).

On several hosts each segment of the rollout is one program of all hosts.  They must launch the same segments, so a
rollout is paused and cancelled behind the same segment everywhere:

1. `pause` holds the thread in front of its next segment, and the hosts exchange how many each has begun.
2. The most that any has begun are run by all; then every thread waits until the pause ends.

A SIGTERM is noticed at a call of `hosts.raise_if_stopping`, which all processes make equally often: `take` makes
one for each segment of the rollout, also for those that have passed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import jax

from cooper_jax.runtime import hosts

T = TypeVar("T")

# A function that samples a batch.  It calls its argument before each segment.
Sample = Callable[[Callable[[], None]], T]


class Cancelled(Exception):
    """The run ends, and no step will take what is being sampled."""


class PendingRollout(Generic[T]):
    """A rollout in its thread."""

    def __init__(self, sample: Sample[T]):
        """Start `sample` in a thread."""
        self._sample = sample
        self._results: list[T] = []  # one entry once it has ended, unless it failed
        self._error: BaseException | None = None
        self._start_time = time.perf_counter()
        self.seconds = 0.0  # that the sampling took; set once it has ended

        # One True for each segment that was begun, and False at the end.
        self._segments: queue.SimpleQueue[bool] = queue.SimpleQueue()

        # The state of a pause.  The condition's lock guards it.
        self._changed = threading.Condition()
        self._begun = 0  # segments
        self._limit: int | None = None  # of segments, during a pause
        self._is_held = False  # True while the thread waits at the limit
        self._is_cancelled = False

        # A daemon: an error elsewhere must be able to end the process.
        self._thread = threading.Thread(target=self._run, daemon=True, name="rollout")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._sample(self._begin_segment))
        except BaseException as error:
            # A thread's exception would only be printed: `result` raises it in the caller's thread.
            self._error = error
        self.seconds = time.perf_counter() - self._start_time
        self._segments.put(False)
        with self._changed:
            self._changed.notify_all()

    def _begin_segment(self) -> None:
        """Wait for the end of a pause, and count the segment.  Raises Cancelled."""
        with self._changed:
            while self._limit is not None and self._begun >= self._limit and not self._is_cancelled:
                self._is_held = True
                self._changed.notify_all()
                self._changed.wait()
            self._is_held = False
            if self._is_cancelled:
                raise Cancelled
            self._begun += 1
        self._segments.put(True)

    def result(self) -> T:
        """Wait for the rollout.  Collective: all hosts call it once for each rollout.

        Raises the exception that ended it, and hosts.Stopped after a SIGTERM.
        """
        while self._segments.get():
            hosts.raise_if_stopping()
        self._segments.put(False)  # for another call
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """In this context no program of the rollout is running or launched.  Collective."""
        with self._changed:
            self._limit = begun = self._begun
        limit = max(hosts.exchange_json("pause of a rollout", begun))
        with self._changed:
            self._limit = limit
            self._changed.notify_all()
            while self._thread.is_alive() and not (self._is_held and self._begun == limit):
                # The thread notifies before it ends, and is alive for a moment longer.
                self._changed.wait(timeout=0.05)
        try:
            yield
        finally:
            with self._changed:
                self._limit = None
                self._changed.notify_all()

    def cancel(self) -> None:
        """End the rollout, behind the same segment on all hosts.  Collective."""
        with self.pause(), self._changed:
            self._is_cancelled = True
        self._thread.join()


class RolloutThread:
    """Runs rollouts in a thread, one at a time."""

    def __init__(self) -> None:
        self._pending: PendingRollout | None = None

    def start(self, sample: Sample[T]) -> PendingRollout[T]:
        """Start a rollout, and return without waiting.  The one before must have been taken."""
        assert self._pending is None, "the rollout of another step has not been taken"
        pending = PendingRollout(sample)
        self._pending = pending
        return pending

    def take(self, pending: PendingRollout[T]) -> T:
        """Wait for the rollout that `start` returned, as `PendingRollout.result` does; then another can start."""
        result = pending.result()
        self._pending = None
        return result

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """In this context no program of a rollout runs: others may use the rollout's devices.  Collective."""
        return contextlib.nullcontext() if self._pending is None else self._pending.pause()

    def cancel(self) -> None:
        """End a rollout that no step will take.  Collective."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None


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
        # After an error on one of several hosts the others do not call this: the process ends with its thread.
        if jax.process_count() == 1:
            thread.cancel()
