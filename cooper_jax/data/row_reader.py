"""Readers of files and prepared data sets, row by row, each row with its location for messages.

Formats: JSON lines (.jsonl or .json with one object per line), a .json file that holds one list of objects,
.csv and .tsv with a header (all of these also as .gz), parquet, tensorflow-datasets, and a function of the
user's that returns rows (PATH.py:NAME).  A row that cannot be read raises ValueError with its location.  Blank
lines are skipped, but counted in line numbers.
"""

import codecs
import csv
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

# Endings of files that are read, each also with .gz except .parquet.
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# Longest field of a .csv file, in characters; the library's own limit is 131,072.
_MAX_CSV_FIELD = 2**27

# Endings of files that hold no text, which would otherwise be taken for JSON lines.
_ARCHIVES = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z")
_BINARIES = (".xlsx", ".xls", ".ods", ".arrow", ".feather", ".orc", ".pkl", ".pickle", ".npy", ".npz", ".h5")

# Half of a UTF-16 surrogate pair, which Python allows in a str.
_SURROGATE = re.compile("[\ud800-\udfff]")
# The place behind a carriage return that no line feed follows.
_LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")


def read_file_rows(source: str) -> Iterator[LocatedRow]:
    """Read the rows of a file in any format but tensorflow-datasets, local or remote (gs://...).

    PATH.py:NAME names a function of the user's that returns the rows.

    Raises FileNotFoundError for a missing file, OSError for an address that cannot be reached, and ValueError
    for a malformed row.
    """
    if is_user_code(source):
        yield from make_rows(source)
        return

    path = remote_files.fetch_local(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file (the name of a data set needs format=tfds)")
    # Messages name the remote address, not the local copy.
    yield from read_local_rows(path, source if remote_files.is_remote(source) else str(path))


def read_local_rows(path: Path, display_name: str) -> Iterator[LocatedRow]:
    """Read the rows of a local file as `read_file_rows` does.  display_name: the file's name in messages."""
    # Any other suffix of a text file, or none, is taken for JSON lines.
    suffix = find_suffix(path.name)
    if suffix in (*_ARCHIVES, *_BINARIES):
        fix = "unpack" if suffix in _ARCHIVES else "convert"
        raise ValueError(
            f"{display_name}: files that end in {suffix} are not read: {fix} it to {', '.join(SUFFIXES)} (each but "
            ".parquet also as .gz)"
        )
    if suffix == ".parquet":
        yield from _read_parquet_rows(path, display_name)
    elif suffix in (".csv", ".tsv"):
        yield from _read_csv_rows(path, display_name, "," if suffix == ".csv" else "\t")
    elif _holds_list(path):
        yield from _read_json_list(path, display_name)
    else:
        yield from _read_json_rows(path, display_name)


def make_rows(source: str) -> Iterator[LocatedRow]:
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
            yield f"{code.label}: row {number}", f"{Path(code.path).stem}:{number}", _convert_numpy(row)
    # A generator may raise anything.
    except Exception as error:
        raise ValueError(f"{code.label}: after {number} rows: {describe_error(error, code.path)}") from error


def _convert_numpy(value: Any) -> Any:
    """Arrays and numbers of NumPy as lists and numbers, at any depth: columns are JSON for a judge's process."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _convert_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_convert_numpy(item) for item in value]
    return value


def find_suffix(name: str) -> str:
    """The ending of a file's name in lower case, without a .gz behind it: .jsonl, .csv, ..."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _find_stem(path: Path) -> str:
    """A file's name without its ending, for the ids of rows."""
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return name.rsplit(".", 1)[0]


def _open_binary(path: Path) -> gzip.GzipFile | BinaryIO:
    """Open a file for reading, decompressed if its name ends in .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _holds_list(path: Path) -> bool:
    """True for a .json file (also .json.gz) that begins with a list."""
    if find_suffix(path.name) != ".json":
        return False
    try:
        with _open_binary(path) as file:
            first = next((line for line in file if line.strip()), b"")
    # The reader of lines names the damage.
    except (gzip.BadGzipFile, zlib.error, EOFError):
        return False
    return first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_json_list(path: Path, display_name: str) -> Iterator[LocatedRow]:
    """Read the objects of one JSON list.  display_name: the file's name in messages."""
    stem = _find_stem(path)
    try:
        with _open_binary(path) as file:
            text = file.read().removeprefix(codecs.BOM_UTF8).decode()
        rows = json.loads(text, object_pairs_hook=_make_object)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{display_name}: the gzip file is damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{display_name}: byte {error.start} is not UTF-8 ({error.reason})") from error
    except _BadLine as error:
        raise ValueError(f"{display_name}: {error}") from error
    # ValueError: invalid JSON, or a number with thousands of digits.  RecursionError: deep nesting.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{display_name}: not JSON ({error}); one list of objects is expected") from error

    for number, row in enumerate(rows, start=1):
        # Open-Reasoner-Zero publishes each row as a list of two objects, whose columns are then 0 and 1.
        if isinstance(row, list) and all(isinstance(item, dict) for item in row):
            row = {str(i): item for i, item in enumerate(row)}
        if not isinstance(row, dict):
            raise ValueError(f"{display_name}: row {number}: a {type(row).__name__}, not an object")
        yield f"{display_name}: row {number}", f"{stem}:{number}", row


def _read_json_rows(path: Path, display_name: str) -> Iterator[LocatedRow]:
    """Read the rows of JSON lines.  display_name: the file's name in messages."""
    stem = _find_stem(path)
    number = 0  # of the line that was read last
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{display_name}:{number}", f"{stem}:{number}", _parse_json_object(line)
    # Decompression fails before the next line is read, and so before its number is counted.
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{display_name}:{number + 1}: the gzip file is damaged: {error}") from error
    except _BadLine as error:
        raise ValueError(f"{display_name}:{number}: {error}") from error


class _BadLine(Exception):
    """A malformed line; the reader adds its location to the message."""


def _make_object(pairs: list[tuple[str, Any]]) -> Row:
    """An object of a JSON text.  Raises _BadLine for a repeated key, of which Python would keep the last one."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise _BadLine(f"an object repeats {repeated}: rename or remove one")
    return row


def _parse_json_object(line: bytes) -> Row:
    """Parse the object on one line.  Raises _BadLine."""
    try:
        row = json.loads(line.decode(), object_pairs_hook=_make_object)
    except UnicodeDecodeError as error:
        raise _BadLine(f"byte {error.start} is not UTF-8 ({error.reason})") from error
    # ValueError: invalid JSON, or a number with thousands of digits.  RecursionError: deep nesting.
    except (ValueError, RecursionError) as error:
        raise _BadLine(
            f"not JSON ({error}); one object per line is expected (a list of objects over several lines: in a file "
            "that ends in .json)"
        ) from error
    if not isinstance(row, dict):
        raise _BadLine(f"a {type(row).__name__}, not an object; one object per line is expected")
    return row


def _read_csv_rows(path: Path, display_name: str, delimiter: str) -> Iterator[LocatedRow]:
    """Read the rows of a file whose first line names the columns.  All values are text."""
    stem = _find_stem(path)
    csv.field_size_limit(_MAX_CSV_FIELD)
    rows, first_line = 0, 1
    try:
        with _open_binary(path) as file:
            # Strict: a quotation mark that never closes would otherwise swallow the rest of the file.
            reader = csv.reader(_decode_lines(file), delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(header) == 1 and ";" in header[0]:
                raise ValueError(
                    f"{display_name}:1: the columns are separated by semicolons: save it with commas, or with tabs "
                    "as .tsv"
                )
            # pandas writes its index as a first column without a name.
            has_index = len(header) > 1 and not header[0]
            if repeated := sorted({c for c in header if header.count(c) > 1}):
                raise ValueError(f"{display_name}:1: the header repeats {repeated}: rename or remove one")
            if "" in header[1:] or header == [""]:
                raise ValueError(
                    f"{display_name}:1: a column of the header {header} has no name: give it one"
                )
            first_line = reader.line_num + 1
            for fields in reader:
                # A field may contain line breaks; the location is the row's first line.
                line, first_line = first_line, reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise ValueError(
                        f"{display_name}:{line}: the row has {len(fields)} fields and the header {len(header)}"
                    )
                rows += 1
                named = dict(zip(header[has_index:], fields[has_index:], strict=True))
                yield f"{display_name}:{line}", f"{stem}:{rows}", named
    except csv.Error as error:
        raise ValueError(
            f"{display_name}:{first_line}: not readable as {find_suffix(path.name)}: {error}"
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{display_name}: the gzip file is damaged: {error}") from error
    except _BadLine as error:
        raise ValueError(f"{display_name}:{error}") from error


def _decode_lines(file: gzip.GzipFile | BinaryIO) -> Iterator[str]:
    """The lines of a file as text, without a byte order mark.  Raises _BadLine that begins with the line."""
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _BadLine(f"{number}: byte {error.start} is not UTF-8 ({error.reason})") from error
        # Old spreadsheets end lines with a carriage return alone.
        yield from filter(None, _LONE_RETURN.split(text.removeprefix("\ufeff") if number == 1 else text))


def _read_parquet_rows(path: Path, display_name: str) -> Iterator[LocatedRow]:
    """Read the rows of a parquet file in batches, because a large file may not fit into memory."""
    # Imported here, because the import is slow and most runs read no parquet.
    import pyarrow
    import pyarrow.parquet

    number = 0  # of the row that was read last
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{display_name}: the columns {repeated} occur twice: rename or remove one")
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


def has_field(row: Row, key: str) -> bool:
    """True if a row has a field, which may be nested: `reward_model.ground_truth`."""
    try:
        get_field(row, key)
    except ValueError:
        return False
    return True


def get_field(row: Row, key: str) -> Any:
    """A row's field.  Raises ValueError where it is missing.

    key: a column, or a path into one with dots: `reward_model.ground_truth`, `messages.0.content`.
    """
    if key in row:
        return row[key]
    value: Any = row
    path = key.split(".")
    for depth, part in enumerate(path):
        # An index of a list, or a key of an object.
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            outer = ".".join(path[:depth])
            found = sorted(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            owner = f"{outer!r} has" if outer else "the row has"
            raise ValueError(f"field {key!r} is missing; {owner} {found}")
    return value


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
    check_encodable(value, key)
    return value


def check_encodable(text: str, key: str) -> None:
    """Raise ValueError for text without a UTF-8 form.  key: the field."""
    # Checked here, where the field is known: a tokenizer would raise an error without its location.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {key!r} contains half a surrogate pair: {error.reason}") from error
