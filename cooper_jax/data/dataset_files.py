"""The data files of a data set's folder, chosen by config and split.

1. The data set's card (README.md) may list the files of each config and split, as on the Hugging Face hub.
2. Otherwise the files directly in the folder count or, without any, those in its folder `data`; of a config,
   those in the folder of its name.  The split is a word in the file's name: train, validation or test.  Files
   without such a word belong to the split `train`, if no file has one.

All functions but `read_card` are pure: names in, names out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cooper_jax.data.row_reader import SUFFIXES

CARD = "README.md"
ALL_SUFFIXES = (*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES if suffix != ".parquet"))

# Words in file names -> the split.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# Files of a folder that describe its data.
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# train-00000-of-00002.parquet
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\..*)")

Configs = dict[str, dict[str, list[str]]]  # config -> split -> patterns of file names


def remove_suffix(name: str) -> str:
    """A file's name without the suffix of a data file."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in ALL_SUFFIXES if lower.endswith(suffix)), name)


def split_choice(text: str) -> tuple[str, str]:
    """Split "CONFIG:SPLIT" into (config, split), "" for what is missing.  Raises ValueError for a third part."""
    config, _, split = text.partition(":")
    if ":" in split:
        raise ValueError(f"{text!r}: only a config and a split may follow the name, as in NAME:main:train")
    return config, split


def read_card(folder: Path) -> Mapping[str, Any]:
    """Read the metadata of a data set's card; empty without a card or metadata.

    Raises ValueError for metadata that is not YAML.
    """
    from huggingface_hub import metadata_load

    card = folder / CARD
    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except Exception as error:  # of the YAML library
        raise ValueError(f"{card}: its metadata cannot be read: {' '.join(str(error).split())}") from error


def choose_files(
    names: Sequence[str],
    card: Mapping[str, Any],
    display_name: str,
    config: str,
    split: str,
    default_split: str,
) -> list[str]:
    """Choose the files of one config and split, in the order of their names.

    Args:
      names: all files of the folder, as paths in it.
      card: the metadata of the data set's card.
      display_name: of the data set, for messages.
      config: "" for the only one or the default one.
      split: "" for `default_split`.

    Raises ValueError, with the configs or splits that exist, if the choice is not clear or finds no file, if
    files have different suffixes, and if a shard is missing.
    """
    data_names = [n for n in sorted(names) if n.lower().endswith(ALL_SUFFIXES) and _is_data(n)]
    splits = _find_splits(data_names, card, display_name, config)
    wanted = split or default_split

    # Without splits in the names of its files, a folder is all one split, whichever is asked for by default.
    if split in ("", "train") and list(splits) == [""]:
        wanted = ""
    if wanted not in splits:
        found = ", ".join(s or "train" for s in splits) or "none"
        raise ValueError(
            f"{display_name}: it has no split {wanted!r}; its splits are {found}: name one behind the config, as "
            f"in {display_name}:{config or 'default'}:{next(iter(splits), '') or 'train'}"
        )

    chosen = splits[wanted]
    suffixes = {next(suffix for suffix in ALL_SUFFIXES if name.lower().endswith(suffix)) for name in chosen}
    if len(suffixes) > 1:
        raise ValueError(
            f"{display_name}: its files end in {' and '.join(sorted(suffixes))}, which may be the same rows twice: "
            "name files with a glob"
        )
    _check_shards(chosen, display_name)
    return chosen


def _is_data(name: str) -> bool:
    """False for files that describe a data set, and for hidden files and folders."""
    parts = name.split("/")
    return parts[-1] not in _DESCRIPTIONS and not any(part.startswith(".") for part in parts)


