"""The rule verifier: math-verify in a pool of worker processes, with hard limits on time and memory.

The input is a list of items, (reference, completion text); the output is one `Verdict` per item, in order.

1. `submit` looks each item up in the cache of verdicts, queues the new items (each distinct one once) and
   immediately returns a `PendingVerdicts`, so that devices can work in the meantime.
2. Each worker process (rule_worker.py, JSON lines over pipes) has a thread here, which takes items from the
   queue, sends them to the process and waits for at most `timeout` seconds.  A process that exceeds the limit
   or dies is killed and replaced.
3. An item whose process failed is tried once more: after all others, alone, in a new process, for at most
   `retry_timeout` seconds.  If that fails too, the verdict is TIMEOUT, also for an item that exhausts the
   memory or crashes its process.  Timeouts are never cached.

math-verify's own timeouts use SIGALRM, which works only on the main thread and does not interrupt a long C
call.  The processes are spawned and not forked, because jax is multithreaded, and they never import jax.
If the parent dies, even by SIGKILL, an idle process exits when its pipe closes, and a busy one is ended by
its own alarm a few seconds after the item's limit.

Departure from the paper: WRONG requires a proof; without one the rule abstains (see rule_verdict.py).
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

# The command of a worker.  -P keeps this folder off its sys.path, where our modules could shadow a library's.
WORKER = (sys.executable, "-P", str(Path(__file__).with_name("rule_worker.py")))
START_LIMIT = 120.0  # seconds within which a process must have imported math-verify, even on a busy machine
CACHED_VERDICTS = 1 << 16  # size of the cache; the least recently used verdicts are dropped
READY_ITEM = ("4", "So the answer is \\boxed{4}.")  # a correct item, to test that a worker works


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Settings of the rule verifier's worker processes: the config's `rule` section."""

    workers: int  # number of processes
    timeout: float  # seconds for a verdict before the process is killed
    retry_timeout: float  # seconds for the second and last try, which runs alone
    memory_mb: int  # limit of one process's address space in MiB; 0 sets no limit

    def __post_init__(self) -> None:
        errors = [
            *typed_config.find_below_minimum(self, "rule", 1, ("workers",)),
            *typed_config.find_below_minimum(self, "rule", 0, ("memory_mb",)),
        ]
        if not 0 < self.timeout <= self.retry_timeout:
            errors.append(
                f"rule.timeout={self.timeout}, rule.retry_timeout={self.retry_timeout}: both must be "
                "positive, and retry_timeout must be at least timeout"
            )
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> RuleConfig:
        """Read the `rule` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "rule")


@dataclasses.dataclass
class _Job:
    """An item that is queued, running or finished; `done` is set together with `verdict` or `error`."""

    item: Item
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    verdict: Verdict | None = None
    error: Exception | None = None


class PendingVerdicts:
    """Verdicts that may still be computing; `result` waits for them."""

    def __init__(self, jobs: list[_Job]):
        self._jobs = jobs

    def done(self) -> bool:
        """True if `result` would return without waiting."""
        return all(job.done.is_set() for job in self._jobs)

    def result(self) -> list[Verdict]:
        """Wait for all verdicts and return them in the order submitted.

        Raises RuntimeError if no worker process starts, or if the verifier is closed before a verdict.
        """
        # Jobs finish in any order; waiting for them in turn returns when the last one is done.
        verdicts: list[Verdict] = []
        for job in self._jobs:
            job.done.wait()
            if job.error is not None:
                # A new exception for each caller: raising one object in several threads mixes their
                # tracebacks.
                raise RuntimeError(str(job.error)) from job.error
            assert job.verdict is not None
            verdicts.append(job.verdict)
        return verdicts


class RuleVerifier:
    """A pool of math-verify processes, started at the first submission.  A context manager."""

    def __init__(self, cfg: RuleConfig, command: Sequence[str] = WORKER):
        """Prepare the pool; nothing is started yet.

        Args:
          command: starts one worker; the memory limit in MiB is appended as its last argument.
        """
        self._timeout, self._retry_timeout = cfg.timeout, cfg.retry_timeout
        self._command = (*command, str(cfg.memory_mb))
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(cfg.workers)]

        # Guards all fields below; threads are notified of every change.
        self._state = threading.Condition()

        # Jobs and verdicts; items are keyed by `_hash_item`.
        self._first_tries: collections.deque[_Job] = collections.deque()
        self._retries: collections.deque[_Job] = collections.deque()
        self._unfinished: dict[bytes, _Job] = {}  # queued or running
        self._cache: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._running_count = 0  # number of jobs that are with a worker
        self._retrying = False  # True while a retry runs; no other job runs then

        # State of the pool.
        self._started = False
        self._closed = False
        self._warned = False  # True once the message that the platform refuses the memory limit is printed

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

            # Samples of one prompt are often identical: each distinct item is judged once.
            for item in items:
                key = _hash_item(item)
                if key in self._cache:
                    self._cache.move_to_end(key)  # the most recently used verdict is dropped last
                    job = _Job(item, verdict=self._cache[key])
                    job.done.set()
                elif key in self._unfinished:
                    job = self._unfinished[key]
                else:
                    job = self._unfinished[key] = _Job(item)
                    self._first_tries.append(job)
                jobs.append(job)

            # Start the workers when there is work: a run whose items are all cached needs none.
            if self._first_tries and not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._state.notify_all()
        return PendingVerdicts(jobs)

    def collect(self, pending: Sequence[PendingVerdicts]) -> list[Verdict]:
        """Wait for several submissions and return their verdicts, in the order of the submissions."""
        verdicts: list[Verdict] = []
        for part in pending:
            verdicts += part.result()
        return verdicts

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge items and wait for their verdicts."""
        return self.submit(items).result()

    def check_ready(self) -> None:
        """Judge one item, to detect a rule verifier that does not work before training starts.

        A caller can `submit([READY_ITEM])` earlier, to start the worker during other work.  Raises ValueError
        if no worker starts, if the verdict does not arrive, or if it is not CORRECT.
        """
        try:
            # The item goes through the same queue and the same limits as all others.
            (verdict,) = self.check([READY_ITEM])
        except RuntimeError as error:
            # Of a traceback, keep only the last line, which names the exception.
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
        """Kill the workers; may be called again.  Unfinished verdicts raise an error in `result`."""
        with self._state:
            self._closed = True
            self._fail(RuntimeError("the rule verifier was closed before this verdict"))
            self._state.notify_all()
        if self._started:
            for thread in self._threads:
                thread.join()

    # --- in the threads, one per worker ---

    def _serve(self) -> None:
        """Work on jobs until the verifier is closed, with one process that is replaced when it fails."""
        worker: _Worker | None = None
        try:
            while (next_job := self._take_job()) is not None:
                job, is_retry = next_job

                # A retry gets a new process: the old one may be short of memory because of earlier items.
                if is_retry and worker is not None:
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

                # After a failure the process may still be busy with this item, so it cannot be used again.
                if worker is not None and reply is None:
                    worker.kill()
                    worker = None
                self._finish(job, is_retry, reply, error)
        finally:
            if worker is not None:
                worker.kill()

    def _take_job(self) -> tuple[_Job, bool] | None:
        """Wait for the next job: (job, True if it is a retry), or None once the verifier is closed.

        First tries have priority, and a retry starts only when no other job runs: it may have failed because
        the machine was overloaded.
        """
        with self._state:
            while not self._closed:
                if self._first_tries and not self._retrying:
                    self._running_count += 1
                    return self._first_tries.popleft(), False
                if self._retries and not self._running_count:
                    self._running_count, self._retrying = 1, True
                    return self._retries.popleft(), True
                self._state.wait()
            return None

    def _finish(self, job: _Job, is_retry: bool, reply: str | None, error: Exception | None) -> None:
        """Record the outcome of a job.

        Args:
          reply: the verdict; None if the process failed.
          error: the error of a process that did not start, else None.
        """
        with self._state:
            self._running_count -= 1
            self._retrying = False
            if self._closed:
                return
            if error is not None:
                self._fail(error)  # a process that does not start once will not start for other items
            elif reply is None and not is_retry:
                self._retries.append(job)
            else:
                key = _hash_item(job.item)
                job.verdict = Verdict(reply or Verdict.TIMEOUT)
                job.done.set()

                # The job is missing if another thread's process failed to start in the meantime.
                self._unfinished.pop(key, None)

                # A timeout depends on the load of the machine, so it is not cached.
                if reply is not None:
                    self._cache[key] = job.verdict
                    while len(self._cache) > CACHED_VERDICTS:
                        self._cache.popitem(last=False)
            self._state.notify_all()

    def _warn_unlimited(self, reason: str) -> None:
        """Print, once per verifier, that workers run without a memory limit; "" as reason prints nothing."""
        if not reason:
            return

        # Several threads start their workers at the same time: only the first one prints.
        with self._state:
            is_first, self._warned = not self._warned, True
        if is_first:
            hosts.print_once(
                f"warning: this system does not let a process limit its memory ({reason}), so the rule's "
                "workers run without --config.rule.memory_mb; 0 sets no limit and leaves this line out"
            )

    def _fail(self, error: Exception) -> None:
        """End all jobs that are queued or running with this error.  The caller holds `_state`."""
        for job in self._unfinished.values():
            job.error = error
            job.done.set()
        self._unfinished.clear()
        self._first_tries.clear()
        self._retries.clear()


