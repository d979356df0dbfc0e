"""Judges compared on labelled completions: the reward model, the rule, a language model and baselines.

1. `LabelledRows.load` reads labelled rows (data/labelled_completions.py: ours and VerifyBench's) and leaves
   out those with questions from the reward model's training data.  It gives the judges one of three kinds of
   references:

       own       each question's own
       none      an empty text, with which an LLM judge solves the question (VerifyBench's mode without
                 references)
       shuffled  another question's, so that a judge that reads the reference must reject correct completions

2. `judge_rows` asks every judge, a chunk of rows at a time, and writes the opinions into the ledger.
3. `summarise_judges` computes figures with 95 % intervals bootstrapped by question, for all rows and by
   source, kind and model, and paired differences between judges.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax.data import labelled_completions, seen_questions
from cooper_jax.evaluation.answer_forms import normalise_answer
from cooper_jax.evaluation.benchmark_sets import sample_part
from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.evaluation.judges import Judge, Opinion
from cooper_jax.evaluation.resampling import FIGURES, Resamples, compute_interval
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.runtime import hosts, keys
from cooper_jax.types import Triple

REFERENCES = ("own", "none", "shuffled")
CHUNK = 4  # labelled rows in a chunk, for each problem of benchmark.chunk
COMPARED = ("accuracy", "balanced_accuracy", "auroc")  # figures whose differences are shown


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Labelled rows as the judges read them."""

    triples: tuple[Triple, ...]
    total: int  # rows of the part that was asked for
    seen: int  # of these, rows with questions from the reward model's training data, left out or not

    @classmethod
    def load(
        cls, path: str, *, references: str, seen: frozenset[str], exclude: bool, count: int, seed: int
    ) -> LabelledRows:
        """Read a file.

        Args:
          references: one of REFERENCES.
          seen: fingerprints of the questions in the reward model's training data.
          exclude: leave rows with such questions out.
          count: rows of a fixed part; 0: all.
          seed: for shuffled references.

        Raises ValueError and OSError, naming file, line and field.
        """
        triples = labelled_completions.load_labelled_completions(path)
        triples = [triples[i] for i in sample_part(len(triples), count)]
        kept, known = seen_questions.split_by_seen(triples, seen)
        remaining = kept if exclude else triples
        if not remaining:
            raise ValueError(
                f"{path}: the reward model was trained on the questions of all {len(triples)} rows: give "
                "others, or measure on them with --config.benchmark.exclude_seen=False"
            )
        return cls(tuple(replace_references(remaining, references, seed)), len(triples), len(known))


def replace_references(triples: Sequence[Triple], mode: str, seed: int) -> list[Triple]:
    """The triples with the references of a mode, one of REFERENCES.

    Raises ValueError if all questions have one answer, so that there is no other to give.
    """
    if mode == "own":
        return list(triples)
    if mode == "none":
        return [dataclasses.replace(t, reference="") for t in triples]

    references = {t.question: t.reference for t in triples}
    forms = {question: normalise_answer(reference) for question, reference in references.items()}
    if len(set(forms.values())) < 2:
        raise ValueError("all rows have one reference: there is none to exchange it for")

    # Questions stand in a random circle; each takes the next reference that is a different answer.
    draws = keys.make_generator(seed, "references").bit_generator.random_raw(len(references))
    questions = list(references)
    circle = [questions[i] for i in np.argsort(draws, kind="stable")]
    given = {}
    for i, question in enumerate(circle):
        others = (circle[(i + step) % len(circle)] for step in range(1, len(circle)))
        given[question] = references[next(other for other in others if forms[other] != forms[question])]
    return [dataclasses.replace(t, reference=given[t.question]) for t in triples]


# --- 2. judging ---------------------------------------------------------------------------------------------


def split_rows(count: int, size: int) -> list[range]:
    """Indices of `count` rows in chunks of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def judge_rows(
    rows: LabelledRows,
    judges: Mapping[str, Judge],
    ledger: Ledger,
    size: int,
    print_line: Callable[[str], Any],
) -> None:
    """Judge all chunks that the ledger does not hold yet.

    Args:
      size: rows in a chunk.
      print_line: called with a line of progress after each chunk.

    Raises hosts.Stopped after SIGTERM.
    """
    for places in split_rows(len(rows.triples), size)[ledger.done :]:
        hosts.raise_if_stopping()
        start = time.perf_counter()
        triples = rows.triples[places.start : places.stop]
        opinions = {name: judge(triples, places.start) for name, judge in judges.items()}

        judged: list[Row] = []
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
                "judges": {name: _format_opinion(own[i]) for name, own in opinions.items()},
            }
            judged.append(row)

        seconds = time.perf_counter() - start
        ledger.append(judged, seconds)
        print_line(f"{places.stop}/{len(rows.triples)} rows  {len(triples) / seconds:.1f} rows/s")


def _format_opinion(opinion: Opinion) -> Row:
    """An opinion as a row holds it, without empty texts."""
    texts = {"note": opinion.note, "reply": opinion.reply}
    row: Row = {"score": opinion.score, "yes": opinion.yes, "abstained": opinion.abstained}
    return row | {name: text for name, text in texts.items() if text}


# --- 3. figures ---------------------------------------------------------------------------------------------


def group_rows(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Fields by which figures are broken down -> each row's value; a field with one value is left out.

    `type` is the first part of `kind`, where kinds have several parts.
    """
    fields = {name: np.array([row[name] for row in rows]) for name in ("source", "kind", "model")}
    fields["type"] = np.array([row["kind"].split("/")[0] for row in rows])
    if (fields["type"] == fields["kind"]).all():
        del fields["type"]
    return {name: values for name, values in fields.items() if len(set(values)) > 1}


