"""A study's figure: a column for each arm, with three panels.

1. Held-out accuracy by exact truth.  The dashed line is the rule arm's mean.  The number at the end of the
   curve is the mean curve's last value.
2. Mean reward of the policy at each step, and the share of false positives (the hacking signal).
3. Accuracy of the reward model on the policy's own held-out responses, where the policy exploits its errors.
   Its accuracy on a fixed set of completions hardly changes in any arm, and is in the tables only.

A thick line is the mean over the seeds.  Quantities measured at evaluations also have a thin line for each
seed.  Quantities measured at every step have a band from the lowest to the highest seed.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from cooper_jax.runtime.extras import import_extra
from cooper_jax.study.records import Record, Records
from cooper_jax.study.summary import BASELINE

# Sizes.
WIDTH = 10.7  # inches
ROW_HEIGHTS = (2.3, 1.6, 1.3)  # inches: the three panels of a column
TEXT_HEIGHT = 1.0  # inches: a block's titles and the explanation
DPI = 150  # the figure is 1,605 pixels wide
MAX_COLUMNS = 6  # further arms are in another block below
LINE_LETTERS = 140  # characters in a line of text across the whole figure, in the descriptions' font
SMOOTH = 5  # steps of the moving mean in the second panel
# Colours.
PALETTE = 96  # number of colours of the PNG
INK, PALE, GRID = "#222222", "#777777", "#e8e8e8"
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's, for readers with colour blindness


def draw_figure(records: Records) -> bytes:
    """Draw the arms that have an evaluated run as a PNG.

    Arms are in blocks of at most MAX_COLUMNS columns; each block has three rows of panels.

    Raises ValueError if no run has been evaluated.
    """
    # The figure is drawn without pyplot, which would keep it in a global list and choose a window system.
    import_extra("matplotlib", "figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [name for name in records.study["arms"] if records.of(name)]
    if not arms:
        raise ValueError("no run has been evaluated yet: there is nothing to draw")

    # Arms are spread evenly over the blocks: 7 arms are 4 and 3, not 6 and 1.
    blocks = -(-len(arms) // MAX_COLUMNS)
    columns = -(-len(arms) // blocks)
    height = blocks * (sum(ROW_HEIGHTS) + TEXT_HEIGHT)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.02)
    grid = figure.subplots(
        3 * blocks, columns, squeeze=False, sharex=True, height_ratios=ROW_HEIGHTS * blocks
    )

    # Labels are at the first column only; the others share its axes.
    letters = LINE_LETTERS // columns
    abouts = [textwrap.wrap(records.study["arms"][a]["about"], letters, break_on_hyphens=False) for a in arms]
    about_lines = max(map(len, abouts))
    for i, (name, about) in enumerate(zip(arms, abouts, strict=True)):
        block, column = divmod(i, columns)
        panels = list(grid[3 * block : 3 * block + 3, column])  # accuracy, reward, the reward model
        _draw_title(panels[0], name, about, about_lines)
        _draw_arm(panels, records, name)
        if column == 0:
            _label_curves(panels[0], ("held-out accuracy", BLUE))
            _label_curves(panels[1], ("reward", INK), ("false positives", VERMILION))
            _label_curves(panels[2], ("reward model", GREEN), ("accuracy", GREEN))
        for axes in panels:
            axes.tick_params(labelleft=column == 0)

    # The last block may have fewer arms than the grid has columns.
    for axes in grid[3 * blocks - 3 :, len(arms) - columns * (blocks - 1) :].flat:
        axes.set_visible(False)
    figure.supxlabel(_make_explanation(records), fontsize=7.5, color=PALE)
    return _save_png(figure)


def _draw_arm(panels: Sequence[Any], records: Records, name: str) -> None:
    """Draw an arm's three panels."""
    above, middle, below = panels
    # The rule arm is every other arm's baseline.
    _draw_accuracy(above, records.of(name), records.of(BASELINE) if name != BASELINE else ())
    _draw_steps(middle, records.of(name))
    _draw_reward_model(below, records.of(name))
    for axes in panels:
        _style_axes(axes, records.study["steps"])

    # One scale in all columns: the highest accuracy of any run plus 5 %, rounded up to a multiple of 10 %.
    accuracies: list[float] = []
    for run in records.runs:
        accuracies += [evaluation["accuracy"] for evaluation in run.evaluations]
    highest = max(accuracies)
    above.set_ylim(0, min(1, np.ceil(highest * 10 + 0.5) / 10))
    below.set_ylim(0, 1.02)
    below.set_xlabel("step", fontsize=8.5, color=INK)
    below.tick_params(labelbottom=True)


