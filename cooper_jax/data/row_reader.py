"""Rows of files and prepared data sets, each with the place that it came from.

JSON lines (.jsonl or .json with one object a line, also .gz), parquet, and tensorflow-datasets.  What cannot be
read raises ValueError naming the place; blank lines are passed over and counted as lines.
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
Located = tuple[str, str, Row]  # where (for messages), id, row

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_file_rows(source: str) -> Iterator[Located]:
    """Rows of a .parquet file, or JSON lines, here or at an address (gs://...).

    Raises FileNotFoundError, OSError for an address that cannot be reached, or ValueError for a malformed row.
    """
    path = remote_files.fetch_local(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file (a data set's name needs format=tfds)")
    shown = source if remote_files.is_remote(source) else str(path)
    yield from _parquet_rows(path, shown) if path.suffix == ".parquet" else _json_rows(path, shown)


def _json_rows(path: Path, shown: str) -> Iterator[Located]:
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{shown}:{number}", f"{stem}:{number}", _json_object(line)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{shown}:{number + 1}: the gzip file is damaged: {error}") from error
    except _BadLine as error:
        raise ValueError(f"{shown}:{number}: {error}") from error


class _BadLine(Exception):
    """What is wrong with a line; the reader adds where it is."""


def _json_object(line: bytes) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _BadLine(f"byte {error.start} is not UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:  # bad JSON, a number of thousands of digits, deep nesting
        raise _BadLine(f"not JSON ({error}); one object a line is expected") from error
    if not isinstance(row, dict):
        raise _BadLine(f"a {type(row).__name__}, not an object; one object a line is expected")
    return row


def _parquet_rows(path: Path, shown: str) -> Iterator[Located]:
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


def read_tfds_rows(name: str, tfds_dir: str, split: str) -> Iterator[Located]:
    """Rows of a prepared data set; "" as tfds_dir is the library's default folder.

    Reading needs no tensorflow; preparing does.  Raises ValueError where the data set is not there or not in a
    format with random access, ImportError without tensorflow-datasets.
    """
    tfds = import_extra("tensorflow_datasets", "tfds")
    place = tfds_dir or "the default folder of tensorflow-datasets"
    try:
        rows = tfds.data_source(name, split=split, data_dir=tfds_dir or None, download=False)
    except (ValueError, AssertionError, OSError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{name}, split {split!r}, cannot be read from {place}: {first}; prepare it there in the "
            "array_record format (that needs tensorflow), or set --config.data.tfds_dir and .split"
        ) from error
    for i, row in enumerate(rows):
        where = f"{name}[{split}] in {place}: example {i}"
        try:
            decoded = {key: _plain(value) for key, value in row.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: byte {error.start} is not UTF-8 ({error.reason})") from error
        yield where, f"{name}/{split}:{i}", decoded


def _plain(value: Any) -> Any:
    """A tensorflow-datasets value as JSON would have it: bytes are text, arrays lists, scalars Python's."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def get_field(row: Row, key: str) -> Any:
    """A row's field; ValueError where it has none of that name."""
    if key not in row:
        raise ValueError(f"field {key!r} is missing; the row has {sorted(row)}")
    return row[key]


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair.

    JSON can spell one (`\\ud83d`), as servers do that cut a reply inside an emoji; it has no UTF-8 form, and
    tokenizers raise on it.
    """
    return _SURROGATE.sub("\ufffd", text)


def get_text(row: Row, key: str) -> str:
    """A field that must be text, and such as can be written as UTF-8; ValueError otherwise."""
    value = get_field(row, key)
    if not isinstance(value, str):
        raise ValueError(f"field {key!r} is {type(value).__name__} {value!r}: must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {key!r} holds half a surrogate pair: {error.reason}") from error
    return value
