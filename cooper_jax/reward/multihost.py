"""The rule verifier and a remote assistant on several hosts: each host does a part, and all get every result.

1. An item is assigned to a host by its content alone, so the host that judged it before has its verdict at
   hand when it occurs again.
2. Each host works on its own items.
3. `result` exchanges the results as JSON between the hosts; all hosts must call it, in the same order.

A run of one process uses neither class (`share_over_hosts`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from cooper_jax.reward.assistants import Assistant, Failure, Reply, Request
from cooper_jax.rule.verifier import Item, PendingVerdicts, RuleVerifier
from cooper_jax.runtime import hosts
from cooper_jax.types import Completion, Verdict


def _hash_texts(*texts: str) -> int:
    """A 128-bit number that is the same on every host, unlike Python's own hash."""
    joined = "\0".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=16).digest(), "big")


class SharedPendingVerdicts:
    """Verdicts that are being computed on this host and on others."""

    def __init__(self, items: Sequence[Item], own: list[int], pending: Sequence[PendingVerdicts]):
        """own: indices of the items that this host judges; pending: their verdicts, in that order."""
        self._items = items
        self._own = own
        self._pending = pending
        self._verdicts: list[Verdict] | None = None

    def result(self) -> list[Verdict]:
        """All verdicts in the order of the items, the same on every host.  All hosts must call this."""
        if self._verdicts is None:
            own_verdicts: list[Verdict] = []
            for part in self._pending:
                own_verdicts += part.result()

            # The name of the exchange is a hash of the items: hosts that disagree on them do not mix results.
            texts: list[str] = []
            for item in self._items:
                texts += item
            name = f"verdicts/{_hash_texts(*texts):x}"
            own = dict(zip(self._own, own_verdicts, strict=True))
            verdict_of: dict[str, str] = {}
            for verdicts in hosts.exchange_json(name, own):
                verdict_of |= verdicts
            self._verdicts = [Verdict(verdict_of[str(i)]) for i in range(len(self._items))]
        return self._verdicts

    @classmethod
    def join(cls, parts: Sequence[SharedPendingVerdicts]) -> SharedPendingVerdicts:
        """Several submissions as one, in their order: hosts then exchange verdicts once, not once a part."""
        items: list[Item] = []
        own: list[int] = []
        pending: list[PendingVerdicts] = []
        for part in parts:
            own += [len(items) + i for i in part._own]
            items += part._items
            pending += part._pending
        return cls(items, own, pending)


class SharedRule:
    """A RuleVerifier on each host, each for its part of the items, with the same methods."""

    def __init__(self, local: RuleVerifier):
        self._local = local

    def submit(self, items: Sequence[Item]) -> SharedPendingVerdicts:
        """Start to judge (reference, completion text) items and return at once; nothing is exchanged yet."""
        own = [i for i, item in enumerate(items) if hosts.is_assigned(_hash_texts(*item))]
        return SharedPendingVerdicts(items, own, [self._local.submit([items[i] for i in own])])

    def collect(self, pending: Sequence[SharedPendingVerdicts]) -> list[Verdict]:
        """The verdicts of several submissions, in order.  All hosts must call this with the same ones."""
        return SharedPendingVerdicts.join(pending).result()

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge items and wait for the verdicts.  All hosts must call this with the same items."""
        return self.submit(items).result()


class SharedAssistant:
    """An assistant on a server, asked by each host for its part of the rewrites, with the same methods."""

    overlaps = True

    def __init__(self, local: Assistant):
        self._local = local

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in their order.  All hosts must call this with the same requests."""
        own = [i for i in range(len(requests)) if hosts.is_assigned(i)]
        own_replies = self._local.rewrite([requests[i] for i in own])
        encoded = {i: _encode_reply(reply) for i, reply in zip(own, own_replies, strict=True)}

        reply_of: dict[str, dict] = {}
        name = f"replies/{_hash_texts(*(str(request.ids) for request in requests)):x}"
        for replies in hosts.exchange_json(name, encoded):
            reply_of |= replies
        return [_decode_reply(reply_of[str(i)]) for i in range(len(requests))]

    def close(self) -> None:
        self._local.close()


def _encode_reply(reply: Reply) -> dict:
    if isinstance(reply, Failure):
        return {"failure": reply.reason}
    return dataclasses.asdict(reply)


def _decode_reply(encoded: dict) -> Reply:
    if "failure" in encoded:
        return Failure(encoded["failure"])
    return Completion(**encoded)


def share_over_hosts(
    rule: RuleVerifier, assistant: Assistant | None, processes: int
) -> tuple[RuleVerifier | SharedRule, Assistant | None]:
    """Rule verifier and assistant for a run of so many processes; unchanged for one.

    An assistant on our own devices runs as one program of all hosts, and stays as it is.
    """
    if processes == 1:
        return rule, assistant
    if assistant is not None and assistant.overlaps:
        assistant = SharedAssistant(assistant)
    return SharedRule(rule), assistant
