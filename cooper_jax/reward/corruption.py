"""Random corruption of a solution's answer: "14 + 6 = 20 #### 20" becomes "14 + 6 = 22 #### 22".

1. The answer is the span that `answer_finder.find_answer` returns; without one, it is the text's last number.
2. Its number (integer, decimal, fraction or number word; a unit is kept) is replaced by a nearby value.  The
   new text has the same length as the old one, so a reward model cannot tell the members of a pair apart by
   length or layout.
3. If the solution computes that value before the answer ("= 20"), the last such result and all later mentions
   of the value are replaced too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from cooper_jax.rule.answer_finder import find_answer

# Distances from the old value: in units of the last decimal digit, or of 1/denominator for a fraction.
NEARBY = (1, 2, 3, 4, 5, 6, 8, 10, 20)
CHOICES = 6  # the new value is drawn from this many of the nearest candidates

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _list_number_words() -> list[str]:
    """The English words for 0 to 99, in order."""
    words = list(_UNITS)
    for ten in _TENS:
        words.append(ten)
        words += [f"{ten}-{unit}" for unit in _UNITS[1:10]]
    return words


_WORDS = _list_number_words()
_VALUES = {word: value for value, word in enumerate(_WORDS)}

# Named groups of the four alternatives, in order:
#   top, bottom          a LaTeX fraction
#   over, slash, under   a plain fraction
#   plain, point         an integer or decimal number; `plain` may have thousands separators
#   word                 a number word
_NUMBER = re.compile(
    r"\\d?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?<![\w.])(?P<over>\d+)(?P<slash> ?/ ?)(?P<under>\d+)(?![\d.])"
    r"|(?P<plain>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<point> ?\.\d+)?"
    rf"|\b(?P<word>(?:{'|'.join(_TENS)})-(?:{'|'.join(_UNITS[1:10])})|{'|'.join(_UNITS + _TENS)})\b",
    re.IGNORECASE,
)


def corrupt_answer(text: str, rng: np.random.Generator) -> str | None:
    """`text` with another number as its answer; None if there is no number that can be changed.

    Raises ValueError for integers of more than 4,300 digits, which Python does not parse.
    """
    number = _find_number(text, rng)
    if number is None:
        return None

    # Only values of the same written length qualify: length must not give the negative away.
    value, write = _parse_number(number)
    mentions = _find_result_mentions(text[: number.start()], value)
    candidates = [v for v in _iterate_nearby(number, value) if len(write(v)) == len(number[0])]

    # The computed result may be written in another form than the answer (9.5 and 19/2): prefer values that
    # keep its length too.
    same_length = []
    for candidate in candidates:
        if all(len(_format_like(old[0], candidate)) == len(old[0]) for old in mentions):
            same_length.append(candidate)
    candidates = (same_length or candidates)[:CHOICES]
    if not candidates:
        return None
    new_value = candidates[rng.integers(len(candidates))]

    # Replace from the end of the text, so that the positions before an edit stay valid.
    edits = [(old.start(), old.end(), _format_like(old[0], new_value)) for old in mentions]
    edits.append((number.start(), number.end(), write(new_value)))
    for start, end, replacement in reversed(edits):
        text = text[:start] + replacement + text[end:]
    return text


def _find_number(text: str, rng: np.random.Generator) -> re.Match | None:
    """The number to replace, or None: a random number of the marked answer, else the last one of the text."""
    span = find_answer(text)
    matches = _NUMBER.finditer(text, *span) if span else _NUMBER.finditer(text)
    numbers = [m for m in matches if int(m["bottom"] or m["under"] or 1)]  # skip fractions over 0
    if not numbers:
        return None
    if span is None:
        return numbers[-1]

    # A single number takes no draw from the random stream.
    if len(numbers) == 1:
        return numbers[0]
    return numbers[rng.integers(len(numbers))]


def _parse_number(number: re.Match) -> tuple[Fraction, Callable[[Fraction], str]]:
    """A number's value, and a function that writes another value in the same form."""
    if number["word"]:
        value = Fraction(_VALUES[number["word"].lower()])
        return value, lambda v: _copy_case(_WORDS[int(v)], number["word"])

    # Fractions, \frac{3}{4} or 3/4: the denominator stays, only the numerator changes.
    for top, bottom in (("top", "bottom"), ("over", "under")):
        if number[top]:
            value = Fraction(int(number[top]), int(number[bottom]))
            return value, lambda v, top=top, bottom=bottom: _format_fraction(number, top, bottom, v)

    value = Fraction(number[0].replace(",", "").replace(" ", ""))
    return value, lambda v: _format_like(number[0], v)


def _format_fraction(number: re.Match, top: str, bottom: str, value: Fraction) -> str:
    """The matched fraction with the numerator that gives `value` over the same denominator.

    top, bottom: names of the match's groups for numerator and denominator.
    """
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
    """`word`, capitalised if `old` is."""
    return word.capitalize() if old[0].isupper() else word


def _iterate_nearby(number: re.Match, value: Fraction) -> Iterator[Fraction]:
    """Other values that the number's form can express, the nearest first; none is negative."""
    if number["word"]:
        yield from sorted((Fraction(v) for v in range(100) if v != value), key=lambda v: abs(v - value))
        return

    # The step is the smallest change that keeps the form.
    if number["top"] or number["over"]:
        # 40/2 is the integer 20 and becomes another integer; 3/4 changes in steps of 1/4.
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
    """The last "= value" in `text` and all later mentions of the value; empty if no "= value" occurs."""
    mentions = []
    for match in re.finditer(r"(?<![\w.,])\d+(?:,\d{3})*(?: ?\.\d+)?(?![\d]|[.,]\d)", text):
        if Fraction(match[0].replace(",", "").replace(" ", "")) == value:
            mentions.append(match)

    # Mentions before the last result may be inputs of the computation, which must stay consistent.
    computed = [m for m in mentions if re.search(r"=\s*-?\$?$", text[: m.start()])]
    if not computed:
        return []
    return [m for m in mentions if m.start() >= computed[-1].start()]
