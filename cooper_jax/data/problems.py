"""Problems with reference answers, from files and prepared data sets.

  1. data_sources.py finds the files of a source, and row_reader.py reads them row by row.
  2. The parser of the row's format makes a Problem of it.  The format is a published one, recognised by its
     columns (formats.py), or uses columns named in the config.  answers.py cleans question and reference.
  3. `drop_long_prompts` drops problems whose prompts are too long.
  4. `problem_at` gives the problem at a position of the data order.  The position is one global integer,
     which counts the prompts of a run: position p is in epoch p // size, and each epoch visits every problem
     once, in an order that is a function of (seed, epoch) alone.  A run that resumes on another number of
     hosts therefore skips and repeats no problem.  mixtures.py gives the order of several weighted sources.
  5. `fixed_random_order` chooses the part of a file on which an evaluation runs.

If a row has a subject or a level (`_SUBJECT_FIELDS`, `_LEVEL_FIELDS`), the Problem contains them.

A malformed row raises ValueError with its file, line and column; no row is skipped, except those that the
data set itself marks as having no final answer, which are counted.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cooper_jax.data import answers, chat_columns, data_sources, formats, row_reader
from cooper_jax.data.data_sources import DataSource
from cooper_jax.data.formats import FORMATS, ParsedRow
from cooper_jax.data.row_reader import LocatedRow, Row
from cooper_jax.runtime import keys
from cooper_jax.types import Problem

# Formats whose columns are named by the config.
NAMED = ("jsonl", "csv", "parquet", "tfds")
# Fields of the config's section `data` that are arguments of `load_problems`.
COLUMN_FIELDS = ("question_key", "reference_key", "solution_key", "tfds_dir", "reduce_solutions")
# Columns that are read if neither a format is recognised nor a column named.
DEFAULT_KEYS = ("question", "answer")


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """The problems of one source."""

    source: DataSource
    problems: list[Problem]  # in the source's order
    unanswered: int  # rows left out, which the data set marks as having no final answer


def load_problems(
    source: str,
    format: str,
    *,
    question_key: str,
    reference_key: str,
    solution_key: str,
    tfds_dir: str,
    split: str,
    reduce_solutions: bool = True,
) -> list[Problem]:
    """Load all problems of a source, in the source's order; `load_problem_set` describes the arguments."""
    return load_problem_set(
        source,
        format,
        (question_key, reference_key, solution_key),
        tfds_dir=tfds_dir,
        split=split,
        reduce_solutions=reduce_solutions,
    ).problems


def load_problem_set(
    source: str | DataSource,
    format: str,
    columns: tuple[str, str, str],
    *,
    tfds_dir: str,
    split: str,
    reduce_solutions: bool = True,
) -> ProblemSet:
    """Load all problems of a source.

    Args:
      source: what `data_sources.find_source` finds, or its text, or the name of a tensorflow-datasets data set.
      format: auto (named columns that the row has and that are not the default ones; else a published format,
        recognised by its columns; else the default columns), a published format, or one of jsonl, parquet and
        tfds, which read the named columns.  Any kind of file may contain rows of any format.
      columns: the columns of question, reference and worked solution, which may be nested
        (`reward_model.ground_truth`); the last may be "".  A question may be a list of messages.  A reference
        may be a list of answers, or a worked solution (formats.read_solved_reference); a column of solutions
        takes precedence over that solution.
      tfds_dir: the folder of prepared data sets; "" is the library's default.
      split: of tensorflow-datasets, for example "train" or "train[:100]"; of folders and hub data sets, the
        split that is read if the source's text names none.
      reduce_solutions: reduce named references that are worked solutions, or refuse them.

    Raises ValueError for an unknown format, a malformed row (file, line, column) and a source without rows,
    FileNotFoundError for a missing file, and OSError for an address that cannot be reached.
    """
    if format not in ("auto", *NAMED, *FORMATS):
        raise ValueError(
            f"format {format!r} is none of auto, {', '.join((*FORMATS, *NAMED))}; set "
            "--config.data.format (synthetic problems are generated, not loaded)"
        )
    if format == "tfds":
        text = source.text if isinstance(source, DataSource) else source
        source = DataSource(text, text, ())
        rows = row_reader.read_tfds_rows(text, tfds_dir, split)
    else:
        if isinstance(source, str):
            source = data_sources.find_source(source, split)
        rows = _read_files(source)

    problems, unanswered = [], 0
    for location, id, row in rows:
        # Every message about a row begins with the row's location.
        try:
            # The first row decides the format; a later row of another format is malformed.
            if format == "auto":
                format = choose_format(row, *columns)
            parsed = _parse_row(row, format, columns, reduce_solutions)
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error
        if parsed is None:
            unanswered += 1
        else:
            problems.append(_make_problem(parsed, row, format, id, source.name))

    if not problems:
        reason = f"all {unanswered} rows have no final answer" if unanswered else "the file has no rows"
        raise ValueError(f"{source.text}: {reason}")
    return ProblemSet(source, problems, unanswered)


