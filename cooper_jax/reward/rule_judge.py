"""The verdict of the rule on one (reference, completion) pair.

1. `find_answer` finds the answer that the completion marks: the last balanced `\\boxed{..}`, wherever it stands;
   else the last of `#### ..`, `.. # ..` within a line, "answer is ..", "answer: .." and lines "A: ..".  Where
   nothing is marked, math-verify's own extraction reads the last expression.
2. `read` parses answer and reference into a `Form`: a number, an expression, a collection (set, tuple, interval,
   matrix), a relation, a choice letter, or what cannot be compared (words, unparseable LaTeX).
3. `judge` asks math-verify whether they are equal.  Its "no" is no evidence, for it also says no to whatever it
   fails on: WRONG needs `differ` besides, which shows the inequality by itself.  The rest is UNRECOGNISED.

Departure from the paper, which takes math-verify's no for a wrong answer: see step 3.

This file runs in the worker processes, without jax: it imports nothing of this project.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

CORRECT, WRONG, NO_ANSWER, UNRECOGNISED = "correct", "wrong", "no_answer", "unrecognised"
# Characters at the end in which an unmarked answer is looked for: math-verify's regular expressions are slow.
TAIL = 2000

# --- 1. where the answer stands ----------------------------------------------------------------------------

_HASHES = re.compile(r"(?:####|(?<=\S[ \t])#(?=[ \t]))[ \t]*(\S[^\n]*)")
_SAID = re.compile(
    r"(?:\banswer\b[\"*]*(?:[ \t]+to[^.:\n]{0,60})?[ \t]*(?:\bis\b[ \t]*:?|[:=])|^[ \t]*A:)[*\s]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|,?\s+(?:because|since|which|so|as|hence|therefore)\b")
_NUMBER_WORDS = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|half)\b",
    re.IGNORECASE,
)


def find_answer(text: str) -> tuple[int, int] | None:
    """The span [start, end) of the answer that `text` marks, or None where it marks none.

    A boxed answer wins over everything after it.  The span may be empty (`\\boxed{}`).
    """
    for opened in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(opened.end(), len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return opened.end(), i
    found = max(
        (m for p in (_HASHES, _SAID) for m in p.finditer(text)), key=lambda m: m.start(1), default=None
    )
    if found is None:
        return None
    start, end = found.span(1)
    if found.re is _SAID and (cut := _SENTENCE_END.search(text, start, end)):
        end = cut.start()
    return start, start + len(text[start:end].rstrip())


# --- 2. what it says ---------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Za-z]{2,}")
_MATHS_WORDS = frozenset(
    "sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp mod gcd lcm max min "
    "and or in".split()
)
_LETTER = re.compile(r"(?i:(?:option|choice)\s+)?\(?([A-H])(?:\)(?:\s.*)?|\.\s.*)?", re.DOTALL)
_NUMERAL = r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?"
_WITH_UNIT = re.compile(rf"({_NUMERAL})[\s-]*([A-Za-z][A-Za-z\s./^²³0-9]*)")
# A number in LaTeX, and behind it a unit that is marked as text: \frac{41}{12} \text{ km/h}, \text{cm}^2.
_LATEX_NUMBER = r"(?:[-+\d.,{}()^*/\s]|\\[dt]?frac|\\sqrt|\\pi|\\cdot)+"  # one way to match: linear time
_MARKED_UNIT = re.compile(
    rf"({_LATEX_NUMBER})\\(?:text|mathrm|mbox)\s*\{{\s*([A-Za-z][A-Za-z\s./]*)\}}((?:\^\{{?\d\}}?)?)"
)
_EQUATION = re.compile(
    r"(?:^|=)(?=[^=]*[a-z])(?=[^=]*[-+^])[^=]+=\s*0\s*$"
)  # x^2 + y = 0 is none that answers 0
# Letters that are a product, which would otherwise be taken for a word or a unit: 6xy, and c in ce^x.
_PRODUCT = re.compile(
    r"(?<![A-Za-z\\])(?<!_\{)(?:[xyz]{2,3}|ab|bc|ac|abc|mn|pq|[A-Za-z]e(?=\s*\^))(?![A-Za-z])"
)
_CAPITALS = re.compile(r"(?<![A-Za-z\\])(?<!_\{)[A-Z]{2}(?![A-Za-z])")
_MEASURES = {  # written out in several ways
    word: line.split()[0]
    for line in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
        "inch inches in", "foot feet ft", "yard yd", "mile mi", "mg milligram", "g gram", "kg kilogram",
        "pound lb", "ounce oz", "second sec s", "minute min", "hour hr h", "day", "week", "month", "year yr",
        "cent", "dollar", "degree", "radian", "ml milliliter millilitre", "l liter litre", "km/h kph", "mph", "m/s",
    )
    for word in line.split()
}  # fmt: skip
_COMMAND = re.compile(r"\\(?:begin|end)\{[A-Za-z*]+\}|\\[A-Za-z]+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class Form:
    """An answer as read.  `kind`: number, expression, collection, relation, letter, words, opaque or empty."""

    kind: str
    text: str
    value: Any = None  # a sympy object for the first four kinds
    unit: str = ""  # words after the number, lower case
    decimals: int = 0  # digits after the point, where the text is a decimal number

    @property
    def comparable(self) -> bool:
        return self.kind in ("number", "expression", "collection", "relation", "letter")


def tidy(answer: str) -> str:
    """Strips what stands around an answer, and writes numbers so that math-verify reads them."""
    s = answer.strip().strip("\"'`*").strip()
    if "\\\\" in s and "\\begin" not in s:
        s = s.replace("\\\\", "\\")  # LaTeX inside JSON
    for _ in range(2):
        s = s.rstrip(" .,;:\"'*\n\t}" if s.count("}") > s.count("{") else " .,;:\"'*\n\t")
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if s.startswith(left) and s.endswith(right) and len(s) >= len(left) + len(right):
                s = s[len(left) : -len(right)].strip()
    s = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])|π", r"\\pi ", s).replace("∞", r"\infty ").strip()
    s = re.sub(r"(?:√|(?<![A-Za-z\\])sqrt)\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", s)
    s = re.sub(
        r"_\{?\\(max|min)\s*(?:\}|(?![A-Za-z]))", r"_{\1}", s
    )  # math-verify reads m_{\max} as a function
    s = re.sub(r"(?<=\d)\s+(?=\.\d)", "", s)  # 20 .0
    while (
        joined := re.sub(r"(?<![\d.])(\d{1,3}(?:,\d{3})*)(?:\\[,; !]|~| |\{,\})+,?(?=\d{3}(?!\d))", r"\1,", s)
    ) != s:
        s = joined  # 10\,000
    s = re.sub(r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}", s)  # 2 1/2
    return re.sub(r"(?<=\d)[eE]([-+]?\d+)\b", r" \\cdot 10^{\1}", s)  # 1.5e3


def read(answer: str) -> Form:
    """Parses one answer, a reference or a completion's, by the same rules."""
    s = tidy(answer)
    if not s:
        return Form("empty", s)
    plain = _TEXT.sub(r" \1 ", s).strip()
    if _LETTER.fullmatch(plain):
        return Form("letter", _LETTER.fullmatch(plain)[1])
    if "\\text" not in s and s == plain:
        s = plain = _products(s)
    # One number and words behind it is that number; words anywhere else cannot be compared.
    unit, rest = "", plain
    if found := _WITH_UNIT.fullmatch(re.sub(r"\\([$%, ])", r"\1", plain)):
        if _WORD.search(found[2]) and not re.search(r"\s\d|\b(?:and|or|to|if|when)\b", found[2]):
            rest, unit = found[1], " ".join(found[2].lower().split())
    elif (found := _MARKED_UNIT.fullmatch(s)) and re.search(r"\d|\\pi", found[1]):
        rest, unit = found[1].strip(), " ".join((found[2] + found[3]).lower().split())
    words = [w for w in _WORD.findall(_COMMAND.sub(" ", rest)) if w.lower() not in _MATHS_WORDS]
    if words:
        return Form("words", " ".join(plain.lower().split()))
    value = parse(rest if unit else s)
    if value is None:
        return Form("opaque", s)
    decimal = re.fullmatch(r"[-+$\\]*[\d,]*\.(\d+)\D*", rest)
    return Form(kind_of(value), s, value, unit, len(decimal[1]) if decimal else 0)


