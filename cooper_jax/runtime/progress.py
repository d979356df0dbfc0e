"""Progress over steps: their pace, the time that is left, and a line of figures.

A step that compiled something, evaluated or saved a checkpoint says little about the steps to come.  So the pace
is the median of recent steps, without the seconds in which something was compiled, and evaluations are counted by
themselves.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Mapping

from cooper_jax.runtime.console import CONSOLE, Console

# Steps, and evaluations, whose median is the pace.
RECENT = 10


class Pace:
    """Seconds per step, and the time that is left.

    Args:
      steps: total number of steps.
      done: steps done before this start.
      eval_every: steps between evaluations; 0: there are none.
      clock: a function that returns seconds.
      compile_seconds: a function that returns the seconds in which this process has compiled something.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        eval_every: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        compile_seconds: Callable[[], float] = lambda: 0.0,
    ):
        self._steps, self._step, self._eval_every = steps, done, eval_every
        self._clock, self._compile_seconds = clock, compile_seconds
        self._last = (clock(), compile_seconds())
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._eval_seconds: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._awaits_evaluation = True  # none of this process is known yet

    def take_first_evaluation(self, seconds: float) -> None:
        """Take the seconds of an evaluation before this start's first step, until another one is known."""
        self._eval_seconds = collections.deque([seconds], maxlen=RECENT)

    def update(self, step: int, eval_seconds: float = 0.0) -> None:
        """Note that a step is done.

        eval_seconds: of the evaluation after it; 0: there was none.
        """
        now, compiled = self._clock(), self._compile_seconds()
        spent = now - self._last[0] - (compiled - self._last[1]) - eval_seconds
        # A first evaluation compiles, which would be subtracted twice.
        self._step_seconds.append(max(spent, 0.0) / max(step - self._step, 1))
        self._step, self._last = step, (now, compiled)
        if eval_seconds:
            if self._awaits_evaluation:
                self._eval_seconds.clear()
                self._awaits_evaluation = False
            self._eval_seconds.append(eval_seconds)

    @property
    def seconds_per_step(self) -> float | None:
        """The median of the last steps; None before the first."""
        return statistics.median(self._step_seconds) if self._step_seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step is done, evaluations included; None before the first step."""
        if (pace := self.seconds_per_step) is None:
            return None
        seconds = pace * max(self._steps - self._step, 0)
        if self._eval_every and self._eval_seconds:
            left = self._steps // self._eval_every - self._step // self._eval_every
            seconds += max(left, 0) * statistics.median(self._eval_seconds)
        return seconds


class Progress:
    """A line of figures for each step; on a terminal the live line has those of the last step instead.

    Args:
      steps: total number of steps.
      done: steps done before this start.
      pace: of the steps; None: a new one.
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
        console: Console = CONSOLE,
        pace: Pace | None = None,
    ):
        self.steps, self._console = steps, console
        self.pace = pace or Pace(steps, done, compile_seconds=lambda: console.compile_seconds)
        console.set_status("", done, steps)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done."""
        self.pace.update(step, metrics.get("time/eval", 0.0))
        parts = [f"{label} {metrics[name]:{spec}}" for label, name, spec in self.SHOWN if name in metrics]
        parts += describe_pace(self.pace)
        self._console.set_status("  ".join(parts), step, self.steps)
        self._console.print_unless_live(f"step {step}/{self.steps}  " + "  ".join(parts))


def describe_pace(pace: Pace) -> list[str]:
    """The pace and the time left as texts; none before the first step."""
    seconds, left = pace.seconds_per_step, pace.seconds_left
    if seconds is None or left is None:
        return []
    return [f"{seconds:.1f} s/step", f"ETA {format_duration(left)}"]


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
