"""Slots: the places for a step's pairs, each with its positive before its negative is known.

A prompt has `per_prompt` slots.  Each takes its negative from one source; the k-th slot of a source takes the
k-th row that the source can use, in the order of `rank_rows`.  A source fills a slot, or states why it could
not.

    B  prompts   G  samples a prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.rule import answer_parser
from cooper_jax.types import Completion, Pair, Problem, Verdict


@dataclasses.dataclass
class PairSlot:
    """A pair in the making; a source of negatives sets the second group of fields."""

    problem: Problem
    source: str  # of the negative: one of build_pairs.NEGATIVE_SOURCES
    row: int | None = None  # the positive's rollout row; None where no row qualifies
    order_row: int = 0  # the same row in the data order, position * G + sample; it keys random draws
    positive: str = ""  # text of the positive; own_answer: the one text of both members

    negative: str | None = None  # text of the negative; None while the slot is masked
    positive_reference: str = ""  # own_answer: the answer that the text gives
    negative_reference: str = ""  # swap: another problem's reference
    refusal: str = ""  # why there is no pair: the last attempt's reason

    def to_pair(self) -> Pair | None:
        """The finished pair; None where the slot is masked."""
        if self.row is None or self.negative is None:
            return None
        return Pair(
            problem=self.problem,
            positive=self.positive,
            negative=self.negative,
            row=self.row,
            positive_reference=self.positive_reference,
            negative_reference=self.negative_reference,
        )


@dataclasses.dataclass(frozen=True)
class RankedRows:
    """A prompt's rows that can serve as positives, in the order in which sources take them."""

    correct: Sequence[int]  # verified correct and not truncated, in random order
    wrong_with_answer: Sequence[int] = ()  # wrong, not truncated, marking an answer; the highest reward first


def rank_rows(
    rows: range,
    completions: Sequence[Completion],  # [N]
    verdicts: Sequence[Verdict],  # [N]
    scores: np.ndarray | None,  # f32[N]: the reward model's; None leaves out the order by reward
    rng: np.random.Generator,
) -> RankedRows:
    """Sort the rows of one prompt into those that sources of negatives can use."""
    whole = [n for n in rows if not completions[n].truncated]
    correct = [n for n in whole if verdicts[n] == Verdict.CORRECT]
    shuffled = [correct[i] for i in rng.permutation(len(correct))]
    if scores is None:
        return RankedRows(shuffled)

    wrong = [n for n in whole if verdicts[n] == Verdict.WRONG]
    wrong_with_answer = [n for n in wrong if find_marked_answer(completions[n].text)]
    wrong_with_answer.sort(key=lambda n: -scores[n])  # stable: ties by row
    return RankedRows(shuffled, wrong_with_answer)


def find_marked_answer(text: str) -> str:
    """The answer that a text marks, such as the contents of its last box; "" where it marks none."""
    span = answer_parser.find_answer(text)
    if span is None:
        return ""
    start, end = span
    return text[start:end].strip()
