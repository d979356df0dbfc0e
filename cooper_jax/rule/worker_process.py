"""A worker process of the rule verifier, seen from its parent: start, questions, replies, end.

The process limits its own CPU time and memory (rule_worker.py), so a verdict does not depend on the load of the
machine.  The parent only waits; it gives up after `stall_limit` seconds without a reply, which happens if
the process is stopped or starved.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from cooper_jax.types import Problem

START_LIMIT = 120.0  # seconds within which a process must be ready, even on a busy machine
KERNEL_SECOND = 1.0  # CPU seconds beyond its limit after which the kernel ends a process, about
START_TRIES = 6  # a machine may be short of processes or file descriptors for a moment
FIRST_WAIT = 0.2  # seconds before the second try; doubled with each
# A worker's environment variables: what Python and the C library need, no keys.
ENVIRONMENT = frozenset({
    "PATH", "HOME", "TMPDIR", "TEMP", "TMP", "LANG", "LANGUAGE", "TZ", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV",
    "PYTHONDONTWRITEBYTECODE", "CONDA_PREFIX", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT",
    "GLIBC_TUNABLES",
})  # fmt: skip
ENVIRONMENT_PREFIXES = ("LC_", "MALLOC_", "OMP_", "OPENBLAS_", "MKL_")
POLL = 0.1  # seconds between two looks at whether the verifier has been closed


class Outcome(enum.Enum):
    """The reasons for which a process gives no verdict."""

    TIMEOUT = "it used up its CPU time"
    DIED = "it died, or it had too little memory"
    STALLED = "it did not reply in time"


class Item(NamedTuple):
    """A response to judge.  The rule reads reference and completion alone, a user's judge all fields."""

    reference: str
    completion: str
    question: str = ""
    columns: Mapping[str, Any] = MappingProxyType({})  # of the problem's data row


def make_item(problem: Problem, completion: str, reference: str = "") -> Item:
    """The item of a response to a problem.  reference: in place of the problem's own, unless it is empty."""
    return Item(reference or problem.reference, completion, problem.question, problem.columns)


class Answer(NamedTuple):
    """The outcome of an item."""

    outcome: str | Outcome  # the verdict, or the reason why there is none
    spent: float = 0.0  # CPU seconds
    error: str = ""  # the exception of a user's judge


class WorkerError(RuntimeError):
    """No worker process can be started."""


def choose_environment(with_judge: bool) -> dict[str, str]:
    """Choose a worker's environment variables.

    The built-in rule parses text of strangers, so its workers get none that may hold a secret.  A user's judge may
    need variables of its own, and gets all.
    """
    chosen = dict(os.environ)
    if not with_judge:
        names = [name for name in chosen if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)]
        chosen = {name: chosen[name] for name in names}
    # The same order of sets and symbols in every process, so that a verdict does not depend on it.
    return {**chosen, "PYTHONHASHSEED": "0"}


class Worker:
    """A worker process and the pipes to it."""

    def __init__(self, command: Sequence[str], judge: Mapping[str, str] | None = None):
        """Start the process and wait until it is ready.  Raises RuntimeError if it does not start.

        judge: path, name and text of the user's judge, which a command with the argument `judge` reads first.
        """
        self._judge = judge
        # stderr goes to a file: nobody reads it while the process runs, and a full pipe would block it.
        self._errors = tempfile.TemporaryFile()
        self._unread = b""  # output that has been received but not returned by _read_line
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env=choose_environment(with_judge=judge is not None),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

        # If the process has died already, the next lines report it.
        if judge is not None:
            with contextlib.suppress(OSError):
                self._stdin.write(json.dumps(judge).encode() + b"\n")
        ready = self._read_line(START_LIMIT, lambda: False)
        # The reason why the platform refused the memory limit; "" if it is set.
        self.unlimited = ready.get("unlimited", "") if isinstance(ready, dict) else ""

        # Report the end of what the process printed, which is usually a traceback.
        if not isinstance(ready, dict) or ready["verdict"] != "ready":
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            output = self._errors.read().decode(errors="replace").strip()[-2000:] or "it printed nothing"
            code = self._process.returncode
            self.kill()
            raise RuntimeError(
                f"a rule worker did not start ({' '.join(command)}; exit status {code}): {output}"
            )

    def ask(self, item: Item, limit: float, stall_limit: float, is_closed: Callable[[], bool]) -> Answer:
        """The verdict on one item, or the reason why there is none.

        Args:
          limit: CPU seconds.
          stall_limit: seconds, after which the process counts as stalled.
          is_closed: polled; True ends the wait.
        """
        request: dict[str, Any] = {"reference": item.reference, "completion": item.completion, "limit": limit}
        if self._judge is not None:
            request |= {"question": item.question, "columns": dict(item.columns)}
        try:
            # Dates and other values that JSON does not have become text.
            self._stdin.write(json.dumps(request, default=str).encode() + b"\n")
        except OSError:  # the process died after its last reply
            return Answer(Outcome.DIED)
        reply = self._read_line(stall_limit, is_closed)
        if reply is None:
            return Answer(Outcome.STALLED)
        if reply is Outcome.DIED:
            # The kernel ends a process that computes beyond its limit without coming back to Python.
            self._process.wait()
            by_limit = self._process.returncode == -signal.SIGXCPU
            return Answer(Outcome.TIMEOUT if by_limit else Outcome.DIED, limit + KERNEL_SECOND)
        assert isinstance(reply, dict)
        spent = float(reply.get("cpu", 0.0))
        if reply["verdict"] == "memory":
            return Answer(Outcome.DIED, spent)
        if reply["verdict"] == "timeout":
            return Answer(Outcome.TIMEOUT, spent)
        return Answer(reply["verdict"], spent, reply.get("error", ""))

    def _read_line(self, limit: float, is_closed: Callable[[], bool]) -> dict | Outcome | None:
        """The process's next line of output; DIED at its end, None after `limit` seconds or if is_closed()."""
        deadline = time.monotonic() + limit
        while b"\n" not in self._unread:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or is_closed():
                return None

            # Wake up now and then to see whether the verifier has been closed.
            readable, _, _ = select.select([self._stdout], [], [], min(remaining, POLL))
            if not readable:
                continue
            received = os.read(self._stdout.fileno(), 1 << 16)
            if not received:
                return Outcome.DIED
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the process and close its pipes and files."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._errors.close()
