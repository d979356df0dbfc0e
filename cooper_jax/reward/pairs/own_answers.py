"""Pairs of a wrong response with its own answer (ours).

The negative is a wrong response as the policy wrote it; the positive is the same text beside the answer that
it gives itself.  Both members then contain whatever raised the response's reward, and only the match with the
reference sets them apart.  Such pairs exist even where no response is correct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.pair_checks import REFUSAL_BY_VERDICT
from cooper_jax.reward.pairs.pair_slots import PairSlot, find_marked_answer
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.types import Verdict


def fill_with_own_answers(
    slots: Sequence[PairSlot],
    rule: RuleVerifier | SharedRule,
    fits: Callable[[str], bool] | None,
) -> None:
    """Fill slots whose text the rule finds correct beside the answer that the text itself gives.

    The slots' texts were found WRONG beside their problem's reference.

    Args:
      fits: returns True for an answer that is short enough to be a reference; None: any is.
    """
    # A reference is never cut, and the policy wrote this one: it may have hundreds of digits.
    candidates: list[tuple[PairSlot, str]] = []
    for slot in slots:
        answer = find_marked_answer(slot.positive)
        if fits is None or fits(answer):
            candidates.append((slot, answer))
        else:
            slot.refusal = "too_long"
    if not candidates:
        return

    verdicts = rule.check([(answer, slot.positive) for slot, answer in candidates])
    for (slot, answer), verdict in zip(candidates, verdicts, strict=True):
        if verdict == Verdict.CORRECT:
            slot.negative, slot.positive_reference = slot.positive, answer
        else:
            slot.refusal = REFUSAL_BY_VERDICT.get(verdict, "not_right")