def _read_files(source: DataSource) -> Iterator[LocatedRow]:
    """Read the rows of all files of a source, in order."""
    for file in source.files:
        if file.function:
            yield from row_reader.make_rows(f"{file.path}:{file.function}")
        else:
            yield from row_reader.read_local_rows(file.path, file.display_name)


def _parse_row(
    row: Row, format: str, columns: tuple[str, str, str], reduce_solutions: bool
) -> ParsedRow | None:
    """Parse a row of a format; None for a row without a final answer.  Raises ValueError for a malformed row."""
    if format in FORMATS:
        parsed = FORMATS[format].parse(row)
    else:
        parsed = _parse_named_columns(row, *columns, reduce_solutions)
    if parsed is not None and not (parsed.question and parsed.reference):
        keys = FORMATS[format].text_keys if format in FORMATS else columns
        what, key = ("reference answer", keys[1]) if parsed.question else ("question", keys[0])
        raise ValueError(f"field {key!r}: the {what} is empty; fill it in, or remove the row")
    return parsed


def _make_problem(parsed: ParsedRow, row: Row, format: str, id: str, source: str) -> Problem:
    """Make the problem of a row.  source: the name of the source."""
    unused = FORMATS[format].unused if format in FORMATS else ()
    # Without unused columns the row is kept itself, not copied.
    columns = {c: value for c, value in row.items() if c not in unused} if unused else row
    return Problem(
        parsed.question,
        parsed.reference,
        parsed.solution,
        id,
        # Evaluations report accuracy by subject and level.
        subject=_find_label(row, _SUBJECT_FIELDS, (str,)),
        level=_find_label(row, _LEVEL_FIELDS, (str, int)),
        messages=parsed.messages,
        source=source,
        columns=columns,
    )


def drop_long_prompts(
    problems: Sequence[Problem], encode_fn: Callable[[Problem], Sequence[int]], max_tokens: int
) -> tuple[list[Problem], list[list[int]], int]:
    """Drop problems with long prompts: (problems kept, their prompts' token ids, number of problems dropped).

    encode_fn: maps a problem to the token ids of the whole prompt, template and instruction included.
    max_tokens: the largest number of tokens of a prompt that is kept.

    Raises ValueError if all problems are dropped.
    """
    kept: list[Problem] = []
    prompts: list[list[int]] = []
    shortest: int | None = None  # for the message

    # Prompts are dropped, not truncated: a truncated question has no answer.
    for problem in problems:
        tokens = list(encode_fn(problem))
        shortest = len(tokens) if shortest is None else min(shortest, len(tokens))
        if len(tokens) <= max_tokens:
            kept.append(problem)
            prompts.append(tokens)

    if not kept:
        raise ValueError(
            f"none of {len(problems)} prompts fits {max_tokens} tokens (the shortest has {shortest}): "
            "raise --config.data.max_prompt_tokens"
        )
    return kept, prompts, len(problems) - len(kept)


def fixed_random_order(size: int) -> list[int]:
    """The indices of `size` problems in a random order that no setting changes.

    An evaluation on n problems takes the first n in this order.  All evaluations on one file therefore use
    the same problems, and a smaller evaluation uses a subset of a larger one's.  The order of the file would
    not do: files are often sorted by subject or difficulty, so their first problems are not representative.
    """
    words = keys.make_generator(0, "benchmark").bit_generator.random_raw(size)
    return np.argsort(words, kind="stable").tolist()


