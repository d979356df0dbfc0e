"""The rollout's and the scoring's programs of a paper config, compiled for devices that are not there.

Each program's compiled outputs are the next one's inputs, shapes and shardings: what compiles here fits together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import topologies
from jax.sharding import NamedSharding, PartitionSpec

from configs import llama3p2_1b, qwen_1p5b
from cooper_jax.model import generation, transformer
from cooper_jax.model.config import ModelConfig, RopeScaling
from cooper_jax.policy import grpo
from cooper_jax.rollout import engine, plan, slots
from cooper_jax.rollout.sampling import SamplingSpec
from cooper_jax.runtime.mesh import Layout, abstract, make_mesh
from kernels import platform

MODELS = {
    "qwen_1p5b": ModelConfig(
        family="qwen2", vocab_size=151936, width=1536, layers=28, heads=12, kv_heads=2, head_dim=128, ffn=8960,
        rope_theta=1e6, rope_scaling=None, norm_eps=1e-6, qkv_bias=True, tied=True, max_len=32768,
    ),
    "llama3p2_1b": ModelConfig(
        family="llama", vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192,
        rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), norm_eps=1e-5, qkv_bias=False, tied=True,
        max_len=131072,
    ),
}  # fmt: skip
CONFIGS = {"qwen_1p5b": qwen_1p5b, "llama3p2_1b": llama3p2_1b}


@dataclasses.dataclass(frozen=True)
class Case:
    """A paper config on the devices of a chip, `tensor` ways; aligned: as many slots as requests."""

    name: str
    chip: str
    tensor: int
    aligned: bool = True
    kv_dtype: str = ""
    top_p: float = 1.0

    @property
    def model(self) -> ModelConfig:
        return MODELS[self.name]

    @property
    def layout(self) -> Layout:
        cfg = CONFIGS[self.name].get_config()
        return Layout(make_mesh(1, -1, self.tensor, topologies.devices(self.chip)), tuple(cfg.mesh.rules))

    @property
    def setting(self) -> slots.Setting:
        r = CONFIGS[self.name].get_config().rollout
        spec = SamplingSpec(
            temperature=r.temperature, top_k=r.top_k, top_p=self.top_p, max_new_tokens=r.max_new_tokens,
            group_size=r.group_size, eos_ids=(151643, 151645)[: 1 + (self.name == "qwen_1p5b")],
            segment=r.segment, dtype=r.dtype, kv_dtype=self.kv_dtype,
        )  # fmt: skip
        layout = self.layout
        return slots.Setting(self.model, layout, spec, platform.default(layout.platform))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its text, bytes of memory on one device, and its outputs as the next one's inputs."""

    text: str
    arguments: int
    temporaries: int
    outputs: Any


def compile_(lowered) -> Compiled:
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    outputs = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        lowered.out_info,
        compiled.output_shardings,
    )
    text = compiled.as_text()
    return Compiled(text, memory.argument_size_in_bytes, memory.temp_size_in_bytes, outputs)


def rollout_weights(setting: slots.Setting) -> Any:
    """As `engine.rollout_weights` leaves them: matrices in bfloat16, gathered over fsdp, layers in stacks."""
    layout = setting.layout
    rules = tuple(r for r in layout.rules if r[0] != "embed") + (("embed", None),)
    weights = abstract(dataclasses.replace(layout, rules=rules), transformer.param_specs(setting.config))

    def cast(path, x):
        dtype = x.dtype if path[-1].key.endswith("norm") else jnp.dtype(setting.spec.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    weights = jax.tree.map_with_path(cast, weights)
    prepared = jax.jit(generation.for_generation, static_argnums=(1, 2)).lower(
        weights, setting.config, layout
    )
    return compile_(prepared).outputs


def rollout(case: Case) -> dict[str, Compiled]:
    """Prefill of a chunk, the first tokens, the slots, and a segment of decoding."""
    setting = case.setting
    cfg = CONFIGS[case.name].get_config()
    layout, spec = setting.layout, setting.spec
    weights = rollout_weights(setting)

    def array(kind, *shape):
        return jax.ShapeDtypeStruct(shape, kind, sharding=layout.sharding(("batch", None)[: len(shape)]))

    shards = setting.shards
    size = cfg.data.prompts_per_step // shards
    width = plan.prompt_width(cfg.data.max_prompt_tokens, plan.column_multiple(setting.form))
    b = plan.PREFILL_TOKENS // width * shards
    out = {"no_prompts": compile_(slots.no_prompts.lower(weights, size=size, width=width, setting=setting))}
    prompts = out["no_prompts"].outputs
    i32 = jnp.int32
    chunk = array(i32, b, width), array(i32, b), array(i32, size * shards)
    out["prefill"] = compile_(slots.prefill.lower(weights, prompts, *chunk, setting=setting))
    prompts = out["prefill"].outputs
    rows = size * shards * spec.group_size
    key = jax.ShapeDtypeStruct(
        (), jax.random.key(0, impl="threefry2x32").dtype, sharding=NamedSharding(layout.mesh, PartitionSpec())
    )
    out["begin"] = compile_(
        slots.begin.lower(weights, prompts, array(i32, size * shards), array(i32, rows), key, setting=setting)
    )
    requests = out["begin"].outputs
    count = size * spec.group_size // (1 if case.aligned else 2)
    columns = engine._columns(setting, waiting=not case.aligned)
    out["open_slots"] = compile_(
        slots.open_slots.lower(weights, requests, prompts, size=count, columns=columns, setting=setting)
    )
    opened = out["open_slots"].outputs[0]
    out["segment"] = compile_(
        slots.segment.lower(
            weights,
            opened,
            requests,
            prompts,
            steps=spec.segment,
            refill_at=max(1, count // 8),
            setting=setting,
        )
    )
    if not case.aligned:
        arrays = opened, requests, prompts
        by = jax.ShapeDtypeStruct((), i32, sharding=layout.replicated)
        out["refill"] = compile_(slots.refill.lower(*arrays, setting=setting))
        out["compact"] = compile_(slots.compact.lower(*arrays, size=count // 2, setting=setting))
        out["resize"] = compile_(slots.resize.lower(opened, by, columns=columns, setting=setting))
    return out


def scoring(case: Case) -> Compiled:
    """Reference log-probabilities of a step's rows, as training calls for them."""
    cfg = CONFIGS[case.name].get_config()
    layout = case.layout
    params = abstract(layout, transformer.param_specs(case.model))
    score = grpo.make_logprobs(
        case.model, layout, microbatch=cfg.policy.microbatch, dtype=cfg.policy.dtype, temperature=1.0
    )
    n = cfg.data.prompts_per_step * cfg.rollout.group_size
    shape = (n, cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens)
    place = layout.sharding(("batch", None))
    tokens, valid = (jax.ShapeDtypeStruct(shape, kind, sharding=place) for kind in (jnp.int32, jnp.bool_))
    return compile_(score.lower(params, tokens, valid, cfg.rollout.max_new_tokens))
