"""A run's static side, from a config and a layout alone: nothing is loaded, and no device need be there.

`describe` reads the models' shapes (from their config.json where weights are at hand, otherwise from `arch`), and
settles what a run settles as it starts: slots, widths, microbatches.

Sizes are a full step's: every prompt has data.max_prompt_tokens, every response rollout.max_new_tokens, every
prompt its pairs.  Texts for the reward model are taken to be a `data.bucket` longer than prompt and response.

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
from cooper_jax.rollout import engine, rollout_plan, slots
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout, abstract_params
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.run_settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Job:
    """A run's static side."""

    cfg: ConfigDict
    layout: Layout
    policy: ModelConfig
    reward: ModelConfig | None  # None in the rule arm
    setting: slots.RolloutStatic
    gathered: bool  # the rollout's weights
    size: int  # prompts a shard, as the rollout pads them
    slots: int  # a shard
    notes: tuple[str, ...]  # where shapes come from

    @property
    def aligned(self) -> bool:
        """As many slots as requests."""
        return self.slots == self.requests

    @property
    def requests(self) -> int:
        """A shard's."""
        return self.size * self.setting.spec.group_size

    @property
    def rows(self) -> int:
        """N"""
        cfg = self.cfg
        return round_up(cfg.data.prompts_per_step * cfg.rollout.group_size, self.layout.batch_shards)

    @property
    def tokens(self) -> tuple[int, int]:
        """(P, T) of a row, as training pads them."""
        d, most = self.cfg.data, self.cfg.rollout.max_new_tokens
        return round_up(d.max_prompt_tokens, d.bucket), min(round_up(most, d.bucket), most)

    @property
    def reward_tokens(self) -> int:
        """S of what the reward model reads."""
        bucket = self.cfg.data.bucket
        return round_up(min(sum(self.tokens) + bucket, self.cfg.reward.max_tokens), bucket)

    def microbatch(self, rows: int, microbatch: int) -> int:
        """n, as `optim.split_rows` cuts so many rows."""
        shards = self.layout.batch_shards
        most = round_up(microbatch, shards)
        return round_up(-(-rows // -(-rows // most)), shards) // shards

    @property
    def steps(self) -> int:
        """Decode steps of a rollout."""
        return max(self.setting.spec.max_new_tokens - 1, 0) * -(-self.requests // self.slots)


def drop_data(cfg: ConfigDict) -> ConfigDict:
    """The config without what compiling does not need: problems, and weights for the reward model."""
    cfg = cfg.copy_and_resolve_references()
    cfg.data.update(format="synthetic", train="", eval="")
    whole = cfg if cfg.reward.weights else _with(cfg, "reward.weights", "random")
    RunSettings.from_config(whole, with_assistant=False)
    for name in ("reward", "reference", "assistant"):
        if cfg.mesh[name]:
            raise SetupError(
                f"mesh.{name}={cfg.mesh[name]!r}: only models that share the policy's mesh are compiled and "
                f"estimated; leave --config.mesh.{name} empty"
            )
    return cfg


def _with(cfg: ConfigDict, field: str, value: Any) -> ConfigDict:
    cfg = cfg.copy_and_resolve_references()
    cfg.update_from_flattened_dict({field: value})
    return cfg


def read_model_shape(section: ConfigDict, name: str, layout: Layout) -> tuple[ModelConfig, str]:
    """The shape of a model, and where it is from; its vocabulary divides over the mesh as a run's does.

    Raises SetupError where weights are named but neither they nor a shape in `arch` are at hand.
    """
    multiple = math.lcm(section.vocab_multiple, layout.first_ways("vocab"))
    with setup_errors(f"{name}.weights={section.weights!r}"):
        here = None if section.weights in ("", "random") else _at_hand(section.weights)
        if here is not None:
            config = weights.read_config(str(here), section.num_layers)
            return dataclasses.replace(
                config, vocab_multiple=multiple
            ), f"{name}: shape read from {section.weights}"
        if section.weights != "random" and section.arch.to_dict() == base.arch().to_dict():
            raise ValueError(
                f"they are not at hand, and --config.{name}.arch is as configs/base.py has it: give a directory "
                f"with a config.json, or the shape in --config.{name}.arch.layers, .width, ..."
            )
        arch = ModelConfig.from_arch(section.arch, section.arch.vocab_size, multiple)
        why = "weights are random" if section.weights == "random" else "no weights at hand"
        return arch.keep_layers(section.num_layers), f"{name}: shape from {name}.arch, {why}"


def _at_hand(source: str) -> Path | None:
    """Where the config of some weights can be read without a network, if anywhere."""
    if source.startswith("package:") or Path(source).exists():
        return weight_files.resolve_source(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def describe_job(cfg: ConfigDict, layout: Layout, memory: int) -> Job:
    """What a run of this config on this layout is made of; memory: bytes of a device.

    Raises SetupError for what cannot be laid out, and for memory in which no slot fits.
    """
    r, shards = cfg.rollout, layout.batch_shards
    policy, note = read_model_shape(cfg.policy, "policy", layout)
    reward, notes = None, [note]
    if cfg.reward.arm != "rule":
        reward, note = read_model_shape(cfg.reward, "reward", layout)
        notes.append(note)
    with setup_errors(f"mesh.tensor={layout.mesh.shape['tensor']}"):
        for config, head in ((policy, "logits"), *(((reward, "score"),) if reward else ())):
            if config.heads % (ways := layout.first_ways("heads")):
                fitting = [
                    n for n in range(1, ways + 1) if layout.mesh.size % n == 0 and config.heads % n == 0
                ]
                raise ValueError(
                    f"a model has {config.heads} heads, which do not divide over it: set --config.mesh.tensor to "
                    f"one of {fitting}"
                )
            abstract_params(layout, transformer.param_specs(config, head))
    if cfg.data.prompts_per_step % shards:
        notes.append(
            f"{cfg.data.prompts_per_step} prompts lie unevenly on {shards} batch shards: a rollout pads them"
        )
    if cfg.assistant.kind == "local" and cfg.reward.arm == "cooper":
        notes.append("the local assistant's weights and programs are not counted")
    with setup_errors("rollout"):
        spec = SamplingSpec(
            temperature=r.temperature, top_k=r.top_k, top_p=r.top_p, min_p=r.min_p,
            max_new_tokens=r.max_new_tokens, group_size=r.group_size, segment=r.segment, dtype=r.dtype,
            kv_dtype=r.kv_dtype, eos_ids=(0, 1),  # which they are changes no program
        )  # fmt: skip
        kernels = engine.choose_kernels(policy, layout) if r.kernels == "auto" else r.kernels
        setting = slots.RolloutStatic(policy, layout, spec, kernels)
        size = rollout_plan.round_to_bucket(-(-cfg.data.prompts_per_step // shards))
        budget = r.memory_gib * rollout_plan.GIB or memory
        gathered = r.weight_placement == "gathered"
        gathered |= r.weight_placement == "auto" and rollout_plan.should_gather(
            policy, layout, r.dtype, budget
        )
        places = layout.for_rollout() if gathered else layout
        copy = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, r.dtype, sharding=x.sharding),
            abstract_params(places, transformer.param_specs(policy)),
        )
        prompts = [[0] * cfg.data.max_prompt_tokens]
        count = engine.slots_per_shard(copy, setting, prompts, size, r.max_rows or None, r.memory_gib or None)
    return Job(cfg, layout, policy, reward, setting, gathered, size, count, tuple(notes))
