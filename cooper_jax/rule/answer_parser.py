"""Parsing of answers for the rule verifier: which answer a completion or a reference gives, and its value.

1. `find_answer` finds the answer that a text marks: the last balanced `\\boxed{..}`, wherever it stands; else
   the last of `#### ..`, `.. # ..` within a line, "answer is ..", "answer: .." and lines "A: ..".  Where
   nothing is marked, `find_last_expression` is math-verify's own extraction of the last expression.
2. `parse_answer` parses an answer into a `ParsedAnswer`: a number, an expression, a collection (set, tuple,
   interval, matrix), a relation, a choice letter, or something that cannot be compared (words, unparseable
   LaTeX).

This file runs in the worker processes, without jax: it imports nothing of this project.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

# An unmarked answer is looked for in so many last characters: math-verify's regular expressions are slow.
TAIL = 2000

# --- 1. the position of the answer -------------------------------------------------------------------

# "#### 5", GSM8K's mark; and "so # 5" within a line, but not a heading "# 5".
_HASH_MARK = re.compile(r"(?:####|(?<=\S[ \t])#(?=[ \t]))[ \t]*(\S[^\n]*)")
# "the answer to the question is: 5", "Answer: 5", "**answer** = 5", and lines "A: 5".
_ANSWER_PHRASE = re.compile(
    r"(?:\banswer\b[\"*]*(?:[ \t]+to[^.:\n]{0,60})?[ \t]*(?:\bis\b[ \t]*:?|[:=])|^[ \t]*A:)[*\s]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
# The answer ends where its sentence does, or where a reason begins.
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|,?\s+(?:because|since|which|so|as|hence|therefore)\b")
_NUMBER_WORDS = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
    r"|hundred|thousand|half)\b",
    re.IGNORECASE,
)


def find_answer(text: str) -> tuple[int, int] | None:
    """The span [start, end) of the answer that `text` marks, or None where it marks none.

    A boxed answer wins over everything after it.  The span may be empty (`\\boxed{}`).
    """
    # The last box that closes, by counting braces: a regular expression does not match nested ones.
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(box.end(), len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return box.end(), i

    marks = [*_HASH_MARK.finditer(text), *_ANSWER_PHRASE.finditer(text)]
    if not marks:
        return None
    last = max(marks, key=lambda m: m.start(1))
    start, end = last.span(1)
    # "the answer is 5, because ...": the sentence goes on behind the answer.
    if last.re is _ANSWER_PHRASE and (sentence_end := _SENTENCE_END.search(text, start, end)):
        end = sentence_end.start()
    return start, start + len(text[start:end].rstrip())


# --- 2. the value of the answer ----------------------------------------------------------------------

_WORD = re.compile(r"[A-Za-z]{2,}")
# Words inside formulas; an answer with any other word is prose, and cannot be compared.
_MATHS_WORDS = frozenset(
    "sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp mod gcd lcm max min "
    "and or in".split()
)
# A choice: B, (B), "option B", "B) the text of the choice".
_LETTER = re.compile(r"(?i:(?:option|choice)\s+)?\(?([A-H])(?:\)(?:\s.*)?|\.\s.*)?", re.DOTALL)
_NUMERAL = r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?"
# A number followed by words: 20 km/h, $5 per hour.
_WITH_UNIT = re.compile(rf"({_NUMERAL})[\s-]*([A-Za-z][A-Za-z\s./^²³0-9]*)")
# A number in LaTeX, followed by a unit that is marked as text: \frac{41}{12} \text{ km/h}, \text{cm}^2.
_LATEX_NUMBER = r"(?:[-+\d.,{}()^*/\s]|\\[dt]?frac|\\sqrt|\\pi|\\cdot)+"  # one way to match: linear time
_MARKED_UNIT = re.compile(
    rf"({_LATEX_NUMBER})\\(?:text|mathrm|mbox)\s*\{{\s*([A-Za-z][A-Za-z\s./]*)\}}((?:\^\{{?\d\}}?)?)"
)
# x^2 + y = 0 is an equation, not the answer 0.
_EQUATION = re.compile(r"(?:^|=)(?=[^=]*[a-z])(?=[^=]*[-+^])[^=]+=\s*0\s*$")
# Letters that are a product, which would otherwise be taken for a word or a unit: 6xy, and c in ce^x.
_PRODUCT = re.compile(
    r"(?<![A-Za-z\\])(?<!_\{)(?:[xyz]{2,3}|ab|bc|ac|abc|mn|pq|[A-Za-z]e(?=\s*\^))(?![A-Za-z])"
)
# Two capitals, a product in a formula: AB + 1.
_CAPITALS = re.compile(r"(?<![A-Za-z\\])(?<!_\{)[A-Z]{2}(?![A-Za-z])")
_COMMAND = re.compile(r"\\(?:begin|end)\{[A-Za-z*]+\}|\\[A-Za-z]+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """An answer with its kind and, where math-verify can parse it, its value."""

    kind: str  # number, expression, collection, relation, letter, words, opaque or empty
    text: str
    value: Any = None  # a sympy object for the first four kinds
    unit: str = ""  # words after the number, lower case
    decimals: int = 0  # digits after the point, where the text is a decimal number

    @property
    def comparable(self) -> bool:
        """True where its value can be compared with another's."""
        return self.kind in ("number", "expression", "collection", "relation", "letter")


