"""Judges compared on labelled completions: the reward model, the rule, a language model and baselines.

1. `LabelledRows.load` reads labelled rows (data/labelled_completions.py: ours, VerifyBench's and
   VerifierBench's) and leaves out those with questions from the reward model's training data.  The judges
   read one of three kinds of references:

       own       the question's own reference
       none      an empty text, so that an LLM judge has to solve the question (VerifyBench's mode without
                 references)
       shuffled  another question's reference, so that a judge that uses it must reject correct completions

2. `judge_rows` asks every judge, a chunk of rows at a time, and writes the opinions into the ledger.
3. `summarise_judges` computes figures with 95 % intervals bootstrapped by question, and paired differences
   between judges, for all rows, by source, kind, model and class, and by whether the rule decides.
   (published_benchmarks.py computes the figures that the authors of a published benchmark report.)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax.data import labelled_completions, seen_questions
from cooper_jax.data.answer_forms import normalise_answer
from cooper_jax.evaluation.benchmark_sets import sample_part
from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.evaluation.judges import Judge, Opinion
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.resampling import FIGURES, Resamples, compute_interval
from cooper_jax.runtime import hosts, keys
from cooper_jax.types import Triple

REFERENCES = ("own", "none", "shuffled")
CHUNK = 4  # a chunk has this many labelled rows per problem of benchmark.chunk
COMPARED = ("accuracy", "balanced_accuracy", "auroc")  # figures whose differences are shown


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Labelled rows as the judges read them."""

    triples: tuple[Triple, ...]
    total: int  # rows of the chosen part
    seen: int  # those with questions from the reward model's training data, left out or not
    benchmark: str = ""  # the published benchmark whose format the file has, if it has one

    @classmethod
    def load(
        cls, path: str, *, references: str, seen: frozenset[str], exclude: bool, count: int, seed: int
    ) -> LabelledRows:
        """Read a file.

        Args:
          references: one of REFERENCES.
          seen: fingerprints of the questions in the reward model's training data.
          exclude: leave rows with such questions out.
          count: size of the fixed part that is read; 0: all.
          seed: of the shuffled references.

        Raises ValueError and OSError, naming file, line and field.
        """
        # The part is chosen first, so it is the same for every reward model.
        triples, benchmark = labelled_completions.load_labelled_file(path)
        triples = [triples[i] for i in sample_part(len(triples), count)]
        kept, known = seen_questions.split_by_seen(triples, seen)
        remaining = kept if exclude else triples
        if not remaining:
            raise ValueError(
                f"{path}: the reward model was trained on the questions of all {len(triples)} rows: give "
                "others, or measure on them with --config.benchmark.exclude_seen=False"
            )
        replaced = tuple(replace_references(remaining, references, seed))
        return cls(replaced, len(triples), len(known), benchmark)


def replace_references(triples: Sequence[Triple], mode: str, seed: int) -> list[Triple]:
    """Replace the references of triples.

    Args:
      mode: one of REFERENCES.
      seed: of the shuffled order.

    Raises ValueError for shuffled references if all questions have the same answer.
    """
    if mode == "own":
        return list(triples)
    if mode == "none":
        return [dataclasses.replace(t, reference="") for t in triples]

    # References are compared by normal form: 0.5 is no wrong reference for 1/2.
    references = {t.question: t.reference for t in triples}
    forms = {question: normalise_answer(reference) for question, reference in references.items()}
    if len(set(forms.values())) < 2:
        raise ValueError("all rows have the same reference: there is no other one to replace it with")

    # The questions are put in a random cyclic order; each gets the next reference with a different answer.
    draws = keys.make_generator(seed, "references").bit_generator.random_raw(len(references))
    questions = list(references)
    cycle = [questions[i] for i in np.argsort(draws, kind="stable")]
    replacements = {}
    for i, question in enumerate(cycle):
        # The search ends, since there are at least two different answers.
        others = (cycle[(i + step) % len(cycle)] for step in range(1, len(cycle)))
        different = next(other for other in others if forms[other] != forms[question])
        replacements[question] = references[different]
    return [dataclasses.replace(t, reference=replacements[t.question]) for t in triples]


# --- 2. judging ---------------------------------------------------------------------------------------------


