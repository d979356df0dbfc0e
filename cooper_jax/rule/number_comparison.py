"""Comparison of numbers and expressions: exact or to 40 digits, as a rounding, and with units.

A decimal may round the other number: 4.67 is not proved to be 14/3, nor to differ from it.  With six
significant digits or more it is taken for the number that it rounds, unless that number is itself a decimal.
"""

from __future__ import annotations

from fractions import Fraction

import mpmath

from cooper_jax.rule import expressions, units
from cooper_jax.rule.expressions import Call, Constant, Expression, NotFinite, Number, TooLarge
from cooper_jax.rule.parsed_answer import ParsedAnswer

ROUNDED_DIGITS = 6  # significant digits from which a decimal shows the number that it rounds
_UNIT_CAPITALS = frozenset("NJWVMLSG")


def compare_scalars(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    assert gold.value is not None and answer.value is not None
    first, second = gold.unit, answer.unit
    if first is None and second is None:
        return compare_values(gold.value, answer.value)
    if first is not None and second is not None:
        return _compare_quantities(gold.value, first, answer.value, second)

    # Only one side has a unit: the other leaves it to the question.
    unit = first or second
    assert unit is not None
    equal = compare_values(gold.value, answer.value)
    if unit.is_percent:
        return _compare_with_percent(gold, answer, equal)
    if unit.is_angle and _mentions_pi(answer.value if first else gold.value):
        with_unit, radians = (gold.value, answer.value) if first else (answer.value, gold.value)
        return True if compare_values(_convert_to_radians(with_unit), radians) else equal
    if equal is False and _may_convert(gold, answer, unit):
        return None
    return equal


def _compare_with_percent(gold: ParsedAnswer, answer: ParsedAnswer, equal: bool | None) -> bool | None:
    """20 % against 20 or 0.2."""
    percent, plain = (gold, answer) if gold.unit else (answer, gold)
    assert percent.value is not None and plain.value is not None
    fraction = Call("divide", (percent.value, Number(Fraction(100))))
    if isinstance(percent.value, Number):
        fraction_number = Number(percent.value.value / 100, percent.value.step / 100)
        as_fraction = compare_values(fraction_number, plain.value)
    else:
        as_fraction = compare_values(fraction, plain.value)
    if equal or as_fraction:
        return True
    return None if None in (equal, as_fraction) else False


def _may_convert(gold: ParsedAnswer, answer: ParsedAnswer, unit: units.Unit) -> bool:
    """True if a number with a unit and another without one may be one quantity: 75 cents and 0.75."""
    with_unit, plain = (gold.value, answer.value) if gold.unit else (answer.value, gold.value)
    values = evaluate_number(with_unit), evaluate_number(plain)
    if not all(isinstance(value, Fraction) for value in values) or not values[0]:
        return False
    return units.may_convert(unit, values[1] / values[0])


def _compare_quantities(a: Expression, first: units.Unit, b: Expression, second: units.Unit) -> bool | None:
    """Compare two numbers with units, after conversion to one unit."""
    if first.noun or second.noun:
        # 5 apples and 5 oranges; 5 boxes and 60 pens.
        same = _singular(first.noun) == _singular(second.noun)
        return compare_values(a, b) if same else None
    if {first.dimension, second.dimension} == {(("angle", 1),), (("radians", 1),)}:
        pair = (a, b) if first.is_angle else (b, a)
        return compare_values(_convert_to_radians(pair[0]), pair[1])
    if first.dimension != second.dimension:
        return False
    ratio = first.factor / second.factor
    if ratio == 1:
        return compare_values(a, b)
    if isinstance(a, Number):
        return compare_values(Number(a.value * ratio, a.step * ratio), b)
    return compare_values(Call("multiply", (a, Number(ratio))), b)


def _singular(noun: str) -> str:
    return " ".join(word.removesuffix("s") for word in noun.split())


def _convert_to_radians(degrees: Expression) -> Expression:
    return Call("multiply", (degrees, Call("divide", (Constant("pi"), Number(Fraction(180))))))


def _mentions_pi(node: Expression) -> bool:
    if isinstance(node, Call):
        return any(_mentions_pi(argument) for argument in node.arguments)
    return node == Constant("pi")


def compare_values(a: Expression, b: Expression) -> bool | None:
    """Compare two expressions without units; a decimal may round the other number."""
    infinite = [_find_infinity(node) for node in (a, b)]
    if any(infinite):
        if all(infinite):
            return infinite[0] == infinite[1]
        finite = a if infinite[1] else b
        return False if evaluate_number(finite) is not None else None

    symbols = expressions.find_symbols(a), expressions.find_symbols(b)
    equal = expressions.are_equal(a, b)
    if equal is not False:
        return equal
    if not any(symbols):
        return _compare_rounded(a, b)
    if symbols[0] != symbols[1] and _may_be_same_under_other_names(a, b, *symbols):
        return None
    return False


def _find_infinity(node: Expression) -> int:
    """1 for infinity, -1 for minus infinity, else 0."""
    if isinstance(node, Call) and node.name == "negate":
        return -_find_infinity(node.arguments[0])
    return int(node == Constant("infinity"))


def _may_be_same_under_other_names(a: Expression, b: Expression, first: frozenset, second: frozenset) -> bool:
    """True for 2n and 2k, for 5 and 5 m, in which m may be metres, and up to a constant of integration."""
    if first ^ second <= {"C", "c", "K"}:
        return True
    if bool(first) != bool(second):
        number, product = (b, a) if first else (a, b)
        letters = first | second
        if len(letters) == 1 and letters <= units.LETTERS | _UNIT_CAPITALS:
            one = dict.fromkeys(letters, mpmath.mpf(1))
            return _are_close(evaluate_number(number), evaluate_number(product, one))
        return False
    return expressions.are_equal_renamed(a, b)


def _compare_rounded(a: Expression, b: Expression) -> bool | None:
    """Compare two different numbers, of which one may be the other rounded to a decimal."""
    steps = [node.step for node in (a, b) if isinstance(node, Number) and node.step]
    x, y = evaluate_number(a), evaluate_number(b)
    if x is None or y is None:
        return None
    distance = abs(to_mpf(x) - to_mpf(y))
    if not steps or distance > to_mpf(max(steps)):
        return False

    # One decimal beside a number that is none: enough digits show which number it rounds.
    decimal, other = (x, b) if isinstance(a, Number) and a.step else (y, a)
    if len(steps) == 1 and not _terminates(other):
        digits = mpmath.log10(abs(to_mpf(decimal)) / to_mpf(steps[0])) if decimal else 0
        if digits >= ROUNDED_DIGITS - 1:
            return True
    is_rounding = distance <= to_mpf(max(steps)) / 2 or (len(steps) == 1 and not _terminates(other))
    return None if is_rounding else False


def _terminates(node: Expression) -> bool:
    """True for an exact number with finitely many decimals."""
    value = evaluate_number(node)
    if not isinstance(value, Fraction):
        return False
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def evaluate_number(node: Expression | None, point: dict | None = None) -> expressions.Value | None:
    """The value of an expression; None if it has symbols, or no finite value within the limits."""
    if node is None or (expressions.find_symbols(node) and point is None):
        return None
    try:
        with mpmath.workdps(expressions.DIGITS):
            return expressions.evaluate(node, point)
    except (TooLarge, NotFinite):
        return None


def _are_close(a: expressions.Value | None, b: expressions.Value | None) -> bool:
    if a is None or b is None:
        return False
    with mpmath.workdps(expressions.DIGITS):
        return expressions.is_close(a, b)


def to_mpf(value: expressions.Value) -> expressions.Value:
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value
