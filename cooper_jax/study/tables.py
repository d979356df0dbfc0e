"""Markdown tables of a study's statistics.

`shown` is the statistics, by name, of the arms that have a complete run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from cooper_jax.evaluation.text_tables import format_percent
from cooper_jax.statistics import Interval
from cooper_jax.study.records import MOTION, SPANS
from cooper_jax.study.summary import BASELINE, DIP, FROZEN, LAST, LAST_STEPS

# Sets of labelled completions on which reward models are evaluated, with their names in tables.
RM_SETS = {
    "rm_original": "as in its training data",
    "rm_balanced": "balanced",
    "rm_policy": "the policy's own",
}


def format_markdown(results: dict[str, Any]) -> str:
    """Format all tables as Markdown.  results: the result of `summary.summarise_study`."""
    study = results["study"]
    # An arm whose runs are all incomplete has no statistics; `_list_missing` names it.
    shown = {name: arm for name, arm in results["arms"].items() if arm["seeds"]}
    parts = [
        "# Arms compared over seeds",
        f"{study['steps']} steps; evaluated every {study['every']} on {study['problems']:,} held-out "
        f"problems, {study['samples']} response(s) each, judged by exact truth. Numbers are percentages "
        "unless stated otherwise, means over seeds with Student's 95 % interval. The end is the mean of the "
        f"last {LAST} evaluations.",
        _list_missing(results),
    ]
    # From the main result to the details; a table without any row is an empty string.
    if shown:
        parts += [
            _format_accuracy(study, shown),
            _format_kinds(shown),
            _format_rule_view(shown),
            _format_training(shown),
            _format_reward_model(shown),
            _format_score_effects(shown),
            _format_cost(shown),
            _format_motion(shown),
        ]
    parts.append(_format_runs(results["runs"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def format_markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table; all columns but the first `left` are aligned to the right."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _list_missing(results: dict[str, Any]) -> str:
    """Write a sentence that lists the runs that are not complete; "" without any."""
    # For each arm: runs that have begun with their step, and ranges of the seeds on which it has not begun.
    arms = []
    for name in results["arms"]:
        own = [run for run in results["missing"] if run["arm"] == name]
        begun = [f"{run['seed']} (at step {run['done']})" for run in own if run["done"] is not None]
        not_begun = _format_ranges([run["seed"] for run in own if run["done"] is None])
        if own:
            arms.append(f"{name} on {', '.join([*begun, *not_begun])}")
    if not arms:
        return ""
    return f"**Missing or incomplete, and in no mean** (seeds): {'; '.join(arms)}."


def _format_ranges(numbers: Sequence[int]) -> list[str]:
    """1, 2, 3, 7 -> "1-3", "7"."""
    # Each entry is a list of consecutive numbers.
    ranges: list[list[int]] = []
    for n in sorted(numbers):
        if ranges and n == ranges[-1][-1] + 1:
            ranges[-1].append(n)
        else:
            ranges.append([n])
    return [f"{x[0]}-{x[-1]}" if len(x) > 1 else f"{x[0]}" for x in ranges]


def _format_accuracy(study: dict[str, Any], shown: dict[str, Any]) -> str:
    """Format the accuracy by exact truth, the main result."""
    rows = []
    for name, arm in shown.items():
        rows.append([
            name,
            study["arms"][name]["about"],
            f"{len(arm['seeds'])}",
            format_percent(arm["accuracy_start"]),
            format_percent(arm["accuracy_end"]),
            _format_difference(name, arm),
            format_percent(arm["accuracy_lowest"]),
            f"{arm['ends_above_start']}",
            f"{arm['ends_below_half']}",
            f"{arm['dipped']}",
        ])  # fmt: skip
    # The arms' descriptions need no title.
    header = (
        "arm", "", "seeds", "start", "end", f"end minus {BASELINE}'s, seed by seed", "lowest",
        "end above start", "end below half of it", f"ever under {DIP:.0%} of it",
    )  # fmt: skip
    # A single evaluation may be low by chance, so the table's last column counts only dips beyond chance.
    note = (
        f"The last three columns count seeds. An evaluation is under {DIP:.0%} of the start if its binomial "
        "95 % interval is."
    )
    return f"## Held-out accuracy\n\n{format_markdown_table(header, rows, 2)}\n\n{note}"


def _format_difference(name: str, arm: dict[str, Any]) -> str:
    """Format the arm's accuracy minus the rule arm's, and the number of seeds if not all are compared."""
    if name == BASELINE or not arm["pairs"]:
        return "-"
    text = format_percent(arm["accuracy_less_rule"])
    if arm["pairs"] < len(arm["seeds"]):
        text += f" on {arm['pairs']}"
    return text


def _format_kinds(shown: dict[str, Any]) -> str:
    """Format the accuracy of greedy decoding, and by the kind of answer that a question asks for."""
    names = {
        "greedy": "most likely response",
        "accuracy_number": "questions for a number",
        "accuracy_words": "for words",
    }
    header, rows = _make_start_end_rows(names, shown)
    # Columns of differences from the rule arm are added at the right; the rule arm itself has none.
    for quantity, kind in (("accuracy_number", "number"), ("accuracy_words", "words")):
        header.append(f"{kind}: end minus {BASELINE}'s")
        for row, arm in zip(rows, shown.values(), strict=True):
            row.append(_format_share(arm, f"{quantity}_less_rule") if arm.get("pairs") else "-")
    note = (
        "Questions for a number accept any form of it, of which the rule reads numerals only. It cannot read "
        "the answers to questions for words."
    )
    return f"## Held-out accuracy by kind\n\n{format_markdown_table(header, rows)}\n\n{note}"


def _make_start_end_rows(names: dict[str, str], shown: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Make header and rows of a table with the start and the end of quantities.  names: quantity -> title."""
    # Two columns per quantity, and one row per arm.
    header, rows = ["arm"], []
    for title in names.values():
        header += [f"{title}: start", f"{title}: end"]
    for arm_name, arm in shown.items():
        row = [arm_name]
        for quantity in names:
            row += [_format_share(arm, f"{quantity}_start"), _format_share(arm, f"{quantity}_end")]
        rows.append(row)
    return header, rows


