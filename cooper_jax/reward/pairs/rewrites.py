"""Negatives by the assistant: a verified solution, rewritten into a plausible wrong one (arXiv 2508.05613).

All open slots are asked in one batch; those whose rewrite is refused are asked again, with other random bits.

Departures from the released code: the rule compares a rewrite with the *reference* (there: with the
positive's own answer, gold and prediction exchanged), and the assistant is not asked about prompts without a
positive.
"""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.data import prompts
from cooper_jax.llm.chat import Failure, Reply
from cooper_jax.reward.assistants import Assistant, Request
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.pair_checks import REFUSAL_BY_VERDICT, find_text_refusal
from cooper_jax.reward.pairs.pair_slots import PairSlot
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.types import Verdict


def fill_with_rewrites(
    slots: Sequence[PairSlot],
    assistant: Assistant,
    rule: RuleVerifier | SharedRule,
    *,
    tries: int,
    length_ratio: float,
    seed: int,
    step: int,
) -> int:
    """Fill slots with the assistant's rewrites of their positives, in up to `tries` rounds.

    A slot that stays open holds the reason of its last round.  Returns the number of requests made.
    """
    requests = 0
    for attempt in range(tries):
        slots = [slot for slot in slots if slot.negative is None]
        if not slots:
            break
        asked = [
            Request(slot.problem, slot.positive, (seed, step, slot.order_row, attempt)) for slot in slots
        ]
        requests += len(asked)
        _check_rewrites(slots, assistant.rewrite(asked), rule, length_ratio)
    return requests


def _check_rewrites(
    slots: Sequence[PairSlot],
    replies: Sequence[Reply],
    rule: RuleVerifier | SharedRule,
    length_ratio: float,
) -> None:
    """Fill each slot whose reply passes all checks; give the others the reason."""
    candidates: list[tuple[PairSlot, str]] = []
    for slot, reply in zip(slots, replies, strict=True):
        slot.refusal = find_text_refusal(slot.positive, reply, length_ratio)
        if not slot.refusal and not isinstance(reply, Failure):
            # The members must render alike but for their text, so the rewrite takes the positive's outer
            # white space.
            candidates.append((slot, prompts.copy_margins(reply.text, slot.positive)))

    verdicts = rule.check([(slot.problem.reference, text) for slot, text in candidates])
    for (slot, text), verdict in zip(candidates, verdicts, strict=True):
        if verdict == Verdict.WRONG:
            slot.negative = text
        else:
            slot.refusal = REFUSAL_BY_VERDICT[verdict]
