"""Parsing of answers for the rule verifier: finds the answer in a completion or reference, and its value.

1. `find_answer` finds the answer that a text marks: the last balanced `\\boxed{..}` anywhere in the text;
   else the last of `#### ..`, `.. # ..` within a line, "answer is ..", "answer: .." and lines "A: ..".  If
   nothing is marked, `find_last_expression` uses math-verify's extraction of the last expression.
2. `parse_answer` parses an answer into a `ParsedAnswer`: a number, an expression, a collection (set, tuple,
   interval, matrix), a relation, a choice letter, or something that cannot be compared (words, unparseable
   LaTeX).

This module runs in the worker processes, without jax, and imports nothing from this project.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

# Number of characters at the end that are searched for an unmarked answer: math-verify's regular expressions
# are slow.
TAIL = 2000

# --- 1. the position of the answer -------------------------------------------------------------------------

# "#### 20", as in GSM8K, and "... # 20" within a line, but not a heading "# 20".
_HASH_MARK = re.compile(r"(?:####|(?<=\S[ \t])#(?=[ \t]))[ \t]*(\S[^\n]*)")
# "The answer is 20", "answer to the question: 20", or a line "A: 20".
_ANSWER_PHRASE = re.compile(
    r"(?:\banswer\b[\"*]*(?:[ \t]+to[^.:\n]{0,60})?[ \t]*(?:\bis\b[ \t]*:?|[:=])|^[ \t]*A:)[*\s]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
# End of the sentence, or a conjunction after which the answer is explained.
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|,?\s+(?:because|since|which|so|as|hence|therefore)\b")
_NUMBER_WORDS = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
    r"|hundred|thousand|half)\b",
    re.IGNORECASE,
)


def find_answer(text: str) -> tuple[int, int] | None:
    """The span [start, end) of the answer that `text` marks, or None if it marks none.

    A boxed answer has priority over all other marks, even later ones.  The span may be empty (`\\boxed{}`).
    """
    # Braces may be nested, which a regular expression cannot match: count their depth up to the closing one.
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(box.end(), len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return box.end(), i

    # The last mark counts: earlier ones may be intermediate results.
    marks = [*_HASH_MARK.finditer(text), *_ANSWER_PHRASE.finditer(text)]
    if not marks:
        return None
    last = max(marks, key=lambda m: m.start(1))
    start, end = last.span(1)

    # "the answer is 5, because ...": the explanation is not part of the answer.
    if last.re is _ANSWER_PHRASE and (sentence_end := _SENTENCE_END.search(text, start, end)):
        end = sentence_end.start()
    return start, start + len(text[start:end].rstrip())


# --- 2. the value of the answer ----------------------------------------------------------------------------

# Two or more letters are a word; one letter is a symbol.
_WORD = re.compile(r"[A-Za-z]{2,}")
# Words inside formulas; an answer with any other word is prose, which cannot be compared.
_MATHS_WORDS = frozenset(
    "sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp mod gcd lcm max min "
    "and or in".split()
)
# The letter of a multiple choice: "B", "(B)", "option B", "B) 20", "B. 20".
_LETTER = re.compile(r"(?i:(?:option|choice)\s+)?\(?([A-H])(?:\)(?:\s.*)?|\.\s.*)?", re.DOTALL)
# A number with a unit in plain text: "20 cm", "5-inch", "3/4 miles", "20 m^2".
_NUMERAL = r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?"
_WITH_UNIT = re.compile(rf"({_NUMERAL})[\s-]*([A-Za-z][A-Za-z\s./^²³0-9]*)")
# A number in LaTeX followed by a unit that is marked as text: \frac{41}{12} \text{ km/h}, 5 \text{cm}^2.
# The alternatives of the number exclude each other, so that matching takes linear time.
_LATEX_NUMBER = r"(?:[-+\d.,{}()^*/\s]|\\[dt]?frac|\\sqrt|\\pi|\\cdot)+"
_MARKED_UNIT = re.compile(
    rf"({_LATEX_NUMBER})\\(?:text|mathrm|mbox)\s*\{{\s*([A-Za-z][A-Za-z\s./]*)\}}((?:\^\{{?\d\}}?)?)"
)
# An equation such as x^2 + y = 0, of which math-verify would take only the right side, 0.
_EQUATION = re.compile(r"(?:^|=)(?=[^=]*[a-z])(?=[^=]*[-+^])[^=]+=\s*0\s*$")
# Letters that form a product but would be parsed as a word or a unit: xy in 6xy, ce in ce^x.
_PRODUCT = re.compile(
    r"(?<![A-Za-z\\])(?<!_\{)(?:[xyz]{2,3}|ab|bc|ac|abc|mn|pq|[A-Za-z]e(?=\s*\^))(?![A-Za-z])"
)
# Two capitals, a product of symbols or a name; not within a LaTeX command or a subscript.
_CAPITALS = re.compile(r"(?<![A-Za-z\\])(?<!_\{)[A-Z]{2}(?![A-Za-z])")
_COMMAND = re.compile(r"\\(?:begin|end)\{[A-Za-z*]+\}|\\[A-Za-z]+")
# LaTeX commands that only change how their argument is set.
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """An answer with its kind and, if math-verify can parse it, its value."""

    # number, expression, collection, relation: `value` is a sympy object
    # letter, words: only the texts can be compared
    # opaque: math-verify cannot parse it; empty: there is no answer
    kind: str
    text: str
    value: Any = None
    unit: str = ""  # words after the number, in lower case
    decimals: int = 0  # digits after the point, if the text is a decimal number

    @property
    def comparable(self) -> bool:
        """True if the answer can be compared with another by value, or by its letter."""
        return self.kind in ("number", "expression", "collection", "relation", "letter")


def tidy_answer(answer: str) -> str:
    """Remove surrounding punctuation and delimiters, and rewrite what math-verify would not parse."""
    s = answer.strip().strip("\"'`*").strip()
    if "\\\\" in s and "\\begin" not in s:
        s = s.replace("\\\\", "\\")  # LaTeX escaped for JSON

    # Punctuation and delimiters may be nested once, as in "$20.$.": two passes.
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
    while s != before:  # 10\,000: each pass joins one group of three digits
        before = s
        s = re.sub(r"(?<![\d.])(\d{1,3}(?:,\d{3})*)(?:\\[,; !]|~| |\{,\})+,?(?=\d{3}(?!\d))", r"\1,", s)
    s = re.sub(r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}", s)  # 2 1/2
    return re.sub(r"(?<=\d)[eE]([-+]?\d+)\b", r" \\cdot 10^{\1}", s)  # 1.5e3


def parse_answer(answer: str) -> ParsedAnswer:
    """Parse one answer, by the same rules for references and completions.

    Raises the exceptions of math-verify and sympy.
    """
    s = tidy_answer(answer)
    if not s:
        return ParsedAnswer("empty", s)

    plain = _TEXT.sub(r" \1 ", s).strip()
    if letter := _LETTER.fullmatch(plain):
        return ParsedAnswer("letter", letter[1])
    if "\\text" not in s and s == plain:
        s = plain = _write_products(s)

    # A number followed by words is that number with a unit.  Words in any other place cannot be compared.
    rest, unit = _split_unit(s, plain)
    words = [w for w in _WORD.findall(_COMMAND.sub(" ", rest)) if w.lower() not in _MATHS_WORDS]
    if words:
        return ParsedAnswer("words", " ".join(plain.lower().split()))

    # Without its unit the number is parsed from its plain text, otherwise from the LaTeX.
    value = parse_latex(rest if unit else s)
    if value is None:
        return ParsedAnswer("opaque", s)
    decimal = re.fullmatch(r"[-+$\\]*[\d,]*\.(\d+)\D*", rest)
    decimals = len(decimal[1]) if decimal else 0
    return ParsedAnswer(classify_value(value), s, value, unit, decimals)


def _split_unit(s: str, plain: str) -> tuple[str, str]:
    """(the answer without its unit, the unit in lower case); (plain, "") if the answer has no unit.

    Args:
      s: the tidied answer.
      plain: the same without commands such as \\text.
    """
    if match := _WITH_UNIT.fullmatch(re.sub(r"\\([$%, ])", r"\1", plain)):
        # "20 and 30" or "5 if x > 0" is a sentence, not a number with a unit.
        if _WORD.search(match[2]) and not re.search(r"\s\d|\b(?:and|or|to|if|when)\b", match[2]):
            return match[1], " ".join(match[2].lower().split())
    elif (match := _MARKED_UNIT.fullmatch(s)) and re.search(r"\d|\\pi", match[1]):
        return match[1].strip(), " ".join((match[2] + match[3]).lower().split())
    return plain, ""


def _write_products(text: str) -> str:
    """Write products of letters with a multiplication sign: 6xy -> 6x \\cdot y."""
    text = _PRODUCT.sub(lambda m: " \\cdot ".join(m[0]), text)
    # Without an operator, two capitals are a name or a time of day (AB, PM).
    if not re.search(r"[-+*/^=]", text):
        return text
    return _CAPITALS.sub(lambda m: " \\cdot ".join(m[0]), text)


def parse_latex(latex: str) -> Any | None:
    """The sympy value of one answer in LaTeX, as math-verify parses it; None if it cannot.

    math-verify's own timeouts are switched off, because they need SIGALRM.
    """
    # Imported here because it takes long, and the parent process only uses find_answer.
    import sympy
    from math_verify import parse as parse_text

    values = parse_text(f"\\boxed{{{latex}}}", parsing_timeout=None, fallback_mode="no_fallback")
    value = values[0] if values else None
    if latex.strip().startswith("[") and isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        # [3,3] is a pair of equal numbers; math-verify parses it as an interval, the set {3}.
        return sympy.Tuple(*value.args, *value.args)
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
    """The last expression at the end of a text that marks no answer; its kind is "empty" if there is none."""
    from math_verify import parse as parse_text

    values = parse_text(text[-TAIL:], parsing_timeout=None, fallback_mode="first_match")
    if not values:
        # "twenty" may be the answer, but math-verify does not parse number words.
        kind = "words" if _NUMBER_WORDS.search(text[-TAIL:]) else "empty"
        return ParsedAnswer(kind, "")

    # math-verify returns a list: the value first, the text that it parsed last.
    parsed_text = values[-1] if isinstance(values[-1], str) else ""
    if isinstance(values[0], str) or _EQUATION.search(parsed_text):
        return ParsedAnswer("opaque", parsed_text)

    # The kinds without a value come from our own parser; otherwise math-verify's value is used as it is.
    answer = parse_answer(parsed_text)
    if answer.kind in ("letter", "words"):
        return answer
    return ParsedAnswer(classify_value(values[0]), parsed_text, values[0])
