"""A study's results as files: results.json, tables.md and study.png, all from its records."""

from __future__ import annotations

import json
from pathlib import Path

from cooper_jax.evaluation.text_tables import to_plain
from cooper_jax.runtime.metrics import to_jsonable
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.study import figure, summary, tables
from cooper_jax.study.records import Records


def write_report(records: Records, out: Path) -> str:
    """Write the three files; returns the tables.  Raises ValueError where no run has been evaluated."""
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
        "tables.md": text.encode(),
        "study.png": figure.draw_figure(records),
    }.items():
        write_atomically(out / name, data)
    return text
