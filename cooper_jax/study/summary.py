"""A study's figures: of each run, and of each arm over its seeds.

    start    the evaluation at step 0          lowest   of all evaluations, with its step
    end      the mean of the last three evaluations after step 0

Over seeds: the mean with Student's t interval, 95 %: seeds are few, and independent.  Two arms are compared seed by
seed, for a seed's runs share problems, their order and what the policy knew at the start.  Runs that are not
complete count in no arm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from cooper_jax.statistics import NAN, Interval
from cooper_jax.study.records import EVALUATED, MOTION, SPANS, Record, Records

LAST = 3  # evaluations that make the end
LAST_STEPS = 10  # steps that make the end of what is known of each step
DIP = 0.8  # of the start: below it, a run has dipped
PLAIN = "rule"  # the arm that others are compared with
FROZEN = "frozen"  # the arm whose reward model is the one that all begin with, before any warm-up
SUBJECTS = ("accuracy", "accuracy_number", "accuracy_words")  # held-out problems: all, and by kind
HELD_OUT = ("rm_original", "rm_balanced")  # rows that are the same for all arms


def summarise_study(records: Records) -> dict[str, Any]:
    """{study, runs: [...], arms: {name: {...}}, missing: [...]}, of numbers and Intervals."""
    study = records.study
    runs = [run_figures(run, study) for run in records.runs]
    arms = {name: arm_figures(name, [run for run in runs if run["complete"]]) for name in study["arms"]}
    there = {(run["arm"], run["seed"]): run for run in runs}
    missing = []
    for name in study["arms"]:
        for seed in study["seeds"]:
            run = there.get((name, seed))
            if run is None or not run["complete"]:
                missing.append({"arm": name, "seed": seed, "done": run["done"] if run else None})
    return {"study": study, "arms": arms, "runs": runs, "missing": missing}


def run_figures(run: Record, study: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run, flat: numbers, of NaN where there is nothing to stand on, and the gain's Interval.

    Of each name of EVALUATED that it has: NAME_start, NAME_end, NAME_lowest, NAME_lowest_at.
    """
    out: dict[str, Any] = {
        "arm": run.arm, "seed": run.seed, "done": run.done, "complete": is_complete(run, study),
        "accuracies": {e["step"]: e["accuracy"] for e in run.evaluations},
    }  # fmt: skip
    for name in EVALUATED:
        if any(name in e for e in run.evaluations):
            out |= trace_figures(name, [(e["step"], e[name]) for e in run.evaluations if name in e])
    start, end = out["accuracy_start"], out["accuracy_end"]
    out["accuracy_gain"] = gain_interval(start, end, study["problems"] * study["samples"])
    out["ends_above_start"] = end > start
    out["ends_below_half"] = end < start / 2
    out["dipped"] = has_dipped(
        [e["accuracy"] for e in run.evaluations], start, study["problems"] * study["samples"]
    )
    for name, values in run.steps.items():
        found = np.array(values)
        if np.isnan(found).all():
            continue
        out[f"{name}_end"] = _mean(values[-LAST_STEPS:])
        out[f"{name}_most"] = float(np.nanmax(found))
        out[f"{name}_most_at"] = int(np.nanargmax(found)) + 1
    out |= run.sums
    out["reward_share"] = run.sums["reward_seconds"] / run.sums["seconds"] if run.sums["seconds"] else NAN
    for span, found in run.motion.items():
        out |= {f"{name}_{span}": value for name, value in found.items()}
    return out


def is_complete(run: Record, study: dict[str, Any]) -> bool:
    """Whether it has all steps and the last evaluation, which a signal at the last step can prevent."""
    last = study["steps"] - study["steps"] % study["every"]
    return run.done >= study["steps"] and run.evaluations[-1]["step"] == last


