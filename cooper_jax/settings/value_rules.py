"""Rules for the values of settings and of fields of files: a type, bounds, and words that say what is allowed.

1. A rule has `allowed`, which completes "it must be ...", and `accepts(value)`.
2. `find_problem(name, value, rule)` writes the message for a value that a rule refuses, in one line whatever
   the value is.
3. A *record* is a frozen dataclass whose fields are made by `declare(rule, default)`.  `read_record` makes one
   of a mapping, such as a JSON object: it checks the declared fields and leaves out all others.

This module imports no jax: the command line uses it, too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

_SHOWN = 60  # characters of a value in a message
_REPORTED = 3  # fields in one message

REQUIRED = dataclasses.MISSING

R = TypeVar("R")

_SURROGATE = re.compile("[\ud800-\udfff]")  # no text that can be written to a file has one


class Rule(Protocol):
    """What a value must be."""

    @property
    def allowed(self) -> str:
        """Words that complete "it must be"."""

    def accepts(self, value: Any) -> bool:
        """True if the value is allowed."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high`; True and 2.0 are none."""

    low: int
    high: int

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`, whole ones included; NaN is none."""

    low: float
    high: float
    above: bool = False  # `low` itself is not allowed
    below: bool = False  # `high` itself is not allowed

    @property
    def allowed(self) -> str:
        if math.isinf(self.high):
            return f"a finite number {'above' if self.above else 'of at least'} {self.low:g}"
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"to {self.high:g}"
        return f"a number {low} {'and ' if self.above or self.below else ''}{high}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        # Comparisons with NaN are False.
        if not self.low <= value <= self.high or value in (math.inf, -math.inf):
            return False
        return not (self.above and value == self.low) and not (self.below and value == self.high)


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    allowed = "true or false"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Text:
    """Text of at most `longest` characters, without lone surrogates.

    pattern: a regular expression that all of it must match.
    """

    longest: int = 1_000_000
    shortest: int = 0
    pattern: str = ""
    words: str = ""  # `allowed`, for a pattern

    @property
    def allowed(self) -> str:
        if self.words:
            return self.words
        return f"text of {self.shortest} to {self.longest} characters"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, str) or not self.shortest <= len(value) <= self.longest:
            return False
        if not value.isascii() and _SURROGATE.search(value):
            return False
        return not self.pattern or re.fullmatch(self.pattern, value) is not None


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some texts."""

    choices: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(repr(c) if not c else c for c in self.choices)}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.choices


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list of at most `longest` items, each of which the rule `item` accepts."""

    item: Rule
    longest: int
    shortest: int = 0

    @property
    def allowed(self) -> str:
        return f"a list of {self.shortest} to {self.longest} items, each {self.item.allowed}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or not self.shortest <= len(value) <= self.longest:
            return False
        return all(map(self.item.accepts, value))


@dataclasses.dataclass(frozen=True)
class MapOf:
    """An object (a mapping) whose names and values two rules accept."""

    key: Rule
    value: Rule
    shortest: int = 0

    @property
    def allowed(self) -> str:
        least = f" of at least {self.shortest} entries" if self.shortest else ""
        return f"an object{least} whose values are each {self.value.allowed}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, Mapping) or len(value) < self.shortest:
            return False
        return all(map(self.key.accepts, value)) and all(map(self.value.accepts, value.values()))


@dataclasses.dataclass(frozen=True)
class Nullable:
    """null, or what another rule accepts."""

    rule: Rule

    @property
    def allowed(self) -> str:
        return f"{self.rule.allowed}, or null"

    def accepts(self, value: Any) -> bool:
        return value is None or self.rule.accepts(value)


@dataclasses.dataclass(frozen=True)
class Either:
    """What one of several rules accepts."""

    rules: tuple[Rule, ...]

    @property
    def allowed(self) -> str:
        return ", or ".join(rule.allowed for rule in self.rules)

    def accepts(self, value: Any) -> bool:
        return any(rule.accepts(value) for rule in self.rules)


@dataclasses.dataclass(frozen=True)
class ObjectOf:
    """An object whose fields a record declares; other fields are ignored."""

    record: type

    @property
    def allowed(self) -> str:
        names = ", ".join(_key(field) for field in dataclasses.fields(self.record))
        return f"an object with fields such as {names}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping) and not find_record_problems(self.record, value)


class Anything:
    """Any value: for fields whose values another library checks."""

    allowed = "any value"

    def accepts(self, value: Any) -> bool:
        return True


def show_value(value: Any) -> str:
    """Write a value in one short line, whatever it is."""
    try:
        text = repr(value)
    # Deep nesting, and integers of more digits than Python prints.
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    # Lone surrogates cannot be printed.
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def find_problem(name: str, value: Any, rule: Rule) -> str | None:
    """Write the message for a value that a rule refuses; None for one that it accepts."""
    if rule.accepts(value):
        return None
    # The field of an object says more than the object.
    inner = rule.rule if isinstance(rule, Nullable) else rule
    if isinstance(inner, ObjectOf) and isinstance(value, Mapping):
        return "; ".join(find_record_problems(inner.record, value, f"{name}.")[:_REPORTED])
    if isinstance(inner, MapOf) and isinstance(value, Mapping) and len(value) >= inner.shortest:
        return _find_entry_problem(name, value, inner)
    if isinstance(inner, ListOf) and isinstance(value, list | tuple):
        if inner.shortest <= len(value) <= inner.longest:
            at = next(i for i, item in enumerate(value) if not inner.item.accepts(item))
            return find_problem(f"{name}[{at}]", value[at], inner.item)
        return f"{name} has {len(value)} items: it must be {rule.allowed}"
    return f"{name} is {show_value(value)}: it must be {rule.allowed}"


def _find_entry_problem(name: str, value: Mapping[Any, Any], rule: MapOf) -> str | None:
    """The message for the first entry of a mapping that the rule refuses."""
    for key, entry in value.items():
        if not rule.key.accepts(key):
            return f"{name} has the name {show_value(key)}: it must be {rule.key.allowed}"
        if not rule.value.accepts(entry):
            return find_problem(f"{name}[{show_value(key)}]", entry, rule.value)
    return None


# --- records -----------------------------------------------------------------------------------------


def declare(rule: Rule, default: Any = None, key: str = "") -> Any:
    """Declare a field of a record.

    Args:
      default: the value of a field that the mapping leaves out; REQUIRED: it must not be left out.
      key: the field's name in the mapping; "": that of the dataclass.
    """
    metadata = {"rule": rule, "key": key}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def find_record_problems(
    cls: type, values: Mapping[str, Any], prefix: str = "", *, partial: bool = False
) -> list[str]:
    """Write a message for each field of a record that is missing or has a value that its rule refuses.

    prefix: of the fields' names in messages.  partial: fields may be missing.
    """
    problems = []
    missing = []
    for field in dataclasses.fields(cls):
        key = _key(field)
        if key not in values:
            if field.default is dataclasses.MISSING and not partial:
                missing.append(prefix + key)
            continue
        problem = find_problem(prefix + key, values[key], field.metadata["rule"])
        if problem is not None:
            problems.append(problem)
    if missing:
        problems.insert(0, f"missing {', '.join(missing)}")
    return problems


def read_record(cls: type[R], values: Mapping[str, Any], where: str, prefix: str = "") -> R:
    """Make a record of a mapping.

    Args:
      where: the file, with which messages begin.
      prefix: of the fields' names in messages.

    Raises ValueError, in one line, for missing fields and refused values.
    """
    raise_problems(where, find_record_problems(cls, values, prefix))
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # a TypeVar cannot be bound to any dataclass
    return cls(**{field.name: values[_key(field)] for field in fields if _key(field) in values})


def list_required(cls: type) -> list[str]:
    """The fields that a record's mapping must have, by their names in it."""
    return [_key(field) for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Raise ValueError with the first problems in one line, if there are any."""
    if problems:
        more = f"; and {len(problems) - _REPORTED} more" if len(problems) > _REPORTED else ""
        raise ValueError(f"{where}: {'; '.join(problems[:_REPORTED])}{more}")


def _key(field: Any) -> str:
    return field.metadata["key"] or field.name