def _products(text: str) -> str:
    """Letters that stand for a product, multiplied: 6xy -> 6x \\cdot y."""
    text = _PRODUCT.sub(lambda m: " \\cdot ".join(m[0]), text)
    if not re.search(r"[-+*/^=]", text):  # two capitals alone are a name, or a time of the day
        return text
    return _CAPITALS.sub(lambda m: " \\cdot ".join(m[0]), text)


def parse(latex: str) -> Any | None:
    """math-verify's reading of one answer; None where it has none.  Its own timeouts are off: they need SIGALRM."""
    import sympy
    from math_verify import parse as parse_text

    values = parse_text(f"\\boxed{{{latex}}}", parsing_timeout=None, fallback_mode="no_fallback")
    value = values[0] if values else None
    if latex.strip().startswith("[") and isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        return sympy.Tuple(*value.args, *value.args)  # [3,3] is a pair; as an interval it would be equal to 3
    return value


def kind_of(value: Any) -> str:
    import sympy

    if isinstance(value, sympy.Set | sympy.Tuple | sympy.MatrixBase):
        return "collection"
    if isinstance(value, sympy.core.relational.Relational | sympy.logic.boolalg.Boolean):
        return "relation"
    if not isinstance(value, sympy.Expr):
        return "opaque"
    return "expression" if value.free_symbols else "number"


