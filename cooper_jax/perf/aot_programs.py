"""Every program of a run, in the order of a step: how it is lowered, how often a step runs it, what memory holds.

A program's compiled outputs, shapes and shardings, are the next one's inputs: what compiles here fits together.
Those of the supervised phases and of the evaluation are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cooper_jax.data.packing import round_up
from cooper_jax.model import transformer
from cooper_jax.perf import kernel_costs
from cooper_jax.perf.aot_job import Job
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import labelled_rollouts, verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.rollout import engine, rollout_plan, slots
from cooper_jax.runtime import optim
from cooper_jax.runtime.mesh import abstract_params
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import LabelledBatch, PairBatch, PolicyBatch, ScoreBatch, TrainState

# What a run holds in memory all the time.
ALWAYS = ("policy", "reference", "reward model")
ROLLOUT = ("rollout weights", "prompts", "requests", "slots")


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    phase: str  # as in the metrics' time/*
    times: float  # how often a step runs it
    lower: Callable[
        [dict[str, Any]], jax.stages.Lowered
    ]  # from the outputs of those before it, by their names
    live: tuple[str, ...]  # what lies in memory meanwhile, its arguments included
    makes: str = ""  # what its output is then called
    trips: int = 1  # of its loops whose end is decided as they run
    declared: kernel_costs.Costs = dataclasses.field(default_factory=dict)


def list_programs(job: Job) -> list[Program]:
    """In the order of a step."""
    found = _rollout(job)
    if job.reward is not None:
        found.append(_score(job))
    found += [_logprobs(job), _policy_update(job)]
    if job.cfg.reward.arm == "cooper":
        found.append(_pair_update(job))
    return found


def resident_bytes(job: Job) -> dict[str, int]:
    """Bytes on a device of what a run holds all the time, as its shards add up (compilers pad some)."""
    trees = {"policy": _state(job, "policy")[1], "reference": _params(job, "policy")}
    if job.reward is not None:
        trees["reward model"] = _state(job, "reward")[1]
    return {name: device_bytes(tree) for name, tree in trees.items()}


def device_bytes(tree: Any) -> int:
    """Of a tree of abstract arrays, on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def _array(job: Job, kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
    axes = ("batch", *(None,) * (len(shape) - 1)) if shape else ()
    return jax.ShapeDtypeStruct(shape, kind, sharding=job.layout.sharding(axes))


def _params(job: Job, name: str) -> Any:
    config, head = (job.policy, "logits") if name == "policy" else (job.reward, "score")
    return abstract_params(job.layout, transformer.param_specs(config, head))


def _state(job: Job, name: str) -> tuple[optim.Optimiser, TrainState]:
    """The optimiser of a model, and the state that it starts from."""
    config, head = (job.policy, "logits") if name == "policy" else (job.reward, "score")
    with setup_errors(name):
        section = optim.OptimiserConfig.from_config(job.cfg[name].optimiser, f"{name}.optimiser")
        opt = optim.make_optimiser(section)
    params, count = _params(job, name), jax.ShapeDtypeStruct((), jnp.int32)
    start = TrainState(params, jax.eval_shape(opt.tx.init, params), count, count)
    places = optim.state_shardings(opt, transformer.param_specs(config, head), job.layout)
    return opt, jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), start, places)


