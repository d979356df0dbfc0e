r"""The answer of a completion in a normal form: samples with one form gave one answer (maj@k).

1. The answer is what the completion states (the last `\boxed{..}`, `#### x`, "the answer is x"), else its last
   number.
2. Layout goes: `$`, white space, `\left`, `\,`, `\text{..}` around words, thousands separators, `x =`.
3. A number is written as a fraction in lowest terms: 0.5, 1/2 and \frac{1}{2} are one answer.

Two different forms may be equal as mathematics (x+1, 1+x): they are then counted apart, for all models alike.
Neither the reference nor any verdict is looked at, or correct answers would find each other more easily than wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction

from cooper_jax.data import answers, prompts

_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]|\\?\$|~|\s|\\\(|\\\)|\\\[|\\\]"
)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_SAYS_X = re.compile(r"[A-Za-z]=(?=[^=]+$)")
_FRACTION = re.compile(r"(-?)\\frac\{?(-?\d+)\}?\{?(\d+)\}?|(-?)(\d+)/(\d+)")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
LONGEST = 200  # characters of an answer that are compared, and digits of a number at most


def normalise_completion(completion: str) -> str | None:
    """The normal form; None where nothing is an answer."""
    said = prompts.extract_answer(completion)
    if said is None:
        numbers = answers.NUMBER.findall(completion)
        said = numbers[-1] if numbers else None
    return None if said is None else normalise_answer(said) or None


def normalise_answer(answer: str) -> str:
    """Of one answer as text; "" where nothing is left of it."""
    text = answers.clean_reference(answer[:LONGEST])
    text = _WORDS.sub(lambda m: m[1].lower(), text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", _LAYOUT.sub("", text)).rstrip(".,;*")
    text = _SAYS_X.sub("", text) if _SAYS_X.match(text) else text
    if found := _FRACTION.fullmatch(text):
        sign, top, below = found.groups()[:3] if found[2] else found.groups()[3:]
        return str(Fraction(int(sign + "1") * int(top), int(below))) if int(below) else text
    if _DECIMAL.fullmatch(text):
        return str(Fraction(text))
    return text
