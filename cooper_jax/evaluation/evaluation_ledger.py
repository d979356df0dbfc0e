"""Ledger of an evaluation: its rows so far, so that the same command resumes after SIGKILL.

    settings.json   settings that decide the results; once there are items, a later start must have the same
    items.jsonl     one object per item, in the order of the work
    timings.jsonl   seconds of each chunk
    results.json    written at the end, by the caller
    environment.json  versions and devices of the last start that had work left

1. The work is split into chunks of known sizes, in a fixed order.  A chunk's rows are written together and
   flushed to disk.  An incomplete line or chunk, left by SIGKILL, is dropped at the next start and computed
   again.  Since no random draw depends on earlier ones, the final file is the same as without interruption.
2. With several processes only the first locks, reads and writes; the number of finished chunks is broadcast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cooper_jax.runtime import hosts, output_folder, remote_files
from cooper_jax.runtime.environment import write_environment
from cooper_jax.runtime.metrics import JsonLines, to_jsonable
from cooper_jax.runtime.run_directory import lock_folder
from cooper_jax.settings.setup_errors import setup_errors

Row = dict[str, Any]
ITEMS, TIMINGS, RESULTS = "items.jsonl", "timings.jsonl", "results.json"


class Ledger:
    """An open ledger folder; a context manager.

    Raises ValueError for a remote address, and for a folder that was begun with other settings (naming both
    values), is in use, or contains files that no evaluation wrote.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], sizes: Sequence[int]):
        """Open a folder, or create it.

        Args:
          folder: on a local disk.
          settings: flat names -> JSON values that decide the results.
          sizes: rows of each chunk.
        """
        # Appending and locking need a local file system.
        if remote_files.is_remote(folder):
            raise ValueError(
                f"{folder}: results are written to a local path; give one, and copy it afterwards"
            )
        self.folder = Path(folder).expanduser().absolute()

        # The content: complete chunks only, and on the first process only.
        self.rows: list[Row] = []
        self.seconds: list[float] = []  # one number per chunk
        self._lock: int | None = None
        self._items, self._timings = (JsonLines(self.folder / name) for name in (ITEMS, TIMINGS))

        # An error of the first process is raised on all of them.
        try:
            encoded = hosts.broadcast_value("ledger", lambda: str(self._open(settings, sizes)).encode())
        except BaseException:
            self.close()
            raise
        self.done = int(encoded)  # complete chunks, on all processes

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and release the lock."""
        self._items.close()
        self._timings.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, rows: Sequence[Row], seconds: float) -> None:
        """Write the next chunk's rows and flush them to disk.  Raises SetupError for a full disk.

        seconds: the duration of the chunk.
        """
        self.done += 1
        if not hosts.is_primary():
            return
        rows = [to_jsonable(row) for row in rows]
        # The time is written before the rows: a time without rows is dropped at the next start, but rows
        # without a time could not be completed.
        with setup_errors("--out"):
            self._timings.append({"chunk": self.done - 1, "seconds": round(seconds, 3)})
            self._items.append(*rows)
        self.rows += rows
        self.seconds.append(seconds)

    def write(self, name: str, content: Any) -> None:
        """Write a file of text, or of one JSON value, atomically.  Raises SetupError for a full disk."""
        if hosts.is_primary():
            text = content if isinstance(content, str) else json.dumps(to_jsonable(content), indent=1)
            encoded = f"{text}\n".encode("utf-8", "backslashreplace")
            with setup_errors(f"--out: {name}"):
                remote_files.write_atomically(self.folder / name, encoded)

    def _open(self, settings: Mapping[str, Any], sizes: Sequence[int]) -> int:
        """Lock and read the folder, on the first process only; returns the number of complete chunks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder / "lock", self.folder, "--out")
        output_folder.check_same_settings(self.folder, settings)

        # Count the chunks whose rows are all there.
        lines = output_folder.read_whole_lines(self._items.path)
        chunks = rows = 0
        for size in sizes:
            if rows + size > len(lines):
                break
            chunks, rows = chunks + 1, rows + size
        if len(lines) > rows == sum(sizes):
            raise ValueError(
                f"{self._items.path} has {len(lines)} rows and this evaluation has {rows}: give another --out"
            )

        # Rows and times of an incomplete chunk are dropped, on disk too, so that appending continues there.
        self.rows = [json.loads(line) for line in lines[:rows]]
        _rewrite_lines(self._items.path, lines[:rows])
        timings = output_folder.read_whole_lines(self._timings.path)[:chunks]
        self.seconds = [json.loads(line)["seconds"] for line in timings]
        _rewrite_lines(self._timings.path, timings)

        # A finished evaluation is only reported again: its items are from the environment that is stored.
        if chunks < len(sizes):
            write_environment(self.folder)
        return chunks


def _rewrite_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Rewrite a file with these lines only; a file with just these lines is left unchanged."""
    content = b"".join(lines)
    if path.exists() and path.read_bytes() != content:
        remote_files.write_atomically(path, content)
