"""All trackers of a run: they are opened, given its rows, and resumed with it.

`trackers.json` in the run directory has, by tracker, the steps up to which it has taken metrics and samples,
the number of rows of supervised.jsonl, and its state (its id for the run, say).  When a run resumes after a
checkpoint of step c,

1. a tracker that has less than the rows up to c, because it failed or was not named before, first gets the missing
   ones from the files of the run;
2. one that has rows after c gets those after them only: a resumed run repeats its steps bit for bit, so that a
   second copy would say nothing.  One that replaces rows (TensorBoard) gets all rows after c.

A run that starts from step 0 again is a new run for its trackers.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from cooper_jax.runtime import metrics
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.runtime.trackers.tracker import Samples, TrackedRun
from cooper_jax.runtime.trackers.tracker_choice import ChosenTracker
from cooper_jax.runtime.trackers.tracker_thread import Row, TrackerThread

STATE_FILE = "trackers.json"
# Seconds that all trackers together have at the end of a run.
CLOSE_SECONDS = 60.0


@dataclasses.dataclass
class _Stored:
    """What trackers.json has of one tracker."""

    # The last steps whose rows it has taken; -1: none.
    metrics: int = -1
    samples: int = -1
    phases: int = 0  # the number of rows of supervised.jsonl that it has taken
    state: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.metrics, self.samples, self.phases)
        if not (all(isinstance(number, int) for number in numbers) and isinstance(self.state, dict)):
            raise TypeError("`metrics`, `samples` and `phases` are whole numbers, `state` is an object")


class RunTrackers:
    """The open trackers of a run.

    Args:
      chosen: the trackers.
      path: the run directory.
      folder: the local folder of metrics.jsonl and samples.jsonl: the run directory, unless that is under gs://.
      config: dotted name -> value.
      step: of the checkpoint after which the run resumes; None: it starts.

    Raises ValueError for a trackers.json that is malformed.
    """

    def __init__(
        self,
        chosen: Sequence[ChosenTracker],
        path: Path | epath.Path,
        folder: Path,
        config: Mapping[str, Any],
        step: int | None,
    ):
        self._path, self._folder = path, folder
        # Trackers that are not named in this start keep their entries.
        self._stored = {} if step is None else _read_state(path / STATE_FILE)
        self._lock = threading.Lock()  # guards the stored entries, which the trackers' threads change
        self._skipped: dict[str, _Stored] = {}  # by tracker: the steps that it has already
        self._threads = [self._start(tracker, config, step) for tracker in chosen]

    def _start(self, tracker: ChosenTracker, config: Mapping[str, Any], step: int | None) -> TrackerThread:
        """Start a tracker's thread with the rows that the tracker lacks."""
        stored = self._stored.setdefault(tracker.name, _Stored())
        resumes = stored.metrics >= 0
        if tracker.replaces_rows and step is not None:
            stored.metrics, stored.samples = min(stored.metrics, step), min(stored.samples, step)
        self._skipped[tracker.name] = dataclasses.replace(stored)
        run = TrackedRun(
            name=self._path.name,
            folder=self._folder,
            config=config,
            first_step=stored.metrics + 1,
            resumes=resumes,
            state=stored.state,
        )
        return TrackerThread(
            tracker.name,
            lambda: tracker.open(run),
            [] if step is None else _read_rows(self._folder, stored),
            lambda row: self._store(tracker.name, row),
        )

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Give a step's metrics to all trackers."""
        self._put(Row(step, metrics=dict(row)))

    def log_samples(self, step: int, samples: Samples) -> None:
        """Give a step's samples to all trackers."""
        self._put(Row(step, samples=metrics.to_jsonable(samples)))

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Give the figures of an update of a phase before step 1 to all trackers."""
        for thread in self._threads:
            thread.put(Row(step, metrics=dict(figures), phase=phase))

    def _put(self, row: Row) -> None:
        for thread in self._threads:
            if _is_missing(row, self._skipped[thread.name]):
                thread.put(row)

    @property
    def failures(self) -> int:
        """Failures of all trackers since this start."""
        return sum(thread.failures for thread in self._threads)

    def take_messages(self) -> list[str]:
        """What happened since the last call, one line each."""
        return [message for thread in self._threads for message in thread.take_messages()]

    def close(self) -> None:
        """Let the trackers take the rows that wait, for CLOSE_SECONDS at most, and end them."""
        for thread in self._threads:
            thread.begin_close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.wait(deadline)

    def describe_failures(self) -> list[str]:
        """One line for each tracker that failed."""
        file = self._folder / "metrics.jsonl"
        return [
            f"{thread.name}: {thread.failures} calls failed or rows were left out; {file} has all rows"
            for thread in self._threads
            if thread.failures
        ]

    def _store(self, name: str, row: Row) -> None:
        """Store that a tracker has taken a row, with what it keeps; called in the tracker's thread."""
        with self._lock:
            entry = self._stored[name]
            if row.phase:
                entry.phases += 1
            elif row.metrics is None:
                entry.samples = row.step
            else:
                entry.metrics = row.step
            entries = {name: dataclasses.asdict(entry) for name, entry in self._stored.items()}
            text = json.dumps(entries, indent=2) + "\n"
            write_atomically(self._path / STATE_FILE, text.encode())


def _is_missing(row: Row, stored: _Stored) -> bool:
    """True for a row that a tracker has not taken yet."""
    return row.step > (stored.samples if row.metrics is None else stored.metrics)


def _read_state(path: Path | epath.Path) -> dict[str, _Stored]:
    """Read trackers.json; {} if there is none.  Raises ValueError if it is malformed."""
    if not path.exists():
        return {}
    try:
        return {name: _Stored(**entry) for name, entry in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is malformed ({error}): delete it, and the trackers begin new runs with all rows"
        ) from None


def _read_rows(folder: Path, stored: _Stored) -> list[Row]:
    """Read the rows that a tracker lacks, in the order in which a run writes them."""
    rows: list[Row] = []
    if (path := folder / "metrics.jsonl").exists():
        for line in metrics.read_lines(path):
            step = line.pop("step")
            rows.append(Row(step, metrics=metrics.parse_numbers(line)))
    samples: dict[int, list[dict[str, Any]]] = {}
    if (path := folder / "samples.jsonl").exists():
        for line in metrics.read_lines(path):
            samples.setdefault(line.pop("step"), []).append(line)
    rows += [Row(step, samples=lines) for step, lines in samples.items()]

    phases: list[Row] = []
    if (path := folder / "supervised.jsonl").exists():
        for line in metrics.read_lines(path):
            phase, step = line.pop("phase"), line.pop("step")
            phases.append(Row(step, metrics=metrics.parse_numbers(line), phase=phase))

    # Sorting is stable: a step's metrics stay before its samples.
    missing = [row for row in rows if _is_missing(row, stored)]
    return phases[stored.phases :] + sorted(missing, key=lambda row: row.step)
