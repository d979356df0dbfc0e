"""Problems with reference answers, from files and prepared data sets.

  1. row_reader.py reads a file or a prepared data set row by row.
  2. The parser of the row's format makes a Problem of it.  The format is a published one, recognised by its
     fields, or uses columns named in the config.  answers.py cleans question and reference.
  3. `drop_long_prompts` drops problems whose prompts are too long.
  4. `problem_at` gives the problem at a position of the data order.  The position is one global integer,
     which counts the prompts of a run: position p is in epoch p // size, and each epoch visits every problem
     once, in an order that is a function of (seed, epoch) alone.  A run that resumes on another number of
     hosts therefore skips and repeats no problem.
  5. `fixed_random_order` chooses the part of a file on which an evaluation runs.

Published formats, with the fields by which each is recognised:

    gsm8k          question, answer (a worked solution, then `#### N`)
    svamp          Body, Question, Answer
    math500        prompt (ends by asking for a box), answer in LaTeX
    olympiadbench  question, final_answer (a list), unit
    odyssey        {"Problem_N": {question, answer, ...}}

If a row has a subject or a level (`_SUBJECT_FIELDS`, `_LEVEL_FIELDS`), the Problem contains them.

A malformed row raises ValueError with its file and line; no row is skipped.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from cooper_jax.data import answers, row_reader
from cooper_jax.data.row_reader import Row
from cooper_jax.runtime import keys
from cooper_jax.types import Problem

# Formats whose columns are named by the config.
NAMED = ("jsonl", "parquet", "tfds")


def load_problems(
    source: str,
    format: str,
    *,
    question_key: str,
    reference_key: str,
    solution_key: str,
    tfds_dir: str,
    split: str,
) -> list[Problem]:
    """Load all problems of a source, in the source's order.

    Args:
      source: a local or remote (gs://...) file, or the name of a tensorflow-datasets data set.
      format: auto (recognise a published format by its fields, otherwise read the named columns), a published
        format, or one of jsonl, parquet and tfds, which read the named columns.  Parquet files may contain
        rows of any format.
      question_key, reference_key, solution_key: columns of jsonl, parquet and tfds; solution_key may be "".
        A reference with a `####` mark is read like GSM8K's answer field, which contains a solution too; a
        solution column takes precedence over that solution.
      tfds_dir: the folder of prepared data sets; "" is the library's default.
      split: of tensorflow-datasets only, for example "train" or "train[:100]".

    Raises ValueError for an unknown format, a malformed row (file, line, field) and a source without rows,
    FileNotFoundError for a missing file, and OSError for an address that cannot be reached.
    """
    if format not in ("auto", *NAMED, *_PUBLISHED):
        raise ValueError(
            f"format {format!r} is none of auto, {', '.join((*_PUBLISHED, *NAMED))}; set "
            "--config.data.format (synthetic problems are generated, not loaded)"
        )
    if format == "tfds":
        rows = row_reader.read_tfds_rows(source, tfds_dir, split)
    else:
        rows = row_reader.read_file_rows(source)

    problems = []
    for location, id, row in rows:
        # Every message about a row begins with the row's location.
        try:
            # The first row decides the format; a later row of another format is malformed.
            if format == "auto":
                format = recognise_format(row, question_key, reference_key)
            if format in _PUBLISHED:
                question, reference, solution = _PUBLISHED[format](row)
            else:
                question, reference, solution = _parse_named_columns(
                    row, question_key, reference_key, solution_key
                )
            if not question or not reference:
                raise ValueError(f"the {'reference answer' if question else 'question'} is empty")
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error

        # Evaluations report accuracy by subject and level.
        subject = _find_label(row, _SUBJECT_FIELDS, (str,))
        level = _find_label(row, _LEVEL_FIELDS, (str, int))
        problems.append(Problem(question, reference, solution, id, subject, level, columns=row))

    if not problems:
        raise ValueError(f"{source}: the file has no rows")
    return problems


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


def recognise_format(row: Row, question_key: str, reference_key: str) -> str:
    """The format of a row by its fields: a published one, or "jsonl" if the row has the named columns.

    Raises ValueError if no format or several match.
    """
    matching = [name for name, matches in _MATCHES.items() if matches(row)]
    if not matching and {question_key, reference_key} <= row.keys():
        return "jsonl"
    if len(matching) == 1:
        return matching[0]

    # A guess between several formats could read the wrong column as the answer.
    raise ValueError(
        f"the fields {sorted(row)} fit {' and '.join(matching) or 'no known format'}: set "
        f"--config.data.format to one of {', '.join((*_PUBLISHED, *NAMED))}, and name the columns with "
        f"--config.data.question_key (now {question_key!r}) and .reference_key (now {reference_key!r})"
    )


# --- formats: a row -> (question, reference, solution) -------------------------------------------------


def _parse_gsm8k(row: Row) -> tuple[str, str, str]:
    question = answers.clean_question(row_reader.get_text(row, "question"))
    reference, solution = answers.split_gsm8k_answer(row_reader.get_text(row, "answer"))
    return question, reference, solution


def _parse_svamp(row: Row) -> tuple[str, str, str]:
    body = row_reader.get_text(row, "Body").strip()
    question = row_reader.get_text(row, "Question").strip()
    # A body without a full stop is a clause that the question completes.
    comma = "," if body[-1:].isalnum() else ""
    text = f"{body}{comma} {question}" if question else ""
    return text, answers.format_number(row_reader.get_field(row, "Answer")), ""


def _parse_math500(row: Row) -> tuple[str, str, str]:
    question = answers.strip_instruction(row_reader.get_text(row, "prompt"))
    reference = answers.clean_reference(row_reader.get_text(row, "answer"))
    return answers.clean_question(question), reference, ""


def _parse_olympiadbench(row: Row) -> tuple[str, str, str]:
    final = row_reader.get_field(row, "final_answer")
    if not isinstance(final, list) or not all(isinstance(a, str) for a in final):
        raise ValueError(f"field 'final_answer' is {final!r}: it must be a list of strings")
    # Both fields are null in most rows.
    context = row_reader.get_text(row, "context") + "\n" if row.get("context") else ""
    unit = row_reader.get_text(row, "unit") if row.get("unit") else ""
    several = row.get("is_multiple_answer") is True

    question = answers.clean_question(context + row_reader.get_text(row, "question"))
    return question, answers.join_answers(final, unit, several=several), ""


def _parse_odyssey(row: Row) -> tuple[str, str, str]:
    if len(row) != 1 or not isinstance(inner := next(iter(row.values())), dict):
        raise ValueError(f"the fields {sorted(row)} are not one 'Problem_N' that holds an object")
    question = answers.clean_question(row_reader.get_text(inner, "question"))
    reference = answers.clean_reference(row_reader.get_text(inner, "answer"), prose=True)
    return question, reference, ""


_PUBLISHED: dict[str, Callable[[Row], tuple[str, str, str]]] = {
    "gsm8k": _parse_gsm8k,
    "svamp": _parse_svamp,
    "math500": _parse_math500,
    "olympiadbench": _parse_olympiadbench,
    "odyssey": _parse_odyssey,
}

# Fields of a problem's subject and level in published sets; the first one that a row has is used.
_SUBJECT_FIELDS = ("subject", "subfield", "label", "Type", "type")
_LEVEL_FIELDS = ("level",)

# Format -> predicate on a row's fields.  Every row of a published file matches exactly one format.
_MATCHES: dict[str, Callable[[Row], bool]] = {
    "gsm8k": lambda row: {"question", "answer"} <= row.keys() and "####" in str(row["answer"]),
    "svamp": lambda row: {"Body", "Question", "Answer"} <= row.keys(),
    "math500": lambda row: {"prompt", "answer"} <= row.keys(),
    "olympiadbench": lambda row: {"question", "final_answer"} <= row.keys(),
    "odyssey": lambda row: len(row) == 1 and next(iter(row)).startswith("Problem_"),
}


def _find_label(row: Row, fields: Sequence[str], types: tuple[type, ...]) -> str:
    """The first value of one of `types` among the `fields` of a row, as text; "" if there is none."""
    # odyssey rows are {"Problem_N": {...}}: the fields are inside.
    inner = next(iter(row.values())) if _MATCHES["odyssey"](row) else row
    for field in fields:
        value = inner.get(field)
        # A bool is an int, but no level.
        if isinstance(value, types) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def _parse_named_columns(
    row: Row, question_key: str, reference_key: str, solution_key: str
) -> tuple[str, str, str]:
    """Read (question, reference, solution) from named columns.

    A reference is text, a number or a list of texts.
    """
    question = answers.clean_question(row_reader.get_text(row, question_key))
    solution = row_reader.get_text(row, solution_key).strip() if solution_key else ""

    # A list of answers, or a number.
    value = row_reader.get_field(row, reference_key)
    if isinstance(value, list) and all(isinstance(a, str) for a in value):
        return question, answers.join_answers(value), solution
    if isinstance(value, (int, float)):
        return question, answers.format_number(value), solution

    # Text, in which a `####` marks GSM8K's combination of solution and answer.
    text = row_reader.get_text(row, reference_key)
    if "####" not in text:
        return question, answers.clean_reference(text), solution
    reference, worked = answers.split_gsm8k_answer(text)
    return question, reference, solution or worked
