r"""Splitting of an answer's text outside all brackets: at commas, at "and" and "or", and at relation signs.

This module imports nothing from this project.
"""

from __future__ import annotations

import re

# Conjunctions of alternatives and lists, in \text or typed.
_CONJUNCTION = re.compile(
    r",? ?\\text ?\{ ?,? ?(?:and|or|と|和|或) ?\},?|,? +(?:and|or) +|;|,? ?(?:和|或者?) ?"
)
_RELATION = re.compile(
    r"\\(?P<command>le|ge|ne|in|equiv|approx|sim|cong|propto|notin|subset|subseteq|ll|gg)(?![A-Za-z])"
    r"|(?P<sign><=|>=|!=|==|<|>|=)"
)
_NAMES = {"le": "<=", "ge": ">=", "ne": "!=", "==": "="}
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def split_at_words(s: str) -> list[str]:
    """Split at conjunctions outside all brackets; the whole text as one part if there are none."""
    pieces, start = [], 0
    for match in _CONJUNCTION.finditer(s):
        if match.start() >= start and _depth_at(s, match.start()) == 0:
            pieces.append(s[start : match.start()].strip(" ,"))
            start = match.end()
    return [*pieces, s[start:].strip(" ,")]


def split_at_commas(s: str, grouped: bool = True) -> list[str]:
    """Split at commas outside all brackets.

    grouped: leave a comma before three digits in place, which separates thousands.
    """
    kept = {i for match in _THOUSANDS.finditer(s) for i in range(*match.span())} if grouped else set()
    parts, depth, start = [], 0, 0
    for i, char in enumerate(s):
        depth += (char in "([{") - (char in ")]}")
        if s.startswith(("\\langle", "\\rangle"), i):
            depth += 1 if s[i + 1] == "l" else -1
        if char == "," and depth == 0 and i not in kept:
            parts.append(s[start:i].strip())
            start = i + 1
    return [*parts, s[start:].strip()]


def split_relations(s: str) -> tuple[list[str], list[str]]:
    """(operands, operators) of the relation signs outside all brackets."""
    operands, operators, start = [], [], 0
    for match in _RELATION.finditer(s):
        if _depth_at(s, match.start()) == 0:
            sign = match["command"] or match["sign"]
            operands.append(s[start : match.start()].strip())
            operators.append(_NAMES.get(sign, sign))
            start = match.end()
    return [*operands, s[start:].strip()], operators


def _depth_at(s: str, end: int) -> int:
    """The number of brackets that are open at a position.  Interval brackets need not match."""
    head = s[:end]
    opened = sum(map(head.count, "([{")) + head.count("\\langle")
    return opened - sum(map(head.count, ")]}")) - head.count("\\rangle")


def encloses(s: str) -> bool:
    """True if the first bracket of a text is closed by its last character."""
    depth = 0
    for i, char in enumerate(s):
        depth += (char in "([") - (char in ")]")
        if depth == 0:
            return i == len(s) - 1
    return False


def find_depth(s: str) -> int:
    """The largest number of brackets that are open at once."""
    depth = deepest = 0
    for char in s:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest
