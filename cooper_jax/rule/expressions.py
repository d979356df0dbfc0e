"""Mathematical expressions: their nodes, exact and high-precision values, and proofs that two are equal.

* A number is compared exactly if it is rational, otherwise with 60 digits.
* Two expressions with symbols are equal if they agree at six points with 50 digits, of which some are
  negative; they differ if they disagree at all points at which every symbol is positive.  Anything between
  is not decided: sqrt(x^2) equals x at positive points only.

Sizes are limited before anything large is computed (`TooLarge`), so that a tower of exponents costs nothing.

This module imports nothing from this project.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

MAX_BITS = 1 << 18  # of an exact number
MAX_EXPONENT = 1 << 16  # binary exponent of a rounded number, in size
MAX_FACTORIAL = 5000
DIGITS = 60  # of rounded numbers
EQUAL = mpmath.mpf(10) ** -40  # relative difference up to which rounded numbers are equal

# For each symbol in alphabetical order a value, at six points; at the first two all are positive.
_SCALES = ("0.731", "1.618", "-0.577", "-1.291", "0.397", "2.236")
_MIXED = (1, 1, 1, -1, -1, -1)  # sign of every second symbol


class TooLarge(ValueError):
    """A number beyond the limits of size."""


class NotFinite(ValueError):
    """An expression without a finite value, such as 1/0."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A rational number; `step` is the place value of the last digit of a decimal, else 0."""

    value: Fraction
    step: Fraction = Fraction(0)


@dataclasses.dataclass(frozen=True)
class Constant:
    """pi, e, i or infinity."""

    name: str


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A letter or name with a subscript."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator or function applied to expressions: add, multiply, divide, power, negate, sin, log, ..."""

    name: str
    arguments: tuple[Expression, ...]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An expression that math-verify has parsed, as a sympy object."""

    value: Any


Expression = Number | Constant | Symbol | Call | Foreign
LOG_BASES: tuple[Expression, ...] = (Number(Fraction(10)), Constant("e"))
Value = Any  # Fraction, mpf or mpc: mpmath has no types

LOG_BASE = "base of log"  # the symbol that stands for the base of a logarithm without one

_FUNCTIONS = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec,
    "csc": mpmath.csc, "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "sinh": mpmath.sinh,
    "cosh": mpmath.cosh,
    "tanh": mpmath.tanh, "exp": mpmath.exp, "ln": mpmath.log, "abs": abs,
}  # fmt: skip


def find_symbols(node: Expression) -> frozenset[str]:
    """The names of an expression's symbols."""
    if isinstance(node, Symbol):
        return frozenset([node.name])
    if isinstance(node, Foreign):
        return frozenset(str(symbol) for symbol in node.value.free_symbols)
    if isinstance(node, Call):
        return frozenset().union(*(find_symbols(argument) for argument in node.arguments))
    return frozenset()


def rename(node: Expression, names: Mapping[str, str]) -> Expression:
    """The expression with other names of symbols."""
    if isinstance(node, Symbol):
        return Symbol(names.get(node.name, node.name))
    if isinstance(node, Call):
        return Call(node.name, tuple(rename(argument, names) for argument in node.arguments))
    return node


def set_log_base(node: Expression, base: Expression) -> Expression:
    """The expression with a base for its logarithms without one."""
    if node == Symbol(LOG_BASE):
        return base
    if isinstance(node, Call):
        return Call(node.name, tuple(set_log_base(argument, base) for argument in node.arguments))
    return node


# --- values --------------------------------------------------------------------------------------------------


def evaluate(node: Expression, point: Mapping[str, Value] | None = None) -> Value:
    """The value of an expression: a Fraction where it is exact, otherwise an mpmath number of the current
    precision.

    Args:
      point: the values of the symbols.

    Raises TooLarge, and NotFinite where there is no finite value.
    """
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        return (point or {})[node.name]
    if isinstance(node, Constant):
        if node.name == "infinity":
            raise NotFinite(node.name)
        return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[node.name]
    if isinstance(node, Foreign):
        return _evaluate_foreign(node.value, point or {})

    arguments = [evaluate(argument, point) for argument in node.arguments]
    try:
        return _limit(_apply(node.name, arguments))
    except (ZeroDivisionError, OverflowError) as error:
        raise NotFinite(node.name) from error


