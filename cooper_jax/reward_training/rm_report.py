"""Held-out evaluation of a reward model: metrics with intervals, calibration, tables and a figure.

1. `compute_evaluation_metrics` measures all rows and each source during training.
2. `make_report` adds 95 % intervals, which resample whole questions, and the calibration bins at the end,
   with accuracy and calibration error after a cross-fitted calibration.
3. `fit_held_out_calibration` fits the calibration that is stored with the weights.
4. `format_report_table` and `plot_reliability` show the result.

    N  rows
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from cooper_jax import statistics
from cooper_jax.resampling import Resamples, compute_interval
from cooper_jax.reward.calibration import Calibration, cross_fit_logits, fit_calibration
from cooper_jax.reward_training.examples import Examples
from cooper_jax.runtime.extras import import_extra
from cooper_jax.types import Metrics

ALL = "all"
MIN_ROWS_SHOWN = 10  # a source's calibration bin with fewer rows is too noisy to draw
# Metrics with a bootstrap interval in the report.
WITH_INTERVALS = ("accuracy", "balanced_accuracy", "auroc", "precision", "recall", "f1")
# Metrics of cross-fitted calibrated logits, and the metrics that they repeat.
CALIBRATED = {
    "calibrated_accuracy": "accuracy",
    "calibrated_balanced_accuracy": "balanced_accuracy",
    "calibrated_ece": "ece",
}
INK, GREY, GRID, BLUE, ORANGE = "#333333", "#999999", "#eeeeee", "#2b6cb0", "#dd7733"


def to_probabilities(logits: np.ndarray) -> np.ndarray:
    """Compute the sigmoid of logits [N] without overflow, f64[N]."""
    # exp is given negative arguments only: 1 / (1 + e^-z) for z >= 0, e^z / (1 + e^z) otherwise.
    z = np.asarray(logits, np.float64)
    return np.where(z >= 0, 1.0, np.exp(-np.abs(z))) / (1.0 + np.exp(-np.abs(z)))


def compute_metrics(labels: np.ndarray, logits: np.ndarray) -> Metrics:
    """Compute the metrics of logits [N] against labels [N]; NaN where a metric is undefined.

    The metrics are loss (binary cross-entropy in nats), accuracy, balanced_accuracy, precision, recall and f1
    at the threshold p = 1/2, auroc, ece (expected calibration error) and mean_score.
    """
    # In f64: log(1 + e^z) of saturated logits would lose its digits in f32.
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    p = to_probabilities(z)
    return {
        # -log p of the label: log(1 + e^-z) for a correct completion, log(1 + e^z) for a wrong one.
        "loss": float(np.logaddexp(0.0, np.where(y > 0.5, -z, z)).mean()),
        **statistics.classification_figures(y > 0.5, z > 0),
        "auroc": statistics.area_under_roc(y > 0.5, z),
        "ece": statistics.calibration_curve(y, p)[0],
        "mean_score": float(p.mean()),
    }


def group_by_source(examples: Examples) -> dict[str, np.ndarray]:
    """Make masks bool[N]: one of all rows, then one of each source, by name, if there are several."""
    sources = np.array(examples.sources)
    masks = {ALL: np.ones(len(sources), bool)}
    names = sorted(set(examples.sources))
    if len(names) > 1:
        masks |= {name: sources == name for name in names}
    return masks


def compute_evaluation_metrics(examples: Examples, logits: np.ndarray) -> Metrics:
    """Compute the metrics `eval/NAME` of all rows and `eval/SOURCE/NAME` of each source.  logits: f32[N]."""
    metrics: Metrics = {}
    for group, rows in group_by_source(examples).items():
        prefix = "eval" if group == ALL else f"eval/{group}"
        group_metrics = compute_metrics(examples.labels[rows], logits[rows])
        metrics |= {f"{prefix}/{name}": value for name, value in group_metrics.items()}
    return metrics


def make_report(examples: Examples, logits: np.ndarray, seed: int, resamples: int = 1000) -> dict[str, Any]:
    """Compute each group's row counts, metrics {name: {value, low, high}} and calibration bins.

    The metrics in CALIBRATED are of logits that are calibrated by fits on other questions; they are left out
    if there is no such fit.

    Args:
      examples: the held-out rows.
      logits: f32[N].
      seed: of the bootstrap, which resamples whole questions.
      resamples: the number of resamples behind each 95 % interval.
    """
    # Rows of one question are correlated, so questions are the unit of resampling.
    questions = np.array([t.question for t in examples.triples])
    # One cross-fit over all rows, as the stored calibration is fitted over all sources.
    calibrated: np.ndarray | None = None  # f64[N]
    with contextlib.suppress(ValueError):  # `fit_held_out_calibration` says so
        calibrated = cross_fit_logits(examples.labels, logits, questions.tolist())
    report: dict[str, Any] = {}
    for group, rows in group_by_source(examples).items():
        y, z = examples.labels[rows] > 0.5, np.asarray(logits)[rows]

        metrics = {name: {"value": value} for name, value in compute_metrics(y, z).items()}
        resampled = Resamples(questions[rows].tolist(), seed, resamples).figures(y, z > 0, z)
        for name in WITH_INTERVALS:
            interval = compute_interval(resampled[name])
            metrics[name] |= {"low": interval.low, "high": interval.high}
        if calibrated is not None:
            after = compute_metrics(y, calibrated[rows])
            metrics |= {name: {"value": after[metric]} for name, metric in CALIBRATED.items()}

        _, bins = statistics.calibration_curve(y, to_probabilities(z))
        report[group] = {
            "rows": int(rows.sum()),
            "questions": len(set(questions[rows])),
            "positives": int(y.sum()),
            "figures": metrics,
            "reliability": [vars(b) for b in bins],
        }
    return report


def fit_held_out_calibration(examples: Examples, logits: np.ndarray) -> tuple[Calibration | None, str]:
    """Fit a calibration to all held-out rows; returns (the fit or None, a note of one line on it).

    examples: the held-out rows.  logits: f32[N].
    """
    questions = [t.question for t in examples.triples]
    try:
        fitted = fit_calibration(examples.labels, logits, questions)
    except ValueError as error:
        return None, f"warning: no calibration is stored with the weights: {error}"

    note = (
        f"calibration fitted on {fitted.rows} held-out rows: temperature {fitted.temperature:.4g}, threshold "
        f"{fitted.threshold:.4g}"
    )
    if fitted.ece_cross_fitted is None:
        return fitted, f"{note}; no calibrated figures, since the rows outside some fold have no fit"
    return fitted, f"{note}; calibrated figures are cross-fitted by question"


def format_report_table(report: dict[str, Any]) -> str:
    """Format a report's groups as a table for a terminal; the last line shows all rows."""
    shown = ["accuracy", "balanced_accuracy", "auroc", "precision", "recall", "ece"]
    shown += [name for name in CALIBRATED if name in report[ALL]["figures"]]
    table = [["source", "rows", "positive", *(name.replace("_", " ") for name in shown)]]
    groups = [*(name for name in report if name != ALL), ALL]
    for group in groups:
        group_report = report[group]
        positive = group_report["positives"] / group_report["rows"]
        cells = [group, str(group_report["rows"]), f"{positive:.1%}"]
        cells += [_format_metric(group_report["figures"][name]) for name in shown]
        table.append(cells)

    # Every column is as wide as its longest cell.
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _format_metric(metric: dict[str, float]) -> str:
    """Format a metric as `value [low, high]`, or as its value alone if it has no interval."""
    text = f"{metric['value']:.3f}"
    if "low" in metric:
        text += f" [{metric['low']:.3f}, {metric['high']:.3f}]"
    return text


