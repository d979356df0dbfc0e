"""Judges of answers on labelled completions: the reward model beside the rule, a language model and baselines.

1. `Rows.load` reads labelled rows (data/labelled_completions.py: ours and VerifyBench's), leaves out those whose questions
   the judging reward model was trained on, and treats the references as asked: `own`; `none`, where an empty text
   stands in the reference's place, and an LLM judge solves the question (VerifyBench's mode without references);
   `shuffled`, where every question gets another question's, so that a judge that reads the reference must say no
   to what was right.
2. `judge` asks every judge, a chunk of rows at a time, into the ledger.
3. `summarise` makes figures with 95 % intervals resampled by question: of all rows, by source, kind and model; and
   paired differences between judges.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cooper_jax.data import labelled_completions, seen_questions
from cooper_jax.evaluation.answer_forms import normalise_answer
from cooper_jax.evaluation.benchmark_sets import sample_part
from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.evaluation.judges import Judge
from cooper_jax.evaluation.resampling import FIGURES, Resamples, interval_of
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.runtime import hosts, keys
from cooper_jax.types import Triple

REFERENCES = ("own", "none", "shuffled")
CHUNK = 4  # labelled rows in a chunk, for each problem of benchmark.chunk
COMPARED = ("accuracy", "balanced_accuracy", "auroc")  # figures whose differences are shown


@dataclasses.dataclass(frozen=True)
class Rows:
    """Labelled rows as the judges are to read them."""

    triples: tuple[Triple, ...]
    total: int  # rows of the part that was asked for
    seen: int  # of them with questions that the reward model was trained on, whether left out or not

    @classmethod
    def load(
        cls, path: str, *, references: str, seen: frozenset[str], exclude: bool, count: int, seed: int
    ) -> Rows:
        """count: of the rows, a fixed part; 0: all.  Raises ValueError and OSError, naming file, line and field."""
        triples = labelled_completions.load_labelled_completions(path)
        triples = [triples[i] for i in sample_part(len(triples), count)]
        kept, known = seen_questions.split_by_seen(triples, seen)
        taken = kept if exclude else triples
        if not taken:
            raise ValueError(
                f"{path}: the reward model was trained on the questions of all {len(triples)} rows: give others, "
                "or measure on them with --config.benchmark.exclude_seen=False"
            )
        return cls(tuple(replace_references(taken, references, seed)), len(triples), len(known))


def replace_references(triples: Sequence[Triple], mode: str, seed: int) -> list[Triple]:
    """The triples with the references that `mode` asks for (see the module).

    Raises ValueError where all questions have one answer, so that none can be exchanged.
    """
    if mode == "own":
        return list(triples)
    if mode == "none":
        return [dataclasses.replace(t, reference="") for t in triples]
    of = {t.question: t.reference for t in triples}
    words = keys.make_generator(seed, "references").bit_generator.random_raw(len(of))
    questions = list(of)
    circle = [questions[i] for i in np.argsort(words, kind="stable")]
    forms = {q: normalise_answer(r) for q, r in of.items()}
    if len(set(forms.values())) < 2:
        raise ValueError("all rows have one reference: there is none to exchange it for")
    given = {}
    for i, question in enumerate(circle):
        others = (circle[(i + step) % len(circle)] for step in range(1, len(circle)))
        given[question] = of[next(other for other in others if forms[other] != forms[question])]
    return [dataclasses.replace(t, reference=given[t.question]) for t in triples]


# --- 2. judging ----------------------------------------------------------------------------------------------


def cut_rows(count: int, size: int) -> list[range]:
    """The rows in chunks."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def judge_rows(
    rows: Rows, judges: dict[str, Judge], ledger: Ledger, size: int, tell: Callable[[str], Any]
) -> None:
    """All that the ledger does not hold yet.  Raises hosts.Stopped after a SIGTERM."""
    work = cut_rows(len(rows.triples), size)
    for places in work[ledger.done :]:
        hosts.raise_if_stopping()
        start = time.perf_counter()
        triples = rows.triples[places.start : places.stop]
        said = {name: ask(triples, places.start) for name, ask in judges.items()}
        out: list[Row] = []
        for i, t in enumerate(triples):
            row: Row = {
                "id": t.id,
                "source": t.source,
                "kind": t.kind,
                "model": t.model,
                "question": t.question,
                "reference": t.reference,
                "completion": t.completion,
                "label": int(t.label),
                "judges": {},
            }
            for name, opinions in said.items():
                o = opinions[i]
                row["judges"][name] = {"score": o.score, "yes": o.yes, "abstained": o.abstained}
                row["judges"][name] |= {k: v for k, v in (("note", o.note), ("reply", o.reply)) if v}
            out.append(row)
        seconds = time.perf_counter() - start
        ledger.append(out, seconds)
        tell(f"{places.stop}/{len(rows.triples)} rows  {len(triples) / seconds:.1f} rows/s")


