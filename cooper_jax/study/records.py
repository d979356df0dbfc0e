"""Records of a study's runs: small enough for a repository, and sufficient for all its tables and its figure.

1. `read_folder` makes records from the study's settings and every run's metrics.jsonl.
2. `write_records` writes records to a file, and `read_records` reads the file.

Numbers have four significant digits in both cases, so that tables are the same from a folder and from a file.

A file has JSON lines: one for the study, and then for each run one line per evaluation and one for its end:

    {"study": {"steps": 100, "problems": 1024, ..., "arms": {"rule": {"about": "...", "settings": {...}},
    ...}}} {"arm": "rule", "seed": 10, "step": 20, "accuracy": 0.47, ..., "reward": [...], "false_positives":
    [...]} {"arm": "rule", "seed": 10, "done": 100, "seconds": 81.2, ..., "reward": [], "false_positives": []}

`reward` and `false_positives` have a number for each step since the previous line.
"""

from __future__ import annotations

import dataclasses
import itertools
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

# Quantities of an evaluation, and their names in metrics.jsonl.  Arms without a reward model have no rm_*.
EVALUATED = {
    # The policy's responses to held-out problems.
    "accuracy": "eval/oracle/accuracy",
    "accuracy_number": "eval/oracle/accuracy_number",
    "accuracy_words": "eval/oracle/accuracy_words",
    "greedy": "eval/greedy/oracle/accuracy",
    "rule": "eval/rule/accuracy",
    "unrecognised": "eval/rule/unrecognised",
    "habit": "eval/response/habit",
    "truncated": "eval/response/truncated",
    # The reward model on labelled completions: as in its training data, balanced, and the policy's own.
    "rm_original": "eval/rm_original/accuracy",
    "rm_original_auroc": "eval/rm_original/auroc",
    "rm_balanced": "eval/rm_balanced/accuracy",
    "rm_balanced_auroc": "eval/rm_balanced/auroc",
    "rm_by_habit": "eval/rm_balanced/by_habit",
    "rm_by_truth": "eval/rm_balanced/by_truth",
    "rm_policy": "eval/rm_policy/accuracy",
    "rm_policy_auroc": "eval/rm_policy/auroc",
}
# The same for a task whose truth is the user's judge or the rule, which has no other.
JUDGED = {"accuracy": "eval/rule/accuracy", "rm_policy": "eval/rm/rule_agreement"}
# Quantities of every step: the policy's reward, and the hacking signal.
EACH_STEP = {"reward": "reward/mean", "false_positives": "rm/false_positive_rate"}
# Quantities that are summed over the steps.
SUMS = {"seconds": "time/step", "reward_seconds": "time/reward", "updates": "rm/updates"}
# Effects of the reward model's updates on the members of pairs (cooper_jax/reward/reward_losses.py).
MOTION = (
    "common_push", "difference_push", "common_motion", "difference_motion", "positive_saturation",
    "negative_saturation", "accuracy", "valid",
)  # fmt: skip
# Spans of steps over which MOTION is averaged: (first, last), both included.
SPANS = {"1-10": (1, 10), "11-30": (11, 30), "31-": (31, math.inf)}


@dataclasses.dataclass(frozen=True)
class Record:
    """A run up to its last step.  Shares are in [0, 1]; a share of nothing is NaN."""

    arm: str
    seed: int
    done: int  # the last step
    # Measurements.
    evaluations: tuple[dict[str, float], ...]  # `step` and names of EVALUATED, ascending
    steps: dict[str, tuple[float, ...]]  # names of EACH_STEP -> a number for each of the steps 1 .. done
    sums: dict[str, float]  # names of SUMS, over the steps
    motion: dict[str, dict[str, float]]  # names of SPANS -> names of MOTION -> mean, where measured


