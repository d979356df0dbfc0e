"""Summary statistics of a study: of each run, and of each arm over its seeds.

    start    the evaluation at step 0
    end      the mean of the last three evaluations after step 0
    lowest   the lowest of all evaluations, with its step

Statistics over seeds are means with Student's t interval (95 %), because seeds are few and independent.  Two
arms are compared seed by seed, because the runs of a seed share the problems, their order and the initial
policy.  Incomplete runs are not part of any arm's statistics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from cooper_jax.statistics import NAN, Interval
from cooper_jax.study.records import EVALUATED, MOTION, SPANS, Record, Records, mean_of_measured

# Definitions of the statistics.
LAST = 3  # evaluations whose mean is the end
LAST_STEPS = 10  # steps whose mean is the end of a quantity of every step
DIP = 0.8  # share of the start below which a run has dipped
# Arms to which others are compared.
BASELINE = "rule"  # the arm that the others are compared with
FROZEN = "frozen"  # the arm whose reward model is the one that all arms begin with, before any warm-up
# Quantities of which differences between arms are computed.
SUBJECTS = ("accuracy", "accuracy_number", "accuracy_words")  # held-out problems: all, and by kind
HELD_OUT = ("rm_original", "rm_balanced")  # labelled completions that are the same for all arms


def summarise_study(records: Records) -> dict[str, Any]:
    """Compute all statistics, which are numbers and Intervals.

    The result is {study, runs: [...], arms: {name: {...}}, missing: [...]}.
    `missing` lists {arm, seed, done} of every run that is not complete; `done` is None without an evaluation.
    """
    study = records.study
    runs = [summarise_record(run, study) for run in records.runs]
    complete = [run for run in runs if run["complete"]]
    arms = {name: summarise_arm(name, complete) for name in study["arms"]}

    # A run that was never evaluated has no record, so missing runs are found from the study's arms and seeds.
    by_arm_and_seed = {(run["arm"], run["seed"]): run for run in runs}
    missing = []
    for name, seed in itertools.product(study["arms"], study["seeds"]):
        run = by_arm_and_seed.get((name, seed))
        if run is None or not run["complete"]:
            missing.append({"arm": name, "seed": seed, "done": run["done"] if run else None})
    return {"study": study, "arms": arms, "runs": runs, "missing": missing}


def summarise_record(run: Record, study: dict[str, Any]) -> dict[str, Any]:
    """Compute the statistics of one run by name: numbers (NaN where undefined), and the gain's Interval.

    Each name of EVALUATED that the run has gives NAME_start, NAME_end, NAME_lowest and NAME_lowest_at.
    """
    # Quantities of evaluations.
    out: dict[str, Any] = {
        "arm": run.arm, "seed": run.seed, "done": run.done, "complete": is_complete(run, study),
        "accuracies": {e["step"]: e["accuracy"] for e in run.evaluations},
    }  # fmt: skip
    for name in EVALUATED:
        points = [(int(e["step"]), e[name]) for e in run.evaluations if name in e]
        if points:
            out |= summarise_trace(name, points)

    # Judgements of accuracy, which allow for the chance in a finite number of responses.
    responses = study["problems"] * study["samples"]  # of one evaluation
    start, end = out["accuracy_start"], out["accuracy_end"]
    out["accuracy_gain"] = gain_interval(start, end, responses)
    out["ends_above_start"] = end > start
    out["ends_below_half"] = end < start / 2
    out["dipped"] = has_dipped([e["accuracy"] for e in run.evaluations], start, responses)

    # Quantities of every step.  Steps may lack them, and runs of the rule arm have no false positives at all.
    for name, values in run.steps.items():
        measured = np.array(values)
        if np.isnan(measured).all():
            continue
        out[f"{name}_end"] = mean_of_measured(values[-LAST_STEPS:])
        out[f"{name}_most"] = float(np.nanmax(measured))
        out[f"{name}_most_at"] = int(np.nanargmax(measured)) + 1  # steps count from 1

    # Sums over the steps, and means over spans of steps.
    seconds = run.sums["seconds"]
    out |= run.sums
    out["reward_share"] = run.sums["reward_seconds"] / seconds if seconds else NAN
    for span, means in run.motion.items():
        out |= {f"{name}_{span}": mean for name, mean in means.items()}
    return out


def is_complete(run: Record, study: dict[str, Any]) -> bool:
    """Return True if the run has all steps and the last evaluation."""
    # A signal at the last step can end a run before its last evaluation.
    last = study["steps"] - study["steps"] % study["every"]
    return run.done >= study["steps"] and run.evaluations[-1]["step"] == last


def summarise_trace(name: str, points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Compute start, end, lowest and lowest_at of (step, value) in ascending order; NaN without a value."""
    after_start = [value for step, value in points if step > 0]
    measured = [(value, step) for step, value in points if not math.isnan(value)]
    # Of equally low values the earliest counts.
    lowest, at = min(measured) if measured else (NAN, NAN)
    return {
        f"{name}_start": next((value for step, value in points if step == 0), NAN),
        f"{name}_end": mean_of_measured(after_start[-LAST:]),
        f"{name}_lowest": lowest,
        f"{name}_lowest_at": at,
    }