# --- 3. figures ----------------------------------------------------------------------------------------------


def group_rows(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """What the rows are broken down by, where they differ in it: a name -> each row's value."""
    by = {name: np.array([row[name] for row in rows]) for name in ("source", "kind", "model")}
    by["type"] = np.array([row["kind"].split("/")[0] for row in rows])
    if (by["type"] == by["kind"]).all():
        del by["type"]
    return {name: values for name, values in by.items() if len(set(values)) > 1}


def summarise_judges(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """`all` and, for each grouping and value, figures by judge and the first judge's differences to the others."""
    out: dict[str, Any] = {"all": _figures(rows, seed, resamples), "by": {}}
    for name, values in group_rows(rows).items():
        out["by"][name] = {
            str(value): _figures(
                [r for r, v in zip(rows, values, strict=True) if v == value], seed, resamples
            )
            for value in sorted(set(values))
        }
    return out


def _figures(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    drawn = Resamples([row["question"] for row in rows], seed, resamples)
    labels = np.array([row["label"] == 1 for row in rows])
    found, judged = {}, {}
    for name in rows[0]["judges"]:
        said = [row["judges"][name] for row in rows]
        scores = np.array([o["score"] for o in said], float)
        found[name] = drawn.figures(labels, np.array([o["yes"] for o in said]), scores)
        judged[name] = {figure: interval_of(x) for figure, x in found[name].items()}
        judged[name] |= {
            "mean_score_of_right": interval_of(drawn.mean(scores, labels)),
            "mean_score_of_wrong": interval_of(drawn.mean(scores, ~labels)),
            "abstained": float(np.mean([o["abstained"] for o in said])),
        }
    first, *others = found
    return {
        "rows": len(rows),
        "questions": drawn.groups,
        "right": float(labels.mean()),
        "judges": judged,
        "differences": {
            f"{first} - {other}": {f: interval_of(found[first][f] - found[other][f]) for f in FIGURES}
            for other in others
        },
    }


def format_judges(summary: dict[str, Any], references: str) -> str:
    """The tables of a terminal; figures in percent.  references: those that the judges were shown."""
    overall = summary["all"]
    names = ["accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc"]
    shown = ["accuracy % (95 %)", "balanced (95 %)", "precision", "recall", "F1", "AUROC (95 %)"]
    long = {"accuracy", "balanced_accuracy", "auroc"}
    scores = ["abstained", "score of right", "score of wrong"]

    def line(judged: dict[str, Any]) -> list[str]:
        cells = [format_percent(judged[n] if n in long else judged[n].value) for n in names]
        means = (judged[f"mean_score_of_{x}"].value for x in ("right", "wrong"))
        return [*cells, format_percent(judged["abstained"]), *(format_percent(x) for x in means)]

    parts = [
        f"{overall['rows']} rows of {overall['questions']} questions, {format_percent(overall['right'])} % right, "
        f"references: {references}",
        format_table(["judge", *shown, *scores], [[n, *line(j)] for n, j in overall["judges"].items()]),
    ]
    for by, values in summary["by"].items():
        if by == "model":  # many: they are in the results
            continue
        body = [
            [value or "(none)", str(g["rows"]), name, *line(judged)]
            for value, g in values.items()
            for name, judged in g["judges"].items()
        ]
        parts.append(format_table([by, "rows", "judge", *shown, *scores], body))
    pieces = [
        ("all", overall),
        *(x for by in ("source",) if by in summary["by"] for x in summary["by"][by].items()),
    ]
    body = [
        [value or "(none)", pair, *(format_percent(d[f]) for f in COMPARED)]
        for value, g in pieces
        for pair, d in g["differences"].items()
    ]
    if body:
        parts.append(format_table(["rows of", "difference", "accuracy", "balanced", "AUROC"], body))
    return "\n\n".join(parts)
