r"""Questions and answers as published -> as the models and the rule verifier read them.

A reference leaves here as the body of one formula, which math-verify reads as `\boxed{reference}`:

  1. Left-overs of the page go: `\noindent`, `\end{problem}`, a closing `\\`, a full stop.
  2. `$` signs go; words that stood between formulas move into `\text{}`.  An answer that is only words
     (`Yes`, `D`) stays bare.
  3. Numbers lose currency signs and thousands separators (`\$32,\!348` -> `32348`); `%` becomes `\%`.
  4. Several answers are joined by a comma and a blank (`69, 84`), which math-verify compares as a set; the
     blank matters, for it reads `221,8` as one number.  Tuples, intervals and matrices keep their brackets.
  5. A unit stays where the data has it.  Where it has a column of its own (OlympiadBench), it is appended to
     each answer: `\frac{41}{12} \text{ km}`, `4.2\%`.  math-verify looks past units, but not past percent signs.

Everything is a pure function from text to text.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")  # as text has them
_LAYOUT = re.compile(r"(?:\s|\\noindent(?![A-Za-z])|\\end\{problem\}|\\\\|\\quad(?![A-Za-z]))+")
_DOLLAR = re.compile(r"(?<!\\)\$+")
_CONJUNCTION = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*")
_CURRENCY = re.compile(r"^(-?)\\?\$\s*(?=[\d.])")
_SEPARATOR = r"(?:,\\!\s?|\{,\}|,)"
_GROUPED = re.compile(rf"^-?\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?![\d,])")
_COUNTED = re.compile(r"^(-?\d[\d.]*)\s*([A-Za-z]{2,}(?: [A-Za-z]+)*)$")  # 13.45 years
_UNIT = re.compile(r"([A-Za-z][A-Za-z/ ]*)(\^.+)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_INSTRUCTION = re.compile(r"\n[^\n]*\\boxed\{\}[^\n]*\s*$")


def clean_question(text: str) -> str:
    r"""A question without its page layout: `\noindent` anywhere, `\end{problem}` and `\\` at the end."""
    text = re.sub(r"\\noindent(?![A-Za-z])[ \t]*", "", text)
    return _strip_layout(text)


def strip_instruction(text: str) -> str:
    r"""A prompt without a last line that asks for `\boxed{}`: the prompt template adds the configured one."""
    return _INSTRUCTION.sub("", text).strip()


def clean_reference(text: str, *, several: bool = False, prose: bool = False) -> str:
    r"""A published answer as the body of one formula (see the module).

    several: the data says that there is more than one answer, so no comma separates thousands.
    prose: what stands outside `$` is words: `4ft` is a length (in a formula, `4xy` is a product).
    """
    text = _without_dollars(_without_stop(_strip_layout(text)))
    text = _CURRENCY.sub(r"\1", _without_stop(_strip_layout(text)))
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    if not several:
        text = _GROUPED.sub(lambda m: re.sub(_SEPARATOR, "", m.group()), text)
    if prose and (counted := _COUNTED.match(text)):
        text = rf"{counted[1]} \text{{ {counted[2]}}}"
    return ", ".join(split_top_level(text))


def join_answers(answers: Sequence[str], unit: str = "", *, several: bool = False) -> str:
    """A list of answers, each of which may hold several, as one reference with the unit on each."""
    parts = [
        p for a in answers for p in split_top_level(clean_reference(a, several=several or len(answers) > 1))
    ]
    return ", ".join(_with_unit(p, unit) for p in parts)


def format_number(value: int | float | str) -> str:
    """A JSON number, or a string that holds one, without exponent: 145.0 -> "145", 0.50 -> "0.5".

    Raises ValueError for what is no finite number.
    """
    text = str(value).strip().replace(",", "")
    try:
        parsed = Decimal(text)
        finite = parsed.is_finite() and abs(parsed.adjusted()) < 400
    except InvalidOperation:
        finite = False
    if isinstance(value, bool) or not finite:
        raise ValueError(f"{value!r} is no number")
    return str(int(parsed)) if parsed == parsed.to_integral_value() else f"{parsed.normalize():f}"


def split_gsm8k_answer(answer: str) -> tuple[str, str]:
    r"""GSM8K's answer field, a worked solution and `#### N` -> (reference, solution).

    The solution loses the calculator marks `<<..>>` and ends as the policy is asked to end, in `\boxed{N}`.
    Raises ValueError unless exactly one `####` follows some text.
    """
    worked, mark, final = answer.partition("####")
    if not mark or "####" in final:
        raise ValueError(f"the answer has {answer.count('####')} '####' marks, not 1")
    final = clean_reference(final)
    worked = _CALCULATOR.sub("", worked).strip()
    return final, f"{worked}\nThe final answer is \\boxed{{{final}}}.".lstrip()


def split_top_level(text: str) -> list[str]:
    r"""Split at the commas outside all brackets: `(1,2), x` -> [`(1,2)`, `x`].

    One part where the brackets do not close in order, as in `]0,1[`.  `\,` is a space, not a comma.
    """
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return [text]
        if char == "," and depth == 0 and text[i - 1 : i] != "\\":
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p] if depth == 0 else [text]


def _strip_layout(text: str) -> str:
    """Without page layout at either end.  A `\\` inside, as in a matrix, stays."""
    start = m.end() if (m := _LAYOUT.match(text)) else 0
    end = len(text)
    for m in _LAYOUT.finditer(text, start):
        if m.end() == len(text):
            end = m.start()
    return text[start:end]


def _without_stop(text: str) -> str:
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _without_dollars(text: str) -> str:
    """Formulas in `$` and the words between them as one formula."""
    pieces = _DOLLAR.split(text)
    if len(pieces) % 2 == 0:  # a `$` too many or too few: nothing says which, so what is left is one formula
        return "".join(pieces)
    if len(pieces) == 1:
        return text
    out = []
    for i, piece in enumerate(pieces):
        if i % 2:
            out.append(piece.strip())
        elif not piece.strip():
            continue
        elif _CONJUNCTION.fullmatch(piece):
            out.append(", ")
        elif re.search(r"[A-Za-z]{2}", piece) and "\\" not in piece:
            out.append(rf"\text{{{piece}}}")
        else:
            out.append(piece)
    return "".join(out)


def _with_unit(answer: str, unit: str) -> str:
    unit = unit.strip().strip("$").strip()
    if not unit:
        return answer
    if unit == "%":
        return rf"{answer}\%"
    if words := _UNIT.fullmatch(unit):
        return rf"{answer} \text{{ {words[1].strip()}}}{words[2] or ''}"
    return answer + unit  # a formula, such as ^{\circ}
