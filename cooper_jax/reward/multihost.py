"""The rule verifier and a remote assistant on several hosts: each does a part, and all get every result.

1. Each item to judge is assigned to a host by a hash of its text, so that an item that occurs again goes to
   the host that has its verdict in the cache.  Rewrite requests are assigned by their index.
2. Each host works on its own items.
3. The hosts exchange their results as JSON.  This is a collective operation: all hosts must call it, in the
   same order.

With one process, `share_over_hosts` returns its arguments and none of these classes is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from cooper_jax.reward.assistants import Assistant, Failure, Reply, Request
from cooper_jax.rule.verifier import Item, PendingVerdicts, RuleConfig, RuleVerifier
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.settings.user_code import UserCode
from cooper_jax.types import Completion, Verdict


def _hash_texts(*texts: str) -> int:
    """A 128-bit hash that is the same on every host, unlike Python's `hash`, which is salted per process."""
    # The lengths keep ("ab", "c") apart from ("a", "bc").
    joined = "\0".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=16).digest(), "big")


class SharedPendingVerdicts:
    """Verdicts that are being computed on this host and on the others."""

    def __init__(self, items: Sequence[Item], own: list[int], pending: Sequence[PendingVerdicts]):
        """Wrap a submission.

        Args:
          items: all items of the submission, the same on every host.
          own: indices of the items that this host judges.
          pending: this host's verdicts, in the order of `own`.
        """
        self._items = items
        self._own = own
        self._pending = pending
        self._verdicts: list[Verdict] | None = None

    def result(self) -> list[Verdict]:
        """Wait for all verdicts, in the order of the items.  Collective: all hosts must call this."""
        # Later calls return the stored verdicts and exchange nothing.
        if self._verdicts is not None:
            return self._verdicts

        own_verdicts: list[Verdict] = []
        for part in self._pending:
            own_verdicts += part.result()

        # The exchange is named by a hash of the items, so hosts with different items cannot mix their
        # results.
        texts: list[str] = []
        for item in self._items:
            texts += item[:3]  # reference, completion, question
        name = f"verdicts/{_hash_texts(*texts):x}"

        # JSON turns the keys, item indices, into strings.
        own = dict(zip(self._own, own_verdicts, strict=True))
        verdict_of: dict[str, str] = {}
        for verdicts in hosts.exchange_json(name, own):
            verdict_of |= verdicts
        self._verdicts = [Verdict(verdict_of[str(i)]) for i in range(len(self._items))]
        return self._verdicts

    @classmethod
    def join(cls, parts: Sequence[SharedPendingVerdicts]) -> SharedPendingVerdicts:
        """Concatenate submissions, so that one exchange serves all of them."""
        items: list[Item] = []
        own: list[int] = []
        pending: list[PendingVerdicts] = []
        for part in parts:
            # Indices within the part become indices within the concatenated items.
            own += [len(items) + i for i in part._own]
            items += part._items
            pending += part._pending
        return cls(items, own, pending)


class SharedRule:
    """A rule verifier that divides its items over the hosts; its methods are those of RuleVerifier."""

    def __init__(self, local: RuleVerifier):
        self._local = local

    def submit(self, items: Sequence[Item]) -> SharedPendingVerdicts:
        """Start to judge items and return at once; nothing is exchanged yet."""
        # By reference and completion: equal ones have one verdict, whatever the question.
        own = [i for i, item in enumerate(items) if hosts.is_assigned(_hash_texts(*item[:2]))]
        return SharedPendingVerdicts(items, own, [self._local.submit([items[i] for i in own])])

    def collect(self, pending: Sequence[SharedPendingVerdicts]) -> list[Verdict]:
        """Wait for several submissions; their verdicts, in order.  Collective: the same ones on all hosts."""
        return SharedPendingVerdicts.join(pending).result()

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge items and wait for the verdicts.  Collective: the same items on all hosts."""
        return self.submit(items).result()


class SharedAssistant:
    """An assistant that divides its requests over the hosts, for assistants on a server."""

    overlaps = True

    def __init__(self, local: Assistant):
        self._local = local

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in their order.  Collective: the same requests on all hosts."""
        own = [i for i in range(len(requests)) if hosts.is_assigned(i)]
        own_replies = self._local.rewrite([requests[i] for i in own])
        encoded = {i: _encode_reply(reply) for i, reply in zip(own, own_replies, strict=True)}

        # Ids contain step and attempt, so each round of requests has an exchange of its own.
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
    """Wrap rule verifier and assistant for a run of `processes` processes; with one, return them unchanged.

    An assistant on our own devices is already a multi-host program that all hosts call, so it is not wrapped.
    """
    if processes == 1:
        return rule, assistant
    # `overlaps` is True for assistants on a server and for those that compute on the host.
    if assistant is not None and assistant.overlaps:
        assistant = SharedAssistant(assistant)
    return SharedRule(rule), assistant


def check_same_code(codes: Sequence[UserCode | None]) -> None:
    """Check that all hosts have read the same text of each file of the user's.  Collective.

    codes: those in use; None for a setting that names none.

    Raises SetupError on all hosts, with the file's path and the hosts that differ from the first.
    """
    # By the flags' order, not by path: hosts may have the file in different folders.
    used = [code for code in codes if code is not None]
    if not used:
        return
    digests = hosts.exchange_json("user code", [code.digest for code in used])
    messages = []
    for i, code in enumerate(used):
        if others := [str(host) for host, own in enumerate(digests) if own[i] != digests[0][i]]:
            messages.append(
                f"{code.path}: process {', '.join(others)} has read another text than process 0: copy one file "
                "to all hosts"
            )
    if messages:
        raise SetupError(*dict.fromkeys(messages))


@contextlib.contextmanager
def open_rule_verifier(cfg: ConfigDict) -> Iterator[RuleVerifier | SharedRule]:
    """Start the rule verifier's processes, on each host for its share of the work; they end on exit.

    Raises SetupError for settings out of range and for a verifier that does not answer.
    """
    with setup_errors("rule"):
        rule = RuleVerifier(RuleConfig.from_config(cfg.rule))
        check_same_code([rule.judge])
    with rule:
        with setup_errors("rule"):
            rule.check_ready()
        yield share_over_hosts(rule, None, jax.process_count())[0]
