"""Static description of a run from its config and layout.

No weights are loaded, and no device is needed.

`describe_job` reads the models' shapes, from their config.json if it is on this machine, otherwise from
`arch`.  It then makes the decisions that a run makes when it starts: slots, padded widths, microbatches.

Sizes are the largest that a step can have: every prompt has data.max_prompt_tokens, every response
rollout.max_new_tokens, and every prompt all its pairs.  The reward model's inputs are assumed to be one
`data.bucket` longer than prompt and response.

B prompts   N rows   P prompt tokens   T response tokens   S tokens of a row   n rows of a shard's microbatch
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.data.packing import round_up
from cooper_jax.model import transformer, weight_files, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.model_source import read_lora
from cooper_jax.rollout import engine, rollout_plan
from cooper_jax.rollout.rollout_config import RolloutConfig
from cooper_jax.rollout.rollout_state import RolloutStatic
from cooper_jax.runtime.mesh import Layout, abstract_params
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.run_settings import RunSettings


@dataclasses.dataclass(frozen=True)
class CompileJob:
    """A run to compile ahead of time: models, layout and the sizes of its programs."""

    cfg: ConfigDict
    layout: Layout
    # Models.
    policy: ModelConfig
    reward: ModelConfig | None  # None in the rule arm
    # Rollout.
    rollout: RolloutStatic
    gathers_weights: bool  # the rollout's weights are all-gathered, not sharded as in training
    prompts: int  # per shard, as the rollout pads them
    slots: int  # per shard
    # Remarks.
    notes: tuple[str, ...]  # to print: the sources of the models' shapes, and limits of the estimate
    # With rollout.ahead=1: the run as the rollout's own devices see it.  `layout` is then the learner's.
    ahead: CompileJob | None = None

    @property
    def rollout_job(self) -> CompileJob:
        """The job whose layout and slots the rollout has."""
        return self.ahead or self

    def layout_of(self, phase: str) -> Layout:
        """The layout on which the programs of a phase run."""
        return self.rollout_job.layout if phase == "rollout" else self.layout

    @property
    def slot_per_request(self) -> bool:
        """True if all responses are decoded at once, so that no slot is refilled."""
        return self.slots == self.requests

    @property
    def requests(self) -> int:
        """Responses per shard."""
        return self.prompts * self.rollout.spec.group_size

    @property
    def rows(self) -> int:
        """N, padded to a multiple of the batch shards."""
        cfg = self.cfg
        return round_up(cfg.data.prompts_per_step * cfg.rollout.group_size, self.layout.batch_shards)

    @property
    def row_tokens(self) -> tuple[int, int]:
        """(P, T) of a row, as training pads them."""
        data, max_new_tokens = self.cfg.data, self.cfg.rollout.max_new_tokens
        response = min(round_up(max_new_tokens, data.bucket), max_new_tokens)
        return round_up(data.max_prompt_tokens, data.bucket), response

    @property
    def reward_tokens(self) -> int:
        """S of the reward model's inputs."""
        bucket = self.cfg.data.bucket
        return round_up(min(sum(self.row_tokens) + bucket, self.cfg.reward.max_tokens), bucket)

    @property
    def decode_steps(self) -> int:
        """Decode steps of a rollout: the responses of a slot are decoded one after the other."""
        return max(self.rollout.spec.max_new_tokens - 1, 0) * -(-self.requests // self.slots)

    def count_microbatch_rows(self, rows: int, microbatch: int) -> int:
        """Count n for this number of rows on the whole mesh, as `optim.split_rows` divides them."""
        # Microbatches are of equal size, so that all of them run the same compiled program.
        shards = self.layout.batch_shards
        microbatches = -(-rows // round_up(microbatch, shards))
        return round_up(-(-rows // microbatches), shards) // shards


def drop_data(cfg: ConfigDict) -> ConfigDict:
    """Remove from the config the files that compiling does not need: problems and the reward model's weights.

    Raises SetupError for settings out of range, for exact=True, and for models with meshes of their own.  Rollouts
    may have one.
    """
    cfg = cfg.copy_and_resolve_references()
    cfg.data.update(format="synthetic", train="", train_weights="", eval="", eval_weights="")

    # The check of the settings requires the reward model's weights, but compiling needs only its shape.
    checked = cfg if cfg.reward.weights else _change_field(cfg, "reward.weights", "random")
    RunSettings.from_config(checked, with_assistant=False)
    if cfg.exact:
        raise SetupError("exact=True: its forward passes are not estimated; leave it out")
    for name in ("reward", "reference", "assistant"):
        if cfg.mesh[name]:
            raise SetupError(
                f"mesh.{name}={cfg.mesh[name]!r}: only models that share the policy's mesh are compiled and "
                f"estimated; leave --config.mesh.{name} empty"
            )
    return cfg


def _change_field(cfg: ConfigDict, field: str, value: Any) -> ConfigDict:
    cfg = cfg.copy_and_resolve_references()
    cfg.update_from_flattened_dict({field: value})
    return cfg


def read_model_shape(section: ConfigDict, name: str, layout: Layout) -> tuple[ModelConfig, str]:
    """Read a model's shape, with the vocabulary padded as in a run on this layout, and a note on its source.

    Raises SetupError if weights are named, but neither they are on this machine nor `arch` gives their shape.
    """
    multiple = math.lcm(section.vocab_multiple, layout.first_ways("vocab"))
    with setup_errors(f"{name}.weights={section.weights!r}"):
        # The config.json of the weights is the exact shape, so it takes precedence over `arch`.
        folder = None
        if section.weights not in ("", "random"):
            folder = _find_local_config(section.weights)
        if folder is not None:
            config = weights.read_config(str(folder), section.num_layers)
            config = dataclasses.replace(config, vocab_multiple=multiple, lora=read_lora(section, name))
            return config, f"{name}: shape read from {section.weights}"

        # An unchanged `arch` is that of the tiny model, not that of the weights which the config names.
        if section.weights != "random" and section.arch.to_dict() == base.arch().to_dict():
            raise ValueError(
                f"they are not on this machine, and --config.{name}.arch is that of configs/base.py: give a "
                f"folder with a config.json, or the shape in --config.{name}.arch.layers, .width, ..."
            )
        arch = ModelConfig.from_arch(section.arch, section.arch.vocab_size, multiple)
        reason = "weights are random" if section.weights == "random" else "weights are not on this machine"
        arch = dataclasses.replace(arch.keep_layers(section.num_layers), lora=read_lora(section, name))
        return arch, f"{name}: shape from {name}.arch, {reason}"


def _find_local_config(source: str) -> Path | None:
    """Find the folder with the config.json of weights; None if that would need a network."""
    if source.startswith("package:") or Path(source).exists():
        return weight_files.resolve_source(source)
    # Only a name of the form OWNER/MODEL can be in the Hugging Face cache.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return None

    import huggingface_hub

    config_path = huggingface_hub.try_to_load_from_cache(source, "config.json")
    return Path(config_path).parent if isinstance(config_path, str) else None


def describe_job(cfg: ConfigDict, layout: Layout, memory: int) -> CompileJob:
    """Describe a run of this config on this layout.  memory: bytes of a device.

    Raises SetupError if the models or batches do not divide over the mesh, and if no slot fits into the
    memory.
    """
    # Models: the heads must divide over the tensor axis.
    policy, note = read_model_shape(cfg.policy, "policy", layout)
    reward, notes = None, [note]
    if cfg.reward.arm != "rule":
        reward, note = read_model_shape(cfg.reward, "reward", layout)
        notes.append(note)
    with setup_errors(f"mesh.tensor={layout.mesh.shape['tensor']}"):
        _check_heads(policy, "logits", layout)
        if reward is not None:
            _check_heads(reward, "score", layout)

    # Differences between the run and the estimate, which are printed with it.
    shards = layout.batch_shards
    if cfg.data.prompts_per_step % shards:
        notes.append(
            f"{cfg.data.prompts_per_step} prompts do not divide over {shards} batch shards: a rollout pads "
            "them"
        )
    if cfg.assistant.kind == "local" and cfg.reward.arm == "cooper":
        notes.append("the local assistant's weights and programs are not counted")

    # Rollout: the decisions that a run makes at its start, for the memory of the given device.
    section = cfg.rollout
    with setup_errors("rollout"):
        # No program depends on which tokens end a response.
        spec = RolloutConfig.from_config(section).make_sampling_spec(eos_ids=(0, 1))
        kernels = engine.choose_kernels(policy, layout) if section.kernels == "auto" else section.kernels
        rollout = RolloutStatic(policy.base, layout, spec, kernels)
        prompts = rollout_plan.round_to_bucket(-(-cfg.data.prompts_per_step // shards))
        gathers = section.weight_placement == "gathered"
        if section.weight_placement == "auto":
            budget = section.memory_gib * rollout_plan.GIB or memory
            gathers = rollout_plan.should_gather(policy.base, layout, section.dtype, budget)

        # The number of slots that fit beside the weights, if every prompt is as long as the longest.
        rollout_weights = abstract_rollout_weights(policy, layout, spec.dtype, gathers)
        longest = cfg.data.max_prompt_tokens
        slots = engine.count_slots(
            rollout_weights, rollout, longest, prompts, section.max_rows or None, section.memory_gib or None
        )
    return CompileJob(cfg, layout, policy, reward, rollout, gathers, prompts, slots, tuple(notes))


def _check_heads(config: ModelConfig, head: str, layout: Layout) -> None:
    """Raise ValueError if the model's attention heads or parameters do not divide over the mesh."""
    # Heads are checked first, because their message can name the mesh shapes that would work.
    ways = layout.first_ways("heads")
    if config.heads % ways:
        fitting = [n for n in range(1, ways + 1) if layout.mesh.size % n == 0 and config.heads % n == 0]
        raise ValueError(
            f"a model has {config.heads} heads, which do not divide over it: set --config.mesh.tensor to "
            f"one of {fitting}"
        )
    abstract_params(layout, transformer.param_specs(config, head))


def abstract_rollout_weights(policy: ModelConfig, layout: Layout, dtype: str, gathers: bool) -> Any:
    """Describe the rollout's copy of the policy's weights as abstract arrays with shardings."""
    weights_layout = layout.for_rollout() if gathers else layout
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        abstract_params(weights_layout, transformer.param_specs(policy.base)),
    )
