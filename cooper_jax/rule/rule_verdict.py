"""The rule verifier's verdict on one (reference, completion) item.

1. Answer and reference are found and parsed (answer_parser.py).
2. `judge_answer` asks math-verify whether they are equal.  A "no" proves nothing, since math-verify also says
   no to everything that it fails on.  So WRONG requires `are_unequal` as well, which proves the inequality on
   its own; the rest is UNRECOGNISED.

Departure from the paper, which takes math-verify's no for a wrong answer: see step 2.

This file runs in the worker processes, without jax: of this project it imports answer_parser.py alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from cooper_jax.rule.answer_parser import (
    ParsedAnswer,
    classify_value,
    find_answer,
    find_last_expression,
    parse_answer,
)

CORRECT, WRONG, NO_ANSWER, UNRECOGNISED = "correct", "wrong", "no_answer", "unrecognised"

# Spellings of one unit a line; the first is its name.
_UNIT_SPELLINGS = (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
    "inch inches in", "foot feet ft", "yard yd", "mile mi", "mg milligram", "g gram", "kg kilogram",
    "pound lb", "ounce oz", "second sec s", "minute min", "hour hr h", "day", "week", "month", "year yr",
    "cent", "dollar", "degree", "radian", "ml milliliter millilitre", "l liter litre", "km/h kph", "mph",
    "m/s",
)  # fmt: skip


def _index_units() -> dict[str, str]:
    """Spelling -> name of the unit."""
    names = {}
    for line in _UNIT_SPELLINGS:
        spellings = line.split()
        names.update(dict.fromkeys(spellings, spellings[0]))
    return names


_UNIT_NAMES = _index_units()


def judge_answer(reference: str, completion: str) -> str:
    """The verdict on one completion: CORRECT, WRONG, NO_ANSWER or UNRECOGNISED.

    Method: the module's docstring.  Raises whatever sympy raises on values that it cannot work with.
    """
    from math_verify import verify

    span = find_answer(reference)
    gold = parse_answer(reference[slice(*span)] if span else reference)
    if not completion.strip():
        return NO_ANSWER
    span = find_answer(completion)
    if span is None and re.search(r"\\boxed\s*\{", completion):
        return UNRECOGNISED  # the box was never closed
    answer = parse_answer(completion[slice(*span)]) if span else find_last_expression(completion)

    # Answers without a value: only identical texts, and yes against no, can be decided.
    if gold.kind == answer.kind and gold.kind in ("words", "opaque") and gold.text:
        if gold.text == answer.text or gold.text == _find_yes_or_no(answer.text):
            return CORRECT
        if {gold.text, _find_yes_or_no(answer.text)} == {"yes", "no"}:
            return WRONG

    if not gold.comparable:
        return UNRECOGNISED
    if answer.kind == "empty":
        return NO_ANSWER
    if not answer.comparable:
        return UNRECOGNISED

    # Choices are compared by their letter alone.
    if "letter" in (gold.kind, answer.kind):
        if gold.kind != answer.kind:
            return UNRECOGNISED  # a choice against its value
        return CORRECT if gold.text == answer.text else WRONG

    gold_unit, answer_unit = _find_unit_name(gold), _find_unit_name(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return UNRECOGNISED  # 20 cm against 0.2 m, and against 20 m

    # Gold first: verify is not symmetric (it follows the gold's format).
    if verify(gold.value, answer.value, timeout_seconds=None):
        return CORRECT

    # math-verify says no: abstain where the answers may be equal all the same.
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return UNRECOGNISED  # 20 cm against 0.2 m
    if ("circ" in gold.text) != ("circ" in answer.text) and "pi" in gold.text + answer.text:
        return UNRECOGNISED  # degrees against radians
    if span is None and _last_line_mentions(completion, gold):
        return UNRECOGNISED  # nothing marks which of the last line's numbers is the answer
    return WRONG if are_unequal(gold, answer) else UNRECOGNISED


def _find_unit_name(answer: ParsedAnswer) -> str | None:
    """The name of an answer's unit, singular or plural; None for one that is not in the table."""
    return _UNIT_NAMES.get(answer.unit.removesuffix("s")) or _UNIT_NAMES.get(answer.unit)


def _find_yes_or_no(words: str) -> str:
    """The yes or no that a sentence begins with; "" for others."""
    found = re.match(r"(yes|no)(?:[,.;:]|$)", words)
    return found[1] if found else ""


def _last_line_mentions(completion: str, gold: ParsedAnswer) -> bool:
    """True where a number in the completion's last line may equal the reference."""
    line = completion.strip().splitlines()[-1]
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)
    return any(not are_unequal(gold, parse_answer(number)) for number in numbers)


