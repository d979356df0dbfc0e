"""Damaged copies of model files: every field with every kind of bad value, and damage to a file as a whole.

`mutate_fields` yields the copies of a JSON file in which one field has a bad value, `damage_whole` those that
are no proper JSON objects.  test_damaged_files.py loads them.
"""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

_MARK = "to be replaced"
DEEP = 10_000  # levels of nesting

# Name -> a value's text in JSON, or in Python's dialect of it.
BAD_VALUES = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "half": "0.5",
    "billion": "1000000000",
    "float billion": "1e9",
    "400 digits": "9" * 400,
    "nan": "NaN",
    "infinity": "Infinity",
    "minus infinity": "-Infinity",
    "text": '"x"',
    "empty text": '""',
    "number as text": '"2"',
    "long text": '"' + "a" * 1_000_000 + '"',
    "surrogate": '"\\ud800"',
    "control characters": '"a\\n\\u001b[31mb"',
    "empty list": "[]",
    "list": "[1]",
    "list of null": "[null]",
    "empty object": "{}",
    "object": '{"x": 1}',
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"x":' * DEEP + "1" + "}" * DEEP,
}


def list_paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields in a JSON value; of a list only the first item."""
    if isinstance(tree, dict):
        items = list(tree.items())
    else:
        items = list(enumerate(tree))[:1] if isinstance(tree, list) else []
    found = []
    for name, value in items:
        found += [(*prefix, name), *list_paths(value, (*prefix, name))]
    return found


def get(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for name in path:
        tree = tree[name]
    return tree


def set_bad(tree: Any, path: tuple[Any, ...], text: str) -> bytes:
    """The text of a JSON file with a field's value replaced by `text`."""
    changed = copy.deepcopy(tree)
    get(changed, path[:-1])[path[-1]] = _MARK
    return json.dumps(changed).replace(f'"{_MARK}"', text).encode()


def remove(tree: Any, path: tuple[Any, ...]) -> bytes:
    """The text of a JSON file without a field."""
    changed = copy.deepcopy(tree)
    del get(changed, path[:-1])[path[-1]]
    return json.dumps(changed).encode()


def mutate_fields(
    tree: Any, paths: list[tuple[Any, ...]] | None = None
) -> Iterator[tuple[tuple[Any, ...], str, bytes]]:
    """Yield (path of the field, name of the bad value, the file's text) for every field and value."""
    for path in list_paths(tree) if paths is None else paths:
        for name, text in BAD_VALUES.items():
            yield path, name, set_bad(tree, path, text)


def damage_whole(tree: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield (name of the damage, the file's text) for files that are no JSON objects as they should be."""
    text = json.dumps(tree)
    first = next(iter(tree))
    yield "empty", b""
    yield "truncated", text[: len(text) // 2].encode()
    yield "byte-order mark", b"\xef\xbb\xbf" + text.encode()
    yield "UTF-16", text.encode("utf-16")
    yield "not UTF-8", text.encode().replace(b'"', b'"\xff', 1)
    yield "zeros", bytes(1000)
    yield "trailing text", text.encode() + b"x"
    yield "twice", f"{text[:-1]}, {json.dumps(first)}: {json.dumps([tree[first]])}}}".encode()
    for name in ("null", "text", "list", "nan", "deep list", "deep object"):
        yield f"{name} as a whole", BAD_VALUES[name].encode()


# --- GGUF --------------------------------------------------------------------------------------------


def pack_text(text: bytes | str) -> bytes:
    """A string of a GGUF file: its length in bytes, then the bytes."""
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def pack_value(value: Any) -> bytes:
    """A value of a GGUF file with its type: text, bool, int, float, or a list of one of them."""
    if isinstance(value, list):
        items = [pack_value(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", 5)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    if isinstance(value, str):
        return struct.pack("<I", 8) + pack_text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    return struct.pack("<Iq", 11, value)


BAD_PACKED = {
    "zero": pack_value(0),
    "negative": pack_value(-1),
    "billion": pack_value(10**9),
    "largest": struct.pack("<IQ", 10, 2**64 - 1),
    "true": pack_value(True),
    "half": pack_value(0.5),
    "float billion": pack_value(1e9),
    "nan": pack_value(math.nan),
    "infinity": pack_value(math.inf),
    "minus infinity": pack_value(-math.inf),
    "text": pack_value("x"),
    "empty text": pack_value(""),
    "long text": pack_value("a" * 1_000_000),
    "not UTF-8": struct.pack("<I", 8) + pack_text(b"a\xff"),
    "control characters": pack_value("a\n\x1b[31mb"),
    "endless text": struct.pack("<IQ", 8, 2**62) + b"a",
    "huge text": struct.pack("<IQ", 8, 2**33) + b"a",
    "empty list": pack_value([]),
    "list": pack_value([1]),
    "list of text": pack_value(["x"]),
    "endless list": struct.pack("<IIQ", 9, 5, 2**62),
    "huge list": struct.pack("<IIQ", 9, 5, 2**31),
    "endless list of text": struct.pack("<IIQ", 9, 8, 2**62),
    "deep list": struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * DEEP,
    "unknown type": struct.pack("<I", 77),
}


def write_gguf(pairs: dict[str, bytes], shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A GGUF file of packed values, and of a table of float32 tensors without their data."""
    blob = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(pairs))
    for key, value in pairs.items():
        blob += pack_text(key) + value
    for name, shape in shapes.items():
        blob += pack_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], 0, 0)
    return blob
