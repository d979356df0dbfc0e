r"""Quantities: a formula followed by a unit, a noun, or a word that multiplies it.

A unit stands in `\text` or in the table of units; any other letters beside a formula are symbols.  Behind a
number in prose there may be a noun, which says what is counted.  Words that deny, bound, hedge or continue
the number are none.
"""

from __future__ import annotations

import re
from fractions import Fraction

from cooper_jax.rule import units, words
from cooper_jax.rule.expressions import Call, Expression, Number
from cooper_jax.rule.latex_parser import Unreadable, parse_formula

MAX_NOUN_WORDS = 5

_CURRENCY = re.compile(r"(?P<sign>[-+]?) ?(?P<currency>[$€£¥]) ?(?P<rest>[-\d.].*)")
_PERCENT = re.compile(r"(.*?) ?%")
_DEGREES = re.compile(r"(.*?) ?\^ ?\{? ?\\circ ?\}? ?(?:\\text ?\{ ?([CF]) ?\})?")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})")
_POWER_OF_TEN = re.compile(
    r"([-+]?) ?(\d+(?:\.\d+)?) ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{ ?([-+]?\d{1,4}) ?\}|\(?([-+]?\d{1,4})\)?)"
)
_MIXED = re.compile(r"([-+]?) ?(\d+)(?: | ?- ?(?=\d+/))(\d+) ?/ ?(\d+)")
_FIRST_TEXT = re.compile(r" ?\\text ?\{")
# A number and words: 20 apples, 5-inch, 3/4 miles, 20 m^2, 5元.
_PLAIN = re.compile(
    r"([-+]? ?[\d.,]+(?: ?/ ?\d+| \d+/\d+)?)( ?)[- ]?"
    r"((?:[A-Za-z]|[^\x00-\x7f])(?:[A-Za-z'./^ -]|\d(?!\d)|[^\x00-\x7f])*)"
)
_VOWEL = re.compile(r"[aeiouy]", re.IGNORECASE)
_SYMBOLIC = frozenset("sin cos tan cot sec csc sinh cosh tanh log ln exp sqrt pi".split())
_COUNTERS = re.compile("[个只名人天年月日本件条张次位块棵头]+$|です|である")


def parse_quantity(s: str) -> tuple[Expression, units.Unit | None]:
    """(value, unit) of a normalised text.  Raises Unreadable."""
    s = s.strip()
    if match := _CURRENCY.fullmatch(s):
        value, unit = parse_quantity(match["sign"] + match["rest"])
        currency = units.parse_unit(match["currency"])
        # "$5 million" has a scale, "$5 each" a noun.
        if unit is not None and unit.dimension and unit != currency:
            raise Unreadable("two units")
        return value, currency
    if "^" in s and (match := _DEGREES.fullmatch(s)):
        unit = {"C": units.parse_unit("celsius"), "F": units.parse_unit("fahrenheit")}.get(
            match[2], units.DEGREE
        )
        return _parse_number_or_formula(match[1]), unit
    if s.endswith("%") and (match := _PERCENT.fullmatch(s)):
        return _parse_number_or_formula(match[1]), units.PERCENT

    if (start := _FIRST_TEXT.search(s)) and start.start() > 0:
        return _parse_marked(s[: start.start()].strip(), s[start.start() :])
    if (match := _PLAIN.fullmatch(s)) and not _SCIENTIFIC.fullmatch(s):
        unit_or_scale = _parse_plain(match[2], match[3])
        if unit_or_scale is not None:
            return _scale(_parse_number_or_formula(match[1]), *unit_or_scale)
    return _parse_number_or_formula(s), None


def _parse_marked(formula: str, marked: str) -> tuple[Expression, units.Unit | None]:
    r"""A formula with `\text{..}` behind it."""
    if not re.fullmatch(r"(?:\\text ?\{[^{}]*\}|[/^*{}() -]|\\cdot ?|\d)+", marked):
        raise Unreadable("text within a formula")
    plain = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", marked)
    plain = " ".join(re.sub(r"\{(-?\d)\}", r"\1", plain).split())
    # A formula may be separated from its unit by a point of multiplication.
    formula = re.sub(r" ?\\(?:cdot|times)$", "", formula)
    if not re.search(r"[0-9a-zA-Z]", formula):
        raise Unreadable("a unit without a number")
    parsed = _parse_words_behind(plain)
    if parsed is None:
        raise Unreadable("words behind a formula")
    return _scale(_parse_number_or_formula(formula), *parsed)