def plot_reliability(examples: Examples, logits: np.ndarray, title: str) -> bytes:
    """Draw a PNG with a reliability diagram and a histogram of scores by label.  logits: f32[N]."""
    import_extra("matplotlib", "figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The Agg canvas is set explicitly: pyplot would look for a display and keep global state.
    figure = Figure(figsize=(10.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    scores, labels = to_probabilities(logits), examples.labels > 0.5

    _draw_reliability(left, scores, labels, group_by_source(examples))
    _draw_score_histogram(right, scores, labels)

    # The style of both axes.
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK)
    figure.suptitle(title, fontsize=11, color=INK)

    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_reliability(
    axes: Any, scores: np.ndarray, labels: np.ndarray, groups: dict[str, np.ndarray]
) -> None:
    """Draw the share of correct rows against the mean score, bin by bin.

    scores: f64[N]; labels: bool[N]; groups: masks bool[N], as from `group_by_source`.
    """
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", zorder=1, label="calibrated")
    for group, rows in groups.items():
        error, bins = statistics.calibration_curve(labels[rows], scores[rows])
        label = f"{'all rows' if group == ALL else group}, ECE {error:.3f}"

        # All rows: a line, with markers whose area grows with the rows of the bin.
        if group == ALL:
            x, y = [b.predicted for b in bins], [b.observed for b in bins]
            axes.plot(x, y, color=BLUE, lw=2, zorder=3, label=label)
            axes.scatter(x, y, s=[20 + 160 * b.count / len(scores) for b in bins], color=BLUE, zorder=4)
            for b in bins:
                axes.annotate(
                    f"{b.count}", (b.predicted, b.observed), (0, -13), textcoords="offset points",
                    ha="center", fontsize=7, color=INK, zorder=5,
                )  # fmt: skip
        else:
            # A source: markers without a line, since its bins have few rows.
            shown = [b for b in bins if b.count >= MIN_ROWS_SHOWN]
            axes.plot(
                [b.predicted for b in shown], [b.observed for b in shown],
                ls="none", marker="o", ms=4, alpha=0.75, zorder=2, label=label,
            )  # fmt: skip

    axes.set(
        xlim=(-0.02, 1.02), ylim=(-0.08, 1.04), xlabel="mean score of a bin", ylabel="share labelled correct"
    )
    axes.set_title("Reliability (numbers: rows of a bin)", fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _draw_score_histogram(axes: Any, scores: np.ndarray, labels: np.ndarray) -> None:
    """Draw the counts of scores f64[N], stacked by label bool[N]."""
    edges = np.linspace(0, 1, 21)
    axes.hist(
        [scores[~labels], scores[labels]], edges, stacked=True, color=[ORANGE, BLUE],
        label=["labelled wrong", "labelled correct"],
    )  # fmt: skip
    axes.set(xlim=(0, 1), xlabel="score", ylabel="rows")
    axes.set_title("Scores by label", fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="upper center")


def list_predictions(examples: Examples, logits: Sequence[float] | np.ndarray) -> list[dict[str, Any]]:
    """List one JSON object per row, from which every metric can be recomputed.  logits: [N]."""
    return [
        {
            "id": t.id,
            "source": t.source,
            "model": t.model,
            "kind": t.kind,
            "label": int(t.label),
            "logit": float(z),
        }
        for t, z in zip(examples.triples, logits, strict=True)
    ]
