"""What a report shows of a training run: its summary, curves, onset of hacking, phases and samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cooper_jax.report import curves, hacking, sources
from cooper_jax.report.curves import Point
from cooper_jax.report.sources import Source
from cooper_jax.runtime.environment import ENVIRONMENT

Row = dict[str, Any]

# Times that are no phases: the whole step, what of it waited for the host or compiled, and a rate.
NOT_PHASES = ("time/step", "time/waiting", "time/compile", "time/tokens_per_second")
HELD_OUT_BY_RULE = "eval/rule/accuracy"


def read_training(source: Source) -> dict[str, Any]:
    """Read a training run for `report_data.collect_report`, without its samples.

    A run that has logged no step has no curves.  Raises ValueError, naming file and line, for files that cannot
    be read.
    """
    config = sources.read_object(source.folder / sources.CONFIG)
    rows = list(sources.read_rows(source.folder / sources.METRICS))
    check_steps(rows, source)
    points = curves.collect_curves(rows)
    truth = hacking.name_truth(rows, config)

    held_out = points.get(truth or HELD_OUT_BY_RULE, [])
    points |= {f"confusion/{name}": curve for name, curve in hacking.measure_confusion(rows).items()}
    return {
        "kind": sources.TRAINING,
        "label": source.label,
        "group": source.group,
        "about": source.about,
        "config": config,
        "environment": sources.read_object(source.folder / ENVIRONMENT),
        "points": points,
        "truth": truth,
        "held_out": truth or (HELD_OUT_BY_RULE if held_out else None),
        "onset": hacking.find_onset(held_out) if truth else None,
        "guard": {
            "action": config.get("hacking_guard"),
            "alarms": hacking.find_alarms(rows),
            "by_rule": hacking.find_first_step(rows, "guard/by_rule"),
            "frozen": hacking.find_first_step(rows, "guard/frozen"),
        },
        "summary": summarise_training(rows, config, held_out),
        "phases": measure_phases(rows),
    }


def check_steps(rows: Sequence[Row], source: Source) -> None:
    """Raise ValueError for a row of metrics.jsonl without a step."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            path = source.folder / sources.METRICS
            raise ValueError(f"{path}, line {number} has no whole-numbered `step`: fix or delete the line")


def summarise_training(
    rows: Sequence[Row], config: Mapping[str, Any], held_out: Sequence[Point]
) -> dict[str, Any]:
    """Summarise a run in the numbers of the page's first table; a number that was not measured is None."""
    steps = [row for row in rows if row["step"] > 0]
    accuracies = [(step, value) for step, value in held_out if value is not None]
    best = max(accuracies, key=lambda point: point[1], default=(None, None))
    reward = config.get("reward", {})
    seconds = [x for x in (curves.to_number(row.get("time/step")) for row in steps) if x is not None]
    return {
        "name": config.get("name"),
        "arm": reward.get("arm"),
        "recipe": reward.get("recipe"),
        "seed": config.get("seed"),
        "done": steps[-1]["step"] if steps else 0,
        "steps": config.get("steps"),
        "accuracy_start": accuracies[0][1] if accuracies else None,
        "accuracy_best": best[1],
        "accuracy_best_at": best[0],
        "accuracy_end": accuracies[-1][1] if accuracies else None,
        # Means over the last ten steps: a single step is noisy.
        "reward_end": _mean_of_last(steps, "reward/mean"),
        "false_positives_end": _mean_of_last(steps, "rm/false_positive_rate"),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
    }


def _mean_of_last(steps: Sequence[Row], name: str, count: int = 10) -> float | None:
    measured = [x for x in (curves.to_number(row.get(name)) for row in steps[-count:]) if x is not None]
    return statistics.fmean(measured) if measured else None


def measure_phases(rows: Sequence[Row]) -> dict[str, Any]:
    """The seconds of each phase over all steps, largest first, beside those of the steps.

    Phases of the host overlap those of the devices, so their sum may exceed the seconds of the steps.
    """
    totals: dict[str, float] = {}
    whole = 0.0
    for row in rows:
        for name, value in row.items():
            seconds = curves.to_number(value)
            if seconds is None or not name.startswith("time/"):
                continue
            if name == "time/step":
                whole += seconds
            if name not in NOT_PHASES:
                totals[name.removeprefix("time/")] = totals.get(name.removeprefix("time/"), 0.0) + seconds
    ordered = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    return {"step": curves.round_number(whole), "phases": [[n, curves.round_number(x)] for n, x in ordered]}