def trace_figures(name: str, points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """start, end, lowest and lowest_at of (step, value), ascending."""
    values = [v for step, v in points if step > 0]
    told = [(v, step) for step, v in points if not math.isnan(v)]
    lowest, at = min(told) if told else (NAN, NAN)
    return {
        f"{name}_start": next((v for step, v in points if step == 0), NAN),
        f"{name}_end": _mean(values[-LAST:]),
        f"{name}_lowest": lowest,
        f"{name}_lowest_at": at,
    }


def has_dipped(accuracies: Sequence[float], start: float, count: int) -> bool:
    """Whether some accuracy, of `count` responses, is under DIP of the start by more than chance explains:

    a + 1.96 sqrt(a (1 - a) / count) < DIP start
    """
    return any(a + 1.96 * math.sqrt(a * (1 - a) / count) < DIP * start for a in accuracies)


def gain_interval(start: float, end: float, count: int) -> Interval:
    """end - start with its 95 % interval, each taken for the share of `count` independent responses:

        +- 1.96 sqrt((start (1 - start) + end (1 - end)) / count)

    Takes no account of what narrows it (the end is the mean of several evaluations, and both are of the same
    problems), nor of what widens it (problems that ask for the same sum in other words).
    """
    half = 1.96 * math.sqrt((start * (1 - start) + end * (1 - end)) / count)
    return Interval(end - start, end - start - half, end - start + half)


def arm_figures(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An arm's figures over its seeds.  runs: those of all arms, complete."""
    own = [run for run in runs if run["arm"] == name]
    plain = {run["seed"]: run for run in runs if run["arm"] == PLAIN}
    out: dict[str, Any] = {"seeds": [run["seed"] for run in own]}
    for flag in ("ends_above_start", "ends_below_half", "dipped"):
        out[flag] = sum(run[flag] for run in own)
    motion = [f"{n}_{span}" for n in MOTION for span in SPANS]
    traces = [f"{n}_{part}" for n in EVALUATED for part in ("start", "end", "lowest")]
    each = [f"{n}_{part}" for n in ("reward", "false_positives") for part in ("end", "most")]
    for figure in (*traces, *each, "seconds", "reward_seconds", "reward_share", "updates", *motion):
        if any(figure in run for run in own):
            out[figure] = mean_over_seeds([run.get(figure, NAN) for run in own])
    for figure in EVALUATED:
        if any(f"{figure}_end" in run for run in own):
            moves = [run.get(f"{figure}_end", NAN) - run.get(f"{figure}_start", NAN) for run in own]
            out[f"{figure}_gain"] = mean_over_seeds(moves)
    frozen = {run["seed"]: run for run in runs if run["arm"] == FROZEN}
    for figure in (f"{n}{kind}" for n in HELD_OUT for kind in ("", "_auroc")):
        both = [(run, frozen[run["seed"]]) for run in own if f"{figure}_end" in run and run["seed"] in frozen]
        if both:
            less = [a[f"{figure}_end"] - b[f"{figure}_start"] for a, b in both]
            out[f"{figure}_less_begun"] = mean_over_seeds(less)
    if name != PLAIN:
        both = [(run, plain[run["seed"]]) for run in own if run["seed"] in plain]
        out["pairs"] = len(both)
        for figure in SUBJECTS:
            less = [a.get(f"{figure}_end", NAN) - b.get(f"{figure}_end", NAN) for a, b in both]
            out[f"{figure}_less_rule"] = mean_over_seeds(less)
    return out


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """The mean of what is not NaN, and Student's t interval around it: mean +- t(.975, n - 1) s / sqrt(n)."""
    found = np.array([x for x in values if not math.isnan(x)])
    if len(found) < 2:
        return Interval(float(found[0]) if len(found) else NAN, NAN, NAN)
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found))
    return Interval(float(found.mean()), float(found.mean() - half), float(found.mean() + half))


def _mean(values: Sequence[float]) -> float:
    """Of what is not NaN; NaN of nothing."""
    found = [x for x in values if not math.isnan(x)]
    return float(np.mean(found)) if found else NAN