@dataclasses.dataclass(frozen=True)
class Records:
    """A study's settings and its runs, sorted by arm, then by seed."""

    # steps, problems, samples, every, seeds, and arms: name -> {about, settings}
    study: dict[str, Any]
    runs: tuple[Record, ...]

    def of(self, arm: str) -> list[Record]:
        """List the runs of an arm."""
        return [run for run in self.runs if run.arm == arm]

    def only(self, arms: Sequence[str], seeds: Sequence[int]) -> Records:
        """Select the records of these arms and seeds, in this order; an empty list selects all.

        Raises ValueError for an arm or a seed that the study does not have.
        """
        study = dict(self.study)
        for flag, chosen in (("arms", arms), ("seeds", seeds)):
            if missing := [x for x in chosen if x not in study[flag]]:
                known = ", ".join(map(str, study[flag]))
                raise ValueError(
                    f"--{flag}: {', '.join(map(str, missing))} is not in the study, which has {known}"
                )

        study["arms"] = {name: study["arms"][name] for name in arms or study["arms"]}
        study["seeds"] = list(seeds or study["seeds"])

        # A run belongs to the selection by both its arm and its seed.
        chosen_runs = [r for r in self.runs if r.arm in study["arms"] and r.seed in study["seeds"]]
        order = list(study["arms"])
        return Records(study, tuple(sorted(chosen_runs, key=lambda r: (order.index(r.arm), r.seed))))


def read_whole_rows(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics.jsonl; none if there is no file."""
    # The run may be writing its last line, so only text up to the last line break is read.
    content = path.read_bytes() if path.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    return [parse_numbers(json.loads(line)) for line in complete.splitlines()]


def read_folder(out: Path) -> Records:
    """Make records of a study's folder, whose runs need not be complete.

    Raises ValueError for a folder that is not a study's.
    """
    stored = out / output_folder.SETTINGS
    if not stored.exists():
        raise ValueError(f"{stored} does not exist: {out} is not the folder of a study")
    shared = json.loads(stored.read_bytes())
    arms = read_arms(out / "arms")
    seeds = sorted(int(p.name.removeprefix("seed_")) for p in out.glob("seed_*"))

    # An arm may have no run on a seed yet, or a run without an evaluation: such runs have no record.
    runs = []
    for arm, seed in itertools.product(arms, seeds):
        rows = read_whole_rows(out / f"seed_{seed}" / arm / "metrics.jsonl")
        runs.append(summarise_run(arm, seed, rows))
    study = {
        "steps": shared["steps"],
        "problems": shared["eval.problems"],
        "samples": shared["eval.samples"],
        "every": shared["eval.every"],
        "seeds": seeds,
        "arms": arms,
    }
    return Records(study, tuple(run for run in runs if run is not None))


def read_arms(folder: Path) -> dict[str, dict[str, Any]]:
    """Read description and settings of a study's arms by name, in the order of ARMS, then by name."""
    arms = {}
    for arm_folder in folder.iterdir():
        name = arm_folder.name
        settings = json.loads((arm_folder / output_folder.SETTINGS).read_bytes())
        # An arm of the command line has no description, so its settings are listed in place of one.
        listed = ", ".join(f"{field}={value}" for field, value in settings.items())
        arms[name] = {"about": ARMS[name].about if name in ARMS else listed, "settings": settings}
    order = [*ARMS, *sorted(arms)]
    return {name: arms[name] for name in sorted(arms, key=order.index)}


def summarise_run(arm: str, seed: int, rows: Sequence[dict[str, float]]) -> Record | None:
    """Make a run's record from the rows of its metrics.jsonl; None without an evaluation."""
    evaluations = tuple(_read_evaluation(row) for row in rows if read_accuracy(row) is not None)
    if not evaluations:
        return None
    # Step 0 is the evaluation before training: it has no reward and no time.
    steps = [row for row in rows if row["step"] > 0]
    return Record(
        arm=arm,
        seed=seed,
        done=int(steps[-1]["step"]) if steps else 0,
        evaluations=evaluations,
        steps={name: _read_series(steps, metric) for name, metric in EACH_STEP.items()},
        sums={name: _sum_over_steps(steps, metric) for name, metric in SUMS.items()},
        motion=_summarise_motion(steps),
    )


def read_accuracy(row: dict[str, float]) -> float | None:
    """The held-out accuracy by exact truth, or by the user's judge; None in a row without an evaluation."""
    return row.get(EVALUATED["accuracy"], row.get(JUDGED["accuracy"]))


def _read_evaluation(row: dict[str, float]) -> dict[str, float]:
    """Read the step and the quantities EVALUATED of a row that has an evaluation."""
    metrics = EVALUATED if EVALUATED["accuracy"] in row else EVALUATED | JUDGED
    measured = {name: _round(row[metric]) for name, metric in metrics.items() if metric in row}
    return {"step": int(row["step"])} | measured


def _read_series(steps: Sequence[dict[str, float]], metric: str) -> tuple[float, ...]:
    """Read a metric at every step; NaN where it is missing."""
    return tuple(_round(row.get(metric, math.nan)) for row in steps)


def _sum_over_steps(steps: Sequence[dict[str, float]], metric: str) -> float:
    """Sum a metric over the steps that have it."""
    return _round(sum(row.get(metric, 0.0) for row in steps))


def _summarise_motion(steps: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Compute the means of MOTION over each of SPANS; quantities that were not measured are left out."""
    motion = {}
    for span, (first, last) in SPANS.items():
        rows = [row for row in steps if first <= row["step"] <= last]
        means = {}
        for name in MOTION:
            mean = mean_of_measured([row[f"rm/{name}"] for row in rows if f"rm/{name}" in row])
            if not math.isnan(mean):
                means[name] = _round(mean)
        if means:
            motion[span] = means
    return motion


def write_records(records: Records, path: Path) -> None:
    """Write the records to a file for `read_records`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"study": records.study}]
    for run in records.runs:
        lines += _make_lines(run)
    text = "".join(f"{_encode(line)}\n" for line in lines)
    write_atomically(path, text.encode())


