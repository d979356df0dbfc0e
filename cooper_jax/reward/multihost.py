"""The rule verifier on several hosts: each judges a part of the items, and all get every verdict.

1. Each problem is assigned to a host by a hash of its text.  That host judges all responses to it and asks the
   assistant for its rewrites (pairs/concurrent_rewrites.py), so that neither waits for another host.
2. The hosts exchange their verdicts as JSON.  This is a collective operation: all hosts must call it, in the
   same order.

With one process, `share_over_hosts` returns its argument and none of these classes is used.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from cooper_jax.rule.verifier import Item, PendingVerdicts, RuleConfig, RuleVerifier
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.settings.user_code import UserCode
from cooper_jax.types import Problem, Verdict


def _hash_texts(*texts: str) -> int:
    """A 128-bit hash that is the same on every host, unlike Python's `hash`, which is salted per process."""
    # The lengths keep ("ab", "c") apart from ("a", "bc").
    joined = "\0".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=16).digest(), "big")


def _is_assigned(reference: str, question: str) -> bool:
    """Tell whether the responses to this problem are this host's to judge."""
    return hosts.is_assigned(_hash_texts(reference, question))


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
    """A rule verifier that divides the problems over the hosts; its other methods are those of RuleVerifier."""

    def __init__(self, local: RuleVerifier):
        """local: the rule verifier of this host alone."""
        self.local = local

    def owns(self, problem: Problem) -> bool:
        """True if this host judges the responses to a problem."""
        return _is_assigned(problem.reference, problem.question)

    def submit(self, items: Sequence[Item]) -> SharedPendingVerdicts:
        """Start to judge items and return at once; nothing is exchanged yet."""
        own = [i for i, item in enumerate(items) if _is_assigned(item.reference, item.question)]
        return SharedPendingVerdicts(items, own, [self.local.submit([items[i] for i in own])])

    def collect(self, pending: Sequence[SharedPendingVerdicts]) -> list[Verdict]:
        """Wait for several submissions; their verdicts, in order.  Collective: the same ones on all hosts."""
        return SharedPendingVerdicts.join(pending).result()

    def check(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge items and wait for the verdicts.  Collective: the same items on all hosts."""
        return self.submit(items).result()


def share_over_hosts(rule: RuleVerifier, processes: int) -> RuleVerifier | SharedRule:
    """Wrap the rule verifier for a run of `processes` processes; with one, return it unchanged."""
    return rule if processes == 1 else SharedRule(rule)


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
        yield share_over_hosts(rule, jax.process_count())
