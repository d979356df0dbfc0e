"""Calls of a reward function, in threads beside the rollout, with a time limit each.

An ordinary function is called in one thread at a time, in the order in which groups end: it need not be safe to
call from several threads.  An async function runs in an event loop of its own, which is never closed between
calls (a client that it keeps stays usable), and all its calls run at once.

A thread cannot be killed.  A call over its limit is given up: its result is a failure, its thread is left
behind, and the next call gets a new one.  After MAX_ABANDONED of them no call is started any more; all fail.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np

from cooper_jax.runtime import hosts
from cooper_jax.settings.user_code import describe_error

MAX_ABANDONED = 4  # calls that never returned, after which a function is not called any more
GRACE = 5.0  # seconds beyond the limit after which an event loop counts as blocked
POLL = 0.2  # seconds between two looks at whether the run is to stop

_LARGEST = float(np.finfo(np.float32).max)

# Reasons of a failed call.
EXCEPTION, TIMEOUT, WRONG_LENGTH, WRONG_TYPE = "exception", "timeout", "wrong_length", "wrong_type"


@dataclasses.dataclass(frozen=True)
class CallResult:
    """The rewards of a group by one function, or the reason why there are none."""

    values: tuple[float | None, ...]  # [G]; None: no reward
    not_finite: int = 0  # values that were NaN, infinite or too large for float32, which are None
    failure: str = ""  # a reason above; then all values are None
    message: str = ""  # one line about the failure


def read_values(returned: Any, rows: int) -> CallResult:
    """Read what a reward function returned for `rows` rows: numbers, or None for a row without a reward."""
    values: list[float | None] = []
    not_finite = 0
    try:
        # A set has no order, and a text is no list of numbers.
        if isinstance(returned, str | bytes | Mapping | Set):
            raise TypeError
        for value in returned:
            if isinstance(value, str | bytes):
                raise TypeError
            try:
                number = None if value is None else float(value)
            except OverflowError:  # an integer beyond all floats
                number = math.inf
            # A number beyond float32 would be infinite as a reward.  NaN fails the comparison, too.
            if number is not None and not abs(number) <= _LARGEST:
                number, not_finite = None, not_finite + 1
            values.append(number)
    except (TypeError, ValueError):
        shown = " ".join(repr(returned).split())[:60]
        what = f"it returned {type(returned).__name__} {shown}, not a list of numbers and None"
        return fail_call(rows, WRONG_TYPE, what)
    if len(values) != rows:
        return fail_call(rows, WRONG_LENGTH, f"it returned {len(values)} rewards for {rows} completions")
    return CallResult(tuple(values), not_finite)


def fail_call(rows: int, failure: str, message: str) -> CallResult:
    """The result of a call that failed."""
    return CallResult((None,) * rows, failure=failure, message=message)


class Call:
    """One call of a function, which may still be running."""

    def __init__(self, arguments: Mapping[str, Any], rows: int):
        self.arguments = arguments
        self.rows = rows
        self.submitted = time.monotonic()  # or started again
        self.loop: asyncio.AbstractEventLoop | None = None  # of an async function's call
        self.done = threading.Event()
        self._result: CallResult | None = None
        self._lock = threading.Lock()

    def finish(self, result: CallResult) -> bool:
        """Set the result, unless the call has one; a late result of a call that was given up is ignored."""
        with self._lock:
            if self._result is not None:
                return False
            self._result = result
            self.done.set()
            return True

    @property
    def result(self) -> CallResult:
        """The result, once `done` is set."""
        assert self._result is not None
        return self._result


class FunctionRunner:
    """Runs the calls of one reward function.  Closed by `close`."""

    def __init__(self, function: Callable[..., Any], path: str, timeout: float):
        """Start the function's thread.

        Args:
          path: the function's file, whose lines are named in messages.
          timeout: seconds per call.
        """
        self._function, self._path, self._timeout = function, path, timeout
        self._abandoned = 0  # calls that never returned, and event loops that were blocked
        self._is_async = _is_async(function)
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        # With rollouts one step ahead a thread submits calls of the next step while another waits for this step's.
        self._lock = threading.Lock()  # guards the loop and the calls in it
        self._running: list[Call] = []  # of an async function, in the loop
        if not self._is_async:
            threading.Thread(target=self._supervise, daemon=True, name="reward function").start()

    def submit(self, arguments: Mapping[str, Any], rows: int) -> Call:
        """Start a call, or queue it behind others, and return at once.  rows: the number of completions."""
        call = Call(arguments, rows)
        if not self._is_async:
            self._queue.put(call)
        elif self._abandoned >= MAX_ABANDONED:
            call.finish(self._give_up(rows))
        else:
            self._start_async(call)
        return call

    def wait(self, call: Call) -> CallResult:
        """Wait for a call's result.  Raises hosts.Stopped after SIGTERM in a run of one process."""
        # The supervising thread ends every call of an ordinary function; a blocked event loop ends none.  Calls of
        # an async function start when they are submitted.
        while not call.done.wait(POLL):
            hosts.raise_if_stopping_alone()
            if self._is_async and time.monotonic() > call.submitted + self._timeout + GRACE:
                message = f"no result within {self._timeout} s: it blocks its event loop"
                call.finish(fail_call(call.rows, TIMEOUT, message))

                self._leave_loop(call)
        return call.result

    def _start_async(self, call: Call) -> None:
        """Start a call of an async function in the current event loop."""
        with self._lock:
            if self._loop is None:
                self._loop = _start_loop()
            call.loop = self._loop
            self._running = [other for other in self._running if not other.done.is_set()] + [call]
            asyncio.run_coroutine_threadsafe(self._run_async(call), call.loop)

    def _leave_loop(self, call: Call) -> None:
        """Leave the event loop that a call blocks; the next call gets a new one.

        Calls that were submitted to it later, those of the next step, have not had their time: they start again.
        """
        with self._lock:
            if self._loop is not call.loop:
                return
            self._loop = None
            self._abandoned += 1
            waiting, self._running = self._running, []
        now = time.monotonic()
        for other in waiting:
            if not other.done.is_set() and now <= other.submitted + self._timeout + GRACE:
                if self._abandoned >= MAX_ABANDONED:
                    other.finish(self._give_up(other.rows))
                else:
                    other.submitted = now
                    self._start_async(other)

    def close(self) -> None:
        """End the function's thread, once it has returned."""
        self._queue.put(None)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)

    # --- in threads ---

    def _supervise(self) -> None:
        """Run the calls one after the other, each in a thread that may be left behind."""
        while (call := self._queue.get()) is not None:
            if self._abandoned >= MAX_ABANDONED:
                call.finish(self._give_up(call.rows))
                continue
            threading.Thread(target=self._run, args=(call,), daemon=True).start()
            if not call.done.wait(self._timeout):
                if call.finish(fail_call(call.rows, TIMEOUT, f"no result within {self._timeout} s")):
                    self._abandoned += 1

    def _run(self, call: Call) -> None:
        """Call an ordinary function."""
        try:
            returned = self._function(**call.arguments)
            # A wrapper of an async function.
            if inspect.isawaitable(returned):
                returned = asyncio.run(_await(returned))
            call.finish(read_values(returned, call.rows))
        # A function may raise anything, SystemExit included.
        except BaseException as error:
            call.finish(fail_call(call.rows, EXCEPTION, describe_error(error, self._path)))

    async def _run_async(self, call: Call) -> None:
        """Call an async function."""
        limit = asyncio.timeout(self._timeout)
        try:
            async with limit:
                returned = await self._function(**call.arguments)
            call.finish(read_values(returned, call.rows))
        except BaseException as error:
            # The function's own TimeoutError is an exception like any other.
            if limit.expired():
                result = fail_call(call.rows, TIMEOUT, f"no result within {self._timeout} s")
            else:
                result = fail_call(call.rows, EXCEPTION, describe_error(error, self._path))
            call.finish(result)

    def _give_up(self, rows: int) -> CallResult:
        message = f"not called any more: {MAX_ABANDONED} earlier calls never returned"
        return fail_call(rows, TIMEOUT, message)


def _is_async(function: Callable[..., Any]) -> bool:
    """True for an async function, and for an object with an async `__call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _start_loop() -> asyncio.AbstractEventLoop:
    """Start an event loop in a thread of its own."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            loop.run_forever()
        finally:
            loop.close()

    threading.Thread(target=run, daemon=True, name="async reward function").start()
    return loop
