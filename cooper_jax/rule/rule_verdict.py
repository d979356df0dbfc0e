"""The rule verifier's verdict on one (reference, completion) item.

1. The answers of reference and completion are found and parsed (answer_parser.py).
2. math-verify decides whether they are equal; if it says yes, the completion is CORRECT.
3. If it says no, that proves nothing, since math-verify also says no whenever it fails.  The completion is
   WRONG only if `are_unequal` proves the inequality independently, and UNRECOGNISED otherwise.

Departure from the paper: there, every "no" of math-verify is a wrong answer (see step 3).

This module runs in the worker processes, without jax.  From this project it imports only answer_parser.py.
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

# Each string has the spellings of one unit; the first is the unit's name.
_UNIT_SPELLINGS = (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
    "inch inches in", "foot feet ft", "yard yd", "mile mi", "mg milligram", "g gram", "kg kilogram",
    "pound lb", "ounce oz", "second sec s", "minute min", "hour hr h", "day", "week", "month", "year yr",
    "cent", "dollar", "degree", "radian", "ml milliliter millilitre", "l liter litre", "km/h kph", "mph",
    "m/s",
)  # fmt: skip


def _index_units() -> dict[str, str]:
    """Spelling of a unit -> the unit's name."""
    names = {}
    for line in _UNIT_SPELLINGS:
        spellings = line.split()
        names.update(dict.fromkeys(spellings, spellings[0]))
    return names


_UNIT_NAMES = _index_units()


def judge_answer(reference: str, completion: str) -> str:
    """The verdict on one completion: CORRECT, WRONG, NO_ANSWER or UNRECOGNISED.

    The module's docstring describes the method.  Raises the exceptions of math-verify and sympy.
    """
    from math_verify import verify

    # The reference may be a bare answer, or a text that marks its answer.
    span = find_answer(reference)
    gold = parse_answer(reference[slice(*span)] if span else reference)
    if not completion.strip():
        return NO_ANSWER

    span = find_answer(completion)
    if span is None and re.search(r"\\boxed\s*\{", completion):
        return UNRECOGNISED  # the box was never closed
    answer = parse_answer(completion[slice(*span)]) if span else find_last_expression(completion)

    # Answers that have no value on one side or both are decided, or given up, by their texts.
    verdict = _judge_texts(gold, answer)
    if verdict is not None:
        return verdict

    # Values are compared without their units, and 20 cm is equal to 0.2 m but not to 20 m: abstain.
    gold_unit, answer_unit = _find_unit_name(gold), _find_unit_name(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return UNRECOGNISED

    # The gold answer comes first: verify is not symmetric, it follows the gold answer's format.
    if verify(gold.value, answer.value, timeout_seconds=None):
        return CORRECT

    # math-verify said no.  Abstain in the cases in which the answers may still be equal.
    if _may_differ_in_units(gold, answer):
        return UNRECOGNISED
    if span is None and _last_line_mentions(completion, gold):
        return UNRECOGNISED  # nothing marks which number of the last line is the answer
    return WRONG if are_unequal(gold, answer) else UNRECOGNISED


def _judge_texts(gold: ParsedAnswer, answer: ParsedAnswer) -> str | None:
    """The verdict if it can be reached without comparing values; None if both answers have a value."""
    # Words, or what could not be parsed: only identical texts, and yes against no, can be decided.
    if gold.kind == answer.kind and gold.kind in ("words", "opaque") and gold.text:
        yes_or_no = _find_yes_or_no(answer.text)
        if gold.text in (answer.text, yes_or_no):
            return CORRECT
        if {gold.text, yes_or_no} == {"yes", "no"}:
            return WRONG

    # The order matters: without a usable reference, even a missing answer cannot be judged.
    if not gold.comparable:
        return UNRECOGNISED
    if answer.kind == "empty":
        return NO_ANSWER
    if not answer.comparable:
        return UNRECOGNISED

    # The letter of a choice is comparable with another letter, not with the value of the choice.
    if "letter" in (gold.kind, answer.kind):
        if gold.kind != answer.kind:
            return UNRECOGNISED
        return CORRECT if gold.text == answer.text else WRONG
    return None


def _may_differ_in_units(gold: ParsedAnswer, answer: ParsedAnswer) -> bool:
    """True if both may be one quantity in different units: 20 cm and 0.2 m, or degrees and radians."""
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return True
    has_degrees = ("circ" in gold.text) != ("circ" in answer.text)
    return has_degrees and "pi" in gold.text + answer.text


def _find_unit_name(answer: ParsedAnswer) -> str | None:
    """The name of an answer's unit, given in singular or plural; None if it is not in the table."""
    return _UNIT_NAMES.get(answer.unit.removesuffix("s")) or _UNIT_NAMES.get(answer.unit)


def _find_yes_or_no(words: str) -> str:
    """The "yes" or "no" with which an answer in words begins, as in "yes, it is"; "" for others."""
    match = re.match(r"(yes|no)(?:[,.;:]|$)", words)
    return match[1] if match else ""


def _last_line_mentions(completion: str, gold: ParsedAnswer) -> bool:
    """True if some number in the completion's last line is not proved to be unequal to the reference."""
    line = completion.strip().splitlines()[-1]
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)
    return any(not are_unequal(gold, parse_answer(number)) for number in numbers)