def _find_splits(
    names: Sequence[str], card: Mapping[str, Any], display_name: str, config: str
) -> dict[str, list[str]]:
    """The files of a config by split; the split is "" for a folder without splits."""
    configs = _read_configs(card, names, display_name)
    if configs:
        chosen = config or _choose_default(card, configs, display_name)
        if chosen not in configs:
            raise ValueError(
                f"{display_name}: it has no config {chosen!r}; its configs are {', '.join(configs)}"
            )
        matched = {split: _match(names, patterns) for split, patterns in configs[chosen].items()}
        return {split: files for split, files in matched.items() if files}

    # Without a list of files: by folder and by words in the names.
    folders = [f"{config}/"] if config and config != "default" else ["", "data/"]
    found: list[str] = []
    for folder in folders:
        found = found or [n for n in names if n.startswith(folder) and "/" not in n.removeprefix(folder)]
    if not found:
        others = ", ".join(sorted({n.rpartition("/")[0] for n in names} - {""})[:5])
        hint = f"; there are files in {others}: name one as {display_name}:FOLDER" if others else ""
        # NAME:test names a config; a reader may have meant the split.
        if config in _SPLIT_WORDS.values():
            hint = f"; for the split {config!r} write {display_name}:default:{config}"
        places = " or ".join(folder or "it" for folder in folders)
        raise ValueError(f"{display_name}: there is no data file in {places}{hint}")

    splits: dict[str, list[str]] = {}
    for name in found:
        splits.setdefault(_find_split_word(name), []).append(name)
    if len(splits) > 1:
        splits.pop("", None)  # files beside those of the splits
    return splits


def _find_split_word(name: str) -> str:
    """The split that a file's name states; "" if it states none."""
    words = re.split(r"[^a-z]+", remove_suffix(name.rsplit("/", 1)[-1]).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")


def _read_configs(card: Mapping[str, Any], names: Sequence[str], display_name: str) -> Configs:
    """The configs that a card lists with their files.

    names: all data files.  Raises ValueError for a list of files without a split or a path.
    """
    configs: Configs = {}
    listed = card.get("configs")
    for entry in listed if isinstance(listed, list) else ():
        if not isinstance(entry, Mapping):
            continue
        files = entry.get("data_files")
        if files is None:
            # A folder, whose files state their splits.
            if folder := str(entry.get("data_dir") or "").strip("/"):
                files = {}
                for name in _match(names, [folder]):
                    files.setdefault(_find_split_word(name) or "train", []).append(name)
            else:
                continue
        # Files without a split are those of train.
        if isinstance(files, str) or (isinstance(files, list) and all(isinstance(f, str) for f in files)):
            files = {"train": files}
        elif isinstance(files, list):
            if not all(isinstance(f, Mapping) and "split" in f and "path" in f for f in files):
                raise ValueError(
                    f"{display_name}: {CARD} lists data_files {files}: each needs a split and a path"
                )
            files = {f["split"]: f["path"] for f in files}
        configs[str(entry.get("config_name", "default"))] = {
            str(split): [paths] if isinstance(paths, str) else list(paths) for split, paths in files.items()
        }
    return configs


def _choose_default(card: Mapping[str, Any], configs: Configs, display_name: str) -> str:
    """The config that is read if none is named.  Raises ValueError if this is not clear."""
    if len(configs) == 1:
        return next(iter(configs))
    marked = [entry.get("config_name") for entry in card["configs"] if entry.get("default") is True]
    if marked or "default" in configs:
        return str((marked or ["default"])[0])
    raise ValueError(
        f"{display_name}: it has the configs {', '.join(configs)}: name one, as in "
        f"{display_name}:{next(iter(configs))}"
    )


def _match(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern: `*` within one part of a path, `**/` for any folders."""
    expressions = []
    for pattern in patterns:
        pieces = re.split(r"(\*\*/|\*|\?)", pattern.removeprefix("./"))
        wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
        expressions.append("".join(wild.get(piece) or re.escape(piece) for piece in pieces))
    # A pattern may be a folder.
    combined = re.compile("|".join(f"(?:{e}(?:/[^/]*)?)" for e in expressions))
    return [name for name in names if combined.fullmatch(name)]


def _check_shards(names: Sequence[str], display_name: str) -> None:
    """Raise ValueError if one of several numbered shards is missing, as after an interrupted download."""
    numbers: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            numbers.setdefault((match[1], int(match[3]), match[4]), set()).add(int(match[2]))
    for (stem, count, suffix), found in numbers.items():
        if missing := sorted(set(range(count)) - found):
            raise ValueError(
                f"{display_name}: of {count} shards {stem}-*{suffix} number {missing[0]} is missing: download it "
                "again"
            )
