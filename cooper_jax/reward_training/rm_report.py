"""What a reward model's logits on held-out rows say: figures, their intervals, and how much a probability means.

1. `figures` of rows, and `by_source` of each source and all together: during training.
2. `report` adds 95 % intervals, resampling whole questions, and the calibration's bins: at the end.
3. `table` and `plot` show it.

    N  rows
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from cooper_jax import statistics
from cooper_jax.reward_training.examples import Examples
from cooper_jax.runtime import keys
from cooper_jax.runtime.extras import import_extra
from cooper_jax.types import Metrics

ALL = "all"
LEAST_SHOWN = 10  # rows of a source's bin that is drawn: fewer tell nothing
WITH_INTERVALS = ("accuracy", "balanced_accuracy", "auroc", "precision", "recall", "f1")
BETTER = {"auroc": 1, "accuracy": 1, "loss": -1}  # what may choose the best model, and which way is better


def to_probabilities(logits: np.ndarray) -> np.ndarray:
    """f64[N] in (0, 1)."""
    z = np.asarray(logits, np.float64)
    return np.where(z >= 0, 1.0, np.exp(-np.abs(z))) / (1.0 + np.exp(-np.abs(z)))


def compute_figures(labels: np.ndarray, logits: np.ndarray) -> Metrics:
    """loss (binary cross-entropy), accuracy and its kin at p = 1/2, auroc, ece, mean_score; NaN where undefined."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    p = to_probabilities(z)
    return {
        "loss": float(np.logaddexp(0.0, np.where(y > 0.5, -z, z)).mean()),
        **statistics.classification_figures(y > 0.5, z > 0),
        "auroc": statistics.area_under_roc(y > 0.5, z),
        "ece": statistics.calibration_curve(y, p)[0],
        "mean_score": float(p.mean()),
    }


def group_by_source(examples: Examples) -> dict[str, np.ndarray]:
    """Rows bool[N] of all, then of each source by its name (where there is more than one)."""
    sources = np.array(examples.sources)
    named = sorted(set(examples.sources))
    out = {ALL: np.ones(len(sources), bool)}
    return out | ({name: sources == name for name in named} if len(named) > 1 else {})


def evaluation_metrics(examples: Examples, logits: np.ndarray) -> Metrics:
    """`eval/NAME` of all rows, `eval/SOURCE/NAME` of each source's."""
    out = {}
    for group, rows in group_by_source(examples).items():
        prefix = "eval" if group == ALL else f"eval/{group}"
        found = compute_figures(examples.labels[rows], logits[rows])
        out |= {f"{prefix}/{name}": value for name, value in found.items()}
    return out


def make_report(examples: Examples, logits: np.ndarray, seed: int, resamples: int = 1000) -> dict[str, Any]:
    """Each group's figures as {name: {value, low, high}} with its rows, positives and calibration bins."""
    questions = np.array([t.question for t in examples.triples])
    out = {}
    for place, (group, rows) in enumerate(group_by_source(examples).items()):
        y, z = examples.labels[rows] > 0.5, np.asarray(logits)[rows]
        found: dict[str, Any] = {name: {"value": value} for name, value in compute_figures(y, z).items()}
        for k, name in enumerate(WITH_INTERVALS):

            def statistic(weights, y=y, z=z, name=name):
                if name == "auroc":
                    return statistics.area_under_roc(y, z, weights)
                return statistics.classification_figures(y, z > 0, weights)[name]

            rng = keys.make_generator(seed, "bootstrap", place, k)
            interval = statistics.bootstrap_interval(statistic, questions[rows], rng, resamples)
            found[name] |= {"low": interval.low, "high": interval.high}
        _, bins = statistics.calibration_curve(y, to_probabilities(z))
        out[group] = {
            "rows": int(rows.sum()),
            "questions": len(set(questions[rows])),
            "positives": int(y.sum()),
            "figures": found,
            "reliability": [vars(b) for b in bins],
        }
    return out


def format_report_table(found: dict[str, Any]) -> str:
    """A report's groups as lines for a terminal."""
    shown = ("accuracy", "balanced_accuracy", "auroc", "precision", "recall", "ece")
    rows = [["source", "rows", "positive", *(name.replace("_", " ") for name in shown)]]
    for group, part in [*((g, p) for g, p in found.items() if g != ALL), (ALL, found[ALL])]:
        cells = [group, str(part["rows"]), f"{part['positives'] / part['rows']:.1%}"]
        for name in shown:
            figure = part["figures"][name]
            text = f"{figure['value']:.3f}"
            cells.append(f"{text} [{figure['low']:.3f}, {figure['high']:.3f}]" if "low" in figure else text)
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def plot_reliability(examples: Examples, logits: np.ndarray, title: str) -> bytes:
    """A PNG: what a score promises beside what comes true, and how often each score is given."""
    import_extra("matplotlib", "figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    p, y = to_probabilities(logits), examples.labels > 0.5
    ink, blue, orange = "#333333", "#2b6cb0", "#dd7733"
    left.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--", zorder=1, label="calibrated")
    for group, rows in group_by_source(examples).items():
        error, bins = statistics.calibration_curve(y[rows], p[rows])
        x, seen = [b.predicted for b in bins], [b.observed for b in bins]
        if group == ALL:
            left.plot(x, seen, color=blue, lw=2, zorder=3, label=f"all rows, ECE {error:.3f}")
            left.scatter(x, seen, s=[20 + 160 * b.count / len(p) for b in bins], color=blue, zorder=4)
            for b in bins:
                left.annotate(
                    f"{b.count}", (b.predicted, b.observed), (0, -13), textcoords="offset points",
                    ha="center", fontsize=7, color=ink, zorder=5,
                )  # fmt: skip
        else:
            told = [b for b in bins if b.count >= LEAST_SHOWN]
            left.plot(
                [b.predicted for b in told], [b.observed for b in told],
                ls="none", marker="o", ms=4, alpha=0.75, zorder=2, label=f"{group}, ECE {error:.3f}",
            )  # fmt: skip
    left.set(
        xlim=(-0.02, 1.02), ylim=(-0.08, 1.04), xlabel="mean score of a bin", ylabel="share labelled correct"
    )
    left.set_title("Reliability (numbers: rows of a bin)", fontsize=10, color=ink)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    edges = np.linspace(0, 1, 21)
    right.hist(
        [p[~y], p[y]], edges, stacked=True, color=[orange, blue], label=["labelled wrong", "labelled correct"]
    )
    right.set(xlim=(0, 1), xlabel="score", ylabel="rows")
    right.set_title("Scores by label", fontsize=10, color=ink)
    right.legend(fontsize=8, frameon=False, loc="upper center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee", lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=ink)
    figure.suptitle(title, fontsize=11, color=ink)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def list_predictions(examples: Examples, logits: Sequence[float]) -> list[dict[str, Any]]:
    """One object a row: whoever doubts a figure can count again."""
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
