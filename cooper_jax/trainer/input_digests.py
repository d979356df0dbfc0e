"""The record of what a run began with, `provenance.json` in its directory: digests of inputs, and the environment.

    {"inputs": {"data.train=train.jsonl": {"train.jsonl": DIGEST}, "policy.weights=DIR": {...}, ...},
     "environment": commit, versions, system and devices of the first start}

1. A run without checkpoints writes the record.
2. A run that resumes compares its files with it, before weights are read.  Files with other contents are refused:
   they would make it another run halfway, without a sign in its metrics.
3. A run that an earlier version began has no record, and gets one when it resumes.

Files are those of the problems, of labelled completions, of weights and of tokenizers.  Digests: file_digests.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from cooper_jax.data import data_sources
from cooper_jax.model import weight_files
from cooper_jax.model.loading import Directory
from cooper_jax.model.model_source import ModelSource
from cooper_jax.runtime import hosts, remote_files
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.runtime.environment import describe_environment
from cooper_jax.runtime.file_digests import digest_file
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import is_user_code
from cooper_jax.trainer.run_problems import RunProblems
from cooper_jax.trainer.run_settings import RunSettings

PROVENANCE = "provenance.json"
_SHOWN = 12  # characters of a digest in messages

# Files of a directory that are read for weights, and for a tokenizer.
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip

Inputs: TypeAlias = dict[str, dict[str, str]]  # setting -> file -> digest


def check_inputs(
    settings: RunSettings, problems: RunProblems, sources: Mapping[str, ModelSource], run_dir: Directory
) -> None:
    """Compare a run's files with its record, or write the record.

    sources: the models that the run loads, by the names of their sections.

    Raises SetupError with every file whose contents are others than when the run began.
    """

    # The first host compares, so that all end alike.
    def compare() -> bytes:
        inputs = _digest_inputs(settings, problems, sources, run_dir)
        path = run_dir / PROVENANCE
        resumes = bool(list_steps(run_dir))
        if resumes and path.exists():
            return json.dumps(_find_changes(_read_record(path), inputs, path)).encode()
        run_dir.mkdir(parents=True, exist_ok=True)
        record = {"inputs": inputs, "environment": describe_environment()}
        remote_files.write_atomically(path, json.dumps(record, indent=1).encode() + b"\n")
        return b"[]"

    if changes := json.loads(hosts.broadcast_value("digests of inputs", compare)):
        raise SetupError(*changes)


def _digest_inputs(
    settings: RunSettings, problems: RunProblems, sources: Mapping[str, ModelSource], run_dir: Directory
) -> Inputs:
    """Digest the files that a run reads."""
    inputs: Inputs = {}
    for flag, sets in problems.sets.items():
        for problem_set in sets:
            source = problem_set.source
            inputs[f"{flag}={source.text}"] = {f.display_name: digest_file(f.path) for f in source.files}
    labelled = data_sources.strip_name(settings.supervised.reward_data)
    if labelled and settings.supervised.reward_steps and not is_user_code(labelled):
        path = remote_files.fetch_local(labelled)
        if path.is_file():
            inputs[f"supervised.reward_data={labelled}"] = {path.name: digest_file(path)}

    for name, model in sources.items():
        if model.weights != "random":
            found = weight_files.resolve_source(model.weights)
            inputs[f"{name}.weights={model.weights}"] = _digest_folder(found, _WEIGHT_FILES)
        tokenizer = model.tokenizer or model.weights
        if tokenizer != "random":
            found = weight_files.resolve_source(tokenizer, "tokenizer", (".model", ".gguf"))
            inputs[f"{name}.tokenizer={tokenizer}"] = _digest_folder(found, _TOKENIZER_FILES)
        else:
            trained = run_dir / f"tokenizer_{model.arch.vocab_size}.model"
            inputs[f"{name}.tokenizer"] = {trained.name: digest_file(Path(remote_files.fetch_local(trained)))}
    return inputs


def _digest_folder(path: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Digest a file, or the files of a folder that one of the patterns names."""
    if path.is_file():
        return {path.name: digest_file(path)}
    files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    return {file.name: digest_file(file) for file in sorted(files)}


def _read_record(path: Any) -> Inputs:
    """Read the digests of a record.  Raises ValueError for a damaged one."""
    try:
        inputs = json.loads(path.read_bytes())["inputs"]
        return {str(setting): dict(files) for setting, files in inputs.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): restore it, or delete it to go on with the files as they are now"
        ) from error


def _find_changes(before: Inputs, now: Inputs, record: Any) -> list[str]:
    """Write a message for each file of which the record has another digest."""
    messages = []
    # Settings that were added or left out since are the config's matter (stored_config.py).
    for setting in before.keys() & now.keys():
        old, new = before[setting], now[setting]
        for file in sorted(old.keys() | new.keys()):
            if old.get(file) != new.get(file):
                was, is_now = (_show(digests.get(file)) for digests in (old, new))
                messages.append(
                    f"{setting}: {file} is not what the run began with ({was} then, {is_now} now): restore it, or "
                    f"start another run with another --config.run_dir; to go on all the same, delete {record}"
                )
    return sorted(messages)


def _show(digest: str | None) -> str:
    if digest is None:
        return "no such file"
    kind, _, digits = digest.rpartition(":")
    return f"{kind or 'SHA-256'} {digits[:_SHOWN]}"
