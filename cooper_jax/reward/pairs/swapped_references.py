"""Negatives with a swapped reference: the positive's text with another problem's reference (our extension).

The members differ only in their reference, so a reward model that ignores the reference cannot distinguish
them.  This source needs no assistant.
"""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.pair_checks import REFUSAL_BY_VERDICT
from cooper_jax.reward.pairs.pair_slots import PairSlot
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.rule.worker_process import make_item
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
    """Fill slots with the positive's text and another reference, trying up to `tries` references.

    The rule must find the text WRONG against the other reference: a reference of equal value (20 and 40/2)
    makes no negative.

    Args:
      slots: open slots with a positive.
      problems: [B], the batch that the other references come from, in a random order for each slot.
    """
    # The order of each slot is its own, so that one odd reference is not tried for all of them.
    references_by_slot = [_shuffle_other_references(slot, problems, seed, step) for slot in slots]
    for slot in slots:
        slot.refusal = "no_other"  # overwritten below unless the batch has no other reference

    # Each round tries one reference per open slot, so that one batch of verdicts serves all slots.
    for attempt in range(tries):
        # Slots that are still open and have a reference left to try.
        candidates = [
            (slot, references[attempt])
            for slot, references in zip(slots, references_by_slot, strict=True)
            if slot.negative is None and attempt < len(references)
        ]
        if not candidates:
            break

        verdicts = rule.check([make_item(slot.problem, slot.positive, other) for slot, other in candidates])
        for (slot, reference), verdict in zip(candidates, verdicts, strict=True):
            if verdict == Verdict.WRONG:
                slot.negative, slot.negative_reference = slot.positive, reference
            else:
                slot.refusal = REFUSAL_BY_VERDICT[verdict]


def _shuffle_other_references(slot: PairSlot, problems: Sequence[Problem], seed: int, step: int) -> list[str]:
    """The batch's distinct references other than the slot's own, shuffled with the key (seed, step, row)."""
    # Distinct references only: the rule would judge equal ones alike, which wastes a try.
    others = [p.reference for p in problems if p.reference != slot.problem.reference]
    distinct = list(dict.fromkeys(others))
    order = keys.make_generator(seed, "swapped", step, slot.order_row).permutation(len(distinct))
    return [distinct[i] for i in order]
