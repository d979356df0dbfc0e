"""What a run tells: numbers per step, seconds per phase, one live line.

1. `to_host` brings a step's numbers over in one transfer.
2. `Phases` adds up wall-clock seconds under `time/<phase>`.
3. `JsonLines` appends one JSON object a line, and is cut back to a step when a run resumes.
4. `Progress` shows where the run stands.

JSON has no NaN and no infinities: NaN is written as null, the others as the strings "inf" and "-inf", so that
every line stays valid JSON, and `numbers` turns them back into numbers.
"""

from __future__ import annotations

import collections
import contextlib
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

_NOT_FINITE = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


def to_host(metrics: Mapping[str, Any], group: str = "") -> Metrics:
    """Scalars on the device -> host floats, in one transfer, under `group/` where one is given."""
    prefix = f"{group}/" if group else ""
    return {prefix + name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


class PhaseTimer:
    """Wall-clock seconds per named phase; phases may nest or run in several threads, each counts its own.

    JAX works in the background: a phase must fetch (or block on) what it made, or the next one pays for it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def collect(self) -> Metrics:
        """`time/<phase>` -> seconds since the last call, which begins anew."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}


def to_jsonable(x: Any, where: str = "") -> Any:
    """Plain JSON values from numbers, strings, NumPy or JAX scalars and containers of them.

    Raises TypeError for anything else, naming its place.
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
        return x if math.isfinite(x) else None if math.isnan(x) else str(float(x))
    if isinstance(x, np.generic | np.ndarray | jax.Array):
        return to_jsonable(np.asarray(x).tolist(), where)
    raise TypeError(f"{where.lstrip('.') or 'the value'} is a {type(x).__name__}, which has no place in JSON")


class JsonLines:
    """A file of JSON objects, one a line, each with its `step`; steps never go back."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = None

    def truncate(self, step: int | None) -> int | None:
        """Drop the lines after `step` (all of them for None) and a torn last one; returns the last step kept.

        The file is rewritten in one step, so a kill loses nothing.  Raises ValueError for a line before the
        last that is not an object with a step.
        """
        self.close()
        before = self.path.read_bytes() if self.path.exists() else b""
        kept, last = [], None
        lines = before.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                at = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    break  # torn by a kill
                raise ValueError(
                    f"{self.path}, line {number} is no JSON object with a step ({error}): mend or delete the line"
                ) from error
            if step is not None and at <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
                last = at
        after = b"".join(kept)
        if after != before:
            write_atomically(self.path, after)
        return last

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows and see them onto the disk; values as `jsonable` takes them.

        Raises OSError, naming the file, for a disk that is full; the next start drops what was torn.
        """
        text = "".join(
            json.dumps(to_jsonable(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows
        )
        # A lone surrogate has no UTF-8 form; as the escape \udXXX it is what JSON would write.
        data = text.encode("utf-8", "backslashreplace")
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())  # a checkpoint must never be ahead of the lines that it stands for
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}: mend that, and start the same command again", str(self.path)
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.  Raises ValueError naming file and line for a malformed one."""
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
    """A row of `jsonable` numbers, NaN and infinities as numbers again."""
    return {name: _NOT_FINITE.get(value, value) for name, value in row.items()}


class Progress:
    """One live line on a terminal; elsewhere (a log file, a pipe) one plain line a step.

    steps: in all.  done: those of an earlier life, which the estimate of the time left does not count.  quiet: say
    nothing, as a run's further processes do.
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
        # The last few steps alone: the first compiles, and evaluations or checkpoints come now and then.
        self._marks = collections.deque([(done, clock())], maxlen=11)
        self._bar = None
        if self._out.isatty() and not quiet:
            self._bar = tqdm(total=steps, initial=done, file=self._out, unit="step", bar_format=_BAR)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` is done.  ETA is steps left times the mean of the last ten steps' seconds."""
        if self._quiet:
            return
        self._marks.append((step, self._clock()))
        (first, start), (last, end) = self._marks[0], self._marks[-1]
        pace = (end - start) / max(last - first, 1)
        parts = [f"{label} {metrics[name]:{form}}" for label, name, form in self.SHOWN if name in metrics]
        parts.append(f"{pace:.1f} s/step")
        parts.append(f"ETA {_clock_time(pace * max(self.steps - step, 0))}")
        if self._bar is None:
            print(f"step {step}/{self.steps}  " + "  ".join(parts), file=self._out, flush=True)
        else:
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """A line of its own, which does not break the live one."""
        if self._bar is None:
            print(text, file=self._out, flush=True)
        else:
            self._bar.write(text, file=self._out)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


_BAR = "step {n_fmt}/{total_fmt} |{bar}| {postfix}"


def _clock_time(seconds: float) -> str:
    """Seconds -> h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
