"""Requests to a language model about many items; each reply is kept as soon as it arrives.

1. A server works on up to `concurrency` requests at a time, and each reply is stored as it arrives.  A local
   model answers in batches, which are fixed parts of the whole list: a batch that SIGKILL left incomplete is
   sampled again as a whole, so its tokens do not depend on interruptions.
2. A request is repeated once at the end if it may succeed then (a timeout, a full server) or if the server
   refused it; after that it is stored as a failure.
3. A server that cannot be reached, or that fails or refuses many requests in a row, ends the stage with an
   error.  Nothing of those requests is stored.
4. After SIGTERM no new request is sent; the replies to requests in progress are stored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Protocol, cast

from cooper_jax.annotation.items import Item
from cooper_jax.llm.chat import Chat, Failure, Ids, Messages, Reply
from cooper_jax.runtime import hosts
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.settings.setup_errors import SetupError

UNREACHABLE_LIMIT = 8  # consecutive requests that an unreachable server may leave unanswered
FAILURE_LIMIT = 64  # consecutive requests that a reachable server may fail or refuse
PROGRESS_SECONDS = 30.0  # between two lines of progress, without a terminal

Answer = tuple[Item, Reply]


class StreamingChat(Protocol):
    """A chat whose requests overlap; its replies come in the order of their arrival."""

    def stream(self, requests: Iterable[tuple[Messages, Ids]]) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the request, its reply)."""


class Stage:
    """The requests to one language model about items.

    Args:
      chat: the model.
      name: the model's section of the config, for messages.
      seed: decides, together with the item's id, the random bits of a reply.
      batch: items that a local model answers together.
      make_messages: item -> the conversation.
      keep_answers: called with replies as they arrive, to store them.
    """

    def __init__(
        self,
        chat: Chat,
        name: str,
        seed: int,
        batch: int,
        make_messages: Callable[[Item], Messages],
        keep_answers: Callable[[Sequence[Answer]], None],
    ):
        self._chat, self._name, self._seed, self._batch = chat, name, seed, batch
        self._make_messages, self._keep_answers = make_messages, keep_answers

    def run(self, items: Sequence[Item], done: Container[str], bar: Progress) -> None:
        """Ask about the items that are not done.

        Args:
          items: all items of the stage, in a fixed order.
          done: ids of items that have an answer; `keep_answers` adds to it.
          bar: counts the answers.

        Raises SetupError for a server that cannot be reached, and hosts.Stopped after SIGTERM.
        """
        unreachable: Failure | None = None  # a reply of the last pass that reached no server
        for last_pass in (False, True):
            remaining = sum(item.id not in done for item in items)
            if not remaining:
                return
            # With few items left, all of them unreachable is enough to give up.
            limit = min(UNREACHABLE_LIMIT, remaining)
            unreachable = self._run_pass(items, done, bar, limit, last_pass)
            hosts.raise_if_stopping()

        # Single unreachable replies among answered ones stay below the limit; their items are not answered.
        if unreachable is not None:
            self._give_up(unreachable, 1)

    def _run_pass(
        self, items: Sequence[Item], done: Container[str], bar: Progress, limit: int, last_pass: bool
    ) -> Failure | None:
        """Ask once about each item that is not done.

        Args:
          limit: the number of consecutive unreachable replies that ends the stage.
          last_pass: True if failures are stored rather than repeated.

        Returns, in the last pass, a reply that reached no server, or None if all reached it.
        """
        # Both counters start again at every answer.
        unreachable: Failure | None = None
        consecutive_unreachable = consecutive_failures = 0
        for answers in self._ask(items, done):
            kept: list[Answer] = []
            for item, reply in answers:
                if not isinstance(reply, Failure):
                    consecutive_unreachable = consecutive_failures = 0
                    kept.append((item, reply))
                    continue

                # Only failures of the server are counted, not those of the request itself (such as a prompt
                # that is too long).
                repeatable = reply.transient or reply.reason.startswith("http_")
                consecutive_unreachable = consecutive_unreachable + 1 if reply.unreachable else 0
                consecutive_failures = consecutive_failures + 1 if repeatable else 0
                # The last pass consists of earlier failures, so many in a row are to be expected there.
                too_many = consecutive_failures >= FAILURE_LIMIT and not last_pass
                if consecutive_unreachable >= limit or too_many:
                    self._give_up(reply, max(consecutive_unreachable, consecutive_failures))

                # What may succeed later is not stored in the first pass; unreachable replies never are.
                if not reply.unreachable and (last_pass or not repeatable):
                    kept.append((item, reply))
                elif last_pass:
                    unreachable = reply
            self._keep_answers(kept)
            bar.add(len(kept))
        return unreachable

    def _give_up(self, reply: Failure, count: int) -> None:
        """Raise SetupError for `count` unanswered requests in a row, of which `reply` is the last."""
        said = getattr(self._chat, "server_words", {}).get(reply.reason, "")
        reason = f"{reply.reason}: {said}" if said else reply.reason
        raise SetupError(
            f"{self._name}: {getattr(self._chat, 'address', 'the model')} left {count} requests in a row "
            f"unanswered ({reason}): check the server, --config.{self._name}.url, .model and .fields, and the "
            "key in the environment variable .key_env; answers so far are kept, and the same command resumes"
        )

    def _ask(self, items: Sequence[Item], done: Container[str]) -> Iterator[list[Answer]]:
        """Yield answers as they arrive, one or a batch at a time."""
        if not self._chat.overlaps:
            yield from self._ask_batches(items, done)
            return
        chat = cast(StreamingChat, self._chat)  # only servers overlap requests, and all of them stream
        asked: list[Item] = []  # in the order of the requests

        def make_requests() -> Iterator[tuple[Messages, Ids]]:
            for item in items:
                if item.id in done:
                    continue
                # Without further requests, `stream` ends after the replies in progress have arrived.
                if _is_stopping():
                    return
                asked.append(item)
                yield self._make_messages(item), self._make_ids(item)

        for index, reply in chat.stream(make_requests()):
            yield [(asked[index], reply)]

    def _ask_batches(self, items: Sequence[Item], done: Container[str]) -> Iterator[list[Answer]]:
        """Yield the answers of a local model, a batch at a time."""
        for start in range(0, len(items), self._batch):
            members = items[start : start + self._batch]
            if all(item.id in done for item in members):
                continue
            hosts.raise_if_stopping()
            # The whole batch is sampled even if some items are done: its shapes and tokens stay the same, and
            # no other program is compiled.
            conversations = [self._make_messages(item) for item in members]
            replies = self._chat.ask(conversations, [self._make_ids(item) for item in members])
            answers = zip(members, replies, strict=True)
            yield [(item, reply) for item, reply in answers if item.id not in done]

    def _make_ids(self, item: Item) -> Ids:
        """The ids (seed, step, row, attempt) that decide the random bits of an item's reply."""
        return self._seed, 0, item.number, 0


