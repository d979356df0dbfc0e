"""A study's results as files: results.json, tables.md and study.png, all from its records."""

from __future__ import annotations

import json
from pathlib import Path

from cooper_jax.evaluation.report import plain
from cooper_jax.runtime.files import write_atomically
from cooper_jax.runtime.metrics import jsonable
from cooper_jax.study import figure, summary, tables
from cooper_jax.study.records import Records


def write(records: Records, out: Path) -> str:
    """Write the three files; returns the tables.  Raises ValueError where no run has been evaluated."""
    if not records.runs:
        raise ValueError("no run has been evaluated yet")
    found = summary.summarise(records)
    text, results = tables.markdown(found), json.dumps(jsonable(plain(found)), indent=1, ensure_ascii=False)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in {
        "results.json": results.encode() + b"\n",
        "tables.md": text.encode(),
        "study.png": figure.draw(records),
    }.items():
        write_atomically(out / name, data)
    return text
