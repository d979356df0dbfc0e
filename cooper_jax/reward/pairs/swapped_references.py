"""Negatives with a swapped reference (ours): the positive's text beside another problem's reference.

Nothing but the reference sets the members apart, so a reward model that ignores it cannot tell them.  No
assistant is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.pair_checks import REFUSAL_BY_VERDICT
from cooper_jax.reward.pairs.pair_slots import PairSlot
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import keys
from cooper_jax.types import Problem, Verdict


def fill_with_swapped_references(
    slots: Sequence[PairSlot],
    problems: Sequence[Problem],
    rule: RuleVerifier | SharedRule,
    *,
    tries: int,
    seed: int,
    step: int,
) -> None:
    """Fill slots with their positive beside another reference, of which up to `tries` are tried.

    The rule must find the text WRONG beside the other reference: one that is equal in value (20 and 40/2)
    makes no negative.

    Args:
      problems: [B], the batch, whose other references are tried in an order of each slot's own.
    """
    references_by_slot = [_shuffle_other_references(slot, problems, seed, step) for slot in slots]
    for slot in slots:
        slot.refusal = "no_other"  # stays where the batch has no other reference

    for attempt in range(tries):
        candidates = [
            (slot, references[attempt])
            for slot, references in zip(slots, references_by_slot, strict=True)
            if slot.negative is None and attempt < len(references)
        ]
        if not candidates:
            break
        verdicts = rule.check([(reference, slot.positive) for slot, reference in candidates])
        for (slot, reference), verdict in zip(candidates, verdicts, strict=True):
            if verdict == Verdict.WRONG:
                slot.negative, slot.negative_reference = slot.positive, reference
            else:
                slot.refusal = REFUSAL_BY_VERDICT[verdict]


def _shuffle_other_references(slot: PairSlot, problems: Sequence[Problem], seed: int, step: int) -> list[str]:
    """The batch's references other than the slot's own, each once, in an order keyed by (seed, step, row)."""
    others = [p.reference for p in problems if p.reference != slot.problem.reference]
    distinct = list(dict.fromkeys(others))
    order = keys.make_generator(seed, "swapped", step, slot.order_row).permutation(len(distinct))
    return [distinct[i] for i in order]
