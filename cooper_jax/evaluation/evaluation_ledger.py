"""What an evaluation has done so far, so that the same command goes on after a kill.

    settings.json   what decides the results; once there are items a later start must agree with it
    items.jsonl     one object an item, in the order of the work
    timings.jsonl   seconds of each chunk
    results.json    written at the end, by the caller

1. The work is cut into chunks of known sizes, in a fixed order.  A chunk's rows are written at once and seen
   onto the disk; what a kill tore, a line or a chunk, is cut off at the next start and done again.  As no draw
   depends on what was drawn before, the file ends up as without the kill.
2. With several processes the first alone locks, reads and writes; all learn how many chunks are done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cooper_jax.runtime import hosts, output_folder, remote_files
from cooper_jax.runtime.metrics import JsonLines, to_jsonable
from cooper_jax.runtime.run_directory import lock_folder
from cooper_jax.settings.setup_errors import setup_errors

Row = dict[str, Any]
ITEMS, TIMINGS, RESULTS = "items.jsonl", "timings.jsonl", "results.json"


class Ledger:
    """An open folder; a context manager.

    Args:
      folder: on this machine's disk.
      settings: flat names -> JSON values.
      sizes: rows of each chunk.

    Raises ValueError where the folder was begun with other settings (naming both values), is in use, or holds what
    was not written here; and for an address.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], sizes: Sequence[int]):
        if remote_files.is_remote(folder):
            raise ValueError(f"{folder}: results are written to a local path, to be copied from there")
        self.folder = Path(folder).expanduser().absolute()
        self.rows: list[Row] = []  # of whole chunks; on the first process alone
        self.seconds: list[float] = []  # likewise
        self._lock: int | None = None
        self._items, self._timings = (JsonLines(self.folder / name) for name in (ITEMS, TIMINGS))
        try:
            opened = hosts.broadcast_value("ledger", lambda: str(self._open(settings, sizes)).encode())
        except BaseException:
            self.close()
            raise
        self.done = int(opened)  # whole chunks

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._items.close()
        self._timings.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, rows: Sequence[Row], seconds: float) -> None:
        """The next chunk's rows; on the disk when this returns.  Raises SetupError for a full one."""
        self.done += 1
        if not hosts.is_primary():
            return
        rows = [to_jsonable(row) for row in rows]
        # The time first: a chunk without its rows is none, and its time goes with it.
        with setup_errors("--out"):
            self._timings.append({"chunk": self.done - 1, "seconds": round(seconds, 3)})
            self._items.append(*rows)
        self.rows += rows
        self.seconds.append(seconds)

    def write(self, name: str, content: Any) -> None:
        """A file of JSON, or of text, beside the others.  Raises SetupError for a full disk."""
        if hosts.is_primary():
            text = content if isinstance(content, str) else json.dumps(to_jsonable(content), indent=1)
            with setup_errors(f"--out: {name}"):
                remote_files.write_atomically(
                    self.folder / name, f"{text}\n".encode("utf-8", "backslashreplace")
                )

    def _open(self, settings: Mapping[str, Any], sizes: Sequence[int]) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder / "lock", self.folder, "--out")
        output_folder.check_same_settings(self.folder, settings)
        lines = output_folder.read_whole_lines(self._items.path)
        done = rows = 0
        for size in sizes:
            if rows + size > len(lines):
                break
            done, rows = done + 1, rows + size
        if len(lines) > rows == sum(sizes):
            raise ValueError(
                f"{self._items.path} holds {len(lines)} rows and there are {rows}: give another --out"
            )
        self.rows = [json.loads(line) for line in lines[:rows]]
        _cut(self._items.path, lines[:rows])
        timings = output_folder.read_whole_lines(self._timings.path)[:done]
        self.seconds = [json.loads(line)["seconds"] for line in timings]
        _cut(self._timings.path, timings)
        return done


def _cut(path: Path, lines: Sequence[bytes]) -> None:
    content = b"".join(lines)
    if path.exists() and path.read_bytes() != content:
        remote_files.write_atomically(path, content)
