"""Metrics of a run: numbers per step, seconds per phase, JSON lines, and a progress line.

1. `to_host` copies a step's numbers from the device in one transfer.
2. `PhaseTimer` adds up wall-clock seconds under `time/<phase>`.
3. `JsonLines` appends one JSON object per line, and is truncated to a step when a run resumes.
4. `Progress` shows the current step, its metrics and the remaining time.

JSON has no NaN and no infinities: NaN is written as null, infinities as the strings "inf" and "-inf", so that
every line stays valid JSON.  `parse_numbers` converts them back.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.types import Metrics

# Values of `to_jsonable` that stand for floats.
_NOT_FINITE = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


def to_host(metrics: Mapping[str, Any], group: str = "") -> Metrics:
    """Copy scalars from the device in one transfer, as floats; names get the prefix `group/`, if given."""
    prefix = f"{group}/" if group else ""
    return {prefix + name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


class PhaseTimer:
    """Wall-clock seconds per named phase; phases may nest or run in threads, each is timed separately.

    JAX dispatches asynchronously: a phase must fetch its results (or block on them), or the next phase's time
    includes their computation.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a `with` block to a phase."""
        start = self._clock()
        try:
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
        lines = before.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                line_step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    # The process was killed while it wrote the line.
                    break
                raise ValueError(
                    f"{self.path}, line {number} is no JSON object with a step ({error}): "
                    "fix or delete the line"
                ) from error
            if step is not None and line_step <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
                last_step = line_step

        # Rewrite the file only if something was dropped.
        after = b"".join(kept)
        if after != before:
            write_atomically(self.path, after)
        return last_step

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


class Progress:
    """A progress bar on a terminal; elsewhere (a log file, a pipe) one plain line per step.

    Args:
      steps: total number of steps.
      done: steps done before this start, which the estimate of the remaining time does not count.
      quiet: print nothing (processes other than the primary one).
    """

    # (label, metric, format); a metric that an arm does not have is left out.
    SHOWN: tuple[tuple[str, str, str], ...] = (
        ("reward", "reward/mean", ".3f"),
        ("rule", "rule/accuracy", ".1%"),
        ("kl", "policy/kl", ".2e"),
    )

    def __init__(
        self,
        steps: int,
        done: int = 0,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        quiet: bool = False,
    ):
        self.steps = steps
        self._quiet = quiet
        self._out = sys.stdout if out is None else out
        self._clock = clock
        # (step, time) of the last ten steps.  An average over the whole run would include the first step,
        # which compiles; ten steps are enough to average over an occasional checkpoint.
        self._step_times = collections.deque([(done, clock())], maxlen=11)
        self._bar: tqdm | None = None
        if self._out.isatty() and not quiet:
            self._bar = tqdm(total=steps, initial=done, file=self._out, unit="step", bar_format=_BAR)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done.  ETA: the steps left times the mean seconds of the last ten steps."""
        if self._quiet:
            return

        self._step_times.append((step, self._clock()))
        # The first entry is the start of the oldest step in the window.
        (first, start), (last, end) = self._step_times[0], self._step_times[-1]
        seconds_per_step = (end - start) / max(last - first, 1)
        parts = [f"{label} {metrics[name]:{spec}}" for label, name, spec in self.SHOWN if name in metrics]
        parts.append(f"{seconds_per_step:.1f} s/step")
        parts.append(f"ETA {_format_duration(seconds_per_step * max(self.steps - step, 0))}")

        if self._bar is None:
            print(f"step {step}/{self.steps}  " + "  ".join(parts), file=self._out, flush=True)
        else:
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._bar is None:
            print(text, file=self._out, flush=True)
        else:
            self._bar.write(text, file=self._out)

    def close(self) -> None:
        """Finish the progress bar."""
        if self._bar is not None:
            self._bar.close()


_BAR = "step {n_fmt}/{total_fmt} |{bar}| {postfix}"


def _format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