def _apply(name: str, a: list[Value]) -> Value:
    """The value of one operator or function."""
    if name == "add":
        return _add(a)
    if name == "multiply":
        return _multiply(a)
    if name == "negate":
        return -a[0]
    if name == "divide":
        return a[0] / a[1] if _are_exact(a) else _round(a[0]) / _round(a[1])
    if name == "power":
        return _raise(a[0], a[1])
    if name in ("factorial", "binomial", "floor", "ceil"):
        return _apply_integer(name, a)
    if name == "abs" and _are_exact(a):
        return abs(a[0])
    if name == "log":  # base, argument
        return mpmath.log(_round(a[1])) / mpmath.log(_round(a[0]))
    if name in ("sinh", "cosh", "exp") and abs(_round(a[0])) > MAX_EXPONENT:
        raise TooLarge(name)
    return _FUNCTIONS[name](_round(a[0]))


def _add(terms: list[Value]) -> Value:
    if _are_exact(terms):
        return sum(terms, Fraction(0))
    return mpmath.fsum(_round(term) for term in terms)


def _multiply(factors: list[Value]) -> Value:
    product = factors[0]
    for factor in factors[1:]:
        exact = isinstance(product, Fraction) and isinstance(factor, Fraction)
        product = product * factor if exact else _round(product) * _round(factor)
    return product


def _raise(base: Value, exponent: Value) -> Value:
    """A power; roots of exact numbers are exact where possible."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent) * size > MAX_BITS and abs(base) != 1 and base:
                raise TooLarge("power")
            return base ** int(exponent)
        # An exact square root of a square keeps sqrt(16) rational.
        if exponent == Fraction(1, 2) and base >= 0:
            roots = mpmath.libmp.isqrt(base.numerator), mpmath.libmp.isqrt(base.denominator)
            if roots[0] ** 2 == base.numerator and roots[1] ** 2 == base.denominator:
                return Fraction(*map(int, roots))

    b, e = _round(base), _round(exponent)
    if b == 0:
        if mpmath.re(e) <= 0:
            raise NotFinite("power of 0")
        return mpmath.mpf(0)
    if abs(e) * (1 + abs(mpmath.log(abs(b)))) > MAX_EXPONENT:
        raise TooLarge("power")
    return mpmath.power(b, e)


def _apply_integer(name: str, a: list[Value]) -> Value:
    if name in ("floor", "ceil"):
        if isinstance(a[0], Fraction):
            return Fraction(a[0].__floor__() if name == "floor" else a[0].__ceil__())
        return Fraction(int((mpmath.floor if name == "floor" else mpmath.ceil)(mpmath.re(a[0]))))
    if all(isinstance(x, Fraction) and x.denominator == 1 and x >= 0 for x in a):
        integers = [int(x) for x in a]
        if max(integers) > MAX_FACTORIAL:
            raise TooLarge(name)
        if name == "factorial":
            return Fraction(int(mpmath.libmp.ifac(integers[0])))
        n, k = integers
        return (
            Fraction(int(mpmath.libmp.ifac(n) // (mpmath.libmp.ifac(k) * mpmath.libmp.ifac(n - k))))
            if k <= n
            else Fraction(0)
        )
    rounded = [_round(x) for x in a]
    if any(abs(x) > MAX_FACTORIAL for x in rounded):
        raise TooLarge(name)
    return mpmath.factorial(rounded[0]) if name == "factorial" else mpmath.binomial(*rounded)


def _are_exact(values: list[Value]) -> bool:
    return all(isinstance(value, Fraction) for value in values)


def _round(value: Value) -> Value:
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _limit(value: Value) -> Value:
    """The value, if it is finite and within the limits of size."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > 2 * MAX_BITS:
            raise TooLarge("number")
        return value
    if not mpmath.isfinite(value):
        raise NotFinite("number")
    if value and abs(mpmath.mag(value)) > 4 * MAX_EXPONENT:
        raise TooLarge("number")
    return value


