"""The rule verifier: math-verify in a pool of worker processes, with hard limits on time and memory.

What flows through: (reference, completion text) pairs in, `Verdict`s out, in the order of the pairs.

1. `submit` looks each pair up among the verdicts already given, queues what is new (each distinct pair once) and
   returns a `Pending` at once, so that devices can work meanwhile.
2. One thread a worker takes pairs from the queue, asks its process (`rule_worker.py`, JSON lines over pipes) and
   waits for at most `timeout` seconds.  A process that is late, or dead, is killed and replaced.
3. A pair that cost a process is tried once more: after everything else, alone, in a fresh process, for at most
   `retry_timeout` seconds.  If that fails too it is a TIMEOUT, which also stands for a pair that exhausts the
   memory or crashes its process.  Timeouts are never remembered.

math-verify's own timeouts use SIGALRM: they work on the main thread only and do not interrupt one long C call.  The
processes are started afresh rather than forked, as jax is multithreaded, and never import jax.  They end with the
pipe when the parent dies, whatever kills it, and a busy one by its own alarm soon after its limit.

Departure from the paper: a wrong answer must be shown to be wrong; the rest abstains (see `rule_judge`).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cooper_jax.runtime import hosts
from cooper_jax.settings import typed_config
from cooper_jax.types import Verdict

Item = tuple[str, str]  # reference, completion text

WORKER = (
    sys.executable,
    "-P",
    str(Path(__file__).with_name("rule_worker.py")),
)  # -P: our modules stay off its path
START_LIMIT = 120.0  # seconds for a process to import math-verify, on a busy machine
REMEMBERED = 1 << 16  # verdicts kept
QUESTION = ("4", "So the answer is \\boxed{4}.")  # correct: the first question of a run


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Settings of the rule verifier's processes: the config's `rule` section."""

    workers: int  # processes
    timeout: float  # seconds a verdict, before the process is killed
    retry_timeout: float  # seconds of the one further try, alone
    memory_mb: int  # address space of one process in MiB; 0 sets no limit

    def __post_init__(self) -> None:
        problems = [
            *typed_config.find_small(self, "rule", 1, ("workers",)),
            *typed_config.find_small(self, "rule", 0, ("memory_mb",)),
        ]
        if not 0 < self.timeout <= self.retry_timeout:
            problems.append(
                f"rule.timeout={self.timeout}, rule.retry_timeout={self.retry_timeout}: both must be positive, and "
                "the second try not the shorter one"
            )
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> RuleConfig:
        """Read the `rule` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "rule")


@dataclasses.dataclass
class _Job:
    item: Item
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    verdict: Verdict | None = None
    error: Exception | None = None


class PendingVerdicts:
    """Verdicts on their way."""

    def __init__(self, jobs: list[_Job]):
        self._jobs = jobs

    def done(self) -> bool:
        return all(job.done.is_set() for job in self._jobs)

    def result(self) -> list[Verdict]:
        """Waits for all, and returns them in the order submitted.

        Raises RuntimeError where no worker could be started, or the verifier was closed before it came to them.
        """
        for job in self._jobs:
            job.done.wait()
            if job.error is not None:
                raise RuntimeError(str(job.error)) from job.error
        return [job.verdict for job in self._jobs]


class RuleVerifier:
    """A pool of math-verify processes, started when first needed; a context manager.

    command: what to run as a worker; the memory limit is appended as its last argument.
    """

    def __init__(self, cfg: RuleConfig, command: Sequence[str] = WORKER):
        self._timeout, self._retry_timeout = cfg.timeout, cfg.retry_timeout
        self._command = (*command, str(cfg.memory_mb))
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(cfg.workers)]
        self._state = threading.Condition()  # guards all that follows
        self._fresh: collections.deque[_Job] = collections.deque()
        self._retries: collections.deque[_Job] = collections.deque()
        self._open: dict[bytes, _Job] = {}  # queued or running
        self._known: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._running = 0
        self._alone = False
        self._started = False
        self._closed = False
        self._warned = False  # that the platform refuses the memory limit

    def __enter__(self) -> RuleVerifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, items: Sequence[Item]) -> PendingVerdicts:
        """Queues (reference, completion text) pairs; returns at once."""
        jobs = []
        with self._state:
            if self._closed:
                raise RuntimeError("the rule verifier is closed")
            for item in items:
                key = _key(item)
                if key in self._known:
                    self._known.move_to_end(key)
                    job = _Job(item, verdict=self._known[key])
                    job.done.set()
                elif key in self._open:
                    job = self._open[key]
                else:
                    job = self._open[key] = _Job(item)
                    self._fresh.append(job)
                jobs.append(job)
            if self._fresh and not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._state.notify_all()
        return PendingVerdicts(jobs)

    def collect(self, pending: Sequence[PendingVerdicts]) -> list[Verdict]:
        """Waits for several submissions, and returns their verdicts in the order of the submissions."""
        verdicts = []
        for part in pending:
            verdicts += part.result()
        return verdicts

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        """`submit(items).result()`."""
        return self.submit(items).result()

    def check_ready(self) -> None:
        """Have a worker answer one question, before anything is trained that would be lost with it.

        `submit([QUESTION])` starts the worker earlier, beside other work.  Raises ValueError where no worker
        starts, or the answer does not come or is not right.
        """
        try:
            (verdict,) = self.check([QUESTION])
        except RuntimeError as error:
            first, *rest = str(error).splitlines()
            said = " ".join([first.removesuffix("Traceback (most recent call last):").strip(), *rest[-1:]])
            raise ValueError(f"the rule verifier does not work: {said}") from error
        if verdict is not Verdict.CORRECT:
            raise ValueError(
                f"the rule verifier does not work: asked whether 4 equals 4, it says {verdict.value!r} after at "
                f"most {self._retry_timeout} s; where the machine is that slow, raise "
                "--config.rule.retry_timeout, and where memory is short --config.rule.memory_mb"
            )

    def close(self) -> None:
        """Kills the workers; what was not yet decided raises in its `Pending.result`.  Harmless when repeated."""
        with self._state:
            self._closed = True
            self._fail(RuntimeError("the rule verifier was closed before this verdict"))
            self._state.notify_all()
        if self._started:
            for thread in self._threads:
                thread.join()

    # --- one thread a worker ---

    def _serve(self) -> None:
        worker: _Worker | None = None
        try:
            while (taken := self._take()) is not None:
                job, alone = taken
                if alone and worker is not None:
                    worker.kill()
                    worker = None
                reply = error = None
                try:
                    if worker is None:
                        worker = _Worker(self._command)
                        self._warn(worker.unlimited)
                    limit = self._retry_timeout if alone else self._timeout
                    reply = worker.ask(job.item, limit, lambda: self._closed)
                except RuntimeError as cause:
                    error = cause
                if worker is not None and reply is None:
                    worker.kill()
                    worker = None
                self._finish(job, alone, reply, error)
        finally:
            if worker is not None:
                worker.kill()

    def _take(self) -> tuple[_Job, bool] | None:
        """The next pair and whether it is a retry; None when closed.  A retry waits until nothing else runs."""
        with self._state:
            while not self._closed:
                if self._fresh and not self._alone:
                    self._running += 1
                    return self._fresh.popleft(), False
                if self._retries and not self._running:
                    self._running, self._alone = 1, True
                    return self._retries.popleft(), True
                self._state.wait()
            return None

    def _finish(self, job: _Job, alone: bool, reply: str | None, error: Exception | None) -> None:
        with self._state:
            self._running -= 1
            self._alone = False
            if self._closed:
                return
            if error is not None:  # no process starts: nobody's verdict will come
                self._fail(error)
            elif reply is None and not alone:
                self._retries.append(job)
            else:
                key = _key(job.item)
                job.verdict = Verdict(reply or Verdict.TIMEOUT)
                job.done.set()
                self._open.pop(key, None)  # given up on meanwhile, where another process failed to start
                if reply is not None:
                    self._known[key] = job.verdict
                    while len(self._known) > REMEMBERED:
                        self._known.popitem(last=False)
            self._state.notify_all()

    def _warn(self, unlimited: str) -> None:
        """Say once that workers run without a memory limit; "" says nothing."""
        with self._state:
            first, self._warned = bool(unlimited) and not self._warned, self._warned or bool(unlimited)
        if first:
            hosts.print_once(
                f"warning: this system does not let a process limit its memory ({unlimited}), so the rule's "
                "workers run without --config.rule.memory_mb; 0 sets no limit and leaves this line out"
            )

    def _fail(self, error: Exception) -> None:
        """Gives up on all that is queued or running; the caller holds the lock."""
        for job in self._open.values():
            job.error = error
            job.done.set()
        self._open.clear()
        self._fresh.clear()
        self._retries.clear()


class _Worker:
    """One process.  RuntimeError where it does not start."""

    def __init__(self, command: Sequence[str]):
        self._errors = tempfile.TemporaryFile()
        self._unread = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            # One order of sets and symbols in every process: a verdict does not depend on where it was reached.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        ready = self._line(START_LIMIT, lambda: False)
        # Why the platform refused the memory limit; "" where it did not.
        self.unlimited: str = ready["unlimited"] if ready is not None and "unlimited" in ready else ""
        if ready is None or ready["verdict"] != "ready":
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-2000:] or "it said nothing"
            code = self._process.returncode
            self.kill()
            raise RuntimeError(
                f"a rule worker did not start ({' '.join(command)}; exit status {code}): {said}"
            )

    def ask(self, item: Item, limit: float, closed: Callable[[], bool]) -> str | None:
        """The reply on one pair; None where the process was late, died or ran out of memory."""
        request = {"reference": item[0], "completion": item[1], "limit": limit}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:  # it has died since
            return None
        reply = self._line(limit, closed)
        return None if reply is None or reply["verdict"] == "memory" else reply["verdict"]

    def _line(self, limit: float, closed: Callable[[], bool]) -> dict[str, str] | None:
        """The worker's next line; None where it is late, or the worker has died or is closed."""
        deadline = time.monotonic() + limit
        pipe = self._process.stdout
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or closed():
                return None
            if not select.select([pipe], [], [], min(left, 0.1))[0]:
                continue
            read = os.read(pipe.fileno(), 1 << 16)
            if not read:
                return None
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            pipe.close()


def _key(item: Item) -> bytes:
    reference, completion = item
    head = f"{len(reference)}:".encode()
    return hashlib.blake2b(
        head + (reference + completion).encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()
