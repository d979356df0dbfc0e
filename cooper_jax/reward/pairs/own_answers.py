"""Pairs made from a wrong response and the answer that it gives (our extension).

Both members have the text of a wrong response.  The negative keeps the problem's reference; the positive
takes the response's own answer as its reference.  Both then contain every feature that raised the
response's reward, and only the match with the reference distinguishes them.  Such pairs can be made even if
no response of a prompt is correct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.pair_checks import REFUSAL_BY_VERDICT
from cooper_jax.reward.pairs.pair_slots import PairSlot, find_marked_answer
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.rule.worker_process import make_item
from cooper_jax.types import Verdict


def fill_with_own_answers(
    slots: Sequence[PairSlot],
    rule: RuleVerifier | SharedRule,
    reference_fits: Callable[[str], bool],
) -> None:
    """Fill the slots whose text is CORRECT when its own answer is the reference.

    Args:
      slots: open slots; the rule found their texts WRONG against the problem's reference.
      reference_fits: returns True for an answer that is short enough to be a reference.
    """
    # References are never truncated, and this one is written by the policy: it may have hundreds of digits.
    candidates: list[tuple[PairSlot, str]] = []
    for slot in slots:
        answer = find_marked_answer(slot.positive)
        # `rank_rows` only takes texts that mark an answer, so it is never empty here.
        if reference_fits(answer):
            candidates.append((slot, answer))
        else:
            slot.refusal = "too_long"
    if not candidates:
        return

    # The check refuses answers that the rule cannot compare even with themselves.
    verdicts = rule.check([make_item(slot.problem, slot.positive, answer) for slot, answer in candidates])
    for (slot, answer), verdict in zip(candidates, verdicts, strict=True):
        if verdict == Verdict.CORRECT:
            slot.negative, slot.positive_reference = slot.positive, answer
        else:
            slot.refusal = REFUSAL_BY_VERDICT.get(verdict, "not_right")
