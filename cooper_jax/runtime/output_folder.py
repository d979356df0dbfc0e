"""Output folders of annotations, evaluations and studies: settings that must not change, lines that a kill tore.

1. `agree` writes the settings that decide the outcome, or compares them with those that the folder was begun with.
   One may change until something is there that it decides: a slip that nothing was answered under binds nobody.
2. `whole_lines` reads an append-only file of JSON objects; a last line that a kill tore is cut off, and said.
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
    """Raise ValueError where the folder was begun with other settings (naming both values), or by nobody we know.

    settings: flat names -> JSON values.  later: how names begin -> the file that they alone decide; the others
    decide every file.  begun: something else is there that all of them decide.
    """
    new, stored = to_jsonable(settings), folder / SETTINGS
    held = sorted(p.name for p in folder.glob("*.jsonl") if p.stat().st_size)
    if held and not stored.exists():
        raise ValueError(f"{folder} holds {held[0]} without {SETTINGS}: give another --out, or move it away")
    try:
        old = json.loads(stored.read_bytes()) if stored.exists() else {}
    except ValueError as error:
        raise ValueError(f"{stored} is not JSON ({error}): mend it, or give another --out") from None

    def binds(name: str) -> bool:
        own = [file for start, file in (later or {}).items() if name.startswith(start)]
        return own[0] in held if own else bool(held) or (begun and stored.exists())

    def shown(values: Mapping[str, Any], name: str) -> str:
        return json.dumps(values[name], ensure_ascii=False) if name in values else "(absent)"

    changed = [
        f"{name} was {shown(old, name)} and is now {shown(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if binds(name) and (name not in old or name not in new or old[name] != new[name])
    ]
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(changed)}: give another --out, or the old value"
        )
    if old != new or not stored.exists():
        text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
        remote_files.write_atomically(stored, text.encode("utf-8", "backslashreplace"))


def read_whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, each a JSON object; none where there is no file.

    Raises ValueError, naming file and line, for one that is broken otherwise than by a kill.
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
        if number == len(lines) and not line.endswith(b"\n"):
            hosts.print_once(
                f"{path.name}:{number}: a kill tore this line ({len(line)} bytes): it is cut off"
            )
            with open(path, "r+b") as file:
                file.truncate(len(content) - len(line))
                os.fsync(file.fileno())
            return lines[:-1]
        raise ValueError(f"{path}:{number}: no JSON object: mend or delete the line")
    return lines
