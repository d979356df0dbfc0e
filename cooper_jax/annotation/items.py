"""What is to be annotated: problem sets and files of completions in, a list of `Item`s in a fixed order out.

1. Problems of each set (the formats of data/problems.py), `annotate.samples` completions each, to be written by
   the `source` model: samples of one problem stand together.
2. Completions that exist already: rows of question, reference_answer, completion, and where there are any id,
   source, model and label, in JSON lines or parquet.  A label is no input: the report says how far the outcome
   agrees with it.
3. Every item has a stable id, a hash of what it is; what a file holds twice is one item, and counted.

Questions and references are cleaned as data/problems.py and data/labelled_completions.py clean them; completions stay as they
are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.data import answers, row_reader
from cooper_jax.data import problems as problem_sets
from cooper_jax.runtime import remote_files
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Triple


@dataclasses.dataclass(frozen=True)
class Item:
    """A completion that is there, or is to be sampled (`completion` is None)."""

    id: str
    question: str
    reference: str
    source: str  # the problem set, or what the row of a file says
    problem: str  # the row that it comes from
    sample: int = 0
    completion: str | None = None
    model: str = ""  # of a file's row
    label: int | None = None  # a file's own

    @property
    def number(self) -> int:
        """31 bits of the id, which decide its random bits: they do not depend on the other items."""
        return int(self.id, 16) >> (4 * len(self.id) - 31)

    def triple(self, completion: str) -> Triple:
        return Triple(self.question, self.reference, completion)


@dataclasses.dataclass(frozen=True)
class AnnotationPlan:
    items: tuple[Item, ...]
    files: dict[str, str]  # each file's name -> its size and hash, so that another one is noticed
    repeated: int  # rows of completion files that were there already


def list_items(cfg: ConfigDict, problems: Sequence[str], completions: Sequence[str]) -> AnnotationPlan:
    """The items of a command.  Raises SetupError that names file, line and field."""
    if not problems and not completions:
        raise SetupError(
            "there is nothing to annotate: give --problems=FILE, --completions=FILE, or several of them"
        )
    stems = [_stem(path) for path in (*problems, *completions)]
    for stem in stems:
        if stems.count(stem) > 1:
            raise SetupError(
                f"two of the files are called {stem!r}, and ids begin with that name: rename one of them"
            )
    known, items, repeated = {}, [], 0
    for path in problems:
        with setup_errors(f"--problems={path}"):
            known[f"problems {_stem(path)}"] = _digest(path)
            items += _sampled(cfg, path)
    for path in completions:
        with setup_errors(f"--completions={path}"):
            known[f"completions {_stem(path)}"] = _digest(path)
            items += _existing(path)
    unique = {item.id: item for item in reversed(items)}  # the first of its kind stays
    repeated = len(items) - len(unique)
    return AnnotationPlan(tuple(item for item in items if unique.get(item.id) is item), known, repeated)


def _sampled(cfg: ConfigDict, path: str) -> list[Item]:
    d, a, stem = cfg.data, cfg.annotate, _stem(path)
    columns = {name: d[name] for name in ("question_key", "reference_key", "solution_key", "tfds_dir")}
    found = problem_sets.load_problems(path, "auto", split=d.split, **columns)
    if 0 < a.problems < len(found):
        places = (problem_sets.problem_at(i, len(found), cfg.seed, "source") for i in range(a.problems))
        found = [found[place] for place in sorted(places)]
    return [
        Item(_id("sampled", stem, p.id, p.question, p.reference, str(n)), p.question, p.reference, stem, p.id, n)
        for p in found
        for n in range(a.samples)
    ]  # fmt: skip


def _existing(path: str) -> list[Item]:
    items = []
    for where, id, row in row_reader.read_file_rows(path):
        try:
            items.append(_row(row, id, _stem(path)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not items:
        raise ValueError("there is no row in it")
    return items


def _row(row: row_reader.Row, id: str, stem: str) -> Item:
    question = answers.clean_question(row_reader.get_text(row, "question"))
    reference = answers.clean_reference(row_reader.get_text(row, "reference_answer"))
    if not question or not reference:
        raise ValueError(f"the {'reference_answer' if question else 'question'} is empty")
    label: Any = row.get("label")
    if label is not None and (not isinstance(label, (bool, int, float)) or label not in (0, 1)):
        raise ValueError(f"field 'label' is {label!r}: must be 0, 1 or absent")
    said = {key: str(row[key]) for key in ("id", "source", "model") if row.get(key) not in (None, "")}
    completion = row_reader.get_text(row, "completion")
    source, model = (said[key] if key in said else "" for key in ("source", "model"))
    return Item(
        id=_id("file", stem, source, model, question, reference, completion),
        question=question,
        reference=reference,
        source=source or stem,
        problem=said["id"] if "id" in said else id,
        completion=completion,
        model=model,
        label=None if label is None else int(label),
    )


def _id(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def _stem(path: str) -> str:
    """gsm8k_train of .../gsm8k_train.jsonl.gz"""
    name = path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gz")
    return name.rsplit(".", 1)[0]


def _digest(path: str) -> str:
    place: Path = remote_files.fetch_local(path)
    if not place.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with open(place, "rb") as file:
        return f"{place.stat().st_size} bytes, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
