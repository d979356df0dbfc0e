r"""Cleaning of published questions and answers for the models and the rule verifier.

A reference becomes the body of one formula, which the rule verifier reads as `\boxed{reference}`:

  1. Page layout is removed: `\noindent`, `\end{problem}`, a closing `\\`, a full stop.
  2. `$` signs are removed; words between formulas move into `\text{}`.  An answer of words alone (`Yes`, `D`)
     stays bare.
  3. Numbers lose currency signs and thousands separators (`\$32,\!348` -> `32348`); `%` becomes `\%`.
  4. Several answers are joined by a comma and a space (`69, 84`), which the rule compares as a set.  The
     space matters: without it, `221,800` is one number.  Tuples, intervals and matrices keep their
     brackets.
  5. A unit inside an answer stays.  A unit in a column of its own (OlympiadBench) is appended to each
     answer: `\frac{41}{12} \text{ km}`, `4.2\%`.  The rule reads units, and does not require them.

All functions in this module are pure and map text to text.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from cooper_jax.data import prompts

# A number in prose: -3, 1,000, 2.5, .5
NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")

# --- layout and formulas ---

# Remains of page layout, at either end of a text.
_LAYOUT = re.compile(r"(?:\s|\\noindent(?![A-Za-z])|\\end\{problem\}|\\\\|\\quad(?![A-Za-z]))+")
_DOLLAR = re.compile(r"(?<!\\)\$+")
# Words between formulas that only separate answers: "$4$ and $5$".
_CONJUNCTION = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*")

# --- numbers and units ---

# "$5", "\$5" and "-$5", before a digit only: "$x$" is a formula.
_CURRENCY = re.compile(r"^(-?)\\?\$\s*(?=[\d.])")
# Thousands separators: 1,000 and LaTeX's 1,\!000 and 1{,}000.
_SEPARATOR = r"(?:,\\!\s?|\{,\}|,)"
_THOUSANDS = re.compile(rf"^-?\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?![\d,])")
# A number and its unit in prose: 13.45 years.
_NUMBER_WITH_UNIT = re.compile(r"^(-?\d[\d.]*)\s*([A-Za-z]{2,}(?: [A-Za-z]+)*)$")
# A unit of words, possibly with an exponent: km/h, cm^2.
_UNIT = re.compile(r"([A-Za-z][A-Za-z/ ]*)(\^.+)?")

# --- worked solutions in place of an answer ---

# A box with braces, or with one word or number behind it.
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}$\\.,]+))")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n+")
# A line or sentence of at least so many words is one of prose.
_SENTENCE_WORDS = 3
# A text with more words is taken for a worked solution.
_MAX_ANSWER_WORDS = 30

# --- marks of single data sets ---

# GSM8K's calculator annotations: 48/2 = <<48/2=24>>24.
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
# A last line that asks for a box, as in MATH500's prompts.
_INSTRUCTION = re.compile(r"\n[^\n]*\\boxed\{\}[^\n]*\s*$")


def clean_question(text: str) -> str:
    r"""Remove a question's page layout: `\noindent` anywhere, `\end{problem}` and `\\` at the end."""
    text = re.sub(r"\\noindent(?![A-Za-z])[ \t]*", "", text)
    return _strip_layout(text)


def strip_instruction(text: str) -> str:
    r"""Remove a last line that asks for `\boxed{}`; the prompt template adds the configured instruction."""
    return _INSTRUCTION.sub("", text).strip()


def clean_reference(text: str, *, several: bool = False, prose: bool = False) -> str:
    r"""Write a published answer as the body of one formula, by the rules in the module's docstring.

    several: the data set marks the answer as several answers, so commas do not separate thousands.
    prose: text outside `$` is words: `4ft` is a length (in a formula, `4xy` is a product).
    """
    # Layout and a full stop may be outside the `$` signs and inside them.
    text = _strip_dollars(_strip_full_stop(_strip_layout(text)))
    text = _CURRENCY.sub(r"\1", _strip_full_stop(_strip_layout(text)))
    text = re.sub(r"(?<!\\)%", r"\\%", text)

    if not several:
        text = _THOUSANDS.sub(lambda m: re.sub(_SEPARATOR, "", m.group()), text)
    if prose and (quantity := _NUMBER_WITH_UNIT.match(text)):
        text = rf"{quantity[1]} \text{{ {quantity[2]}}}"
    return ", ".join(split_top_level(text))


def join_answers(answers: Sequence[str], unit: str = "", *, several: bool = False) -> str:
    """Join answers, each of which may contain several, into one reference and append the unit to each."""
    several = several or len(answers) > 1
    parts: list[str] = []
    for answer in answers:
        parts += split_top_level(clean_reference(answer, several=several))
    return ", ".join(_append_unit(part, unit) for part in parts)


def format_number(value: int | float | str | Decimal) -> str:
    """Write a JSON number, or the text of one, without an exponent: 145.0 -> "145", 0.50 -> "0.5".

    Raises ValueError for anything that is not a finite number with an exponent below 400 in size.
    """
    text = str(value).strip().replace(",", "")
    # Decimal keeps the digits of the data; a float would print 0.1 + 0.2 with its rounding error.
    try:
        number = Decimal(text)
        valid = number.is_finite() and abs(number.adjusted()) < 400
    except InvalidOperation:
        valid = False
    if isinstance(value, bool) or not valid:
        raise ValueError(f"{value!r} is not a finite number; correct it, or remove the row")

    if number == number.to_integral_value():
        return str(int(number))
    return f"{number.normalize():f}"


