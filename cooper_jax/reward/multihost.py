"""The rule and a remote assistant over several hosts: each does its part, and all learn every answer.

Who works on what depends on the item alone, so that an item which has been judged once is known where it is asked
for again.  With one process nothing of this is in the way (`over_hosts`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from cooper_jax.reward.assistants import Assistant, Failure, Reply, Request
from cooper_jax.rule.verifier import Item, PendingVerdicts, RuleVerifier
from cooper_jax.runtime import hosts
from cooper_jax.types import Completion, Verdict


def _digest(*parts: str) -> int:
    """A number that is the same on every host."""
    text = "\0".join(f"{len(p)}:{p}" for p in parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")


class SharedPendingVerdicts:
    """Verdicts on their way, on this host and on others."""

    def __init__(self, items: Sequence[Item], own: list[int], pending: Sequence[PendingVerdicts]):
        """own: indices of the items that this host judges; pending: their verdicts, in that order, in parts."""
        self._items, self._own, self._pending = items, own, pending
        self._verdicts: list[Verdict] | None = None

    def result(self) -> list[Verdict]:
        """As `Pending.result`, on every host the same; all hosts must ask."""
        if self._verdicts is None:
            judged = []
            for part in self._pending:
                judged += part.result()
            own = dict(zip(self._own, judged, strict=True))
            name = f"verdicts/{_digest(*(text for item in self._items for text in item)):x}"
            found: dict[str, str] = {}
            for part in hosts.exchange_json(name, own):
                found |= part
            self._verdicts = [Verdict(found[str(i)]) for i in range(len(self._items))]
        return self._verdicts

    @classmethod
    def join(cls, parts: Sequence[SharedPendingVerdicts]) -> SharedPendingVerdicts:
        """Several submissions as one, in their order: hosts then exchange their verdicts once, not once a part."""
        items: list[Item] = []
        own: list[int] = []
        pending: list[PendingVerdicts] = []
        for part in parts:
            own += [len(items) + i for i in part._own]
            items += part._items
            pending += part._pending
        return cls(items, own, pending)


class SharedRule:
    """A RuleVerifier on each host, each for its part of the pairs; otherwise like one."""

    def __init__(self, local: RuleVerifier):
        self._local = local

    def submit(self, items: Sequence[Item]) -> SharedPendingVerdicts:
        """As `RuleVerifier.submit`; without a call of `result` nothing is exchanged."""
        own = [i for i, item in enumerate(items) if hosts.is_assigned(_digest(*item))]
        return SharedPendingVerdicts(items, own, [self._local.submit([items[i] for i in own])])

    def collect(self, pending: Sequence[SharedPendingVerdicts]) -> list[Verdict]:
        """As `RuleVerifier.collect`; all hosts must ask, for the same submissions in the same order."""
        return SharedPendingVerdicts.join(pending).result()

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        return self.submit(items).result()


class SharedAssistant:
    """An assistant on a server, asked by each host for its part of the rewrites; otherwise like it."""

    overlaps = True

    def __init__(self, local: Assistant):
        self._local = local

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        own = [i for i in range(len(requests)) if hosts.is_assigned(i)]
        replies = self._local.rewrite([requests[i] for i in own])
        said = {
            i: {"failure": r.reason} if isinstance(r, Failure) else dataclasses.asdict(r)
            for i, r in zip(own, replies, strict=True)
        }
        found: dict[str, dict] = {}
        for part in hosts.exchange_json(f"replies/{_digest(*(str(r.ids) for r in requests)):x}", said):
            found |= part
        answers = (found[str(i)] for i in range(len(requests)))
        return [Failure(a["failure"]) if "failure" in a else Completion(**a) for a in answers]

    def close(self) -> None:
        self._local.close()


def share_over_hosts(
    rule: RuleVerifier, assistant: Assistant | None, processes: int
) -> tuple[RuleVerifier | SharedRule, Assistant | None]:
    """Rule and assistant for a run of so many processes.

    An assistant on our own devices is one program of all hosts, and stays as it is.
    """
    if processes == 1:
        return rule, assistant
    if assistant is not None and assistant.overlaps:
        assistant = SharedAssistant(assistant)
    return SharedRule(rule), assistant
