"""Rows of samples.jsonl as tables and as text, for trackers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cooper_jax.runtime.trackers.tracker import Samples

# Fields of a sample that each row of its responses repeats.
_PROBLEM_FIELDS = ("id", "question", "prompt", "reference")

TableRow = dict[str, Any]


def make_response_rows(step: int, samples: Samples) -> list[TableRow]:
    """One row for each response: the step, its problem, its text, verdict, reward and what else is known of it."""
    rows: list[TableRow] = []
    for sample in samples:
        problem = {name: sample[name] for name in _PROBLEM_FIELDS if name in sample}
        for response in sample.get("responses", ()):
            row = {"step": step, **problem}
            for name, value in response.items():
                # The rewards of which `reward` is the sum, by name.
                if isinstance(value, Mapping):
                    row |= {f"{name}/{key}": part for key, part in value.items()}
                else:
                    row[name] = value
            rows.append(row)
    return rows


def make_pair_rows(step: int, samples: Samples) -> list[TableRow]:
    """One row for each contrastive pair: the step, the problem's id and question, and both members."""
    return [
        {"step": step, "id": sample.get("id"), "question": sample.get("question"), **pair}
        for sample in samples
        for pair in sample.get("pairs", ())
    ]


def make_tables(step: int, samples: Samples) -> dict[str, list[TableRow]]:
    """The tables of a step's samples that have rows, by name: samples/responses and samples/pairs."""
    tables = {
        "samples/responses": make_response_rows(step, samples),
        "samples/pairs": make_pair_rows(step, samples),
    }
    return {name: rows for name, rows in tables.items() if rows}


def list_columns(rows: Iterable[TableRow]) -> list[str]:
    """The columns that occur in rows, in the order of their first occurrence."""
    return list(dict.fromkeys(name for row in rows for name in row))


def split_columns(rows: Iterable[TableRow]) -> tuple[list[str], list[list[Any]]]:
    """The columns of rows and each row's values in that order, None where a row has no value."""
    rows = list(rows)
    columns = list_columns(rows)
    return columns, [[row.get(column) for column in columns] for row in rows]


def format_samples(step: int, samples: Samples) -> str:
    """Samples as Markdown, for tools that show text."""
    parts: list[str] = []
    for sample in samples:
        parts += [f"### Step {step}, problem {sample.get('id', '')}", _indent(_read_question(sample))]
        parts.append(f"Reference: {sample.get('reference', '')}")
        for response in sample.get("responses", ()):
            known = ", ".join(f"{name} {_show(x)}" for name, x in response.items() if name != "text")
            parts += [f"**Response** ({known})", _indent(response.get("text", ""))]
        for pair in sample.get("pairs", ()):
            parts += ["**Pair, positive**", _indent(pair["positive"])]
            parts += ["**Pair, negative**", _indent(pair["negative"])]
    return "\n\n".join(parts)


def format_config(config: Mapping[str, Any]) -> str:
    """A flat config as Markdown, one field a line."""
    return "\n".join(f"    {name} = {value!r}" for name, value in config.items())


def _read_question(sample: Mapping[str, Any]) -> str:
    """The prompt as the policy read it, or the question where the sample has no prompt."""
    return sample.get("prompt") or sample.get("question", "")


def _indent(text: str) -> str:
    """Text as a code block: Markdown shows an indented block as it stands, whatever the block contains."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
