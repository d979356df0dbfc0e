"""The programs of a step, in order.

Each has a function that lowers it, its number of runs per step, and the arrays that are in memory while it
runs.

A program is lowered with the compiled outputs (shapes and shardings) of the programs before it, as in a run.
The memory of the whole step is therefore estimated with the compiler's own layouts.

The supervised phases and evaluation are not included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cooper_jax.data import row_packing
from cooper_jax.data.packing import round_up
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import kernel_costs
from cooper_jax.perf.aot_job import CompileJob
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import labelled_rollouts, verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.rollout import engine, rollout_plan, slots
from cooper_jax.rollout.rollout_config import RolloutConfig
from cooper_jax.runtime import optim
from cooper_jax.runtime.mesh import abstract_params
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import (
    LabelledBatch,
    PackedLabelled,
    PackedPairs,
    PackedRows,
    PairBatch,
    PolicyBatch,
    ScoreBatch,
    TrainState,
)

# Names of the trees of arrays in memory: during the whole run, and in addition during the rollout.  The devices of
# a rollout one step ahead have AHEAD during the whole run, and not ALWAYS.
ALWAYS = ("policy", "reference", "reward model")
AHEAD = ("rollout's policy",)
ROLLOUT = ("rollout weights", "prompts", "requests", "slots")

# The outputs of the programs compiled so far, by the programs' names.
Outputs = dict[str, Any]


class MicrobatchShape(NamedTuple):
    """The sizes of a microbatch on one device."""

    rows: int
    tokens: int  # of a row
    read: int  # hidden states of a row that the head reads
    microbatches: int  # in one run of the program

    @property
    def positions(self) -> int:
        """Tokens of the microbatch, padding included."""
        return self.rows * self.tokens


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One of a step's programs, not yet lowered."""

    name: str
    phase: str  # as in the metric time/PHASE
    times: float  # runs per step
    lower: Callable[[Outputs], jax.stages.Lowered]
    # Memory, by the names in ALWAYS and ROLLOUT.
    live: tuple[str, ...]  # trees in memory while it runs, its arguments included
    makes: str = ""  # the name of its output, if that stays in memory
    # The microbatches of each kind of rows, for the phases that compute in microbatches.
    microbatches: tuple[MicrobatchShape, ...] = ()
    # Costs that the compiled text does not contain.
    trips: int = 1  # iterations of loops whose end is decided at run time
    declared: kernel_costs.Costs = dataclasses.field(default_factory=dict)


def list_programs(job: CompileJob) -> list[StepProgram]:
    """List the programs of a step, in the order in which it runs them."""
    programs = _list_rollout(job.rollout_job, ALWAYS if job.ahead is None else AHEAD)
    if job.reward is not None:
        programs.append(_make_score(job, job.reward))
    logprobs = _make_logprobs(job)
    programs += [logprobs] if logprobs.times else []
    return programs + list_updates(job)


def list_updates(job: CompileJob) -> list[StepProgram]:
    """List the programs that update a model."""
    programs = [_make_policy_update(job)]
    if job.reward is not None and job.cfg.reward.arm == "cooper":
        programs.append(_make_reward_update(job, job.reward))
    return programs


def resident_bytes(job: CompileJob) -> dict[str, int]:
    """Count the bytes per device of each tree in ALWAYS and AHEAD, from their shapes (compilers pad some)."""
    # The policy and the reward model are training states: parameters and the optimiser's moments.
    trees = {"policy": make_state(job, "policy", job.policy, "logits")[1]}
    if PolicyConfig.from_config(job.cfg.policy).has_reference:
        trees["reference"] = _policy_params(job)
    if job.reward is not None:
        trees["reward model"] = make_state(job, "reward", job.reward, "score")[1]
    sizes = {name: device_bytes(tree) for name, tree in trees.items()}
    if job.ahead is not None:
        # Two copies: the one that is sampled with, and the one that a stopped step would be repeated with.
        sizes[AHEAD[0]] = 2 * device_bytes(_policy_params(job.ahead))
    return sizes


