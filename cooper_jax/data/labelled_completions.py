"""Labelled completions: the rows on which a reward model is trained and evaluated.

Files are JSON lines, a JSON list or parquet, local or remote (gs://...).  The fields of a row show its format:

    ours           question, reference_answer, completion, label; optionally id, source and model
    VerifyBench    question, answer, completion, gold_correct; answer_type, answer_subtype, source,
                   completion_model, question_id, completion_id (arXiv 2505.15801; VerifyBench-Hard too)
    VerifierBench  question, gold_answer, llm_response, gold_judgment; data_source, domain, answer_type
                   (arXiv 2508.03686)

Questions and references are cleaned as in `problems.load_problems`, so that the reward model reads one style
in training, in evaluation and in RL.  Completions are not changed.  Other fields are ignored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cooper_jax.data import answers, row_reader
from cooper_jax.data.row_reader import Row
from cooper_jax.types import Triple

# Published benchmarks of verifiers.
VERIFYBENCH, VERIFIERBENCH = "VerifyBench", "VerifierBench"

# VerifierBench's judgments.  An invalid completion (cut off, repetitive, a refusal) is wrong.
CLASSES = {"A": "correct", "B": "incorrect", "C": "invalid"}


class LabelledFile(NamedTuple):
    """The rows of a file."""

    triples: list[Triple]  # in the file's order
    benchmark: str  # VERIFYBENCH or VERIFIERBENCH if all rows have its format, else ""


def load_labelled_completions(path: str) -> list[Triple]:
    """Load all rows of a file, in the file's order.  Raises what `load_labelled_file` raises."""
    return load_labelled_file(path).triples


def load_labelled_file(path: str) -> LabelledFile:
    """Load all rows of a file, and find the benchmark whose format they have.

    Raises ValueError with file, line and field for a malformed row and for a file without rows,
    FileNotFoundError for a missing file, and OSError for an address that cannot be reached.
    """
    triples = []
    formats = set()
    for location, id, row in row_reader.read_file_rows(path):
        format = _find_format(row)
        try:
            triples.append(_PARSERS[format](row, id))
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error
        formats.add(format)
    if not triples:
        raise ValueError(f"{path}: the file has no rows")
    return LabelledFile(triples, formats.pop() if len(formats) == 1 else "")


def _find_format(row: Row) -> str:
    """The benchmark whose format a row has; "" for our format."""
    # A row with the columns of two formats is in ours.
    if "label" in row:
        return ""
    if "gold_correct" in row:
        return VERIFYBENCH
    return VERIFIERBENCH if "gold_judgment" in row else ""


# --- parsers of one row: (row, the id of a row without one) -> Triple -----------------------------------------


def _parse_own_row(row: Row, id: str) -> Triple:
    """Read a row of our format."""
    reference = answers.clean_reference(row_reader.get_text(row, "reference_answer"))
    return Triple(
        question=_read_question(row),
        reference=_check_reference(reference, "reference_answer"),
        completion=row_reader.get_text(row, "completion"),
        label=_read_label(row, "label"),
        id=_get_optional(row, "id") or id,
        source=_get_optional(row, "source"),
        model=_get_optional(row, "model"),
        kind=_join_kinds(row, "answer_type", "answer_subtype"),
    )


def _parse_verifybench_row(row: Row, id: str) -> Triple:
    """Read a row of VerifyBench or VerifyBench-Hard."""
    # One question has several completions.
    ids = [_get_optional(row, key) for key in ("question_id", "completion_id")]
    published_id = _get_optional(row, "unique_id") or "/".join(x for x in ids if x)
    return Triple(
        question=_read_question(row),
        reference=_read_published_reference(row, "answer"),
        completion=row_reader.get_text(row, "completion"),
        label=_read_label(row, "gold_correct"),
        id=_get_optional(row, "id") or published_id or id,
        source=_get_optional(row, "source") or _get_optional(row, "data_source"),
        model=_get_optional(row, "completion_model") or _get_optional(row, "model"),
        kind=_join_kinds(row, "answer_type", "answer_subtype"),
    )


def _parse_verifierbench_row(row: Row, id: str) -> Triple:
    """Read a row of VerifierBench."""
    judgment = row_reader.get_text(row, "gold_judgment").strip().upper()
    if judgment not in CLASSES:
        names = ", ".join(f"{letter} ({name})" for letter, name in CLASSES.items())
        raise ValueError(f"field 'gold_judgment' is {row['gold_judgment']!r}: it must be one of {names}")
    return Triple(
        question=_read_question(row),
        reference=_read_published_reference(row, "gold_answer"),
        completion=row_reader.get_text(row, "llm_response"),
        label=float(CLASSES[judgment] == "correct"),
        id=_get_optional(row, "id") or id,
        source=_get_optional(row, "data_source"),
        kind=_join_kinds(row, "domain", "answer_type"),
        label_class=CLASSES[judgment],
    )


_PARSERS = {"": _parse_own_row, VERIFYBENCH: _parse_verifybench_row, VERIFIERBENCH: _parse_verifierbench_row}


# --- fields ---------------------------------------------------------------------------------------------------


def _read_question(row: Row) -> str:
    """Read and clean the question.  Raises ValueError where it is empty: there is nothing to judge by."""
    question = answers.clean_question(row_reader.get_text(row, "question"))
    if not question:
        raise ValueError("the question is empty")
    return question


def _check_reference(reference: str, key: str) -> str:
    """Raise ValueError for an empty reference: there is nothing to judge by."""
    if not reference:
        raise ValueError(f"the {key} is empty")
    return reference


def _read_published_reference(row: Row, key: str) -> str:
    """Read and clean the reference of a published benchmark."""
    # All published rows are measured: if cleaning leaves nothing, the text itself is the answer (a comma, say).
    text = row_reader.get_text(row, key)
    return _check_reference(answers.clean_reference(text) or text.strip(), key)


def _read_label(row: Row, key: str) -> float:
    """Read a label as 0.0 or 1.0."""
    # JSON booleans, or 0 and 1: soft labels are refused.
    label = row_reader.get_field(row, key)
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise ValueError(f"field {key!r} is {label!r}: it must be 0 or 1")
    return float(label)


def _join_kinds(row: Row, *keys: str) -> str:
    """Join the fields that are not empty, from general to special, as `general/special`."""
    kinds = [_get_optional(row, key) for key in keys]
    return "/".join(kind for kind in kinds if kind)


def _get_optional(row: Row, key: str) -> str:
    """A field as text; "" where it is missing or null."""
    value: Any = row.get(key)
    return "" if value is None else str(value)
