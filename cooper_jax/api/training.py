"""Training for notebooks and scripts: a run of launch/train.py, and its models afterwards.

result = train("tiny", {"steps": 20, "run_dir": "runs/first"})
result.metrics[-1]["eval/accuracy"]; result.policy.generate(["..."])
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.api.sampler import Sampler
from cooper_jax.api.verify_rm import VerifyRM
from cooper_jax.model.loading import Directory
from cooper_jax.runtime import hosts
from cooper_jax.runtime.compilation_cache import enable_compilation_cache
from cooper_jax.runtime.run_directory import run_path
from cooper_jax.settings import config_files
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer import recipes, train_loop


@dataclasses.dataclass(frozen=True)
class Result:
    """A run: its metrics, its files and its models."""

    # One row per step, as in metrics.jsonl: `step` and slash-grouped names.
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


def train(config: str | ConfigDict, overrides: Mapping[str, Any] | None = None) -> Result:
    """Train a policy and its reward model, or resume, as `launch/train.py --config=CONFIG` does.

    Args:
      config: the name of a shipped config, the path of a config file, or a config.
      overrides: dotted names of fields -> values, as the command line's flags: {"reward.arm": "rule"}.

    Raises SetupError for settings and files that cannot be used, and hosts.Stopped after a SIGTERM, once the last
    complete step is saved.  One process alone: on several hosts use launch/train.py, which ends all of them if one
    fails.
    """
    if jax.process_count() > 1:
        raise SetupError("cooper_jax.train runs in one process: on several hosts run launch/train.py on each")
    enable_compilation_cache()
    cfg = make_config(config, overrides or {})
    if warning := recipes.warn_about_released_update(cfg):
        hosts.print_once(warning)
    with hosts.catch_sigterm():
        train_loop.train(cfg)

    with setup_errors("run_dir"):
        run_dir = run_path(cfg)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return Result(metrics=[json.loads(line) for line in lines], run_dir=run_dir)


def make_config(config: str | ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Make a run's config: the overrides take precedence over the recipe, and the recipe over the config.

    The given config is not changed.  Raises SetupError for an unknown field and a value of another type, and for a
    ConfigDict whose fields contradict its own recipe.
    """
    from_file = isinstance(config, str)
    cfg = (
        config_files.load_config(config) if isinstance(config, str) else config.copy_and_resolve_references()
    )
    config_files.set_overrides(cfg, overrides)

    # In a script, `cfg.reward.updates = 3` is meant to count; a recipe would overwrite it.
    if not from_file and (contradictions := recipes.find_contradictions(cfg, overrides)):
        raise SetupError(*contradictions)
    recipes.apply_recipe(cfg, overrides)
    return cfg.lock()
