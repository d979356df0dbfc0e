"""Reading of fields of a request's JSON, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.serving.api_errors import refuse_field

Body = Mapping[str, Any]


def read_number(body: Body, field: str, default: float, low: float, high: float) -> float:
    """Read a number from low to high; null or absent: the default."""
    value = body.get(field)
    if value is None:
        return default
    # bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse_field(field, f"expected a number, got {_show(value)}")
    # Not so for NaN and infinities; an integer of any length is compared exactly.
    if not low <= value <= high:
        raise refuse_field(field, f"{_show(value)} is not from {low:g} to {high:g}")
    return float(value)


def read_integer(body: Body, field: str, default: int | None, low: int, high: int) -> int | None:
    """Read an integer from low to high; null or absent: the default."""
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise refuse_field(field, f"expected an integer, got {_show(value)}")
    if not low <= value <= high:
        raise refuse_field(field, f"{_show(value)} is not from {low} to {high}")
    return value


def read_boolean(body: Body, field: str, default: bool = False) -> bool:
    """Read true or false; null or absent: the default."""
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refuse_field(field, f"expected true or false, got {_show(value)}")
    return value


def read_text(body: Body, field: str) -> str:
    """Read a text that must be there; half of a surrogate pair counts as U+FFFD."""
    value = body.get(field)
    if not isinstance(value, str):
        raise refuse_field(field, f"expected a text, got {_show(value)}")
    return replace_surrogates(value)


def read_texts(body: Body, field: str) -> list[str]:
    """Read a list of texts that must be there."""
    value = body.get(field)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refuse_field(field, f"expected a list of texts, got {_show(value)}")
    return [replace_surrogates(item) for item in value]


def read_object(body: Body, field: str) -> Mapping[str, Any]:
    """Read an object; null or absent: an empty one."""
    value = body.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse_field(field, f"expected an object, got {_show(value)}")
    return value


def refuse_other_fields(body: Body, known: set[str]) -> None:
    """Raise ApiError for the first field that is not known: it would be ignored without a word."""
    for field in body:
        if field not in known:
            raise refuse_field(field[:100], "this server has no such field")


def _show(value: Any) -> str:
    """A value in a message, shortened."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
