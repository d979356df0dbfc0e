"""Words in answers: numbers in words, words that change what a number says, and words that exclude each other.

This module imports nothing from this project.
"""

from __future__ import annotations

import re
from fractions import Fraction

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {word: i for i, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
SCALES = {
    "dozen": 12, "dozens": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "万": 10**4, "亿": 10**8,
}  # fmt: skip
_LARGE = {word: scale for word, scale in SCALES.items() if scale >= 1000}

# After or before a number, these deny it, bound it, hedge it, or continue it into another number.
CHANGING = frozenset(
    """not no never isn't neither nor none without except but however yet although though maybe perhaps possibly
    probably likely unlikely approximately approx about around roughly nearly almost circa estimated estimate
    more less fewer greater smaller larger bigger higher lower least most minimum maximum max min over under
    above below beyond exceeding up between from to or either and plus minus times multiplied divided by than
    squared cubed square-root root power factorial halves half thirds third quarter quarters fourths fifth fifths
    sixths tenth tenths hundredth hundredths thousandth thousandths th st nd rd double twice triple thrice fold
    mod modulo remainder base if when unless where for some any infinite infinitely something unknown wrong
    incorrect false impossible short off away another other others different except instead rather actually wait
    sorry correction should would could might may can't cannot can ratio score gross dozen dozens hundred hundreds
    thousand thousands million millions billion billions trillion trillions percent percentage pct points
    ish negative""".split()
)

_DENYING = frozenset(
    "not no never isn't wrong incorrect approximately approx about around nearly almost".split()
)

_EXCLUSIVE = (
    ("yes", "no"), ("true", "false"), ("even", "odd"), ("positive", "negative"), ("convergent", "divergent"),
    ("converges", "diverges"), ("increasing", "decreasing"), ("odd", "even"),
    ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
     "december"),
    ("north", "south", "east", "west"),
)  # fmt: skip
_NO_SOLUTION = frozenset(
    """no solution|no solutions|no real solution|no real solutions|there is no solution|there are no solutions|
    no such solution|no roots|no real roots|empty set|the empty set|无解""".replace("\n", "")
    .replace("    ", "")
    .split("|")
)
# References that say that an answer is elsewhere.
_PLACEHOLDERS = frozenset(
    """proof|see proof|proof given|see solution|see above|see explanation|see the solution|n/a|na|null|none given|
    answers vary|answers may vary|varies|not available|omitted|todo|tbd|-|?|...""".replace("\n", "")
    .replace("    ", "")
    .split("|")
)


def read_number_words(text: str) -> int | None:
    """The value of an English numeral, such as "twenty-one thousand and five"; None for anything else."""
    words = [w for w in re.split(r"[\s-]+", text.lower()) if w]
    total, current, last = 0, 0, ""
    for word in words:
        if word == "and" and last in SCALES:
            continue
        if word in _VALUES:
            # "twenty five" is one number, "five six" is not.
            if last in _VALUES and not (last in _TENS and _VALUES[word] < 10 and _VALUES[word] > 0):
                return None
            current += _VALUES[word]
        elif word in ("hundred", "dozen") and current:
            current *= SCALES[word]
        elif word in _LARGE and current:
            total, current = total + current * SCALES[word], 0
        else:
            return None
        last = word
    return total + current if last and last != "and" else None


def find_scale(word: str) -> Fraction | None:
    """The factor by which a word after a number multiplies it, as in "3 dozen"; None for other words."""
    scale = SCALES.get(word.lower())
    return None if scale is None else Fraction(scale)


def changes_number(words: str) -> bool:
    """True if words beside a number deny, bound, hedge or continue it, so that they are no unit."""
    return any(word in CHANGING for word in re.findall(r"[a-z][a-z'-]*", words.lower()))


def denies(name: str) -> bool:
    """True if the words on the left side of an equation deny or hedge it: "not = 5"."""
    return bool(set(re.findall(r"[a-z']+", name.lower())) & _DENYING)


def means_no_solution(words: str) -> bool:
    return words.lower().strip() in _NO_SOLUTION


def is_placeholder(text: str) -> bool:
    """True for a reference that states no answer, such as "proof"."""
    return text.lower().strip(" .") in _PLACEHOLDERS


def are_exclusive(first: str, second: str) -> bool:
    """True for two words of which at most one can be right, such as two days of the week."""
    return first != second and any(first in words and second in words for words in _EXCLUSIVE)


def find_decision(words: str) -> str:
    """The yes, no, true or false with which a sentence begins, as in "Yes, it is."; "" if it hedges or has none."""
    match = re.match(r"(yes|no|true|false)(?:[,.;:](.*))?$", words.lower(), re.DOTALL)
    if match is None:
        return ""
    denied = {"but", "however", "or", "maybe", "perhaps", "although", "yet", "except", "unless"}
    opposites = {"yes": {"no", "not"}, "no": {"yes"}, "true": {"false", "not"}, "false": {"true"}}
    rest = set(re.findall(r"[a-z]+", match[2] or ""))
    return "" if rest & (denied | opposites[match[1]]) else match[1]
