"""What a report shows of a reward model's training: its curves, and the best model's figures on held-out rows."""

from __future__ import annotations

from typing import Any

from cooper_jax.report import curves, sources
from cooper_jax.report.sources import Source
from cooper_jax.report.training import check_steps
from cooper_jax.reward_training.rm_report import ALL
from cooper_jax.runtime.environment import ENVIRONMENT


def read_reward_training(source: Source) -> dict[str, Any]:
    """Read a run of launch/train_rm.py for `report_data.collect_report`.

    `figures` is None until the run has ended and written its report.json.
    """
    config = sources.read_object(source.folder / sources.CONFIG)
    rows = list(sources.read_rows(source.folder / sources.METRICS))
    check_steps(rows, source)
    report = sources.read_object(source.folder / sources.REPORT)
    points = curves.collect_curves(rows)
    return {
        "kind": sources.REWARD_TRAINING,
        "label": source.label,
        "group": source.group,
        "about": source.about,
        "config": config,
        "environment": sources.read_object(source.folder / ENVIRONMENT),
        "points": points,
        "summary": {
            "name": config.get("name"),
            "seed": config.get("seed"),
            "done": rows[-1]["step"] if rows else 0,
            "accuracy": _last(points, "eval/accuracy"),
            "auroc": _last(points, "eval/auroc"),
            "loss": _last(points, "eval/loss"),
        },
        "figures": _describe_figures(report, source) if report else None,
    }


def _last(points: dict[str, list[curves.Point]], name: str) -> float | None:
    values = [value for _, value in points.get(name, []) if value is not None]
    return values[-1] if values else None


def _describe_figures(report: dict[str, Any], source: Source) -> dict[str, Any]:
    """The parts of report.json that the page shows.  Raises ValueError, naming the file, for another file."""
    try:
        groups = report["groups"]
        # All rows come last, as in the table on the terminal.
        names = [*(name for name in groups if name != ALL), ALL]
        return {
            "best": report["best"],
            "training_rows": report["training_rows"],
            "calibration_note": report["calibration_note"],
            "groups": [[name, groups[name]] for name in names],
        }
    except (KeyError, TypeError) as error:
        path = source.folder / sources.REPORT
        raise ValueError(f"{path} was not written by launch/train_rm.py ({error!r} is missing)") from None
