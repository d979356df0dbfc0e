"""What a study keeps of its runs: little enough for a repository, enough for all its tables and its figure.

1. `of_folder` reads settings and every run's metrics.jsonl; `of_file` reads what `keep` has written.
2. Numbers have four digits in both, so that tables made from either are the same.

A kept file holds JSON lines: one of the study, then of each run one an evaluation and one at its end:

    {"study": {"steps": 100, "problems": 1024, ..., "arms": {"rule": {"about": "...", "settings": {...}}, ...}}}
    {"arm": "rule", "seed": 10, "step": 20, "accuracy": 0.47, ..., "reward": [...], "false_positives": [...]}
    {"arm": "rule", "seed": 10, "done": 100, "seconds": 81.2, ..., "reward": [], "false_positives": []}

`reward` and `false_positives` hold a number for each step since the line before.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cooper_jax.runtime import output_folder
from cooper_jax.runtime.metrics import parse_numbers, to_jsonable
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.settings.renamed_flags import translate_name
from cooper_jax.study.arms import ARMS

# What an evaluation says, by the names of metrics.jsonl; an arm without a reward model lacks some.
EVALUATED = {
    "accuracy": "eval/oracle/accuracy",
    "accuracy_number": "eval/oracle/accuracy_number",
    "accuracy_words": "eval/oracle/accuracy_words",
    "greedy": "eval/greedy/oracle/accuracy",
    "rule": "eval/rule/accuracy",
    "unrecognised": "eval/rule/unrecognised",
    "habit": "eval/response/habit",
    "truncated": "eval/response/truncated",
    "rm_original": "eval/rm_original/accuracy",
    "rm_original_auroc": "eval/rm_original/auroc",
    "rm_balanced": "eval/rm_balanced/accuracy",
    "rm_balanced_auroc": "eval/rm_balanced/auroc",
    "rm_by_habit": "eval/rm_balanced/by_habit",
    "rm_by_truth": "eval/rm_balanced/by_truth",
    "rm_policy": "eval/rm_policy/accuracy",
    "rm_policy_auroc": "eval/rm_policy/auroc",
}
# At every step: what the policy earned, and the hacking signal.
EACH_STEP = {"reward": "reward/mean", "false_positives": "rm/false_positive_rate"}
SUMS = {"seconds": "time/step", "reward_seconds": "time/reward", "updates": "rm/updates"}
# How the reward model's updates push and move the members of pairs (cooper_jax/reward/reward_losses.py).
MOTION = (
    "common_push", "difference_push", "common_motion", "difference_motion", "positive_saturation",
    "negative_saturation", "accuracy", "valid",
)  # fmt: skip
SPANS = {"1-10": (1, 10), "11-30": (11, 30), "31-": (31, math.inf)}  # steps, both included


@dataclasses.dataclass(frozen=True)
class Record:
    """A run, as far as it has come.  Shares are in [0, 1]; NaN is a share of nothing."""

    arm: str
    seed: int
    done: int  # its last step
    evaluations: tuple[dict[str, float], ...]  # `step` and names of EVALUATED, ascending
    steps: dict[str, tuple[float, ...]]  # names of EACH_STEP -> a number for each of the steps 1 .. done
    sums: dict[str, float]  # names of SUMS, over the steps
    motion: dict[str, dict[str, float]]  # of SPANS -> of MOTION -> its mean; only what was measured


@dataclasses.dataclass(frozen=True)
class Records:
    """A study's settings and its runs, by seed within arm."""

    study: dict[str, Any]  # steps, problems, samples, every, seeds, arms: name -> about, settings
    runs: tuple[Record, ...]

    def of(self, arm: str) -> list[Record]:
        return [run for run in self.runs if run.arm == arm]

    def only(self, arms: Sequence[str], seeds: Sequence[int]) -> Records:
        """These arms and seeds alone; an empty list leaves all.  Raises ValueError for one that is not there."""
        study = dict(self.study)
        for what, chosen in (("arms", arms), ("seeds", seeds)):
            if missing := [x for x in chosen if x not in study[what]]:
                raise ValueError(
                    f"--{what}: {', '.join(map(str, missing))} is not there; {', '.join(map(str, study[what]))} is"
                )
        study["arms"] = {name: study["arms"][name] for name in arms or study["arms"]}
        study["seeds"] = list(seeds or study["seeds"])
        found = [r for r in self.runs if r.arm in study["arms"] and r.seed in study["seeds"]]
        order = list(study["arms"])
        return Records(study, tuple(sorted(found, key=lambda r: (order.index(r.arm), r.seed))))