def summarise_judges(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Figures by judge, and the first judge's differences to the others.

    `all` is over all rows; `by` is field -> value -> the same over the rows with that value.
    """
    summary: dict[str, Any] = {"all": _compute_figures(rows, seed, resamples), "by": {}}
    for field, values in group_rows(rows).items():
        groups = {}
        for value in sorted(set(values)):
            own = [row for row, v in zip(rows, values, strict=True) if v == value]
            groups[str(value)] = _compute_figures(own, seed, resamples)
        summary["by"][field] = groups
    return summary


def _compute_figures(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Figures of some rows, with intervals."""
    drawn = Resamples([row["question"] for row in rows], seed, resamples)
    labels = np.array([row["label"] == 1 for row in rows])  # bool[N]
    figures: dict[str, dict[str, np.ndarray]] = {}  # judge -> figure -> f64[R + 1]
    judged: dict[str, dict[str, Any]] = {}
    for name in rows[0]["judges"]:
        opinions = [row["judges"][name] for row in rows]
        scores = np.array([opinion["score"] for opinion in opinions], float)  # f64[N]
        yes = np.array([opinion["yes"] for opinion in opinions])  # bool[N]
        figures[name] = drawn.figures(labels, yes, scores)
        judged[name] = {figure: compute_interval(values) for figure, values in figures[name].items()}
        judged[name] |= {
            "mean_score_of_right": compute_interval(drawn.mean(scores, labels)),
            "mean_score_of_wrong": compute_interval(drawn.mean(scores, ~labels)),
            "abstained": float(np.mean([opinion["abstained"] for opinion in opinions])),
        }

    # Differences are taken within each resample (paired bootstrap).
    first, *others = figures
    differences = {}
    for other in others:
        differences[f"{first} - {other}"] = {
            figure: compute_interval(figures[first][figure] - figures[other][figure]) for figure in FIGURES
        }
    return {
        "rows": len(rows),
        "questions": drawn.groups,
        "right": float(labels.mean()),
        "judges": judged,
        "differences": differences,
    }


_FIGURE_TITLES = {
    "accuracy": "accuracy % (95 %)",
    "balanced_accuracy": "balanced (95 %)",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "auroc": "AUROC (95 %)",
}
_SCORE_TITLES = ("abstained", "score of right", "score of wrong")


def format_judges(summary: Mapping[str, Any], references: str) -> str:
    """The tables for a terminal; figures in percent.  references: those that the judges read."""
    overall = summary["all"]
    header = [*_FIGURE_TITLES.values(), *_SCORE_TITLES]
    rows = [[name, *_format_judge(judged)] for name, judged in overall["judges"].items()]
    parts = [
        f"{overall['rows']} rows of {overall['questions']} questions, "
        f"{format_percent(overall['right'])} % right, references: {references}",
        format_table(["judge", *header], rows),
    ]
    for field, groups in summary["by"].items():
        # There are many models; their figures are in results.json only.
        if field == "model":
            continue
        rows = []
        for value, group in groups.items():
            for name, judged in group["judges"].items():
                rows.append([value or "(none)", str(group["rows"]), name, *_format_judge(judged)])
        parts.append(format_table([field, "rows", "judge", *header], rows))

    groups = [("all", overall), *summary["by"].get("source", {}).items()]
    differences = _format_differences(groups)
    return "\n\n".join([*parts, differences] if differences else parts)


def _format_judge(judged: Mapping[str, Any]) -> list[str]:
    """Cells of one judge; figures whose title names 95 % come with their interval."""
    cells = []
    for name, title in _FIGURE_TITLES.items():
        cells.append(format_percent(judged[name] if "95 %" in title else judged[name].value))
    cells.append(format_percent(judged["abstained"]))
    return cells + [format_percent(judged[f"mean_score_of_{x}"].value) for x in ("right", "wrong")]


def _format_differences(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """One row per group and pair of judges; "" with one judge.  groups: (title, figures)."""
    rows = []
    for value, group in groups:
        for pair, figures in group["differences"].items():
            rows.append([value or "(none)", pair, *(format_percent(figures[name]) for name in COMPARED)])
    return format_table(["rows of", "difference", "accuracy", "balanced", "AUROC"], rows) if rows else ""
