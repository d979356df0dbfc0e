"""Fields of a chat request that a server refuses: renamed or dropped by the setting `fields`.

    max_tokens=max_completion_tokens,seed=        rename max_tokens, drop seed

Servers of reasoning models refuse `max_tokens`, `temperature` or `seed`, and some servers refuse every field that
they do not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Fields of a request that may be renamed or dropped.
CHANGEABLE = ("max_tokens", "temperature", "top_p", "seed", "chat_template_kwargs")


def parse_field_changes(text: str) -> dict[str, str]:
    """Parse the setting: field -> its new name, or "" if it is dropped.

    Raises ValueError for text of another form, and for a name that a request has or gets twice.
    """
    changes: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        field, equals, name = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(
                f'{item!r} has no "=": write FIELD=NEW_NAME to rename a field, FIELD= to drop it'
            )
        if field not in CHANGEABLE:
            raise ValueError(f"{field!r} is none of the fields {', '.join(CHANGEABLE)}")
        if field in changes:
            raise ValueError(f"{field!r} is there twice")
        if name and not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"{name!r} is no name of a field: use letters, digits and _")
        changes[field] = name

    # Two fields of one name would overwrite each other.
    kept = ["model", "messages", *(field for field in CHANGEABLE if field not in changes)]
    names = kept + [name for name in changes.values() if name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"a request would have {', '.join(twice)} twice: choose another name, or drop one")
    return changes


def change_fields(body: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """Rename and drop the fields of a request's body.  changes: from `parse_field_changes`."""
    renamed = {changes.get(field, field): value for field, value in body.items()}
    renamed.pop("", None)  # the name of all dropped fields
    return renamed


def suggest_changes(words: str) -> str:
    """A value of the setting for the fields that a server's error message names; "" if it names none."""
    changes = []
    for field in CHANGEABLE:
        if not re.search(rf"\b{field}\b", words):
            continue
        renames = field == "max_tokens" and "max_completion_tokens" in words
        changes.append(f"{field}={'max_completion_tokens' if renames else ''}")
    return ",".join(changes)
