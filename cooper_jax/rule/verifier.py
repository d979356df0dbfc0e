"""The rule verifier: math-verify in a pool of worker processes, with hard limits on time and memory.

Items, (reference, completion text), go in; `Verdict`s come out in the order of the items.

1. `submit` looks each item up among the verdicts already given, queues the new ones (each distinct item once)
   and returns a `PendingVerdicts` at once, so that devices can work meanwhile.
2. One thread a worker takes items from the queue, asks its process (rule_worker.py, JSON lines over pipes)
   and waits for at most `timeout` seconds.  A process that is late, or dead, is killed and replaced.
3. An item whose process was killed or died is tried once more: after everything else, alone, in a new
   process, for at most `retry_timeout` seconds.  If that fails too it is a TIMEOUT, which also stands for an
   item that exhausts the memory or crashes its process.  Timeouts are never cached.

math-verify's own timeouts use SIGALRM: they work on the main thread only and do not interrupt one long C
call.  The processes are spawned rather than forked, since jax is multithreaded, and never import jax.  When
the parent dies, whatever kills it, an idle process ends with its pipe, and a busy one by its own alarm soon
after its limit.

Departure from the paper: WRONG requires proof; without it the rule abstains (see rule_verdict.py).
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
CACHED_VERDICTS = 1 << 16  # at most; the least recently used are dropped
READY_ITEM = ("4", "So the answer is \\boxed{4}.")  # a correct item, which shows that a worker works


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Settings of the rule verifier's worker processes: the config's `rule` section."""

    workers: int  # number of processes
    timeout: float  # seconds a verdict may take before the process is killed
    retry_timeout: float  # seconds of the second and last try, alone
    memory_mb: int  # address space of one process in MiB; 0 sets no limit

    def __post_init__(self) -> None:
        problems = [
            *typed_config.find_small(self, "rule", 1, ("workers",)),
            *typed_config.find_small(self, "rule", 0, ("memory_mb",)),
        ]
        if not 0 < self.timeout <= self.retry_timeout:
            problems.append(
                f"rule.timeout={self.timeout}, rule.retry_timeout={self.retry_timeout}: both must be "
                "positive, and the second not below the first"
            )
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict) -> RuleConfig:
        """Read the `rule` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "rule")


@dataclasses.dataclass
class _Job:
    """An item on its way through the pool.  `done` is set once verdict or error is."""

    item: Item
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    verdict: Verdict | None = None
    error: Exception | None = None


class PendingVerdicts:
    """Verdicts that may still be in the making; `result` waits for them."""

    def __init__(self, jobs: list[_Job]):
        self._jobs = jobs

    def done(self) -> bool:
        """True once `result` would not wait."""
        return all(job.done.is_set() for job in self._jobs)

    def result(self) -> list[Verdict]:
        """Wait for all verdicts and return them in the order submitted.

        Raises RuntimeError where no worker process starts, and where the verifier is closed before a verdict.
        """
        verdicts: list[Verdict] = []
        for job in self._jobs:
            job.done.wait()
            if job.error is not None:
                raise RuntimeError(str(job.error)) from job.error
            assert job.verdict is not None
            verdicts.append(job.verdict)
        return verdicts


class RuleVerifier:
    """A pool of math-verify processes, started when first needed; a context manager."""

    def __init__(self, cfg: RuleConfig, command: Sequence[str] = WORKER):
        """command: runs one worker; the memory limit is appended as its last argument."""
        self._timeout, self._retry_timeout = cfg.timeout, cfg.retry_timeout
        self._command = (*command, str(cfg.memory_mb))
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(cfg.workers)]

        self._state = threading.Condition()  # guards all fields below
        self._first_tries: collections.deque[_Job] = collections.deque()
        self._retries: collections.deque[_Job] = collections.deque()
        self._open: dict[bytes, _Job] = {}  # queued or running, by the item's hash
        self._cache: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._running = 0  # jobs that workers have at the moment
        self._retrying = False  # a retry runs, alone
        self._started = False
        self._closed = False
        self._warned = False  # has printed that the platform refuses the memory limit

    def __enter__(self) -> RuleVerifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, items: Sequence[Item]) -> PendingVerdicts:
        """Queue (reference, completion text) items and return at once.  Raises RuntimeError once closed."""
        jobs = []
        with self._state:
            if self._closed:
                raise RuntimeError("the rule verifier is closed")

            # A small policy repeats itself: each distinct item is judged once.
            for item in items:
                key = _hash_item(item)
                if key in self._cache:
                    self._cache.move_to_end(key)
                    job = _Job(item, verdict=self._cache[key])
                    job.done.set()
                elif key in self._open:
                    job = self._open[key]
                else:
                    job = self._open[key] = _Job(item)
                    self._first_tries.append(job)
                jobs.append(job)

            # Threads start with the first items, so that a verifier that is never used costs nothing.
            if self._first_tries and not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._state.notify_all()
        return PendingVerdicts(jobs)

    def collect(self, pending: Sequence[PendingVerdicts]) -> list[Verdict]:
        """Wait for several submissions; their verdicts, in the order of the submissions."""
        verdicts: list[Verdict] = []
        for part in pending:
            verdicts += part.result()
        return verdicts

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge items and wait for their verdicts."""
        return self.submit(items).result()

    def check_ready(self) -> None:
        """Judge one item, so that a rule verifier that does not work is found before anything is trained.

        `submit([READY_ITEM])` starts the worker earlier, during other work.  Raises ValueError where no
        worker starts, or the verdict does not arrive or is not CORRECT.
        """
        try:
            (verdict,) = self.check([READY_ITEM])
        except RuntimeError as error:
            # Of a traceback, the last line says what went wrong.
            first, *rest = str(error).splitlines()
            message = " ".join([first.removesuffix("Traceback (most recent call last):").strip(), *rest[-1:]])
            raise ValueError(f"the rule verifier does not work: {message}") from error
        if verdict is not Verdict.CORRECT:
            raise ValueError(
                f"the rule verifier does not work: asked whether 4 equals 4, it says {verdict.value!r} after "
                f"at most {self._retry_timeout} s; on a machine that is so slow, raise "
                "--config.rule.retry_timeout; where memory is short, raise --config.rule.memory_mb"
            )

    def close(self) -> None:
        """Kill the workers.  Verdicts still open raise in `PendingVerdicts.result`.  May be called again."""
        with self._state:
            self._closed = True
            self._fail(RuntimeError("the rule verifier was closed before this verdict"))
            self._state.notify_all()
        if self._started:
            for thread in self._threads:
                thread.join()

    # --- in the threads, one a worker ---

    def _serve(self) -> None:
        """Work on jobs until the verifier is closed, in a process that is replaced when it fails."""
        worker: _Worker | None = None
        try:
            while (taken := self._take()) is not None:
                job, is_retry = taken
                if is_retry and worker is not None:  # a retry gets a new process
                    worker.kill()
                    worker = None

                reply: str | None = None
                error: Exception | None = None
                try:
                    if worker is None:
                        worker = _Worker(self._command)
                        self._warn_unlimited(worker.unlimited)
                    limit = self._retry_timeout if is_retry else self._timeout
                    reply = worker.ask(job.item, limit, lambda: self._closed)
                except RuntimeError as cause:
                    error = cause

                # A process that is late may still be busy with this item, so it cannot take the next one.
                if worker is not None and reply is None:
                    worker.kill()
                    worker = None
                self._finish(job, is_retry, reply, error)
        finally:
            if worker is not None:
                worker.kill()

    def _take(self) -> tuple[_Job, bool] | None:
        """The next job, and True for a retry, which waits until nothing else runs; None when closed."""
        with self._state:
            while not self._closed:
                if self._first_tries and not self._retrying:
                    self._running += 1
                    return self._first_tries.popleft(), False
                # Alone: an item may have failed because others used up the processor or the memory.
                if self._retries and not self._running:
                    self._running, self._retrying = 1, True
                    return self._retries.popleft(), True
                self._state.wait()
            return None

    def _finish(self, job: _Job, is_retry: bool, reply: str | None, error: Exception | None) -> None:
        """Record a job's outcome.  reply: None where its process failed; error: why no process starts."""
        with self._state:
            self._running -= 1
            self._retrying = False
            if self._closed:
                return
            if error is not None:  # no process starts, so no verdict will arrive
                self._fail(error)
            elif reply is None and not is_retry:
                self._retries.append(job)  # its last try, after everything else
            else:
                key = _hash_item(job.item)
                job.verdict = Verdict(reply or Verdict.TIMEOUT)
                job.done.set()
                self._open.pop(key, None)  # it is gone where another process failed to start meanwhile
                # A timeout is not cached: on a less busy machine the item may get a verdict.
                if reply is not None:
                    self._cache[key] = job.verdict
                    while len(self._cache) > CACHED_VERDICTS:
                        self._cache.popitem(last=False)
            self._state.notify_all()

    def _warn_unlimited(self, reason: str) -> None:
        """Print once that workers run without a memory limit; reason: "" prints nothing."""
        if not reason:
            return
        with self._state:
            first, self._warned = not self._warned, True
        if first:
            hosts.print_once(
                f"warning: this system does not let a process limit its memory ({reason}), so the rule's "
                "workers run without --config.rule.memory_mb; 0 sets no limit and leaves this line out"
            )

    def _fail(self, error: Exception) -> None:
        """Fail all jobs that are queued or running; the caller holds the lock."""
        for job in self._open.values():
            job.error = error
            job.done.set()
        self._open.clear()
        self._first_tries.clear()
        self._retries.clear()


