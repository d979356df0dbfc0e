"""The form of a tracker: what receives a run's metrics and samples, beside the files of the run directory.

A tracker is a class with three methods, or one function:

    class Tracker:                                      def write(step, metrics):
        def __init__(self, run): ...                        ...
        def log(self, step, metrics): ...
        def log_samples(self, step, samples): ...
        def close(self): ...

A class may have log_phase(phase, step, figures), too, which gets the rows of supervised.jsonl: losses of the phases
before step 1.  A function is called once for each row of metrics, with those of `run`, `step` and `metrics` that it
names.

All calls of one tracker come from one thread, in the order of the steps (tracker_thread.py), so a call may wait for
a network.  A call that raises is repeated: a tracker must stand being given one row twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cooper_jax.settings.user_code import choose_arguments

Samples = Sequence[Mapping[str, Any]]

PROJECT = "cooper"  # the libraries' name for all runs, unless their own variables give another
TENSORBOARD_FOLDER = "tensorboard"  # of event files, in the run directory
PHASES = "supervised"  # the name of the phases before step 1
EVENT_FOLDERS = (TENSORBOARD_FOLDER, f"{TENSORBOARD_FOLDER}/{PHASES}")


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of its run when it is opened."""

    name: str  # the last part of the run directory's path
    folder: Path  # the run directory; for a run under gs://, the local folder whose files are uploaded
    config: Mapping[str, Any]  # dotted name -> value, as in config.json
    first_step: int  # the step of the first row that it will get, or an earlier one
    resumes: bool  # False: this tracker has had no row of this run yet

    # What the tracker wants to find again when the run resumes, such as an id; stored in trackers.json.
    state: dict[str, str] = dataclasses.field(default_factory=dict)


class Tracker(Protocol):
    """Receives the rows of metrics.jsonl, samples.jsonl and supervised.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step's metrics, `group/name` -> number, of which some may be NaN or infinite."""

    def log_samples(self, step: int, samples: Samples) -> None:
        """Take a step's rows of samples.jsonl, without their `step`."""

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Take figures of an update of a phase before step 1, such as its loss.  step: counted in the phase."""

    def close(self) -> None:
        """Send what is left, and end."""


class ClassTracker:
    """A tracker made of the user's class, which need not take phases."""

    def __init__(self, own: Callable[[TrackedRun], Any], takes_phases: bool, run: TrackedRun):
        self._own, self._takes_phases = own(run), takes_phases

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass a step's metrics on."""
        self._own.log(step, metrics)

    def log_samples(self, step: int, samples: Samples) -> None:
        """Pass a step's samples on."""
        self._own.log_samples(step, samples)

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Pass figures of a phase on, if the class takes them."""
        if self._takes_phases:
            self._own.log_phase(phase, step, figures)

    def close(self) -> None:
        """End the user's tracker."""
        self._own.close()


class FunctionTracker:
    """A tracker made of a function."""

    def __init__(self, function: Callable[..., Any], run: TrackedRun):
        self._function, self._run = function, run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call the function."""
        offered = {"run": self._run, "step": step, "metrics": metrics}
        self._function(**choose_arguments(self._function, offered))

    def log_samples(self, step: int, samples: Samples) -> None:
        """Ignore the samples, which functions do not get."""

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Ignore the phases before step 1, which functions do not get."""

    def close(self) -> None:
        """Do nothing: a function has no end."""
