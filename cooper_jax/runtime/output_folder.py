"""Output folders of annotations, evaluations and studies: stored settings, append-only JSON lines.

1. `check_same_settings` stores the settings that decide the results, or compares them with those that are
   stored.  A setting may still change while no output depends on it.
2. `read_whole_lines` reads an append-only file of JSON objects.  An incomplete last line, left by a killed
   process, is removed with a message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cooper_jax.runtime import hosts, remote_files
from cooper_jax.runtime.metrics import to_jsonable

SETTINGS = "settings.json"


def check_same_settings(
    folder: Path,
    settings: Mapping[str, Any],
    later: Mapping[str, str] | None = None,
    begun: bool = False,
) -> None:
    """Store the settings in the folder, or compare them with the stored ones.

    Args:
      settings: flat names -> JSON values.
      later: prefix of settings' names -> the only output file that depends on these settings; every file
        depends on the other settings.
      begun: the folder has output in other files, which depends on all settings.

    Raises ValueError, naming both values, if a setting has changed that existing output depends on; for
    output without stored settings; and for stored settings that are not JSON.
    """
    # An empty file is no output: it was opened, but nothing was written yet.
    new, stored = to_jsonable(settings), folder / SETTINGS
    outputs = sorted(p.name for p in folder.glob("*.jsonl") if p.stat().st_size)
    if outputs and not stored.exists():
        raise ValueError(
            f"{folder} holds {outputs[0]} without {SETTINGS}: give another --out, or move it away"
        )
    old = read_settings(stored)

    def has_output(name: str) -> bool:
        for prefix, file in (later or {}).items():
            if name.startswith(prefix):
                return file in outputs
        return bool(outputs) or (begun and stored.exists())

    # Compare only settings that existing output depends on.
    changed = [x for x in _list_changes(old, new) if has_output(x[0])]
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(text for _, text in changed)}: "
            "give another --out, or the old value"
        )

    # Settings without output have changed, or this is the first start.
    if old != new or not stored.exists():
        text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
        remote_files.write_atomically(stored, text.encode("utf-8", "backslashreplace"))


def read_settings(stored: Path) -> dict[str, Any]:
    """Read stored settings; none if there is no file.  Raises ValueError if the file is not JSON."""
    try:
        return json.loads(stored.read_bytes()) if stored.exists() else {}
    except ValueError as error:
        raise ValueError(f"{stored} is not JSON ({error}): fix it, or give another --out") from None


def _list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List (name, description with both values) of the settings that differ, by name."""

    def show(values: Mapping[str, Any], name: str) -> str:
        return json.dumps(values[name], ensure_ascii=False) if name in values else "(absent)"

    changes = []
    for name in sorted(old.keys() | new.keys()):
        is_same = name in old and name in new and old[name] == new[name]
        if not is_same:
            changes.append((name, f"{name} was {show(old, name)} and is now {show(new, name)}"))
    return changes


def read_whole_lines(path: Path) -> list[bytes]:
    """Read the lines of a file of JSON objects; none if there is no file.

    An incomplete last line is removed from the file, with a message.  Raises ValueError, naming file and
    line, for any other line that is not a JSON object.
    """
    # Lines are kept as bytes: callers append to the file and must not change what is in it.
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            whole = isinstance(json.loads(line), dict) and line.endswith(b"\n")
        except ValueError:
            whole = False
        if whole:
            continue

        # Only the last line can be incomplete: the process was killed while it appended it.
        if number == len(lines) and not line.endswith(b"\n"):
            hosts.print_once(
                f"{path.name}:{number}: removed an incomplete line ({len(line)} bytes) of a killed process"
            )
            with open(path, "r+b") as file:
                file.truncate(len(content) - len(line))
                os.fsync(file.fileno())
            return lines[:-1]
        raise ValueError(f"{path}:{number}: no JSON object: fix or delete the line")
    return lines