def _is_stopping() -> bool:
    """True after SIGTERM."""
    try:
        hosts.raise_if_stopping()
    except hosts.Stopped:
        return True
    return False


class Progress:
    """Progress of a stage: on the live line of a terminal, elsewhere a line every PROGRESS_SECONDS."""

    def __init__(self, title: str, total: int, done: int):
        """Begin the display.

        Args:
          title: shown before the counts.
          total: rows of the stage.
          done: rows that were done before this start; the rate does not count them.
        """
        self._title, self._total, self._done, self._done_before = title, total, done, done
        self._start = self._last_line = time.monotonic()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(CONSOLE.open_activity(title))
        CONSOLE.set_status("", done, total)
        CONSOLE.print_unless_live(f"{title}: {done} of {total} are done")

    def add(self, count: int) -> None:
        """Count further rows that are done."""
        self._done += count
        now = time.monotonic()
        rate = (self._done - self._done_before) / (now - self._start)
        CONSOLE.set_status(f"{self._done} of {self._total}, {rate:.1f} per second", self._done, self._total)
        if now - self._last_line >= PROGRESS_SECONDS:
            self._last_line = now
            CONSOLE.print_unless_live(f"{self._title}: {self._done} of {self._total}, {rate:.1f} per second")

    def close(self) -> None:
        """End the display with a line."""
        seconds = time.monotonic() - self._start
        self._stack.close()
        CONSOLE.set_status("")
        if self._done > self._done_before:
            CONSOLE.print_line(f"{self._title}: {self._done} of {self._total} after {seconds:.0f} s")
