"""A profile of some steps, written by jax's profiler for TensorBoard, XProf or Perfetto.

The phases of a step are named in it (metrics.PhaseTimer), and the steps themselves.
"""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError


def read_profile_steps(cfg: ConfigDict) -> tuple[int, int]:
    """Read `profile`, the first and the last step to profile; (0, 0): none.  Raises SetupError."""
    steps = tuple(cfg.profile)
    if len(steps) != 2 or not all(type(step) is int for step in steps):
        raise SetupError(f"profile={steps}: give the first and the last step, as in --config.profile='(3,5)'")
    first, last = steps
    if (first, last) != (0, 0) and not 1 <= first <= last:
        raise SetupError(
            f"profile={steps}: the first step must be at least 1 and at most the last; (0, 0) writes no profile"
        )
    return first, last


class StepProfiler:
    """Starts the profiler before the first of some steps, and stops it after the last.  A context manager."""

    def __init__(self, steps: tuple[int, int], folder: str):
        """steps: the first and the last one to profile; (0, 0): none.  folder: where the trace is written."""
        self._first, self._last = steps
        self._folder = folder
        self._is_running = False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def begin_step(self, step: int) -> None:
        """To be called before a step.  A run that resumes within the steps starts the profile there."""
        if self._first <= step <= self._last and not self._is_running:
            jax.profiler.start_trace(self._folder)
            self._is_running = True

    def end_step(self, step: int) -> None:
        """To be called after a step."""
        if step >= self._last:
            self._stop()

    def _stop(self) -> None:
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
            hosts.print_once(f"profile written to {self._folder}: open it with TensorBoard's profile plugin")
