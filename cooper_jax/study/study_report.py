"""A study's results as files, all made from its records: results.json, arms.csv, runs.csv, tables.md and study.png.

    arms.csv   one line per arm and quantity: its mean over the seeds with Student's 95 % interval
    runs.csv   one line per run, one column per quantity; an empty cell is a quantity that was not measured

`summary.py` defines the quantities.  Shares are in [0, 1] and are written with four significant digits.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cooper_jax.evaluation.text_tables import to_plain
from cooper_jax.runtime.metrics import to_jsonable
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.statistics import Interval
from cooper_jax.study import figure, summary, tables
from cooper_jax.study.records import Records

ARM_COLUMNS = ("arm", "quantity", "mean", "low", "high", "seeds")
RUN_COLUMNS = ("arm", "seed", "done", "complete", "dipped", "ends_above_start", "ends_below_half")


def write_report(records: Records, out: Path) -> str:
    """Write the five files; returns the tables.  Raises ValueError where no run has been evaluated."""
    if not records.runs:
        raise ValueError("no run has been evaluated yet")
    found = summary.summarise_study(records)
    text, results = (
        tables.format_markdown(found),
        json.dumps(to_jsonable(to_plain(found)), indent=1, ensure_ascii=False),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, data in {
        "results.json": results.encode() + b"\n",
        "arms.csv": format_arms_csv(found).encode(),
        "runs.csv": format_runs_csv(found).encode(),
        "tables.md": text.encode(),
        "study.png": figure.draw_figure(records),
    }.items():
        write_atomically(out / name, data)
    return text


def format_arms_csv(found: Mapping[str, Any]) -> str:
    """CSV text of each arm's quantities.  found: `summary.summarise_study`'s."""
    rows = []
    for name, arm in found["arms"].items():
        seeds = len(arm["seeds"])
        for quantity, value in arm.items():
            if isinstance(value, Interval) and not math.isnan(value.value):
                rows.append(
                    [name, quantity, _digits(value.value), _digits(value.low), _digits(value.high), seeds]
                )
            elif isinstance(value, int):  # a number of seeds, such as `dipped`
                rows.append([name, quantity, value, "", "", seeds])
    return _format_csv(ARM_COLUMNS, rows)


def format_runs_csv(found: Mapping[str, Any]) -> str:
    """CSV text of each run's quantities.  found: `summary.summarise_study`'s."""
    runs = found["runs"]
    quantities = dict.fromkeys(name for run in runs for name in run if isinstance(run[name], float))
    header = [*RUN_COLUMNS, *quantities]
    rows = [[_digits(run.get(name, math.nan)) for name in header] for run in runs]
    return _format_csv(header, rows)


def _format_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _digits(value: Any) -> Any:
    """A float with four significant digits, "" for NaN; anything else as it is."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"
