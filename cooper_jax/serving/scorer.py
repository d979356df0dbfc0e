"""Scores for a server: completions of all requests that wait are scored in batches of one size.

Any thread calls `submit` and `cancel`; the device's thread calls `step`, which scores one batch.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cooper_jax.evaluation.evaluated_models import RewardModel
from cooper_jax.serving.chat_engine import QueueFull
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Triple


@dataclasses.dataclass(eq=False)
class ScoreRequest:
    """Completions that a client wants scored together."""

    triples: Sequence[Triple]
    # State of the scorer.
    scores: list[float] = dataclasses.field(default_factory=list)  # of the first triples
    error: str = ""  # the reason why there are no scores
    taken: int = 0  # triples that have been scored, or are in a batch
    cancelled: bool = False


class Scorer:
    """Scores completions as requests arrive."""

    def __init__(self, model: RewardModel, max_waiting: int, deliver: Callable[[list[ScoreRequest]], None]):
        """max_waiting: completions that may wait.  deliver: receives requests that have ended."""
        self.max_waiting = max_waiting
        self._model, self._deliver = model, deliver
        self._lock = threading.Lock()
        self._queue: deque[ScoreRequest] = deque()
        self._failed = False
        self.scored = 0  # for metrics

    @property
    def waiting_completions(self) -> int:
        """Number of completions that have no score yet and are in no batch."""
        return sum(len(request.triples) - request.taken for request in list(self._queue))

    def check_references(self, references: Sequence[str]) -> None:
        """Raise SetupError for a reference that leaves no room for a completion."""
        self._model.check(references)

    def submit(self, request: ScoreRequest) -> None:
        """Queue a request.  Raises QueueFull if too many wait, and RuntimeError after `fail`."""
        with self._lock:
            if self._failed:
                raise RuntimeError("the scorer has failed")
            if self.waiting_completions + len(request.triples) > self.max_waiting:
                raise QueueFull
            self._queue.append(request)

    def cancel(self, request: ScoreRequest) -> None:
        """Drop a request; nothing happens if it has ended."""
        with self._lock:
            request.cancelled = True
            if request in self._queue:
                self._queue.remove(request)

    def fail(self) -> None:
        """Answer all requests with an error, and refuse new ones."""
        with self._lock:
            self._failed = True
            ended = list(self._queue)
            self._queue.clear()
        for request in ended:
            request.error = "the server could not score these completions"
        self._deliver(ended)

    def step(self) -> bool:
        """Score one batch; returns False if no completion waits."""
        with self._lock:
            batch = self._take_batch()
        if not batch:
            return False
        triples = [triple for _, part in batch for triple in part]
        try:
            # A SIGTERM ends the server, whose requests in flight still get their scores.
            scores = self._model.rewards(triples, between_batches=lambda: None).tolist()
        except SetupError as error:
            # Logits that are not finite: a later batch may be sound.
            for request, _ in batch:
                request.error = str(error)
            self._finish([request for request, _ in batch])
            return True

        self.scored += len(scores)
        start = 0
        for request, part in batch:
            request.scores += scores[start : start + len(part)]
            start += len(part)
        self._finish([request for request, _ in batch if len(request.scores) == len(request.triples)])
        return True

    def compile_programs(self) -> Iterator[str]:
        """Run each program that a request may need; yields what is compiled next."""
        return self._model.compile_programs()

    def _take_batch(self) -> list[tuple[ScoreRequest, Sequence[Triple]]]:
        """Take the first completions of the queue, as many as a batch has rows."""
        batch, room = [], self._model.batch_rows
        for request in self._queue:
            part = request.triples[request.taken : request.taken + room]
            if part:
                batch.append((request, part))
                request.taken += len(part)
                room -= len(part)
            if not room:
                break
        return batch

    def _finish(self, requests: list[ScoreRequest]) -> None:
        """Take requests that have ended off the queue, and deliver them."""
        with self._lock:
            requests = [request for request in requests if request in self._queue]
            for request in requests:
                self._queue.remove(request)
        self._deliver(requests)
