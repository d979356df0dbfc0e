"""What the files of a run directory say about an exported model, for its card."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.data import data_sources, dataset_files
from cooper_jax.data.seen_questions import Record
from cooper_jax.model.loading import Directory
from cooper_jax.reward_training.rm_report import ALL
from cooper_jax.runtime.environment import ENVIRONMENT
from cooper_jax.runtime.metrics import parse_numbers, to_jsonable
from cooper_jax.runtime.stored_config import flatten_config, must_stay, to_plain_config
from cooper_jax.trainer.recipes import list_preset_values
from cooper_jax.trainer.run_problems import RECORD

# What weights and tokenizers of the hub do not end in, nor data sets (data_sources.parse_hub_source).
_FILE_SUFFIXES = (".gguf", ".model", ".safetensors", ".py")

# Fields that the card's own rows have.
_LEFT_OUT = (
    "data.train",
    "data.eval",
    "policy.weights",
    "reward.weights",
    "train_rm.data",
    "train_rm.eval_data",
)
# Fields that name a folder, although it may look like a hub id.
_FOLDERS = ("supervised.start_from", "supervised.reward_from", "data.tfds_dir")


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """A run at the step of an exported model."""

    config: ConfigDict
    model: str  # policy or reward
    step: int
    is_adapter: bool  # the adapters alone are exported
    metrics: Sequence[Mapping[str, float]]  # rows of metrics.jsonl up to the step, each with its `step`
    sources: Mapping[str, Any]  # data.json; empty for synthetic problems
    environment: Mapping[str, Any]  # environment.json; empty for runs without it
    report: Mapping[str, Any]  # report.json of a reward model's training; else empty
    seen: Record | None  # the questions that the reward model was trained on

    @property
    def is_reward_training(self) -> bool:
        """True for a run of launch/train_rm.py."""
        return any("train_rm/loss" in row for row in self.metrics)

    @property
    def is_synthetic(self) -> bool:
        """True if the problems are made by the program."""
        return self.config.data.format == "synthetic" and not self.is_reward_training

    @property
    def held_out_questions(self) -> int:
        """The number of held-out questions of a reward model's training; 0 if it is not known."""
        return self.report["groups"][ALL]["questions"] if self.report else 0

    @property
    def evaluations(self) -> list[Mapping[str, float]]:
        """The rows that have figures on held-out data."""
        return [row for row in self.metrics if any(name.startswith("eval/") for name in row)]

    @property
    def base_weights(self) -> str:
        """What the model's training began with, as the card may name it; "": random weights."""
        weights = self.config[self.model].weights
        return "" if weights == "random" else hide_folders(weights)

    @property
    def base_id(self) -> str:
        """The hub id of the base weights; "" if they are not from the hub."""
        weights = self.config[self.model].weights
        return weights if _is_hub_id(weights) else ""

    def list_settings(self) -> dict[str, Any]:
        """The settings that decide the results and differ from configs/base.py and the presets, by dotted name."""
        values = flatten_config(to_plain_config(self.config))
        presets = to_jsonable(list_preset_values(values))
        defaults = flatten_config(to_plain_config(base.get_config())) | presets
        settings = {}
        for name, value in values.items():
            if not must_stay(name) or name in _LEFT_OUT or value == defaults.get(name):
                continue
            if name in _FOLDERS:
                value = PurePath(value).name
            settings[name] = hide_folders(value) if isinstance(value, str) else value
        return settings


def read_facts(
    run_dir: Directory, config: ConfigDict, model: str, step: int, seen: Record | None, is_adapter: bool
) -> RunFacts:
    """Read a run directory's files; one that is missing leaves its part of the card out.

    Raises ValueError, naming the file, for one that is not JSON.
    """
    rows = [parse_numbers(row) for row in _read_lines(run_dir / "metrics.jsonl")]
    return RunFacts(
        config=config,
        model=model,
        step=step,
        is_adapter=is_adapter,
        metrics=[row for row in rows if row["step"] <= step],
        sources=_read_object(run_dir / RECORD),
        environment=_read_object(run_dir / ENVIRONMENT),
        report=_read_object(run_dir / "report.json"),
        seen=seen,
    )


def hide_folders(text: str) -> str:
    """Paths without their folders, which tell about a machine and its user; hub ids and other texts unchanged."""
    # Weights, data and functions may be named together, separated by commas, and a function by PATH.py:NAME.
    parts = text.split(",")
    return ",".join(PurePath(part).name if _is_path(part) else part for part in parts)


def _is_path(text: str) -> bool:
    """True for a path, absolute or relative, and for an address; False for a hub id and for other texts."""
    if text.startswith(("/", "~", "./", "../")) or "://" in text:
        return True
    if "/" not in text or text.startswith("package:") or _is_hub_id(text):
        return False
    # An instruction or a system message may contain a slash.
    return not re.search(r"\s", text) or text.endswith((*dataset_files.ALL_SUFFIXES, *_FILE_SUFFIXES))


def _is_hub_id(text: str) -> bool:
    """True for a model or a data set of the hub; False for what a run of ours made, and for local files."""
    # Runs write to runs/ unless they are told otherwise, and the folder may be gone.
    if text.startswith("runs/") or text.endswith(_FILE_SUFFIXES):
        return False
    return data_sources.parse_hub_source(text) is not None


def _read_lines(path: Directory) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without an incomplete last line; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): fix or delete the line") from None
    return rows


def _read_object(path: Directory) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}): fix it, or move it away") from None
