"""Readers of files and prepared data sets, row by row, each row with its location for messages.

Formats: JSON lines (.jsonl or .json with one object a line, also .gz), parquet, and tensorflow-datasets.  A
row that cannot be read raises ValueError with its location.  Blank lines are skipped, but counted in line
numbers.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cooper_jax.runtime import remote_files
from cooper_jax.runtime.extras import import_extra

Row = Mapping[str, Any]
LocatedRow = tuple[str, str, Row]  # location (file and line, for messages), id, row

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_file_rows(source: str) -> Iterator[LocatedRow]:
    """Rows of a .parquet file or of JSON lines, local or remote (gs://...).

    Raises FileNotFoundError, OSError for an address that cannot be reached, or ValueError for a malformed
    row.
    """
    path = remote_files.fetch_local(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file (the name of a data set needs format=tfds)")
    shown = source if remote_files.is_remote(source) else str(path)
    if path.suffix == ".parquet":
        yield from _read_parquet_rows(path, shown)
    else:
        yield from _read_json_rows(path, shown)


def _read_json_rows(path: Path, shown: str) -> Iterator[LocatedRow]:
    """Rows of JSON lines.  shown: the file's name in messages."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{shown}:{number}", f"{stem}:{number}", _parse_json_object(line)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{shown}:{number + 1}: the gzip file is damaged: {error}") from error
    except _BadLine as error:
        raise ValueError(f"{shown}:{number}: {error}") from error


class _BadLine(Exception):
    """A malformed line, without its location, which the reader adds."""


def _parse_json_object(line: bytes) -> Row:
    """The object of one line.  Raises _BadLine."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _BadLine(f"byte {error.start} is not UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:  # bad JSON, a number of thousands of digits, deep nesting
        raise _BadLine(f"not JSON ({error}); one object a line is expected") from error
    if not isinstance(row, dict):
        raise _BadLine(f"a {type(row).__name__}, not an object; one object a line is expected")
    return row


def _read_parquet_rows(path: Path, shown: str) -> Iterator[LocatedRow]:
    """Rows of a parquet file, read in batches so that a large file need not fit into memory."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{shown}: row {number}", f"{path.stem}:{number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shown}: row {number + 1}: not readable as parquet: {error}") from error


def read_tfds_rows(name: str, tfds_dir: str, split: str) -> Iterator[LocatedRow]:
    """Rows of a prepared tensorflow-datasets data set.

    Reading needs no tensorflow, preparing does.  Raises ValueError where the data set is missing or not in a
    format with random access, ImportError without tensorflow-datasets.

    Args:
      name: of the data set.
      tfds_dir: the folder of prepared data sets; "" for the library's default.
      split: such as "train" or "train[:100]".
    """
    tfds = import_extra("tensorflow_datasets", "tfds")
    folder = tfds_dir or "the default folder of tensorflow-datasets"
    try:
        rows = tfds.data_source(name, split=split, data_dir=tfds_dir or None, download=False)
    except (ValueError, AssertionError, OSError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{name}, split {split!r}, cannot be read from {folder}: {first}; prepare it there in the "
            "array_record format (that needs tensorflow), or set --config.data.tfds_dir and .split"
        ) from error
    for i, row in enumerate(rows):
        location = f"{name}[{split}] in {folder}: example {i}"
        try:
            decoded = {key: _to_plain_value(value) for key, value in row.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{location}: byte {error.start} is not UTF-8 ({error.reason})") from error
        yield location, f"{name}/{split}:{i}", decoded


def _to_plain_value(value: Any) -> Any:
    """A tensorflow-datasets value as JSON would give it: text for bytes, lists for arrays, Python scalars."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_to_plain_value(v) for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def get_field(row: Row, key: str) -> Any:
    """A row's field.  Raises ValueError where it is missing."""
    if key not in row:
        raise ValueError(f"field {key!r} is missing; the row has {sorted(row)}")
    return row[key]


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD in place of each lone surrogate.

    JSON can contain one (`\\ud83d`), for example from a server that truncates a reply inside an emoji.  It
    has no UTF-8 form, and tokenizers raise on it.
    """
    return _SURROGATE.sub("\ufffd", text)


def get_text(row: Row, key: str) -> str:
    """A row's field that must be text.  Raises ValueError for other types and text without a UTF-8 form."""
    value = get_field(row, key)
    if not isinstance(value, str):
        raise ValueError(f"field {key!r} is {type(value).__name__} {value!r}: it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {key!r} contains half a surrogate pair: {error.reason}") from error
    return value
