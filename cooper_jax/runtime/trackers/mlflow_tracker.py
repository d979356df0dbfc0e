"""A tracker that logs to MLflow: the server or database that MLFLOW_TRACKING_URI names, or ./mlflow.db.

A resumed run continues the run of the stored id.  Samples are artifacts: a table for each kind, and a text.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from cooper_jax.runtime.trackers import sample_tables
from cooper_jax.runtime.trackers.tracker import PHASES, PROJECT, Samples, TrackedRun

# What MLflow's names must not contain.
_UNKNOWN_CHARACTERS = re.compile(r"[^/\w.\- :]")
# Its limits for parameters.
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000


class MlflowTracker:
    """Logs scalars, parameters and samples to a run of MLflow."""

    REPLACES_ROWS = False

    @staticmethod
    def check_environment() -> None:
        """Do nothing: without settings MLflow writes a local database."""

    def __init__(self, run: TrackedRun):
        # The client has no global state, unlike `mlflow.start_run`: other threads may use MLflow as well.
        self._client = MlflowClient()
        if "id" in run.state:
            self._id = run.state["id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        for params in _split_params(run.config):
            self._client.log_batch(self._id, params=params)
        run.state["id"] = self._id  # last: an attempt that failed before begins another run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics in one call."""
        now = int(time.time() * 1000)
        points = [Metric(_UNKNOWN_CHARACTERS.sub("_", name), x, now, step) for name, x in metrics.items()]
        self._client.log_batch(self._id, metrics=points)

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of a phase, at its own steps."""
        self.log(step, {f"{PHASES}/{phase}/{name}": value for name, value in figures.items()})

    def log_samples(self, step: int, samples: Samples) -> None:
        """Log a step's samples as artifacts."""
        for name, rows in sample_tables.make_tables(step, samples).items():
            columns, data = sample_tables.split_columns(rows)
            self._client.log_dict(
                self._id, {"columns": columns, "data": data}, f"{name}/step_{step:06d}.json"
            )
        text = sample_tables.format_samples(step, samples)
        self._client.log_text(self._id, text, f"samples/text/step_{step:06d}.md")

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


def _split_params(config: Mapping[str, object]) -> Iterator[list[Param]]:
    """The settings as parameters, in lists that one call may have."""
    params = [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in config.items()]
    for start in range(0, len(params), _PARAMS_PER_CALL):
        yield params[start : start + _PARAMS_PER_CALL]
