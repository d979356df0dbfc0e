"""What comes of a ledger: labelled rows, disputed rows, and a report.

1. `unique`: of items with the same question, reference and completion, but for white space, the first of the plan
   stays.
2. A row is labelled where the rule decided, the judge decided, and both say the same; otherwise it is disputed.
3. Labelled rows are balanced: of the larger class at most `annotate.max_ratio` times the smaller one stay, within
   each source or over all.  Which ones stay depends on the seed and on each row's id alone.
4. The report counts every item of the plan once, and gives agreement and Cohen's kappa (statistics.cohens_kappa) over the
   rows on which both decided, with intervals bootstrapped by question.

    rule     CORRECT -> 1;  WRONG, NO_ANSWER -> 0;  otherwise undecided
    judge    the verdict in its reply;  unparsed, cut off or failed: undecided
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cooper_jax import statistics
from cooper_jax.annotation.annotation_ledger import Ledger, Row, has_failed
from cooper_jax.annotation.items import AnnotationPlan, Item
from cooper_jax.runtime import keys
from cooper_jax.types import Verdict

BALANCES = ("off", "source", "overall")
SAID = {True: "correct", False: "wrong", None: "undecided"}
RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row with both verdicts; None is undecided."""

    row: Row  # its line of completions.jsonl, and that of verdicts.jsonl
    rule: bool | None
    judge: bool | None

    @property
    def both(self) -> bool:
        return self.rule is not None and self.judge is not None

    @property
    def label(self) -> bool | None:
        return self.rule if self.both and self.rule == self.judge else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    labelled: list[Row]
    disputed: list[Row]
    report: dict[str, Any]


def drop_repeats(items: Sequence[Item], completions: Mapping[str, Row]) -> list[Item]:
    """The items that have a completion, each question, reference and completion once."""
    seen, out = set(), []
    for item in items:
        row = completions[item.id]
        if has_failed(row):
            continue
        text = tuple(" ".join(x.split()) for x in (item.question, item.reference, row["completion"]))
        if text not in seen:
            seen.add(text)
            out.append(item)
    return out


def settle_outcome(cfg: ConfigDict, plan: AnnotationPlan, items: Sequence[Item], ledger: Ledger) -> Outcome:
    """What becomes of the items that were judged (`unique`), and the report on the whole plan."""
    completions, verdicts = ledger.completions.rows, ledger.verdicts.rows
    judged = [_judged(completions[item.id], verdicts[item.id]) for item in items]
    agreed = [x for x in judged if x.label is not None]
    kept = balance_classes(agreed, cfg.annotate.balance, cfg.annotate.max_ratio, cfg.seed)
    failures = Counter(completions[i.id]["failure"] for i in plan.items if has_failed(completions[i.id]))
    there = len(plan.items) - failures.total()
    report = {
        "planned": len(plan.items),
        "repeated_in_files": plan.repeated,
        "failed": dict(sorted(failures.items())),
        "completions": there,
        "truncated": sum(bool(x.row["truncated"]) for x in judged if "truncated" in x.row),
        "duplicates": there - len(judged),
        "judged": len(judged),
        "agreed": len(agreed),
        "disputed": _disputes(judged),
        "judge_undecided": dict(sorted(Counter(x.row["judge_reason"] for x in judged if x.judge is None).items())),
        "rule_undecided": dict(sorted(Counter(x.row["rule"] for x in judged if x.rule is None).items())),
        "left_out_by_balance": len(agreed) - len(kept),
        "labelled": len(kept),
        **judge_agreement(judged, cfg.seed),
        "confusion": confusion_table(judged),
        "sources": _shares(judged, kept, "source"),
        "models": _shares(judged, kept, "model"),
        "given_labels": compare_given_labels(judged),
    }  # fmt: skip
    stay = {x.row["id"] for x in kept}
    return Outcome(
        labelled=[_final(x) for x in agreed if x.row["id"] in stay],
        disputed=[_final(x) for x in judged if x.label is None],
        report=report,
    )


def _judged(completion: Row, verdict: Row) -> Judged:
    rule = Verdict(verdict["rule"])
    decided = rule == Verdict.CORRECT if rule.decidable else None
    return Judged(
        completion | {k: v for k, v in verdict.items() if k != "failure"}, decided, verdict["judge"]
    )


def _final(x: Judged) -> Row:
    """A line of labelled.jsonl (data/labelled_completions.py reads it) or, without a label, of disputed.jsonl."""
    label = {} if x.label is None else {"label": int(x.label), "labelled_by": "rule and judge"}
    first = ("id", "question", "reference_answer", "completion")
    return {k: x.row[k] for k in first} | label | {k: v for k, v in x.row.items() if k not in first}


# --- balance -------------------------------------------------------------------------------------------------


def balance_classes(agreed: Sequence[Judged], how: str, ratio: float, seed: int) -> list[Judged]:
    """The rows that stay (see the module); `how` is one of BALANCES."""
    if how == "off":
        return list(agreed)
    groups: dict[str, dict[bool, list[Judged]]] = {}
    for x in agreed:
        name = x.row["source"] if how == "source" else ""
        groups.setdefault(name, {True: [], False: []})[x.label].append(x)
    out = []
    for classes in groups.values():
        most = int(ratio * min(len(rows) for rows in classes.values()))
        for rows in classes.values():
            out += sorted(rows, key=lambda x: _rank(x, seed))[:most]
    return out


def _rank(x: Judged, seed: int) -> float:
    id = int(x.row["id"], 16)
    return float(keys.make_generator(seed, "balance", id >> 32 & 0xFFFFFFFF, id & 0xFFFFFFFF).random())


