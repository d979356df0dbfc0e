"""Checks of whole programs on one device: a rollout, an update's gradients, speeds, and a Cooper step.

    make_check_config     a random model of Qwen2.5-0.5B's shape, or a small one
    check_rollout         log-probabilities of the sampled tokens, against the learner's plain form in float32
    check_update          gradients of the policy's loss, against the plain form in float32
    measure_speeds        tokens/s, and what they are of the roofline and of the chip's peaks
    run_step              one Cooper step through the trainer's own objects

Rollout and update are also run in the plain form and in the config's type.  Their error decides how large that of
the platform's kernels may be: rounding to bfloat16 moves both.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.configs import base, gsm8k_0p5b
from cooper_jax.data import packing
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import bench_measurement, bench_programs, chips, roofline
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.rollout import engine
from cooper_jax.runtime import device_layouts, device_memory, keys, mesh
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer.setup import build_components
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step import cooper_step, finish_step
from cooper_jax.types import Params, Verdict

# The error of the platform's form may be this many times the plain form's, plus a constant for errors near 0.
ERROR_RATIO, ERROR_MARGIN = 3.0, 1e-3
# Layers of the models in check_rollout and check_update: more would only take longer to compile.
CHECKED_LAYERS = 4
# Below this memory the step holds no reference policy.
REFERENCE_GIB = 20
# Beginnings of the metrics that are finite in every step with a pair.
FINITE_METRICS = ("policy/", "reward/mean", "rm/pair_loss")
# Rows of the embedding: those of Qwen2.5-0.5B, rounded up to whole kernel tiles.
EMBEDDING_ROWS = 152_064


@dataclasses.dataclass(frozen=True)
class ProgramResult:
    """The outcome of a check of a whole program."""

    name: str
    form: str
    ok: bool
    error: float
    limit: float
    plain_error: float
    advice: str  # what to do if it is not ok; "" if it is


class PlainLayout(mesh.Layout):
    """A layout whose programs use no kernels, on whatever devices they run."""

    @property
    def platform(self) -> str:
        """A name that selects no kernel."""
        return "plain"


def make_check_config(small: bool, run_dir: str = "") -> ConfigDict:
    """Make the config of the checks: everything random and synthetic, no files but those in run_dir."""
    c = base.get_config()
    c.name, c.run_dir, c.steps = "check_device", run_dir, 1
    c.data.update(format="synthetic", instruction="", chat=False, prompts_per_step=8, max_prompt_tokens=256)
    c.rollout.update(group_size=16, max_new_tokens=128, dtype="bfloat16")
    c.policy.update(dtype="bfloat16", microbatch=16)
    c.reward.update(dtype="bfloat16", microbatch=8, max_tokens=512, allow_untrained_head=True)

    # The tokenizer is trained on the synthetic problems and is small; the embedding has its real size.
    for model in (c.policy, c.reward):
        model.arch.update(gsm8k_0p5b.SHAPE, vocab_size=640)
        model.vocab_multiple = EMBEDDING_ROWS
    c.reward.arch.layers = 6
    if small:
        c.data.update(prompts_per_step=2, max_prompt_tokens=32, bucket=16)
        c.rollout.update(group_size=2, max_new_tokens=6, segment=3)
        c.policy.microbatch = c.reward.microbatch = 4
        c.reward.max_tokens = 96
        for model in (c.policy, c.reward):
            model.arch.update(layers=1, width=32, heads=2, kv_heads=1, head_dim=64, ffn=48)
            model.update(vocab_multiple=256, remat=False)

    # Half of the rows share a slot with another one.
    c.rollout.max_rows = c.data.prompts_per_step * c.rollout.group_size // 2
    # Updates that are far above rounding.
    for model in (c.policy, c.reward):
        model.optimiser.update(lr=1e-4, warmup_steps=0)

    # Negatives that need no assistant.
    c.assistant.kind = "corrupt"
    c.pairs.negatives = ("swap",)
    c.eval.every = 0
    c.log.giveaway_every = 0
    return c


def make_layout(cfg: ConfigDict) -> mesh.Layout:
    """The layout of a run on the first device."""
    return device_layouts.make_layouts(cfg, jax.devices()[:1])["policy"]


def _make_plain(layout: mesh.Layout) -> PlainLayout:
    return PlainLayout(layout.mesh, layout.rules, layout.rollout_rules)


def _make_checked_model(cfg: ConfigDict, layout: mesh.Layout) -> tuple[ModelConfig, Params]:
    """Make the policy with few layers, whose vocabulary is that of the embedding."""
    section = cfg.policy.copy_and_resolve_references()
    section.arch.layers = min(section.arch.layers, CHECKED_LAYERS)
    section.arch.vocab_size = section.vocab_multiple
    return bench_programs.make_bench_model(section, "policy", "logits", layout, cfg.seed)


def _draw_prompts(cfg: ConfigDict, vocabulary: int) -> list[list[int]]:
    """Prompts of uneven lengths, the longest of data.max_prompt_tokens."""
    rng = np.random.default_rng(cfg.seed)
    most = cfg.data.max_prompt_tokens
    lengths = [most, *rng.integers(1, most + 1, cfg.data.prompts_per_step - 1)]
    return [rng.integers(vocabulary, size=n).tolist() for n in lengths]


def _judge_error(name: str, form: str, error: float, plain: float, fallback: str) -> ProgramResult:
    limit = ERROR_RATIO * plain + ERROR_MARGIN
    # A comparison with NaN is False.
    ok = error <= limit and math.isfinite(plain)
    advice = "" if ok else f"{name} is wrong in the form {form}: {fallback}"
    return ProgramResult(name, form, ok, error, limit, plain, advice)


# --- rollout and update --------------------------------------------------------------------------------------


def check_rollout(cfg: ConfigDict, form: str | None = None) -> ProgramResult:
    """Compare a rollout's log-probabilities with those of the learner's plain form in float32.

    The error is the mean absolute difference in nats.  form: of the kernels; None: the platform's.
    """
    layout = make_layout(cfg)
    config, params = _make_checked_model(cfg, layout)
    form = form or engine.choose_kernels(config, layout)
    prompts = _draw_prompts(cfg, config.vocab_size)
    spec = bench_programs.make_bench_sampling(cfg)
    score = grpo.make_logprobs(
        config,
        _make_plain(layout),
        microbatch=cfg.policy.microbatch,
        dtype="float32",
        temperature=cfg.rollout.temperature,
    )

    def measure(form: str) -> float:
        rollout = engine.generate(
            params,
            config,
            layout,
            prompts,
            range(len(prompts)),
            keys.make_key(cfg.seed, "rollout", 1),
            spec,
            max_rows=cfg.rollout.max_rows or None,
            implementation=form,
        )
        batch = packing.pack_policy_batch(prompts, rollout, bucket=cfg.data.bucket, rows_multiple=1)
        # A TPU would multiply float32 numbers in bfloat16.
        with jax.default_matmul_precision("highest"):
            learner = score(params, batch.tokens, batch.valid, batch.response_mask.shape[1])
        mask = np.asarray(batch.response_mask)
        return float(np.mean(np.abs(np.asarray(learner) - np.asarray(batch.rollout_logprobs))[mask]))

    return _judge_error("rollout", form, measure(form), measure("xla"), "--config.rollout.kernels=xla")


def check_update(cfg: ConfigDict) -> ProgramResult:
    """Compare the gradients of the policy's loss with those of the plain form in float32.

    The error is the norm of the difference, relative to the norm of the gradients.
    """
    layout = make_layout(cfg)
    config, params = _make_checked_model(cfg, layout)
    workload = bench_programs.make_workload(
        cfg, config.vocab_size, prompt_tokens=cfg.data.max_prompt_tokens, ragged=True
    )
    batch = bench_programs.make_bench_batch(cfg, config, workload, layout)

    def compute(layout: mesh.Layout, dtype: str) -> Params:
        settings = dataclasses.replace(PolicyConfig.from_config(cfg.policy), dtype=dtype, kl_coef=0.0)
        gradients = grpo.make_gradients(
            config, settings, layout, temperature=1.0, max_new_tokens=cfg.rollout.max_new_tokens
        )
        # A TPU would multiply float32 numbers in bfloat16.
        precision = "highest" if dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            return jax.jit(gradients)(params, batch)[1]

    # One after the other, so that only two sets of gradients are in memory.
    expected = compute(_make_plain(layout), "float32")
    plain = error = _compare_trees(compute(_make_plain(layout), cfg.policy.dtype), expected)
    # On a CPU the plain form is the only one.
    if layout.platform != "cpu":
        error = _compare_trees(compute(layout, cfg.policy.dtype), expected)
    return _judge_error(
        "policy gradients", layout.platform, error, plain, "the checks of the kernels name which one"
    )


@jax.jit
def _compare_norms(got: Params, expected: Params) -> tuple[jax.Array, jax.Array]:
    """Sums of squares: of the difference, and of what is expected."""
    differences = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), got, expected)
    squares = jax.tree.map(lambda b: jnp.sum(jnp.square(b)), expected)
    difference, norm = (jnp.stack(jax.tree.leaves(tree)).sum() for tree in (differences, squares))
    return difference, norm


def _compare_trees(got: Params, expected: Params) -> float:
    """The norm of the difference of two trees, relative to that of the second."""
    difference, norm = _compare_norms(got, expected)
    return float(np.sqrt(difference / norm))


# --- speeds --------------------------------------------------------------------------------------------------


def measure_speeds(
    cfg: ConfigDict, kinds: Sequence[str] = bench_programs.KINDS, reps: int = 2
) -> Iterator[dict[str, Any]]:
    """Measure rollout, scoring and both updates, beside the measured rates and the chip's public peaks.

    kinds: of bench_programs.KINDS.
    """
    cfg = cfg.copy_and_resolve_references()
    cfg.rollout.max_rows = 0
    for model in (cfg.policy, cfg.reward):
        model.arch.vocab_size = model.vocab_multiple
    layout = make_layout(cfg)
    chip = chips.find_chip(jax.devices()[0].device_kind)
    for kind in kinds:
        programs = bench_programs.list_bench_programs(
            kind, cfg, layout, prompt_tokens=cfg.data.max_prompt_tokens, ragged=False
        )
        for program in programs:
            result = bench_measurement.measure_program(program, reps, devices=1)
            yield summarise_speed(result, program.work, chip)


def summarise_speed(
    result: dict[str, Any], work: dict[str, roofline.Work], chip: chips.Chip | None
) -> dict[str, Any]:
    """Reduce a measurement to rates: of a rollout, those of its decoding.

    result: of `measure_program`.  chip: None: its peaks are not known.
    """
    seconds, part = (
        result["median_seconds"],
        roofline.Work(sum(w.flops for w in work.values()), sum(w.bytes for w in work.values())),
    )
    if "decode" in result["phase_seconds"]:
        seconds, part = result["phase_seconds"]["decode"], work["decode"]
    summary = {
        "program": result["program"],
        "tokens_per_second": result["tokens_per_second"],
        "tokens_are": result["tokens_are"],
        "median_seconds": result["median_seconds"],
        "first_call_seconds": result["first_call_seconds"],
        "share_of_roofline": result["roofline"]["share"],
        "flops_per_second": part.flops / seconds,
        "bytes_per_second": part.bytes / seconds,
        "measured_flops_per_second": result["roofline"]["flops_per_second"],
        "measured_bytes_per_second": result["roofline"]["bytes_per_second"],
        "share_of_peak_flops": None,
        "share_of_peak_bandwidth": None,
    }
    if chip is not None:
        summary["share_of_peak_flops"] = summary["flops_per_second"] / chip.flops
        summary["share_of_peak_bandwidth"] = summary["bytes_per_second"] / chip.bandwidth
    return summary


# --- a step --------------------------------------------------------------------------------------------------


def run_step(cfg: ConfigDict, run_dir: Path) -> dict[str, Any]:
    """Run one Cooper step, and check that its metrics are finite and that both models have moved.

    Returns what was checked: `ok`, `problems`, seconds and metrics.
    """
    cfg = cfg.copy_and_resolve_references()
    memory = device_memory.read_device_memory(jax.devices()[0])
    if memory is not None and memory < REFERENCE_GIB * chips.GIB:
        cfg.policy.kl_coef = 0.0

    start = time.perf_counter()
    with build_components(cfg, run_dir) as (components, state):
        components, state = _prepare_step(components, state)
        before = _sum_weights(state)
        phases = PhaseTimer()
        setup_seconds, start = time.perf_counter() - start, time.perf_counter()
        state, metrics, record = finish_step(cooper_step(components, state, phases), phases)
        after = _sum_weights(state)
    seconds = time.perf_counter() - start

    # Other metrics are NaN where there is nothing to measure, such as a score on wrong responses without one.
    problems = [
        f"{name} is {value}"
        for name, value in metrics.items()
        if name.startswith(FINITE_METRICS) and not math.isfinite(value)
    ]
    problems += [f"the {name} did not change" for name in before if before[name] == after[name]]
    pairs = sum(pair is not None for pair in record.pairs)
    if not pairs:
        problems.append("no pair was made")
    return {
        "ok": not problems,
        "problems": problems,
        "setup_seconds": setup_seconds,
        "seconds": seconds,
        "responses": len(record.completions),
        "pairs": pairs,
        "reference": components.settings.policy.has_reference,
        "phases": phases.collect(),
        "metrics": {name: metrics[name] for name in ("policy/loss", "policy/grad_norm") if name in metrics},
    }


class StandInRule:
    """Verdicts of a policy that is always right, and of pairs whose negatives are wrong.

    A random policy solves no problem, so with the rule's own verdicts a step would have no pair.
    """

    def submit(self, items: Sequence[Any]) -> list[Verdict]:
        """Verdicts of responses."""
        return [Verdict.CORRECT for _ in items]

    def collect(self, pending: Sequence[list[Verdict]]) -> list[Verdict]:
        """The verdicts of several submissions, in order."""
        return list(itertools.chain.from_iterable(pending))

    def check(self, items: Sequence[Any]) -> list[Verdict]:
        """Verdicts of negatives."""
        return [Verdict.WRONG for _ in items]


def _prepare_step(components: Components, state: State) -> tuple[Components, State]:
    """Make a step of a random policy possible: with verdicts, ended responses and a copy as the reference."""
    # One token in 16 ends a response, since only ended ones are positives.
    vocabulary = components.policy.model.config.vocab_size
    sampling = dataclasses.replace(components.policy.sampling, eos_ids=tuple(range(0, vocabulary, 16)))
    policy = dataclasses.replace(components.policy, sampling=sampling)
    if components.settings.holds_reference:
        state = dataclasses.replace(state, reference=jax.tree.map(jnp.copy, state.policy.params))
    rule: Any = StandInRule()
    return dataclasses.replace(components, policy=policy, rule=rule), state


@jax.jit
def _add_bits(params: Params) -> jax.Array:
    """A checksum of float32 arrays that any change of a bit changes: the sum of their bits, modulo 2^32."""
    bits = [jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32)) for x in jax.tree.leaves(params)]
    return sum(bits[1:], bits[0])


def _sum_weights(state: State) -> dict[str, int]:
    """A checksum of each trained model."""
    sums = {"policy": int(_add_bits(state.policy.params))}
    if state.reward is not None:
        sums["reward model"] = int(_add_bits(state.reward.params))
    return sums
