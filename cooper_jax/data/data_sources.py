"""Sources of problems: from the text of a flag to the files that are read.

1. `split_sources` splits a flag's text into sources, which commas separate.  A source may have a name for
   reports: NAME=SOURCE.
2. `find_source` finds the files of one source:

       train.jsonl, gs://BUCKET/train.parquet      a file, local or remote
       shards/*.parquet, gs://BUCKET/train-*       a glob (remote: in the last part of the address alone)
       FOLDER, FOLDER:CONFIG:SPLIT                 a folder of shards, or a clone of a hub data set
       my_rows.py:make_rows                        a function of the user's that returns rows
       openai/gsm8k, openai/gsm8k@REVISION:main:train, hf://datasets/OWNER/NAME/FILE
                                                   a data set of the Hugging Face hub (hub_datasets.py)

   A local file or folder of a name takes precedence over a hub data set of that name.
3. dataset_files.py chooses the files of a folder or a hub data set by config and split.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cooper_jax.data import dataset_files, hub_datasets
from cooper_jax.runtime import remote_files
from cooper_jax.settings.user_code import is_user_code


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One file of a source, on this machine."""

    path: Path
    display_name: str  # for messages: the address of a remote file, the path in a hub data set
    function: str = ""  # of a Python file, which returns the rows


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A source and its files."""

    text: str  # as the flag gives it
    name: str  # for reports
    files: tuple[DataFile, ...]
    revision: str = ""  # the commit of a hub data set


_NAMED_SOURCE = re.compile(r"([A-Za-z][\w.-]*)=(.+)")
_GLOB = re.compile(r"[*?\[]")


def split_sources(text: str) -> list[str]:
    """Split the text of a flag into the texts of its sources.

    Raises ValueError for an empty source.
    """
    # The name of a local file may contain a comma.
    if not text or _exists(text):
        return [text] if text else []
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise ValueError(f"{text!r}: there is an empty source between the commas")
    return parts


def check_names(sources: Sequence[DataSource]) -> None:
    """Raise ValueError if two sources have one name, by which reports tell them apart."""
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise ValueError(
                f"two sources are called {source.name!r}: name them, as in "
                f"first={sources[names.index(source.name)].text}"
            )


def may_be_hub_source(text: str) -> bool:
    """True for a source that has the form of a hub id, whether or not a local file has that name."""
    match = _NAMED_SOURCE.fullmatch(text)
    if is_user_code(text):
        return False
    return any(hub_datasets.parse_id(place) is not None for place in (text, match[2] if match else text))


def parse_hub_source(text: str) -> hub_datasets.HubId | None:
    """The hub id of a source; None if it has not the form of one, or if there is such a local file or folder."""
    place = _split_name(text)[1]
    return None if is_user_code(place) or _finds_local(place) else hub_datasets.parse_id(place)


def find_source(text: str, split: str, revision: str = "") -> DataSource:
    """Find the files of a source.

    Args:
      text: the source's text, with or without a name.
      split: the split of a folder or hub data set whose text names none.
      revision: the commit of a hub data set, which takes precedence over that of the text.

    Raises FileNotFoundError for a place that does not exist, ValueError for a folder or data set whose files
    cannot be chosen or downloaded, and OSError for an address that cannot be reached.
    """
    name, place = _split_name(text)
    if hub_id := parse_hub_source(text):
        files, commit = hub_datasets.fetch_files(hub_id, split, revision)
        display_name = f"{hub_id.repo}@{commit[:8]}"
        found = [DataFile(path, f"{display_name}/{inner}") for inner, path in files.items()]
        return DataSource(text, name or hub_id.repo.rsplit("/", 1)[1], tuple(found), commit)
    return DataSource(text, name or _make_name(place), tuple(_find_files(place, split)))


def _split_name(text: str) -> tuple[str, str]:
    """Split NAME=SOURCE into (name, source); the name is "" if there is none."""
    match = _NAMED_SOURCE.fullmatch(text)
    return ("", text) if match is None or _exists(text) else (match[1], match[2])


def strip_name(text: str) -> str:
    """Remove the name from the text of a source."""
    return _split_name(text)[1]


def _exists(place: str) -> bool:
    return not remote_files.is_remote(place) and Path(place).expanduser().exists()


def _finds_local(place: str) -> bool:
    """True for a place on this machine: a path that exists, with or without config and split, or a glob."""
    if remote_files.is_remote(place):
        return False
    folder = Path(place.split(":")[0]).expanduser()
    return _exists(place) or _GLOB.search(place) is not None or folder.is_dir()


def _make_name(place: str) -> str:
    """Make the name of a source that has none: of its file without suffix, or of its folder."""
    name = place.split(":")[0] if not remote_files.is_remote(place) else place
    parts = [part for part in name.rstrip("/").split("/") if part]
    # A glob is named after its folder: shards/train-*.parquet is `shards`.
    last = next((part for part in reversed(parts) if not _GLOB.search(part)), name)
    return dataset_files.remove_suffix(last)


def _find_files(place: str, split: str) -> list[DataFile]:
    """Find the files of a local or remote place that is no hub data set."""
    if remote_files.is_remote(place):
        return _find_remote_files(place.rstrip("/"), split)

    if is_user_code(place):
        file, _, function = place.rpartition(":")
        return [DataFile(Path(file), place, function)]

    # A folder may have config and split behind it; a path that exists as it is has none.
    folder, choice = place, ""
    if not _exists(place):
        folder, _, choice = place.partition(":")
    path = Path(folder).expanduser()
    if path.is_dir():
        return _list_folder(path, str(path), choice, split)
    if path.is_file() and not choice:
        return [DataFile(path, str(path))]

    if _GLOB.search(place):
        found = sorted(glob.glob(os.path.expanduser(place), recursive=True))
        files = [DataFile(Path(name), name) for name in found if Path(name).is_file()]
        if not files:
            raise FileNotFoundError(f"{place}: no file matches it")
        return files
    raise FileNotFoundError(
        f"{place}: there is no such file (the name of a tensorflow-datasets data set needs format=tfds; a data "
        "set of the Hugging Face hub is OWNER/NAME)"
    )


def _find_remote_files(address: str, split: str) -> list[DataFile]:
    """Find the files of an address: a file, a folder, or a glob in the last part."""
    parent, _, pattern = address.rpartition("/")
    if _GLOB.search(parent):
        raise ValueError(f"{address}: a remote glob can only be in the last part of the address")
    if _GLOB.search(pattern):
        # The store is searched recursively; only files directly in the folder match, as on a local disk.
        folder = remote_files.fetch_local(parent, (pattern,))
        files = [
            DataFile(path, f"{parent}/{path.name}") for path in sorted(folder.iterdir()) if path.is_file()
        ]
        if not files:
            raise FileNotFoundError(f"{address}: no file matches it")
        return files

    patterns = [f"*{suffix}" for suffix in dataset_files.ALL_SUFFIXES]
    path = remote_files.fetch_local(address, (*patterns, dataset_files.CARD))
    return _list_folder(path, address, "", split) if path.is_dir() else [DataFile(path, address)]


def _list_folder(folder: Path, display_name: str, choice: str, split: str) -> list[DataFile]:
    """Choose the files of a folder.  choice: "CONFIG", "CONFIG:SPLIT" or "" behind the folder's name."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    config, given_split = dataset_files.split_choice(choice)
    chosen = dataset_files.choose_files(
        names, dataset_files.read_card(folder), display_name, config, given_split, split
    )
    return [DataFile(folder / name, f"{display_name}/{name}") for name in chosen]