# --- the report ----------------------------------------------------------------------------------------------


def confusion_table(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """Rows by what the rule (outside) and the judge (inside) say."""
    counts = Counter((SAID[x.rule], SAID[x.judge]) for x in judged)
    return {a: {b: counts[a, b] for b in SAID.values()} for a in SAID.values()}


def judge_agreement(judged: Sequence[Judged], seed: int) -> dict[str, Any]:
    """How often the two say the same where both decided, and beyond chance."""
    both = [x for x in judged if x.both]
    rule, judge = (np.array([getattr(x, name) for x in both], bool) for name in ("rule", "judge"))
    questions = [x.row["question"] for x in both]
    out: dict[str, Any] = {"both_decided": len(both)}
    figures = {
        "agreement": lambda times: float(np.average(rule == judge, weights=times)) if len(both) else float("nan"),
        "kappa": lambda times: statistics.cohens_kappa(*(np.repeat(x, times.astype(int)) for x in (rule, judge))),
    }  # fmt: skip
    for name, figure in figures.items():
        rng = keys.make_generator(seed, "bootstrap", 0)
        out[name] = dataclasses.asdict(statistics.bootstrap_interval(figure, questions, rng, RESAMPLES))
    return out


def _disputes(judged: Sequence[Judged]) -> dict[str, int]:
    counts = Counter(
        "both decided, and differ" if x.both
        else "neither decided" if x.rule is x.judge
        else "rule undecided" if x.rule is None
        else "judge undecided"
        for x in judged if x.label is None
    )  # fmt: skip
    return dict(sorted(counts.items()))


def _shares(judged: Sequence[Judged], kept: Sequence[Judged], field: str) -> dict[str, Row]:
    """Of each source, or model: its rows, how the two agree there, and its part of what is labelled."""
    out = {}
    for name in sorted({x.row[field] for x in judged}):
        own, stay = ([x for x in rows if x.row[field] == name] for rows in (judged, kept))
        both = [x for x in own if x.both]
        out[name] = {
            "judged": len(own),
            "both_decided": len(both),
            "agreed": sum(x.label is not None for x in own),
            "kappa": statistics.cohens_kappa([x.rule for x in both], [x.judge for x in both]),
            "labelled": len(stay),
            "correct": sum(bool(x.label) for x in stay),
            "share": len(stay) / len(kept) if kept else 0.0,
        }
    return out


def compare_given_labels(judged: Sequence[Judged]) -> dict[str, Row]:
    """How far rule, judge and both together agree with the labels that files brought along; empty without any."""
    known = [x for x in judged if "given_label" in x.row]
    if not known:
        return {}
    out: dict[str, Row] = {}
    for name, says in (
        ("rule", lambda x: x.rule),
        ("judge", lambda x: x.judge),
        ("agreed", lambda x: x.label),
    ):
        decided = [x for x in known if says(x) is not None]
        labels = np.array([x.row["given_label"] for x in decided], bool)
        figures = statistics.classification_figures(labels, np.array([says(x) for x in decided], bool))
        out[name] = {"rows": len(known), "decided": len(decided), **figures}
    return out


def format_report(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    r = report
    agreement, kappa = (_interval(r[name]) for name in ("agreement", "kappa"))
    lines = [
        "",
        f"completions   {r['completions']} of {r['planned']}; failed {_counts(r['failed'])}; "
        f"cut off {r['truncated']}",
        f"duplicates    {r['duplicates']}, and {r['repeated_in_files']} rows within files",
        f"judged        {r['judged']}; both decided {r['both_decided']}; "
        f"rule undecided {_counts(r['rule_undecided'])}; judge undecided {_counts(r['judge_undecided'])}",
        f"agreement     {agreement}   Cohen's kappa {kappa}   (95 % by question)",
        f"disputed      {_counts(r['disputed'])}",
        f"labelled      {r['labelled']} of {r['agreed']} on which both agree; left out by balance "
        f"{r['left_out_by_balance']}",
        "",
        f"{'rule / judge':<14}" + "".join(f"{name:>11}" for name in SAID.values()),
    ]
    for name, row in r["confusion"].items():
        lines.append(f"{name:<14}" + "".join(f"{row[other]:>11}" for other in SAID.values()))
    head = ("judged", "both", "agreed", "kappa", "labelled", "correct", "share")
    for field in ("sources", "models"):
        wide = max([12, *(len(name) for name in r[field])])
        lines += ["", f"{field[:-1]:<{wide}}" + "".join(f"{h:>10}" for h in head)]
        for name, x in r[field].items():
            figures = (x["judged"], x["both_decided"], x["agreed"], x["kappa"], x["labelled"], x["correct"])
            lines.append(
                f"{name or '(not said)':<{wide}}" + "".join(f"{_number(f):>10}" for f in figures)
                + f"{x['share']:>10.1%}"
            )  # fmt: skip
    if r["given_labels"]:
        lines += ["", f"{'given labels':<14}{'decided':>11}{'accuracy':>11}{'precision':>11}{'recall':>11}"]
        for name, x in r["given_labels"].items():
            lines.append(
                f"{name:<14}{x['decided']:>11}"
                + "".join(f"{_number(x[f]):>11}" for f in ("accuracy", "precision", "recall"))
            )
    return "\n".join([*lines, ""])


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else "-" if np.isnan(x) else f"{x:.3f}"


def _interval(x: Mapping[str, float]) -> str:
    return f"{_number(x['value'])} [{_number(x['low'])}, {_number(x['high'])}]"


def _counts(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values())}" + (
        f" ({', '.join(f'{name} {n}' for name, n in counts.items())})" if counts else ""
    )
