"""The rule verifier's verdict on one (reference, completion) item.

1. The answers of reference and completion are found (answer_finder.py) and parsed (answer_parser.py).
2. Equal texts are CORRECT.
3. `compare_answers` (comparison.py) looks for a proof that the answers are equal, which is CORRECT, or
   unequal, which is WRONG.  Without a proof the verdict is UNRECOGNISED.

Departures from the paper: there, math-verify alone decides, and all that it does not find equal is wrong.  Here a
verdict needs a proof either way, and math-verify reads the formulas that the project's parser does not:
sums, products, integrals and limits.

This module runs in the worker processes, without jax.
"""

from __future__ import annotations

from cooper_jax.rule import answer_finder, words
from cooper_jax.rule.answer_parser import parse_answer
from cooper_jax.rule.comparison import compare_answers
from cooper_jax.rule.latex_parser import needs_math_verify
from cooper_jax.rule.parsed_answer import ParsedAnswer

CORRECT, WRONG, NO_ANSWER, UNRECOGNISED = "correct", "wrong", "no_answer", "unrecognised"


def judge_answer(reference: str, completion: str) -> str:
    """The verdict on one completion: CORRECT, WRONG, NO_ANSWER or UNRECOGNISED (see the module's docstring)."""
    if not completion.strip():
        return NO_ANSWER
    gold = parse_reference(reference)
    if gold.kind == "empty" or words.is_placeholder(reference):
        return UNRECOGNISED

    text = answer_finder.read_answer(completion)
    if text is None:
        if answer_finder.has_open_box(completion):
            return UNRECOGNISED  # the box was never closed
        return _judge_last_line(gold, completion)
    return _judge_text(gold, text)


def parse_reference(reference: str) -> ParsedAnswer:
    """Parse a reference: a bare answer, or a text that marks its answer."""
    marked = answer_finder.read_answer(reference)
    return parse_answer(reference if marked is None else marked)


def can_verify(reference: str) -> bool:
    """True if some completion other than the reference's own text may be CORRECT, or if it is a short word."""
    gold = parse_reference(reference)
    if words.is_placeholder(reference):
        return False
    return gold.comparable or (gold.kind == "words" and gold.name.replace(" ", "").isalpha())


def _judge_text(gold: ParsedAnswer, text: str) -> str:
    # An answer that leaves a sum or integral to be computed may take long, and is no answer to most questions.
    if needs_math_verify(text) and not needs_math_verify(gold.key):
        return UNRECOGNISED
    answer = parse_answer(text)
    if answer.kind == "empty":
        return NO_ANSWER
    if gold.key == answer.key:
        return CORRECT
    equal = compare_answers(gold, answer)
    if equal is None:
        return UNRECOGNISED
    return CORRECT if equal else WRONG


def _judge_last_line(gold: ParsedAnswer, completion: str) -> str:
    """The verdict on a completion that marks no answer."""
    line = answer_finder.read_last_line(completion)
    if line.answer:
        verdict = _judge_text(gold, line.answer)
        if verdict == CORRECT:
            return verdict
    if line.is_empty:
        return NO_ANSWER

    # Nothing marks which one is the answer, so all of them must be wrong.
    candidates = {_judge_text(gold, candidate) for candidate in line.candidates}
    return WRONG if candidates == {WRONG} else UNRECOGNISED
