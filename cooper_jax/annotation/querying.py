"""A language model is asked about many items; each reply is kept as it comes.

1. A server is asked about as many items at a time as it may (`concurrency`), and each reply is handed on when it
   is there.  Weights of our own answer in batches, cut from the whole list on a fixed grid: a batch of which a kill
   left some is sampled again as a whole, so its tokens do not depend on kills.
2. What failed is asked once more at the end where it may well pass (a timeout, a full server) or where the server
   refused it, then kept as a failure.
3. A server that cannot be reached, or that fails or refuses many requests in a row, ends the stage with an error:
   nothing is kept of those requests.
4. After a SIGTERM no new request is sent; those under way are answered and kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence

from tqdm import tqdm

from cooper_jax.annotation.items import Item
from cooper_jax.llm.chat import Chat, Failure, Ids, Messages, Reply
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError

PATIENCE = 8  # requests in a row that a server which is not there may leave unanswered ...
LONG_PATIENCE = 64  # ... and that one may which is there, and fails
EVERY = 30.0  # seconds between two lines of progress where there is no terminal

Answer = tuple[Item, Reply]


class Stage:
    """Asks `chat`, the model of the config's section `name`, about items.

    Args:
      talk: item -> the conversation.
      keep: is given replies as they come, to be written down.
      batch: items that weights of our own answer together.
    """

    def __init__(
        self,
        chat: Chat,
        name: str,
        seed: int,
        batch: int,
        talk: Callable[[Item], Messages],
        keep: Callable[[Sequence[Answer]], None],
    ):
        self._chat, self._name, self._seed, self._batch = chat, name, seed, batch
        self._talk, self._keep = talk, keep

    def run(self, items: Sequence[Item], done: Container[str], bar: Progress) -> None:
        """Ask about the items that are not `done`, a live view of what was kept.

        Raises SetupError for a server that cannot be reached, and hosts.Stopped after a SIGTERM.
        """
        lost = None  # a request of the last pass that found no server
        for last in (False, True):
            left = sum(item.id not in done for item in items)
            if not left:
                return
            patience = min(PATIENCE, left)
            silent = failing = 0
            for answers in self._answers(items, done):
                kept = []
                for item, reply in answers:
                    fails = isinstance(reply, Failure)
                    silent = silent + 1 if fails and reply.unreachable else 0
                    refused = fails and (reply.transient or reply.reason.startswith("http_"))
                    failing = failing + 1 if refused else 0
                    # In the last pass only what failed before is left: failures in a row say nothing new.
                    if silent >= patience or (failing >= LONG_PATIENCE and not last):
                        self._give_up(reply, max(silent, failing))
                    if not (fails and reply.unreachable) and (last or not refused):
                        kept.append((item, reply))
                    elif last:
                        lost = reply
                self._keep(kept)
                bar.add(len(kept))
            hosts.raise_if_stopping()
        if lost is not None:
            self._give_up(lost, 1)

    def _give_up(self, reply: Failure, count: int) -> None:
        raise SetupError(
            f"{self._name}: {getattr(self._chat, 'address', 'the model')} left {count} requests in a row "
            f"unanswered ({reply.reason}): see to the server, to --config.{self._name}.url and .model, and to the "
            "key in the variable .key_env; what was answered is kept, and the same command goes on"
        )

    def _answers(self, items: Sequence[Item], done: Container[str]) -> Iterator[list[Answer]]:
        if not self._chat.overlaps:
            yield from self._batches(items, done)
            return
        asked: list[Item] = []

        def requests() -> Iterator[tuple[Messages, Ids]]:
            for item in items:
                if item.id in done:
                    continue
                if _stopping():
                    return
                asked.append(item)
                yield self._talk(item), self._ids(item)

        for place, reply in self._chat.stream(requests()):
            yield [(asked[place], reply)]

    def _batches(self, items: Sequence[Item], done: Container[str]) -> Iterator[list[Answer]]:
        for start in range(0, len(items), self._batch):
            members = items[start : start + self._batch]
            if all(item.id in done for item in members):
                continue
            hosts.raise_if_stopping()
            replies = self._chat.ask([self._talk(i) for i in members], [self._ids(i) for i in members])
            yield [(i, r) for i, r in zip(members, replies, strict=True) if i.id not in done]

    def _ids(self, item: Item) -> Ids:
        return self._seed, 0, item.number, 0


def _stopping() -> bool:
    try:
        hosts.raise_if_stopping()
    except hosts.Stopped:
        return True
    return False


class Progress:
    """How far a stage is: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, what: str, total: int, done: int):
        self._what, self._total, self._done = what, total, done
        self._start, self._said, self._first = time.monotonic(), time.monotonic(), done
        self._bar = None
        if sys.stdout.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit="row", file=sys.stdout)
        else:
            hosts.print_once(f"{what}: {done} of {total} are there")

    def add(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            pace = (self._done - self._first) / (self._said - self._start)
            hosts.print_once(f"{self._what}: {self._done} of {self._total}, {pace:.1f} a second")

    def close(self) -> None:
        seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._first:
            hosts.print_once(f"{self._what}: {self._done} of {self._total} after {seconds:.0f} s")
