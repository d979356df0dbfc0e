"""Negatives by the assistant: a verified solution, rewritten into a plausible wrong one (arXiv 2508.05613).

`fill_with_rewrites` asks for the rewrites of one slot or of several, in one call of the assistant.  If a rewrite is
refused, the next round requests another one with a different random seed.

Departures from the released code: the rule compares a rewrite with the *reference* (there, with the
positive's own answer, and with gold and prediction exchanged), and no requests are made for prompts without
a positive.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cooper_jax.data import prompts
from cooper_jax.llm.chat import Failure, Reply
from cooper_jax.reward.assistants import Assistant, Request
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.pair_checks import REFUSAL_BY_VERDICT, find_text_refusal
from cooper_jax.reward.pairs.pair_slots import PairSlot
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.rule.worker_process import make_item
from cooper_jax.types import Verdict


def fill_with_rewrites(
    slots: Sequence[PairSlot],
    assistant: Assistant,
    rule: RuleVerifier | SharedRule,
    *,
    tries: int,
    length_ratio: float,
    special_tokens: Collection[str],
    seed: int,
    step: int,
) -> int:
    """Fill slots with the assistant's rewrites of their positives, in up to `tries` rounds.

    A slot for which the server did not answer in time is not asked for again.  A slot that is still open at the end
    has the `refusal` of its last round.  Returns the number of requests.

    Args:
      slots: open slots with a positive.
      length_ratio, special_tokens: see find_text_refusal.
    """
    request_count = 0
    for attempt in range(tries):
        slots = [slot for slot in slots if slot.negative is None]
        if not slots:
            break

        # `attempt` is part of the ids, so each round draws other random bits.
        requests = [
            Request(slot.problem, slot.positive, (seed, step, slot.order_row, attempt)) for slot in slots
        ]
        request_count += len(requests)
        replies = assistant.rewrite(requests)
        _check_rewrites(slots, replies, rule, length_ratio, special_tokens)
        # A server that does not answer is not asked again in this step: each time would cost its whole time limit.
        slots = [
            slot
            for slot, reply in zip(slots, replies, strict=True)
            if not (isinstance(reply, Failure) and reply.costs_time)
        ]
    return request_count


def _check_rewrites(
    slots: Sequence[PairSlot],
    replies: Sequence[Reply],
    rule: RuleVerifier | SharedRule,
    length_ratio: float,
    special_tokens: Collection[str],
) -> None:
    """Fill each slot whose reply passes all checks; record the reason of the refusal in the others."""
    # Text checks first: they are cheap and save the rule's worker processes an item.
    candidates: list[tuple[PairSlot, str]] = []
    for slot, reply in zip(slots, replies, strict=True):
        slot.refusal = find_text_refusal(
            slot.positive,
            reply,
            length_ratio,
            question=slot.problem.question,
            special_tokens=special_tokens,
        )
        if not slot.refusal and not isinstance(reply, Failure):
            # Leading and trailing white space must not distinguish the members: copy the positive's.
            candidates.append((slot, prompts.copy_margins(reply.text, slot.positive)))

    # One batch, so that the rule's worker processes judge several rewrites in parallel.
    verdicts = rule.check([make_item(slot.problem, text) for slot, text in candidates])
    for (slot, text), verdict in zip(candidates, verdicts, strict=True):
        if verdict == Verdict.WRONG:
            slot.negative = text
        else:
            slot.refusal = REFUSAL_BY_VERDICT[verdict]
