"""The trackers that `log.to` names: those of libraries, and the user's own as PATH.py:NAME."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable

from cooper_jax.runtime import hosts
from cooper_jax.runtime.extras import import_extra
from cooper_jax.runtime.trackers.tracker import ClassTracker, FunctionTracker, TrackedRun, Tracker
from cooper_jax.settings.setup_errors import ErrorCollector, SetupError
from cooper_jax.settings.user_code import (
    find_missing_arguments,
    is_user_code,
    load_function,
    read_user_code,
)

_FIELD = "log.to"

# Name -> the library, which is also the name of the extra that installs it, and the module of its tracker.
_HERE = "cooper_jax.runtime.trackers"
LIBRARIES = {
    "tensorboard": ("tensorboardX", f"{_HERE}.tensorboard_tracker:TensorboardTracker"),
    "wandb": ("wandb", f"{_HERE}.wandb_tracker:WandbTracker"),
    "trackio": ("trackio", f"{_HERE}.trackio_tracker:TrackioTracker"),
    "mlflow": ("mlflow", f"{_HERE}.mlflow_tracker:MlflowTracker"),
}
_METHODS = ("log", "log_samples", "close")


@dataclasses.dataclass(frozen=True)
class ChosenTracker:
    """A tracker that can be opened."""

    name: str  # in messages and in trackers.json
    open: Callable[[TrackedRun], Tracker]
    # Takes a row of a step that it has already in place of the first one.
    replaces_rows: bool = False


def split_names(text: str) -> list[str]:
    """The names in `log.to`, without empty ones."""
    return [name.strip() for name in text.split(",") if name.strip()]


def find_name_errors(text: str) -> list[str]:
    """Write a message for each name in `log.to` that is no tracker, and for each that occurs twice."""
    names = split_names(text)
    errors = [
        f"{_FIELD}={name!r}: it is one of {', '.join(LIBRARIES)}, or PATH.py:NAME, a class or function of your own"
        for name in names
        if name not in LIBRARIES and not is_user_code(name)
    ]
    repeated = sorted({name for name in names if names.count(name) > 1})
    return errors + [f"{_FIELD}: {name} occurs twice" for name in repeated]


def load_trackers(text: str) -> list[ChosenTracker]:
    """Import the libraries and files that `log.to` names; on other hosts than the first, none.

    Raises SetupError with a message for each name that is unknown, that needs a library that is not installed, and
    that is no class or function of the right form.
    """
    if not hosts.is_primary():
        return []
    errors, chosen = ErrorCollector(find_name_errors(text)), []
    errors.raise_if_any()
    for name in split_names(text):
        with errors.collect(_FIELD):
            chosen.append(_load_library(name) if name in LIBRARIES else _load_own(name))
    # The name stands for the tracker in trackers.json.
    labels = [tracker.name for tracker in chosen]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        errors.require(False, f"{_FIELD}: two trackers are called {label}: rename one")
    errors.raise_if_any()
    return chosen


def _load_library(name: str) -> ChosenTracker:
    """Import a library and its tracker.  Raises SetupError if that is not possible."""
    library, target = LIBRARIES[name]
    try:
        import_extra(library, name)
    except ImportError as error:
        raise SetupError(f"{_FIELD}={name}: {' '.join(str(error).split())}") from error
    module, _, attribute = target.partition(":")
    tracker_class = getattr(importlib.import_module(module), attribute)
    tracker_class.check_environment()
    return ChosenTracker(name, tracker_class, replaces_rows=tracker_class.REPLACES_ROWS)


def _load_own(name: str) -> ChosenTracker:
    """Import a class or function of the user's.  Raises SetupError if it has not the form of a tracker."""
    code = read_user_code(name, _FIELD)
    function = tracker_class = load_function(code, _FIELD, allows_class=True)
    where = f"{_FIELD}={code.label!r}"
    if not inspect.isclass(function):
        if missing := find_missing_arguments(function, ("run", "step", "metrics")):
            raise SetupError(
                f"{where}: it takes {', '.join(missing)}, but a function is given run, step and metrics"
            )
        return ChosenTracker(code.label, functools.partial(FunctionTracker, function))
    if missing := [method for method in _METHODS if not callable(getattr(function, method, None))]:
        raise SetupError(
            f"{where}: the class has no {', '.join(missing)}; a tracker has the methods log(step, metrics), "
            "log_samples(step, samples) and close()"
        )
    if missing := find_missing_arguments(function, ("run",)):
        raise SetupError(f"{where}: it is made as {code.name}(run), but it takes {', '.join(missing)}")
    takes_phases = callable(getattr(tracker_class, "log_phase", None))
    return ChosenTracker(code.label, functools.partial(ClassTracker, tracker_class, takes_phases))
