"""Annotation plan: the list of `Item`s, in a fixed order, made from problem sets and files of completions.

1. Problem sets (the formats of data/problems.py): the `source` model writes `annotate.samples` completions of
   each problem.  Samples of one problem are adjacent in the plan.
2. Existing completions: rows with question, reference_answer and completion, and optionally id, source, model
   and label, as JSON lines or parquet.  A given label does not influence the outcome; the report compares it
   with the outcome.
3. Every item has a stable id, a hash of its contents.  Rows that repeat an earlier one are dropped and
   counted.

Questions and references are cleaned as in data/problems.py and data/labelled_completions.py; completions are
kept as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.data import answers, data_sources, row_reader
from cooper_jax.data import problems as problem_sets
from cooper_jax.runtime import remote_files
from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Triple

BALANCES = ("off", "source", "overall")


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """Settings of an annotation: the config's section `annotate`."""

    # Sampling.
    problems: int  # the maximum number of problems of each problem set; 0: all
    samples: int  # completions per problem
    batch: int  # conversations that a local model answers together

    # Class balance of the labelled rows.
    balance: str  # off, source or overall: the groups within which classes are balanced
    max_ratio: float  # the larger class keeps at most max_ratio times as many rows as the smaller

    # Resuming.
    ask_again: bool  # repeat requests that failed in earlier starts

    def __post_init__(self) -> None:
        # All errors are collected, so that one start reports them together.
        errors = bounds.find_out_of_bounds(self, "annotate")
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> AnnotateConfig:
        """Read the section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "annotate")


@dataclasses.dataclass(frozen=True)
class Item:
    """One completion to label: an existing one, or one to be sampled (`completion` is None)."""

    id: str  # 20 hex digits

    # The problem.
    question: str
    reference: str
    source: str  # the problem set's name, or the `source` of a file's row
    problem: str  # id of the row that the question comes from
    sample: int = 0  # index among the samples of one problem
    messages: tuple[tuple[str, str], ...] = ()  # the prompt, if the problem set has it as messages

    # Only for an existing completion.
    completion: str | None = None
    model: str = ""  # the model that wrote it
    label: int | None = None  # the file's own label

    @property
    def number(self) -> int:
        """The id's leading 31 bits; they seed the item's sampling, which is independent of other items."""
        return int(self.id, 16) >> (4 * len(self.id) - 31)

    def make_triple(self, completion: str) -> Triple:
        """Combine the item with a completion into the triple that judges read."""
        return Triple(self.question, self.reference, completion)


@dataclasses.dataclass(frozen=True)
class AnnotationPlan:
    """All items of a command, in their order."""

    items: tuple[Item, ...]
    files: dict[str, str]  # file's name -> its size and hash, which detect a replaced file
    repeated: int  # rows dropped because they repeat an earlier row of the same file


def list_items(
    cfg: ConfigDict, settings: AnnotateConfig, problems: Sequence[str], completions: Sequence[str]
) -> AnnotationPlan:
    """Read the files of a command into a plan.

    Args:
      cfg: the whole config, of which `data` and `seed` are read.
      settings: its section `annotate`.
      problems: problem sets whose completions will be sampled.
      completions: files of existing completions.

    Raises SetupError that names file, line and field.
    """
    if not problems and not completions:
        raise SetupError(
            "there is nothing to annotate: give --problems=FILE, --completions=FILE, or several of them"
        )

    # An id is a hash that includes the file's stem, so two files with one stem could share ids.
    stems = [_get_stem(path) for path in (*problems, *completions)]
    for stem in stems:
        if stems.count(stem) > 1:
            raise SetupError(
                f"two of the files are called {stem!r}, and ids begin with that name: rename one of them"
            )

    # Problem sets come first, in the order of the command line.
    digests: dict[str, str] = {}
    items: list[Item] = []
    for path in problems:
        with setup_errors(f"--problems={path}"):
            files = data_sources.find_source(path, cfg.data.split).files
            digests[f"problems {_get_stem(path)}"] = _describe_contents([file.path for file in files])
            items += _plan_samples(cfg, settings, path)
    for path in completions:
        with setup_errors(f"--completions={path}"):
            local = remote_files.fetch_local(path)
            if not local.is_file():
                raise FileNotFoundError(f"{path}: there is no such file")
            digests[f"completions {_get_stem(path)}"] = _describe_contents([local])
            items += _read_completions(path)

    # The dict is filled from the end, so it keeps the first item of each id.
    unique = {item.id: item for item in reversed(items)}
    kept = tuple(item for item in items if unique.get(item.id) is item)
    return AnnotationPlan(kept, digests, repeated=len(items) - len(unique))


def _plan_samples(cfg: ConfigDict, settings: AnnotateConfig, path: str) -> list[Item]:
    """Make the items of a problem set, without completions."""
    columns = {name: cfg.data[name] for name in problem_sets.COLUMN_FIELDS}
    problems = problem_sets.load_problems(path, "auto", split=cfg.data.split, **columns)

    # A subset is drawn by the seed and then put back into the order of the file.
    if 0 < settings.problems < len(problems):
        chosen = [
            problem_sets.problem_at(i, len(problems), cfg.seed, "source") for i in range(settings.problems)
        ]
        problems = [problems[index] for index in sorted(chosen)]

    # The id includes the problem's texts: after a change in the file, old completions do not match its items.
    stem = _get_stem(path)
    items = []
    for problem in problems:
        for sample in range(settings.samples):
            prompt = [text for message in problem.messages for text in message]
            texts = (problem.id, problem.question, problem.reference, str(sample), *prompt)
            id = _make_id("sampled", stem, *texts)
            items.append(
                Item(
                    id,
                    problem.question,
                    problem.reference,
                    stem,
                    problem.id,
                    sample,
                    messages=problem.messages,
                )
            )
    return items


def _read_completions(path: str) -> list[Item]:
    """Make the items of a file of existing completions."""
    items = []
    for where, id, row in row_reader.read_file_rows(path):
        try:
            items.append(_read_row(row, id, _get_stem(path)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not items:
        raise ValueError("there is no row in it")
    return items


def _read_row(row: row_reader.Row, row_id: str, stem: str) -> Item:
    """Make the item of a row.

    Args:
      row_id: the reader's id, for rows without an `id`.
      stem: the file's, which is the source of rows without a `source`.
    """
    # Required fields.
    question = answers.clean_question(row_reader.get_text(row, "question"))
    reference = answers.clean_reference(row_reader.get_text(row, "reference_answer"))
    if not question or not reference:
        raise ValueError(f"the {'reference_answer' if question else 'question'} is empty")

    # Optional fields.
    label: Any = row.get("label")
    if label is not None and (not isinstance(label, (bool, int, float)) or label not in (0, 1)):
        raise ValueError(f"field 'label' is {label!r}: must be 0, 1 or absent")

    optional = {key: str(row[key]) for key in ("id", "source", "model") if row.get(key) not in (None, "")}
    source, model = optional.get("source", ""), optional.get("model", "")
    completion = row_reader.get_text(row, "completion")
    return Item(
        id=_make_id("file", stem, source, model, question, reference, completion),
        question=question,
        reference=reference,
        source=source or stem,
        problem=optional.get("id", row_id),
        completion=completion,
        model=model,
        label=None if label is None else int(label),
    )


def _make_id(*parts: str) -> str:
    """Hash the parts into 20 hex digits.

    The length of each part is hashed too, so that moving text between parts changes the id.
    """
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def _get_stem(path: str) -> str:
    """Get a file's name without folder and suffixes: gsm8k_train for .../gsm8k_train.jsonl.gz."""
    name = path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gz")
    return name.rsplit(".", 1)[0]


def _describe_contents(paths: Sequence[Path]) -> str:
    """Describe the files of one source by their size and hash."""
    digest, size = hashlib.sha256(), 0
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    return f"{size} bytes, sha256 {digest.hexdigest()[:16]}"
