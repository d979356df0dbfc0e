"""Output folders of annotations, evaluations and studies: stored settings, append-only JSON lines.

1. `check_same_settings` writes the settings that decide the outcome, or compares them with the folder's.  A
   setting may still change while no output depends on it.
2. `read_whole_lines` reads an append-only file of JSON objects.  A last line that is incomplete, because the
   process was killed, is removed with a message.
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
      later: prefix of names -> the one output file that they decide; other settings decide every file.
      begun: there is other output, which all settings decide.

    Raises ValueError, naming both values, if a setting has changed that existing output depends on; for
    output without stored settings; and for stored settings that are not JSON.
    """
    new, stored = to_jsonable(settings), folder / SETTINGS
    outputs = sorted(p.name for p in folder.glob("*.jsonl") if p.stat().st_size)
    if outputs and not stored.exists():
        raise ValueError(
            f"{folder} holds {outputs[0]} without {SETTINGS}: give another --out, or move it away"
        )
    try:
        old = json.loads(stored.read_bytes()) if stored.exists() else {}
    except ValueError as error:
        raise ValueError(f"{stored} is not JSON ({error}): fix it, or give another --out") from None

    def has_output(name: str) -> bool:
        for prefix, file in (later or {}).items():
            if name.startswith(prefix):
                return file in outputs
        return bool(outputs) or (begun and stored.exists())

    def show(values: Mapping[str, Any], name: str) -> str:
        return json.dumps(values[name], ensure_ascii=False) if name in values else "(absent)"

    # A setting may change as long as no output depends on it.
    changed = []
    for name in sorted(old.keys() | new.keys()):
        is_same = name in old and name in new and old[name] == new[name]
        if has_output(name) and not is_same:
            changed.append(f"{name} was {show(old, name)} and is now {show(new, name)}")
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(changed)}: give another --out, or the old value"
        )

    if old != new or not stored.exists():
        text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
        remote_files.write_atomically(stored, text.encode("utf-8", "backslashreplace"))


def read_whole_lines(path: Path) -> list[bytes]:
    """Read the lines of a file of JSON objects; none if there is no file.

    An incomplete last line is removed from the file, with a message.  Raises ValueError, naming file and
    line, for any other line that is not a JSON object.
    """
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
