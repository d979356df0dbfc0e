"""Names on one side of an equation: x, x_1, f(x), (x, y), \\angle ABC, Area."""

from __future__ import annotations

import re

from cooper_jax.rule import words
from cooper_jax.rule.answer_text import make_key
from cooper_jax.rule.latex_parser import Unreadable
from cooper_jax.rule.text_splitting import split_at_commas

_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]+|\\(?:angle|triangle|text ?\{[^{}]*\}|overline|widehat|hat|vec|mathbb)[^=]*)'?"
    r"(?: ?_ ?(?:\{[^{}]*\}|\w))?'?(?: ?\([^()]*\))?"
)


def require_name(text: str) -> str:
    """The name on one side of a relation.  Raises Unreadable for anything but one name, or a tuple of names."""
    name = find_name(text)
    if name is None:
        raise Unreadable("a side that is no name")
    return name


def find_name(text: str) -> str | None:
    """The name that a text consists of: x, x_1, f(x), (x, y), \\angle ABC, Area; None for anything else."""
    text = text.strip()
    if text in ("e", "i", "\\pi", "\\infty"):
        return None
    if text.startswith("(") and text.endswith(")"):
        names = [part.strip() for part in split_at_commas(text[1:-1])]
        return make_key(text) if len(names) > 1 and all(map(find_name, names)) else None
    if _NAME.fullmatch(text) is None or re.search(
        r"[-+*/^]|\\(?:frac|sqrt|sin|cos|tan|ln|log)", text.split("(")[0]
    ):
        return None
    plain = _TEXT.sub(r"\1", text)
    # One letter, a function's value or a word; two letters, such as AB, are a product or a segment.
    if re.fullmatch(r"[a-z]{2,3}", plain) and "\\text" not in text:
        return None
    return None if words.denies(plain) else make_key(text)