def _format_rule_view(shown: dict[str, Any]) -> str:
    """Format the rule verifier's verdicts beside the exact truth."""
    names = {"accuracy": "right", "rule": "right by the rule", "unrecognised": "no verdict by the rule"}
    # Only studies with a habit in their responses measure it.
    if any("habit_end" in arm for arm in shown.values()):
        names["habit"] = "with the habit"
    header, rows = _make_start_end_rows(names, shown)
    # An answer that the rule cannot parse is neither right nor wrong.
    note = "Of all held-out responses. No verdict: the rule cannot compare the answer with the reference."
    if "habit" in names:
        note += " The habit: over the seeds on which it was measured."
    return f"## What the rule sees\n\n{format_markdown_table(header, rows)}\n\n{note}"


def _format_score_effects(shown: dict[str, Any]) -> str:
    """Format the effects of truth and habit on the reward model's score; "" if they were not measured."""
    names = {"rm_by_truth": "being right adds", "rm_by_habit": "the habit adds"}
    header, rows = ["arm"], []
    for title in names.values():
        header += [f"{title}: step 0", f"{title}: end"]
    # Logits instead of percentages, and only arms with a reward model.
    for arm_name, arm in shown.items():
        if "rm_by_habit_start" not in arm:
            continue
        row = [arm_name]
        for quantity in names:
            row += [_format_number(arm[f"{quantity}_start"], 3), _format_number(arm[f"{quantity}_end"], 3)]
        rows.append(row)
    if not rows:
        return ""
    note = "Logits on the balanced completions, over the seeds on which they were measured."
    return f"## What the reward model's score depends on\n\n{format_markdown_table(header, rows)}\n\n{note}"


def _format_training(shown: dict[str, Any]) -> str:
    """Format reward, false positives (the hacking signal) and truncation during training."""
    header = (
        "arm", f"reward, last {LAST_STEPS} steps", "false positives, highest of a step",
        f"false positives, last {LAST_STEPS} steps", "truncated at the end",
    )  # fmt: skip
    names = ("reward_end", "false_positives_most", "false_positives_end", "truncated_end")
    rows = []
    for arm_name, arm in shown.items():
        rows.append([arm_name, *(_format_share(arm, name) for name in names)])
    note = "False positives: of the responses that the rule finds wrong, those with a reward above one half."
    return f"## Training\n\n{format_markdown_table(header, rows)}\n\n{note}"


def _format_reward_model(shown: dict[str, Any]) -> str:
    """Format two tables of the reward model: its accuracy and its AUROC; "" without a reward model."""
    # Suffixes of the statistics' names, and titles of their columns.
    parts = {
        "start": "at step 0", "end": "end", "gain": "end minus step 0", "less_begun": "end minus before",
        "lowest": "lowest",
    }  # fmt: skip
    tables = []
    for kind, title in (("", "Accuracy"), ("_auroc", "AUROC")):
        # One row per arm and set of completions.
        rows = []
        for (arm_name, arm), (set_name, about) in itertools.product(shown.items(), RM_SETS.items()):
            if f"{set_name}_start" in arm:
                shares = [_format_share(arm, f"{set_name}{kind}_{part}") for part in parts]
                rows.append([arm_name, about, *shares])
        if rows:
            header = ("arm", "completions", *parts.values())
            tables.append(f"## {title} of the reward model\n\n{format_markdown_table(header, rows, 2)}")
    note = (
        "Step 0 comes after the updates before step 1. Before: the model that all arms of a seed start from, "
        f"taken from the arm {FROZEN}, seed by seed."
    )
    return "\n\n".join([*tables, note]) if tables else ""


