"""Rewrites that an assistant makes while the devices sample and train.

1. `add_group` takes the responses to one problem as soon as they have been sampled, and returns at once.
2. A thread waits for the rule's verdicts on them, makes the problem's slots, and queues each.
3. `assistant.concurrency` threads take slots from the queue.  Each asks for one rewrite, checks it, and asks again
   until the slot is filled or has had its tries: no slot waits for another.
4. `collect` waits for all slots of the step.

An assistant without `concurrency` is asked for all open slots in one call, once all groups have verdicts, and
again for those whose rewrites were refused.  On several hosts each does all this for the problems whose responses
it judges (SharedRule.owns), and `collect` exchanges the results.

Threads decide the order in which slots are filled, and nothing else: requests are keyed by (seed, step, row,
attempt).
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence

from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.pair_slots import PairSlot, make_prompt_slots
from cooper_jax.reward.pairs.pair_task import PairTask
from cooper_jax.reward.pairs.rewrites import fill_with_rewrites
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.rule.worker_process import make_item
from cooper_jax.runtime import hosts
from cooper_jax.types import Completion, Problem, Verdict


@dataclasses.dataclass(frozen=True)
class Rewrites:
    """The outcome of a step's requests to the assistant."""

    # (index of the prompt, k) -> the row of the positive; the negative's text, or None and the reason of the last
    # refusal.
    by_slot: dict[tuple[int, int], tuple[int, str | None, str]]
    requests: int  # number of requests to the assistant


# Index of the prompt, responses [G], verdicts [G] or None.
_Group = tuple[int, Sequence[Completion], Sequence[Verdict] | None]


class ConcurrentRewrites:
    """The rewrites of one step, in threads.  The task's assistant must have `overlaps`."""

    def __init__(self, task: PairTask):
        """Prepare the threads; nothing is started before the first group."""
        assert task.assistant is not None and task.assistant.overlaps, (
            "it must not run beside device programs"
        )
        self._task, self._assistant = task, task.assistant
        self._rule: RuleVerifier = task.rule.local if isinstance(task.rule, SharedRule) else task.rule
        self._own = [i for i, problem in enumerate(task.problems) if _owns(task.rule, problem)]

        # Groups for the thread that makes slots.
        self._groups: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()  # None: cancelled
        # Slots for the threads that fill them: (index of the prompt, slot); None ends a thread.
        self._open: queue.SimpleQueue[tuple[int, PairSlot] | None] = queue.SimpleQueue()

        # Daemons: an error elsewhere must be able to end the process.
        self._threads = [threading.Thread(target=self._run, args=(self._make_slots,), daemon=True)]
        for _ in range(self._count_fillers()):
            self._threads.append(threading.Thread(target=self._run, args=(self._fill_slots,), daemon=True))
        self._started = False

        self._is_cancelled = threading.Event()

        # Results, under the lock.
        self._lock = threading.Lock()
        self._filled: list[tuple[int, PairSlot]] = []
        self._requests = 0
        self._error: BaseException | None = None

    def add_group(
        self, index: int, completions: Sequence[Completion], verdicts: Sequence[Verdict] | None = None
    ) -> None:
        """Start to make the pairs of one problem.  Each problem is added once.

        Args:
          index: of the prompt in the batch.
          completions: [G].
          verdicts: [G]; None: the rule is asked for them, which knows the items that are judged already.
        """
        if index not in self._own:
            return
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        self._groups.put((index, completions, verdicts))

    def add_groups(self, completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> None:
        """Add all groups of the step, whose verdicts are known.  completions, verdicts: [B * G], prompt-major."""
        group_size = self._task.group_size
        for index in range(len(self._task.problems)):
            rows = slice(index * group_size, (index + 1) * group_size)
            self.add_group(index, completions[rows], verdicts[rows])

    def collect(self) -> Rewrites:
        """Wait for all slots.  All groups must have been added.  Collective.

        Raises the exception that ended a thread, if any.
        """
        if self._started:
            for thread in self._threads:
                thread.join()
        self._assistant.report_failures()
        if self._error is not None:
            raise self._error

        # JSON has no tuples as keys.
        rows = [[index, slot.k, slot.row, slot.negative, slot.refusal] for index, slot in self._filled]
        if isinstance(self._task.rule, SharedRule):
            shared = hosts.exchange_json(f"rewrites/{self._task.step}", [rows, self._requests])
        else:
            shared = [[rows, self._requests]]
        by_slot: dict[tuple[int, int], tuple[int, str | None, str]] = {}
        for host_rows, _ in shared:
            for index, k, *made in host_rows:
                by_slot[index, k] = tuple(made)
        return Rewrites(by_slot, sum(requests for _, requests in shared))

    def cancel(self) -> None:
        """End the threads after the requests that they have sent: nobody will collect."""
        self._is_cancelled.set()
        self._groups.put(None)

    # --- in the threads ---

    def _run(self, work: Callable[[], None]) -> None:
        """Run a thread's work.  Its exception is stored, and all threads end."""
        try:
            # Verdicts are waited for here even if the run is to stop: the step must be completed to be saved.
            with hosts.ignore_stop():
                work()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._end_fillers()

    def _make_slots(self) -> None:
        """Turn groups into open slots, in the order in which they are added."""
        waiting: list[tuple[int, PairSlot]] = []
        for _ in self._own:
            group = self._groups.get()
            if group is None or self._is_cancelled.is_set():
                break
            index, completions, verdicts = group
            if verdicts is None:
                problem = self._task.problems[index]
                items = [make_item(problem, completion.text) for completion in completions]
                verdicts = self._rule.collect([self._rule.submit(items)])
            for slot in make_prompt_slots(self._task, index, completions, verdicts):
                if slot.source == "assistant" and slot.row is not None:
                    waiting.append((index, slot))
            if self._assistant.concurrency is not None:
                for entry in waiting:
                    self._open.put(entry)
                waiting = []

        # What is left is asked for in one call.
        if waiting and not self._is_cancelled.is_set():
            self._fill(waiting)
        self._end_fillers()

    def _fill_slots(self) -> None:
        """Fill one slot after the other."""
        while (entry := self._open.get()) is not None:
            if not self._is_cancelled.is_set():
                self._fill([entry])

    def _fill(self, entries: Sequence[tuple[int, PairSlot]]) -> None:
        task = self._task
        requests = fill_with_rewrites(
            [slot for _, slot in entries],
            self._assistant,
            self._rule,
            tries=task.cfg.tries,
            length_ratio=task.cfg.length_ratio,
            special_tokens=task.special_tokens,
            seed=task.seed,
            step=task.step,
        )
        with self._lock:
            self._filled += entries
            self._requests += requests

    def _count_fillers(self) -> int:
        """The number of threads that fill slots; no more than there can be slots."""
        sources = [source for source, _ in self._task.cfg.list_slot_sources()]
        return min(self._assistant.concurrency or 0, len(self._own) * sources.count("assistant"))

    def _end_fillers(self) -> None:
        for _ in self._threads[1:]:
            self._open.put(None)


def _owns(rule: RuleVerifier | SharedRule, problem: Problem) -> bool:
    """True if this host makes the pairs of a problem."""
    return rule.owns(problem) if isinstance(rule, SharedRule) else True
