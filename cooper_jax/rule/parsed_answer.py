"""The parsed form of one answer.

scalar       a formula, with a unit if there is one
letter       the letter of a choice: B, (B), B) 20
list         several answers without brackets, in any order
set          the same in braces
tuple        in parentheses or angle brackets, in order; (1, 2) may be an open interval as well
interval     [1, 2), (-oo, 3), x < 3, 0 < x < 1; [1, 2] may be a list as well
union        several intervals
matrix       rows of answers
assignment   x = 5: one name and its value
equation     any other equation: left side minus right side
inequality   likewise; `operator` is <, <= or !=
congruence   x = 5 mod 7: residue and modulus
family       2 k pi for all integers k
based        52_8: digits with a base
ratio        3:4, and times such as 2:30 pm
empty_set    no solution
words        prose; opaque: unread; empty: there is no answer
"""

from __future__ import annotations

import dataclasses

from cooper_jax.rule.expressions import Expression
from cooper_jax.rule.units import Unit


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """An answer with its kind (see the module's docstring); the kind decides which other fields are set."""

    kind: str
    key: str = ""  # the normalised text, in which equal answers have equal characters
    value: Expression | None = None  # scalar, equation, inequality, congruence (residue), family
    unit: Unit | None = None
    items: tuple[
        ParsedAnswer, ...
    ] = ()  # of collections; of an interval its two ends, of an assignment its value
    name: str = ""  # of an assignment, of a family's parameter, of a letter
    operator: str = ""  # of an inequality; an interval's two brackets; a matrix's number of columns
    number: int = 0  # a modulus or a base

    @property
    def comparable(self) -> bool:
        """True if the answer can be compared with another by its value, or by its letter."""
        return self.kind not in ("words", "opaque", "empty")