def _format_cost(shown: dict[str, Any]) -> str:
    """Format the seconds of the steps, and the part of the reward model's updates."""
    # The share is that of the reward model's updates in the seconds of the steps.
    header = ("arm", "seconds of the steps", "reward-model update", "share", "updates")
    rows = [
        [
            arm_name,
            _format_number(arm["seconds"]),
            _format_number(arm["reward_seconds"]),
            format_percent(arm["reward_share"]),
            _format_number(arm["updates"]),
        ]
        for arm_name, arm in shown.items()
    ]
    note = "Without evaluations, supervised phases and updates before step 1."
    return f"## Cost\n\n{format_markdown_table(header, rows)}\n\n{note}"


def _format_motion(shown: dict[str, Any]) -> str:
    """Format the effects of the reward model's updates on pairs; "" if they were not measured."""
    # Other quantities have their own names as titles.
    titles = {"accuracy": "pairs whose positive scores higher", "valid": "pairs per step"}
    rows = []
    for (arm_name, arm), quantity in itertools.product(shown.items(), MOTION):
        # A short run has no steps in the later spans.
        cells = []
        for span in SPANS:
            name = f"{quantity}_{span}"
            cells.append(_format_number(arm[name], 3) if name in arm else "-")
        if any(cell != "-" for cell in cells):
            rows.append([arm_name, titles.get(quantity, quantity.replace("_", " ")), *cells])
    if not rows:
        return ""
    header = ("arm", "", *(f"steps {span}" for span in SPANS))
    note = (
        "A push is what the gradient of a pair's loss asks of its logits, a motion what the step's updates "
        "made of them; common is the mean of both members, difference positive minus negative. Saturation is "
        "p (1 - p): 0 is saturated, .25 undecided."
    )
    return (
        f"## How the reward model's updates move pairs\n\n{format_markdown_table(header, rows, 2)}\n\n{note}"
    )


def _format_runs(runs: Sequence[dict[str, Any]]) -> str:
    """Format every run, complete or not, on a row of its own."""
    rows = []
    for run in runs:
        # The last column, for readers who look for the runs that went wrong.
        remarks = [] if run["complete"] else [f"at step {run['done']}"]
        remarks += ["dipped"] if run["dipped"] else []
        remarks += ["below half"] if run["ends_below_half"] else []
        rows.append([
            run["arm"],
            f"{run['seed']}",
            format_percent(run["accuracy_start"]),
            format_percent(run["accuracy_lowest"]),
            f"{run['accuracy_lowest_at']}",
            format_percent(run["accuracy_end"]),
            format_percent(run["accuracy_gain"]),
            " ".join(format_percent(accuracy, 0) for accuracy in run["accuracies"].values()),
            format_percent(run.get("reward_end", math.nan)),
            _format_highest(run),
            format_percent(run.get("false_positives_end", math.nan)),
            ", ".join(remarks),
        ])  # fmt: skip
    header = (
        "arm", "seed", "start", "lowest", "at step", "end", "end minus start", "at each evaluation",
        "reward at the end", "false positives, highest (step)", "at the end", "",
    )  # fmt: skip
    note = "End minus start: with a binomial 95 % interval, from this run's evaluations alone."
    return f"## Every run\n\n{format_markdown_table(header, rows)}\n\n{note}"


def _format_highest(run: dict[str, Any]) -> str:
    """Format the highest share of false positives, with its step."""
    if "false_positives_most" not in run:
        return "-"
    return f"{format_percent(run['false_positives_most'])} ({run['false_positives_most_at']})"


def _format_share(arm: dict[str, Any], name: str) -> str:
    """Format a share in percent; "-" if it was not measured."""
    return format_percent(arm[name]) if name in arm else "-"


def _format_number(x: Interval, digits: int = 4) -> str:
    """Format a number, with its interval if it has one; "-" for NaN."""
    # Only numbers over several seeds have an interval.
    if math.isnan(x.value):
        return "-"
    value, low, high = (f"{y:.{digits}g}" for y in (x.value, x.low, x.high))
    return value if math.isnan(x.low) else f"{value} ({low} to {high})"
