r"""Parsing of one answer: its kind, its value and its unit.

`parse_answer` takes an answer apart from the outside inwards: alternatives and lists, relations, brackets,
and last a formula with its unit.  Every part of the text must be understood; otherwise the answer is
`words` or `opaque`, and only its text can be compared.

The kinds of answers are in parsed_answer.py.

This module runs in the worker processes, without jax.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from cooper_jax.rule import words
from cooper_jax.rule.answer_names import find_name, require_name
from cooper_jax.rule.answer_text import make_key, normalise_text
from cooper_jax.rule.expressions import Call, Constant, Expression, Number, are_equal, find_symbols
from cooper_jax.rule.latex_parser import Unreadable, parse_formula
from cooper_jax.rule.parsed_answer import ParsedAnswer
from cooper_jax.rule.quantities import parse_quantity
from cooper_jax.rule.text_splitting import (
    encloses,
    find_depth,
    split_at_commas,
    split_at_words,
    split_relations,
)

MAX_ANSWER = 4000  # characters; a longer answer is not parsed
MAX_ITEMS = 200  # of a list
MAX_NESTING = 60  # of brackets

_LETTER = re.compile(
    r"(?i:(?:option|choice|answer) +)?(?:\(([A-H])\)(?: .*)?|([A-H])(?:[).:] ?.*)?)", re.DOTALL
)
# "(B) or (C)" hedges, but "B) x = 6 and x = -3" is one choice with its content.
_SEVERAL_LETTERS = re.compile(
    r"(?:\b(?:or|and|not)\b|[,/;&]) ?(?i:option |choice )?(?:\([A-H]\)|[A-H](?![\w(]))"
)
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_BASED = re.compile(r"([0-9A-Fa-f]+) ?_ ?\{? ?(?:\\text\{ ?)?(\d+|[a-z]+) ?\}?\}?")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))? ?((?:[ap]\.?m\.?)?)", re.IGNORECASE)
_RATIO = re.compile(r"[^:]+(?::[^:]+)+")
_INTEGERS = re.compile(r"\\mathbb ?\{? ?[ZN]\}?|\\text\{ ?integers? ?\}")
_FAMILY = re.compile(
    r"(?P<value>.*?)[,;]? ?(?:\\text\{ ?,?(?:where|for|with)?(?: (?:any|all|some|every))?(?: integers?)? ?\}|"
    r"\(|where|for(?: (?:any|all))?(?: integers?)?)? ?(?P<name>[a-z])"
    r"(?: ?\\in ?(?:\\mathbb ?\{? ?[ZN]\}?(?:\^\+)?)|"
    r"(?:\\text\{ ?| )(?:is )?(?:an? )?(?:any )?integers? ?\}?)\)?"
)


def parse_answer(answer: str) -> ParsedAnswer:
    """Parse one answer, by the same rules for references and completions."""
    s = normalise_text(answer[: MAX_ANSWER + 1])
    if not s or s in ("?", "\\ldots"):
        return ParsedAnswer("empty")
    key = make_key(s)
    if len(s) > MAX_ANSWER or find_depth(s) > MAX_NESTING:
        return ParsedAnswer("opaque", key)
    try:
        parsed = _parse_whole(s)
    except Unreadable:
        parsed = _parse_words(s)
    return dataclasses.replace(parsed, key=key)


def _parse_words(s: str) -> ParsedAnswer:
    """Prose, or a formula that cannot be read."""
    plain = " ".join(_TEXT.sub(r" \1 ", s).lower().split())
    if words.means_no_solution(plain):
        return ParsedAnswer("empty_set")
    if ("\\" not in plain and re.search(r"[^\W\d_]{2}", plain)) or words.find_decision(plain):
        return ParsedAnswer("words", name=plain)
    return ParsedAnswer("opaque")


def _parse_whole(s: str) -> ParsedAnswer:
    """An answer that may be a choice, a sentence, a list or a single answer.  Raises Unreadable."""
    plain = " ".join(_TEXT.sub(r" \1 ", s).split())
    if (letter := _LETTER.fullmatch(plain)) and not _SEVERAL_LETTERS.search(plain):
        return ParsedAnswer("letter", name=letter[1] or letter[2])
    # A numeral in words gets no verdict beside digits: problems that ask for words must not accept digits.
    if _is_word(plain) or words.read_number_words(plain) is not None:
        raise Unreadable("a word, or a sentence that begins with yes or no")
    if "\\ldots" in s:
        raise Unreadable("a sequence that goes on")
    if family := _parse_family(s):
        return family
    return parse_value(s)


def _is_word(plain: str) -> bool:
    """True for a word or phrase, and for a sentence that begins with yes, no, true or false."""
    if re.match(r"(?:yes|no|true|false)\b", plain, re.IGNORECASE):
        return True
    if re.fullmatch(r"[A-Za-z' ]+", plain) is None:
        return False
    # A run of letters with a vowel; in a phrase it may have two letters.
    shortest = 2 if " " in plain else 3
    runs = [run for run in plain.lower().split() if run not in ("pi", "sin", "cos", "tan", "exp")]
    return any(len(run) >= shortest and re.search("[aeiouy]", run) for run in runs)


def _parse_family(s: str) -> ParsedAnswer | None:
    """Solutions for all integers k; None for other answers."""
    if not _INTEGERS.search(s) and "integer" not in s:
        return None
    match = _FAMILY.fullmatch(s)
    if match is None:
        raise Unreadable("a condition on integers")
    parsed = parse_value(match["value"].strip(" ,;"))
    if parsed.kind == "assignment":
        parsed = parsed.items[0]
    items = parsed.items if parsed.kind in ("list", "set") else (parsed,)
    if any(item.kind not in ("scalar", "assignment") for item in items):
        raise Unreadable("a family of collections")
    return ParsedAnswer("family", items=items, name=match["name"])


def parse_value(s: str) -> ParsedAnswer:
    """A list, a relation, a collection, or a formula with a unit.  Raises Unreadable."""
    s = s.strip()
    if not s:
        raise Unreadable("an empty part")

    # Alternatives and lists; a comma inside a number separates thousands.
    parts = split_at_words(s)
    if len(parts) == 1:
        parts = split_at_commas(s)
    if len(parts) > 1:
        if len(parts) > MAX_ITEMS:
            raise Unreadable("too long a list")
        return _make_list([parse_value(part) for part in parts])

    # Relations.
    operands, operators = split_relations(s)
    if operators:
        return _parse_relation(operands, operators)
    if "\\pmod" in s:
        return _parse_congruence(s, "")

    if collection := _parse_collection(s):
        return collection
    if special := _parse_special(s):
        return special
    return _parse_scalar(s)


def _make_list(items: list[ParsedAnswer]) -> ParsedAnswer:
    """Several answers; intervals form a union: x < 2 or x > 3."""
    flat: list[ParsedAnswer] = []
    for item in items:
        flat += item.items if item.kind in ("list", "union") else [item]
    if all(item.kind == "interval" and not item.operator.startswith("?") for item in flat) and len(flat) > 1:
        if any(item.operator.endswith("~") for item in flat):
            return ParsedAnswer("union", items=tuple(flat))
    return ParsedAnswer("list", items=tuple(flat))


def _parse_scalar(s: str) -> ParsedAnswer:
    r"""A formula with its unit; \pm makes it two."""
    if s.count("\\pm") == 1:
        head, tail = s.split("\\pm")
        return ParsedAnswer("list", items=(_parse_scalar(f"{head}+{tail}"), _parse_scalar(f"{head}-{tail}")))
    value, unit = parse_quantity(s)
    return ParsedAnswer("scalar", value=value, unit=unit)


def _parse_special(s: str) -> ParsedAnswer | None:
    """A number with a base, a time or a ratio; None for other answers."""
    if match := _BASED.fullmatch(s):
        base = int(match[2]) if match[2].isdigit() else words.read_number_words(match[2])
        if base is None or not 2 <= base <= 16:
            raise Unreadable("a base")
        try:
            value = Number(Fraction(int(match[1], base)))
        except ValueError as error:
            raise Unreadable("digits beyond the base") from error
        return ParsedAnswer("based", value=value, name=match[1].lower(), number=base)
    if match := _CLOCK.fullmatch(_TEXT.sub(r"\1", s)):
        time = tuple(ParsedAnswer("scalar", value=Number(Fraction(part or 0))) for part in match.groups()[:3])
        return ParsedAnswer("ratio", items=time, name=(match[4] or "time").lower().replace(".", ""))
    if _RATIO.fullmatch(s) and "(" not in s:
        return ParsedAnswer("ratio", items=tuple(_parse_scalar(part) for part in s.split(":")))
    return None


# --- relations -----------------------------------------------------------------------------------------------


def _parse_relation(operands: list[str], operators: list[str]) -> ParsedAnswer:
    """An equation, an inequality, membership or a congruence.  Raises Unreadable for others."""
    if not operands[0].strip() or not operands[-1].strip():
        raise Unreadable("a relation with one side only")
    if operators == ["in"]:
        value = parse_value(operands[1])
        require_name(operands[0])
        return value if value.kind != "tuple" else _make_interval(value)
    if operators[-1] == "equiv" or "\\pmod" in operands[-1]:
        if len(operators) > 1:
            raise Unreadable("a chain of congruences")
        return _parse_congruence(operands[1], operands[0])
    if set(operators) == {"="}:
        return _parse_equation(operands)
    if set(operators) <= {"<", "<="} or set(operators) <= {">", ">="}:
        return _parse_inequality(operands, operators)
    if operators == ["!="]:
        difference = _subtract(parse_formula(operands[0]), parse_formula(operands[1]))
        return ParsedAnswer("inequality", value=difference, operator="!=")
    raise Unreadable("a relation of another kind")


def _parse_equation(operands: list[str]) -> ParsedAnswer:
    """An assignment to one name, an equation, or a calculation whose sides are all equal."""
    # Of "8 = eight" either side may be asked for, and "eight" is no name.
    if any(words.read_number_words(operand) is not None for operand in operands):
        raise Unreadable("a numeral in words on a side of an equation")
    values = [_try_value(operand) for operand in operands]
    name = find_name(operands[0])
    if name is None and (last := find_name(operands[-1])) and len(operands) == 2:
        name, values = last, values[::-1]  # 5 = x

    # x = 2 + 3 = 5: the sides must agree, or the text contradicts itself.
    computed = values[1:] if name else values
    if any(value is None for value in computed):
        raise Unreadable("a side of an equation")
    answers = [value for value in computed if value is not None]
    if name or all(_is_constant(answer) for answer in answers):
        if not all(_agree(answers[0], other) for other in answers[1:]):
            raise Unreadable("an equation that is false")
        if not name:
            return answers[-1]
        return _assign(name, answers[-1])

    if len(operands) != 2:
        raise Unreadable("a chain of equations")
    difference = _subtract(parse_formula(operands[0]), parse_formula(operands[1]))
    return ParsedAnswer("equation", value=difference)


def _agree(first: ParsedAnswer, second: ParsedAnswer) -> bool:
    """True if two sides of a calculation are proved to be equal."""
    if first.value is None or second.value is None or first.unit != second.unit:
        return False
    return are_equal(first.value, second.value) is True


def _assign(name: str, value: ParsedAnswer) -> ParsedAnswer:
    """The assignment of a value to a name; (x, y) = (1, 2) assigns each."""
    names = split_at_commas(name[1:-1]) if name.startswith("(") else []
    if names and value.kind == "tuple" and len(names) == len(value.items):
        pairs = zip(names, value.items, strict=True)
        return ParsedAnswer("list", items=tuple(_assign(n.strip(), v) for n, v in pairs), operator="ordered")
    return ParsedAnswer("assignment", name=name, items=(value,))


def _parse_inequality(operands: list[str], operators: list[str]) -> ParsedAnswer:
    """An interval where one name is bounded by numbers, otherwise an inequality."""
    if operators[0].startswith(">"):
        operands, operators = operands[::-1], [">".replace(">", o.replace(">", "<")) for o in operators[::-1]]
    named = [find_name(operand) for operand in operands]
    brackets = {"<": "()", "<=": "[]"}
    numbers = [None if name else parse_value(operand) for name, operand in zip(named, operands, strict=True)]

    low, high = (
        ParsedAnswer("scalar", value=_MINUS_INFINITY),
        ParsedAnswer("scalar", value=Constant("infinity")),
    )
    left, right, name = "(", ")", ""
    if len(operands) == 2 and bool(named[0]) != bool(named[1]):
        name = named[0] or named[1] or ""
        if named[0]:
            high, right = numbers[1] or high, brackets[operators[0]][1]
        else:
            low, left = numbers[0] or low, brackets[operators[0]][0]
    elif len(operands) == 3 and named[1] and not named[0] and not named[2]:
        name = named[1]
        low, high = numbers[0] or low, numbers[2] or high
        left, right = brackets[operators[0]][0], brackets[operators[1]][1]
    if name and low.kind == high.kind == "scalar":
        return ParsedAnswer("interval", items=(low, high), operator=left + right + "~", name=name)

    if len(operands) != 2:
        raise Unreadable("a chain of inequalities")
    difference = _subtract(parse_formula(operands[0]), parse_formula(operands[1]))
    return ParsedAnswer("inequality", value=difference, operator=operators[0])


_MINUS_INFINITY = Call("negate", (Constant("infinity"),))


def _parse_congruence(right: str, left: str) -> ParsedAnswer:
    match = re.fullmatch(r"(.*?),? ?\\pmod\{ ?(\d{1,18}) ?\} ?", right.strip())
    if match is None or int(match[2]) == 0:
        raise Unreadable("a congruence")
    if left:
        require_name(left)
    value = parse_value(match[1])
    items = value.items if value.kind == "list" else (value,)
    if any(not isinstance(item.value, Number | Call) or not _is_constant(item) for item in items):
        raise Unreadable("a congruence of something else than numbers")
    return ParsedAnswer("congruence", items=items, number=int(match[2]))


def _try_value(text: str) -> ParsedAnswer | None:
    try:
        return parse_value(text)
    except Unreadable:
        return None


def _is_constant(answer: ParsedAnswer) -> bool:
    return answer.kind == "scalar" and answer.value is not None and not find_symbols(answer.value)


def _subtract(left: Expression, right: Expression) -> Expression:
    return Call("add", (left, Call("negate", (right,))))


# --- collections ---------------------------------------------------------------------------------------------


def _parse_collection(s: str) -> ParsedAnswer | None:
    """A set, tuple, interval, union or matrix; None for other answers.  Raises Unreadable for a broken one."""
    if s in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return ParsedAnswer("empty_set")
    if re.fullmatch(r"\\mathbb ?\{?R\}?|\\text\{ ?all real numbers ?\}", s):
        ends = (
            ParsedAnswer("scalar", value=_MINUS_INFINITY),
            ParsedAnswer("scalar", value=Constant("infinity")),
        )
        return ParsedAnswer("interval", items=ends, operator="()~")
    if "\\cup" in s:
        parts = [_make_interval(parse_value(part)) for part in s.split("\\cup")]
        return ParsedAnswer("union", items=tuple(parts))
    if s.startswith("\\begin"):
        return _parse_matrix(s)
    if s.startswith("\\{") and s.endswith("\\}"):
        return _parse_set(s[2:-2].strip())
    if s.startswith("\\langle") and s.endswith("\\rangle"):
        return ParsedAnswer("tuple", items=_parse_items(s[7:-7]), operator="<>")
    if s[0] in "([" and s[-1] in ")]" and encloses(s):
        return _parse_bracketed(s)
    return None


def _parse_bracketed(s: str) -> ParsedAnswer | None:
    """A tuple or interval; None for brackets around one formula."""
    if len(split_at_commas(s[1:-1], grouped=False)) > 1:
        items = _parse_items(s[1:-1])
        if s[0] + s[-1] in ("(]", "[)"):
            if len(items) != 2:
                raise Unreadable("an interval with more than two ends")
            return ParsedAnswer("interval", items=items, operator=s[0] + s[-1] + "~")
        if s[0] == "[" and len(items) == 2:
            return ParsedAnswer("interval", items=items, operator="[]")
        return ParsedAnswer("tuple", items=items, operator=s[0] + s[-1])
    return None


def _parse_items(inner: str) -> tuple[ParsedAnswer, ...]:
    return tuple(parse_value(part) for part in split_at_commas(inner, grouped=False))


def _parse_set(inner: str) -> ParsedAnswer:
    """The elements of a set, or the condition behind `x |`."""
    if match := re.fullmatch(r"[a-z](?: ?\\in ?\\mathbb ?\{?R\}?)? ?(?:\||:)(.+)", inner):
        condition = parse_value(match[1])
        if condition.kind not in ("interval", "union"):
            raise Unreadable("a condition of a set")
        return condition
    return ParsedAnswer("set", items=_parse_items(inner))


def _make_interval(answer: ParsedAnswer) -> ParsedAnswer:
    """A pair that the context shows to be an interval."""
    if answer.kind == "tuple" and len(answer.items) == 2 and answer.operator == "()":
        return dataclasses.replace(answer, kind="interval", operator="()~")
    if answer.kind == "interval":
        return dataclasses.replace(answer, operator=answer.operator[:2] + "~")
    if answer.kind in ("set", "union", "empty_set"):
        return answer
    raise Unreadable("a union of something else than intervals")


def _parse_matrix(s: str) -> ParsedAnswer:
    match = re.fullmatch(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", s, re.DOTALL)
    if match is None or "\\begin" in match[2]:
        raise Unreadable("an environment")
    rows = [row.split("&") for row in match[2].strip().removesuffix("\\\\").split("\\\\")]
    if len({len(row) for row in rows}) != 1:
        raise Unreadable("rows of different lengths")
    items = tuple(parse_value(cell) for row in rows for cell in row)
    return ParsedAnswer("matrix", items=items, number=len(rows[0]))
