"""Rows that a reward model's training adds to its labelled completions.

The completions of a data set leave shortcuts: the style of a writer, the difficulty of a question, a phrase
such as "the answer is correct".  Three kinds of added rows contradict them, each a share of the training rows:

    attacked          completions under known reward hacks (data/reward_hacks.py), as many right ones as wrong
                      ones, so that a hack says nothing about the label
    other_references  right completions beside another reference: wrong.  The reference is the answer of a
                      wrong completion of the same question where there is one, else that of another question
    own_references    wrong completions beside the answer that they give themselves: right

The first kind teaches the model to ignore text that is no answer; the other two teach it to compare the
answer with the reference, whoever wrote the completion.  All are ours: the authors train on the data alone.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cooper_jax.data import answers, prompts, reward_hacks
from cooper_jax.evaluation.answer_forms import normalise_answer
from cooper_jax.reward_training.rm_config import TrainRmConfig
from cooper_jax.runtime import keys
from cooper_jax.types import Triple

# Ids of the random stream `added_rows`.
_OTHER, _OWN = range(2)


@dataclasses.dataclass(frozen=True)
class AddedRows:
    """Added rows by kind."""

    attacked: tuple[Triple, ...] = ()
    other_references: tuple[Triple, ...] = ()
    own_references: tuple[Triple, ...] = ()

    @property
    def triples(self) -> tuple[Triple, ...]:
        """All added rows."""
        return self.attacked + self.other_references + self.own_references

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows of each kind."""
        return {field.name: len(getattr(self, field.name)) for field in dataclasses.fields(self)}


def make_added_rows(triples: Sequence[Triple], settings: TrainRmConfig, seed: int) -> AddedRows:
    """Make the rows that the settings ask for.

    The choice of rows depends on `seed` and the rows' positions only.
    """
    return AddedRows(
        attacked=tuple(make_attacked_copies(triples, settings.attacked, seed)),
        other_references=tuple(make_copies_with_other_references(triples, settings.other_references, seed)),
        own_references=tuple(make_copies_with_own_references(triples, settings.own_references, seed)),
    )


def make_attacked_copies(triples: Sequence[Triple], share: float, seed: int) -> list[Triple]:
    """Copy `share` of the rows, each under one of the reward hacks for training.

    As many right as wrong rows are drawn, as far as there are enough of both.
    """
    # One generator draws first the rows of each class and then, in ascending order of the rows, the hacks.
    rng = keys.make_generator(seed, "attacked")
    chosen: list[int] = []
    for label in (0.0, 1.0):
        rows = [i for i, t in enumerate(triples) if t.label == label]
        count = min(len(rows), round(share * len(triples) / 2))
        chosen += rng.choice(rows, size=count, replace=False).tolist()

    copies = []
    for i in sorted(chosen):
        name = reward_hacks.TRAINED[rng.integers(len(reward_hacks.TRAINED))]
        attacked = reward_hacks.apply_attack(triples[i], name, seed, i)
        copies.append(dataclasses.replace(attacked, id=f"{attacked.id} under {name}"))
    return copies


def make_copies_with_other_references(triples: Sequence[Triple], share: float, seed: int) -> list[Triple]:
    """Copy right completions beside the reference that another answer would have, labelled wrong.

    share: copies as a share of all rows.

    Rows for which no other reference is found are skipped, so there may be fewer.
    """
    wrong_answers = _collect_wrong_answers(triples)
    references: dict[str, list[str]] = defaultdict(list)  # source -> references of its questions
    for source, _, reference in sorted({(t.source, t.question, t.reference) for t in triples}):
        references[source].append(reference)

    rng = keys.make_generator(seed, "added_rows", _OTHER)
    right = [i for i, t in enumerate(triples) if t.label > 0.5]
    copies = []
    for i in _choose_rows(right, share * len(triples), rng):
        triple = triples[i]
        form = normalise_answer(triple.reference)
        # An answer of the same kind is the harder negative, so it comes first.
        for candidates in (wrong_answers.get(triple.question, []), references[triple.source]):
            others = [text for text in candidates if normalise_answer(text) != form]
            if others:
                other = others[int(rng.integers(len(others)))]
                copies.append(
                    dataclasses.replace(
                        triple, reference=other, label=0.0, id=f"{triple.id} beside another reference"
                    )
                )
                break
    return copies


def make_copies_with_own_references(triples: Sequence[Triple], share: float, seed: int) -> list[Triple]:
    """Copy wrong completions beside the answer that they mark, labelled right.

    share: copies as a share of all rows; there are fewer if not enough wrong completions mark an answer.
    """
    rng = keys.make_generator(seed, "added_rows", _OWN)
    marked = [i for i, t in enumerate(triples) if t.label < 0.5 and _find_marked_answer(t)]
    # An answer that equals the reference contradicts the label of its row, and one of both is an error.
    marked = [i for i in marked if not _is_reference(_find_marked_answer(triples[i]), triples[i])]
    copies = []
    for i in _choose_rows(marked, share * len(triples), rng):
        triple = triples[i]
        copies.append(
            dataclasses.replace(
                triple,
                reference=_find_marked_answer(triple),
                label=1.0,
                id=f"{triple.id} beside its own answer",
            )
        )
    return copies


def _choose_rows(rows: Sequence[int], count: float, rng: np.random.Generator) -> list[int]:
    """Draw `count` rows (rounded), at most all, without replacement; they come in ascending order."""
    size = min(len(rows), round(count))
    return sorted(rng.choice(rows, size=size, replace=False).tolist()) if size else []


def _find_marked_answer(triple: Triple) -> str:
    """The answer that a completion marks; "" without one, or if it is too long for a reference.

    It is written as published references are, so that the style of a reference does not show its origin.
    """
    answer = answers.clean_reference(prompts.extract_answer(triple.completion) or "")
    return answer if len(answer) <= reward_hacks.MAX_OWN_ANSWER else ""


def _is_reference(answer: str, triple: Triple) -> bool:
    """True if an answer has the normal form of the triple's reference."""
    return normalise_answer(answer) == normalise_answer(triple.reference)


def _collect_wrong_answers(triples: Sequence[Triple]) -> dict[str, list[str]]:
    """Collect the answers that wrong completions mark, by question."""
    wrong_answers: dict[str, list[str]] = defaultdict(list)
    for triple in triples:
        if triple.label < 0.5 and (answer := _find_marked_answer(triple)):
            wrong_answers[triple.question].append(answer)
    return wrong_answers
