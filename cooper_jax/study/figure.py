"""A study's figure: a column for each arm, with three panels.

1. Held-out accuracy by exact truth; the dashed line is the rule arm's mean.  The number at the end of a curve is
   the mean curve's last value.
2. Mean reward of the policy at each step, and the share of false positives (the hacking signal).
3. Accuracy of the reward model on the policy's own held-out responses, which is what the policy exploits.  Its
   accuracy on a fixed set of completions hardly moves in any arm, and is in the tables alone.

A thick line is the mean over the seeds.  Where an evaluation is made at few steps, each seed is a thin line behind
it; where there is a value at every step, a band spans the seeds.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from cooper_jax.runtime.extras import import_extra
from cooper_jax.study.records import Record, Records
from cooper_jax.study.summary import PLAIN

WIDTH, ROWS, HEAD = (
    10.7,
    (2.3, 1.6, 1.3),
    1.0,
)  # inches: of all, of the three rows, of titles and what explains
DPI = 150  # 1,600 pixels
MOST = 6  # columns; further arms stand in a block of their own below
LETTERS = 140  # of what arms are, in a line across the picture
COLOURS = 96
SMOOTH = 5  # steps, of which the thick lines of the second row show the mean
INK, PALE, GRID = "#222222", "#777777", "#e8e8e8"
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"  # of Okabe and Ito, whom the colour-blind thank


def draw_figure(records: Records) -> bytes:
    """A PNG of the arms that have a run.  Raises ValueError where none has."""
    import_extra("matplotlib", "figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [name for name in records.study["arms"] if records.of(name)]
    if not arms:
        raise ValueError("no run has been evaluated yet: there is nothing to draw")
    count = -(-len(arms) // MOST)
    columns = -(-len(arms) // count)
    letters = LETTERS // columns
    abouts = {
        a: textwrap.wrap(records.study["arms"][a]["about"], letters, break_on_hyphens=False) for a in arms
    }
    figure = Figure(figsize=(WIDTH, count * (sum(ROWS) + HEAD)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.02)
    grid = figure.subplots(3 * count, columns, squeeze=False, sharex=True, height_ratios=ROWS * count)
    top = max(e["accuracy"] for run in records.runs for e in run.evaluations)
    for i, name in enumerate(arms):
        block, column = divmod(i, columns)
        above, middle, below = grid[3 * block : 3 * block + 3, column]
        _titled(above, name, abouts[name], max(map(len, abouts.values())))
        _accuracy(above, records.of(name), records.of(PLAIN) if name != PLAIN else ())
        _training(middle, records.of(name))
        _judge(below, records.of(name))
        above.set_ylim(0, min(1, np.ceil(top * 10 + 0.5) / 10))
        below.set_ylim(0, 1.02)
        for axes in (above, middle, below):
            _plain(axes, records.study["steps"], labelled=column == 0)
        below.set_xlabel("step", fontsize=8.5, color=INK)
        below.tick_params(labelbottom=True)
        if column == 0:
            _named(above, ("held-out accuracy", BLUE))
            _named(middle, ("reward", INK), ("false positives", VERMILION))
            _named(below, ("reward model", GREEN), ("accuracy", GREEN))
    for axes in grid[3 * count - 3 :, len(arms) - columns * (count - 1) :].flat:
        axes.set_visible(False)
    figure.supxlabel(_explained(records), fontsize=7.5, color=PALE)
    return _small(figure)


def _small(figure: Any) -> bytes:
    """A figure as a PNG with a palette, which takes a third of the bytes."""
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
        out, "png", optimize=True
    )
    return out.getvalue()


def _titled(axes: Any, name: str, about: Sequence[str], lines: int) -> None:
    """lines: of room for those of `about`, alike in all panels."""
    told = "\n".join([*about, *[" "] * (lines - len(about))])
    axes.set_title(told, fontsize=7.5, color=PALE, linespacing=1.2)
    axes.annotate(
        name, (0.5, 1), (0, 9 + 11 * lines), xycoords="axes fraction", textcoords="offset points",
        ha="center", fontsize=11, fontweight="bold", color=INK, annotation_clip=False,
    )  # fmt: skip


def _accuracy(axes: Any, runs: Sequence[Record], plain: Sequence[Record]) -> None:
    """plain: the rule arm's runs; none in the rule arm's own panel."""
    from matplotlib.patheffects import withStroke

    own = _mean_of(runs, "accuracy")
    if mean := _mean_of(plain, "accuracy"):
        axes.plot(*mean, color=PALE, lw=1.1, ls=(0, (4, 2)), zorder=1)
        above = own is not None and own[1][-1] > mean[1][-1]  # the label goes to the other side, near the end
        at, place, side = (-1, (-2, -6), "top") if above else (len(mean[0]) // 2, (-2, 4), "baseline")
        axes.annotate(
            PLAIN, (mean[0][at], mean[1][at]), place, textcoords="offset points", ha="right", va=side,
            fontsize=7.5, color=PALE, zorder=1,
        )  # fmt: skip
    _lines(axes, runs, "accuracy", BLUE)
    if own:
        # Between the two curves the number would cover one of them.
        under = mean is not None and 0.12 < own[1][-1] < mean[1][-1]
        axes.annotate(
            f"{own[1][-1]:.0%}", (own[0][-1], own[1][-1]), (-1, -14 if under else 5),
            textcoords="offset points", ha="right", fontsize=9, fontweight="bold", color=BLUE, zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _training(axes: Any, runs: Sequence[Record]) -> None:
    for name, colour in (("false_positives", VERMILION), ("reward", INK)):
        told = [run.steps[name] for run in runs if not np.isnan(run.steps[name]).all()]
        if not told:
            continue
        length = max(map(len, told))
        smooth = np.array([[*_smooth(np.array(x)), *[np.nan] * (length - len(x))] for x in told])
        steps, there = range(1, length + 1), ~np.isnan(smooth)
        lowest, highest = np.where(there, smooth, np.inf).min(0), np.where(there, smooth, -np.inf).max(0)
        axes.fill_between(
            steps, lowest, highest, where=there.any(0), color=colour, alpha=0.15, lw=0, zorder=2
        )
        mean = np.where(there, smooth, 0).sum(0) / np.maximum(there.sum(0), 1)
        axes.plot(steps, np.where(there.any(0), mean, np.nan), color=colour, lw=1.7, zorder=3)
    axes.set_ylim(0, 1)


def _judge(axes: Any, runs: Sequence[Record]) -> None:
    axes.set_yticks([0, 0.5, 1])
    if any("rm_policy" in e for run in runs for e in run.evaluations):
        _lines(axes, runs, "rm_policy", GREEN)
    else:
        axes.text(0.5, 0.5, "no reward model", transform=axes.transAxes, ha="center", fontsize=8, color=PALE)


def _lines(axes: Any, runs: Sequence[Record], name: str, colour: str) -> None:
    for run in runs:
        points = [(e["step"], e[name]) for e in run.evaluations if name in e]
        axes.plot(*zip(*points, strict=True), color=colour, lw=0.7, alpha=0.35, zorder=2)
    if mean := _mean_of(runs, name):
        axes.plot(*mean, color=colour, lw=2.2, zorder=3, solid_capstyle="round")


def _mean_of(runs: Sequence[Record], name: str) -> tuple[list[int], list[float]] | None:
    """(steps, means over the runs) at the evaluations that all have; of those that have come farthest."""
    runs = [run for run in runs if run.done == max(r.done for r in runs)]
    told = [{e["step"]: e[name] for e in run.evaluations if name in e} for run in runs]
    steps = [step for step in told[0] if all(step in one for one in told)] if told else []
    return (steps, [float(np.mean([one[step] for one in told])) for step in steps]) if steps else None


def _smooth(values: np.ndarray) -> np.ndarray:
    """A moving mean of what is not NaN, of fewer steps at both ends; NaN of nothing."""
    half = SMOOTH // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([np.nan if np.isnan(x).all() else np.nanmean(x) for x in windows])


def _plain(axes: Any, steps: int, *, labelled: bool) -> None:
    axes.set_xlim(0, steps)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=INK, length=2.5, labelleft=labelled)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")


def _named(axes: Any, *names: tuple[str, str]) -> None:
    """The names of the first column's lines, in their colours, where an axis has its label."""
    axes.set_ylabel(" ", fontsize=8.5, labelpad=4 + 11 * (len(names) - 1))
    for i, (name, colour) in enumerate(names):
        axes.annotate(
            name, (0, 0.5), (-34 - 11 * (len(names) - 1 - i), 0), xycoords="axes fraction",
            textcoords="offset points", rotation=90, ha="center", va="center", fontsize=8.5, color=colour,
            annotation_clip=False,
        )  # fmt: skip


def _explained(records: Records) -> str:
    seeds = len({run.seed for run in records.runs})
    told = (
        f"Thick lines: mean of {seeds} seeds. Thin lines and bands: the single seeds and their range. "
        if seeds > 1
        else ""
    )
    told += (
        "The number in a panel is the end of its mean curve. False positives: of the responses that the rule "
        "finds wrong, the share with a reward above one half. Reward model accuracy: on the policy's own held-out "
        "responses."
    )
    return textwrap.fill(told, 165)
