"""Figures of judges on published verifier benchmarks, computed as the authors of the benchmarks do.

    VerifyBench    (arXiv 2505.15801; VerifyBench-Hard too) accuracy over all rows, which is the published
                   average, and by type and subtype of the answer
    VerifierBench  (arXiv 2508.03686) F1 of "correct" in each domain and its unweighted mean over the domains,
                   which is the published average; "incorrect" and "invalid" are one class

Two rules differ from judge_comparison.py's: an abstention is a mistake, whatever the label, because the
authors count a reply without a verdict so; and F1 has an average over groups.  Intervals are bootstrapped by
question, which the authors do not report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax.data.labelled_completions import VERIFIERBENCH, VERIFYBENCH
from cooper_jax.evaluation.evaluation_ledger import Row
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.resampling import Resamples, compute_interval
from cooper_jax.statistics import Interval


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Published figures of one benchmark."""

    figure: str  # accuracy or f1
    groups: tuple[str, str]  # names of the two parts of `kind`; the tables of the papers are by the first
    average_of_groups: bool  # the published average is the mean over the groups, not the figure of all rows
    references: tuple[str, ...]  # the kinds of references of its published settings


PROTOCOLS = {
    VERIFYBENCH: Protocol("accuracy", ("answer_type", "answer_subtype"), False, ("own", "none")),
    VERIFIERBENCH: Protocol("f1", ("domain", "answer_type"), True, ("own",)),
}


def has_published_figures(benchmark: str, references: str) -> bool:
    """True if a benchmark has published figures for judges that read this kind of references.

    Args:
      benchmark: a LabelledRows.benchmark; "" for none.
      references: one of judge_comparison.REFERENCES.
    """
    return benchmark in PROTOCOLS and references in PROTOCOLS[benchmark].references


def measure_judges(benchmark: str, rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Compute the published figures of each judge.

    Args:
      benchmark: a key of PROTOCOLS.
      rows: of the ledger of judge_comparison.judge_rows.
      seed: of the bootstrap.
      resamples: R, the number of resamples behind each interval.

    In the result, `judges` is judge -> {average, accuracy, f1, by}; `by` is group -> value -> {rows, accuracy,
    f1}.  F1 is NaN where no completion is correct; an average over groups is NaN if one of them is.
    """
    bootstrap = Resamples([row["question"] for row in rows], seed, resamples)
    judged = {name: _measure_judge(PROTOCOLS[benchmark], rows, name, bootstrap) for name in rows[0]["judges"]}
    return {"benchmark": benchmark, "rows": len(rows), "judges": judged}


def _measure_judge(
    protocol: Protocol, rows: Sequence[Row], name: str, bootstrap: Resamples
) -> dict[str, Any]:
    """Compute the figures of the judge `name`.  bootstrap: resamples of the rows."""
    labels = np.array([row["label"] == 1 for row in rows])  # bool[N]
    yes = np.array([row["judges"][name]["yes"] for row in rows])  # bool[N]
    decided = np.array([not row["judges"][name]["abstained"] for row in rows])  # bool[N]
    right = (yes == labels) & decided

    def measure_rows(mask: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the figures, f64[R + 1] each, of the rows of a mask bool[N]."""
        return {"accuracy": bootstrap.mean(right, mask), "f1": bootstrap.f1(labels, yes, mask)}

    # All rows, and each group.
    figures = measure_rows(np.ones(len(rows), bool))
    by: dict[str, dict[str, Any]] = {}
    averaged = []  # the published figure of each of the groups that are averaged
    parts = np.array([_split_kind(row["kind"]) for row in rows])  # str[N, 2]
    for group, values in zip(protocol.groups, parts.T, strict=True):
        by[group] = {}
        for value in sorted(set(values)):
            found = measure_rows(values == value)
            by[group][str(value)] = {"rows": int((values == value).sum())} | _compute_intervals(found)
            if group == protocol.groups[0]:
                averaged.append(found[protocol.figure])

    average = np.mean(averaged, axis=0) if protocol.average_of_groups else figures[protocol.figure]
    return {"average": compute_interval(average), **_compute_intervals(figures), "by": by}


def _compute_intervals(figures: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Compute the interval of each figure f64[R + 1]."""
    return {name: compute_interval(values) for name, values in figures.items()}


def _split_kind(kind: str) -> tuple[str, str]:
    """Split a row's kind into its two parts; a part that it does not have is empty."""
    general, _, special = kind.partition("/")
    return general, special


# --- the table ------------------------------------------------------------------------------------------------

_TITLES = {"accuracy": "accuracy", "f1": "F1"}


def format_figures(measured: Mapping[str, Any]) -> str:
    """Format the table of one benchmark for a terminal, with figures in percent.

    measured: the result of `measure_judges`.
    """
    protocol = PROTOCOLS[measured["benchmark"]]
    group = protocol.groups[0]
    values = list(next(iter(measured["judges"].values()))["by"][group])

    # The published columns come first; of the figures of all rows, those that the average does not repeat.
    others = [f for f in _TITLES if protocol.average_of_groups or f != protocol.figure]
    header = ["judge", "average (95 %)", *(value or "(none)" for value in values)]
    header += [f"{_TITLES[figure]} of all rows" for figure in others]
    rows = []
    for name, judged in measured["judges"].items():
        cells = [name, format_percent(judged["average"], 2)]
        cells += [format_percent(judged["by"][group][value][protocol.figure].value, 2) for value in values]
        rows.append(cells + [format_percent(judged[figure].value, 2) for figure in others])

    average = f"their mean over the {group}s" if protocol.average_of_groups else "over all rows"
    title = (
        f"{measured['benchmark']} by its authors' rules, {measured['rows']} rows: {_TITLES[protocol.figure]} "
        f"by {group} and {average}; an abstention is a mistake"
    )
    return f"{title}\n\n{format_table(header, rows)}"
