"""Typed settings: frozen dataclasses that are read from sections of the config.

1. ml_collections declares the flags and applies overrides; until the job's setup a section is a ConfigDict.
2. The setup calls `X.from_config(section)`, which makes a frozen dataclass X.  The module that uses it defines X.
3. `X.__post_init__` checks the values of that section alone and raises one SetupError with all problems.
   cross_checks.py checks what depends on several sections.

The values are plain Python constants, so a typed config is hashable, and jitted functions may close over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cooper_jax.settings.setup_errors import SetupError

T = TypeVar("T")


def read_section(cls: type[T], section: Mapping[str, Any], name: str, /, **given: Any) -> T:
    """Make a dataclass of a config section, which may hold more fields than the dataclass.

    Args:
      cls: the dataclass; its fields are named as the section's.
      section: a ConfigDict or another mapping.
      name: the section's dotted name, for messages.
      given: values of fields that do not come from the section as they are.

    Raises SetupError for a field that the section lacks, and what `cls` raises.
    """
    # A TypeVar cannot be bound to "any dataclass", which is what `fields` takes.
    wanted = [f.name for f in dataclasses.fields(cls) if f.name not in given]  # type: ignore[arg-type]
    if missing := [field for field in wanted if field not in section]:
        raise SetupError(*(f"{name}.{field} is missing: configs/base.py declares it" for field in missing))
    return cls(**given, **{field: section[field] for field in wanted})


def find_small(config: Any, name: str, least: float, fields: Sequence[str]) -> list[str]:
    """A message for each of the `fields` of a typed config that is below `least` or NaN.

    name: the section's dotted name.
    """
    values = {field: getattr(config, field) for field in fields}
    return [f"{name}.{f}={v}: it must be at least {least}" for f, v in values.items() if not v >= least]


def find_unknown(value: str, field: str, choices: Sequence[str]) -> list[str]:
    """A message if the value is none of the choices, else no message; field: its dotted name."""
    return [] if value in choices else [f"{field}={value!r}: it is one of {', '.join(choices)}"]


def raise_problems(problems: Sequence[str]) -> None:
    """Raise SetupError with all messages; do nothing if there is none."""
    if problems:
        raise SetupError(*problems)
