"""Negatives by the assistant: a verified solution, rewritten into a plausible wrong one (arXiv 2508.05613).

`fill_with_rewrites` asks for the rewrites of one slot or of several, in one call of the assistant.  If a rewrite is
refused, the next round requests another one with a different random seed.  A local assistant, which decodes several
rows in little more time than one, is asked for several attempts of a slot in one round; the first that passes is
taken.

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

# A local assistant gets so many rows in a call by further attempts.  Few rows hardly take longer than one: decoding
# reads all weights for each token, and attempts share the prefill of their conversation.
LOCAL_ROWS = 16


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
    """Fill slots with the assistant's rewrites of their positives, in up to `tries` attempts.

    A slot for which the server did not answer in time is not asked for again.  A slot that is still open at the end
    has the `refusal` of its last attempt.  Returns the number of requests.

    Args:
      slots: open slots with a positive.
      length_ratio, special_tokens: see find_text_refusal.
    """
    request_count = 0
    attempt = 0
    while attempt < tries:
        slots = [slot for slot in slots if slot.negative is None]
        if not slots:
            break

        # `attempt` is part of the ids, so each attempt draws other random bits.
        at_once = 1 if assistant.overlaps else _choose_attempts(len(slots), tries - attempt)
        requests = [
            Request(slot.problem, slot.positive, (seed, step, slot.order_row, attempt + i))
            for slot in slots
            for i in range(at_once)
        ]
        attempt += at_once
        request_count += len(requests)
        replies = assistant.rewrite(requests)
        by_slot = [replies[i : i + at_once] for i in range(0, len(replies), at_once)]
        _check_rewrites(slots, by_slot, rule, length_ratio, special_tokens)
        # A server that does not answer is not asked again in this step: each time would cost its whole time limit.
        slots = [
            slot
            for slot, attempts in zip(slots, by_slot, strict=True)
            if not any(isinstance(reply, Failure) and reply.costs_time for reply in attempts)
        ]
    return request_count


def _choose_attempts(slots: int, left: int) -> int:
    """Choose how many attempts of each slot a local assistant gets in one round, of those that are left.

    Powers of two, since each number is a program of the rollout.
    """
    attempts = 1
    while attempts * 2 <= left and slots * attempts * 2 <= LOCAL_ROWS:
        attempts *= 2
    return attempts


def _check_rewrites(
    slots: Sequence[PairSlot],
    replies: Sequence[Sequence[Reply]],
    rule: RuleVerifier | SharedRule,
    length_ratio: float,
    special_tokens: Collection[str],
) -> None:
    """Fill each slot with the first of its replies that passes all checks; else record why its last one failed.

    replies: of each slot, in the order of its attempts.
    """
    # Text checks first: they are cheap and save the rule's worker processes an item.
    refusals: list[list[str]] = []  # for each reply; "": none
    texts: list[list[str]] = []
    candidates = []  # indices of slot and reply
    for i, (slot, attempts) in enumerate(zip(slots, replies, strict=True)):
        refusals.append([])
        texts.append([])
        for j, reply in enumerate(attempts):
            refusal = find_text_refusal(
                slot.positive,
                reply,
                length_ratio,
                question=slot.problem.question,
                special_tokens=special_tokens,
            )
            # Leading and trailing white space must not distinguish the members: copy the positive's.
            text = "" if isinstance(reply, Failure) else prompts.copy_margins(reply.text, slot.positive)
            refusals[i].append(refusal)
            texts[i].append(text)
            if not refusal and not isinstance(reply, Failure):
                candidates.append((i, j))

    # One batch, so that the rule's worker processes judge several rewrites in parallel.
    verdicts = rule.check([make_item(slots[i].problem, texts[i][j]) for i, j in candidates])
    for (i, j), verdict in zip(candidates, verdicts, strict=True):
        if verdict != Verdict.WRONG:
            refusals[i][j] = REFUSAL_BY_VERDICT[verdict]

    for slot, reasons, rewrites in zip(slots, refusals, texts, strict=True):
        slot.refusal = reasons[-1]
        if "" in reasons:
            slot.negative = rewrites[reasons.index("")]