def has_dipped(accuracies: Sequence[float], start: float, count: int) -> bool:
    """Return True if some accuracy is below DIP of the start by more than chance explains:

        a + 1.96 sqrt(a (1 - a) / count) < DIP start

    count: the number of responses in each evaluation.
    """
    # The left side is the upper end of a binomial 95 % interval in the normal approximation.
    return any(a + 1.96 * math.sqrt(a * (1 - a) / count) < DIP * start for a in accuracies)


def gain_interval(start: float, end: float, count: int) -> Interval:
    """Compute end - start with its 95 % interval, with both as shares of `count` independent responses:

        +- 1.96 sqrt((start (1 - start) + end (1 - end)) / count)

    The interval is approximate.  It would be narrower if it took into account that the end is the mean of
    several evaluations and that both use the same problems.  It would be wider if it took into account that
    some problems ask for the same sum in other words.
    """
    half = 1.96 * math.sqrt((start * (1 - start) + end * (1 - end)) / count)
    return Interval(end - start, end - start - half, end - start + half)


def summarise_arm(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the statistics of an arm over its seeds, by name.

    runs: the complete runs of all arms, in the format of `summarise_record`.
    """
    # Numbers of seeds.
    own = [run for run in runs if run["arm"] == name]
    out: dict[str, Any] = {"seeds": [run["seed"] for run in own]}
    for flag in ("ends_above_start", "ends_below_half", "dipped"):
        out[flag] = sum(run[flag] for run in own)

    # Means over seeds.  A quantity that no run of the arm has is left out.
    for quantity in _list_quantities():
        if any(quantity in run for run in own):
            out[quantity] = mean_over_seeds([run.get(quantity, NAN) for run in own])

    # Gains are computed per seed, because the start and the end of a seed are correlated.
    for quantity in EVALUATED:
        if any(f"{quantity}_end" in run for run in own):
            gains = [run.get(f"{quantity}_end", NAN) - run.get(f"{quantity}_start", NAN) for run in own]
            out[f"{quantity}_gain"] = mean_over_seeds(gains)

    out |= _compare_with_initial_model(own, runs)
    if name != BASELINE:
        out |= _compare_with_baseline(own, runs)
    return out


def _list_quantities() -> list[str]:
    """List the names of a run's statistics that are averaged over seeds."""
    traces = [f"{name}_{part}" for name, part in itertools.product(EVALUATED, ("start", "end", "lowest"))]
    steps = [
        f"{name}_{part}" for name, part in itertools.product(("reward", "false_positives"), ("end", "most"))
    ]
    motion = [f"{name}_{span}" for name, span in itertools.product(MOTION, SPANS)]
    return [*traces, *steps, "seconds", "reward_seconds", "reward_share", "updates", *motion]


def _compare_with_initial_model(
    own: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> dict[str, Interval]:
    """Compare the reward model's end with the model before any update, seed by seed."""
    # That model is the frozen arm's at step 0.  An arm's own step 0 may come after updates of its warm-up.
    frozen = {run["seed"]: run for run in runs if run["arm"] == FROZEN}
    out = {}
    for set_name, kind in itertools.product(HELD_OUT, ("", "_auroc")):
        quantity = f"{set_name}{kind}"
        differences = [
            run[f"{quantity}_end"] - frozen[run["seed"]][f"{quantity}_start"]
            for run in own
            if f"{quantity}_end" in run and run["seed"] in frozen
        ]
        if differences:
            out[f"{quantity}_less_begun"] = mean_over_seeds(differences)
    return out


def _compare_with_baseline(own: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count the seeds shared with the rule arm, and compute the arm's end minus that arm's, seed by seed."""
    # Seeds on which either run is not complete are in neither number.
    baseline = {run["seed"]: run for run in runs if run["arm"] == BASELINE}
    pairs = [(run, baseline[run["seed"]]) for run in own if run["seed"] in baseline]
    out: dict[str, Any] = {"pairs": len(pairs)}
    for quantity in SUBJECTS:
        differences = [a.get(f"{quantity}_end", NAN) - b.get(f"{quantity}_end", NAN) for a, b in pairs]
        out[f"{quantity}_less_rule"] = mean_over_seeds(differences)
    return out


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """Compute the mean of the values that are not NaN, with its Student's t interval of 95 %:

        mean +- t(.975, n - 1) s / sqrt(n)

    The interval is NaN for fewer than two values.
    """
    measured = np.array([x for x in values if not math.isnan(x)])
    if len(measured) < 2:
        return Interval(float(measured[0]) if len(measured) else NAN, NAN, NAN)
    mean = measured.mean()
    half = stats.t.ppf(0.975, len(measured) - 1) * measured.std(ddof=1) / math.sqrt(len(measured))
    return Interval(float(mean), float(mean - half), float(mean + half))