def tidy_answer(answer: str) -> str:
    """The answer without surrounding punctuation and delimiters, spelled so that math-verify parses it."""
    s = answer.strip().strip("\"'`*").strip()
    if "\\\\" in s and "\\begin" not in s:
        s = s.replace("\\\\", "\\")  # LaTeX inside JSON
    # Twice: "$5.$" has a full stop inside the dollars, "$5$." behind them.
    for _ in range(2):
        s = s.rstrip(" .,;:\"'*\n\t}" if s.count("}") > s.count("{") else " .,;:\"'*\n\t")
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if s.startswith(left) and s.endswith(right) and len(s) >= len(left) + len(right):
                s = s[len(left) : -len(right)].strip()

    # Spellings of constants and roots.
    s = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])|π", r"\\pi ", s).replace("∞", r"\infty ").strip()
    s = re.sub(r"(?:√|(?<![A-Za-z\\])sqrt)\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", s)
    # math-verify reads m_{\max} as a function.
    s = re.sub(r"_\{?\\(max|min)\s*(?:\}|(?![A-Za-z]))", r"_{\1}", s)

    # Spellings of numbers.
    s = re.sub(r"(?<=\d)\s+(?=\.\d)", "", s)  # 20 .0
    before = None
    while s != before:  # 10\,000: each pass joins one group of thousands
        before = s
        s = re.sub(r"(?<![\d.])(\d{1,3}(?:,\d{3})*)(?:\\[,; !]|~| |\{,\})+,?(?=\d{3}(?!\d))", r"\1,", s)
    s = re.sub(r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}", s)  # 2 1/2
    return re.sub(r"(?<=\d)[eE]([-+]?\d+)\b", r" \\cdot 10^{\1}", s)  # 1.5e3


def parse_answer(answer: str) -> ParsedAnswer:
    """Parse one answer; references and completions follow the same rules."""
    s = tidy_answer(answer)
    if not s:
        return ParsedAnswer("empty", s)
    plain = _TEXT.sub(r" \1 ", s).strip()  # without \text{..} around words
    if letter := _LETTER.fullmatch(plain):
        return ParsedAnswer("letter", letter[1])
    if "\\text" not in s and s == plain:
        s = plain = _write_products(s)

    # A number followed by words is that number with a unit; words anywhere else cannot be compared.
    unit, rest = "", plain
    if found := _WITH_UNIT.fullmatch(re.sub(r"\\([$%, ])", r"\1", plain)):
        if _WORD.search(found[2]) and not re.search(r"\s\d|\b(?:and|or|to|if|when)\b", found[2]):
            rest, unit = found[1], " ".join(found[2].lower().split())
    elif (found := _MARKED_UNIT.fullmatch(s)) and re.search(r"\d|\\pi", found[1]):
        rest, unit = found[1].strip(), " ".join((found[2] + found[3]).lower().split())
    words = [w for w in _WORD.findall(_COMMAND.sub(" ", rest)) if w.lower() not in _MATHS_WORDS]
    if words:
        return ParsedAnswer("words", " ".join(plain.lower().split()))

    value = parse_latex(rest if unit else s)
    if value is None:
        return ParsedAnswer("opaque", s)
    decimal = re.fullmatch(r"[-+$\\]*[\d,]*\.(\d+)\D*", rest)
    decimals = len(decimal[1]) if decimal else 0
    return ParsedAnswer(classify_value(value), s, value, unit, decimals)


def _write_products(text: str) -> str:
    """The text with products of letters written out: 6xy -> 6x \\cdot y."""
    text = _PRODUCT.sub(lambda m: " \\cdot ".join(m[0]), text)
    if not re.search(r"[-+*/^=]", text):  # two capitals alone are a name, or a time of the day
        return text
    return _CAPITALS.sub(lambda m: " \\cdot ".join(m[0]), text)


def parse_latex(latex: str) -> Any | None:
    """The sympy value that math-verify gives to one answer in LaTeX; None where it gives none.

    math-verify's own timeouts are off: they need SIGALRM.
    """
    import sympy
    from math_verify import parse as parse_text

    values = parse_text(f"\\boxed{{{latex}}}", parsing_timeout=None, fallback_mode="no_fallback")
    value = values[0] if values else None
    if latex.strip().startswith("[") and isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        return sympy.Tuple(*value.args, *value.args)  # [3,3] is a pair; as an interval it would be equal to 3
    return value


def classify_value(value: Any) -> str:
    """The kind of a sympy value: collection, relation, number, expression, or opaque for anything else."""
    import sympy

    if isinstance(value, sympy.Set | sympy.Tuple | sympy.MatrixBase):
        return "collection"
    if isinstance(value, sympy.core.relational.Relational | sympy.logic.boolalg.Boolean):
        return "relation"
    if not isinstance(value, sympy.Expr):
        return "opaque"
    return "expression" if value.free_symbols else "number"


def find_last_expression(text: str) -> ParsedAnswer:
    """The last expression at the end of a text that marks no answer; kind "empty" where there is none."""
    from math_verify import parse as parse_text

    values = parse_text(text[-TAIL:], parsing_timeout=None, fallback_mode="first_match")
    if not values:
        # "twenty" may be the answer, but math-verify does not read it.
        kind = "words" if _NUMBER_WORDS.search(text[-TAIL:]) else "empty"
        return ParsedAnswer(kind, "")

    # math-verify returns the value first and the text that it parsed last.
    parsed_text = values[-1] if isinstance(values[-1], str) else ""
    if isinstance(values[0], str) or _EQUATION.search(parsed_text):
        return ParsedAnswer("opaque", parsed_text)
    answer = parse_answer(parsed_text)
    if answer.kind in ("letter", "words"):
        return answer
    return ParsedAnswer(classify_value(values[0]), parsed_text, values[0])
