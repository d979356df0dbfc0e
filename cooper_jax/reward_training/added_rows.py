"""Rows that a reward model's training adds to its labelled completions.

The completions of a data set leave shortcuts: the style of a writer, the difficulty of a question, a phrase
such as "the answer is correct".  Three kinds of added rows contradict them, each a share of the training rows:

    attacked          copies under known reward hacks (reward/reward_hacks.py), made from as many right as wrong
                      completions, so that a hack that keeps the completion says nothing about the label
    other_references  right completions beside another reference: wrong.  The reference is the answer of a
                      wrong completion of the same question where there is one, else the reference of another
                      question of the same source, of the same form if possible
    own_references    wrong completions beside the answer that they give themselves: right

The first kind teaches the model to ignore text that is no answer; the other two teach it to compare the
answer with the reference, whoever wrote the completion.  All are ours: the authors train on the data alone.

Labels of the last two kinds have to be true, so the rule verifier confirms each row: it must find a completion
WRONG beside another reference, and CORRECT beside its own answer.  Rows on which it abstains are not made.
A resumed run makes the rows again.  A verdict that takes about rule.timeout may differ then, and the run refuses to
go on with other data (rm_loop.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import answers
from cooper_jax.data.answer_forms import normalise_answer
from cooper_jax.reward import reward_hacks
from cooper_jax.reward.multihost import SharedRule, open_rule_verifier
from cooper_jax.reward.pairs.pair_slots import find_marked_answer
from cooper_jax.reward_training.rm_config import TrainRmConfig
from cooper_jax.rule.reference_checks import can_be_verified
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.rule.worker_process import Item
from cooper_jax.runtime import keys
from cooper_jax.types import Triple, Verdict

# Ids of the random stream `added_rows`.
_OTHER, _OWN = range(2)
# References that are tried for a completion.
MAX_TRIES = 4
# Items of one request to the rule.  Each request has its own budget of CPU time for items over the limit
# (rule.step_budget), so that a few slow items do not shorten the limit of all others.
ITEMS_AT_ONCE = 256
# Words of an answer that can be a reference, with numbers or formulas and without.  More words are a sentence or a
# heading, such as "Analysis required".
MAX_WORDS, MAX_WORDS_ALONE = 3, 1

# Digits and signs of formulas.
_MATHEMATICS = re.compile(r"[\d\\=+*/^(\[<>√]")
# A word outside LaTeX commands.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
# An option with its text: "B) x = 2".
_OPTION = re.compile(r"\(?([A-Za-z])[).:]\s")


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

    def select(self, is_kept: Callable[[Triple], bool]) -> AddedRows:
        """Return the rows for which `is_kept` is true."""
        fields = (field.name for field in dataclasses.fields(self))
        return AddedRows(**{name: tuple(filter(is_kept, getattr(self, name))) for name in fields})


def make_added_rows(triples: Sequence[Triple], settings: TrainRmConfig, cfg: ConfigDict) -> AddedRows:
    """Make the rows that the settings ask for.

    Args:
      triples: training rows.
      cfg: the whole config, of which `seed` and `rule` are read.

    The choice of rows depends on the seed, the rows' positions and the rule's verdicts.  Where other or own
    references are asked for, this is collective: all hosts must call it, and they get the same rows.

    Raises SetupError if the rule verifier is needed and does not work.
    """
    attacked = tuple(make_attacked_copies(triples, settings.attacked, cfg.seed))
    if not settings.other_references and not settings.own_references:
        return AddedRows(attacked)

    with open_rule_verifier(cfg) as rule:
        own_answers = find_own_answers(triples, rule)
        other_references = make_copies_with_other_references(
            triples, own_answers, settings.other_references, cfg.seed, rule
        )
    own_references = make_copies_with_own_references(triples, own_answers, settings.own_references, cfg.seed)
    return AddedRows(attacked, tuple(other_references), tuple(own_references))


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

    weights = np.array([reward_hacks.ATTACKS[name].weight for name in reward_hacks.TRAINED])
    copies = []
    for i in sorted(chosen):
        name = reward_hacks.TRAINED[rng.choice(len(weights), p=weights / weights.sum())]
        attacked = reward_hacks.apply_attack(triples[i], name, seed, i)
        copies.append(dataclasses.replace(attacked, id=f"{attacked.id} under {name}"))
    return copies


def make_copies_with_other_references(
    triples: Sequence[Triple],
    own_answers: Mapping[int, str],
    share: float,
    seed: int,
    rule: RuleVerifier | SharedRule,
) -> list[Triple]:
    """Copy right completions beside the reference that another answer would have, labelled wrong.

    Args:
      own_answers: of the wrong completions, from `find_own_answers`.
      share: copies as a share of all rows.
      rule: finds each completion WRONG against its new reference.

    There are fewer copies if no such reference is found for enough right completions.
    """
    pool = _References(triples, own_answers)
    rng = keys.make_generator(seed, "added_rows", _OTHER)
    right = [i for i, t in enumerate(triples) if t.label > 0.5]
    waiting = [right[n] for n in rng.permutation(len(right))]
    count = round(share * len(triples))
    found: dict[int, str] = {}  # row -> its new reference

    # Rows for which nothing is found are replaced by others, until there are enough.
    while waiting and len(found) < count:
        size = count - len(found)
        drawn, waiting = waiting[:size], waiting[size:]
        tries = {i: pool.choose_for(triples[i], rng) for i in drawn}
        for attempt in range(MAX_TRIES):
            tried = [i for i in drawn if i not in found and attempt < len(tries[i])]
            items = [Item(tries[i][attempt], triples[i].completion, triples[i].question) for i in tried]
            for i, verdict in zip(tried, _check(rule, items), strict=True):
                if verdict == Verdict.WRONG:
                    found[i] = tries[i][attempt]
    return [
        dataclasses.replace(
            triples[i], reference=found[i], label=0.0, id=f"{triples[i].id} beside another reference"
        )
        for i in sorted(found)
    ]


def make_copies_with_own_references(
    triples: Sequence[Triple], own_answers: Mapping[int, str], share: float, seed: int
) -> list[Triple]:
    """Copy wrong completions beside the answer that they mark, labelled right.

    Args:
      own_answers: of the wrong completions, from `find_own_answers`.
      share: copies as a share of all rows; there are fewer if there are not enough own answers.
    """
    rng = keys.make_generator(seed, "added_rows", _OWN)
    return [
        dataclasses.replace(
            triples[i], reference=own_answers[i], label=1.0, id=f"{triples[i].id} beside its own answer"
        )
        for i in _choose_rows(sorted(own_answers), share * len(triples), rng)
    ]


def find_own_answers(triples: Sequence[Triple], rule: RuleVerifier | SharedRule) -> dict[int, str]:
    """Find the answers of wrong completions that can be references: row -> answer.

    An answer is written as published references are, so that the style of a reference does not show its origin.
    Left out are completions that mark no answer, answers that are too long or too wordy for a reference, those that
    the rule does not find CORRECT or cannot compare with other texts, and those that equal the row's reference:
    there the label of the row itself is in doubt.
    """
    candidates: list[tuple[int, str]] = []
    for i, triple in enumerate(triples):
        if triple.label < 0.5:
            answer = _write_as_reference(find_marked_answer(triple.completion), triple)
            is_other = normalise_answer(answer) != normalise_answer(triple.reference)
            if answer and is_other and _resembles_reference(answer):
                candidates.append((i, answer))

    rows = [triples[i] for i, _ in candidates]
    beside = [
        Item(answer, row.completion, row.question) for row, (_, answer) in zip(rows, candidates, strict=True)
    ]
    beside_own = _check(rule, beside)
    beside_reference = _check(rule, [Item(row.reference, row.completion, row.question) for row in rows])
    own_answers: dict[int, str] = {}
    for (i, answer), own, other in zip(candidates, beside_own, beside_reference, strict=True):
        if own == Verdict.CORRECT and other != Verdict.CORRECT and can_be_verified(answer):
            own_answers[i] = answer
    return own_answers


def _write_as_reference(answer: str, triple: Triple) -> str:
    """Write a completion's marked answer as published references are written."""
    # Some completions are JSON, whose strings are quoted and whose backslashes are doubled.
    unquoted = answer.strip().rstrip(",").strip('"').strip()
    if unquoted != answer.strip():
        unquoted = unquoted.replace("\\\\", "\\")

    # Where a letter is asked for, the text of the option is left out.
    option = _OPTION.match(unquoted)
    if option and _find_form(triple.reference) == "letter":
        return option[1]
    return answers.clean_reference(unquoted)


