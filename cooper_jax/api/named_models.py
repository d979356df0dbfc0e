"""Models that the Python API loads: from a directory, a hub id, a .gguf file, or a run of launch/train.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.evaluation.evaluated_models import ChosenModels
from cooper_jax.runtime import remote_files
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer import run_checkpoint


def choose_model(source: str | os.PathLike[str], name: str, step: int | None) -> ChosenModels:
    """Find a model by its source; nothing is loaded.

    Args:
      source: a run directory, or what the config's field `weights` takes.
      name: policy or reward.
      step: of a run's checkpoint; None: the newest.

    Raises SetupError for a run without that checkpoint, and for a step without a run.
    """
    text = os.fspath(source)
    if _is_path(text) and not Path(text).expanduser().exists():
        raise SetupError(f"{text}: there is no such directory or file")
    cfg = base.get_config()
    run_dir = remote_files.to_path(text) if _is_run(text) else None
    if run_dir is None:
        if step is not None:
            raise SetupError(f"step={step}: {text} is not a run directory, so it has no checkpoints")
        cfg[name].weights = text
        return ChosenModels(cfg, Path())

    with setup_errors(text):
        steps = list_steps(run_dir)
        if not steps:
            raise ValueError("the run has no checkpoint yet")
        if step is not None and step not in steps:
            raise ValueError(f"step {step} is not there; the checkpoints are {', '.join(map(str, steps))}")
        run = run_checkpoint.read_run_config(run_dir)
        cfg = run_checkpoint.overlay_run(cfg, run, {})
    if name == "reward" and cfg.reward.arm == "rule":
        raise SetupError(f"{text}: a run of the rule arm has no reward model")
    return ChosenModels(cfg, run_dir, run_dir, steps[-1] if step is None else step)


# What messages about a config's fields say -> what the arguments of the Python API are called.
_ARGUMENTS = {
    "reward.calibrated=True:": "calibrated=True:",
    "set --config.reward.calibrated=False": "load with calibrated=False",
    "reward.weights=": "weights=",
    "policy.weights=": "weights=",
    "give a *ForSequenceClassification directory, --run_dir=RUN, or accept it with "
    "--config.reward.allow_untrained_head": "give a *ForSequenceClassification directory or a run directory",
}


@contextlib.contextmanager
def name_arguments() -> Iterator[None]:
    """Within the context, errors name the arguments of the Python API in place of the config's fields and flags."""
    try:
        yield
    except SetupError as error:
        messages = []
        for message in error.messages:
            for field, argument in _ARGUMENTS.items():
                message = message.replace(field, argument)
            messages.append(message)
        raise SetupError(*messages) from error


def set_fields(section: ConfigDict, fields: dict[str, object]) -> None:
    """Set fields of a config's section, except those whose value is None."""
    section.update({field: value for field, value in fields.items() if value is not None})


def _is_path(source: str) -> bool:
    """True for a source that can be nothing but a local path."""
    # A hub id has one slash; addresses and package:NAME/FILE have a colon.
    return source.startswith(("/", "./", "../", "~")) or (source.count("/") > 1 and ":" not in source)


def _is_run(source: str) -> bool:
    """True for the directory of a run; a model's directory has no checkpoints."""
    # Under gs:// a model's directory has a config.json, too.
    path = remote_files.to_path(source) if remote_files.is_remote(source) else Path(source)
    return (path / "checkpoints").is_dir() and (path / "config.json").exists()
