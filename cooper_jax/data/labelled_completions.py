"""Labelled completions: what a reward model is trained and measured on.

Two shapes, recognised by their fields, of JSON lines or parquet, here or at an address (gs://...):

    ours         question, reference_answer, completion, label; id, source and model where there are any
    VerifyBench  question, answer, completion, gold_correct; answer_type, answer_subtype

Questions and references are cleaned as `problems.load_problems` cleans them, so that the reward model reads one style in
training, in measurement and in the loop; completions are left as they are.  Other fields are ignored.
"""

from __future__ import annotations

from typing import Any

from cooper_jax.data import answers, row_reader
from cooper_jax.data.row_reader import Row
from cooper_jax.types import Triple

_SHAPES = {  # of a field's meaning: its name in our shape, and in VerifyBench's
    "reference": ("reference_answer", "answer"),
    "label": ("label", "gold_correct"),
}


def load_labelled_completions(path: str) -> list[Triple]:
    """All rows of a file, in its order.

    Raises ValueError that names file, line and field, FileNotFoundError for a missing file, and OSError for an
    address that cannot be reached.
    """
    triples = []
    for where, id, row in row_reader.read_file_rows(path):
        try:
            triples.append(_triple(row, id))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not triples:
        raise ValueError(f"{path}: there is no row in it")
    return triples


def _triple(row: Row, id: str) -> Triple:
    shape = int("gold_correct" in row and "label" not in row)
    reference_key, label_key = (names[shape] for names in _SHAPES.values())
    question = answers.clean_question(row_reader.get_text(row, "question"))
    reference = answers.clean_reference(row_reader.get_text(row, reference_key))
    if not question or not reference:
        raise ValueError(f"the {reference_key if question else 'question'} is empty")
    label = row_reader.get_field(row, label_key)
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise ValueError(f"field {label_key!r} is {label!r}: must be 0 or 1")
    kinds = (_optional(row, "answer_type"), _optional(row, "answer_subtype"))
    return Triple(
        question=question,
        reference=reference,
        completion=row_reader.get_text(row, "completion"),
        label=float(label),
        id=_optional(row, "id") or id,
        source=_optional(row, "source"),
        model=_optional(row, "model"),
        kind="/".join(k for k in kinds if k),
    )


def _optional(row: Row, key: str) -> str:
    value: Any = row.get(key)
    return "" if value is None else str(value)
