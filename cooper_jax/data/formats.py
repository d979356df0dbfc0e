r"""Table of published data formats: how each is recognised, and how a row becomes a problem.

1. `FORMATS` lists the formats.  A row has a format if it has all of its `columns` and none of `without`, and
   passes its `check`, if there is one.
2. `recognise_format` finds the one format of a row.
3. `Format.parse` makes a `ParsedRow` of it; answers.py cleans question and reference.  None: the data set
   marks the row as one without a final answer (a proof), and it is dropped and counted.

docs/data.md shows the table (`describe_formats`); a test compares the two.

To add a format, write its parser and its row of the table, and a row of this shape in tests/test_formats.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from cooper_jax.data import answers, chat_columns, row_reader
from cooper_jax.data.row_reader import Row


class ParsedRow(NamedTuple):
    """The texts of a problem."""

    question: str
    reference: str
    solution: str = ""

    # The prompt as (role, content) messages, if the data has it in this form; otherwise empty.
    messages: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Format:
    """A published format."""

    name: str  # a value of data.format
    data_sets: str  # for the documentation

    # How a row is recognised.
    columns: tuple[str, ...]  # columns that it has
    without: tuple[str, ...] = ()  # columns that it does not have
    check: Callable[[Row], bool] = lambda row: True  # called only if the columns are right
    note: str = ""  # what `check` requires, for the documentation

    parse: Callable[[Row], ParsedRow | None] = dataclasses.field(kw_only=True)
    # Columns of question and reference, for messages, if they are not the first two of `columns`.
    keys: tuple[str, str] | None = None
    # Long columns that no reward reads, which are not kept: they would take gigabytes.
    unused: tuple[str, ...] = ()

    @property
    def text_keys(self) -> tuple[str, str]:
        """The columns of question and reference."""
        return self.keys or (self.columns[0], self.columns[1])

    def matches(self, row: Row) -> bool:
        """True if a row has this format."""
        has_columns = all(c in row for c in self.columns) and not any(c in row for c in self.without)
        return has_columns and self.check(row)


def recognise_format(row: Row) -> list[str]:
    """The names of the formats that a row may have."""
    return [name for name, format in FORMATS.items() if format.matches(row)]


def describe_formats() -> str:
    """The table of formats in Markdown."""
    lines = ["| `data.format` | data sets | recognised by |", "| --- | --- | --- |"]
    for format in FORMATS.values():
        columns = ", ".join(f"`{c}`" for c in format.columns)
        if format.without:
            columns += " without " + ", ".join(f"`{c}`" for c in format.without)
        columns = ", ".join(filter(None, (columns, format.note)))
        lines.append(f"| `{format.name}` | {format.data_sets} | {columns} |")
    return "\n".join(lines)


# --- word problems --------------------------------------------------------------------------------------


def _parse_gsm8k(row: Row) -> ParsedRow:
    question = answers.clean_question(row_reader.get_text(row, "question"))
    with _naming("answer"):
        return ParsedRow(question, *answers.split_gsm8k_answer(row_reader.get_text(row, "answer")))


def _parse_svamp(row: Row) -> ParsedRow:
    body = row_reader.get_text(row, "Body").strip()
    question = row_reader.get_text(row, "Question").strip()
    # A body without a full stop is a clause that the question completes.
    comma = "," if body[-1:].isalnum() else ""
    text = f"{body}{comma} {question}" if question else ""
    with _naming("Answer"):
        return ParsedRow(text, answers.format_number(row_reader.get_field(row, "Answer")))


# --- competition mathematics ----------------------------------------------------------------------------


def _parse_math500(row: Row) -> ParsedRow:
    question = answers.strip_instruction(row_reader.get_text(row, "prompt"))
    reference = answers.clean_reference(row_reader.get_text(row, "answer"))
    return ParsedRow(answers.clean_question(question), reference)


def _parse_olympiadbench(row: Row) -> ParsedRow:
    final = row_reader.get_field(row, "final_answer")
    if not isinstance(final, list) or not all(isinstance(a, str) for a in final):
        raise ValueError(f"field 'final_answer' is {final!r}: it must be a list of strings")
    # Both fields are null in most rows.
    context = row_reader.get_text(row, "context") + "\n" if row.get("context") else ""
    unit = row_reader.get_text(row, "unit") if row.get("unit") else ""
    several = row.get("is_multiple_answer") is True

    question = answers.clean_question(context + row_reader.get_text(row, "question"))
    return ParsedRow(question, answers.join_answers(final, unit, several=several))


def _parse_odyssey(row: Row) -> ParsedRow:
    if len(row) != 1 or not isinstance(inner := next(iter(row.values())), dict):
        raise ValueError(f"the fields {sorted(row)} are not one 'Problem_N' that holds an object")
    question = answers.clean_question(row_reader.get_text(inner, "question"))
    return ParsedRow(question, answers.clean_reference(row_reader.get_text(inner, "answer"), prose=True))


def _parse_math(row: Row) -> ParsedRow:
    """MATH has no column of answers: the solution marks its answer with a box."""
    question = answers.clean_question(row_reader.get_text(row, "problem"))
    text = row_reader.get_text(row, "solution").strip()
    if (answer := answers.find_boxed(text)) is None:
        raise ValueError("field 'solution' marks no answer: it has no \\boxed{}")
    return ParsedRow(question, answers.clean_reference(answer), text)


def _parse_numina_cot(row: Row) -> ParsedRow | None:
    # Proofs and a few more solutions have no box.
    return None if answers.find_boxed(row_reader.get_text(row, "solution")) is None else _parse_math(row)


def _parse_problem_answer(row: Row) -> ParsedRow:
    """Problem, answer and perhaps a solution in columns of their own."""
    question = answers.clean_question(row_reader.get_text(row, "problem"))
    reference = read_reference(row, "answer")
    # The columns beside it do not matter, so a solution of another type or null is none.
    solution = row.get("solution")
    return ParsedRow(question, reference, solution.strip() if isinstance(solution, str) else "")


def _parse_numina(row: Row) -> ParsedRow | None:
    # NuminaMath-1.5 and OpenR1-Math write these words in place of an answer.
    if str(row["answer"]).strip().lower() in ("proof", "notfound", "", "none"):
        return None
    return _parse_problem_answer(row)


def _parse_deepscaler(row: Row) -> ParsedRow | None:
    # Six rows have an empty answer.
    return None if row["answer"] == "" else _parse_problem_answer(row)


def _parse_prompt_solution(row: Row) -> ParsedRow:
    question, messages = chat_columns.read_prompt(row, "prompt")
    return ParsedRow(question, read_reference(row, "solution"), "", messages)


# --- layouts of RL libraries ----------------------------------------------------------------------------


def _parse_verl(row: Row) -> ParsedRow:
    question, messages = chat_columns.read_prompt(row, "prompt")
    # verl's scripts keep the question without its instruction here.
    extra = row.get("extra_info")
    if isinstance(extra, Mapping) and isinstance(extra.get("question"), str) and extra["question"].strip():
        question = extra["question"]
    return ParsedRow(
        answers.clean_question(question), read_reference(row, "reward_model.ground_truth"), "", messages
    )


def _parse_open_instruct(row: Row) -> ParsedRow:
    question, messages = chat_columns.read_prompt(row, "messages")
    return ParsedRow(question, read_reference(row, "ground_truth"), "", messages)


def _parse_orz(row: Row) -> ParsedRow:
    question = answers.clean_question(row_reader.get_text(row, "0.value"))
    return ParsedRow(question, read_reference(row, "1.ground_truth.value"))


def _parse_chat(row: Row) -> ParsedRow:
    question, messages = chat_columns.read_prompt(row, "prompt")
    return ParsedRow(question, read_reference(row, "answer"), "", messages)


# --- references -----------------------------------------------------------------------------------------


def read_reference(row: Row, key: str) -> str:
    """Read a reference, without the worked solution that its column may have (`read_solved_reference`)."""
    return read_solved_reference(row, key, reduce=True)[0]


def read_solved_reference(row: Row, key: str, reduce: bool) -> tuple[str, str]:
    """Read (reference, worked solution) from a column.

    The column has text, a number, or a list of texts or numbers, which are all answers to the question.

    reduce: of a worked solution the answer that it marks is the reference; otherwise only a `####` divides.

    Raises ValueError for other values, and with `reduce` for a worked solution that marks no answer.
    """
    with _naming(key):
        return _read_solved_value(row, key, reduce)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Let the message of a ValueError begin with the field that it is about, unless it does."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("field "):
            raise
        raise ValueError(f"field {key!r}: {error}") from error


def _read_solved_value(row: Row, key: str, reduce: bool) -> tuple[str, str]:
    """`read_solved_reference`, with errors that may not name the field."""
    value = row_reader.get_field(row, key)

    # Skywork-OR1 has a list as the text of its JSON: '["16"]'.
    if isinstance(value, str) and value.startswith('["'):
        value = _parse_list(value)
    if isinstance(value, list) and value and all(_is_answer(a) for a in value):
        texts = [a if isinstance(a, str) else answers.format_number(a) for a in value]
        return answers.join_answers(texts), ""
    # Decimal: of parquet files.
    if isinstance(value, (int, float, decimal.Decimal)):
        return answers.format_number(value), ""

    text = row_reader.get_text(row, key)
    if "####" in text:
        return answers.split_gsm8k_answer(text)
    if not reduce:
        return answers.clean_reference(text), ""
    return answers.split_solution(text)


def _is_answer(value: Any) -> bool:
    return isinstance(value, (str, int, float, decimal.Decimal)) and not isinstance(value, bool)


def _parse_list(text: str) -> Any:
    """A list of texts that is written as JSON; another text stays as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if all(isinstance(item, str) for item in value) else text


