"""The verdict of the rule on one (reference, completion) pair.

1. Answer and reference are found and parsed (rule_reading.py).
2. `judge` asks math-verify whether they are equal.  Its "no" is no evidence, for it also says no to whatever it
   fails on: WRONG needs `differ` besides, which shows the inequality by itself.  The rest is UNRECOGNISED.

Departure from the paper, which takes math-verify's no for a wrong answer: see step 2.

This file runs in the worker processes, without jax: of this project it imports rule_reading.py alone.
"""

from __future__ import annotations

import re
from typing import Any

from cooper_jax.rule.answer_parser import Form, find_answer, find_last_expression, read_answer, value_kind

CORRECT, WRONG, NO_ANSWER, UNRECOGNISED = "correct", "wrong", "no_answer", "unrecognised"

_MEASURES = {  # a unit as it may be written -> its one name
    word: line.split()[0]
    for line in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
        "inch inches in", "foot feet ft", "yard yd", "mile mi", "mg milligram", "g gram", "kg kilogram",
        "pound lb", "ounce oz", "second sec s", "minute min", "hour hr h", "day", "week", "month", "year yr",
        "cent", "dollar", "degree", "radian", "ml milliliter millilitre", "l liter litre", "km/h kph", "mph", "m/s",
    )
    for word in line.split()
}  # fmt: skip


def judge_answer(reference: str, completion: str) -> str:
    """The verdict on one completion; see the module's docstring."""
    from math_verify import verify

    span = find_answer(reference)
    gold = read_answer(reference[slice(*span)] if span else reference)
    if not completion.strip():
        return NO_ANSWER
    span = find_answer(completion)
    if span is None and re.search(r"\\boxed\s*\{", completion):
        return UNRECOGNISED  # the box was never closed
    answer = read_answer(completion[slice(*span)]) if span else find_last_expression(completion)
    if gold.kind == answer.kind and gold.kind in ("words", "opaque") and gold.text:
        if gold.text == answer.text or gold.text == _yes_or_no(answer.text):
            return CORRECT
        if {gold.text, _yes_or_no(answer.text)} == {"yes", "no"}:
            return WRONG
    if not gold.comparable:
        return UNRECOGNISED
    if answer.kind == "empty":
        return NO_ANSWER
    if not answer.comparable:
        return UNRECOGNISED
    if "letter" in (gold.kind, answer.kind):
        if gold.kind != answer.kind:
            return UNRECOGNISED  # a choice against its value
        return CORRECT if gold.text == answer.text else WRONG
    measures = [
        _MEASURES.get(form.unit.removesuffix("s")) or _MEASURES.get(form.unit) for form in (gold, answer)
    ]
    if all(measures) and measures[0] != measures[1]:
        return UNRECOGNISED  # 20 cm against 0.2 m, and against 20 m
    # Gold first: verify is not symmetric (it follows the gold's format).
    if verify(gold.value, answer.value, timeout_seconds=None):
        return CORRECT
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return UNRECOGNISED  # 20 cm against 0.2 m
    if ("circ" in gold.text) != ("circ" in answer.text) and "pi" in gold.text + answer.text:
        return UNRECOGNISED  # degrees against radians
    if span is None and _mentions(completion, gold):
        return UNRECOGNISED  # nothing marks which of the last line's numbers is the answer
    return WRONG if are_unequal(gold, answer) else UNRECOGNISED


def _yes_or_no(words: str) -> str:
    """The yes or no that a sentence begins with; "" for others."""
    found = re.match(r"(yes|no)(?:[,.;:]|$)", words)
    return found[1] if found else ""


def _mentions(completion: str, gold: Form) -> bool:
    """Whether the last line holds the reference among its numbers."""
    line = completion.strip().splitlines()[-1]
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)
    return any(not are_unequal(gold, read_answer(number)) for number in numbers)


def are_unequal(gold: Form, answer: Form) -> bool:
    """Whether two forms are shown to be unequal.  False means "not shown", never "equal"."""
    a, b = _bare(gold.value), _bare(answer.value)
    if "relation" in (value_kind(a), value_kind(b)):
        return False
    places = [form.decimals for form in (gold, answer) if form.decimals]
    if places and value_kind(a) == value_kind(b) == "number":
        # 4.67 against 14/3 is a rounding, not a wrong answer.
        return not _close(a, b, 0.5 * 10.0 ** -min(places))
    return _unequal(a, b)


def _bare(value: Any) -> Any:
    """x = 5 -> 5, {5} -> 5."""
    import sympy

    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        value = value.rhs
    return value.args[0] if isinstance(value, sympy.FiniteSet) and len(value.args) == 1 else value


def _unequal(a: Any, b: Any) -> bool:
    import sympy

    kinds = (value_kind(a), value_kind(b))
    if kinds == ("collection", "collection"):
        if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
            return any(all(_unequal(x, y) for y in b.args) for x in a.args) or any(
                all(_unequal(x, y) for x in a.args) for y in b.args
            )
        if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
            return a.shape != b.shape or any(_unequal(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))
        if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
            ends = _unequal(a.start, b.start) or _unequal(a.end, b.end)
            return ends or (a.left_open, a.right_open) != (b.left_open, b.right_open)
        a, b = (sympy.Tuple(x.start, x.end) if isinstance(x, sympy.Interval) else x for x in (a, b))
        if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
            return len(a) != len(b) or any(_unequal(x, y) for x, y in zip(a, b, strict=True))
        return False
    if "collection" in kinds:
        return not {"relation", "opaque"} & set(kinds)
    if not set(kinds) <= {"number", "expression"}:
        return False
    symbols = [sorted(str(s) for s in x.free_symbols) for x in (a, b)]
    if symbols[0] != symbols[1] and len(symbols[0]) == len(symbols[1]):
        return False  # 2n against 2k
    if kinds == ("number", "number"):
        return not _close(a, b, 0.0)
    if set(kinds) == {"number", "expression"} and _coefficient(a) == _coefficient(b):
        return False  # 5 against 5 m, where m may be metres
    # Equal expressions agree wherever they are finite; two disagreements cannot be an accident of one point.
    points = [
        {str(s): 0.37 + 0.29 * i + shift for i, s in enumerate(_symbols(a, b))} for shift in (0.0, 1.13, 2.71)
    ]
    values = [tuple(_number(x.subs({s: p[str(s)] for s in x.free_symbols})) for x in (a, b)) for p in points]
    finite = [(x, y) for x, y in values if x is not None and y is not None]
    return sum(abs(x - y) > 1e-6 * max(1.0, abs(x), abs(y)) for x, y in finite) >= 2


def _symbols(*values: Any) -> list[str]:
    return sorted({str(s) for x in values for s in x.free_symbols})


def _coefficient(value: Any) -> Any:
    return value.as_coeff_Mul()[0] if value.free_symbols else value


def _close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two numbers are equal within `tolerance`, or cannot be told apart in 15 digits."""
    import sympy

    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return abs(a - b) <= sympy.Float(tolerance)
    x, y = _number(a), _number(b)
    if x is None or y is None:
        return a.is_infinite == b.is_infinite  # shown to differ only where exactly one of them is infinite
    return abs(x - y) <= max(tolerance, 1e-9 * max(1.0, abs(x), abs(y)))


def _number(value: Any) -> complex | None:
    """A sympy number in double precision; None where it has no finite value."""
    try:
        z = complex(value.evalf(15))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return z if z == z and abs(z) != float("inf") else None
