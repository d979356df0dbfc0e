"""What the rule reads: the answer that a completion or a reference gives, and what it says.

1. `find_answer` finds the answer that a text marks: the last balanced `\\boxed{..}`, wherever it stands; else the
   last of `#### ..`, `.. # ..` within a line, "answer is ..", "answer: .." and lines "A: ..".  Where nothing is
   marked, `last_expression` is math-verify's own extraction of the last expression.
2. `read` parses an answer into a `Form`: a number, an expression, a collection (set, tuple, interval, matrix), a
   relation, a choice letter, or what cannot be compared (words, unparseable LaTeX).

This file runs in the worker processes, without jax: it imports nothing of this project.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

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


def tidy_answer(answer: str) -> str:
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


def read_answer(answer: str) -> Form:
    """Parses one answer, a reference or a completion's, by the same rules."""
    s = tidy_answer(answer)
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
    value = parse_latex(rest if unit else s)
    if value is None:
        return Form("opaque", s)
    decimal = re.fullmatch(r"[-+$\\]*[\d,]*\.(\d+)\D*", rest)
    return Form(value_kind(value), s, value, unit, len(decimal[1]) if decimal else 0)


def _products(text: str) -> str:
    """Letters that stand for a product, multiplied: 6xy -> 6x \\cdot y."""
    text = _PRODUCT.sub(lambda m: " \\cdot ".join(m[0]), text)
    if not re.search(r"[-+*/^=]", text):  # two capitals alone are a name, or a time of the day
        return text
    return _CAPITALS.sub(lambda m: " \\cdot ".join(m[0]), text)


def parse_latex(latex: str) -> Any | None:
    """math-verify's reading of one answer; None where it has none.  Its own timeouts are off: they need SIGALRM."""
    import sympy
    from math_verify import parse as parse_text

    values = parse_text(f"\\boxed{{{latex}}}", parsing_timeout=None, fallback_mode="no_fallback")
    value = values[0] if values else None
    if latex.strip().startswith("[") and isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        return sympy.Tuple(*value.args, *value.args)  # [3,3] is a pair; as an interval it would be equal to 3
    return value


def value_kind(value: Any) -> str:
    import sympy

    if isinstance(value, sympy.Set | sympy.Tuple | sympy.MatrixBase):
        return "collection"
    if isinstance(value, sympy.core.relational.Relational | sympy.logic.boolalg.Boolean):
        return "relation"
    if not isinstance(value, sympy.Expr):
        return "opaque"
    return "expression" if value.free_symbols else "number"


def find_last_expression(text: str) -> Form:
    """The last expression at the end of a text that marks no answer; empty where there is none."""
    from math_verify import parse as parse_text

    values = parse_text(text[-TAIL:], parsing_timeout=None, fallback_mode="first_match")
    if not values:
        return Form("words" if _NUMBER_WORDS.search(text[-TAIL:]) else "empty", "")
    text_of = values[-1] if isinstance(values[-1], str) else ""
    if isinstance(values[0], str) or _EQUATION.search(text_of):
        return Form("opaque", text_of)
    form = read_answer(text_of)
    return form if form.kind in ("letter", "words") else Form(value_kind(values[0]), text_of, values[0])
