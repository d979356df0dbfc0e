"""A tracker that writes TensorBoard's event files to <run_dir>/tensorboard: scalars, text and the config.

    tensorboard --logdir runs

Each start of a run writes a file of its own, which begins with a mark: readers ignore what earlier files have from
that step on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from cooper_jax.runtime.trackers import sample_tables
from cooper_jax.runtime.trackers.tracker import PHASES, TENSORBOARD_FOLDER, Samples, TrackedRun

# Columns of TensorBoard's table of runs beside their settings; those that a run does not log stay empty.
_SHOWN_METRICS = ("eval/oracle/accuracy", "eval/rule/accuracy", "reward/mean", "rule/accuracy", "policy/kl")


class TensorboardTracker:
    """Writes event files."""

    REPLACES_ROWS = True

    @staticmethod
    def check_environment() -> None:
        """Do nothing: event files need no settings."""

    def __init__(self, run: TrackedRun):
        self._folder = run.folder / TENSORBOARD_FOLDER
        self._phase_writer: SummaryWriter | None = None
        self._writer = SummaryWriter(
            str(self._folder),
            purge_step=run.first_step,
            filename_suffix=f".{run.first_step}",
        )
        self._writer.add_text("config", sample_tables.format_config(run.config), run.first_step)
        # `add_hparams` would write a second folder, which TensorBoard shows as another run.
        for summary in hparams(_list_settings(run.config), dict.fromkeys(_SHOWN_METRICS, 0.0)):
            self._writer.file_writer.add_summary(summary, run.first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars.  Values that are not finite are left out: the writer warns about each of them."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_phase(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Write scalars to a folder that TensorBoard shows as a run of its own.

        In the run's own files a resumed run would drop them, as they have low steps.
        """
        if self._phase_writer is None:
            self._phase_writer = SummaryWriter(str(self._folder / PHASES), purge_step=0)
        for name, value in figures.items():
            if math.isfinite(value):
                self._phase_writer.add_scalar(f"{phase}/{name}", value, step)
        self._phase_writer.flush()

    def log_samples(self, step: int, samples: Samples) -> None:
        """Write samples as text."""
        self._writer.add_text("samples", sample_tables.format_samples(step, samples), step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
        if self._phase_writer is not None:
            self._phase_writer.close()


def _list_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as TensorBoard takes them: numbers, booleans and texts."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in config.items()
    }