def _evaluate_foreign(value: Any, point: Mapping[str, Value]) -> Value:
    import sympy

    replaced = value.subs({s: sympy.Float(str(point[str(s)]), mpmath.mp.dps) for s in value.free_symbols})
    number = sympy.N(replaced.doit(), mpmath.mp.dps)
    if not number.is_number or not number.is_finite:
        raise NotFinite("math-verify's expression")
    if number.is_Rational:
        return Fraction(int(number.p), int(number.q))
    real, imaginary = number.as_real_imag()
    return _limit(mpmath.mpc(str(real), str(imaginary)) if imaginary else mpmath.mpf(str(real)))


# --- comparison ----------------------------------------------------------------------------------------------


def are_equal(a: Expression, b: Expression) -> bool | None:
    """True or False if two expressions are proved to be equal or different, None if neither is proved."""
    names = sorted(find_symbols(a) | find_symbols(b))
    if LOG_BASE in names:
        # log without a base is decimal to some and natural to others.
        outcomes = {are_equal(set_log_base(a, base), set_log_base(b, base)) for base in LOG_BASES}
        return outcomes.pop() if len(outcomes) == 1 else None
    try:
        with mpmath.workdps(DIGITS):
            if not names:
                return _are_values_equal(evaluate(a), evaluate(b))
            return _agree_at_points(a, b, names)
    except (TooLarge, NotFinite):
        return None


def are_proportional(a: Expression, b: Expression, positive: bool = False) -> bool:
    """True if one expression with symbols is a constant multiple of the other; positive: by a positive one."""
    names = sorted(find_symbols(a) | find_symbols(b))
    ratios = []
    with mpmath.workdps(DIGITS):
        for point in _make_points(names):
            try:
                x, y = _round(evaluate(a, point)), _round(evaluate(b, point))
            except (TooLarge, NotFinite):
                continue
            if not x or not y:
                return False
            ratios.append(x / y)
        if len(ratios) < 4 or (positive and mpmath.re(ratios[0]) < 0):
            return False
        return all(abs(ratio - ratios[0]) <= EQUAL * abs(ratios[0]) for ratio in ratios)


def are_equal_renamed(a: Expression, b: Expression) -> bool:
    """True if two expressions with different symbols are equal under some renaming: 2n and 2k."""
    first, second = sorted(find_symbols(a)), sorted(find_symbols(b))
    if len(first) != len(second) or len(first) > 3:
        return len(first) == len(second)
    for names in itertools.permutations(first):
        # Under intermediate names, so that no two symbols are merged.
        if are_equal(a, rename(b, dict(zip(second, names, strict=True)))):
            return True
    return False


def is_close(a: Value, b: Value) -> bool:
    """True if two values are equal, exactly or to 40 digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return abs(_round(a) - _round(b)) <= EQUAL * max(abs(_round(a)), abs(_round(b)))


def _are_values_equal(a: Value, b: Value) -> bool | None:
    if is_close(a, b):
        return True
    # Beyond the digits computed, cancellation may leave a difference: sqrt(2) - sqrt(2) against 0.
    if _are_exact([a, b]) or abs(_round(a) - _round(b)) > EQUAL:
        return False
    return None


def _agree_at_points(a: Expression, b: Expression, names: list[str]) -> bool | None:
    """Compare two expressions at the points of `_make_points`."""
    outcomes: list[bool | None] = []
    for point in _make_points(names):
        try:
            x, y = evaluate(a, point), evaluate(b, point)
        except NotFinite:
            outcomes.append(None)
            continue
        # A difference that is small beside the symbols' values is no agreement: 10^-50 x is not 0.
        outcomes.append(_are_values_equal(x, y))
    if outcomes.count(True) >= 4 and False not in outcomes:
        return True
    return False if outcomes[:2] == [False, False] else None


def _make_points(names: list[str]) -> list[dict[str, Value]]:
    """Six points, symbol -> value; the values are irrational, so that they satisfy no simple equation."""
    points = []
    for scale, sign in zip(_SCALES, _MIXED, strict=True):
        values = {}
        for i, name in enumerate(names):
            size = mpmath.mpf(scale) * mpmath.sqrt(i + 2) * (1 + mpmath.mpf(i) / 7)
            values[name] = size * (sign if i % 2 else 1)
        points.append(values)
    return points
