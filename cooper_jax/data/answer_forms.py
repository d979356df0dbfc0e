r"""Normal form of a completion's answer: samples with the same form gave the same answer (maj@k).

1. The answer is the stated one (the last `\boxed{..}`, `#### x`, "the answer is x"), or else the last number.
2. Layout is removed: `$`, white space, `\left`, `\,`, `\text{..}` around words, thousands separators, `x =`.
3. A number is written as a fraction in lowest terms: 0.5, 1/2 and \frac{1}{2} are one answer.

Different forms may be mathematically equal (x+1, 1+x); they count as different answers, for every model.
Neither the reference nor a verdict is used: otherwise correct answers would match each other more easily than
wrong ones.
"""

from __future__ import annotations

import re
from fractions import Fraction

from cooper_jax.data import answers, prompts

# LaTeX commands and characters that change the layout but not the value.
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]|\\?\$|~|\s|\\\(|\\\)|\\\[|\\\]"
)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
# The variable of `x = 5`, but not of `x = y = 5`, which is an equation.
_VARIABLE = re.compile(r"[A-Za-z]=(?=[^=]+$)")
# The forms \frac{a}{b} and a/b, with an optional sign: three groups each.
_FRACTION = re.compile(r"(-?)\\frac\{?(-?\d+)\}?\{?(\d+)\}?|(-?)(\d+)/(\d+)")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
# The rest of a longer answer is ignored, which also limits the digits of a number.
MAX_CHARACTERS = 200


def normalise_completion(completion: str) -> str | None:
    """Find a completion's answer and normalise it; None without an answer."""
    answer = prompts.extract_answer(completion)
    if answer is None:
        numbers = answers.NUMBER.findall(completion)
        answer = numbers[-1] if numbers else None
    # An answer of layout alone counts as no answer.
    if answer is None:
        return None
    return normalise_answer(answer) or None


def normalise_answer(answer: str) -> str:
    """Normalise an answer; "" if it consists of layout alone."""
    # Words lose their command but keep their content: \text{Even} becomes even.
    text = answers.clean_reference(answer[:MAX_CHARACTERS])
    text = _WORDS.sub(lambda m: m[1].lower(), text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", _LAYOUT.sub("", text)).rstrip(".,;*")
    text = _VARIABLE.sub("", text) if _VARIABLE.match(text) else text

    # \frac{a}{b} fills the first three groups, a/b the others: sign, numerator, denominator.
    if match := _FRACTION.fullmatch(text):
        sign, numerator, denominator = match.groups()[:3] if match[2] else match.groups()[3:]
        if not int(denominator):
            return text  # a division by zero has no value to compare
        return str(Fraction(int(sign + "1") * int(numerator), int(denominator)))
    if _DECIMAL.fullmatch(text):
        return str(Fraction(text))
    return text
