"""Problems with reference answers, from files and prepared data sets.

  1. row_reader.py reads a file or a prepared data set row by row.
  2. A row becomes a Problem by its format: one of the published ones, recognised by their fields, or columns
     named in the config.  answers.py cleans question and reference.
  3. `drop_long_prompts` drops prompts that are too long.
  4. `problem_at` gives the problem at a position of the data order.  The position is one global integer,
     which counts the prompts of a run: position p is in epoch p // size, and each epoch visits every problem
     once, in an order that is a function of (seed, epoch) alone.  A run that resumes on another number of
     hosts skips and repeats none.
  5. `keyed_order` chooses the part of a file that an evaluation takes.

Published formats, with the fields by which each is recognised:

    gsm8k          question, answer (a worked solution, then `#### N`)
    svamp          Body, Question, Answer
    math500        prompt (ends by asking for a box), answer in LaTeX
    olympiadbench  question, final_answer (a list), unit
    odyssey        {"Problem_N": {question, answer, ...}}

Where a row has a subject or a level (`_SUBJECT_FIELDS`, `_LEVEL_FIELDS`), the Problem takes them over.

A malformed row raises ValueError with its file and line; none is skipped.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from cooper_jax.data import answers, row_reader
from cooper_jax.data.row_reader import Row
from cooper_jax.runtime import keys
from cooper_jax.types import Problem

NAMED = ("jsonl", "parquet", "tfds")  # formats whose columns are named by the config


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
    """Load all problems of a source, in its order.

    Args:
      source: a local or remote (gs://...) file, or the name of a tensorflow-datasets data set.
      format: auto (published formats by their fields, else named columns), a published format, or jsonl,
        parquet or tfds, whose columns the keys name.  Parquet files may hold any format.
      question_key, reference_key, solution_key: columns of jsonl, parquet and tfds; solution_key may be "".
        A reference with a `####` mark is read as GSM8K's, and gives the solution too where no column does.
      tfds_dir: the folder of prepared data sets; "" is the library's default.
      split: of tfds only, such as "train" or "train[:100]".

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
        try:
            if format == "auto":  # by the first row; the others must have its format
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
        subject = _find_label(row, _SUBJECT_FIELDS, (str,))
        level = _find_label(row, _LEVEL_FIELDS, (str, int))
        problems.append(Problem(question, reference, solution, id, subject, level))

    if not problems:
        raise ValueError(f"{source}: the file has no rows")
    return problems


def drop_long_prompts(
    problems: Sequence[Problem], encode_fn: Callable[[Problem], Sequence[int]], max_tokens: int
) -> tuple[list[Problem], list[list[int]], int]:
    """Drop problems with long prompts: (problems kept, their prompts' token ids, number of problems dropped).

    encode_fn: problem -> the token ids of the whole prompt, template and instruction included.
    max_tokens: the most tokens of a prompt that is kept.

    Raises ValueError where none is left.
    """
    kept: list[Problem] = []
    prompts: list[list[int]] = []
    shortest: int | None = None  # for the message
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


def keyed_order(size: int) -> list[int]:
    """The indices of `size` problems in a random order that no setting changes.

    An evaluation takes its first problems in this order, so that all evaluations of one file use the same
    problems, and a smaller one a subset of a larger one's.  Files are often sorted by subject or difficulty:
    their own first problems are not representative.
    """
    words = keys.make_generator(0, "benchmark").bit_generator.random_raw(size)
    return np.argsort(words, kind="stable").tolist()


def problem_at(position: int, size: int, seed: int, stream: str = "shuffle") -> int:
    """The index of the problem, 0 .. size - 1, at a global position >= 0.  Raises ValueError for others.

    stream: the random stream of the order; the supervised phases have their own.  A batch may cross epochs,
    and can then contain a problem twice.
    """
    if size < 1 or position < 0:
        raise ValueError(f"position {position} of {size} problems: the position must be >= 0, problems >= 1")
    epoch, index = divmod(position, size)
    return int(_epoch_order(size, seed, epoch, stream)[index])


@functools.lru_cache(maxsize=4)  # a batch that crosses epochs needs two
def _epoch_order(size: int, seed: int, epoch: int, stream: str) -> np.ndarray:
    """A permutation of one epoch, i64[size]: the order that sorts raw random words.

    NumPy guarantees the same raw words in all versions, but not the same `permutation`.
    """
    words = keys.make_generator(seed, stream, epoch).bit_generator.random_raw(size)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def recognise_format(row: Row, question_key: str, reference_key: str) -> str:
    """The format of a row by its fields: a published one, else "jsonl" where the named columns are there.

    Raises ValueError where none or several fit.
    """
    fits = [name for name, matches in _MATCHES.items() if matches(row)]
    if not fits and {question_key, reference_key} <= row.keys():
        return "jsonl"
    if len(fits) == 1:
        return fits[0]
    raise ValueError(
        f"the fields {sorted(row)} fit {' and '.join(fits) if fits else 'no known format'}: set "
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
    comma = (
        "," if body[-1:].isalnum() else ""
    )  # a body without a full stop is a clause that the question completes
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
    context = row_reader.get_text(row, "context") + "\n" if row.get("context") else ""  # null in most rows
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
# Fields of a problem's subject and level in published sets; the first that a row has counts.
_SUBJECT_FIELDS = ("subject", "subfield", "label", "Type", "type")
_LEVEL_FIELDS = ("level",)

# Format -> test of a row's fields.
_MATCHES: dict[str, Callable[[Row], bool]] = {
    "gsm8k": lambda row: {"question", "answer"} <= row.keys() and "####" in str(row["answer"]),
    "svamp": lambda row: {"Body", "Question", "Answer"} <= row.keys(),
    "math500": lambda row: {"prompt", "answer"} <= row.keys(),
    "olympiadbench": lambda row: {"question", "final_answer"} <= row.keys(),
    "odyssey": lambda row: len(row) == 1 and next(iter(row)).startswith("Problem_"),
}


def _find_label(row: Row, fields: Sequence[str], types: tuple[type, ...]) -> str:
    """The value of the first of these fields with a value of these types, as text; "" where none has one."""
    inner = next(iter(row.values())) if _MATCHES["odyssey"](row) else row
    for field in fields:
        value = inner.get(field)
        if isinstance(value, types) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def _parse_named_columns(
    row: Row, question_key: str, reference_key: str, solution_key: str
) -> tuple[str, str, str]:
    """(question, reference, solution) of named columns; a reference is text, a number or a list of texts."""
    question = answers.clean_question(row_reader.get_text(row, question_key))
    solution = row_reader.get_text(row, solution_key).strip() if solution_key else ""
    value = row_reader.get_field(row, reference_key)
    if isinstance(value, list) and all(isinstance(a, str) for a in value):
        return question, answers.join_answers(value), solution
    if isinstance(value, (int, float)):
        return question, answers.format_number(value), solution
    text = row_reader.get_text(row, reference_key)
    if "####" not in text:
        return question, answers.clean_reference(text), solution
    reference, worked = answers.split_gsm8k_answer(text)
    return question, reference, solution or worked
