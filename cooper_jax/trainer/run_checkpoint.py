"""Models of runs of launch/train.py, read from their checkpoints: for export and evaluation.

1. `read_run_config` reads the run's settings.
2. `load_run_model` restores one of its models, the policy or the reward model, at a step, on any mesh.

Nothing is written or cleaned up in the run directory: the run may be alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.model.loading import Directory, Model, describe_model
from cooper_jax.model.transformer import param_specs
from cooper_jax.runtime import mesh, stored_config
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.types import Params

HEADS = {"policy": "logits", "reward": "score"}


def read_run_config(run_dir: Directory) -> ConfigDict:
    """The config that a run was last started with.

    Raises FileNotFoundError where there is none, ValueError for a run of another version of this project.
    """
    return ConfigDict(stored_config.read_stored_config(run_dir, base.get_config()))


# Sections that belong to a run's models and to how they are prompted; the others say how a job is done.
_RUN_SECTIONS = ("name", "seed", "data", "policy", "reward", "rollout", "supervised", "eval")


def overlay_run(cfg: ConfigDict, run: ConfigDict, flags: Mapping[str, Any]) -> ConfigDict:
    """cfg with a run's models, prompts and rollout in it, and the command line's own fields over both.

    Fields that the run's config does not have keep cfg's values.  flags: dotted names -> values.
    """
    cfg = cfg.copy_and_resolve_references()

    def take(ours: ConfigDict, theirs: ConfigDict) -> None:
        for name, value in theirs.items():
            if isinstance(value, ConfigDict) and isinstance(ours[name], ConfigDict):
                take(ours[name], value)
            else:
                ours[name] = value

    for section in _RUN_SECTIONS:
        take(cfg, ConfigDict({section: run[section]}))
    cfg.update_from_flattened_dict(dict(flags))
    return cfg


def use_any_mesh(cfg: ConfigDict) -> ConfigDict:
    """Change cfg to a mesh over all devices at hand, whatever mesh the run was trained on; returns it."""
    cfg.mesh.update(data=1, fsdp=-1, tensor=1, reward="", reference="", assistant="")
    return cfg


def load_run_model(
    run_dir: Directory, cfg: ConfigDict, name: str, layout: mesh.Layout, step: int | None = None
) -> tuple[Model, Params, int]:
    """(model, its parameters, the step that they are of).

    name: policy or reward.  step: None is the newest.  Raises ValueError where there is no checkpoint, KeyError
    where it has no such model (in the rule arm there is no reward model), FileNotFoundError for another step.
    """
    with Checkpoints(run_dir, keep=0, read_only=True) as kept:
        step = kept.newest() if step is None else step
        if step is None:
            raise ValueError(f"{run_dir} holds no checkpoint yet")
        model = describe_model(cfg[name], name, run_dir, layout)
        like = mesh.abstract_params(layout, param_specs(model.config, HEADS[name]))
        return model, kept.restore(step, name, like, model.config.vocab_size), step
