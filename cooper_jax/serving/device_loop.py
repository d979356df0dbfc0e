"""The one thread of a server that uses the devices: it lets the models take turns.

One thread, because programs that several threads start on a mesh could wait for each other for ever.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

log = logging.getLogger(__name__)


class Worker(Protocol):
    """A model that has work from time to time: ChatEngine or Scorer."""

    def step(self) -> bool:
        """Do a part of the work; False if there is none."""

    def fail(self) -> None:
        """Answer everything that waits with an error, and refuse new work."""


class DeviceLoop:
    """Calls the workers' `step` in turn until `stop`."""

    def __init__(self, workers: Sequence[Worker], on_failure: Callable[[], None]):
        """on_failure: called once, after an error of a worker: the devices' state is then unknown."""
        self._workers, self._on_failure = workers, on_failure
        self._work_arrived, self._stopping = threading.Event(), threading.Event()
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="devices", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that there is work."""
        self._work_arrived.set()

    def fail_all(self) -> None:
        """Answer everything that waits with an error."""
        for worker in self._workers:
            worker.fail()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._stopping.set()
        self._work_arrived.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                # Cleared before the workers look: work that arrives from now on sets it again.
                self._work_arrived.clear()
                worked = [worker.step() for worker in self._workers]
                if not any(worked):
                    self._work_arrived.wait()
        except Exception:
            log.exception("the devices' thread has failed; the server stops")
            self.failed = True
            self.fail_all()
            self._on_failure()
