"""The folders that a report is about: training runs, studies, trainings of reward models, and evaluations.

1. `find_sources` recognises each folder by its files.  A study stands for the runs of its arms.
2. `read_rows` and `read_object` read the JSON files of a folder, which a job may still be writing.

A folder may be under gs://, except a study's.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from cooper_jax.runtime import output_folder, remote_files
from cooper_jax.study import records

Folder: TypeAlias = Path | epath.Path

TRAINING, REWARD_TRAINING, EVALUATION = "training", "reward_training", "evaluation"

# Files by which a folder is recognised.
CONFIG, METRICS, SAMPLES, REPORT = "config.json", "metrics.jsonl", "samples.jsonl", "report.json"
ITEMS, RESULTS, SETTINGS = "items.jsonl", "results.json", output_folder.SETTINGS


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder that a report shows, with its names in the report."""

    kind: str  # TRAINING, REWARD_TRAINING or EVALUATION
    folder: Folder
    label: str  # unique in the report
    group: str  # runs of one group have one colour: the arm in a study, else the label
    about: str = ""  # what the arm is


def find_sources(places: Sequence[str]) -> list[Source]:
    """Find what each place is; a study is replaced by its runs, in the order of its arms.

    Raises ValueError, naming the place, for one that is not there, is given twice or holds none of the known
    files.
    """
    found: dict[Folder, list[Source]] = {}
    for place in places:
        folder = remote_files.to_path(place)
        if not folder.exists():
            raise ValueError(f"{place}: there is no such folder")
        if not folder.is_dir():
            raise ValueError(f"{place} is a file: give the folder that it is in")
        if folder in found:
            raise ValueError(f"{folder} is given twice")
        found[folder] = _recognise(folder)

    runs = Counter(str(source.folder) for sources in found.values() for source in sources)
    if twice := [folder for folder, count in runs.items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice: by itself, and as part of its study")
    return _tell_apart(found)


def _recognise(folder: Folder) -> list[Source]:
    """The sources in a folder."""
    if isinstance(folder, Path) and (folder / "arms").is_dir():
        return _list_study_runs(folder)
    name = folder.name
    if (folder / CONFIG).exists():
        return [Source(_recognise_run(folder), folder, name, name)]
    if (folder / ITEMS).exists() or (folder / RESULTS).exists():
        return [Source(EVALUATION, folder, name, name)]
    raise ValueError(
        f"{folder} holds neither {CONFIG} (a run of launch/train.py or launch/train_rm.py), nor arms/ (a study), "
        f"nor {ITEMS} (an evaluation)"
    )


def _recognise_run(folder: Folder) -> str:
    """TRAINING or REWARD_TRAINING, by the names of the metrics."""
    # Every update of a reward model's training has these metrics, and no step of a training run has.
    for row in read_rows(folder / METRICS):
        return REWARD_TRAINING if any(name.startswith("train_rm/") for name in row) else TRAINING
    return TRAINING


def _list_study_runs(study: Path) -> list[Source]:
    """The runs of a study that have begun, arm by arm.  Raises ValueError if there is none."""
    sources = []
    for name, arm in records.read_arms(study / "arms").items():
        for folder in sorted(study.glob(f"seed_*/{name}"), key=_read_seed):
            if (folder / CONFIG).exists():
                label = f"{name}, seed {_read_seed(folder)}"
                sources.append(Source(TRAINING, folder, label, name, arm["about"]))
    if not sources:
        raise ValueError(f"{study}: no run of the study has begun yet")
    return sources


def _read_seed(folder: Path) -> int:
    return int(folder.parent.name.removeprefix("seed_"))


def _tell_apart(found: Mapping[Folder, Sequence[Source]]) -> list[Source]:
    """Put the places' names before the names of runs that occur in several places.

    found: place -> its sources.
    """
    counts: Counter[str] = Counter()
    for sources in found.values():
        counts.update({name for source in sources for name in (source.label, source.group)})

    told_apart = []
    for folder, sources in found.items():
        is_shared = any(counts[name] > 1 for source in sources for name in (source.label, source.group))
        place = _shorten(folder, list(found))
        for source in sources:
            if is_shared and source.folder == folder:
                source = dataclasses.replace(source, label=place, group=place)
            elif is_shared:
                label, group = f"{place}: {source.label}", f"{place}: {source.group}"
                source = dataclasses.replace(source, label=label, group=group)
            told_apart.append(source)
    return told_apart


def _shorten(folder: Folder, others: Sequence[Folder]) -> str:
    """The end of a path that tells it from the others, with as few parts as possible."""
    for count in range(1, len(folder.parts)):
        tail = folder.parts[-count:]
        if sum(other.parts[-count:] == tail for other in others) == 1:
            return "/".join(tail)
    return str(folder)


# --- files --------------------------------------------------------------------------------------------------


def read_rows(path: Folder) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON-lines file one by one; none if there is no file.

    A last line without its line break is left out: its job is writing it, or was killed.  Raises ValueError,
    naming file and line, for any other line that is not an object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): fix or delete the line"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object: fix or delete the line")
            yield row


def read_object(path: Folder) -> dict[str, Any]:
    """Read a JSON object; empty if there is no file.  Raises ValueError, naming the file, for anything else."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fix it, or move it away") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a JSON object: fix it, or move it away")
    return dict(content)
