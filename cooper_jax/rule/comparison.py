"""Comparison of two parsed answers: equal, unequal, or not decided.

`compare_answers` returns True or False only with a proof.  None means that neither is proved: the answers
may be one value in two forms that the parser does not connect, or a rounding, or the same number of
different things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import mpmath

from cooper_jax.rule import expressions, words
from cooper_jax.rule.expressions import Call, Number, Symbol
from cooper_jax.rule.number_comparison import compare_scalars, compare_values, evaluate_number, to_mpf
from cooper_jax.rule.parsed_answer import ParsedAnswer


def compare_answers(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    """True or False if two answers are proved to be equal or unequal, else None."""
    gold, answer = _unwrap(gold), _unwrap(answer)
    if gold.kind == answer.kind:
        return _SAME_KIND[gold.kind](gold, answer) if gold.kind in _SAME_KIND else None
    return _compare_kinds(gold, answer)


def _unwrap(answer: ParsedAnswer) -> ParsedAnswer:
    """A list or set of one answer, or of equal ones, as that answer."""
    if answer.kind in ("list", "set") and answer.items:
        distinct = _drop_repeated(answer.items)
        if len(distinct) == 1:
            return _unwrap(distinct[0])
    return answer


def _drop_repeated(items: Sequence[ParsedAnswer]) -> list[ParsedAnswer]:
    distinct: list[ParsedAnswer] = []
    for item in items:
        if not any(compare_answers(item, other) for other in distinct):
            distinct.append(item)
    return distinct


# --- answers of different kinds ------------------------------------------------------------------------------


def _compare_kinds(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    first, second = (gold, answer) if _ORDER.index(gold.kind) <= _ORDER.index(answer.kind) else (answer, gold)
    kinds = (first.kind, second.kind)

    # x = 5 and 5; of several assignments to one name the values count.
    if first.kind == "assignment" and second.kind not in (
        "equation",
        "words",
        "opaque",
        "letter",
        "inequality",
    ):
        if second.kind in ("list", "set"):
            return None if _has_names(second) else False
        return (
            compare_answers(first.items[0], second)
            if first is gold
            else compare_answers(second, first.items[0])
        )
    if kinds in _PAIRS:
        return _PAIRS[kinds](first, second)
    if kinds == ("list", "scalar") and "," in second.key:
        return None  # 100,200 may be two numbers
    return False if set(kinds) <= _SEPARATE or kinds in _DIFFERENT else None


# In a pair of kinds the earlier one comes first.
_ORDER = (
    "assignment", "list", "scalar", "tuple", "interval", "set", "union", "matrix", "family", "equation",
    "inequality", "congruence", "based", "ratio", "empty_set", "letter", "words", "opaque", "empty",
)  # fmt: skip
# Kinds of which no two contain equal answers.
_SEPARATE = frozenset(["scalar", "interval", "union", "matrix", "empty_set"])
_DIFFERENT = frozenset(
    [("scalar", "tuple"), ("scalar", "set"), ("list", "scalar"), ("tuple", "empty_set"), ("set", "empty_set"),
     ("list", "empty_set"), ("list", "matrix"), ("list", "interval"), ("interval", "set"), ("set", "matrix")]
)  # fmt: skip


def _has_names(answer: ParsedAnswer) -> bool:
    return any(item.kind == "assignment" for item in answer.items)


def _drop_names(answer: ParsedAnswer) -> tuple[ParsedAnswer, ...]:
    """The items of a list, without the name if all have the same one: x = 1, x = 2."""
    names = {item.name for item in answer.items if item.kind == "assignment"}
    if len(names) == 1 and all(item.kind == "assignment" for item in answer.items):
        return tuple(item.items[0] for item in answer.items)
    return answer.items


def _compare_named_list(named: ParsedAnswer, pair: ParsedAnswer) -> bool | None:
    """x = 1, y = 2 against (1, 2), which has the values in the order of the names; other lists have no order."""
    names = [item.name for item in named.items]
    if all(item.kind == "assignment" for item in named.items) and len(set(names)) == len(names):
        in_order = (
            named.items if named.operator == "ordered" else sorted(named.items, key=lambda item: item.name)
        )
        values = tuple(item.items[0] for item in in_order)
        equal = _compare_in_order(values, pair.items)
        return equal if equal or named.operator == "ordered" else None
    return False if _match_items(named.items, pair.items) is False else None


def _compare_with_based(scalar: ParsedAnswer, based: ParsedAnswer) -> bool | None:
    """A number without a base may have either the digits or the value of one with a base."""
    digits = Number(Fraction(int(based.name))) if based.name.isdigit() else None
    assert scalar.value is not None and based.value is not None
    outcomes = [compare_values(scalar.value, other) for other in (based.value, digits) if other is not None]
    return False if set(outcomes) == {False} else None


def _compare_with_family(scalar: ParsedAnswer, family: ParsedAnswer) -> bool | None:
    """2 k pi with and without "for all integers k"; one number is not all of them."""
    (first, *others) = family.items
    if others or scalar.value is None:
        return None
    if family.name in expressions.find_symbols(scalar.value):
        return compare_answers(scalar, first)
    return None if expressions.find_symbols(scalar.value) else False


def _compare_tuple_with_interval(pair: ParsedAnswer, interval: ParsedAnswer) -> bool | None:
    """(1, 2), a pair or an open interval, against an interval in other brackets or against [1, 2]."""
    if interval.kind == "union" or len(pair.items) != 2 or pair.operator != "()":
        return None if interval.kind == "union" or pair.operator == "<>" else False
    ends = _compare_in_order(pair.items, interval.items)
    if ends is not True:
        return ends
    if interval.operator == "()~":
        return True
    # [3, 3] and (3, 3) are pairs; with ends in order, an open and a closed interval differ.
    if interval.operator == "[]" and _is_below(pair.items[0], pair.items[1]) is False:
        return True
    return False


def _is_below(low: ParsedAnswer, high: ParsedAnswer) -> bool | None:
    if low.value is None or high.value is None:
        return None
    values = (evaluate_number(low.value), evaluate_number(high.value))
    if values[0] is None or values[1] is None:
        return None
    return bool(mpmath.re(to_mpf(values[0])) < mpmath.re(to_mpf(values[1])))


def _compare_assignment_with_equation(assignment: ParsedAnswer, equation: ParsedAnswer) -> bool | None:
    """y = 3 - x against x + y = 3."""
    value, other = assignment.items[0].value, equation.value
    if value is None or other is None or len(assignment.name) > 1:
        return None
    difference = Call("add", (Symbol(assignment.name), Call("negate", (value,))))
    return True if expressions.are_proportional(difference, other) else None


# --- answers of one kind -------------------------------------------------------------------------------------


def _compare_assignments(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    equal = compare_answers(gold.items[0], answer.items[0])
    if gold.name == answer.name or equal is None:
        return equal
    return None  # x = 5 and y = 5 may name one thing, x = 5 and y = 6 may not: neither is proved


def _compare_lists(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    # x = 1, y = 2: the values of each name.
    first, second = ({item.name: item for item in parsed.items} for parsed in (gold, answer))
    if len(first) == len(gold.items) and first.keys() == second.keys() and len(first) == len(answer.items):
        return _combine(compare_answers(first[name], second[name]) for name in first)
    return _match_items(_drop_names(gold), _drop_names(answer))


def _compare_tuples(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    return _compare_in_order(gold.items, answer.items)


def _compare_matrices(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    if (gold.number, len(gold.items)) != (answer.number, len(answer.items)):
        return False
    return _compare_in_order(gold.items, answer.items)


def _compare_intervals(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    same_brackets = gold.operator[:2] == answer.operator[:2]
    ends = _compare_in_order(gold.items, answer.items)
    if gold.name != answer.name and gold.name and answer.name and not (ends and same_brackets):
        return None  # bounds of two different names
    return ends if same_brackets else (False if ends is not None else None)


def _compare_unordered(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    return _match_items(gold.items, answer.items)


def _compare_families(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    """Families with the parameter renamed.  Other parameters may give the same numbers in another order."""
    renamed = tuple(_rename_parameter(item, answer.name, gold.name) for item in answer.items)
    return True if _match_items(gold.items, renamed) else None


def _rename_parameter(item: ParsedAnswer, old: str, new: str) -> ParsedAnswer:
    if item.value is None:
        return item
    return ParsedAnswer(item.kind, value=expressions.rename(item.value, {old: new}), unit=item.unit)


def _compare_congruences(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    if gold.number != answer.number:
        return None
    residues = [_find_residues(parsed) for parsed in (gold, answer)]
    if None in residues:
        return None
    return residues[0] == residues[1]


def _find_residues(congruence: ParsedAnswer) -> frozenset[Fraction] | None:
    residues: set[Fraction] = set()
    for item in congruence.items:
        value = evaluate_number(item.value)
        if not isinstance(value, Fraction):
            return None
        residues.add(value % congruence.number)
    return frozenset(residues)


def _compare_equations(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    """Equations are equal if one is a multiple of the other; other forms of one equation are not recognised."""
    assert gold.value is not None and answer.value is not None
    return True if expressions.are_proportional(gold.value, answer.value) else None


def _compare_inequalities(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    assert gold.value is not None and answer.value is not None
    if gold.operator != answer.operator:
        return None
    is_signed = gold.operator != "!="
    return True if expressions.are_proportional(gold.value, answer.value, positive=is_signed) else None


def _compare_based(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    if gold.number == answer.number or gold.value != answer.value:
        return gold.value == answer.value
    return None  # one number in two bases


def _compare_ratios(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    """3:4 and 6:8 are one ratio, but no two times are."""
    if len(gold.items) != len(answer.items):
        return None
    equal = _compare_in_order(gold.items, answer.items)
    names = {gold.name, answer.name} - {"time", ""}
    if len(names) == 2:
        return False  # am and pm
    if equal is not False:
        return equal
    values = [
        [evaluate_number(item.value) for item in parsed.items if item.value] for parsed in (gold, answer)
    ]
    if any(not isinstance(value, Fraction) or not value for row in values for value in row):
        return None if equal is None else False
    ratios = {x / y for x, y in zip(*values, strict=True)}
    return None if len(ratios) == 1 else False


def _compare_letters(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    return gold.name == answer.name


def _compare_words(gold: ParsedAnswer, answer: ParsedAnswer) -> bool | None:
    decisions = [words.find_decision(parsed.name) for parsed in (gold, answer)]
    if gold.name == answer.name or (gold.name == decisions[1]):
        return True
    first, second = (d or parsed.name for d, parsed in zip(decisions, (gold, answer), strict=True))
    return False if words.are_exclusive(first, second) else None


def _match_items(gold: Sequence[ParsedAnswer], answer: Sequence[ParsedAnswer]) -> bool | None:
    """Compare collections without order: each item must be equal to one of the other collection."""
    if len(gold) * len(answer) > 10_000:
        return None
    table = [[compare_answers(g, a) for a in answer] for g in gold]
    columns = [list(column) for column in zip(*table, strict=True)]
    if all(True in row for row in [*table, *columns]):
        return True
    # An item that differs from every item of the other collection proves them different.
    if any(all(outcome is False for outcome in row) for row in [*table, *columns]):
        return False
    return None


def _compare_in_order(gold: Sequence[ParsedAnswer], answer: Sequence[ParsedAnswer]) -> bool | None:
    if len(gold) != len(answer):
        return False
    return _combine(compare_answers(g, a) for g, a in zip(gold, answer, strict=True))


def _combine(outcomes: Iterable[bool | None]) -> bool | None:
    """False if any is False, otherwise None if any is not decided."""
    decided = list(outcomes)
    if False in decided:
        return False
    return None if None in decided else True


_SAME_KIND: dict[str, Callable[[ParsedAnswer, ParsedAnswer], bool | None]] = {
    "scalar": compare_scalars,
    "letter": _compare_letters,
    "list": _compare_lists,
    "set": _compare_unordered,
    "tuple": _compare_tuples,
    "interval": _compare_intervals,
    "union": _compare_unordered,
    "matrix": _compare_matrices,
    "assignment": _compare_assignments,
    "equation": _compare_equations,
    "inequality": _compare_inequalities,
    "congruence": _compare_congruences,
    "family": _compare_families,
    "based": _compare_based,
    "ratio": _compare_ratios,
    "empty_set": lambda gold, answer: True,
    "words": _compare_words,
}
_PAIRS: dict[tuple[str, str], Callable[[ParsedAnswer, ParsedAnswer], bool | None]] = {
    ("list", "tuple"): _compare_named_list,
    ("list", "set"): lambda several, members: _match_items(_drop_names(several), members.items),
    ("list", "family"): _compare_unordered,
    ("scalar", "family"): _compare_with_family,
    ("scalar", "based"): _compare_with_based,
    ("tuple", "interval"): _compare_tuple_with_interval,
    ("tuple", "union"): _compare_tuple_with_interval,
    ("assignment", "equation"): _compare_assignment_with_equation,
}