# --- the table ------------------------------------------------------------------------------------------


def _has_hash_mark(row: Row) -> bool:
    return "####" in str(row["answer"])


def _has_text_prompt(row: Row) -> bool:
    return not isinstance(row["prompt"], list)


def _has_chat_prompt(row: Row) -> bool:
    return isinstance(row["prompt"], list)


def _is_odyssey(row: Row) -> bool:
    return len(row) == 1 and next(iter(row)).startswith("Problem_")


# Columns by which data sets of (problem, answer) differ.
_NUMINA = ("problem_type", "question_type")
_LONG = ("generations", "messages", "correctness_math_verify", "correctness_llama", "finish_reasons")

_TABLE = (
    Format(
        "gsm8k",
        "GSM8K",
        ("question", "answer"),
        check=_has_hash_mark,
        note="a `####` in it",
        parse=_parse_gsm8k,
    ),
    Format("svamp", "SVAMP", ("Body", "Question", "Answer"), parse=_parse_svamp, keys=("Question", "Answer")),
    Format(
        "math500",
        "MATH500 with prompts",
        ("prompt", "answer"),
        check=_has_text_prompt,
        note="a prompt that is text",
        parse=_parse_math500,
    ),
    Format("olympiadbench", "OlympiadBench", ("question", "final_answer"), parse=_parse_olympiadbench),
    Format(
        "odyssey",
        "Math Odyssey",
        (),
        check=_is_odyssey,
        note="`Problem_N` alone",
        parse=_parse_odyssey,
        keys=("question", "answer"),
    ),
    Format(
        "math",
        "MATH as parquet (hendrycks_math, MATH-lighteval)",
        ("problem", "solution"),
        without=("answer", "messages"),
        parse=_parse_math,
    ),
    Format(
        "numina_cot",
        "NuminaMath-CoT, NuminaMath-TIR",
        ("problem", "solution", "messages"),
        without=("answer",),
        parse=_parse_numina_cot,
        unused=_LONG,
    ),
    Format(
        "numina",
        "NuminaMath-1.5",
        ("problem", "answer", *_NUMINA),
        without=("generations",),
        parse=_parse_numina,
    ),
    Format(
        "openr1",
        "OpenR1-Math-220k",
        ("problem", "answer", "generations"),
        parse=_parse_numina,
        unused=_LONG,
    ),
    Format("big_math", "Big-Math", ("problem", "answer", "llama8b_solve_rate"), parse=_parse_problem_answer),
    Format(
        "deepscaler",
        "DeepScaleR-Preview",
        ("problem", "answer", "solution"),
        without=("unique_id", "generations", "question_type", "llama8b_solve_rate"),
        parse=_parse_deepscaler,
    ),
    Format(
        "problem_answer",
        "MATH-500, AIME and others",
        ("problem", "answer"),
        without=("generations", "question_type", "llama8b_solve_rate"),
        check=lambda row: "unique_id" in row or "solution" not in row,
        note="`unique_id` or no `solution`",
        parse=_parse_problem_answer,
    ),
    Format(
        "prompt_solution",
        "DAPO-Math-17k-Processed, Big-Math-RL-Verified-Processed",
        ("prompt", "solution"),
        without=("answer",),
        parse=_parse_prompt_solution,
        unused=("source_prompt",),
    ),
    Format(
        "verl",
        "verl's layout: DAPO-Math-17k, Skywork-OR1 and others",
        ("prompt", "reward_model"),
        without=("answer", "solution"),
        parse=_parse_verl,
        keys=("prompt", "reward_model.ground_truth"),
    ),
    Format(
        "open_instruct",
        "open-instruct's layout: RLVR-GSM, RLVR-MATH and others",
        ("messages", "ground_truth", "dataset"),
        parse=_parse_open_instruct,
    ),
    Format(
        "orz",
        "Open-Reasoner-Zero (rows are lists)",
        ("0", "1"),
        parse=_parse_orz,
        keys=("0.value", "1.ground_truth.value"),
    ),
    Format(
        "chat",
        "prompts as lists of messages",
        ("prompt", "answer"),
        check=_has_chat_prompt,
        note="a prompt that is a list",
        parse=_parse_chat,
    ),
)
FORMATS: dict[str, Format] = {format.name: format for format in _TABLE}
