"""JSON objects read from files that strangers wrote: what is no proper JSON object is refused in one line.

`read_json` refuses what Python's parser takes or fails on in other ways: values that are no object, names that
occur twice, nesting without end, files without end, and text that is not UTF-8.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cooper_jax.settings.value_rules import show_value

_LARGEST = 2**28  # bytes of a file; tokenizers of 260,000 tokens take 34 million
_DEEPEST = 64  # levels of nesting; the rules of a tokenizer take about ten


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises ValueError, in one line that names the file, for anything else."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    size = file.stat().st_size
    if size > _LARGEST:
        raise ValueError(f"{file}: {size} bytes are too many for such a file: it has at most {_LARGEST}")
    return parse_json(file.read_bytes(), str(file))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; where: the file, for messages.  Raises ValueError as `read_json` does."""
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_make_object)
    except _TwiceError as error:
        raise ValueError(f"{where}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}): save it in this encoding") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {' '.join(str(error).split())}") from error
    # Deep nesting; some versions of Python parse it, and fail where it is used.
    except RecursionError as error:
        raise ValueError(f"{where}: {_describe_depth(text)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: it is {show_value(value)}, not a JSON object")
    if _is_deep(value):
        raise ValueError(f"{where}: {_describe_depth(text)}")
    return value


class _TwiceError(ValueError):
    """A name that occurs twice in an object, with different values."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs of a JSON object.  Readers differ in which of two equal names they take."""
    out = dict(pairs)
    if len(out) < len(pairs):
        for name, value in pairs:
            if out[name] != value:
                raise _TwiceError(f"{show_value(name)} occurs twice, with different values: remove one")
    return out


def _describe_depth(text: str) -> str:
    """Write the message for an object that is nested too deep: it names the object's field."""
    depth, field = 0, "it"
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        if token[0] == '"':
            field = token if depth == 1 else field  # the last name or text outside all values
            continue
        depth += 1 if token in "[{" else -1
        if depth > _DEEPEST:
            break
    return f"{show_value(field.strip(chr(34)))} is nested more than {_DEEPEST} levels deep"


def _is_deep(value: Any) -> bool:
    """True if containers are nested more than _DEEPEST levels deep."""
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            below += [item for item in items if isinstance(item, dict | list)]
        if not below:
            return False
        level = below
    return True
