"""Outcome of an annotation, computed from its ledger: labelled rows, disputed rows, and a report.

1. `drop_repeats`: among items with the same question, reference and completion, up to white space, the first
   one of the plan is kept.
2. A row is labelled if both the rule and the judge decided and agree; otherwise it is disputed.
3. `balance_classes`: the larger class keeps at most `annotate.max_ratio` times as many labelled rows as the
   smaller one, within each source or overall.  Which rows remain depends on the seed and on each row's id
   alone.
4. The report counts every item of the plan once.  It gives agreement and Cohen's kappa
   (statistics.cohens_kappa) over the rows on which both decided, with intervals bootstrapped by question.

    rule     CORRECT -> 1;  WRONG, NO_ANSWER -> 0;  otherwise undecided
    judge    the verdict in its reply;  unparsed, truncated or failed: undecided
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax import statistics
from cooper_jax.annotation.annotation_ledger import Ledger, Row, has_failed
from cooper_jax.annotation.items import AnnotateConfig, AnnotationPlan, Item
from cooper_jax.runtime import keys
from cooper_jax.types import Verdict

DECISIONS = {True: "correct", False: "wrong", None: "undecided"}
RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row with both verdicts; None is undecided."""

    row: Row  # the item's lines of completions.jsonl and verdicts.jsonl, merged
    rule: bool | None
    judge: bool | None

    @property
    def both(self) -> bool:
        """True if both decided."""
        return self.rule is not None and self.judge is not None

    @property
    def label(self) -> bool | None:
        """The decision on which both agree; None for a disputed row."""
        return self.rule if self.both and self.rule == self.judge else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Contents of labelled.jsonl, disputed.jsonl and report.json."""

    labelled: list[Row]
    disputed: list[Row]
    report: dict[str, Any]


def drop_repeats(items: Sequence[Item], completions: Mapping[str, Row]) -> list[Item]:
    """List the items that have a completion, without those that repeat the texts of an earlier one.

    completions: rows of completions.jsonl, by the item's id.
    """
    seen_texts, unique = set(), []
    for item in items:
        row = completions[item.id]
        if has_failed(row):
            continue
        texts = (item.question, item.reference, row["completion"])
        key = tuple(" ".join(text.split()) for text in texts)
        if key not in seen_texts:
            seen_texts.add(key)
            unique.append(item)
    return unique


def settle_outcome(
    settings: AnnotateConfig, seed: int, plan: AnnotationPlan, items: Sequence[Item], ledger: Ledger
) -> Outcome:
    """Label or dispute each row, and make the report on the whole plan.

    items: the judged ones, from `drop_repeats`.
    """
    # Labels come from agreement; balancing may then leave out some of the labelled rows.
    completions, verdicts = ledger.completions.rows, ledger.verdicts.rows
    judged = [_merge_verdict(completions[item.id], verdicts[item.id]) for item in items]
    agreed = [x for x in judged if x.label is not None]
    kept = balance_classes(agreed, settings.balance, settings.max_ratio, seed)

    # Every item of the plan is counted once: failed, duplicate, disputed, left out by balance, or labelled.
    failures = Counter(completions[i.id]["failure"] for i in plan.items if has_failed(completions[i.id]))
    completed = len(plan.items) - failures.total()
    report = {
        # Completions.
        "planned": len(plan.items),
        "repeated_in_files": plan.repeated,
        "failed": dict(sorted(failures.items())),
        "completions": completed,
        "truncated": sum(bool(x.row["truncated"]) for x in judged if "truncated" in x.row),
        "duplicates": completed - len(judged),
        # Verdicts.
        "judged": len(judged),
        "agreed": len(agreed),
        "disputed": _count_disputes(judged),
        "judge_undecided": _count_sorted([x.row["judge_reason"] for x in judged if x.judge is None]),
        "rule_undecided": _count_sorted([x.row["rule"] for x in judged if x.rule is None]),
        # Labelled rows.
        "left_out_by_balance": len(agreed) - len(kept),
        "labelled": len(kept),
        # Agreement, in total and by group.
        **measure_agreement(judged, seed),
        "confusion": count_confusion(judged),
        "sources": _break_down(judged, kept, "source"),
        "models": _break_down(judged, kept, "model"),
        "given_labels": compare_given_labels(judged),
    }

    # Rows keep the order of the plan, not that of the balanced classes.
    kept_ids = {x.row["id"] for x in kept}
    return Outcome(
        labelled=[_format_row(x) for x in agreed if x.row["id"] in kept_ids],
        disputed=[_format_row(x) for x in judged if x.label is None],
        report=report,
    )


def _merge_verdict(completion: Row, verdict: Row) -> Judged:
    """Merge a row of completions.jsonl with the item's row of verdicts.jsonl."""
    rule = Verdict(verdict["rule"])
    decision = rule == Verdict.CORRECT if rule.decidable else None
    # A failure of the judge's request is an undecided verdict; the completion itself has not failed.
    merged = completion | {k: v for k, v in verdict.items() if k != "failure"}
    return Judged(merged, decision, verdict["judge"])