def _rollout(job: Job) -> list[Program]:
    cfg, layout, setting, spec = job.cfg, job.layout, job.setting, job.setting.spec
    i32, shards = jnp.int32, job.layout.batch_shards
    width = rollout_plan.prompt_width(
        cfg.data.max_prompt_tokens, rollout_plan.column_multiple(setting.kv_format)
    )
    texts = [[0] * cfg.data.max_prompt_tokens] * cfg.data.prompts_per_step
    chunks = list(rollout_plan.make_chunks(texts, shards, job.size, width))
    rows, own = chunks[0].tokens.shape
    columns, count = engine.count_cache_columns(setting, waiting=not job.aligned), job.slots
    # Keys and responses, both halfway: what a step of decoding reads on the average.
    keys = cfg.data.max_prompt_tokens, spec.max_new_tokens / 2
    waves = -(-job.requests // count)
    segments = -(-(job.steps // waves) // spec.segment) * waves
    draw = kernel_costs.head_cost(job, job.policy, job.requests, "head_draw")
    key = jax.ShapeDtypeStruct((), jax.random.key(0, impl="threefry2x32").dtype, sharding=layout.replicated)

    def program(name, times, lower, live, **more):
        return Program(name, "rollout", times, lower, (*ALWAYS, *live), **more)

    def first_slots(made):
        return made["open_slots"][0]

    weights_, prompts, requests, _ = ROLLOUT
    out = [
        program(
            "reshard", 1,
            lambda made: engine.reshard_weights.lower(
                _params(job, "policy"), config=job.policy, layout=layout, dtype=spec.dtype, gathered=job.gathered
            ),
            (), makes=weights_,
        ),
        program(
            "no_prompts", 1,
            lambda made: slots.make_prompt_cache.lower(
                made["reshard"], prompts_per_shard=job.size, width=width, static=setting
            ),
            (weights_,), makes=prompts,
        ),
        program(
            "prefill", len(chunks),
            lambda made: slots.prefill_chunk.lower(
                made["reshard"], made["no_prompts"], _array(job, i32, rows, own), _array(job, i32, rows),
                _array(job, i32, job.size * shards), static=setting,
            ),
            (weights_, prompts), declared=kernel_costs.attention_cost(job, job.policy, rows // shards, own, spec.dtype),
        ),
        program(
            "begin", 1,
            lambda made: slots.sample_first_tokens.lower(
                made["reshard"], made["prefill"], _array(job, i32, job.size * shards),
                _array(job, i32, job.requests * shards), key, static=setting,
            ),
            (weights_, prompts), makes=requests, declared=draw,
        ),
        program(
            "open_slots", 1,
            lambda made: slots.open_slots.lower(
                made["reshard"], made["begin"], made["prefill"], slots_per_shard=count, columns=columns, static=setting
            ),
            (weights_, prompts, requests), makes="slots",
        ),
        program(
            "segment", segments,
            lambda made: slots.decode_segment.lower(
                made["reshard"], first_slots(made), made["begin"], made["prefill"], steps=spec.segment,
                refill_at=max(1, count // 8), static=setting,
            ),
            ROLLOUT, trips=max(1, round(job.steps / max(segments, 1))),
            declared=kernel_costs.decode_cost(job, keys) | kernel_costs.head_cost(job, job.policy, count, "head_draw"),
        ),
    ]  # fmt: skip
    if job.aligned:
        return out
    by = jax.ShapeDtypeStruct((), i32, sharding=layout.replicated)

    def state(made):
        return first_slots(made), made["begin"], made["prefill"]

    out += [
        program("refill", waves - 1, lambda made: slots.refill_slots.lower(*state(made), static=setting), ROLLOUT),
        program(
            "resize", waves - 1,
            lambda made: slots.resize_cache.lower(first_slots(made), by, columns=columns, static=setting), ROLLOUT,
        ),
    ]  # fmt: skip
    if count // 2 >= rollout_plan.FEWEST_SLOTS:
        out.append(
            program(
                "compact", 1,
                lambda made: slots.compact_slots.lower(*state(made), slots_per_shard=count // 2, static=setting), ROLLOUT,
            )
        )  # fmt: skip
    return out


def _score(job: Job) -> Program:
    c = RewardUpdateConfig.from_config(job.cfg.reward)
    score = verifier_model.make_score_fn(job.reward, job.layout, dtype=c.dtype, microbatch=c.microbatch)
    batch = ScoreBatch(*_tokens(job, job.rows, job.reward_tokens))
    n = job.microbatch(job.rows, c.microbatch)
    return Program(
        "score", "score", 1, lambda made: score.lower(_params(job, "reward"), batch), ALWAYS,
        declared=kernel_costs.attention_cost(job, job.reward, n, job.reward_tokens, c.dtype),
    )  # fmt: skip


def _logprobs(job: Job) -> Program:
    c, (p, t) = PolicyConfig.from_config(job.cfg.policy), job.tokens
    logprobs = grpo.make_logprobs(
        job.policy,
        job.layout,
        microbatch=c.microbatch,
        dtype=c.dtype,
        temperature=job.cfg.rollout.temperature,
    )
    n = job.microbatch(job.rows, c.microbatch)
    times = 1 if grpo.count_updates(c) == 1 else 2  # the reference; the policy before its updates
    return Program(
        "logprobs", "logprobs", times,
        lambda made: logprobs.lower(_params(job, "policy"), *_tokens(job, job.rows, p + t), t), ALWAYS,
        declared=kernel_costs.attention_cost(job, job.policy, n, p + t, c.dtype)
        | kernel_costs.head_cost(job, job.policy, n * t, "head_score"),
    )  # fmt: skip


def _policy_update(job: Job) -> Program:
    c, (p, t) = PolicyConfig.from_config(job.cfg.policy), job.tokens
    if job.rows % c.minibatches:
        raise SetupError(
            f"policy.minibatches={c.minibatches} does not divide a step's {job.rows} rows: change it"
        )
    rows = job.rows // c.minibatches
    opt, state = _state(job, "policy")
    with setup_errors("policy"):
        update = grpo.make_update(
            job.policy, c, opt, job.layout, temperature=job.cfg.rollout.temperature,
            max_new_tokens=job.cfg.rollout.max_new_tokens,
        )  # fmt: skip
    reals = [_array(job, jnp.float32, rows, t)] * 3
    batch = PolicyBatch(
        *_tokens(job, rows, p + t),
        _array(job, jnp.bool_, rows, t),
        _array(job, jnp.float32, rows),
        *reals,
    )
    n = job.microbatch(rows, c.microbatch)
    return Program(
        "policy update", "policy", grpo.count_updates(c), lambda made: update.lower(state, batch), ALWAYS,
        makes="policy",
        declared=kernel_costs.attention_cost(job, job.policy, n, p + t, c.dtype)
        | kernel_costs.head_cost(job, job.policy, n * t, "head_score"),
    )  # fmt: skip


def _pair_update(job: Job) -> Program:
    """The reward model's update: over pairs, and over labelled rows where it reads them."""
    c, shards, wide = (
        RewardUpdateConfig.from_config(job.cfg.reward),
        job.layout.batch_shards,
        job.reward_tokens,
    )
    opt, state = _state(job, "reward")
    with setup_errors("reward"):
        update = verifier_model.make_reward_update(job.reward, c, opt, job.layout)
    pairs = labelled = None
    n = 0
    if c.reads_pairs:
        count = round_up(job.cfg.data.prompts_per_step * job.cfg.pairs.per_prompt, shards)
        members = (ScoreBatch(*_tokens(job, count, wide)) for _ in range(2))
        pairs = PairBatch(*members, _array(job, jnp.bool_, count))
        n = 2 * job.microbatch(count, c.microbatch)
    if rows := round_up(labelled_rollouts.max_rows_per_update(c), shards):
        reals = (_array(job, jnp.float32, rows) for _ in range(2))
        labelled = LabelledBatch(ScoreBatch(*_tokens(job, rows, wide)), *reals)
        n = max(n, job.microbatch(rows, c.microbatch))
    return Program(
        "pair update", "reward", c.updates, lambda made: update.lower(state, pairs, labelled), ALWAYS,
        makes="reward model", declared=kernel_costs.attention_cost(job, job.reward, n, wide, c.dtype),
    )  # fmt: skip


def _tokens(job: Job, rows: int, tokens: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return _array(job, jnp.int32, rows, tokens), _array(job, jnp.bool_, rows, tokens)
