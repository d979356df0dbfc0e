"""The config stored in a run directory, and the fields that a resumed run may change."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.runtime.metrics import to_jsonable
from cooper_jax.settings.renamed_flags import translate_settings

# Format of run directories, stored in config.json.  To be raised with a change after which older ones cannot
# be read or resumed.
FORMAT = 1

# Fields that a resumed run may change; a name that ends in a dot stands for its whole section.  They decide
# how long, how fast or where a run computes, but not its results (a mesh only changes the last bits of sums).
CHANGEABLE_FIELDS = (
    # Length of the run, and its files.
    "name",
    "steps",
    "run_dir",
    "resume",
    "resume_step",
    "overlap",
    "profile",
    "faults",
    "faults_in_a_row",
    "idle_steps",
    "hacking_guard",
    "hacking_anchor",
    "checkpoint.",
    "log.",
    # Devices, batches and programs.
    "mesh.",
    "policy.microbatch",
    "policy.packing",
    "policy.remat",
    "policy.share_prompts",
    "reward.microbatch",
    "reward.packing",
    "reward.remat",
    "rollout.max_rows",
    "rollout.memory_gib",
    "rollout.weight_placement",
    "rollout.kernels",
    "rollout.segment",
    # Worker processes and servers.
    "rule.workers",
    "rule.timeout",
    "rule.step_budget",
    "rule.memory_mb",
    "reward.function_timeout",
    "assistant.url",
    "assistant.key_env",
    "assistant.concurrency",
    "assistant.timeout",
    "assistant.probe",
    "assistant.start_timeout",
    "assistant.retries",
    "assistant.fields",
    # Sections of other commands, which a training run does not read.
    "judge.",
    "source.",
    "annotate.",
    "benchmark.",
)


def read_stored_config(run_dir: Path | epath.Path, known: ConfigDict) -> dict[str, Any]:
    """Read the config of a run directory as nested dicts, without `format`.

    Fields that have another name or another type now are translated (settings/renamed_flags.py).

    Args:
      known: a config of this version, which has all fields.

    Raises FileNotFoundError without a config.json, and ValueError if it is not JSON, or was made by another
    version of this project.
    """
    stored = run_dir / "config.json"
    if not stored.exists():
        raise FileNotFoundError(f"{stored} is not there: {run_dir} is no run directory of launch/train.py")
    try:
        config = json.loads(stored.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{stored} is not JSON ({error}): fix it, or give another --config.run_dir"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{stored} is not a JSON object: fix it, or give another --config.run_dir")

    # Later and earlier versions need different advice.
    number = config.pop("format", None)
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{run_dir} was made by a later version of this project (format {number}, this one reads "
            f"{FORMAT}): use that version, or start a new run directory"
        )

    # A field that this version does not have shows an earlier version, too, even if the format is the same.
    fields = translate_settings(flatten_config(config))
    unknown = sorted(fields.keys() - flatten_config(to_plain_config(known)).keys())
    if unknown or number != FORMAT:
        reason = f"its format is {number or 'not stated'}, this one reads {FORMAT}"
        if unknown:
            reason = f"it has {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        raise ValueError(
            f"{run_dir} was made by an earlier version of this project ({reason}); start a new run directory"
        )
    return _nest(fields)


def _nest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten_config`."""
    tree: dict[str, Any] = {}
    for name, value in fields.items():
        *sections, leaf = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return tree


def flatten_config(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: dotted name -> value; lists are values."""
    fields = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            fields.update(flatten_config(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = value
    return fields


def to_plain_config(config: ConfigDict) -> dict[str, Any]:
    """Convert a config to the values that reading its JSON would give: dicts, lists, strings, numbers."""
    return to_jsonable(config.to_dict())


def must_stay(field: str) -> bool:
    """Tell whether a resumed run must keep the value of this field."""
    return not any(field == f or (f.endswith(".") and field.startswith(f)) for f in CHANGEABLE_FIELDS)


def config_hash(config: ConfigDict) -> str:
    """Return 16 hex digits of a hash of the fields that must stay.

    Two configs have the same hash if a run with one may resume with the other.
    """
    # Without those at their defaults, so that a field which a later version adds does not change the hash.
    defaults = _read_defaults()
    fields = {
        name: value
        for name, value in flatten_config(to_plain_config(config)).items()
        if must_stay(name) and value != defaults.get(name)
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _read_defaults() -> dict[str, Any]:
    """The values of configs/base.py: dotted name -> value."""
    return flatten_config(to_plain_config(base.get_config()))


def describe_changes(stored: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """Describe the fields that must stay but differ from the stored config, each with both values."""
    old, new = flatten_config(stored), flatten_config(to_plain_config(config))

    def show(fields: Mapping[str, Any], name: str) -> str:
        return json.dumps(fields[name]) if name in fields else "(absent)"

    # A later version's field at its default is as good as absent: an upgrade does not strand a run.
    defaults = _read_defaults()
    changes = []
    for name in sorted(old.keys() | new.keys()):
        is_same = name in new and old.get(name, defaults.get(name)) == new[name]
        if must_stay(name) and not is_same:
            changes.append(f"{name} was {show(old, name)} and is now {show(new, name)}")
    return changes