def _format_row(x: Judged) -> Row:
    """Make a row of labelled.jsonl (data/labelled_completions.py) or, without a label, of disputed.jsonl."""
    # The fields that a reader looks for first come first, then the label, then all others.
    label = {} if x.label is None else {"label": int(x.label), "labelled_by": "rule and judge"}
    first = ("id", "question", "reference_answer", "completion")
    return {k: x.row[k] for k in first} | label | {k: v for k, v in x.row.items() if k not in first}


# --- balance ------------------------------------------------------------------------------------------------


def balance_classes(agreed: Sequence[Judged], how: str, ratio: float, seed: int) -> list[Judged]:
    """Drop labelled rows of the larger class; returns the others, grouped by source and class.

    Args:
      agreed: the labelled rows.
      how: one of items.BALANCES.
      ratio: the larger class keeps at most `ratio` times as many rows as the smaller.
      seed: decides which rows are dropped.
    """
    if how == "off":
        return list(agreed)

    # Overall balance is one group with an empty name.
    groups: dict[str, dict[bool, list[Judged]]] = {}  # source -> label -> rows
    for x in agreed:
        name = x.row["source"] if how == "source" else ""
        classes = groups.setdefault(name, {True: [], False: []})
        classes[bool(x.label)].append(x)

    # Each row is ranked by a random number of its own, so the choice does not depend on the plan's order.
    kept = []
    for classes in groups.values():
        limit = int(ratio * min(len(rows) for rows in classes.values()))
        for rows in classes.values():
            kept += sorted(rows, key=lambda x: _draw_rank(x, seed))[:limit]
    return kept


def _draw_rank(x: Judged, seed: int) -> float:
    """Draw a number in [0, 1) that depends on the seed and the row's id alone."""
    # A random stream's index has 32 bits, so the id's low 64 bits are passed as two of them.
    id = int(x.row["id"], 16)
    return float(keys.make_generator(seed, "balance", id >> 32 & 0xFFFFFFFF, id & 0xFFFFFFFF).random())


# --- the report ---------------------------------------------------------------------------------------------


