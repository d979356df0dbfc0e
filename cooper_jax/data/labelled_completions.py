"""Labelled completions: the rows on which a reward model is trained and evaluated.

Files are JSON lines or parquet, local or remote (gs://...).  The fields of a row show its format:

    ours         question, reference_answer, completion, label; optionally id, source and model
    VerifyBench  question, answer, completion, gold_correct; answer_type, answer_subtype

Questions and references are cleaned as in `problems.load_problems`, so that the reward model reads one style
in training, in evaluation and in RL.  Completions are not changed.  Other fields are ignored.
"""

from __future__ import annotations

from typing import Any

from cooper_jax.data import answers, row_reader
from cooper_jax.data.row_reader import Row
from cooper_jax.types import Triple


def load_labelled_completions(path: str) -> list[Triple]:
    """Load all rows of a file, in the file's order.

    Raises ValueError with file, line and field for a malformed row and for a file without rows,
    FileNotFoundError for a missing file, and OSError for an address that cannot be reached.
    """
    triples = []
    for location, id, row in row_reader.read_file_rows(path):
        try:
            triples.append(_parse_row(row, id))
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error
    if not triples:
        raise ValueError(f"{path}: the file has no rows")
    return triples


def _parse_row(row: Row, id: str) -> Triple:
    """Read a row of either format as a Triple.  id: used where the row has no id."""
    # A row with both columns is in our format.
    is_verifybench = "gold_correct" in row and "label" not in row
    reference_key, label_key = "reference_answer", "label"
    if is_verifybench:
        reference_key, label_key = "answer", "gold_correct"

    # A row without a question or a reference gives the reward model nothing to judge by.
    question = answers.clean_question(row_reader.get_text(row, "question"))
    reference = answers.clean_reference(row_reader.get_text(row, reference_key))
    if not question or not reference:
        raise ValueError(f"the {reference_key if question else 'question'} is empty")

    # JSON booleans, or 0 and 1: soft labels are refused.
    label = row_reader.get_field(row, label_key)
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise ValueError(f"field {label_key!r} is {label!r}: it must be 0 or 1")

    # The kind of answer groups rows in tables of accuracy.
    kinds = (_get_optional(row, "answer_type"), _get_optional(row, "answer_subtype"))
    return Triple(
        question=question,
        reference=reference,
        completion=row_reader.get_text(row, "completion"),
        label=float(label),
        id=_get_optional(row, "id") or id,
        source=_get_optional(row, "source"),
        model=_get_optional(row, "model"),
        kind="/".join(k for k in kinds if k),
    )


def _get_optional(row: Row, key: str) -> str:
    """A field as text; "" where it is missing or null."""
    value: Any = row.get(key)
    return "" if value is None else str(value)