def split_gsm8k_answer(answer: str) -> tuple[str, str]:
    r"""Split GSM8K's answer field, a worked solution and `#### N`, into (reference, solution).

    The calculator marks `<<..>>` are removed from the solution, and `\boxed{N}` is appended, because the
    policy's responses should end with it.  Raises ValueError unless the answer has exactly one `####`.
    """
    worked, mark, final = answer.partition("####")
    if not mark or "####" in final:
        raise ValueError(f"it has {answer.count('####')} '####' marks, not 1, before the final answer")
    final = clean_reference(final)
    worked = _CALCULATOR_MARK.sub("", worked).strip()
    return final, f"{worked}\nThe final answer is \\boxed{{{final}}}.".lstrip()


def split_solution(text: str) -> tuple[str, str]:
    r"""Split the text of a reference column into (reference, worked solution).

    A short text is the reference, and the solution "".  A text that marks its answer (a `\boxed{}`, "the
    answer is") is reduced to it.  Raises ValueError for a worked solution without a mark.
    """
    stated = find_boxed(text) or prompts.extract_answer(text)
    if stated is not None:
        reference = clean_reference(stated)
        # `\boxed{5}` alone is no solution.
        is_worked = len(_list_words(text)) > len(_list_words(stated)) + 3
        return reference, text.strip() if is_worked else ""

    # Some answers are a few words; a model may judge by them although the rule cannot.
    sentences = [s for s in _SENTENCE_END.split(text) if len(_list_words(s)) >= _SENTENCE_WORDS]
    if len(sentences) > 1 or len(_list_words(text)) > _MAX_ANSWER_WORDS:
        raise ValueError(
            f"a worked solution, {text.strip()[:60]!r}..., that marks no final answer with \\boxed{{}}, #### or "
            '"the answer is": name the column of the answers with --config.data.reference_key, or keep such '
            "references whole with --config.data.reduce_solutions=False"
        )
    return clean_reference(text), ""


def find_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{..}`, `\fbox{..}` or `\boxed 5` that closes; None if there is none."""
    for box in reversed(list(_BOX.finditer(text))):
        if box[1] is not None:
            return box[1]
        end = prompts.find_closing_brace(text, box.end())
        if end is not None and (content := text[box.end() : end].strip()):
            return content
    return None


def _list_words(text: str) -> list[str]:
    """The words of a text, without LaTeX's commands and without single letters."""
    return _WORD.findall(text)


def split_top_level(text: str) -> list[str]:
    r"""Split at the commas outside all brackets: `(1,2), x` -> [`(1,2)`, `x`].

    Returns the whole text as one part where the brackets do not close in order, as in `]0,1[`.  `\,` is a
    LaTeX space, not a comma.
    """
    parts: list[str] = []
    depth, start = 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return [text]
        if char == "," and depth == 0 and text[i - 1 : i] != "\\":
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())

    if depth != 0:
        return [text]
    return [part for part in parts if part]


def _strip_layout(text: str) -> str:
    """Remove page layout at both ends.  A `\\` inside, as in a matrix, stays."""
    leading = _LAYOUT.match(text)
    start = leading.end() if leading else 0
    end = len(text)
    for layout in _LAYOUT.finditer(text, start):
        if layout.end() == len(text):
            end = layout.start()
    return text[start:end]


def _strip_full_stop(text: str) -> str:
    """Remove a full stop at the end; an ellipsis stays."""
    if text.endswith(".") and not text.endswith(".."):
        return text[:-1].rstrip()
    return text


def _strip_dollars(text: str) -> str:
    """Merge the formulas in `$` and the words between them into one formula."""
    pieces = _DOLLAR.split(text)
    # An odd number of `$` does not show which one is missing, so everything is taken for one formula.
    if len(pieces) % 2 == 0:
        return "".join(pieces)
    if len(pieces) == 1:
        return text

    # The pieces alternate: words, formula, words, ...
    formula = []
    for i, piece in enumerate(pieces):
        if i % 2:
            formula.append(piece.strip())
        elif not piece.strip():
            continue
        elif _CONJUNCTION.fullmatch(piece):
            formula.append(", ")
        # Two letters in a row are a word; one alone may be a variable, and a backslash begins a command.
        elif re.search(r"[A-Za-z]{2}", piece) and "\\" not in piece:
            formula.append(rf"\text{{{piece}}}")
        else:
            formula.append(piece)

    return "".join(formula)


def _append_unit(answer: str, unit: str) -> str:
    """Append a unit to an answer.  unit: words, a percent sign, a formula, or "" for none."""
    unit = unit.strip().strip("$").strip()
    if not unit:
        return answer
    if unit == "%":
        return rf"{answer}\%"
    if words := _UNIT.fullmatch(unit):
        return rf"{answer} \text{{ {words[1].strip()}}}{words[2] or ''}"
    return answer + unit  # a formula, such as ^{\circ}
