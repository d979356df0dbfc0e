"""Meshes, microbatches and slots for a machine: many weighed by arithmetic, the best few compiled.

1. `candidates`: every fsdp x tensor of the devices over which the heads divide, microbatches of 1 to 8 rows a
   shard, all rows at once or a half, a quarter of them in slots.
2. `guess`: bytes and seconds of each, coarse, by the model below.  It only sorts and prunes.
3. `search` compiles the best few, and takes the fastest that fits by what the compiler says of it.

The model.  Memory: the three models' masters and moments over all devices; beside them the rollout's weights,
caches and slots (rollout/rollout_plan.py), or an update's gradients, head, saved activations and one layer's.  Time:
products at half the peak, or the gathering of weights for each microbatch over one axis of links if that is longer;
decoding reads weights and caches at the full bandwidth.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import aot_job as jobs
from cooper_jax.perf import aot_programs, roofline
from cooper_jax.perf.aot_estimate import Step
from cooper_jax.perf.aot_programs import Job
from cooper_jax.perf.chips import Topology
from cooper_jax.rollout import engine, rollout_plan
from cooper_jax.runtime import device_layouts
from cooper_jax.runtime.mesh import abstract_params
from cooper_jax.settings.setup_errors import SetupError

ROWS_A_SHARD = (1, 2, 4, 8)  # of a microbatch
SLOTS = (1, 2, 4)  # all rows, a half, a quarter of them
HALF = 0.5  # of the peak, in updates
SLACK = 1.25  # what the compiler takes beyond the arrays that are counted


@dataclasses.dataclass(frozen=True)
class Candidate:
    tensor: int
    data: int
    rows: int  # of a microbatch
    max_rows: int  # 0: all

    @property
    def fields(self) -> dict[str, int]:
        """What it changes in a config."""
        return {
            "mesh.data": self.data,
            "mesh.fsdp": -1,
            "mesh.tensor": self.tensor,
            "policy.microbatch": self.rows,
            "reward.microbatch": self.rows,
            "rollout.max_rows": self.max_rows,
        }

    @property
    def flags(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.fields.items())


@dataclasses.dataclass(frozen=True)
class Guess:
    candidate: Candidate
    bytes: float
    seconds: float


def list_candidates(
    cfg: ConfigDict, heads: tuple[int, ...], devices: int, slices: int = 1
) -> list[Candidate]:
    """heads: of every model; a mesh whose tensor axis does not divide them is none.  Data spans the slices."""
    rows = cfg.data.prompts_per_step * cfg.rollout.group_size
    out = []
    for tensor in range(1, devices // slices + 1):
        if devices // slices % tensor or any(h % tensor for h in heads):
            continue
        shards = devices // tensor
        if shards > cfg.data.prompts_per_step:
            continue  # shards without a prompt
        for each, part in itertools.product(ROWS_A_SHARD, SLOTS):
            if each * shards <= rows and rows // part >= shards:
                out.append(Candidate(tensor, slices, each * shards, 0 if part == 1 else rows // part))
    return out


def apply_candidate(cfg: ConfigDict, candidate: Candidate) -> ConfigDict:
    cfg = cfg.copy_and_resolve_references()
    cfg.update_from_flattened_dict(candidate.fields)
    return cfg


def estimate_roughly(job: Job, topology: Topology, candidate: Candidate) -> Guess:
    """Coarse: it sorts candidates, and drops what is far too large."""
    chip, layout = topology.chip, job.layout
    held = sum(aot_programs.resident_bytes(job).values())
    memory, decode = _rollout(job)
    update = max(_update_bytes(job, c, head) for c, head in _trained(job))
    total = held + max(memory, update)
    ring = chip.link * (2 if chip.torus else 1)
    seconds = decode / chip.bandwidth
    tokens = job.rows / layout.batch_shards * sum(job.tokens)
    turns = math.ceil(job.rows / candidate.rows)
    tensor = layout.mesh.shape["tensor"]
    for config, passes in _passes(job):
        body, head = roofline.count_weights(config)
        products = 2 * passes * tokens * (body + head / 2) / tensor / chip.flops / HALF
        gathered = min(passes, 3) * turns * 2 * (body + head) / tensor / ring
        summed = passes * 2 * config.layers * tokens * config.width * 2 * 2 * (tensor - 1) / tensor / ring
        seconds += max(products, gathered + summed)
    return Guess(candidate, total, seconds)


def _trained(job: Job) -> list[tuple[ModelConfig, bool]]:
    """The models that are updated, and whether over the vocabulary."""
    return [(job.policy, True), *([(job.reward, False)] if job.cfg.reward.arm == "cooper" else [])]


def _passes(job: Job) -> list[tuple[ModelConfig, float]]:
    """Forward passes' worth of products over a step's rows: a backward is two, recomputing one more."""
    policy = 1 + (3 + job.cfg.policy.remat) * job.cfg.policy.epochs
    return [(job.policy, policy), *([(job.reward, 1)] if job.reward else [])]


def _rollout(job: Job) -> tuple[float, float]:
    """Bytes that it holds; bytes that its decoding reads."""
    spec, layout = job.setting.spec, job.layout
    places = layout.for_rollout() if job.gathered else layout
    copy = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, spec.dtype, sharding=x.sharding),
        abstract_params(places, transformer.param_specs(job.policy)),
    )
    width = job.cfg.data.max_prompt_tokens
    columns = engine.count_cache_columns(job.setting, waiting=not job.aligned)
    needs = rollout_plan.plan_memory(
        copy, job.policy, layout, job.setting.kv_format, prompts=job.size, width=width, group=spec.group_size,
        new_tokens=spec.max_new_tokens, columns=columns, own_prompts=not job.setting.pallas,
    )  # fmt: skip
    ways = layout.ways(layout.spec(("kv_heads",), (job.policy.kv_heads,))[0])
    token = job.setting.kv_format.bytes_per_token(
        job.policy.layers, job.policy.kv_heads // ways, job.policy.head_dim
    )
    copied = 0 if job.aligned else job.slots * columns * token  # only caches that move are there twice
    held = needs.total(0) + job.slots * (needs.slot - columns * token) + copied
    read = job.size * width * token + job.slots * columns / 2 * token
    return held, job.steps * (needs.weights + read)


def _update_bytes(job: Job, c: ModelConfig, head: bool) -> float:
    """Of an update, beside the state: f32 gradients twice, the head gathered with its gradient, activations."""
    shards = job.layout.batch_shards
    tensor = job.layout.mesh.shape["tensor"]
    section = job.cfg.policy if head else job.cfg.reward
    rows = math.ceil(section.microbatch / shards) * (1 if head else 2)
    tokens = rows * (sum(job.tokens) if head else job.reward_tokens)
    body, vocabulary = roofline.count_weights(c)
    gradients = 2 * 4 * (body + vocabulary) / (shards / job.layout.mesh.shape["data"]) / tensor
    saved = 2 * c.layers * tokens * c.width
    layer = 4 * tokens * (8 * c.width + 8 * c.ffn / tensor)
    return SLACK * (gradients + head * 10 * vocabulary / tensor + saved + layer)


def prune_guesses(guesses: list[Guess], limit: float) -> list[Guess]:
    """Those that may fit: the best of each mesh and number of slots, the fastest first; then the others alike.

    Of two equals the one with the larger microbatch: it starts fewer programs, and multiplies larger matrices.
    """
    first, others, seen = [], [], set()
    for g in sorted((g for g in guesses if g.bytes <= limit), key=lambda g: (g.seconds, -g.candidate.rows)):
        kind = g.candidate.tensor, g.candidate.max_rows
        (others if kind in seen else first).append(g)
        seen.add(kind)
    return first + others


def search_layouts(
    cfg: ConfigDict,
    topology: Topology,
    limit: float,
    compiles: int,
    measure: Callable[[ConfigDict, Candidate], Step | None],
    say: Callable[[str], Any],
) -> tuple[Candidate, Step]:
    """The best of `compiles` candidates that are compiled.

    measure: compiles one, or gives None where the compiler refuses it.  Raises SetupError where none fits.
    """
    slices = len({topology.island(d) for d in topology.devices})
    shared = device_layouts.make_layouts(cfg, topology.devices[:1])["policy"]
    models = [jobs.read_model_shape(cfg.policy, "policy", shared)[0]]
    if cfg.reward.arm != "rule":
        models.append(jobs.read_model_shape(cfg.reward, "reward", shared)[0])
    found, shaped = list_candidates(cfg, tuple(m.heads for m in models), len(topology.devices), slices), {}
    for c in found:
        own = apply_candidate(cfg, c)
        layout = device_layouts.make_layouts(own, topology.devices)["policy"]
        shaped[c] = jobs.describe_job(own, layout, topology.chip.memory)
    guesses = [estimate_roughly(job, topology, c) for c, job in shaped.items()]
    best = prune_guesses(guesses, limit)[:compiles]
    if not best:
        least = min(guesses, key=lambda g: g.bytes, default=None)
        need = (
            f"the smallest of {len(found)} meshes takes about {least.bytes / rollout_plan.GIB:.2f} GiB of a device"
            if least
            else "no mesh"
        )
        raise SetupError(
            f"topology {topology.name!r}: {need}, and {limit / rollout_plan.GIB:.2f} may be used: more chips"
        )
    say(f"{len(found)} candidates, {sum(g.bytes <= limit for g in guesses)} may fit; compiled are")
    for g in best:
        say(f"  {g.candidate.flags}  (guess: {g.bytes / rollout_plan.GIB:.1f} GiB, {g.seconds:.1f} s)")
    steps = {g.candidate: measure(apply_candidate(cfg, g.candidate), g.candidate) for g in best}
    good = {c: s for c, s in steps.items() if s is not None and s.fits}
    if not good:
        raise SetupError(
            f"topology {topology.name!r}: none of the {len(best)} that were compiled fits; raise --search_compiles"
        )
    chosen = min(good, key=lambda c: good[c].seconds)
    return chosen, good[chosen]