class _Worker:
    """A worker process and the pipes to it."""

    def __init__(self, command: Sequence[str]):
        """Start the process and wait until it is ready.  Raises RuntimeError if it does not start."""
        # stderr goes to a file: nobody reads it while the process runs, and a full pipe would block it.
        self._errors = tempfile.TemporaryFile()
        self._unread = b""  # output that has been received but not returned by _read_line
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            # The same order of sets and symbols in every process, so that a verdict does not depend on it.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

        ready = self._read_line(START_LIMIT, lambda: False)
        # The reason why the platform refused the memory limit; "" if it is set.
        self.unlimited = "" if ready is None else ready.get("unlimited", "")

        # Report the end of what the process printed, which is usually a traceback.
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
        """The verdict on one item; None if the process exceeds the limit, dies or runs out of memory.

        Args:
          limit: seconds.
          is_closed: polled every 0.1 s; True ends the wait, which returns None.
        """
        request = {"reference": item[0], "completion": item[1], "limit": limit}
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:  # the process died after its last reply
            return None
        reply = self._read_line(limit, is_closed)
        if reply is None or reply["verdict"] == "memory":
            return None
        return reply["verdict"]

    def _read_line(self, limit: float, is_closed: Callable[[], bool]) -> dict[str, str] | None:
        """The process's next line of output; None after `limit` seconds, at its end, or if is_closed()."""
        deadline = time.monotonic() + limit
        while b"\n" not in self._unread:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or is_closed():
                return None

            # Wake up every 0.1 s to see whether the verifier has been closed.
            readable, _, _ = select.select([self._stdout], [], [], min(remaining, 0.1))
            if not readable:
                continue
            received = os.read(self._stdout.fileno(), 1 << 16)
            if not received:  # the process has ended
                return None
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        """Kill the process and close its pipes and files."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._errors.close()


def _hash_item(item: Item) -> bytes:
    """A 128-bit hash of an item, its key in the cache."""
    # The length tells where the reference ends: ("1", "23") and ("12", "3") must differ.
    reference, completion = item
    text = f"{len(reference)}:{reference}{completion}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
