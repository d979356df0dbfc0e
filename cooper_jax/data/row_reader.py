"""Readers of files and prepared data sets, row by row, each row with its location for messages.

Formats: JSON lines (.jsonl or .json with one object per line, also .gz), a .json file that holds one list of
objects (also .gz), parquet, tensorflow-datasets, and a function of the user's that returns rows (PATH.py:NAME).
A row that cannot be read raises ValueError with its location.  Blank lines are skipped, but counted in line
numbers.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cooper_jax.runtime import remote_files
from cooper_jax.runtime.extras import import_extra
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import describe_error, is_user_code, load_function, read_user_code

Row = Mapping[str, Any]
LocatedRow = tuple[str, str, Row]  # location (file and line, for messages), id, row

# Half of a UTF-16 surrogate pair, which Python allows in a str.
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_file_rows(source: str) -> Iterator[LocatedRow]:
    """Read the rows of a .parquet file, of JSON lines or of a JSON list, local or remote (gs://...).

    PATH.py:NAME names a function of the user's that returns the rows.

    Raises FileNotFoundError for a missing file, OSError for an address that cannot be reached, and ValueError
    for a malformed row.
    """
    if is_user_code(source):
        yield from _make_rows(source)
        return

    path = remote_files.fetch_local(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file (the name of a data set needs format=tfds)")
    # Messages name the remote address, not the local copy.
    display_name = source if remote_files.is_remote(source) else str(path)
    # Any other suffix, or none, is taken for JSON lines.
    if path.suffix == ".parquet":
        yield from _read_parquet_rows(path, display_name)
    elif _holds_list(path):
        yield from _read_json_list(path, display_name)
    else:
        yield from _read_json_rows(path, display_name)


def _make_rows(source: str) -> Iterator[LocatedRow]:
    """Call a function of the user's that takes no argument and returns rows.

    Raises ValueError for a function that cannot be imported or that raises, and for rows that are no mappings with
    text keys.
    """
    try:
        code = read_user_code(source, "rows")
        function = load_function(code, "rows")
    # The caller's message begins with the flag.
    except SetupError as error:
        raise ValueError(str(error)) from error
    number = 0  # of the row that was read last
    try:
        for number, row in enumerate(function(), start=1):
            if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
                raise TypeError(f"row {number} is {type(row).__name__}, not a dict with text keys")
            yield f"{code.label}: row {number}", f"{Path(code.path).stem}:{number}", row
    # A generator may raise anything.
    except Exception as error:
        raise ValueError(f"{code.label}: after {number} rows: {describe_error(error, code.path)}") from error


def _open_binary(path: Path) -> gzip.GzipFile | BinaryIO:
    """Open a file for reading, decompressed if its name ends in .gz."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _holds_list(path: Path) -> bool:
    """True for a .json file (also .json.gz) that begins with a list."""
    if not path.name.removesuffix(".gz").endswith(".json"):
        return False
    try:
        with _open_binary(path) as file:
            first = next((line for line in file if line.strip()), b"")
    # The reader of lines names the damage.
    except (gzip.BadGzipFile, zlib.error, EOFError):
        return False
    return first.lstrip().startswith(b"[")


def _read_json_list(path: Path, display_name: str) -> Iterator[LocatedRow]:
    """Read the objects of one JSON list.  display_name: the file's name in messages."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    try:
        with _open_binary(path) as file:
            rows = json.loads(file.read().decode())
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{display_name}: the gzip file is damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{display_name}: byte {error.start} is not UTF-8 ({error.reason})") from error
    # ValueError: invalid JSON, or a number with thousands of digits.  RecursionError: deep nesting.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{display_name}: not JSON ({error}); one list of objects is expected") from error

    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{display_name}: row {number}: a {type(row).__name__}, not an object")
        yield f"{display_name}: row {number}", f"{stem}:{number}", row


def _read_json_rows(path: Path, display_name: str) -> Iterator[LocatedRow]:
    """Read the rows of JSON lines.  display_name: the file's name in messages."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    number = 0  # of the line that was read last
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{display_name}:{number}", f"{stem}:{number}", _parse_json_object(line)
    # Decompression fails before the next line is read, and so before its number is counted.
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{display_name}:{number + 1}: the gzip file is damaged: {error}") from error
    except _BadLine as error:
        raise ValueError(f"{display_name}:{number}: {error}") from error


class _BadLine(Exception):
    """A malformed line; the reader adds its location to the message."""


def _parse_json_object(line: bytes) -> Row:
    """Parse the object on one line.  Raises _BadLine."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _BadLine(f"byte {error.start} is not UTF-8 ({error.reason})") from error
    # ValueError: invalid JSON, or a number with thousands of digits.  RecursionError: deep nesting.
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"not JSON ({error}); one object per line is expected") from error
    if not isinstance(row, dict):
        raise _BadLine(f"a {type(row).__name__}, not an object; one object per line is expected")
    return row


def _read_parquet_rows(path: Path, display_name: str) -> Iterator[LocatedRow]:
    """Read the rows of a parquet file in batches, because a large file may not fit into memory."""
    # Imported here, because the import is slow and most runs read no parquet.
    import pyarrow
    import pyarrow.parquet

    number = 0  # of the row that was read last
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{display_name}: row {number}", f"{path.stem}:{number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{display_name}: row {number + 1}: not readable as parquet: {error}") from error


def read_tfds_rows(name: str, tfds_dir: str, split: str) -> Iterator[LocatedRow]:
    """Read the rows of a prepared tensorflow-datasets data set.

    Reading does not need tensorflow; preparing a data set does.

    Args:
      name: the name of the data set.
      tfds_dir: the folder of prepared data sets; "" for the library's default.
      split: for example "train" or "train[:100]".

    Raises ValueError for a data set that is missing or whose format has no random access, and ImportError if
    tensorflow-datasets is not installed.
    """
    tfds = import_extra("tensorflow_datasets", "tfds")
    folder = tfds_dir or "the default folder of tensorflow-datasets"

    # `data_source` reads array_record files at random access, without tensorflow.
    try:
        rows = tfds.data_source(name, split=split, data_dir=tfds_dir or None, download=False)
    except (ValueError, AssertionError, OSError, NotImplementedError) as error:
        first_line = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{name}, split {split!r}, cannot be read from {folder}: {first_line}; prepare it there in the "
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
    """Convert a tensorflow-datasets value to JSON's types, so that the same parsers read it."""
    # Strings are stored as bytes, and numbers as NumPy scalars.
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
    """Replace each lone surrogate by U+FFFD.

    JSON can contain a lone surrogate (`\\ud83d`), for example from a server that truncates a reply inside an
    emoji.  It has no UTF-8 form, and tokenizers raise an error on it.
    """
    return _SURROGATE.sub("\ufffd", text)


def get_text(row: Row, key: str) -> str:
    """A row's text field.  Raises ValueError for other types and for text without a UTF-8 form."""
    value = get_field(row, key)
    if not isinstance(value, str):
        raise ValueError(f"field {key!r} is {type(value).__name__} {value!r}: it must be text")
    # Checked here, where the field is known: a tokenizer would raise an error without its location.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {key!r} contains half a surrogate pair: {error.reason}") from error
    return value