def _parse_plain(space: str, tail: str) -> tuple[Fraction, units.Unit | None] | None:
    """The scale and unit that letters behind a number stand for; None if they are symbols of the formula."""
    tail = _COUNTERS.sub("", tail).strip()
    if not tail:
        return Fraction(1), None
    first = re.split(r"[ ./^-]", tail)[0]
    if first.lower() in _SYMBOLIC:
        return None
    if tail in ("AM", "PM", "a.m.", "p.m.") or (space and tail in ("am", "pm")):
        return Fraction(1), units.parse_unit(tail)
    # cm, km/h; but 5m and 2h may be products.
    if units.parse_unit(tail) is not None:
        is_product = units.is_ambiguous(tail) and not (space and len(tail) > 1)
        return None if is_product else _parse_words_behind(tail)
    # A noun: at least three letters with a vowel, and set off from the number unless it is long.
    is_word = not first.isascii() or (
        len(first) >= 3 and _VOWEL.search(first) is not None and (space or len(first) > 3)
    )
    if not is_word:
        return None
    parsed = _parse_words_behind(tail)
    if parsed is None:
        raise Unreadable("words behind a number")
    return parsed


def _parse_words_behind(tail: str) -> tuple[Fraction, units.Unit | None] | None:
    """The scale and unit of the words behind a number; None for words that change what it says."""
    scale = Fraction(1)
    pieces = tail.replace("-", " ").split()
    while pieces and (factor := words.find_scale(pieces[0])) is not None:
        scale *= factor
        pieces.pop(0)
    if scale > 10**15:
        raise Unreadable("too many scales")
    if not pieces:
        return scale, None
    rest = " ".join(pieces)
    if (unit := units.parse_unit(rest)) is not None:
        return scale, unit

    if (
        not re.fullmatch(r"[^\W\d_][^\d^*+=<>()]*", rest)
        or len(pieces) > MAX_NOUN_WORDS
        or words.changes_number(rest)
    ):
        return None
    return scale, units.Unit(noun=rest.lower())


def _scale(
    value: Expression, scale: Fraction, unit: units.Unit | None
) -> tuple[Expression, units.Unit | None]:
    if scale == 1:
        return value, unit
    if isinstance(value, Number):
        return Number(value.value * scale, value.step * scale), unit
    return Call("multiply", (Number(scale), value)), unit


def _parse_number_or_formula(s: str) -> Expression:
    """A number as typed (1.5e3, 2 1/2), or a formula."""
    s = s.strip()
    if match := _SCIENTIFIC.fullmatch(s):
        return _make_decimal(match[1], int(match[2]))
    if match := _POWER_OF_TEN.fullmatch(s):
        return _make_decimal(match[1] + match[2], int(match[3] or match[4]))
    if match := _MIXED.fullmatch(s):
        whole, top, bottom = int(match[2]), int(match[3]), int(match[4])
        if not 0 < top < bottom:
            raise Unreadable("a whole number beside an improper fraction")
        mixed = whole + Fraction(top, bottom)
        return Number(-mixed if match[1] == "-" else mixed)
    value = parse_formula(re.sub(r"(?<=\d) (?=\.\d)", "", s))
    if isinstance(value, Call) and value.name == "negate" and isinstance(value.arguments[0], Number):
        number = value.arguments[0]
        return Number(-number.value, number.step)
    return value


def _make_decimal(digits: str, exponent: int) -> Number:
    """A decimal number times a power of ten."""
    decimals = len(digits.partition(".")[2])
    power = Fraction(10) ** exponent
    step = power / 10**decimals if decimals else Fraction(0)
    return Number(Fraction(digits) * power, step)
