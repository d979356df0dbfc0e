"""The data of a report: everything that the page shows, as one JSON value.

`collect_report` reads all sources.  `encode_report` thins curves out, chooses samples and compares configs; both
rules are stated in the result (`rules`), and the page shows them.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cooper_jax import __version__
from cooper_jax.configs import base
from cooper_jax.report import curves, hacking, samples, sources
from cooper_jax.report.evaluations import read_evaluation
from cooper_jax.report.reward_training import read_reward_training
from cooper_jax.report.sources import Source
from cooper_jax.report.training import read_training
from cooper_jax.runtime.metrics import to_jsonable
from cooper_jax.runtime.stored_config import flatten_config, to_plain_config
from cooper_jax.settings.config_fields import list_fields

READERS = {
    sources.TRAINING: read_training,
    sources.REWARD_TRAINING: read_reward_training,
    sources.EVALUATION: read_evaluation,
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The sources of a report with what was read from each, in one order."""

    title: str
    sources: tuple[Source, ...]
    runs: tuple[dict[str, Any], ...]  # results of READERS


def collect_report(places: Sequence[str], title: str = "") -> Report:
    """Read the folders that a report is about.

    title: "": the folders' names.

    Raises ValueError, naming folder, file or line, for what cannot be read, and if no folder holds anything to
    show yet.
    """
    found = sources.find_sources(places)
    runs = [READERS[source.kind](source) for source in found]
    if not any(run["points"] or run["kind"] == sources.EVALUATION for run in runs):
        missing = ", ".join(str(source.folder / sources.METRICS) for source in found)
        raise ValueError(f"{missing}: no step is logged yet; make the report after the first step")
    names = [sources.remote_files.to_path(place).name for place in places]
    return Report(title or ", ".join(names), tuple(found), tuple(runs))


def encode_report(report: Report) -> dict[str, Any]:
    """Make the JSON value that the page embeds.  Raises ValueError for samples that cannot be read."""
    limit = curves.choose_limit(sum(len(run["points"]) for run in report.runs))
    with_samples = [source.kind != sources.REWARD_TRAINING for source in report.sources]
    share = samples.TEXT_BYTES // max(sum(with_samples), 1)

    encoded_runs = []
    for source, run in zip(report.sources, report.runs, strict=True):
        encoded = {name: value for name, value in run.items() if name not in ("points", "config")}
        encoded["series"] = curves.encode_curves(run["points"], limit)
        if source.kind == sources.TRAINING:
            encoded["samples"] = samples.choose_samples(source.folder, share).to_json()
        elif source.kind == sources.EVALUATION:
            encoded["samples"] = samples.choose_items(source.folder, share).to_json()
        encoded_runs.append(encoded)

    return to_jsonable(
        {
            "title": report.title,
            "version": __version__,
            "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "runs": encoded_runs,
            "config": compare_configs(report),
            "rules": {"points": limit, "drop": hacking.DROP, "text_bytes": share},
        }
    )


def compare_configs(report: Report) -> list[dict[str, Any]]:
    """List the fields of all runs: {name, comment, base, changed: index of a run -> value}, values as JSON text.

    `changed` has the runs whose value is not that of configs/base.py.  `base` is None for a field that is not in
    that file: a setting of an evaluation, or a field of another version.
    """
    base_config = base.get_config()
    base_values = flatten_config(to_plain_config(base_config))
    comments = {field.name: field.comment for field in list_fields(base_config)}

    known: dict[str, dict[int, str]] = {name: {} for name in base_values}
    for index, run in enumerate(report.runs):
        values = flatten_config(run["config"])
        values.pop("format", None)
        for name, value in values.items():
            if name not in base_values or value != base_values[name]:
                known.setdefault(name, {})[index] = _show(value)
    return [
        {
            "name": name,
            "comment": comments.get(name, ""),
            "base": _show(base_values[name]) if name in base_values else None,
            "changed": changed,
        }
        for name, changed in known.items()
    ]


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def count_kinds(report: Report) -> Mapping[str, int]:
    """The number of sources of each kind."""
    counts: dict[str, int] = {}
    for source in report.sources:
        counts[source.kind] = counts.get(source.kind, 0) + 1
    return counts