def count_confusion(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """Count the confusion matrix: the rule's decision -> the judge's decision -> number of rows."""
    counts = Counter((DECISIONS[x.rule], DECISIONS[x.judge]) for x in judged)
    matrix = {}
    for rule in DECISIONS.values():
        matrix[rule] = {judge: counts[rule, judge] for judge in DECISIONS.values()}
    return matrix


def measure_agreement(judged: Sequence[Judged], seed: int) -> dict[str, Any]:
    """Measure agreement and Cohen's kappa over the rows on which both decided, with 95 % intervals."""
    # Abstentions are neither agreement nor disagreement; the report counts them separately.
    both = [x for x in judged if x.both]
    rule = np.array([x.rule for x in both], bool)  # bool[N]
    judge = np.array([x.judge for x in both], bool)  # bool[N]
    questions = [x.row["question"] for x in both]

    def compute_agreement(weights: np.ndarray) -> float:
        return float(np.average(rule == judge, weights=weights)) if both else float("nan")

    def compute_kappa(weights: np.ndarray) -> float:
        repeats = weights.astype(int)  # i64[N]: how often the resample contains each row
        resampled_rule, resampled_judge = np.repeat(rule, repeats), np.repeat(judge, repeats)
        return statistics.cohens_kappa(resampled_rule.tolist(), resampled_judge.tolist())

    measured: dict[str, Any] = {"both_decided": len(both)}
    for name, statistic in (("agreement", compute_agreement), ("kappa", compute_kappa)):
        # Both statistics use the same resamples, since both begin at the same generator state.
        rng = keys.make_generator(seed, "bootstrap", 0)
        interval = statistics.bootstrap_interval(statistic, questions, rng, RESAMPLES)
        measured[name] = dataclasses.asdict(interval)
    return measured


def _count_sorted(values: Sequence[str]) -> dict[str, int]:
    """Count each value, in alphabetical order."""
    return dict(sorted(Counter(values).items()))


def _count_disputes(judged: Sequence[Judged]) -> dict[str, int]:
    """Count the disputed rows by the reason for the missing label."""
    return _count_sorted([_explain_dispute(x) for x in judged if x.label is None])


def _explain_dispute(x: Judged) -> str:
    """Name the reason for a disputed row's missing label."""
    if x.both:
        return "both decided, and differ"
    if x.rule is None and x.judge is None:
        return "neither decided"
    return "rule undecided" if x.rule is None else "judge undecided"


def _break_down(judged: Sequence[Judged], kept: Sequence[Judged], field: str) -> dict[str, Row]:
    """Compute per source or model: its rows, its agreement, and its share of the labelled rows.

    Args:
      judged: all judged rows.
      kept: the labelled rows that remain after balancing.
      field: `source` or `model`.
    """
    out: dict[str, Row] = {}
    for name in sorted({x.row[field] for x in judged}):
        own = [x for x in judged if x.row[field] == name]
        own_kept = [x for x in kept if x.row[field] == name]
        both = [x for x in own if x.both]
        out[name] = {
            # Of all judged rows.
            "judged": len(own),
            "both_decided": len(both),
            "agreed": sum(x.label is not None for x in own),
            "kappa": statistics.cohens_kappa([x.rule for x in both], [x.judge for x in both]),
            # Of the rows that remain.
            "labelled": len(own_kept),
            "correct": sum(bool(x.label) for x in own_kept),
            "share": len(own_kept) / len(kept) if kept else 0.0,
        }
    return out


def compare_given_labels(judged: Sequence[Judged]) -> dict[str, Row]:
    """Measure rule, judge and their agreement against the labels in the files; empty without such labels."""
    known = [x for x in judged if "given_label" in x.row]
    if not known:
        return {}

    # Each is measured on the rows that it decided; the report has their number.
    out: dict[str, Row] = {}
    decisions: dict[str, Callable[[Judged], bool | None]] = {
        "rule": lambda x: x.rule,
        "judge": lambda x: x.judge,
        "agreed": lambda x: x.label,
    }
    for name, decide in decisions.items():
        decided = [x for x in known if decide(x) is not None]
        labels = np.array([x.row["given_label"] for x in decided], bool)
        predictions = np.array([decide(x) for x in decided], bool)
        figures = statistics.classification_figures(labels, predictions)
        out[name] = {"rows": len(known), "decided": len(decided), **figures}
    return out


def format_report(report: Mapping[str, Any]) -> str:
    """Format the report for a terminal."""
    r = report
    # Counts, from all completions down to the labelled rows.
    agreement, kappa = (_format_interval(r[name]) for name in ("agreement", "kappa"))
    lines = [
        "",
        f"completions   {r['completions']} of {r['planned']}; failed {_format_counts(r['failed'])}; "
        f"truncated {r['truncated']}",
        f"duplicates    {r['duplicates']}, and {r['repeated_in_files']} rows within files",
        f"judged        {r['judged']}; both decided {r['both_decided']}; rule undecided "
        f"{_format_counts(r['rule_undecided'])}; judge undecided {_format_counts(r['judge_undecided'])}",
        f"agreement     {agreement}   Cohen's kappa {kappa}   (95 % by question)",
        f"disputed      {_format_counts(r['disputed'])}",
        f"labelled      {r['labelled']} of {r['agreed']} on which both agree; left out by balance "
        f"{r['left_out_by_balance']}",
        "",
    ]

    # Confusion matrix: rows are the rule's decisions, columns the judge's.
    lines.append(f"{'rule / judge':<14}" + "".join(f"{name:>11}" for name in DECISIONS.values()))
    for name, row in r["confusion"].items():
        lines.append(f"{name:<14}" + "".join(f"{row[other]:>11}" for other in DECISIONS.values()))

    # Groups, and the comparison with given labels.
    lines += _format_breakdown("source", r["sources"])
    lines += _format_breakdown("model", r["models"])
    if r["given_labels"]:
        lines += ["", f"{'given labels':<14}{'decided':>11}{'accuracy':>11}{'precision':>11}{'recall':>11}"]
        for name, x in r["given_labels"].items():
            figures = "".join(f"{_format_number(x[f]):>11}" for f in ("accuracy", "precision", "recall"))
            lines.append(f"{name:<14}{x['decided']:>11}{figures}")
    return "\n".join([*lines, ""])


def _format_breakdown(title: str, rows: Mapping[str, Row]) -> list[str]:
    """Format a table with one row per source or model; returns its lines."""
    width = max([12, *(len(name) for name in rows)])
    header = ("judged", "both", "agreed", "kappa", "labelled", "correct", "share")
    fields = ("judged", "both_decided", "agreed", "kappa", "labelled", "correct")
    lines = ["", f"{title:<{width}}" + "".join(f"{name:>10}" for name in header)]
    for name, x in rows.items():
        figures = "".join(f"{_format_number(x[field]):>10}" for field in fields)
        lines.append(f"{name or '(unknown)':<{width}}{figures}{x['share']:>10.1%}")
    return lines


def _format_number(x: float) -> str:
    """Format a count as it is, a float with three digits, and NaN as "-"."""
    if isinstance(x, int):
        return str(x)
    return "-" if np.isnan(x) else f"{x:.3f}"


def _format_interval(x: Mapping[str, float]) -> str:
    """Format a value with its interval: `value [low, high]`."""
    return f"{_format_number(x['value'])} [{_format_number(x['low'])}, {_format_number(x['high'])}]"


def _format_counts(counts: Mapping[str, int]) -> str:
    """Format the sum of counts and, in brackets, its parts."""
    total = str(sum(counts.values()))
    if not counts:
        return total
    parts = ", ".join(f"{name} {n}" for name, n in counts.items())
    return f"{total} ({parts})"
