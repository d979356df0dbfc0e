"""Slots: the pairs of a step while they are built, from the choice of a positive to the finished pair.

A prompt has `per_prompt` slots, and each slot gets its negative from one source.  The k-th slot of a source
uses the k-th row that the source can use, in the order of `rank_rows`.  The source then fills the slot with a
negative, or records the reason why it could not.

    B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.reward.pairs.pair_task import PairTask
from cooper_jax.rule import answer_finder
from cooper_jax.runtime import keys
from cooper_jax.types import Completion, Pair, Problem, Verdict


@dataclasses.dataclass
class PairSlot:
    """A pair that is being built."""

    # Set when the slot is made.
    problem: Problem
    source: str  # source of the negative: one of pair_task.NEGATIVE_SOURCES
    k: int  # the slot is the prompt's k-th slot of this source
    row: int | None = None  # rollout row of the positive; None if no row qualifies
    order_row: int = 0  # that row's index in the data order, position * G + sample; keys random draws
    positive: str = ""  # text of the positive; for own_answer also that of the negative

    # Set by the source of negatives.
    negative: str | None = None  # text of the negative; None while the slot is open
    positive_reference: str = ""  # own_answer: the answer that the text gives
    negative_reference: str = ""  # swap: another problem's reference
    refusal: str = ""  # reason why the last attempt made no pair

    def to_pair(self) -> Pair | None:
        """The finished pair; None (masked) if the slot has no positive or no negative."""
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
    """The rows of one prompt that can be positives, in the order in which slots use them."""

    # Verified correct and not truncated, in random order: for the sources assistant and swap.
    correct: Sequence[int]

    # Wrong, not truncated and with a marked answer, the highest reward first: for own_answer.
    wrong_with_answer: Sequence[int] = ()


def make_prompt_slots(
    task: PairTask,
    index: int,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray | None = None,
) -> list[PairSlot]:
    """The slots of one prompt with their positives, [per_prompt]; some may lack a positive, and stay masked.

    The result depends only on the arguments, whenever and wherever it is computed.

    Args:
      index: of the prompt in the batch.
      completions, verdicts: [G], of the prompt's responses.
      scores: f32[G], the reward model's rewards, which order the positives of own_answer; None if these slots
        are not needed: they have no positive then.
    """
    problem, position = task.problems[index], task.prompt_positions[index]
    rng = keys.make_generator(task.seed, "pairs", task.step, position)
    ranked = rank_rows(completions, verdicts, scores, rng)

    slots = []
    for source, k in task.cfg.list_slot_sources():
        rows, refusal = ranked.correct, "no_positive"
        if source == "own_answer":
            rows, refusal = ranked.wrong_with_answer, "no_wrong"
        if k >= len(rows):
            slots.append(PairSlot(problem, source, k, refusal=refusal))
            continue

        # The row's index in the data order does not depend on how the data are divided into batches.
        slots.append(
            PairSlot(
                problem,
                source,
                k,
                row=index * task.group_size + rows[k],
                order_row=position * task.group_size + rows[k],
                positive=completions[rows[k]].text,
            )
        )
    return slots


def rank_rows(
    completions: Sequence[Completion],  # [G]
    verdicts: Sequence[Verdict],  # [G]
    scores: np.ndarray | None,  # f32[G]: the reward model's rewards; None omits `wrong_with_answer`
    rng: np.random.Generator,
) -> RankedRows:
    """Find and order the rows of one prompt, 0 .. G - 1, that the sources of negatives can use."""
    complete = [n for n, completion in enumerate(completions) if not completion.truncated]
    correct = [n for n in complete if verdicts[n] == Verdict.CORRECT]
    shuffled = [correct[i] for i in rng.permutation(len(correct))]
    if scores is None:
        return RankedRows(shuffled)

    # Wrong responses with the highest reward come first: these are the ones the reward model has to unlearn.
    wrong = [n for n in complete if verdicts[n] == Verdict.WRONG]
    wrong_with_answer = [n for n in wrong if find_marked_answer(completions[n].text)]
    wrong_with_answer.sort(key=lambda n: -scores[n])  # stable: ties are in row order
    return RankedRows(shuffled, wrong_with_answer)


def find_marked_answer(text: str) -> str:
    """The answer that a text marks, for example with \\boxed; "" if it marks none."""
    span = answer_finder.find_answer(text)
    if span is None:
        return ""
    start, end = span
    return text[start:end].strip()
