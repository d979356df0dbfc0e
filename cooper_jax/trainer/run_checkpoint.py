"""Models from checkpoints of training runs, for export and evaluation.

1. `read_run_config` reads the run's config.
2. `load_run_model` restores the run's policy or reward model at a given step, on any mesh.

The run directory is opened read-only, since the run may still be training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.model.loading import Directory, Model, describe_model, load_model
from cooper_jax.model.transformer import param_specs
from cooper_jax.runtime import mesh, stored_config
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.optim import select_trained
from cooper_jax.types import Params

# The output head of each model of a run.
HEADS = {"policy": "logits", "reward": "score"}


def read_run_config(run_dir: Directory) -> ConfigDict:
    """The config with which a run was last started.

    Raises FileNotFoundError if the directory has none, ValueError for a run of another version of this
    project.
    """
    return ConfigDict(stored_config.read_stored_config(run_dir, base.get_config()))


# Sections that define a run's models and their prompts.  The other sections, such as `mesh`, configure the
# job that loads them.
_RUN_SECTIONS = ("name", "seed", "data", "policy", "reward", "rollout", "supervised", "eval")


def overlay_run(cfg: ConfigDict, run: ConfigDict, flags: Mapping[str, Any]) -> ConfigDict:
    """A copy of cfg with a run's models, prompts and rollout; command-line flags override both.

    Fields that the run's config does not have keep cfg's values.

    Args:
      cfg: the job's config.
      run: the run's config.
      flags: dotted names of the fields that were set on the command line -> values.
    """
    cfg = cfg.copy_and_resolve_references()

    # Merged field by field, since a section of the run's config may lack fields of the job's.
    def merge(target: ConfigDict, source: ConfigDict) -> None:
        for name, value in source.items():
            if isinstance(value, ConfigDict) and isinstance(target[name], ConfigDict):
                merge(target[name], value)
            else:
                target[name] = value

    for section in _RUN_SECTIONS:
        merge(cfg, ConfigDict({section: run[section]}))
    cfg.update_from_flattened_dict(dict(flags))
    return cfg


def use_any_mesh(cfg: ConfigDict) -> ConfigDict:
    """Set cfg's mesh, in place, to one FSDP axis over all devices, and return cfg.

    A checkpoint can be restored on another mesh than the one that it was trained on.
    """
    cfg.mesh.update(data=1, fsdp=-1, tensor=1, reward="", reference="", assistant="", rollout="")
    return cfg


def load_run_model(
    run_dir: Directory, cfg: ConfigDict, name: str, layout: mesh.Layout, step: int | None = None
) -> tuple[Model, Params, int]:
    """Load one of a run's models: (model, its parameters, the step of the checkpoint).

    Args:
      name: policy or reward.
      step: the checkpoint's step; None for the newest.

    Raises ValueError if the run has no checkpoint, FileNotFoundError if it has none of that step, KeyError if
    the checkpoint has no such model (a run of the rule arm has no reward model).
    """
    with Checkpoints(run_dir, keep=0, read_only=True) as checkpoints:
        step = checkpoints.newest() if step is None else step
        if step is None:
            raise ValueError(f"{run_dir} has no checkpoint yet")

        # Abstract arrays carry shape, dtype and sharding: parameters are read straight onto the mesh.
        model = describe_model(cfg[name], name, run_dir, layout)
        abstract = mesh.abstract_params(layout, select_trained(param_specs(model.config, HEADS[name])))
        params = checkpoints.restore(step, name, abstract, model.config.vocab_size)

        # A checkpoint of adapters does not have their base.
        if model.config.lora is not None:
            _, loaded, _ = load_model(cfg[name], name, HEADS[name], layout, run_dir, cfg.seed)
            params = loaded | params
        return model, params, step