def read_whole_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, none where there is no file; a last line that is being written is no row yet."""
    content = path.read_bytes() if path.exists() else b""
    return [parse_numbers(json.loads(line)) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def read_folder(out: Path) -> Records:
    """All that is there of a study.  Raises ValueError where there is none."""
    stored = out / output_folder.SETTINGS
    if not stored.exists():
        raise ValueError(f"{stored} is not there: {out} is no folder of a study")
    shared = json.loads(stored.read_bytes())
    arms = {}
    for folder in (out / "arms").iterdir():
        settings = json.loads((folder / output_folder.SETTINGS).read_bytes())
        told = ", ".join(f"{field}={value}" for field, value in settings.items())
        arms[folder.name] = {
            "about": ARMS[folder.name].about if folder.name in ARMS else told,
            "settings": settings,
        }
    order = [*ARMS, *sorted(arms)]
    arms = {name: arms[name] for name in sorted(arms, key=order.index)}
    seeds = sorted(int(p.name.removeprefix("seed_")) for p in out.glob("seed_*"))
    runs = (
        summarise_run(a, s, read_whole_rows(out / f"seed_{s}" / a / "metrics.jsonl"))
        for a in arms
        for s in seeds
    )
    study = {
        "steps": shared["steps"],
        "problems": shared["eval.problems"],
        "samples": shared["eval.samples"],
        "every": shared["eval.every"],
        "seeds": seeds,
        "arms": arms,
    }
    return Records(study, tuple(run for run in runs if run is not None))


def summarise_run(arm: str, seed: int, rows: Sequence[dict[str, float]]) -> Record | None:
    """A run's record from the rows of its metrics.jsonl; None without an evaluation."""
    evaluations = tuple(
        {"step": int(row["step"])} | {n: _short(row[m]) for n, m in EVALUATED.items() if m in row}
        for row in rows
        if EVALUATED["accuracy"] in row
    )
    steps = [row for row in rows if row["step"] > 0]
    if not evaluations:
        return None
    motion = {}
    for span, (first, last) in SPANS.items():
        of_span = [row for row in steps if first <= row["step"] <= last]
        found = {n: _mean([row[f"rm/{n}"] for row in of_span if f"rm/{n}" in row]) for n in MOTION}
        if measured := {n: _short(x) for n, x in found.items() if not math.isnan(x)}:
            motion[span] = measured
    return Record(
        arm=arm,
        seed=seed,
        done=int(steps[-1]["step"]) if steps else 0,
        evaluations=evaluations,
        steps={n: tuple(_short(row.get(m, math.nan)) for row in steps) for n, m in EACH_STEP.items()},
        sums={n: _short(sum(row.get(m, 0.0) for row in steps)) for n, m in SUMS.items()},
        motion=motion,
    )


def write_records(records: Records, path: Path) -> None:
    """Write the records to a file for `of_file`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"study": records.study}, *(line for run in records.runs for line in _lines(run))]
    text = "".join(f"{_compact(line)}\n" for line in lines)
    write_atomically(path, text.encode())


def _compact(line: dict[str, Any]) -> str:
    return json.dumps(to_jsonable(line), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _lines(run: Record) -> Iterator[dict[str, Any]]:
    who, told = {"arm": run.arm, "seed": run.seed}, 0

    def since(step: int) -> dict[str, Any]:
        return {name: values[told:step] for name, values in run.steps.items()}

    for evaluation in run.evaluations:
        yield who | evaluation | since(evaluation["step"])
        told = evaluation["step"]
    yield who | {"done": run.done} | run.sums | {"motion": run.motion} | since(run.done)


def read_records(path: Path) -> Records:
    """What `keep` wrote.  Raises ValueError, naming file and line, for anything else."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
    if not lines or "study" not in lines[0]:
        raise ValueError(f"{path}: its first line is not that of a study; --keep={path} writes such files")
    runs: list[Record] = []
    evaluations: list[dict[str, float]] = []
    steps: dict[str, list[float]] = {name: [] for name in EACH_STEP}
    for line in lines[1:]:
        who = {name: line.pop(name) for name in ("arm", "seed")}
        for name, values in steps.items():
            values += [math.nan if x is None else x for x in line.pop(name)]
        if "done" not in line:
            evaluations.append(parse_numbers(line))
            continue
        sums = parse_numbers({name: line[name] for name in SUMS})
        told = {name: tuple(values) for name, values in steps.items()}
        runs.append(
            Record(
                **who,
                done=line["done"],
                evaluations=tuple(evaluations),
                steps=told,
                sums=sums,
                motion=line["motion"],
            )
        )
        evaluations, steps = [], {name: [] for name in EACH_STEP}
    study = lines[0]["study"]
    for arm in study["arms"].values():
        # Files of earlier versions have some fields under another name.
        arm["settings"] = {translate_name(name): value for name, value in arm["settings"].items()}
    return Records(study, tuple(runs))


def _mean(values: Sequence[float]) -> float:
    """Of what is not NaN; NaN of nothing."""
    found = [x for x in values if not math.isnan(x)]
    return float(np.mean(found)) if found else math.nan


def _short(x: float) -> float:
    """Four digits."""
    return float(f"{x:.4g}")