def device_bytes(tree: Any) -> int:
    """Count the bytes of a tree of abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


# --- abstract inputs -------------------------------------------------------------------------------------


# The return types are Any, because abstract arrays take the place of real ones in the batches' dataclasses.
def _array(job: CompileJob, dtype: Any, *shape: int) -> Any:
    """Make an abstract array, sharded over its first axis."""
    axes = ("batch", *(None,) * (len(shape) - 1)) if shape else ()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=job.layout.sharding(axes))


def _tokens(job: CompileJob, rows: int, tokens: int) -> tuple[Any, Any]:
    """Make abstract token ids and their mask: (i32[rows, tokens], bool[rows, tokens])."""
    return _array(job, jnp.int32, rows, tokens), _array(job, jnp.bool_, rows, tokens)


def _policy_params(job: CompileJob) -> Any:
    return abstract_params(job.layout, transformer.param_specs(job.policy, "logits"))


def make_state(
    job: CompileJob, section: str, config: ModelConfig, head: str
) -> tuple[optim.Optimiser, TrainState]:
    """Make a model's optimiser, and its abstract training state."""
    with setup_errors(section):
        settings = optim.OptimiserConfig.from_config(job.cfg[section].optimiser, f"{section}.optimiser")
        optimiser = optim.make_optimiser(settings)

    # eval_shape gives shapes only, so the optimiser's shardings are added afterwards.
    specs = transformer.param_specs(config, head)
    params: Any = abstract_params(job.layout, specs)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(optimiser.tx.init, optim.select_trained(params)), count, count)
    shardings = optim.state_shardings(optimiser, specs, job.layout)
    sharded = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
    )
    return optimiser, sharded


# --- rollout ---------------------------------------------------------------------------------------------


