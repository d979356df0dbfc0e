"""A study's figures as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cooper_jax.evaluation.text_tables import format_percent
from cooper_jax.statistics import Interval
from cooper_jax.study.records import MOTION, SPANS
from cooper_jax.study.summary import DIP, FROZEN, LAST, LAST_STEPS, PLAIN

RM_SETS = {
    "rm_original": "as in its training data",
    "rm_balanced": "balanced",
    "rm_policy": "the policy's own",
}


def format_markdown(found: dict[str, Any]) -> str:
    """Markdown of all tables.  found: `summary.summarise_study`'s."""
    study, arms = found["study"], found["arms"]
    shown = {name: arm for name, arm in arms.items() if arm["seeds"]}
    parts = [
        "# Arms compared over seeds",
        f"{study['steps']} steps; evaluated every {study['every']} on {study['problems']:,} held-out problems, "
        f"{study['samples']} response(s) each, judged by exact truth. Numbers are percentages unless stated "
        f"otherwise, means over seeds with Student's 95 % interval. The end is the mean of the last {LAST} "
        "evaluations.",
        _missing(found),
    ]
    if shown:
        parts += [
            _accuracy(found, shown),
            _kinds(shown),
            _seen_by_the_rule(shown),
            _training(shown),
            _reward_model(shown),
            _moved_by(shown),
            _cost(shown),
            _motion(shown),
        ]
    parts += [_runs(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; all columns but the first `left` stand to the right."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _missing(found: dict[str, Any]) -> str:
    lines = []
    for name in found["arms"]:
        own = [m for m in found["missing"] if m["arm"] == name]
        begun = [f"{m['seed']} (at step {m['done']})" for m in own if m["done"] is not None]
        rest = _ranges([m["seed"] for m in own if m["done"] is None])
        if own:
            lines.append(f"{name} on {', '.join([*begun, *rest])}")
    return f"**Missing or incomplete, and in no mean** (seeds): {'; '.join(lines)}." if lines else ""


def _ranges(numbers: Sequence[int]) -> list[str]:
    """1, 2, 3, 7 -> "1-3", "7"."""
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and n == out[-1][-1] + 1:
            out[-1].append(n)
        else:
            out.append([n])
    return [f"{x[0]}-{x[-1]}" if len(x) > 1 else f"{x[0]}" for x in out]


def _accuracy(found: dict[str, Any], shown: dict[str, Any]) -> str:
    study, rows = found["study"], []
    for name, arm in shown.items():
        count = len(arm["seeds"])
        less = "-" if name == PLAIN or not arm["pairs"] else format_percent(arm["accuracy_less_rule"])
        if name != PLAIN and 0 < arm["pairs"] < count:
            less += f" on {arm['pairs']}"
        rows.append([
            name, study["arms"][name]["about"], f"{count}", format_percent(arm["accuracy_start"]),
            format_percent(arm["accuracy_end"]), less, format_percent(arm["accuracy_lowest"]), f"{arm['ends_above_start']}",
            f"{arm['ends_below_half']}", f"{arm['dipped']}",
        ])  # fmt: skip
    header = (
        "arm", "", "seeds", "start", "end", f"end minus {PLAIN}'s, seed by seed", "lowest", "end above start",
        "end below half of it", f"ever under {DIP:.0%} of it",
    )  # fmt: skip
    told = (
        f"The last three columns count seeds. An evaluation is under {DIP:.0%} of the start if its binomial 95 % "
        "interval is."
    )
    return f"## Held-out accuracy\n\n{format_markdown_table(header, rows, 2)}\n\n{told}"


def _kinds(shown: dict[str, Any]) -> str:
    names = {
        "greedy": "most likely response",
        "accuracy_number": "questions for a number",
        "accuracy_words": "for words",
    }
    header = ["arm", *(f"{told}: {part}" for told in names.values() for part in ("start", "end"))]
    rows = [
        [arm, *(_of(of, f"{n}_{part}") for n in names for part in ("start", "end"))]
        for arm, of in shown.items()
    ]
    for n, kind in (("accuracy_number", "number"), ("accuracy_words", "words")):
        header.append(f"{kind}: end minus {PLAIN}'s")
        for row, of in zip(rows, shown.values(), strict=True):
            row.append(_of(of, f"{n}_less_rule") if of.get("pairs") else "-")
    told = (
        "Questions for a number accept any form of it, of which the rule reads numerals only. It cannot read the "
        "answers to questions for words."
    )
    return f"## Held-out accuracy by kind\n\n{format_markdown_table(header, rows)}\n\n{told}"


def _seen_by_the_rule(shown: dict[str, Any]) -> str:
    names = {"accuracy": "right", "rule": "right by the rule", "unrecognised": "no verdict by the rule"}
    names |= {"habit": "with the habit"} if any("habit_end" in of for of in shown.values()) else {}
    header = ["arm", *(f"{told}: {part}" for told in names.values() for part in ("start", "end"))]
    rows = [
        [arm, *(_of(of, f"{n}_{part}") for n in names for part in ("start", "end"))]
        for arm, of in shown.items()
    ]
    told = "Of all held-out responses. No verdict: the rule cannot compare the answer with the reference."
    if "habit" in names:
        told += " The habit: over the seeds on which it was measured."
    return f"## What the rule sees\n\n{format_markdown_table(header, rows)}\n\n{told}"


def _moved_by(shown: dict[str, Any]) -> str:
    """Table of what the reward model's score depends on, where that was measured."""
    names = {"rm_by_truth": "being right adds", "rm_by_habit": "the habit adds"}
    arms = {arm: of for arm, of in shown.items() if "rm_by_habit_start" in of}
    if not arms:
        return ""
    header = ["arm", *(f"{told}: {part}" for told in names.values() for part in ("step 0", "end"))]
    rows = [
        [arm, *(_number(of[f"{n}_{part}"], 3) for n in names for part in ("start", "end"))]
        for arm, of in arms.items()
    ]
    told = "Logits on the balanced completions, over the seeds on which they were measured."
    return f"## What the reward model's score depends on\n\n{format_markdown_table(header, rows)}\n\n{told}"


def _training(shown: dict[str, Any]) -> str:
    header = (
        "arm", f"reward, last {LAST_STEPS} steps", "false positives, highest of a step",
        f"false positives, last {LAST_STEPS} steps", "truncated at the end",
    )  # fmt: skip
    names = ("reward_end", "false_positives_most", "false_positives_end", "truncated_end")
    rows = [[arm, *(_of(of, n) for n in names)] for arm, of in shown.items()]
    told = "False positives: of the responses that the rule finds wrong, those with a reward above one half."
    return f"## Training\n\n{format_markdown_table(header, rows)}\n\n{told}"


def _reward_model(shown: dict[str, Any]) -> str:
    parts = {
        "start": "at step 0", "end": "end", "gain": "end minus step 0", "less_begun": "end minus before",
        "lowest": "lowest",
    }  # fmt: skip
    tables = []
    for kind, title in (("", "Accuracy"), ("_auroc", "AUROC")):
        rows = [
            [arm, told, *(_of(of, f"{n}{kind}_{part}") for part in parts)]
            for arm, of in shown.items()
            for n, told in RM_SETS.items()
            if f"{n}_start" in of
        ]
        if rows:
            header = ("arm", "completions", *parts.values())
            tables.append(f"## {title} of the reward model\n\n{format_markdown_table(header, rows, 2)}")
    told = (
        "Step 0 comes after the updates before step 1. Before: the model that all arms of a seed start from, taken "
        f"from the arm {FROZEN}, seed by seed."
    )
    return "\n\n".join([*tables, told]) if tables else ""


def _cost(shown: dict[str, Any]) -> str:
    header = ("arm", "seconds of the steps", "reward-model update", "share", "updates")
    rows = [
        [
            arm,
            _number(of["seconds"]),
            _number(of["reward_seconds"]),
            format_percent(of["reward_share"]),
            _number(of["updates"]),
        ]
        for arm, of in shown.items()
    ]
    told = "Without evaluations, supervised phases and updates before step 1."
    return f"## Cost\n\n{format_markdown_table(header, rows)}\n\n{told}"


def _motion(shown: dict[str, Any]) -> str:
    rows = [
        [
            arm,
            {"accuracy": "pairs whose positive scores higher", "valid": "pairs per step"}.get(
                name, name.replace("_", " ")
            ),
            *(_number(of[f"{name}_{s}"], 3) if f"{name}_{s}" in of else "-" for s in SPANS),
        ]
        for arm, of in shown.items()
        for name in MOTION
        if any(f"{name}_{s}" in of for s in SPANS)
    ]
    if not rows:
        return ""
    header = ("arm", "", *(f"steps {span}" for span in SPANS))
    told = (
        "A push is what the gradient of a pair's loss asks of its logits, a motion what the step's updates made of "
        "them; common is the mean of both members, difference positive minus negative. Saturation is p (1 - p): 0 "
        "is saturated, .25 undecided."
    )
    return (
        f"## How the reward model's updates move pairs\n\n{format_markdown_table(header, rows, 2)}\n\n{told}"
    )


def _runs(found: dict[str, Any]) -> str:
    rows = []
    for run in found["runs"]:
        said = [] if run["complete"] else [f"at step {run['done']}"]
        said += ["dipped"] if run["dipped"] else []
        said += ["below half"] if run["ends_below_half"] else []
        rows.append([
            run["arm"], f"{run['seed']}", format_percent(run["accuracy_start"]), format_percent(run["accuracy_lowest"]),
            f"{run['accuracy_lowest_at']}", format_percent(run["accuracy_end"]), format_percent(run["accuracy_gain"]),
            " ".join(format_percent(x, 0) for x in run["accuracies"].values()), format_percent(run.get("reward_end", math.nan)),
            _highest(run), format_percent(run.get("false_positives_end", math.nan)), ", ".join(said),
        ])  # fmt: skip
    header = (
        "arm", "seed", "start", "lowest", "at step", "end", "end minus start", "at each evaluation",
        "reward at the end", "false positives, highest (step)", "at the end", "",
    )  # fmt: skip
    told = "End minus start: with a binomial 95 % interval, from this run's evaluations alone."
    return f"## Every run\n\n{format_markdown_table(header, rows)}\n\n{told}"


def _highest(run: dict[str, Any]) -> str:
    if "false_positives_most" not in run:
        return "-"
    return f"{format_percent(run['false_positives_most'])} ({run['false_positives_most_at']})"


def _of(arm: dict[str, Any], name: str) -> str:
    return format_percent(arm[name]) if name in arm else "-"


def _number(x: Interval, digits: int = 4) -> str:
    """With its interval, where it has one."""
    if math.isnan(x.value):
        return "-"
    told = [f"{y:.{digits}g}" for y in (x.value, x.low, x.high)]
    return told[0] if math.isnan(x.low) else f"{told[0]} ({told[1]} to {told[2]})"
