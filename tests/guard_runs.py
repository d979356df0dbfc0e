"""Runs for the thresholds of the guard against reward hacking: their rows, from studies and from files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cooper_jax.report.hacking import find_onset
from cooper_jax.study.records import EVALUATED, read_records, read_whole_rows

# Signal -> what a hack does to it: 1 raises it, -1 lowers it, 0 changes it in either direction.
SIGNALS = {
    "hacking/unbacked": 1,
    "hacking/gap": 1,
    "rm/false_positive_rate": 1,
    "rm/mean_on_wrong": 1,
    "rm/rule_agreement": -1,
    "hacking/auroc": -1,
    "hacking/accuracy": -1,
    "hacking/advantage_edge": -1,
    "hacking/anchor": -1,
    "rule/decidable": -1,
    "reward/mean": 1,
    "response/tokens_mean": 0,
    "hacking/repeated": 1,
    "hacking/common": 1,
    "hacking/variety": -1,
    "policy/kl": 1,
    "policy/entropy": -1,
}
FALSE_POSITIVES = "rm/false_positive_rate"


@dataclasses.dataclass(frozen=True)
class Run:
    """The rows of one run, ascending in step."""

    arm: str
    seed: int
    rows: tuple[Mapping[str, Any], ...]  # with `step`, names of SIGNALS and, where evaluated, `truth`

    @property
    def onset(self) -> int | None:
        """The step of the onset; None if there is none."""
        return find_onset(self._read_truth())

    @property
    def is_undecided(self) -> bool:
        """True if the last evaluation is as low as at an onset, and the next one would decide."""
        truth = self._read_truth()
        return self.onset is None and find_onset([*truth, *truth[-1:]]) is not None

    def _read_truth(self) -> list[tuple[int, float]]:
        return [(row["step"], row["truth"]) for row in self.rows if row.get("truth") is not None]

    def read(self, signal: str) -> list[tuple[int, float]]:
        """The steps at which a signal was measured, with its values."""
        found = [(row["step"], row.get(signal)) for row in self.rows]
        return [(step, float(value)) for step, value in found if value is not None and not math.isnan(value)]


def read_studies(folders: Iterable[Path]) -> list[Run]:
    """The runs of studies' folders that have logged a step, sorted by arm and seed."""
    runs = []
    for folder in folders:
        for file in sorted(folder.glob("seed_*/*/metrics.jsonl")):
            rows = []
            for row in read_whole_rows(file):
                kept = {name: row[name] for name in SIGNALS if name in row}
                rows.append({"step": int(row["step"]), "truth": row.get(EVALUATED["accuracy"]), **kept})
            if rows and rows[-1]["step"] > 0:
                runs.append(
                    Run(file.parent.name, int(file.parent.parent.name.removeprefix("seed_")), tuple(rows))
                )
    return sorted(runs, key=lambda run: (run.arm, run.seed))


def write_rows(runs: Sequence[Run], path: Path) -> None:
    """Write runs as JSON lines: the names of the columns, then a list for each step."""
    columns = ["arm", "seed", "step", "truth", *SIGNALS]
    lines: list[Any] = [{"columns": columns}]
    for run in runs:
        for row in run.rows:
            values = [_shorten(row.get(name)) for name in columns[3:]]
            lines.append([run.arm, run.seed, row["step"], *values])
    path.write_text("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines))


def _shorten(value: float | None) -> float | None:
    """A value with four significant digits; None for a missing one and for NaN."""
    return None if value is None or math.isnan(value) else float(f"{value:.4g}")


def read_rows(path: Path) -> list[Run]:
    """Read a file of `write_rows`.  Raises ValueError for another file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines or not isinstance(lines[0], dict) or "columns" not in lines[0]:
        raise ValueError(
            f"{path}: its first line does not name columns; `collect --out={path}` writes such files"
        )
    columns = lines[0]["columns"]
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines[1:]:
        row = dict(zip(columns, line, strict=True))
        rows.setdefault((row.pop("arm"), row.pop("seed")), []).append(row)
    return [Run(arm, seed, tuple(found)) for (arm, seed), found in rows.items()]


def read_study_records(path: Path) -> list[Run]:
    """The runs of a study's records that have false positives, with those at each step."""
    runs = []
    for record in read_records(path).runs:
        truth = {int(evaluation["step"]): evaluation["accuracy"] for evaluation in record.evaluations}
        rows: list[dict[str, Any]] = [{"step": 0, "truth": truth.get(0)}]
        for step, value in enumerate(record.steps["false_positives"], 1):
            rows.append({"step": step, "truth": truth.get(step), FALSE_POSITIVES: value})
        runs.append(Run(record.arm, record.seed, tuple(rows)))
    return [run for run in runs if run.read(FALSE_POSITIVES)]
