"""A tracker that logs to trackio: local files, or a Space or server that the library's own variables name.

A resumed run continues the run of the stored name.  trackio tells of its own failures by warnings, and raises
nothing.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

import trackio

from cooper_jax.runtime.trackers import sample_tables
from cooper_jax.runtime.trackers.tracker import PHASES, PROJECT, Samples, TrackedRun


class TrackioTracker:
    """Logs scalars and tables of samples to a run of trackio."""

    REPLACES_ROWS = False

    @staticmethod
    def check_environment() -> None:
        """Do nothing: without settings trackio writes local files."""

    def __init__(self, run: TrackedRun):
        # trackio finds a run by its name alone, so the name must differ from those of other run directories.
        name = run.state.setdefault("name", f"{run.name}-{secrets.token_hex(3)}")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            resume="allow",
            config=dict(run.config),
            embed=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics."""
        self._run.log(dict(metrics), step=step)

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of a phase, at its own steps."""
        self._run.log({f"{PHASES}/{phase}/{name}": value for name, value in figures.items()}, step=step)

    def log_samples(self, step: int, samples: Samples) -> None:
        """Log a step's samples as tables."""
        tables = sample_tables.make_tables(step, samples)
        self._run.log({name: _make_table(rows) for name, rows in tables.items()}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def _make_table(rows: list[sample_tables.TableRow]) -> trackio.Table:
    """A table of rows.  A column may have no value for some rows."""
    columns, data = sample_tables.split_columns(rows)
    return trackio.Table(columns=columns, data=data)
