"""Search for a mesh, microbatches and slots.  All candidates are estimated by arithmetic, the best compiled.

1. `list_candidates` lists every fsdp x tensor mesh over which the heads divide, with microbatches of 1 to 8
   rows per shard, and with slots for all rows, a half or a quarter of them.
2. `estimate_roughly` computes bytes and seconds of each candidate by the two models below.  They are used
   only to sort and to prune candidates.
3. `search_layouts` compiles the best few and returns the fastest that fits by the compiler's own figures.

The model of memory is a sum of two terms.  The first is the models' float32 parameters and moments, sharded
over all devices.  The second is the larger of the rollout's memory (weights, caches and slots:
rollout/rollout_plan.py) and an update's memory (gradients of the trained parameters, head, activations:
memory_budget.py).

The model of time: matrix products at half the peak, or the all-gather of weights for each microbatch over one
axis of links if that takes longer; decoding reads weights and caches at full bandwidth.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import aot_job, aot_programs, memory_budget, roofline
from cooper_jax.perf.aot_estimate import StepEstimate
from cooper_jax.perf.aot_job import CompileJob
from cooper_jax.perf.chips import GIB, Topology
from cooper_jax.rollout import engine, rollout_plan
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError

# The grid of candidates.
ROWS_PER_SHARD = (1, 2, 4, 8)  # of a microbatch
SLOT_DIVISORS = (1, 2, 4)  # slots for all rows, a half, a quarter of them
# Factors of the arithmetic model.
PEAK_SHARE = 0.5  # of the chip's FLOP/s, in updates
MEMORY_SLACK = 1.25  # the compiler needs more than the arrays that are counted


@dataclasses.dataclass(frozen=True)
class LayoutCandidate:
    """Settings of one candidate: the mesh's axes, the microbatches and the slots."""

    tensor: int
    data: int
    rows: int  # of a microbatch
    max_rows: int  # slots; 0: all rows

    @property
    def fields(self) -> dict[str, int]:
        """The config's fields that the candidate sets."""
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
        """The same as command-line flags."""
        return " ".join(f"--config.{name}={value}" for name, value in self.fields.items())


@dataclasses.dataclass(frozen=True)
class RoughEstimate:
    """A candidate's memory and time by the arithmetic model."""

    candidate: LayoutCandidate
    bytes: float  # of a device
    seconds: float  # of a step


