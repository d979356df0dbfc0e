"""Training for notebooks and scripts: a run of launch/train.py, and its models afterwards.

result = train("tiny", {"steps": 20, "run_dir": "runs/first"})
result.metrics[-1]["eval/accuracy"]; result.policy.generate(["..."])
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.api.sampler import Sampler
from cooper_jax.api.user_objects import name_object
from cooper_jax.api.verify_rm import VerifyRM
from cooper_jax.model.loading import Directory
from cooper_jax.runtime import hosts
from cooper_jax.runtime.compilation_cache import enable_compilation_cache
from cooper_jax.runtime.compilations import watch_compilations
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.runtime.run_directory import run_path
from cooper_jax.settings import config_files
from cooper_jax.settings.secrets import check_secrets
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer import recipes, train_loop

# Held while a run is in progress: a process has one run at a time.
_training = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Result:
    """A run: its metrics, its files and its models."""

    # One row per step, as in metrics.jsonl: `step` and slash-grouped names.  None for steps=0 without evaluations.
    metrics: list[dict[str, float]]
    run_dir: Directory

    @functools.cached_property
    def policy(self) -> Sampler:
        """The policy of the newest checkpoint, loaded at the first access."""
        return Sampler.load(self.run_dir)

    @functools.cached_property
    def reward_model(self) -> VerifyRM:
        """The reward model of the newest checkpoint, loaded at the first access.

        Raises SetupError in the rule arm, which has none.
        """
        return VerifyRM.load(self.run_dir)


def train(
    config: str | os.PathLike[str] | ConfigDict,
    overrides: Mapping[str, Any] | None = None,
    *,
    reward_functions: Sequence[str | Callable[..., Any]] = (),
    judge: str | Callable[..., Any] | None = None,
    assistant: str | Callable[..., Any] | None = None,
    trackers: Sequence[str | Callable[..., Any]] = (),
) -> Result:
    """Train a policy and its reward model, or resume, as `launch/train.py --config=CONFIG` does.

    Args:
      config: the name of a shipped config, the path of a config file, or a config.
      overrides: dotted names of fields -> values, as the command line's flags: {"reward.arm": "rule"}.
      reward_functions: functions (trainer/reward_functions.py) and names of built-in rewards, which replace the
        arm's reward; overrides may set reward.function_weights and the other settings of the functions.
      judge: a function (rule/user_judge.py) that replaces the rule verifier.
      assistant: a class with a method `rewrite(requests)`, which is made without arguments (reward/assistants.py).

      trackers: names, functions and classes (runtime/trackers/tracker.py), in place of the config's log.to.

    A function or class must be importable by a name (user_objects.py); a text PATH.py:NAME names one, too.

    Raises SetupError for settings, objects and files that cannot be used, hosts.RunFault for a fault that no
    restart mends, and hosts.Stopped after a SIGTERM, once the last complete step is saved.  One process alone: on
    several hosts use launch/train.py, which ends all of them if one fails.
    """
    if jax.process_count() > 1:
        raise SetupError("cooper_jax.train runs in one process: on several hosts run launch/train.py on each")
    given = dict(overrides or {}) | _name_objects(
        overrides or {}, reward_functions, judge, assistant, trackers
    )

    # The import of a script for its functions would train again, and wait for this training forever.
    if not _training.acquire(blocking=False):
        raise SetupError(
            "cooper_jax.train runs already in this process; a script whose functions it uses must call it under "
            '`if __name__ == "__main__":`'
        )
    try:
        return _run(make_config(config, given))
    finally:
        _training.release()


def _name_objects(
    overrides: Mapping[str, Any],
    reward_functions: Sequence[str | Callable[..., Any]],
    judge: str | Callable[..., Any] | None,
    assistant: str | Callable[..., Any] | None,
    trackers: Sequence[str | Callable[..., Any]],
) -> dict[str, str]:
    """The fields that name the caller's functions and classes -> their names.

    Raises SetupError for an object without a name, and for a field that the overrides set as well.
    """
    fields: dict[str, str] = {}
    lists = {"reward_functions": ("reward.functions", reward_functions), "trackers": ("log.to", trackers)}
    for argument, (field, objects) in lists.items():
        if isinstance(objects, str) or callable(objects):
            raise SetupError(f"{argument}: give a list, even for one function")
        if objects:
            fields[field] = ",".join(name_object(item, argument) for item in objects)
    if judge is not None:
        fields["rule.judge"] = name_object(judge, "judge")
    if assistant is not None:
        fields["assistant.kind"] = name_object(assistant, "assistant")
    if both := sorted(fields.keys() & overrides.keys()):
        raise SetupError(f"{', '.join(both)}: given by an argument of train and among the overrides")
    return fields


def _run(cfg: ConfigDict) -> Result:
    """Run or resume a complete config."""
    enable_compilation_cache()
    watch_compilations(CONSOLE)
    if warning := recipes.warn_about_released_update(cfg):
        hosts.print_once(warning, always=True)
    with hosts.catch_sigterm():
        train_loop.train(cfg)

    with setup_errors("run_dir"):
        run_dir = run_path(cfg)
    # A run without steps and evaluations, which ends after the supervised phases, has no such file.
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return Result(metrics=[json.loads(line) for line in lines], run_dir=run_dir)


def make_config(config: str | os.PathLike[str] | ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Make a run's config: the overrides take precedence over the recipe, and the recipe over the config.

    The given config is not changed.  Raises SetupError for an unknown field, a value of another type and one that
    may hold a secret, and for a ConfigDict whose fields contradict its own recipe.
    """
    if isinstance(config, ConfigDict):
        cfg = config.copy_and_resolve_references()
    else:
        try:
            cfg = config_files.load_config(os.fspath(config))
        except SetupError as error:
            # The messages are those of the flag.
            raise SetupError(*(m.replace("--config=", "config=") for m in error.messages)) from error
    config_files.set_overrides(cfg, overrides)
    check_secrets(cfg)

    # In a script, `cfg.reward.updates = 3` is meant to count; a recipe would overwrite it.
    if isinstance(config, ConfigDict) and (messages := recipes.find_contradictions(cfg, overrides)):
        raise SetupError(*messages)
    recipes.apply_presets(cfg, overrides)
    return cfg.lock()
