"""A report's figures for papers: each as PNG and as SVG, with one panel for each quantity.

    dynamics         curves of all training runs laid over each other
    hacking          for each run: reward, rule, truth and false positives, with the onset
    phases           seconds of each phase, by run
    reward_training  held-out curves of reward models' trainings
    evaluations      figures of evaluations with their intervals

A group of several runs (the seeds of an arm) is drawn as the mean at the steps that all of them have, over a thin
line for each.
"""

from __future__ import annotations

import collections
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cooper_jax.report import sources
from cooper_jax.report.curves import Point
from cooper_jax.report.report_data import Report
from cooper_jax.runtime.extras import import_extra
from cooper_jax.runtime.remote_files import write_atomically

Run = Mapping[str, Any]

DPI = 200
PANEL_WIDTH, PANEL_HEIGHT = 3.3, 2.3  # inches
COLUMNS = 3
MOVING_MEAN = 5  # steps, of what is measured at every step
INK, PALE, GRID = "#222222", "#777777", "#e8e8e8"
# Okabe and Ito's colours, of which the yellow is left out, for readers with colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8e4fb0", "#6b5b4b")
OTHERS = "others"  # the phases without a colour of their own
DASHES = ("-", "--", ":", "-.")

# Panels: (title, metric or a function of the run, measured at every step).
DYNAMICS: tuple[tuple[str, str | Callable[[Run], str | None], bool], ...] = (
    ("Reward", "reward/mean", True),
    ("Held-out accuracy", lambda run: run["held_out"], False),
    ("Correct by the rule, in training", "rule/accuracy", True),
    ("False positives", "rm/false_positive_rate", True),
    ("KL to the policy of step 0", "policy/kl", True),
    ("Response length (tokens)", "response/tokens_mean", True),
)
REWARD_TRAINING: tuple[tuple[str, str | Callable[[Run], str | None], bool], ...] = (
    ("Training loss", "train_rm/loss", True),
    ("Held-out accuracy", "eval/accuracy", False),
    ("Held-out AUROC", "eval/auroc", False),
)


def write_figures(report: Report, folder: Path) -> list[str]:
    """Write the figures that the report has something for; returns their names without endings."""
    import_extra("matplotlib", "figures")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, figure in _draw_figures(report):
        for ending in ("png", "svg"):
            write_atomically(folder / f"{name}.{ending}", _save(figure, ending))
        names.append(name)
    return names


def _draw_figures(report: Report) -> Iterator[tuple[str, Any]]:
    by_kind: dict[str, list[Run]] = {kind: [] for kind in (sources.TRAINING, sources.REWARD_TRAINING)}
    evaluations = []
    for run in report.runs:
        if run["kind"] == sources.EVALUATION:
            evaluations.append(run)
        elif run["points"]:
            by_kind[run["kind"]].append(run)

    training, reward_training = by_kind[sources.TRAINING], by_kind[sources.REWARD_TRAINING]
    if training:
        yield "dynamics", _draw_curves(training, DYNAMICS)
        yield "hacking", _draw_hacking(training)
    timed = [run for run in training if run["phases"]["phases"]]
    if timed:
        yield "phases", _draw_phases(timed)
    if reward_training:
        yield "reward_training", _draw_curves(reward_training, REWARD_TRAINING)
    charts = [(run["label"], chart) for run in evaluations for chart in run["charts"]]
    if charts:
        yield "evaluations", _draw_evaluations(charts)


def _save(figure: Any, ending: str) -> bytes:
    """Encode a figure; the same figure gives the same bytes."""
    import matplotlib

    content = io.BytesIO()
    # Ids of an SVG are random without a salt, and both formats would have the time of the drawing.
    with matplotlib.rc_context({"svg.hashsalt": "cooper", "svg.fonttype": "none"}):
        metadata = {"Date": None} if ending == "svg" else {"Software": None}
        figure.savefig(content, format=ending, metadata=metadata)
    return content.getvalue()


