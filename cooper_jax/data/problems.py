"""Problems with reference answers, from files and prepared data sets.

  1. `sources` reads a file or a prepared data set row by row.
  2. A row becomes a Problem by its format: one of the published ones, recognised by their fields, or columns
     named in the config.  `answers` cleans both sides.
  3. `drop_long` leaves out prompts that are too long.
  4. `problem_at` gives the problem at a position.  One global integer, the position, says how far a run has come:
     position p lies in epoch p // size, and each epoch visits every problem once, in an order that is a
     function of (seed, epoch) alone.  A restart on another number of hosts loses and repeats nothing.
  5. `keyed_order` says which part of a file an evaluation takes.

Published formats, with the fields that each is recognised by:

    gsm8k          question, answer (a worked solution, then `#### N`)
    svamp          Body, Question, Answer
    math500        prompt (ends by asking for a box), answer in LaTeX
    olympiadbench  question, final_answer (a list), unit
    odyssey        {"Problem_N": {question, answer, ...}}

Where a row says of what subject or level its problem is (`_SUBJECT`, `_LEVEL`), so does the Problem.

A row that is malformed raises ValueError with its file and line; none is skipped.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from cooper_jax.data import answers, row_reader
from cooper_jax.data.row_reader import Row
from cooper_jax.runtime import keys
from cooper_jax.types import Problem

NAMED = ("jsonl", "parquet", "tfds")  # formats whose columns the config names


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
    """All problems of a source, in its order.

    Args:
      source: a file, here or at an address (gs://...), or the name of a tensorflow-datasets data set.
      format: auto (published formats by their fields, else named columns), a published format, or jsonl,
        parquet or tfds, whose columns the keys name.  Parquet files may hold any format.
      question_key, reference_key, solution_key: columns of jsonl, parquet and tfds; solution_key may be "".
        A reference with a `####` mark is read as GSM8K's, and gives the solution too where none is named.
      tfds_dir: where prepared data sets lie; "" is the library's default.
      split: of tfds only, such as "train" or "train[:100]".

    Raises ValueError for an unknown format, a malformed row (file, line, field) and a source without rows,
    FileNotFoundError for a missing file, and OSError for an address that cannot be reached.
    """
    if format not in ("auto", *NAMED, *_PUBLISHED):
        raise ValueError(
            f"format {format!r} is none of auto, {', '.join((*_PUBLISHED, *NAMED))}; set --config.data.format "
            "(synthetic problems are made, not loaded)"
        )
    rows = (
        row_reader.read_tfds_rows(source, tfds_dir, split)
        if format == "tfds"
        else row_reader.read_file_rows(source)
    )
    columns = (question_key, reference_key, solution_key)
    problems = []
    for where, id, row in rows:
        try:
            if format == "auto":
                format = recognise_format(row, question_key, reference_key)
            parts = _PUBLISHED[format](row) if format in _PUBLISHED else _named_columns(row, *columns)
            question, reference, solution = parts
            if not question or not reference:
                raise ValueError(f"the {'reference answer' if question else 'question'} is empty")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        said = _said(row, _SUBJECT, str), _said(row, _LEVEL, str | int)
        problems.append(Problem(question, reference, solution, id, *said))
    if not problems:
        raise ValueError(f"{source}: the file has no rows")
    return problems


def drop_long_prompts(
    problems: Sequence[Problem], encode_fn: Callable[[Problem], Sequence[int]], max_tokens: int
) -> tuple[list[Problem], list[list[int]], int]:
    """(problems whose prompt has at most max_tokens tokens, their prompts' tokens, how many were dropped).

    encode_fn: problem -> the token ids of the whole prompt, template and instruction included.
    Raises ValueError where none is left.
    """
    kept, prompts, shortest = [], [], None
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
    """The places of `size` problems in a random order that no setting changes.

    The first ones of it are a fixed part of a file: evaluations of one file ask the same problems, and fewer are
    among more.  Files are often sorted by subject or difficulty, so their own first ones stand for little.
    """
    words = keys.make_generator(0, "benchmark").bit_generator.random_raw(size)
    return np.argsort(words, kind="stable").tolist()


def problem_at(position: int, size: int, seed: int, stream: str = "shuffle") -> int:
    """The index, in 0 .. size - 1, of the problem at a global position.  Raises ValueError outside its domain.

    stream: which order; the supervised phases have their own.  A batch may cross epochs; a problem can then
    stand in it twice.
    """
    if size < 1 or position < 0:
        raise ValueError(f"position {position} of {size} problems: the position is >= 0, and problems >= 1")
    epoch, index = divmod(position, size)
    return int(_epoch_order(size, seed, epoch, stream)[index])


@functools.lru_cache(maxsize=4)  # a batch that crosses epochs needs two
def _epoch_order(size: int, seed: int, epoch: int, stream: str) -> np.ndarray:
    """A permutation, i64[size]: the ranks of raw random words.

    NumPy keeps those words the same across versions, and promises no such thing of `permutation`.
    """
    words = keys.make_generator(seed, stream, epoch).bit_generator.random_raw(size)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def recognise_format(row: Row, question_key: str, reference_key: str) -> str:
    """The format of a row by its fields: a published one, else "jsonl" where the named columns are there.

    Raises ValueError where none or several fit.
    """
    fits = [name for name, fields in _FIELDS.items() if fields(row)]
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


def _gsm8k(row: Row) -> tuple[str, str, str]:
    return answers.clean_question(row_reader.get_text(row, "question")), *answers.split_gsm8k_answer(
        row_reader.get_text(row, "answer")
    )


def _svamp(row: Row) -> tuple[str, str, str]:
    body, question = row_reader.get_text(row, "Body").strip(), row_reader.get_text(row, "Question").strip()
    comma = "," if body[-1:].isalnum() else ""  # such a body is a clause that the question ends
    return (
        f"{body}{comma} {question}" if question else "",
        answers.format_number(row_reader.get_field(row, "Answer")),
        "",
    )


def _math500(row: Row) -> tuple[str, str, str]:
    question = answers.strip_instruction(row_reader.get_text(row, "prompt"))
    return answers.clean_question(question), answers.clean_reference(row_reader.get_text(row, "answer")), ""


def _olympiadbench(row: Row) -> tuple[str, str, str]:
    final = row_reader.get_field(row, "final_answer")
    if not isinstance(final, list) or not all(isinstance(a, str) for a in final):
        raise ValueError(f"field 'final_answer' is {final!r}: must be a list of strings")
    context = row_reader.get_text(row, "context") + "\n" if row.get("context") else ""  # null in most rows
    unit = row_reader.get_text(row, "unit") if row.get("unit") else ""
    several = row.get("is_multiple_answer") is True
    question = answers.clean_question(context + row_reader.get_text(row, "question"))
    return question, answers.join_answers(final, unit, several=several), ""


def _odyssey(row: Row) -> tuple[str, str, str]:
    if len(row) != 1 or not isinstance(inner := next(iter(row.values())), dict):
        raise ValueError(f"the fields {sorted(row)} are not one 'Problem_N' that holds an object")
    return (
        answers.clean_question(row_reader.get_text(inner, "question")),
        answers.clean_reference(row_reader.get_text(inner, "answer"), prose=True),
        "",
    )


_PUBLISHED: dict[str, Callable[[Row], tuple[str, str, str]]] = {
    "gsm8k": _gsm8k,
    "svamp": _svamp,
    "math500": _math500,
    "olympiadbench": _olympiadbench,
    "odyssey": _odyssey,
}
# The fields that name a problem's subject and level in published sets, the first that a row has.
_SUBJECT = ("subject", "subfield", "label", "Type", "type")
_LEVEL = ("level",)
_FIELDS: dict[str, Callable[[Row], bool]] = {
    "gsm8k": lambda row: {"question", "answer"} <= row.keys() and "####" in str(row["answer"]),
    "svamp": lambda row: {"Body", "Question", "Answer"} <= row.keys(),
    "math500": lambda row: {"prompt", "answer"} <= row.keys(),
    "olympiadbench": lambda row: {"question", "final_answer"} <= row.keys(),
    "odyssey": lambda row: len(row) == 1 and next(iter(row)).startswith("Problem_"),
}


def _said(row: Row, names: Sequence[str], kind: type) -> str:
    """What the first of these fields that holds something of a kind says of a row; "" where none does."""
    inner = next(iter(row.values())) if _FIELDS["odyssey"](row) else row
    for name in names:
        value = inner.get(name)
        if isinstance(value, kind) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def _named_columns(
    row: Row, question_key: str, reference_key: str, solution_key: str
) -> tuple[str, str, str]:
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
