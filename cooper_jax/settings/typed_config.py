"""Typed settings: frozen dataclasses that are read from sections of the config.

1. ml_collections declares the flags and applies overrides; until the job's setup a section is a ConfigDict.
2. The setup calls `X.from_config(section)`, which makes a frozen dataclass X.  The module that uses the
   settings defines X.
3. `X.__post_init__` checks the values of that section alone and raises one SetupError with all messages.
   cross_checks.py checks settings of different sections against each other.

The values are plain Python constants, so a typed config is hashable, and jitted functions may close over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cooper_jax.settings.setup_errors import SetupError

# Values of policy.packing and reward.packing.
PACKINGS = ("auto", "on", "off")

# The dataclass of a section.
T = TypeVar("T")


def read_section(cls: type[T], section: Mapping[str, Any], name: str, /, **overrides: Any) -> T:
    """Make a dataclass from a config section, which may have more fields than the dataclass.

    Args:
      cls: the dataclass; its fields have the names of the section's fields.
      section: a ConfigDict or another mapping.
      name: the section's dotted name, for messages.
      overrides: values of fields that are not read from the section.

    Raises SetupError for a field that the section lacks, and the errors of `cls`.
    """
    # A TypeVar cannot be bound to "any dataclass", which is what `dataclasses.fields` takes.
    to_read = [f.name for f in dataclasses.fields(cls) if f.name not in overrides]  # type: ignore[arg-type]
    # A config file that does not build on configs/base.py, or a run directory of an earlier version.
    if missing := [field for field in to_read if field not in section]:
        raise SetupError(*(f"{name}.{field} is missing: configs/base.py declares it" for field in missing))
    return cls(**overrides, **{field: section[field] for field in to_read})


def find_unknown(value: str, field: str, choices: Sequence[str]) -> list[str]:
    """Write a message if the value is none of the choices, else none.  field: the field's dotted name."""
    return [] if value in choices else [f"{field}={value!r}: it is one of {', '.join(choices)}"]


def raise_errors(messages: Sequence[str]) -> None:
    """Raise SetupError with all messages, if there are any."""
    if messages:
        raise SetupError(*messages)