def _make_panels(
    count: int, width: float = PANEL_WIDTH, heights: Sequence[float] = ()
) -> tuple[Any, list[Any]]:
    """Make a figure with so many panels, in rows of COLUMNS at most.

    heights: inches of each panel, which are then below each other; empty: PANEL_HEIGHT.
    """
    # Drawn without pyplot, which would keep the figure in a global list and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 if heights else min(COLUMNS, count)
    rows = -(-count // columns)
    ratios = list(heights) or [PANEL_HEIGHT] * rows
    figure = Figure(figsize=(width * columns, sum(ratios)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, height_ratios=ratios).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=7.5, colors=INK)
    return figure, panels[:count]


# --- curves -------------------------------------------------------------------------------------------------


def _draw_curves(
    runs: Sequence[Run], wanted: Sequence[tuple[str, str | Callable[[Run], str | None], bool]]
) -> Any:
    """Draw the wanted panels that a run has a curve for."""
    measured = []
    for title, metric, every_step in wanted:
        curves = {run["label"]: _read_points(run, metric) for run in runs}
        if any(curves.values()):
            measured.append((title, curves, MOVING_MEAN if every_step else 1))
    figure, panels = _make_panels(len(measured))

    groups = list(dict.fromkeys(run["group"] for run in runs))
    for axes, (title, curves, width) in zip(panels, measured, strict=True):
        axes.set_title(title, fontsize=9, color=INK)
        for index, group in enumerate(groups):
            members = [curves[run["label"]] for run in runs if run["group"] == group]
            _draw_group(axes, index, [smooth(points, width) for points in members if points])
    for axes in panels[-COLUMNS:]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    _add_legend(figure, groups)
    return figure


def _read_points(run: Run, metric: str | Callable[[Run], str | None]) -> list[Point]:
    name = metric(run) if callable(metric) else metric
    return run["points"].get(name, [])


def _draw_group(axes: Any, index: int, curves: Sequence[Sequence[Point]]) -> None:
    """Draw the curves of a group: one as it is, several as thin lines under their mean."""
    style = _choose_style(index)
    if len(curves) > 1:
        for points in curves:
            axes.plot(*_split(points), lw=0.6, alpha=0.35, **style)
        curves = [average(curves)]
    for points in curves:
        axes.plot(*_split(points), lw=1.6, **style)


def _choose_style(index: int) -> dict[str, Any]:
    """The colour and the dashes of a group."""
    return {"color": COLOURS[index % len(COLOURS)], "ls": DASHES[index // len(COLOURS) % len(DASHES)]}


def _split(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    """Steps and values; NaN, which is drawn as a gap, where nothing was measured."""
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def smooth(points: Sequence[Point], width: int) -> list[Point]:
    """The moving mean over `width` neighbouring points, which ends at each point; missing values are left out."""
    smoothed: list[Point] = []
    for index, (step, value) in enumerate(points):
        window = [v for _, v in points[max(0, index - width + 1) : index + 1] if v is not None]
        smoothed.append((step, None if value is None else sum(window) / len(window)))
    return smoothed


def average(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of several curves at the steps at which all were measured."""
    values = [dict(points) for points in curves]
    mean: list[Point] = []
    for step, _ in curves[0]:
        at_step = [of_run.get(step) for of_run in values]
        measured = [v for v in at_step if v is not None]
        if len(measured) == len(values):
            mean.append((step, sum(measured) / len(measured)))
    return mean


def _add_legend(figure: Any, groups: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, name in enumerate(groups):
        handles.append(Line2D([], [], lw=1.6, label=name, **_choose_style(index)))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(groups), 5), fontsize=8, frameon=False
    )


# --- the other figures --------------------------------------------------------------------------------------


def _draw_hacking(runs: Sequence[Run]) -> Any:
    """Draw a panel for each run: reward, rule, held-out accuracy and false positives."""
    lines = (
        ("reward", "reward/mean", INK, MOVING_MEAN),
        ("correct by the rule", "rule/accuracy", COLOURS[0], MOVING_MEAN),
        ("held-out accuracy", lambda run: run["held_out"], COLOURS[2], 1),
        ("false positives", "rm/false_positive_rate", COLOURS[1], MOVING_MEAN),
    )
    figure, panels = _make_panels(len(runs))
    for axes, run in zip(panels, runs, strict=True):
        axes.set_title(run["label"], fontsize=9, color=INK)
        for name, metric, colour, width in lines:
            points = smooth(_read_points(run, metric), width)
            if points:
                axes.plot(*_split(points), color=colour, lw=1.4, label=name)
        for step in run["guard"]["alarms"]:
            axes.axvline(step, color=INK, lw=1, ls=(0, (1, 2)))
            axes.annotate("alarm", (step, 1), (3, -18), xycoords=("data", "axes fraction"),
                          textcoords="offset points", fontsize=7, color=INK)  # fmt: skip
        if run["onset"] is not None:
            axes.axvline(run["onset"], color=COLOURS[1], lw=1, ls=(0, (4, 3)))
            axes.annotate("onset", (run["onset"], 1), (3, -8), xycoords=("data", "axes fraction"),
                          textcoords="offset points", fontsize=7, color=COLOURS[1])  # fmt: skip
        # Rewards are shares in all arms, but not those of a user's functions.
        lowest, highest = axes.get_ylim()
        if lowest >= -0.1 and highest <= 1.1:
            axes.set_ylim(0, 1.02)
    for axes in panels[-COLUMNS:]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    # Runs without a reward model have fewer lines, so the legend is that of the panel with the most.
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1])
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_phases(runs: Sequence[Run]) -> Any:
    """Draw the seconds of all steps as bars of phases, one bar for each run."""
    figure, (axes,) = _make_panels(1, 2 * PANEL_WIDTH, [1.1 + 0.35 * len(runs)])
    totals: collections.Counter[str] = collections.Counter()
    for run in runs:
        totals.update(dict(run["phases"]["phases"]))
    # The largest phases have colours of their own; the others are one part.
    names = [name for name, _ in totals.most_common(len(COLOURS) - 1)]

    starts = [0.0] * len(runs)
    for name, colour in zip([*names, OTHERS], (*COLOURS[: len(names)], PALE), strict=True):
        values = [_sum_seconds(run, name, names) for run in runs]
        axes.barh(range(len(runs)), values, left=starts, height=0.6, color=colour, label=name)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    axes.set_yticks(range(len(runs)), [run["label"] for run in runs])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds of all steps, by phase", fontsize=8, color=INK)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7.5, frameon=False)
    return figure


def _sum_seconds(run: Run, name: str, named: Sequence[str]) -> float:
    """The seconds of a phase, or for OTHERS of all phases that are not among the named ones."""
    phases = run["phases"]["phases"]
    return sum(
        seconds for phase, seconds in phases if phase == name or (name == OTHERS and phase not in named)
    )


def _draw_evaluations(charts: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """Draw the values of each chart with their intervals.  charts: (label of the evaluation, chart)."""
    heights = [0.9 + 0.24 * len(chart["bars"]) for _, chart in charts]
    figure, panels = _make_panels(len(charts), 2 * PANEL_WIDTH, heights)
    for axes, (label, chart) in zip(panels, charts, strict=True):
        bars = [bar for bar in chart["bars"] if bar["value"] is not None]
        axes.set_title(f"{label}: {chart['title']}", fontsize=8, color=INK)
        for place, bar in enumerate(bars):
            axes.plot([bar["value"]], [place], "o", ms=4, color=COLOURS[0], clip_on=False)
            if bar["low"] is not None:
                axes.plot([bar["low"], bar["high"]], [place, place], lw=1.4, color=COLOURS[0])
        axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1)
    return figure
