"""What a reward model's training shows while it runs: a line of figures, and a table with a row per evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cooper_jax.runtime.console import CONSOLE, Console
from cooper_jax.runtime.console_table import GrowingTable
from cooper_jax.runtime.progress import Pace, Progress, format_duration

# Figures of the held-out rows: (heading, metric, format).  As in launch/train.py, `held-out` is their accuracy.
FIGURES = (
    ("held-out", "eval/accuracy", ".1%"),
    ("loss", "eval/loss", ".4f"),
    ("AUROC", "eval/auroc", ".4f"),
    ("ECE", "eval/ece", ".4f"),
)
COLUMNS = (
    ("update", 6),
    *((heading, 8) for heading, _, _ in FIGURES),
    ("best", 6),
    ("s/update", 8),
    ("ETA", 8),
)


class _UpdateProgress(Progress):
    """The figures of the live line; those of held-out rows are in the table."""

    SHOWN = (
        ("loss", "train_rm/loss", ".4f"),
        ("accuracy", "train_rm/accuracy", ".1%"),
        ("tokens/s", "time/tokens_per_second", ",.0f"),
    )


class RmDisplay:
    """The display of a reward model's training.

    Args:
      updates: the total number.
      eval_every: updates between evaluations.
      rows: the run's metrics so far, of which the last evaluation is shown again when it resumes.
      best: the update of the best evaluation so far; None: there is none.
      done: updates done before this start.
    """

    def __init__(
        self,
        updates: int,
        eval_every: int,
        rows: Sequence[Mapping[str, float]] = (),
        best: int | None = None,
        done: int = 0,
        console: Console = CONSOLE,
    ):
        self._console = console
        self._table = GrowingTable(COLUMNS, console)
        self._pace = Pace(updates, done, eval_every, compile_seconds=lambda: console.compile_seconds)
        evaluated = [row for row in rows if FIGURES[0][1] in row]
        if evaluated:
            self._print_evaluation(int(evaluated[-1]["step"]), evaluated[-1], best, shows_pace=False)
            self._pace.take_first_evaluation(evaluated[-1].get("time/eval", 0.0))
        self._progress = _UpdateProgress(updates, done, console, self._pace)

    def show_detail(self, text: str) -> None:
        """Say on the live line what is done now, as in "update 3/8"."""
        self._console.show_detail(text)

    def show_update(self, update: int, metrics: Mapping[str, float], best: int | None) -> None:
        """Show the figures of a complete update, and its evaluation if it had one.

        best: the update of the best evaluation so far.
        """
        self._progress.update(update, metrics)
        if FIGURES[0][1] in metrics:
            self._print_evaluation(update, metrics, best)

    def _print_evaluation(
        self, update: int, metrics: Mapping[str, float], best: int | None, shows_pace: bool = True
    ) -> None:
        cells = [str(update), *(_format_figure(metrics[name], spec) for _, name, spec in FIGURES)]
        # The update whose model is in best/: this one, or one before it.
        cells.append("-" if best is None else "this" if best == update else str(best))
        seconds, left = self._pace.seconds_per_step, self._pace.seconds_left
        cells.append(f"{seconds:.1f}" if shows_pace and seconds is not None else "-")
        cells.append(format_duration(left) if shows_pace and left is not None else "-")
        self._table.print_row(cells)


def _format_figure(value: float, spec: str) -> str:
    # Rows of one label have no AUROC.
    return "-" if math.isnan(value) else f"{value:{spec}}"