def are_unequal(gold: ParsedAnswer, answer: ParsedAnswer) -> bool:
    """True if two answers are proved to be unequal; False means "not proved", which is not "equal"."""
    a, b = _unwrap(gold.value), _unwrap(answer.value)

    # Relations can be rewritten in too many ways for a proof: x < 3 is also 3 > x or 2 x < 6.
    if "relation" in (classify_value(a), classify_value(b)):
        return False

    # 4.67 against 14/3 is a rounding, not a wrong answer: allow half a unit of the last digit.
    decimals = [parsed.decimals for parsed in (gold, answer) if parsed.decimals]
    if decimals and classify_value(a) == classify_value(b) == "number":
        return not _are_close(a, b, 0.5 * 10.0 ** -min(decimals))
    return _values_differ(a, b)


def _unwrap(value: Any) -> Any:
    """The value inside an assignment or a set of one element: x = 5 -> 5, {5} -> 5."""
    import sympy

    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        value = value.rhs
    if isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        return value.args[0]
    return value


def _values_differ(a: Any, b: Any) -> bool:
    """True if two sympy values are proved to be unequal."""
    kinds = (classify_value(a), classify_value(b))
    if kinds == ("collection", "collection"):
        return _collections_differ(a, b)
    if "collection" in kinds:
        # A collection never equals a number or an expression.
        return not {"relation", "opaque"} & set(kinds)
    if not set(kinds) <= {"number", "expression"}:
        return False

    # 2n against 2k: the same expression may have been written with another symbol.
    if _name_symbols(a) != _name_symbols(b) and len(a.free_symbols) == len(b.free_symbols):
        return False
    if kinds == ("number", "number"):
        return not _are_close(a, b, 0.0)

    # 5 against 5 m: m may be a unit, metres, and no symbol.
    if set(kinds) == {"number", "expression"} and _get_coefficient(a) == _get_coefficient(b):
        return False
    return _expressions_differ(a, b)


def _collections_differ(a: Any, b: Any) -> bool:
    """True if two sets, matrices, intervals or tuples are proved to be unequal."""
    import sympy

    # Collections of one type.  Sets have no order, so each element is compared with all of the other set.

    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return _has_unmatched(a.args, b.args) or _has_unmatched(b.args, a.args)
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape != b.shape or _any_differ(a.flat(), b.flat())
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        if _values_differ(a.start, b.start) or _values_differ(a.end, b.end):
            return True
        return (a.left_open, a.right_open) != (b.left_open, b.right_open)

    # (1, 2) may be an open interval or a point, so an interval is compared with a tuple by its ends.
    if isinstance(a, sympy.Interval):
        a = sympy.Tuple(a.start, a.end)
    if isinstance(b, sympy.Interval):
        b = sympy.Tuple(b.start, b.end)
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return len(a) != len(b) or _any_differ(a, b)
    return False


def _has_unmatched(members: Sequence[Any], others: Sequence[Any]) -> bool:
    """True if some member is proved to be unequal to all of `others`."""
    for member in members:
        if all(_values_differ(member, other) for other in others):
            return True
    return False


def _any_differ(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """True if the elements at some index are proved to be unequal; both have the same length."""
    return any(_values_differ(x, y) for x, y in zip(first, second, strict=True))


def _expressions_differ(a: Any, b: Any) -> bool:
    """True if two expressions disagree at two of three points at least.

    Equal expressions agree at every point where both are finite.  Two disagreements are required, so that a
    numerical problem at one point is not taken for a proof.
    """
    # Symbols are matched by name; each gets values of its own, which are not round.
    names = sorted({*_name_symbols(a), *_name_symbols(b)})
    disagreements = 0
    for shift in (0.0, 1.13, 2.71):
        point = {name: 0.37 + 0.29 * i + shift for i, name in enumerate(names)}
        x, y = _evaluate_at(a, point), _evaluate_at(b, point)
        if x is not None and y is not None:
            disagreements += abs(x - y) > 1e-6 * max(1.0, abs(x), abs(y))
    return disagreements >= 2


def _evaluate_at(expression: Any, point: dict[str, float]) -> complex | None:
    """The expression's value at a point, given as symbol name -> value; None if it is not finite."""
    return _to_complex(expression.subs({symbol: point[str(symbol)] for symbol in expression.free_symbols}))


def _name_symbols(expression: Any) -> list[str]:
    return sorted(str(symbol) for symbol in expression.free_symbols)


def _get_coefficient(value: Any) -> Any:
    """The numerical coefficient of an expression, 5 of 5 m; a number is returned unchanged."""
    return value.as_coeff_Mul()[0] if value.free_symbols else value


def _are_close(a: Any, b: Any, tolerance: float) -> bool:
    """True if two numbers differ by at most `tolerance`, or by too little for 15-digit arithmetic to show."""
    import sympy

    # Rational numbers are compared exactly.
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return abs(a - b) <= sympy.Float(tolerance)

    # All others in double precision.  Values that are not finite are proved unequal only if exactly one of
    # them is infinite.
    x, y = _to_complex(a), _to_complex(b)
    if x is None or y is None:
        return a.is_infinite == b.is_infinite
    return abs(x - y) <= max(tolerance, 1e-9 * max(1.0, abs(x), abs(y)))


def _to_complex(value: Any) -> complex | None:
    """A sympy number in double precision; None if it has no finite value."""
    try:
        z = complex(value.evalf(15))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return z if z == z and abs(z) != float("inf") else None