def are_unequal(gold: ParsedAnswer, answer: ParsedAnswer) -> bool:
    """True where two answers are proved to be unequal; False means "not proved", never "equal"."""
    a, b = _unwrap(gold.value), _unwrap(answer.value)
    if "relation" in (classify_value(a), classify_value(b)):
        return False
    decimals = [parsed.decimals for parsed in (gold, answer) if parsed.decimals]
    if decimals and classify_value(a) == classify_value(b) == "number":
        # 4.67 against 14/3 is a rounding, not a wrong answer.
        return not _are_close(a, b, 0.5 * 10.0 ** -min(decimals))
    return _values_differ(a, b)


def _unwrap(value: Any) -> Any:
    """x = 5 -> 5, {5} -> 5."""
    import sympy

    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        value = value.rhs
    if isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        return value.args[0]
    return value


def _values_differ(a: Any, b: Any) -> bool:
    """True where two sympy values are proved to be unequal."""
    kinds = (classify_value(a), classify_value(b))
    if kinds == ("collection", "collection"):
        return _collections_differ(a, b)
    if "collection" in kinds:
        return not {"relation", "opaque"} & set(kinds)
    if not set(kinds) <= {"number", "expression"}:
        return False

    if _name_symbols(a) != _name_symbols(b) and len(a.free_symbols) == len(b.free_symbols):
        return False  # 2n against 2k
    if kinds == ("number", "number"):
        return not _are_close(a, b, 0.0)
    if set(kinds) == {"number", "expression"} and _get_coefficient(a) == _get_coefficient(b):
        return False  # 5 against 5 m, where m may be metres
    return _expressions_differ(a, b)


def _collections_differ(a: Any, b: Any) -> bool:
    """True where two sets, matrices, intervals or tuples are proved to be unequal."""
    import sympy

    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return _has_unmatched(a.args, b.args) or _has_unmatched(b.args, a.args)
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape != b.shape or _any_differ(a.flat(), b.flat())
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        if _values_differ(a.start, b.start) or _values_differ(a.end, b.end):
            return True
        return (a.left_open, a.right_open) != (b.left_open, b.right_open)

    # (1, 2) may be an interval or a point.
    if isinstance(a, sympy.Interval):
        a = sympy.Tuple(a.start, a.end)
    if isinstance(b, sympy.Interval):
        b = sympy.Tuple(b.start, b.end)
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return len(a) != len(b) or _any_differ(a, b)
    return False


def _has_unmatched(members: Sequence[Any], others: Sequence[Any]) -> bool:
    """True where some member differs from all others."""
    for member in members:
        if all(_values_differ(member, other) for other in others):
            return True
    return False


def _any_differ(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """True where some element differs from the one in its place."""
    return any(_values_differ(x, y) for x, y in zip(first, second, strict=True))


def _expressions_differ(a: Any, b: Any) -> bool:
    """True where two expressions disagree at two of three points.

    Equal expressions agree wherever they are finite; two disagreements cannot be an accident of one point.
    """
    names = sorted({*_name_symbols(a), *_name_symbols(b)})
    disagreements = 0
    for shift in (0.0, 1.13, 2.71):
        point = {name: 0.37 + 0.29 * i + shift for i, name in enumerate(names)}
        x, y = _evaluate_at(a, point), _evaluate_at(b, point)
        if x is not None and y is not None:
            disagreements += abs(x - y) > 1e-6 * max(1.0, abs(x), abs(y))
    return disagreements >= 2


def _evaluate_at(expression: Any, point: dict[str, float]) -> complex | None:
    """The expression's value where its symbols, by name, have these values."""
    return _to_complex(expression.subs({symbol: point[str(symbol)] for symbol in expression.free_symbols}))


def _name_symbols(expression: Any) -> list[str]:
    return sorted(str(symbol) for symbol in expression.free_symbols)


def _get_coefficient(value: Any) -> Any:
    """5 of 5 m; a number itself."""
    return value.as_coeff_Mul()[0] if value.free_symbols else value


def _are_close(a: Any, b: Any, tolerance: float) -> bool:
    """True where two numbers are equal within `tolerance`, or cannot be told apart in 15 digits."""
    import sympy

    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return abs(a - b) <= sympy.Float(tolerance)
    x, y = _to_complex(a), _to_complex(b)
    if x is None or y is None:
        return a.is_infinite == b.is_infinite  # shown to differ only where exactly one of them is infinite
    return abs(x - y) <= max(tolerance, 1e-9 * max(1.0, abs(x), abs(y)))


def _to_complex(value: Any) -> complex | None:
    """A sympy number in double precision; None where it has no finite value."""
    try:
        z = complex(value.evalf(15))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return z if z == z and abs(z) != float("inf") else None