def problem_at(position: int, size: int, seed: int, stream: str = "shuffle") -> int:
    """The index of the problem, 0 .. size - 1, at a global position of the data order.

    stream: the random stream of the order; the supervised phases have streams of their own.

    A batch may cross epochs, and can then contain a problem twice.  Raises ValueError for a position below 0.
    """
    if size < 1 or position < 0:
        raise ValueError(f"position {position} of {size} problems: the position must be >= 0, problems >= 1")
    epoch, index = divmod(position, size)
    return int(_epoch_order(size, seed, epoch, stream)[index])


@functools.lru_cache(maxsize=4)  # a batch that crosses epochs needs two
def _epoch_order(size: int, seed: int, epoch: int, stream: str) -> np.ndarray:
    """The order of one epoch, a permutation i64[size]: the order that sorts raw random words.

    NumPy guarantees the same raw words in all versions, but not the same `permutation`.
    """
    words = keys.make_generator(seed, stream, epoch).bit_generator.random_raw(size)
    order = np.argsort(words, kind="stable")
    # All callers share the cached array, so none may change it.
    order.setflags(write=False)
    return order


def choose_format(row: Row, question_key: str, reference_key: str, solution_key: str = "") -> str:
    """The format of a row: a published one, or "jsonl" if the row has the named columns.

    Raises ValueError if no format or several match.
    """
    # Columns that the user has named count more than a format that the row has besides.
    has_named = all(row_reader.has_field(row, key) for key in (question_key, reference_key))
    if has_named and (question_key, reference_key) != DEFAULT_KEYS:
        return "jsonl"
    matching = formats.recognise_format(row)
    if not matching and has_named:
        return "jsonl"
    if len(matching) == 1:
        return matching[0]

    # A key other than the usual one was set by the user; "" is none.
    keys_set = (("question_key", question_key), ("reference_key", reference_key))
    for (flag, key), usual in zip(keys_set, DEFAULT_KEYS, strict=True):
        if key not in ("", usual) and not row_reader.has_field(row, key):
            near = difflib.get_close_matches(key, [str(column) for column in row], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"there is no column {key!r} (--config.data.{flag}); the columns are "
                f"{', '.join(map(str, row))}{hint}"
            )

    # A guess between several formats could read the wrong column as the answer.
    raise ValueError(
        f"the fields {sorted(row)} fit {' and '.join(matching) or 'no known format'}: set "
        f"--config.data.format to one of {', '.join((*FORMATS, *NAMED))}, and name the columns with "
        f"--config.data.question_key (now {question_key!r}) and .reference_key (now {reference_key!r})"
    )


# Fields of a problem's subject and level in published sets; the first one that a row has is used.
_SUBJECT_FIELDS = ("subject", "subfield", "label", "Type", "type")
_LEVEL_FIELDS = ("level",)


def _find_label(row: Row, fields: Sequence[str], types: tuple[type, ...]) -> str:
    """The first value of one of `types` among the `fields` of a row, as text; "" if there is none."""
    # odyssey rows are {"Problem_N": {...}}: the fields are inside.
    inner = next(iter(row.values())) if FORMATS["odyssey"].matches(row) else row
    for field in fields:
        value = inner.get(field)
        # A bool is an int, but no level.
        if isinstance(value, types) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def _parse_named_columns(
    row: Row, question_key: str, reference_key: str, solution_key: str, reduce_solutions: bool
) -> ParsedRow:
    """Read the texts of a problem from named columns."""
    messages: chat_columns.Messages = ()
    if isinstance(chat_columns.read_messages_text(row_reader.get_field(row, question_key)), list):
        question, messages = chat_columns.read_prompt(row, question_key)
    else:
        question = answers.clean_question(row_reader.get_text(row, question_key))
    solution = row_reader.get_text(row, solution_key).strip() if solution_key else ""
    reference, worked = formats.read_solved_reference(row, reference_key, reduce_solutions)
    return ParsedRow(question, reference, solution or worked, messages)
