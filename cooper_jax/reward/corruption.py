"""Random corruption of a solution's answer: "14 + 6 = 20 #### 20" becomes "14 + 6 = 22 #### 22".

1. The answer is where `find_answer` finds it, else the text's last number.
2. Its number (integer, decimal, fraction, number word; a unit stays) is replaced by a nearby value.  The new
   text has the length of the old one, so neither length nor layout tells which member of a pair is which.
3. Where the solution computed that value ("= 20" before the answer), the last such result and all its later
   mentions are replaced as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from cooper_jax.rule.answer_parser import find_answer

NEARBY = (1, 2, 3, 4, 5, 6, 8, 10, 20)  # distances from the number, in units of its last or its first digit
CHOICES = 6  # the nearest candidates, one of which is drawn

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _list_number_words() -> list[str]:
    """The words of 0 .. 99, in order."""
    words = list(_UNITS)
    for ten in _TENS:
        words.append(ten)
        words += [f"{ten}-{unit}" for unit in _UNITS[1:10]]
    return words


_WORDS = _list_number_words()
_VALUES = {word: value for value, word in enumerate(_WORDS)}

# Groups: a LaTeX fraction (top, bottom), a plain fraction (over, under), a decimal number (plain, point), a
# word.
_NUMBER = re.compile(
    r"\\d?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?<![\w.])(?P<over>\d+)(?P<slash> ?/ ?)(?P<under>\d+)(?![\d.])"
    r"|(?P<plain>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<point> ?\.\d+)?"
    rf"|\b(?P<word>(?:{'|'.join(_TENS)})-(?:{'|'.join(_UNITS[1:10])})|{'|'.join(_UNITS + _TENS)})\b",
    re.IGNORECASE,
)


def corrupt_answer(text: str, rng: np.random.Generator) -> str | None:
    """`text` with another answer; None where its answer holds no number.

    Raises ValueError for integers of over 4,300 digits, which Python does not parse.
    """
    number = _find_number(text, rng)
    if number is None:
        return None

    # A value of another length would tell which member of a pair is the negative.
    value, write = _parse_number(number)
    mentions = _find_result_mentions(text[: number.start()], value)
    candidates = [v for v in _iterate_nearby(number, value) if len(write(v)) == len(number[0])]

    # The computed result should keep its length as well: 99 + 1 = 100 is written 1 digit longer.
    same_length = []
    for candidate in candidates:
        if all(len(_format_like(old[0], candidate)) == len(old[0]) for old in mentions):
            same_length.append(candidate)
    candidates = (same_length or candidates)[:CHOICES]
    if not candidates:
        return None
    new_value = candidates[rng.integers(len(candidates))]

    # From the end, so that earlier positions stay valid.
    edits = [(old.start(), old.end(), _format_like(old[0], new_value)) for old in mentions]
    edits.append((number.start(), number.end(), write(new_value)))
    for start, end, replacement in reversed(edits):
        text = text[:start] + replacement + text[end:]
    return text


def _find_number(text: str, rng: np.random.Generator) -> re.Match | None:
    """The number to replace: a random one of the marked answer, else the text's last; None without one."""
    span = find_answer(text)
    numbers = _NUMBER.finditer(text, *span) if span else _NUMBER.finditer(text)
    found = [m for m in numbers if int(m["bottom"] or m["under"] or 1)]  # no fraction over 0
    if not found:
        return None
    if span is None:
        return found[-1]
    if len(found) == 1:  # without a random draw
        return found[0]
    return found[rng.integers(len(found))]


def _parse_number(number: re.Match) -> tuple[Fraction, Callable[[Fraction], str]]:
    """A number's value, and a function that writes another value in the same form."""
    if number["word"]:
        value = Fraction(_VALUES[number["word"].lower()])
        return value, lambda v: _copy_case(_WORDS[int(v)], number["word"])
    for top, bottom in (("top", "bottom"), ("over", "under")):
        if number[top]:
            value = Fraction(int(number[top]), int(number[bottom]))
            return value, lambda v, top=top, bottom=bottom: _format_fraction(number, top, bottom, v)
    value = Fraction(number[0].replace(",", "").replace(" ", ""))
    return value, lambda v: _format_like(number[0], v)


def _format_fraction(number: re.Match, top: str, bottom: str, value: Fraction) -> str:
    """The fraction's text with the numerator that gives `value` over the same denominator."""
    start, end = (place - number.start() for place in number.span(top))
    return f"{number[0][:start]}{int(value * int(number[bottom]))}{number[0][end:]}"


def _format_like(old: str, value: Fraction) -> str:
    """`value` with the decimals, the space before the point and the thousands separators of `old`."""
    decimals = len(old.partition(".")[2])
    whole, part = divmod(int(value * 10**decimals), 10**decimals)
    text = f"{whole:,}" if "," in old else str(whole)
    if not decimals:
        return text
    point = " ." if " ." in old else "."
    return f"{text}{point}{part:0{decimals}}"


def _copy_case(word: str, old: str) -> str:
    return word.capitalize() if old[0].isupper() else word


def _iterate_nearby(number: re.Match, value: Fraction) -> Iterator[Fraction]:
    """Other values that the number's form can hold, the nearest first."""
    if number["word"]:
        yield from sorted((Fraction(v) for v in range(100) if v != value), key=lambda v: abs(v - value))
        return

    if number["top"] or number["over"]:
        # 40/2 stands for 20 and becomes another integer; 3/4 moves by fourths.
        denominator = 1 if value.denominator == 1 else int(number["bottom"] or number["under"])
        step = Fraction(1, denominator)
    else:
        decimals = number["point"].partition(".")[2] if number["point"] else ""
        step = Fraction(1, 10 ** len(decimals.rstrip("0")))

    for distance in NEARBY:
        for candidate in (value - distance * step, value + distance * step):
            if candidate >= 0:
                yield candidate


def _find_result_mentions(text: str, value: Fraction) -> list[re.Match]:
    """The last "= value" of a text and the mentions of the value after it."""
    mentions = []
    for match in re.finditer(r"(?<![\w.,])\d+(?:,\d{3})*(?: ?\.\d+)?(?![\d]|[.,]\d)", text):
        if Fraction(match[0].replace(",", "").replace(" ", "")) == value:
            mentions.append(match)
    computed = [m for m in mentions if re.search(r"=\s*-?\$?$", text[: m.start()])]
    if not computed:
        return []
    return [m for m in mentions if m.start() >= computed[-1].start()]