def _encode(line: dict[str, Any]) -> str:
    """Encode a line as compact JSON; `to_jsonable` replaces numbers that are not finite."""
    return json.dumps(to_jsonable(line), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _make_lines(run: Record) -> Iterator[dict[str, Any]]:
    """Make a run's lines: one per evaluation, and one for its end."""
    # Each line has the steps since the previous one, so that no step is written twice.
    identity = {"arm": run.arm, "seed": run.seed}
    written = 0  # steps of the lines so far

    def get_steps_until(step: int) -> dict[str, Any]:
        return {name: values[written:step] for name, values in run.steps.items()}

    for evaluation in run.evaluations:
        step = int(evaluation["step"])
        yield identity | evaluation | get_steps_until(step)
        written = step
    yield identity | {"done": run.done} | run.sums | {"motion": run.motion} | get_steps_until(run.done)


def read_records(path: Path) -> Records:
    """Read a file of `write_records`.  Raises ValueError, naming file and line, for any other file."""
    # Parse all lines before any is interpreted.
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
    if not lines or "study" not in lines[0]:
        raise ValueError(f"{path}: its first line does not describe a study; --keep={path} writes such files")

    # A run's lines follow each other, and the one with `done` is its last.
    runs: list[Record] = []
    evaluations: list[dict[str, float]] = []
    steps: dict[str, list[float]] = {name: [] for name in EACH_STEP}
    for line in lines[1:]:
        identity = {name: line.pop(name) for name in ("arm", "seed")}
        for name, values in steps.items():
            values += [math.nan if x is None else x for x in line.pop(name)]
        if "done" not in line:
            evaluations.append(parse_numbers(line))
            continue
        runs.append(
            Record(
                **identity,
                done=line["done"],
                evaluations=tuple(evaluations),
                steps={name: tuple(values) for name, values in steps.items()},
                sums=parse_numbers({name: line[name] for name in SUMS}),
                motion=line["motion"],
            )
        )
        evaluations, steps = [], {name: [] for name in EACH_STEP}

    study = lines[0]["study"]
    for arm in study["arms"].values():
        # Files of earlier versions have other names for some fields.
        arm["settings"] = {translate_name(name): value for name, value in arm["settings"].items()}
    return Records(study, tuple(runs))


def mean_of_measured(values: Sequence[float]) -> float:
    """Compute the mean of the values that are not NaN; NaN if all are."""
    measured = [x for x in values if not math.isnan(x)]
    return float(np.mean(measured)) if measured else math.nan


def _round(x: float) -> float:
    """Round to four significant digits."""
    return float(f"{x:.4g}")