def _resembles_reference(answer: str) -> bool:
    """True unless a text is too long for a reference, or is a sentence, a heading or the fence of a code block."""
    words = len(_WORD.findall(answer))
    limit = MAX_WORDS if _MATHEMATICS.search(answer) else MAX_WORDS_ALONE
    return len(answer) <= reward_hacks.MAX_OWN_ANSWER and words <= limit and "```" not in answer


class _References:
    """The references that completions of a question can be shown beside."""

    def __init__(self, triples: Sequence[Triple], own_answers: Mapping[int, str]):
        self._by_question: dict[str, list[str]] = defaultdict(list)  # answers of wrong completions
        for i, answer in own_answers.items():
            self._by_question[triples[i].question].append(answer)
        self._by_source: dict[str, list[str]] = defaultdict(list)  # references of its questions
        for source, _, reference in sorted({(t.source, t.question, t.reference) for t in triples}):
            self._by_source[source].append(reference)

    def choose_for(self, triple: Triple, rng: np.random.Generator) -> list[str]:
        """Choose up to MAX_TRIES references that differ from a triple's own, the hardest to tell from it first.

        These are other answers to the question, then references of the same source and form, then the rest of
        the source.  Each group is shuffled.  A letter is no other reference for a value, nor a value for a
        letter: the value may be that of the option, which the rule does not know.
        """
        own, form = normalise_answer(triple.reference), _find_form(triple.reference)
        of_source = self._by_source[triple.source]
        groups = (
            self._by_question.get(triple.question, []),
            [text for text in of_source if _find_form(text) == form],
            [text for text in of_source if _find_form(text) != form],
        )
        ordered: list[str] = []
        for group in groups:
            of_kind = [text for text in group if (_find_form(text) == "letter") == (form == "letter")]
            ordered += [of_kind[n] for n in rng.permutation(len(of_kind))]
        distinct = (text for text in dict.fromkeys(ordered) if normalise_answer(text) != own)
        return list(itertools.islice(distinct, MAX_TRIES))


@functools.cache
def _find_form(reference: str) -> str:
    """The form of a reference: "letter", "number" or "text"."""
    text = normalise_answer(reference)
    if re.fullmatch(r"\(?[A-Za-z]\)?", text):
        return "letter"
    return "number" if re.fullmatch(r"-?\d+(?:/\d+)?", text) else "text"


def _check(rule: RuleVerifier | SharedRule, items: Sequence[Item]) -> list[Verdict]:
    """Judge items, `ITEMS_AT_ONCE` at a time."""
    verdicts: list[Verdict] = []
    for start in range(0, len(items), ITEMS_AT_ONCE):
        verdicts += rule.check(items[start : start + ITEMS_AT_ONCE])
    return verdicts


def _choose_rows(rows: Sequence[int], count: float, rng: np.random.Generator) -> list[int]:
    """Draw `count` rows (rounded), at most all, without replacement; they come in ascending order."""
    size = min(len(rows), round(count))
    return sorted(rng.choice(rows, size=size, replace=False).tolist()) if size else []