def list_candidates(
    cfg: ConfigDict, heads: tuple[int, ...], devices: int, slices: int = 1
) -> list[LayoutCandidate]:
    """List all candidates whose tensor axis divides the heads and whose batch shards each get a prompt.

    heads: the number of heads of each model.
    """
    # The data axis spans the slices, so that only gradients cross the slow network between them.
    rows = cfg.data.prompts_per_step * cfg.rollout.group_size
    candidates = []
    for tensor in range(1, devices // slices + 1):
        divides = devices // slices % tensor == 0 and all(h % tensor == 0 for h in heads)
        shards = devices // tensor
        if not divides or shards > cfg.data.prompts_per_step:
            continue

        # Each shard needs the rows of a microbatch, and at least one slot.
        for rows_per_shard, divisor in itertools.product(ROWS_PER_SHARD, SLOT_DIVISORS):
            if rows_per_shard * shards <= rows and rows // divisor >= shards:
                max_rows = 0 if divisor == 1 else rows // divisor
                candidates.append(LayoutCandidate(tensor, slices, rows_per_shard * shards, max_rows))
    return candidates


def apply_candidate(cfg: ConfigDict, candidate: LayoutCandidate) -> ConfigDict:
    """A copy of the config with the candidate's settings."""
    cfg = cfg.copy_and_resolve_references()
    cfg.update_from_flattened_dict(candidate.fields)
    return cfg


# --- the arithmetic model --------------------------------------------------------------------------------


def estimate_roughly(job: CompileJob, topology: Topology, candidate: LayoutCandidate) -> RoughEstimate:
    """Estimate a candidate's bytes and seconds, closely enough to sort candidates and to drop large ones."""
    # Memory: rollout and update do not overlap, so only the larger counts beside the training states.
    chip, layout = topology.chip, job.layout
    resident = sum(aot_programs.resident_bytes(job).values())
    rollout_bytes, bytes_read = _estimate_rollout(job)
    total = resident + max(rollout_bytes, _estimate_update_bytes(job))

    # Time.  Communication uses one axis of links, in both directions in a torus.
    link_rate = chip.link * (2 if chip.torus else 1)
    tensor = layout.mesh.shape["tensor"]
    tokens = job.rows / layout.batch_shards * sum(job.row_tokens)  # of a shard
    microbatches = math.ceil(job.rows / candidate.rows)
    seconds = bytes_read / chip.bandwidth
    for config, passes in _list_passes(job):
        body, head = roofline.count_weights(config)
        products = 2 * passes * tokens * (body + head / 2) / tensor / chip.flops / PEAK_SHARE
        # FSDP gathers the weights for each microbatch, in two bytes; tensor parallelism all-reduces
        # activations twice per layer and pass.
        gathered = min(passes, 3) * microbatches * 2 * (body + head) / tensor / link_rate
        summed = (
            passes * 2 * config.layers * tokens * config.width * 2 * 2 * (tensor - 1) / tensor / link_rate
        )
        seconds += max(products, gathered + summed)
    return RoughEstimate(candidate, total, seconds)


def _list_passes(job: CompileJob) -> list[tuple[ModelConfig, float]]:
    """List each model's work over a step's rows, in forward passes.

    A backward pass counts as two, rematerialisation as one more.
    """
    # The first pass of the policy stands for the reference's log-probabilities.  The reward model's updates
    # are not counted, only its scores.
    policy_passes = (job.cfg.policy.kl_coef > 0) + (3 + job.cfg.policy.remat) * job.cfg.policy.epochs
    passes = [(job.policy, policy_passes)]
    if job.reward is not None:
        passes.append((job.reward, 1))
    return passes


def _estimate_rollout(job: CompileJob) -> tuple[float, float]:
    """Estimate (bytes in memory during the rollout, bytes that its decoding reads), on one device."""
    # The rollout's own plan, with which the engine chooses its number of slots.
    static, layout = job.rollout, job.layout
    spec, kv_format = static.spec, static.kv_format
    weights = aot_job.abstract_rollout_weights(job.policy, layout, spec.dtype, job.gathers_weights)
    width = job.cfg.data.max_prompt_tokens
    columns = engine.count_cache_columns(static, waiting=not job.slot_per_request)
    plan = rollout_plan.plan_memory(
        weights, job.policy, layout, kv_format, prompts=job.prompts, width=width, group=spec.group_size,
        new_tokens=spec.max_new_tokens, columns=columns, own_prompts=not static.pallas,
    )  # fmt: skip

    ways = layout.ways(layout.spec(("kv_heads",), (job.policy.kv_heads,))[0])
    token_bytes = kv_format.bytes_per_token(
        job.policy.layers, job.policy.kv_heads // ways, job.policy.head_dim
    )
    # The plan counts each slot's cache twice, as is needed while slots are moved to a new cache.  With a slot
    # for each request none are moved, and the cache is in memory once.
    second_copy = 0 if job.slot_per_request else job.slots * columns * token_bytes
    total = plan.total(0) + job.slots * (plan.slot - columns * token_bytes) + second_copy
    # A decode step reads all prompts, and on average half of each slot's own columns.
    cache_read = job.prompts * width * token_bytes + job.slots * columns / 2 * token_bytes
    return total, job.decode_steps * (plan.weights + cache_read)


def _estimate_update_bytes(job: CompileJob) -> float:
    """Estimate the bytes of an update beside the training states, on one device: of the larger update."""
    needed = [0.0]
    for program in aot_programs.list_updates(job):
        budget = memory_budget.plan_program(job, program)
        assert budget is not None
        needed.append(budget.bytes - budget.resident)
    return MEMORY_SLACK * max(needed)


# --- the search ------------------------------------------------------------------------------------------


def prune_estimates(estimates: Iterable[RoughEstimate], limit: float) -> list[RoughEstimate]:
    """Drop the candidates that cannot fit into `limit` bytes; the others are sorted for compilation.

    First come the fastest candidates of each (mesh, number of slots), then all others; each part is sorted by
    seconds.  Of two equally fast candidates the one with the larger microbatch comes first, because its
    matrix products are fewer and larger.
    """
    fitting = [e for e in estimates if e.bytes <= limit]
    # The rough order of meshes is uncertain, so that a few compilations should cover several of them.
    best: list[RoughEstimate] = []
    others: list[RoughEstimate] = []
    seen = set()
    for estimate in sorted(fitting, key=lambda e: (e.seconds, -e.candidate.rows)):
        kind = estimate.candidate.tensor, estimate.candidate.max_rows
        if kind in seen:
            others.append(estimate)
        else:
            best.append(estimate)
        seen.add(kind)
    return best + others


def search_layouts(
    cfg: ConfigDict,
    topology: Topology,
    limit: float,
    compiles: int,
    measure: Callable[[ConfigDict, LayoutCandidate], StepEstimate | None],
    report: Callable[[str], Any],
) -> tuple[LayoutCandidate, StepEstimate]:
    """Compile the most promising candidates, and return the fastest that fits by the compiler's figures.

    Args:
      limit: bytes of a device that may be used.
      compiles: the number of candidates to compile.
      measure: function that compiles a candidate; it returns None if the compiler refuses the candidate.
      report: function that prints a line.

    Raises SetupError if no candidate fits.
    """
    estimates = _estimate_candidates(cfg, topology)
    best = prune_estimates(estimates, limit)[:compiles]
    if not best:
        least = min(estimates, key=lambda e: e.bytes, default=None)
        need = "no mesh divides the models' heads and the prompts"
        if least is not None:
            gib = f"{least.bytes / GIB:.2f} GiB of a device"
            need = f"the smallest of {len(estimates)} candidates takes about {gib}"
        raise SetupError(
            f"topology {topology.name!r}: {need}, and {limit / GIB:.2f} GiB may be used: give more chips"
        )

    # Compilation takes minutes per candidate, so the list is printed first.
    fitting = sum(e.bytes <= limit for e in estimates)
    report(f"{len(estimates)} candidates, of which {fitting} may fit; these are compiled:")
    for e in best:
        report(f"  {e.candidate.flags}  (rough estimate: {e.bytes / GIB:.1f} GiB, {e.seconds:.1f} s)")

    steps: dict[LayoutCandidate, StepEstimate] = {}
    for e in best:
        step = measure(apply_candidate(cfg, e.candidate), e.candidate)
        if step is not None and step.fits:
            steps[e.candidate] = step
    if not steps:
        raise SetupError(
            f"topology {topology.name!r}: none of the {len(best)} candidates that were compiled fits; raise "
            "--search_compiles"
        )
    chosen = min(steps, key=lambda candidate: steps[candidate].seconds)
    return chosen, steps[chosen]


def _estimate_candidates(cfg: ConfigDict, topology: Topology) -> list[RoughEstimate]:
    """Estimate all candidates for a topology."""
    slices = len({topology.island(d) for d in topology.devices})
    # Heads do not depend on the layout, so one device is enough to read the shapes.
    one_device = device_layouts.make_layouts(cfg, topology.devices[:1])["policy"]
    models = [aot_job.read_model_shape(cfg.policy, "policy", one_device)[0]]
    if cfg.reward.arm != "rule":
        models.append(aot_job.read_model_shape(cfg.reward, "reward", one_device)[0])

    heads = tuple(model.heads for model in models)
    estimates = []
    for candidate in list_candidates(cfg, heads, len(topology.devices), slices):
        candidate_cfg = apply_candidate(cfg, candidate)
        layout = device_layouts.make_layouts(candidate_cfg, topology.devices)["policy"]
        job = aot_job.describe_job(candidate_cfg, layout, topology.chip.memory)
        estimates.append(estimate_roughly(job, topology, candidate))
    return estimates
