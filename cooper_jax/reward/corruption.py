"""Seeded corruption of a solution's answer: "14 + 6 = 20 #### 20" becomes "14 + 6 = 22 #### 22".

1. The answer is where `find_answer` sees it, else the text's last number.
2. Its number (integer, decimal, fraction, number word; a unit stays) is moved to a nearby value.  The new
   text has the old one's length, so that neither length nor layout tells which of a pair is which.
3. Where the solution computed that value ("= 20" before), the last such result and all its later mentions
   follow.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from cooper_jax.rule.answer_parser import find_answer

NEARBY = (1, 2, 3, 4, 5, 6, 8, 10, 20)  # how far the number moves, in units of its last or its first place
CHOICES = 6  # of the candidates, the nearest that are drawn from

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = _UNITS + [ten + (f"-{unit}" if unit != "zero" else "") for ten in _TENS for unit in _UNITS[:10]]
_VALUES = {word: value for value, word in enumerate(_WORDS)}

_NUMBER = re.compile(
    r"\\d?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?<![\w.])(?P<over>\d+)(?P<slash> ?/ ?)(?P<under>\d+)(?![\d.])"
    r"|(?P<plain>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<point> ?\.\d+)?"
    rf"|\b(?P<word>(?:{'|'.join(_TENS)})-(?:{'|'.join(_UNITS[1:10])})|{'|'.join(_UNITS + _TENS)})\b",
    re.IGNORECASE,
)


def corrupt_answer(text: str, rng: np.random.Generator) -> str | None:
    """`text` with another answer; None where its answer holds no number."""
    span = find_answer(text)
    numbers = _NUMBER.finditer(text, *span) if span else _NUMBER.finditer(text)
    found = [m for m in numbers if int(m["bottom"] or m["under"] or 1)]
    if not found:
        return None
    number = found[-1] if span is None else found[0] if len(found) == 1 else found[rng.integers(len(found))]
    value, write = _read(number)
    results = _results(text[: number.start()], value)
    candidates = [moved for moved in _near(number, value) if len(write(moved)) == len(number[0])]
    # The computed result should keep its length as well: 99 + 1 = 100 is written 1 digit longer.
    same = [moved for moved in candidates if all(len(_like(old[0], moved)) == len(old[0]) for old in results)]
    candidates = (same or candidates)[:CHOICES]
    if not candidates:
        return None
    moved = candidates[rng.integers(len(candidates))]
    edits = [(old.start(), old.end(), _like(old[0], moved)) for old in results]
    for start, end, new in reversed([*edits, (number.start(), number.end(), write(moved))]):
        text = text[:start] + new + text[end:]
    return text


def _read(number: re.Match) -> tuple[Fraction, Callable[[Fraction], str]]:
    """A number's value, and how to write another value in its place."""
    if number["word"]:
        return Fraction(_VALUES[number["word"].lower()]), lambda v: _cased(_WORDS[int(v)], number["word"])
    for top, bottom in (("top", "bottom"), ("over", "under")):
        if number[top]:
            return Fraction(int(number[top]), int(number[bottom])), functools.partial(
                _fraction, number, top, bottom
            )
    return Fraction(number[0].replace(",", "").replace(" ", "")), lambda v: _like(number[0], v)


def _fraction(number: re.Match, top: str, bottom: str, value: Fraction) -> str:
    """`value` over the denominator that stands there."""
    start, end = (place - number.start() for place in number.span(top))
    return f"{number[0][:start]}{int(value * int(number[bottom]))}{number[0][end:]}"


def _like(old: str, value: Fraction) -> str:
    """`value` with the decimals, the blank before the point and the thousands' commas of `old`."""
    decimals = len(old.partition(".")[2])
    whole, part = divmod(int(value * 10**decimals), 10**decimals)
    text = f"{whole:,}" if "," in old else str(whole)
    point = " ." if " ." in old else "."
    return f"{text}{point}{part:0{decimals}}" if decimals else text


def _cased(word: str, old: str) -> str:
    return word.capitalize() if old[0].isupper() else word


def _near(number: re.Match, value: Fraction) -> Iterator[Fraction]:
    """Other values that the number's form can hold, the nearest first."""
    if number["word"]:
        yield from sorted((Fraction(v) for v in range(100) if v != value), key=lambda v: abs(v - value))
        return
    if number["top"] or number["over"]:
        # 40/2 stands for 20, and moves to another integer; 3/4 moves by fourths.
        step = (
            Fraction(1) if value.denominator == 1 else Fraction(1, int(number["bottom"] or number["under"]))
        )
    else:
        decimals = number["point"].partition(".")[2] if number["point"] else ""
        step = Fraction(1, 10 ** len(decimals.rstrip("0")))
    for distance in NEARBY:
        for moved in (value - distance * step, value + distance * step):
            if moved >= 0:
                yield moved


def _results(text: str, value: Fraction) -> list[re.Match]:
    """The last "= value" of a text and the mentions of the value after it."""
    mentions = [
        m
        for m in re.finditer(r"(?<![\w.,])\d+(?:,\d{3})*(?: ?\.\d+)?(?![\d]|[.,]\d)", text)
        if Fraction(m[0].replace(",", "").replace(" ", "")) == value
    ]
    computed = [m for m in mentions if re.search(r"=\s*-?\$?$", text[: m.start()])]
    return [m for m in mentions if m.start() >= computed[-1].start()] if computed else []