def split_rows(count: int, size: int) -> list[range]:
    """Split the indices of `count` rows into chunks of `size`; the last one may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def judge_rows(
    rows: LabelledRows,
    judges: Mapping[str, Judge],
    ledger: Ledger,
    size: int,
    print_line: Callable[[str], Any],
) -> None:
    """Judge all chunks that are not in the ledger yet.

    Args:
      judges: by name.
      ledger: receives the rows of each finished chunk.
      size: rows in a chunk.
      print_line: called with a line of progress after each chunk.

    Raises hosts.Stopped after SIGTERM.
    """
    for places in split_rows(len(rows.triples), size)[ledger.done :]:
        hosts.raise_if_stopping()
        start = time.perf_counter()
        triples = rows.triples[places.start : places.stop]
        # The index of the first row seeds the replies of an LLM judge.
        opinions = {name: judge(triples, places.start) for name, judge in judges.items()}

        # Rows contain everything that the figures need, so that these can be computed again.
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
                "judges": {name: _format_opinion(by_judge[i]) for name, by_judge in opinions.items()},
            }
            judged.append(row | ({"label_class": t.label_class} if t.label_class else {}))

        seconds = time.perf_counter() - start
        ledger.append(judged, seconds)
        print_line(f"{places.stop}/{len(rows.triples)} rows  {len(triples) / seconds:.1f} rows/s")


def _format_opinion(opinion: Opinion) -> Row:
    """Convert an opinion to the form stored in a row, without empty texts."""
    texts = {"note": opinion.note, "reply": opinion.reply}
    row: Row = {"score": opinion.score, "yes": opinion.yes, "abstained": opinion.abstained}
    return row | {name: text for name, text in texts.items() if text}


# --- 3. figures ---------------------------------------------------------------------------------------------


def group_rows(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Collect each row's values, [N], of the fields by which figures are broken down.

    `type` is the first part of `kind`; it is left out if all kinds have one part.  `rule_decided`, yes or no, is
    there if the rule is among the judges: where it is yes, judges are compared at the rule's coverage.  A field
    with the same value in all rows is left out too.
    """
    fields = {}
    for name in ("source", "kind", "model"):
        fields[name] = np.array([row[name] for row in rows])
    # Most data sets have no classes, and their rows no such field.
    fields["label_class"] = np.array([row.get("label_class", "") for row in rows])
    fields["type"] = np.array([row["kind"].split("/")[0] for row in rows])
    if (fields["type"] == fields["kind"]).all():
        del fields["type"]
    if "rule" in rows[0]["judges"]:
        abstained = [row["judges"]["rule"]["abstained"] for row in rows]
        fields["rule_decided"] = np.where(abstained, "no", "yes")
    return {name: values for name, values in fields.items() if len(set(values)) > 1}


def summarise_judges(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Compute the figures of each judge, and the first judge's differences from the others.

    Args:
      rows: of the ledger.
      seed: of the bootstrap.
      resamples: R, the number of resamples behind each interval.

    In the result, `all` is over all rows; `by` is field -> value -> the same over the rows with that value.
    """
    summary: dict[str, Any] = {"all": _compute_figures(rows, seed, resamples), "by": {}}
    for field, values in group_rows(rows).items():
        groups = {}
        for value in sorted(set(values)):
            members = [row for row, v in zip(rows, values, strict=True) if v == value]
            groups[str(value)] = _compute_figures(members, seed, resamples)
        summary["by"][field] = groups
    return summary


def _compute_figures(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Compute the figures of some rows, with intervals."""
    bootstrap = Resamples([row["question"] for row in rows], seed, resamples)
    labels = np.array([row["label"] == 1 for row in rows])  # bool[N]
    figures: dict[str, dict[str, np.ndarray]] = {}  # judge -> figure -> f64[R + 1]
    judged: dict[str, dict[str, Any]] = {}  # judge -> figure -> interval or number

    # All judges share the resamples.
    for name in rows[0]["judges"]:
        opinions = [row["judges"][name] for row in rows]
        scores = np.array([opinion["score"] for opinion in opinions], float)  # f64[N]
        yes = np.array([opinion["yes"] for opinion in opinions])  # bool[N]
        figures[name] = bootstrap.figures(labels, yes, scores)
        judged[name] = {figure: compute_interval(values) for figure, values in figures[name].items()}
        judged[name] |= {
            "mean_score_of_right": compute_interval(bootstrap.mean(scores, labels)),
            "mean_score_of_wrong": compute_interval(bootstrap.mean(scores, ~labels)),
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
        "questions": bootstrap.groups,
        "right": float(labels.mean()),
        "judges": judged,
        "differences": differences,
    }


# Titles of the tables' columns.  A title with "95 %" shows the figure with its interval.
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
    """Format the tables for a terminal; figures are in percent.

    references: the kind of references that the judges read, one of REFERENCES.
    """
    # All rows.
    overall = summary["all"]
    header = [*_FIGURE_TITLES.values(), *_SCORE_TITLES]
    rows = [[name, *_format_judge(judged)] for name, judged in overall["judges"].items()]
    parts = [
        f"{overall['rows']} rows of {overall['questions']} questions, "
        f"{format_percent(overall['right'])} % right, references: {references}",
        format_table(["judge", *header], rows),
    ]

    # One table for each field.
    for field, groups in summary["by"].items():
        # There are many models: their figures are in results.json only.
        if field == "model":
            continue
        rows = []
        for value, group in groups.items():
            for name, judged in group["judges"].items():
                rows.append([value or "(none)", str(group["rows"]), name, *_format_judge(judged)])
        parts.append(format_table([field.replace("_", " "), "rows", "judge", *header], rows))

    # Differences over all rows, by source, and where the rule decides: there they are at the rule's coverage.
    groups = [("all", overall), *summary["by"].get("source", {}).items()]
    decided = summary["by"].get("rule_decided", {})
    groups += [(f"rule decided: {value}", group) for value, group in decided.items()]
    differences = _format_differences(groups)
    return "\n\n".join([*parts, differences] if differences else parts)


def _format_judge(judged: Mapping[str, Any]) -> list[str]:
    """Format the cells of one judge."""
    cells = []
    for name, title in _FIGURE_TITLES.items():
        cells.append(format_percent(judged[name] if "95 %" in title else judged[name].value))
    cells.append(format_percent(judged["abstained"]))
    return cells + [format_percent(judged[f"mean_score_of_{x}"].value) for x in ("right", "wrong")]


def _format_differences(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Format a table with one row per group and pair of judges; "" with one judge.

    groups: (title, figures) of each.
    """
    rows = []
    for value, group in groups:
        for pair, figures in group["differences"].items():
            rows.append([value or "(none)", pair, *(format_percent(figures[name]) for name in COMPARED)])
    return format_table(["rows of", "difference", "accuracy", "balanced", "AUROC"], rows) if rows else ""
