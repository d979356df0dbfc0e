"""The rule verifier: verdicts from a pool of worker processes, with hard limits on CPU time and memory.

The input is a list of items (reference, completion text, question, columns); the output is one `Verdict` per
item, in order.  The rule reads reference and completion alone; a judge of the user's own (rule.judge), which
then decides in its place in the same processes, gets all of it.

1. `submit` looks each item up in the cache of verdicts, queues the new items (each distinct one once) and
   immediately returns a `PendingVerdicts`, so that devices can work in the meantime.
2. Each worker process (rule_worker.py) has a thread here, which takes items from the queue and sends them to the
   process.  The process limits its own CPU time to `timeout` seconds an item, so a verdict does not depend
   on the load of the machine, and no item is tried twice for having been slow.
3. All items over the limit together may take `step_budget` CPU seconds until verdicts are collected; from
   then on the limit is `SHORT_LIMIT`, which is still a hundred times what an ordinary answer takes.
4. An item whose process died is tried once more, in a new process, which is ready within a fraction of a
   second.  If that fails too, the verdict is TIMEOUT, like that of an item that exceeds a limit.  It is
   cached like any other.

The processes are spawned and not forked, because jax is multithreaded, and they never import jax.  If the
parent dies, even by SIGKILL, an idle process exits when its pipe closes, and a busy one at its CPU limit.

Departure from the paper: both CORRECT and WRONG require a proof; without one the rule abstains (see
rule_verdict.py).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cooper_jax.rule.user_judge import find_judge_errors
from cooper_jax.rule.worker_process import FIRST_WAIT, START_TRIES, Answer, Item, Outcome, Worker, WorkerError
from cooper_jax.runtime import hosts
from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import UserCode, find_reference_errors, load_function, read_user_code
from cooper_jax.types import Verdict

# The command of a worker.  -P keeps this folder off its sys.path, where our modules could shadow a library's.
WORKER = (sys.executable, "-P", str(Path(__file__).with_name("rule_worker.py")))
SHORT_LIMIT = 0.2  # CPU seconds for a verdict once the step's budget is spent
STALL_LIMIT = 300.0  # seconds without a reply after which a process is replaced
STOP_POLL = 0.2  # seconds between two looks at whether the run is to stop
CACHED_VERDICTS = 1 << 16  # size of the cache; the least recently used verdicts are dropped
READY_ITEM = Item("4", "So the answer is \\boxed{4}.")  # a correct item, to test that a worker works


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Settings of the rule verifier's worker processes: the config's `rule` section."""

    workers: int  # number of processes
    timeout: float  # CPU seconds for a verdict
    step_budget: float  # CPU seconds that all verdicts over the limit may take until verdicts are collected
    memory_mb: int  # limit of one process's address space in MiB; 0 sets no limit
    judge: str = ""  # PATH.py:NAME of a function that decides in place of the rule; "": the rule decides

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, "rule")
        if self.judge:
            errors += find_reference_errors(self.judge, "rule.judge")
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
    died: bool = False  # True once a process died with it


class PendingVerdicts:
    """Verdicts that may still be computing; `result` waits for them."""

    def __init__(self, jobs: list[_Job], on_collected: Callable[[], None]):
        """on_collected: called when the verdicts have been waited for."""
        self._jobs = jobs
        self._on_collected = on_collected

    def done(self) -> bool:
        """True if `result` would return without waiting."""
        return all(job.done.is_set() for job in self._jobs)

    def result(self) -> list[Verdict]:
        """Wait for all verdicts and return them in the order submitted.

        Raises RuntimeError if no worker process starts, or if the verifier is closed before a verdict, and
        hosts.Stopped after SIGTERM in a run of one process.
        """
        # Jobs finish in any order; waiting for them in turn returns when the last one is done.
        verdicts: list[Verdict] = []
        for job in self._jobs:
            while not job.done.wait(STOP_POLL):
                hosts.raise_if_stopping_alone()
            if job.error is not None:
                # A new exception for each caller: raising one object in several threads mixes their
                # tracebacks.
                raise type(job.error)(str(job.error)) from job.error
            assert job.verdict is not None
            verdicts.append(job.verdict)
        self._on_collected()
        return verdicts


