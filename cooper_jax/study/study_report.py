"""A study's results as files, all made from its records.

    results.json   all statistics
    arms.csv       one line per arm and quantity: its mean over the seeds with Student's 95 % interval
    runs.csv       one line per run, one column per quantity; quantities that were not measured are empty
    tables.md      Markdown tables
    study.png      the figure

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

# The first columns of the CSV files; runs.csv has a column for each quantity after them.
ARM_COLUMNS = ("arm", "quantity", "mean", "low", "high", "seeds")
RUN_COLUMNS = ("arm", "seed", "done", "complete", "dipped", "ends_above_start", "ends_below_half")


def write_report(records: Records, out: Path) -> str:
    """Write the five files into `out`; returns the tables.

    Raises ValueError if no run has been evaluated.
    """
    if not records.runs:
        raise ValueError("no run has been evaluated yet")
    results = summary.summarise_study(records)
    markdown = tables.format_markdown(results)
    plain = json.dumps(to_jsonable(to_plain(results)), indent=1, ensure_ascii=False)

    # All contents are made before the first is written, so that a failure changes no file.
    contents = {
        "results.json": plain.encode() + b"\n",
        "arms.csv": format_arms_csv(results).encode(),
        "runs.csv": format_runs_csv(results).encode(),
        "tables.md": markdown.encode(),
        "study.png": figure.draw_figure(records),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        write_atomically(out / name, data)
    return markdown


def format_arms_csv(results: Mapping[str, Any]) -> str:
    """Format each arm's quantities as CSV.  results: the result of `summary.summarise_study`."""
    # An arm's other entries, such as its list of seeds, are no quantities.
    rows: list[list[Any]] = []
    for name, arm in results["arms"].items():
        seeds = len(arm["seeds"])
        for quantity, value in arm.items():
            if isinstance(value, Interval) and not math.isnan(value.value):
                numbers = [_format_number(x) for x in (value.value, value.low, value.high)]
                rows.append([name, quantity, *numbers, seeds])
            elif isinstance(value, int):  # a number of seeds, such as `dipped`
                rows.append([name, quantity, value, "", "", seeds])
    return _format_csv(ARM_COLUMNS, rows)


def format_runs_csv(results: Mapping[str, Any]) -> str:
    """Format each run's quantities as CSV.  results: the result of `summary.summarise_study`."""
    # Arms measure different quantities, so the columns are the union over all runs.
    runs = results["runs"]
    quantities: dict[str, None] = {}  # an ordered set
    for run in runs:
        quantities |= dict.fromkeys(name for name, value in run.items() if isinstance(value, float))

    header = [*RUN_COLUMNS, *quantities]
    rows = []
    for run in runs:
        rows.append([_format_number(run.get(name, math.nan)) for name in header])
    return _format_csv(header, rows)


def _format_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a table as CSV."""
    # The csv module ends lines with CR LF by default, which version control would show as a change.
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _format_number(value: Any) -> Any:
    """Format a float with four significant digits, "" for NaN; other values are returned unchanged."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"