def _save_png(figure: Any) -> bytes:
    """Save a figure as a PNG with a palette, which has a third of the size of one without."""
    from PIL import Image

    full, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    image = Image.open(full).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    image.save(reduced, "png", optimize=True)
    return reduced.getvalue()


def _draw_title(axes: Any, name: str, about: Sequence[str], lines: int) -> None:
    """Draw an arm's name above its description.

    lines: the number of lines of the longest description, so that the names of all arms are at one height.
    """
    # Shorter descriptions are filled up with blank lines.
    padded = "\n".join([*about, *[" "] * (lines - len(about))])
    axes.set_title(padded, fontsize=7.5, color=PALE, linespacing=1.2)
    axes.annotate(
        name, (0.5, 1), (0, 9 + 11 * lines), xycoords="axes fraction", textcoords="offset points",
        ha="center", fontsize=11, fontweight="bold", color=INK, annotation_clip=False,
    )  # fmt: skip


def _draw_accuracy(axes: Any, runs: Sequence[Record], baseline: Sequence[Record]) -> None:
    """Draw held-out accuracy, with the rule arm's mean behind it.

    baseline: the rule arm's runs; empty in the rule arm's own panel.
    """
    from matplotlib.patheffects import withStroke

    own, mean = _average_runs(runs, "accuracy"), _average_runs(baseline, "accuracy")
    if mean:
        axes.plot(*mean, color=PALE, lw=1.1, ls=(0, (4, 2)), zorder=1)
        # The label is below the baseline's end if the arm's curve ends higher, else above its middle.
        if own is not None and own[1][-1] > mean[1][-1]:
            at, offset, side = -1, (-2, -6), "top"
        else:
            at, offset, side = len(mean[0]) // 2, (-2, 4), "baseline"
        axes.annotate(
            BASELINE, (mean[0][at], mean[1][at]), offset, textcoords="offset points", ha="right", va=side,
            fontsize=7.5, color=PALE, zorder=1,
        )  # fmt: skip

    _draw_runs(axes, runs, "accuracy", BLUE)
    if own:
        # Above its curve, the number would cover a baseline that ends higher, so it is written below then.
        under = mean is not None and 0.12 < own[1][-1] < mean[1][-1]
        axes.annotate(
            f"{own[1][-1]:.0%}", (own[0][-1], own[1][-1]), (-1, -14 if under else 5),
            textcoords="offset points", ha="right", fontsize=9, fontweight="bold", color=BLUE, zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _draw_steps(axes: Any, runs: Sequence[Record]) -> None:
    """Draw reward and false positives at every step: the mean over the runs, and a band that spans them."""
    for name, colour in (("false_positives", VERMILION), ("reward", INK)):
        measured = [np.array(run.steps[name]) for run in runs if not np.isnan(run.steps[name]).all()]
        if not measured:
            continue
        # f64[runs, steps]; NaN at steps that a run has not reached, or at which nothing was measured.
        smooth = np.full((len(measured), max(map(len, measured))), np.nan)
        for row, values in zip(smooth, measured, strict=True):
            row[: len(values)] = _moving_mean(values)

        # np.nanmean and the like warn at steps without any value, so missing values are masked by hand.
        valid = ~np.isnan(smooth)
        steps, any_valid = range(1, smooth.shape[1] + 1), valid.any(0)
        lowest, highest = np.where(valid, smooth, np.inf).min(0), np.where(valid, smooth, -np.inf).max(0)
        axes.fill_between(steps, lowest, highest, where=any_valid, color=colour, alpha=0.15, lw=0, zorder=2)
        mean = np.where(valid, smooth, 0).sum(0) / np.maximum(valid.sum(0), 1)
        axes.plot(steps, np.where(any_valid, mean, np.nan), color=colour, lw=1.7, zorder=3)
    axes.set_ylim(0, 1)


def _draw_reward_model(axes: Any, runs: Sequence[Record]) -> None:
    """Draw the reward model's accuracy on the policy's responses, or a note that there is none."""
    axes.set_yticks([0, 0.5, 1])
    evaluations = itertools.chain.from_iterable(run.evaluations for run in runs)
    if any("rm_policy" in evaluation for evaluation in evaluations):
        _draw_runs(axes, runs, "rm_policy", GREEN)
    else:
        axes.text(0.5, 0.5, "no reward model", transform=axes.transAxes, ha="center", fontsize=8, color=PALE)


def _draw_runs(axes: Any, runs: Sequence[Record], name: str, colour: str) -> None:
    """Draw a quantity of evaluations: a thin line for each run, and a thick one for their mean."""
    for run in runs:
        points = [(e["step"], e[name]) for e in run.evaluations if name in e]
        axes.plot(*zip(*points, strict=True), color=colour, lw=0.7, alpha=0.35, zorder=2)
    if mean := _average_runs(runs, name):
        axes.plot(*mean, color=colour, lw=2.2, zorder=3, solid_capstyle="round")


def _average_runs(runs: Sequence[Record], name: str) -> tuple[list[int], list[float]] | None:
    """Compute (steps, means) of a quantity at the evaluations that all runs have; None if there is none.

    Runs with fewer steps than the longest are left out.
    """
    last = max((run.done for run in runs), default=0)
    values = []  # for each run: step -> value
    for run in runs:
        if run.done == last:
            values.append({int(e["step"]): e[name] for e in run.evaluations if name in e})
    if not values:
        return None
    # Only common steps are averaged: at others the mean would jump with the set of runs.
    steps = sorted(set(values[0]).intersection(*values))
    means = []
    for step in steps:
        means.append(float(np.mean([values_of_run[step] for values_of_run in values])))
    return (steps, means) if steps else None


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Compute the mean over windows of SMOOTH steps, ignoring NaN; NaN if a window has nothing else."""
    # Windows are centred, and shorter at both ends.
    half = SMOOTH // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([np.nan if np.isnan(x).all() else np.nanmean(x) for x in windows])


def _style_axes(axes: Any, steps: int) -> None:
    """Set limits, grid and ticks of a panel.  steps: the study's number of steps."""
    axes.set_xlim(0, steps)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=INK, length=2.5)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")


def _label_curves(axes: Any, *names: tuple[str, str]) -> None:
    """Write the (name, colour) of a panel's curves beside it, in place of an axis label."""
    # An axis label has only one colour.  An empty one reserves the space for the names.
    axes.set_ylabel(" ", fontsize=8.5, labelpad=4 + 11 * (len(names) - 1))
    for i, (name, colour) in enumerate(names):
        axes.annotate(
            name, (0, 0.5), (-34 - 11 * (len(names) - 1 - i), 0), xycoords="axes fraction",
            textcoords="offset points", rotation=90, ha="center", va="center", fontsize=8.5, color=colour,
            annotation_clip=False,
        )  # fmt: skip


def _make_explanation(records: Records) -> str:
    """Write the text under the figure."""
    # With a single seed the thick line hides the thin one.
    seeds = len({run.seed for run in records.runs})
    text = ""
    if seeds > 1:
        text = f"Thick lines: mean of {seeds} seeds. Thin lines and bands: the single seeds and their range. "
    text += (
        "The number in a panel is the end of its mean curve. False positives: of the responses that the rule "
        "finds wrong, the share with a reward above one half. Reward model accuracy: on the policy's own "
        "held-out responses."
    )
    return textwrap.fill(text, 165)