def last_expression(text: str) -> Form:
    """The last expression at the end of a text that marks no answer; empty where there is none."""
    from math_verify import parse as parse_text

    values = parse_text(text[-TAIL:], parsing_timeout=None, fallback_mode="first_match")
    if not values:
        return Form("words" if _NUMBER_WORDS.search(text[-TAIL:]) else "empty", "")
    text_of = values[-1] if isinstance(values[-1], str) else ""
    if isinstance(values[0], str) or _EQUATION.search(text_of):
        return Form("opaque", text_of)
    form = read(text_of)
    return form if form.kind in ("letter", "words") else Form(kind_of(values[0]), text_of, values[0])


# --- 3. whether they are equal -----------------------------------------------------------------------------


def judge(reference: str, completion: str) -> str:
    """The verdict on one completion; see the module's docstring."""
    from math_verify import verify

    span = find_answer(reference)
    gold = read(reference[slice(*span)] if span else reference)
    if not completion.strip():
        return NO_ANSWER
    span = find_answer(completion)
    if span is None and re.search(r"\\boxed\s*\{", completion):
        return UNRECOGNISED  # the box was never closed
    answer = read(completion[slice(*span)]) if span else last_expression(completion)
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
    return WRONG if differ(gold, answer) else UNRECOGNISED


def _yes_or_no(words: str) -> str:
    """The yes or no that a sentence begins with; "" for others."""
    found = re.match(r"(yes|no)(?:[,.;:]|$)", words)
    return found[1] if found else ""


def _mentions(completion: str, gold: Form) -> bool:
    """Whether the last line holds the reference among its numbers."""
    line = completion.strip().splitlines()[-1]
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)
    return any(not differ(gold, read(number)) for number in numbers)


def differ(gold: Form, answer: Form) -> bool:
    """Whether two forms are shown to be unequal.  False means "not shown", never "equal"."""
    a, b = _bare(gold.value), _bare(answer.value)
    if "relation" in (kind_of(a), kind_of(b)):
        return False
    places = [form.decimals for form in (gold, answer) if form.decimals]
    if places and kind_of(a) == kind_of(b) == "number":
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

    kinds = (kind_of(a), kind_of(b))
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
