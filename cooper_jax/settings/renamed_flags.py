"""Configuration fields that earlier versions had under another name.

A flag with an old name fails with a message that gives the new name; nothing is translated silently.
"""

from __future__ import annotations

from collections.abc import Mapping

REMOVED = "was removed: "

# Old dotted name -> new dotted name, or REMOVED and the reason.  A name that ends in a dot stands for a whole
# section: {"old_section.": "new_section."}.
RENAMED_FLAGS: dict[str, str] = {}


def describe_rename(name: str, table: Mapping[str, str] = RENAMED_FLAGS) -> str | None:
    """Say what became of a configuration field: "is now ..." or "was removed: ..."; None for an unknown name.

    name: dotted, without `config.`.  The longest entry that covers it is used.
    """
    covering = [old for old in table if name == old or (old.endswith(".") and name.startswith(old))]
    if not covering:
        return None
    old = max(covering, key=len)
    new = table[old]
    return new if new.startswith(REMOVED) else f"is now --config.{new}{name.removeprefix(old)}"