class RuleVerifier:
    """A pool of worker processes, started at the first submission.  A context manager."""

    def __init__(self, cfg: RuleConfig, command: Sequence[str] = WORKER, stall_limit: float = STALL_LIMIT):
        """Prepare the pool; nothing is started yet.

        Args:
          command: starts one worker; the memory limit in MiB is appended as its last argument.
          stall_limit: seconds without a reply after which a process is replaced.

        Raises SetupError for a judge that cannot be imported.
        """
        self._timeout, self._step_budget, self._stall_limit = cfg.timeout, cfg.step_budget, stall_limit

        # The judge is imported here, too: its errors are found before a process is started.
        self.judge: UserCode | None = None
        if cfg.judge:
            self.judge = read_user_code(cfg.judge, "rule.judge")
            load_function(self.judge, "rule.judge")
            command = (*command, "judge")
        self._command = (*command, str(cfg.memory_mb))
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(cfg.workers)]

        # Guards all fields below; threads are notified of every change.
        self._state = threading.Condition()

        # Jobs and verdicts; items are keyed by `_hash_item`.
        self._queue: collections.deque[_Job] = collections.deque()
        self._unfinished: dict[bytes, _Job] = {}  # queued or running
        self._cache: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._overtime = 0.0  # CPU seconds of verdicts over the limit since verdicts were collected
        self._judge_error = ""  # the first exception of the user's judge

        # State of the pool.
        self._started = False
        self._closed = False
        self._warned = False  # True once the message that the platform refuses the memory limit is printed

    def __enter__(self) -> RuleVerifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, items: Sequence[Item]) -> PendingVerdicts:
        """Queue items and return at once.  Raises RuntimeError once closed."""
        jobs = []
        with self._state:
            if self._closed:
                raise RuntimeError("the rule verifier is closed")

            # Samples of one prompt are often identical: each distinct item is judged once.
            for fields in items:
                # What the rule does not read must not keep equal items apart.
                item = Item(*fields) if self.judge is not None else Item(*fields[:2])
                key = _hash_item(item)
                if key in self._cache:
                    self._cache.move_to_end(key)  # the most recently used verdict is dropped last
                    job = _Job(item, verdict=self._cache[key])
                    job.done.set()
                elif key in self._unfinished:
                    job = self._unfinished[key]
                else:
                    job = self._unfinished[key] = _Job(item)
                    self._queue.append(job)
                jobs.append(job)

            # Start the workers when there is work: a run whose items are all cached needs none.
            if self._queue and not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._state.notify_all()
        return PendingVerdicts(jobs, self._refill_budget)

    def collect(self, pending: Sequence[PendingVerdicts]) -> list[Verdict]:
        """Wait for several submissions and return their verdicts, in the order of the submissions."""
        verdicts: list[Verdict] = []
        for part in pending:
            verdicts += part.result()
        return verdicts

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge items and wait for their verdicts."""
        return self.submit(items).result()

    def check_ready(self, item: Item | None = None) -> None:
        """Judge one item, to detect a rule verifier that does not work before training starts.

        item: one of the run's, for a user's judge, of which any verdict is accepted; the rule judges READY_ITEM.
          Without an item the judge is not tried.

        A caller can `submit` the same item earlier, to start the worker during other work.  Raises ValueError
        if no worker starts, if the verdict does not arrive, and if READY_ITEM is not CORRECT; SetupError for a
        judge that fails on the item.
        """
        if self.judge is None:
            item = READY_ITEM
        elif item is None:
            return
        else:
            typed_config.raise_errors(find_judge_errors(self.judge, item.columns))
        try:
            # The item goes through the same queue and the same limits as all others.
            (verdict,) = self.check([item])
        except RuntimeError as error:
            # Of a traceback, keep only the last line, which names the exception.
            first, *rest = str(error).splitlines()
            message = " ".join([first.removesuffix("Traceback (most recent call last):").strip(), *rest[-1:]])
            raise ValueError(f"the rule verifier does not work: {message}") from error
        if self.judge is not None:
            self._check_judge(verdict)
        elif verdict is not Verdict.CORRECT:
            raise ValueError(
                f"the rule verifier does not work: asked whether 4 equals 4, it says {verdict.value!r} after "
                f"at most {self._timeout} CPU seconds; on a machine that is so slow, raise "
                "--config.rule.timeout; where memory is short, raise --config.rule.memory_mb"
            )

    def _check_judge(self, verdict: Verdict) -> None:
        """Raise SetupError if the user's judge failed on the first item.  verdict: that item's."""
        assert self.judge is not None
        reason = self._judge_error
        if verdict is Verdict.TIMEOUT:
            reason = (
                f"no verdict within {self._timeout} CPU seconds (--config.rule.timeout), or a dead process"
            )
        if reason:
            raise SetupError(f"rule.judge={self.judge.label!r} fails on the first problem: {reason}")

    def close(self) -> None:
        """Kill the workers; may be called again.  Unfinished verdicts raise an error in `result`."""
        with self._state:
            self._closed = True
            self._fail(RuntimeError("the rule verifier was closed before this verdict"))
            self._state.notify_all()
        if self._started:
            for thread in self._threads:
                thread.join()

    def _refill_budget(self) -> None:
        with self._state:
            self._overtime = 0.0

    # --- in the threads, one per worker ---

    def _serve(self) -> None:
        """Work on jobs until the verifier is closed, with one process that is replaced when it fails."""
        worker: Worker | None = None
        try:
            while (next_job := self._take_job()) is not None:
                job, limit = next_job
                answer = Answer(Outcome.DIED)
                error: Exception | None = None
                try:
                    if worker is None:
                        worker = self._start_worker()
                        self._warn_unlimited(worker.unlimited)
                    answer = worker.ask(job.item, limit, self._stall_limit, lambda: self._closed)
                except RuntimeError as cause:
                    error = cause

                # After a failure the process may be gone, short of memory, or still busy with this item.
                self._report_judge_error(answer.error)
                self._finish(job, answer.outcome, answer.spent, error)
                if worker is not None and isinstance(answer.outcome, Outcome):
                    if answer.outcome is not Outcome.TIMEOUT or not worker.is_alive():
                        worker.kill()
                        worker = None
        finally:
            if worker is not None:
                worker.kill()

    def _start_worker(self) -> Worker:
        """Start a process, with a few tries.  Raises WorkerError."""
        for attempt in range(START_TRIES):
            try:
                return Worker(self._command, self._describe_judge())
            except OSError as error:
                cause = error
                with self._state:
                    self._state.wait_for(lambda: self._closed, FIRST_WAIT * 2**attempt)
        raise WorkerError(
            f"the rule verifier cannot start a worker process ({cause}): raise the limits of processes and open "
            "files, or lower --config.rule.workers"
        ) from cause

    def _describe_judge(self) -> dict[str, str] | None:
        """The user's judge as a worker reads it."""
        return None if self.judge is None else dataclasses.asdict(self.judge)

    def _report_judge_error(self, error: str) -> None:
        """Print the first exception of the user's judge; "" prints nothing."""
        if not error:
            return
        with self._state:
            is_first = not self._judge_error
            self._judge_error = self._judge_error or error
        if is_first:
            assert self.judge is not None
            # Each host prints its own: the items are divided over the hosts.
            print(
                f"warning: rule.judge={self.judge.label!r} raised an exception, which counts as an abstention "
                f"(rule/unrecognised); later ones are not printed: {error}",
                file=sys.stderr,
                flush=True,
            )

    def _take_job(self) -> tuple[_Job, float] | None:
        """Wait for the next job: (job, its limit in CPU seconds), or None once the verifier is closed."""
        with self._state:
            while not self._closed:
                if self._queue:
                    has_budget = self._overtime < self._step_budget
                    return self._queue.popleft(), self._timeout if has_budget else SHORT_LIMIT
                self._state.wait()
            return None

    def _finish(self, job: _Job, outcome: str | Outcome, spent: float, error: Exception | None) -> None:
        """Record the outcome of a job.

        Args:
          outcome: the verdict, or the reason why there is none.
          spent: CPU seconds.
          error: the error of a process that did not start, else None.
        """
        with self._state:
            if self._closed:
                return
            if error is not None:
                self._fail(error)  # a process that does not start once will not start for other items
            elif outcome is Outcome.DIED and not job.died:
                # The process may have been killed from outside, or short of memory because of earlier items.
                job.died = True
                self._queue.appendleft(job)
            else:
                self._record(job, outcome)
                if outcome is Outcome.TIMEOUT:
                    self._overtime += spent
            self._state.notify_all()

    def _record(self, job: _Job, outcome: str | Outcome) -> None:
        """Store a job's verdict.  The caller holds `_state`."""
        key = _hash_item(job.item)
        job.verdict = Verdict.TIMEOUT if isinstance(outcome, Outcome) else Verdict(outcome)
        job.done.set()

        # The job is missing if another thread's process failed to start in the meantime.
        self._unfinished.pop(key, None)

        # A stalled process says nothing about its item.
        if outcome is not Outcome.STALLED:
            self._cache[key] = job.verdict
            while len(self._cache) > CACHED_VERDICTS:
                self._cache.popitem(last=False)

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
                "workers run without --config.rule.memory_mb; 0 sets no limit and leaves this line out",
                always=True,
            )

    def _fail(self, error: Exception) -> None:
        """End all jobs that are queued or running with this error.  The caller holds `_state`."""
        for job in self._unfinished.values():
            job.error = error
            job.done.set()
        self._unfinished.clear()
        self._queue.clear()


def _hash_item(item: Item) -> bytes:
    """A 128-bit hash of an item, its key in the cache."""
    # The lengths tell where each part ends: ("1", "23") and ("12", "3") must differ.
    text = f"{len(item.reference)}:{item.reference}{item.completion}"
    if item.question or item.columns:
        columns = json.dumps(dict(item.columns), default=str)
        text = f"{len(item.completion)}:{len(item.question)}:{item.question}{columns}{text}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