def _list_rollout(job: CompileJob, resident: tuple[str, ...]) -> list[StepProgram]:
    """List the rollout's programs: copy of the weights, prefill, decode segments and, if needed, refills.

    resident: the trees that are in its devices' memory during the whole run.
    """
    cfg, layout, static, spec = job.cfg, job.layout, job.rollout, job.rollout.spec
    shards, slot_count = layout.batch_shards, job.slots

    # Prompts are prefilled in chunks of equal shape, so that one program serves all of them.
    kv_format = static.kv_format
    width = rollout_plan.prompt_width(cfg.data.max_prompt_tokens, rollout_plan.column_multiple(kv_format))
    prompt_ids = [[0] * cfg.data.max_prompt_tokens] * cfg.data.prompts_per_step
    chunks = list(rollout_plan.make_chunks(prompt_ids, shards, job.prompts, width, fixed_rows=True))
    chunk_rows, chunk_tokens = chunks[0].tokens.shape

    # Each slot decodes `waves` responses one after the other, in segments of spec.segment steps.
    waves = -(-job.requests // slot_count)
    segments = -(-(job.decode_steps // waves) // spec.segment) * waves
    columns = engine.count_cache_columns(static, waiting=not job.slot_per_request)

    # Abstract arguments that are no program's output.
    prompt_indices = _array(job, jnp.int32, job.prompts * shards)
    request_indices = _array(job, jnp.int32, job.requests * shards)
    chunk = _array(job, jnp.int32, chunk_rows, chunk_tokens), _array(job, jnp.int32, chunk_rows)
    key_dtype = jax.random.key(0, impl="threefry2x32").dtype
    key = jax.ShapeDtypeStruct((), key_dtype, sharding=layout.replicated)

    # Each function lowers one program, in the order in which the engine runs them.  The arguments are those
    # of the engine's own calls, since other static arguments would compile other programs.
    def lower_reshard(outputs: Outputs) -> jax.stages.Lowered:
        return engine.reshard_weights.lower(
            _policy_params(job),
            config=job.policy,
            layout=layout,
            dtype=spec.dtype,
            gathered=job.gathers_weights,
        )

    def lower_no_prompts(outputs: Outputs) -> jax.stages.Lowered:
        return slots.make_prompt_cache.lower(
            outputs["reshard"], prompts_per_shard=job.prompts, width=width, static=static
        )

    def lower_prefill(outputs: Outputs) -> jax.stages.Lowered:
        return slots.prefill_chunk.lower(
            outputs["reshard"], outputs["no_prompts"], *chunk, prompt_indices, static=static
        )

    def lower_begin(outputs: Outputs) -> jax.stages.Lowered:
        return slots.sample_first_tokens.lower(
            outputs["reshard"], outputs["prefill"], prompt_indices, request_indices, key, static=static
        )

    def lower_open_slots(outputs: Outputs) -> jax.stages.Lowered:
        return slots.open_slots.lower(
            outputs["reshard"], outputs["begin"], outputs["prefill"],
            slots_per_shard=slot_count, columns=columns, static=static,
        )  # fmt: skip

    def lower_segment(outputs: Outputs) -> jax.stages.Lowered:
        return slots.decode_segment.lower(
            outputs["reshard"], outputs["open_slots"][0], outputs["begin"], outputs["prefill"],
            steps=spec.segment, refill_at=max(1, slot_count // 8), static=static,
        )  # fmt: skip

    # Costs of the kernels, and the programs with the arrays that are in memory while each runs: ROLLOUT[:k]
    # are the trees that exist by then.
    weights_name, prompts_name, requests_name, slots_name = ROLLOUT
    attention = kernel_costs.attention_cost(job, job.policy, chunk_rows // shards, chunk_tokens, spec.dtype)
    first_head = kernel_costs.head_cost(job, job.policy, job.requests, "head_draw")
    decode = kernel_costs.decode_cost(job, average_keys(job))
    segment_costs = decode | kernel_costs.head_cost(job, job.policy, slot_count, "head_draw")
    programs = [
        _rollout_program("reshard", 1, lower_reshard, (), makes=weights_name),
        _rollout_program("no_prompts", 1, lower_no_prompts, ROLLOUT[:1], makes=prompts_name),
        _rollout_program(
            "prefill", len(chunks), lower_prefill, ROLLOUT[:2],
            microbatches=(MicrobatchShape(chunk_rows // shards, chunk_tokens, 1, 1),), declared=attention,
        ),
        _rollout_program("begin", 1, lower_begin, ROLLOUT[:2], makes=requests_name, declared=first_head),
        _rollout_program("open_slots", 1, lower_open_slots, ROLLOUT[:3], makes=slots_name),
        _rollout_program(
            "segment", segments, lower_segment, ROLLOUT,
            trips=max(1, round(job.decode_steps / max(segments, 1))), declared=segment_costs,
        ),
    ]  # fmt: skip
    if not job.slot_per_request:
        programs += _list_refills(job, waves, columns)
    return [dataclasses.replace(program, live=(*resident, *program.live)) for program in programs]


def average_keys(job: CompileJob) -> tuple[float, float]:
    """Average the keys that a decode step reads per row: all of the prompt's, and half of the response's."""
    return job.cfg.data.max_prompt_tokens, job.rollout.spec.max_new_tokens / 2


def _list_refills(job: CompileJob, waves: int, columns: int) -> list[StepProgram]:
    """List the programs that move slots, which only a rollout with more requests than slots runs."""
    static = job.rollout
    shift = jax.ShapeDtypeStruct((), jnp.int32, sharding=job.layout.replicated)

    def lower_refill(outputs: Outputs) -> jax.stages.Lowered:
        state = outputs["open_slots"][0], outputs["begin"], outputs["prefill"]
        return slots.refill_slots.lower(*state, static=static)

    def lower_resize(outputs: Outputs) -> jax.stages.Lowered:
        return slots.resize_cache.lower(outputs["open_slots"][0], shift, columns=columns, static=static)

    def lower_compact(outputs: Outputs) -> jax.stages.Lowered:
        state = outputs["open_slots"][0], outputs["begin"], outputs["prefill"]
        return slots.compact_slots.lower(*state, slots_per_shard=job.slots // 2, static=static)

    # Assumed runs: one refill and one resize per wave after the first, and one compaction at the end.
    programs = [
        _rollout_program("refill", waves - 1, lower_refill, ROLLOUT),
        _rollout_program("resize", waves - 1, lower_resize, ROLLOUT),
    ]
    if job.slots // 2 >= rollout_plan.FEWEST_SLOTS:
        programs.append(_rollout_program("compact", 1, lower_compact, ROLLOUT))
    return programs


def _rollout_program(
    name: str,
    times: float,
    lower: Callable[[Outputs], jax.stages.Lowered],
    live: tuple[str, ...],
    **options: Any,
) -> StepProgram:
    return StepProgram(name, "rollout", times, lower, live, **options)


# --- scores and updates ----------------------------------------------------------------------------------


def _make_score(job: CompileJob, reward: ModelConfig) -> StepProgram:
    """Make the program of the reward model's scores of all responses."""
    settings = RewardUpdateConfig.from_config(job.cfg.reward)
    score: Any = verifier_model.make_score_fn(
        reward, job.layout, dtype=settings.dtype, microbatch=settings.microbatch
    )
    params = abstract_params(job.layout, transformer.param_specs(reward, "score"))
    batch: ScoreBatch | PackedRows
    if _packs(job, reward, settings):
        batch = _make_packed_inputs(job, reward, job.rows)
        shape = _shape_packed(job, batch)
    else:
        batch = ScoreBatch(*_tokens(job, job.rows, job.reward_tokens))
        shape = _shape_rows(job, job.rows, settings.microbatch, job.reward_tokens, read=1)
    return StepProgram(
        "score", "score", 1, lambda outputs: score.lower(params, batch), ALWAYS, microbatches=(shape,),
        declared=kernel_costs.attention_cost(job, reward, shape.rows, shape.tokens, settings.dtype),
    )  # fmt: skip


def _packs(job: CompileJob, model: ModelConfig, settings: PolicyConfig | RewardUpdateConfig) -> bool:
    """True if the model's rows are packed, as in training."""
    return transformer.should_pack(settings.packing, model, job.layout, settings.dtype)


def _make_packed_inputs(job: CompileJob, reward: ModelConfig, units: int, together: int = 1) -> PackedRows:
    """Make abstract packed rows of reward-model inputs, or with together=2 of pairs, all of the largest length."""
    longest = together * job.reward_tokens
    plan = row_packing.choose_packing(
        # As in training, where inputs have up to reward.max_tokens.
        together * job.cfg.reward.max_tokens,
        job.cfg.reward.microbatch,
        job.layout.batch_shards,
        width=reward.width,
        bucket=job.cfg.data.bucket,
    )
    per_row = min(plan.row_tokens // longest, plan.sequences // together)
    return _make_abstract_rows(job, plan, units, per_row, plan.sequences)


def _make_abstract_rows(
    job: CompileJob, plan: row_packing.Packing, units: int, per_row: int, read: int
) -> PackedRows:
    """Make abstract packed rows, of which all microbatches are computed.

    per_row: units, sequences or pairs of them, in a row.  read: columns whose hidden states are read, Q.
    """
    # The microbatch of training; and two of them where it keeps a running sum of the gradients.
    _, rows = plan.choose_microbatches(units, job.layout.batch_shards)
    microbatches = max(-(-units // (rows * per_row)), min(-(-units // rows), 2))

    def array(columns: int) -> Any:
        shape = microbatches, rows, columns
        sharding = job.layout.sharding((None, "batch", None), shape)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    tokens, sequences = array(plan.row_tokens), array(plan.sequences)
    return PackedRows(
        tokens,
        tokens,
        tokens,
        array(read),
        sequences,
        sequences,
        count=None,
        targets=array(read),
        prefixes=tokens if plan.shares_prompts else None,
    )


def _make_logprobs(job: CompileJob) -> StepProgram:
    """Make the program of log-probabilities.

    It runs on the reference, if there is one, and on the policy if a step has several updates of the policy.
    With a single update the policy's own log-probabilities come from the update's forward pass.
    """
    settings, (prompt, response) = PolicyConfig.from_config(job.cfg.policy), job.row_tokens
    options: dict[str, Any] = dict(dtype=settings.dtype, temperature=job.cfg.rollout.temperature)
    logprobs: Any
    inputs: tuple[Any, ...]
    if _packs(job, job.policy, settings):
        logprobs = grpo.make_packed_logprobs(job.policy, job.layout, **options)
        inputs = _make_packed_rows(job, job.rows), _array(job, jnp.bool_, job.rows, response)
    else:
        logprobs = grpo.make_logprobs(job.policy, job.layout, microbatch=settings.microbatch, **options)
        inputs = *_tokens(job, job.rows, prompt + response), response
    shape = _shape_policy_rows(job, job.rows)
    return StepProgram(
        "logprobs",
        "logprobs",
        settings.has_reference + (grpo.count_updates(settings) > 1),
        lambda outputs: logprobs.lower(_policy_params(job), *inputs),
        ALWAYS,
        microbatches=(shape,),
        declared=_policy_costs(job, shape, settings),
    )


def _make_packed_rows(job: CompileJob, sequences: int) -> PackedRows:
    """Make abstract packed rows of so many prompts with responses, all of the largest length."""
    prompt, response = job.row_tokens
    plan = row_packing.choose_packing(
        prompt + response,
        job.cfg.policy.microbatch,
        job.layout.batch_shards,
        width=job.policy.width,
        bucket=job.cfg.data.bucket,
        shares_prompts=(
            job.cfg.policy.share_prompts and transformer.supports_shared_prompts(job.policy, job.layout)
        ),
        # The shortest prompt is not known, so that the rows are those of a run with very short ones.
        new_tokens=response,
    )
    per_row = min(plan.row_tokens // (prompt + response), plan.sequences)
    return _make_abstract_rows(job, plan, sequences, per_row, plan.read_tokens)


def _make_policy_update(job: CompileJob) -> StepProgram:
    """Make the program of one update of the policy on one minibatch."""
    settings, (prompt, response) = PolicyConfig.from_config(job.cfg.policy), job.row_tokens
    if job.rows % settings.minibatches:
        raise SetupError(
            f"policy.minibatches={settings.minibatches} does not divide a step's {job.rows} rows: change it"
        )
    rows = job.rows // settings.minibatches
    rollout = RolloutConfig.from_config(job.cfg.rollout)
    optimiser, state = make_state(job, "policy", job.policy, "logits")
    with setup_errors("policy"):
        update: Any = grpo.make_update(
            job.policy, settings, optimiser, job.layout, temperature=job.cfg.rollout.temperature,
            max_new_tokens=job.cfg.rollout.max_new_tokens,
            sampler_agrees=rollout.is_float32 and not rollout.ahead,
        )  # fmt: skip

    # A minibatch at its full width; the three log-probabilities have the same shape.
    tokens, valid = _tokens(job, rows, prompt + response)
    packed: list[PackedRows] = []
    per_token = _array(job, jnp.float32, rows, response)
    batch = PolicyBatch(
        tokens=tokens,
        valid=valid,
        response_mask=_array(job, jnp.bool_, rows, response),
        advantages=_array(job, jnp.float32, rows),
        old_logprobs=per_token,
        ref_logprobs=per_token,
        rollout_logprobs=per_token,
        thresholds=None if rollout.samples_all_tokens else per_token,
    )
    if _packs(job, job.policy, settings):
        packed, batch = [_make_packed_rows(job, rows)], batch.without_tokens()
    shape = _shape_policy_rows(job, rows)
    return StepProgram(
        "policy update",
        "policy",
        grpo.count_updates(settings),
        lambda outputs: update.lower(state, batch, *packed),
        ALWAYS,
        makes="policy",
        microbatches=(shape,),
        declared=_policy_costs(job, shape, settings),
    )


def _shape_policy_rows(job: CompileJob, rows: int) -> MicrobatchShape:
    """Shape the policy's microbatches: `rows` prompts with responses on the whole mesh, packed or not."""
    settings, (prompt, response) = PolicyConfig.from_config(job.cfg.policy), job.row_tokens
    if _packs(job, job.policy, settings):
        return _shape_packed(job, _make_packed_rows(job, rows))
    return _shape_rows(job, rows, settings.microbatch, prompt + response, response)


def _shape_rows(job: CompileJob, rows: int, microbatch: int, tokens: int, read: int) -> MicrobatchShape:
    """Shape the microbatches of `rows` rows, counted on the whole mesh, which are not packed."""
    n = job.count_microbatch_rows(rows, microbatch)
    return MicrobatchShape(n, tokens, read, -(-rows // (n * job.layout.batch_shards)))


def _shape_packed(job: CompileJob, packed: PackedRows) -> MicrobatchShape:
    """Shape the microbatches of packed rows."""
    count, rows, columns = packed.tokens.shape
    return MicrobatchShape(rows // job.layout.batch_shards, columns, packed.predictors.shape[-1], count)


def _policy_costs(job: CompileJob, shape: MicrobatchShape, settings: PolicyConfig) -> kernel_costs.Costs:
    """Estimate the costs of the policy's attention and head in a microbatch."""
    attention = kernel_costs.attention_cost(job, job.policy, shape.rows, shape.tokens, settings.dtype)
    return attention | kernel_costs.head_cost(job, job.policy, shape.rows * shape.read, "head_score")


def _make_abstract_pairs(
    job: CompileJob, reward: ModelConfig, settings: RewardUpdateConfig
) -> tuple[PairBatch | PackedPairs | None, tuple[MicrobatchShape, ...]]:
    """Make a step's abstract pairs, and the shape of their microbatches; None, () without."""
    count, shards = job.cfg.data.prompts_per_step * job.cfg.pairs.per_prompt, job.layout.batch_shards
    if not settings.reads_pairs:
        return None, ()
    if _packs(job, reward, settings):
        packed = _make_packed_inputs(job, reward, count, together=2)
        return PackedPairs(packed, _replicated(job, jnp.bool_, count)), (_shape_packed(job, packed),)

    count = round_up(count, shards)
    member = ScoreBatch(*_tokens(job, count, job.reward_tokens))
    pairs = PairBatch(positive=member, negative=member, mask=_array(job, jnp.bool_, count))
    # Both members of a pair are in one microbatch.
    shape = _shape_rows(job, count, settings.microbatch, job.reward_tokens, read=1)
    return pairs, (shape._replace(rows=2 * shape.rows),)


def _make_abstract_labelled(
    job: CompileJob, reward: ModelConfig, settings: RewardUpdateConfig
) -> tuple[LabelledBatch | PackedLabelled | None, tuple[MicrobatchShape, ...]]:
    """Make an update's abstract labelled rows, and the shape of their microbatches; None, () without."""
    count = labelled_rollouts.max_rows_per_update(settings)
    if not count:
        return None, ()
    if _packs(job, reward, settings):
        packed = _make_packed_inputs(job, reward, count)
        per_row = _replicated(job, jnp.float32, count)
        return PackedLabelled(packed, per_row, per_row), (_shape_packed(job, packed),)

    count = round_up(count, job.layout.batch_shards)
    per_row = _array(job, jnp.float32, count)
    rows = ScoreBatch(*_tokens(job, count, job.reward_tokens))
    labelled = LabelledBatch(rows=rows, labels=per_row, weights=per_row)
    return labelled, (_shape_rows(job, count, settings.microbatch, job.reward_tokens, read=1),)


def _replicated(job: CompileJob, dtype: Any, count: int) -> Any:
    return jax.ShapeDtypeStruct((count,), dtype, sharding=job.layout.replicated)


def _make_reward_update(job: CompileJob, reward: ModelConfig) -> StepProgram:
    """Make the program of one reward-model update: on pairs, and on labelled rows if the config has any."""
    settings = RewardUpdateConfig.from_config(job.cfg.reward)
    optimiser, state = make_state(job, "reward", reward, "score")
    with setup_errors("reward"):
        update: Any = verifier_model.make_reward_update(reward, settings, optimiser, job.layout)

    # The declared cost of attention is that of the largest microbatch, an upper bound for the others.
    pairs, shapes = _make_abstract_pairs(job, reward, settings)
    labelled, label_shapes = _make_abstract_labelled(job, reward, settings)
    shapes += label_shapes
    n, tokens = max(shape.rows for shape in shapes), max(shape.tokens for shape in shapes)

    return StepProgram(
        "pair update",
        "reward",
        settings.updates,
        lambda outputs: update.lower(state, pairs, labelled),
        ALWAYS,
        makes="reward model",
        microbatches=shapes,
        declared=kernel_costs.attention_cost(job, reward, n, tokens, settings.dtype),
    )