class _Worker:
    """A worker process.  Raises RuntimeError where it does not start."""

    def __init__(self, command: Sequence[str]):
        self._errors = tempfile.TemporaryFile()
        self._unread = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            # One order of sets and symbols in every process: a verdict does not depend on where it was
            # reached.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

        ready = self._read_line(START_LIMIT, lambda: False)
        # Why the platform refused the memory limit; "" where it did not.
        self.unlimited = "" if ready is None else ready.get("unlimited", "")
        if ready is None or ready["verdict"] != "ready":
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            output = self._errors.read().decode(errors="replace").strip()[-2000:] or "it printed nothing"
            code = self._process.returncode
            self.kill()
            raise RuntimeError(
                f"a rule worker did not start ({' '.join(command)}; exit status {code}): {output}"
            )

    def ask(self, item: Item, limit: float, is_closed: Callable[[], bool]) -> str | None:
        """The verdict on one item; None where the process is late, dies or runs out of memory.

        limit: seconds.  is_closed: asked now and then; True ends the wait.
        """
        request = {"reference": item[0], "completion": item[1], "limit": limit}
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:  # it has died since
            return None
        reply = self._read_line(limit, is_closed)
        if reply is None or reply["verdict"] == "memory":
            return None
        return reply["verdict"]

    def _read_line(self, limit: float, is_closed: Callable[[], bool]) -> dict[str, str] | None:
        """The worker's next line; None where it is late, the worker has died, or the verifier is closed."""
        deadline = time.monotonic() + limit
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or is_closed():
                return None
            readable, _, _ = select.select([self._stdout], [], [], min(left, 0.1))
            if not readable:
                continue
            received = os.read(self._stdout.fileno(), 1 << 16)
            if not received:  # the process has ended
                return None
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        """Kill the process and release what belongs to it."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._errors.close()


def _hash_item(item: Item) -> bytes:
    """128 bits that stand for an item in the cache.  The length keeps the two texts apart."""
    reference, completion = item
    text = f"{len(reference)}:{reference}{completion}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
