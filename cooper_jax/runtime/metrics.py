"""Metrics of a run: numbers per step, seconds per phase, and JSON lines.

1. `to_host` copies a step's numbers from the device in one transfer.
2. `PhaseTimer` adds up wall-clock seconds under `time/<phase>`.
3. `JsonLines` appends one JSON object per line, and is truncated to a step when a run resumes.

JSON has no NaN and no infinities: NaN is written as null, infinities as the strings "inf" and "-inf", so that
every line stays valid JSON.  `parse_numbers` converts them back.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.types import Metrics

# Phases of a step in which it waits for the host: for verdicts, rewards and pairs.  The devices have nothing to do
# then, unless an assistant of kind `local` works on them.
HOST_PHASES = ("rule", "functions", "pairs")

# Values of `to_jsonable` that stand for floats.
_NOT_FINITE = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


def to_host(metrics: Mapping[str, Any], group: str = "") -> Metrics:
    """Copy scalars from the device in one transfer, as floats; names get the prefix `group/`, if given."""
    prefix = f"{group}/" if group else ""
    return {prefix + name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


class PhaseObserver(Protocol):
    """What is told of phases as they begin and end; from any thread."""

    def open_phase(self, step: int, name: str) -> contextlib.AbstractContextManager[None]:
        """The context in which a phase of a step runs."""


class PhaseTimer:
    """Wall-clock seconds per named phase; phases may nest or run in threads, each is timed separately.

    JAX dispatches asynchronously: a phase must fetch its results (or block on them), or the next phase's time
    includes their computation.

    observer: told of each phase; None: nobody is.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, observer: PhaseObserver | None = None):
        self._clock, self.observer = clock, observer
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._step = 0

    @contextlib.contextmanager
    def in_step(self, step: int) -> Iterator[None]:
        """Context in which phases belong to a step, as the observer is told; a part of another step may nest."""
        before, self._step = self._step, step
        try:
            yield
        finally:
            self._step = before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a `with` block to a phase, which has its name in a profiler's trace, too."""
        start = self._clock()
        observed: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.observer is not None:
            observed = self.observer.open_phase(self._step, name)
        try:
            with jax.profiler.TraceAnnotation(name), observed:
                yield
        finally:
            # Also after an error, so that a phase that stopped the run is counted.
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def collect(self) -> Metrics:
        """Return `time/<phase>` -> seconds, and reset them."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}


def to_jsonable(x: Any, where: str = "") -> Any:
    """Convert numbers, strings, NumPy and JAX arrays, and containers of them to JSON values.

    NaN becomes None, infinities become "inf" and "-inf".  Raises TypeError for a value of another type,
    naming its place (`where`, a dotted path).
    """
    if x is None or isinstance(x, bool | int):
        return x
    if isinstance(x, str):
        return str(x)
    if isinstance(x, Mapping):
        return {str(k): to_jsonable(v, f"{where}.{k}") for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [to_jsonable(v, f"{where}[{i}]") for i, v in enumerate(x)]
    if isinstance(x, float):
        if math.isnan(x):
            return None
        return x if math.isfinite(x) else str(float(x))
    # NumPy's float64 is a float, and was handled above with its NaN; other types of scalars become Python's.
    if isinstance(x, np.generic | np.ndarray | jax.Array):
        return to_jsonable(np.asarray(x).tolist(), where)
    raise TypeError(
        f"{where.lstrip('.') or 'the value'} is a {type(x).__name__}, which JSON cannot represent"
    )


class JsonLines:
    """A file of JSON objects, one per line, each with a `step`; steps never decrease."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: io.FileIO | None = None  # opened by the first `append`

    def truncate(self, step: int | None) -> int | None:
        """Drop lines after `step` (None: all) and an incomplete last line; return the last step kept.

        The file is replaced atomically, so that SIGKILL loses nothing.  Raises ValueError for a line that is
        not an object with a step, unless it is the incomplete last one.
        """
        # Lines up to `step` are kept as they are: the checkpoint that the run resumes from includes their
        # steps.
        self.close()
        before = self.path.read_bytes() if self.path.exists() else b""
        kept, last_step = [], None
        for line_step, line in self._split_lines(before):
            if step is not None and line_step <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
                last_step = line_step

        # Rewrite the file only if something was dropped.
        after = b"".join(kept)
        if after != before:
            write_atomically(self.path, after)
        return last_step

    def read_last_step(self) -> int | None:
        """The step of the last complete line; None without a line.  Raises ValueError as `truncate` does."""
        lines = self._split_lines(self.path.read_bytes() if self.path.exists() else b"")
        return lines[-1][0] if lines else None

    def _split_lines(self, content: bytes) -> list[tuple[int, bytes]]:
        """The lines with their steps, without an incomplete last one, which a killed process has left."""
        found = []
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                found.append((int(json.loads(line)["step"]), line))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    break
                raise ValueError(
                    f"{self.path}, line {number} is no JSON object with a step ({error}): "
                    "fix or delete the line"
                ) from error
        return found

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Append rows and flush them to disk; values may be of any type that `to_jsonable` takes.

        Raises OSError, naming the file, if the disk is full; the next start drops the incomplete line.
        """
        lines = [json.dumps(to_jsonable(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        text = "".join(lines)
        # A lone surrogate cannot be encoded as UTF-8; the escape \udXXX means the same in JSON.
        data = text.encode("utf-8", "backslashreplace")
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)
            # An unbuffered file may write only a part, for example on a disk that is almost full.
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())  # a checkpoint must never be newer than the lines of its steps
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}: fix that, and start the same command again", str(self.path)
            ) from error

    def close(self) -> None:
        """Close the file; another `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file.  Raises ValueError, naming file and line, for a bad line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): is the run still writing?"
                ) from None
    return rows


def parse_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Undo `to_jsonable` for a row of numbers: NaN and infinities become floats again."""
    return {name: _NOT_FINITE.get(value, value) for name, value in row.items()}
