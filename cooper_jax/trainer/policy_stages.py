"""The policy's stages of a step: sample responses, compute log-probabilities, update the policy.

1. `take_problems` takes the next problems of the data order.
2. `sample_responses` samples G responses to each problem, as arrays and as text.
3. `compute_logprobs` packs the responses into a `PolicyBatch` with the reference's log-probabilities.
4. `compute_advantages` compares each reward with the others of its group.
5. `update_policy` makes the step's GRPO updates.

Every process runs the same calls on the same text.  Arrays have the layout of the model that reads them.
Rows are padded to a multiple of the mesh's batch shards; padding rows have no weight in any loss or metric.

    B  prompts   G  samples per prompt   N = B * G  rows, prompt-major   P  prompt tokens   T  response tokens
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.data import packing, row_packing
from cooper_jax.model import transformer
from cooper_jax.policy import advantages, grpo
from cooper_jax.policy.advantages import find_flat_groups
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.rollout import engine, exact, rollout_plan
from cooper_jax.runtime import hosts, keys
from cooper_jax.runtime.mesh import Layout
from cooper_jax.runtime.metrics import to_host
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.state import Components, State
from cooper_jax.types import (
    Completion,
    Metrics,
    PackedRows,
    Params,
    PolicyBatch,
    Problem,
    Rollout,
    TrainState,
)


@dataclasses.dataclass(frozen=True)
class ProblemBatch:
    """The problems of a step."""

    problems: list[Problem]  # [B]
    prompt_tokens: list[Sequence[int]]  # [B]

    # [B], ascending positions in the sequence of all epochs.  Random draws are keyed by them, so a response does
    # not depend on the other problems of its batch.
    positions: Sequence[int]
    next_position: int  # of the first problem that no step has taken yet

    row_problems: list[Problem]  # [N], each problem G times


def take_problems(
    components: Components, first: int, stream: str = "shuffle", count: int | None = None
) -> ProblemBatch:
    """Take the training problems at positions first, first + 1, ... of a shuffled order.

    A batch may cross the end of an epoch.

    Args:
      stream: the random stream that shuffles each epoch.
      count: the number of problems; None: data.prompts_per_step.
    """
    settings = components.settings
    positions = range(first, first + (count or settings.data.prompts_per_step))
    chosen = [components.data_order.problem_at(p, settings.seed, stream) for p in positions]
    problems = [components.train[i] for i in chosen]

    row_problems: list[Problem] = []
    for problem in problems:
        row_problems += [problem] * settings.rollout.group_size
    return ProblemBatch(
        problems=problems,
        prompt_tokens=[components.train_prompts[i] for i in chosen],
        positions=positions,
        next_position=positions.stop,
        row_problems=row_problems,
    )


def sample_responses(
    components: Components,
    params: Params,
    batch: ProblemBatch,
    key: jax.Array,
    *,
    layout: Layout | None = None,
    on_group: Callable[[int, list[Completion], list[list[int]]], None] | None = None,
    between_segments: Callable[[], None] = hosts.raise_if_stopping,
) -> tuple[Rollout, list[Completion], Metrics]:
    """Sample G responses to each problem; return them as arrays and as text, with metrics of the sampling.

    layout: of the params; None: the policy's.
    on_group: called once per problem, with its index in the batch and its G responses, as text and as token
      ids, as soon as all of them have ended and while other groups are still being sampled.

    between_segments: called between two decode segments.  The default raises hosts.Stopped after a SIGTERM.
    """
    model, spec = components.policy.model, components.policy.sampling
    metrics: Metrics = {}  # filled by the engine

    def decode(rollout: Rollout) -> list[Completion]:
        return engine.decode_completions(rollout, model.tokenizer.decode, spec.eos_ids)

    def split_groups(indices: list[int], rows: Rollout) -> None:
        # The engine reports several groups that ended in the same decode segment together.
        assert on_group is not None  # otherwise the engine does not get this function
        responses, tokens = decode(rows), engine.list_tokens(rows)
        for i, index in enumerate(indices):
            group = slice(i * spec.group_size, (i + 1) * spec.group_size)
            on_group(index, responses[group], tokens[group])

    # The rollouts of whole steps share their programs.  Those of data.refill_prompts have fewer prompts, and few
    # different sizes.
    num_prompts = components.settings.data.prompts_per_step
    is_whole = len(batch.problems) == num_prompts
    if not is_whole:
        platform = (layout or components.layout).platform
        num_prompts = min(num_prompts, rollout_plan.choose_shared_prompts(len(batch.problems), platform))
    shapes = engine.SharedShapes(components.longest_prompt, num_prompts, compile_all=is_whole)
    # An exact rollout is graded when it has been corrected.
    is_exact = components.policy.resample is not None
    rollout = engine.generate(
        params,
        model.config,
        layout or components.layout,
        batch.prompt_tokens,
        batch.positions,
        key,
        spec,
        shapes=shapes,
        on_groups=None if on_group is None or is_exact else split_groups,
        between_segments=between_segments,
        report=metrics.update,
        **components.settings.rollout.make_engine_options(),
    )
    if is_exact:
        rollout, exact_metrics = correct_rollout(components, params, batch, rollout, key)
        metrics |= exact_metrics
        if on_group is not None:
            split_groups(list(range(len(batch.problems))), rollout)
    return rollout, decode(rollout), metrics


def correct_rollout(
    components: Components, params: Params, batch: ProblemBatch, draft: Rollout, key: jax.Array
) -> tuple[Rollout, Metrics]:
    """Make a rollout exact: its tokens are those that the learner samples, its log-probabilities the learner's.

    Returns the rollout and metrics of `exact.correct_draft`, and exact/logprob_difference, the largest difference
    in nats between the distributions that tokens were sampled from and those of the learner's log-probabilities,
    at the sampled tokens.  Both are of the same forward pass, in two programs.

    Raises hosts.Stopped after a SIGTERM.
    """
    settings, layout = components.settings, components.layout
    model, spec = components.policy.model, components.policy.sampling
    resample = components.policy.resample
    assert resample is not None, "only a run with exact=True corrects rollouts"

    def continue_rollout(
        prompts: list[list[int]], positions: list[int], limits: list[int], continued: engine.Continuation
    ) -> Rollout:
        return engine.generate(
            params,
            model.config,
            layout,
            prompts,
            positions,
            key,
            dataclasses.replace(spec, group_size=1),
            limits=limits,
            continued=continued,
            between_segments=hosts.raise_if_stopping,
            **settings.rollout.make_engine_options(),
        )

    rollout, metrics = exact.correct_draft(
        draft,
        params,
        layout,
        batch.prompt_tokens,
        batch.positions,
        key,
        spec,
        bucket=settings.data.bucket,
        longest_prompt=components.longest_prompt,
        resample=resample,
        continue_rollout=continue_rollout,
    )

    exact_rollout = set_learner_logprobs(components, params, batch.prompt_tokens, rollout)
    difference = np.abs(np.asarray(exact_rollout.logprobs) - np.asarray(rollout.logprobs))
    metrics["exact/logprob_difference"] = float(difference[np.asarray(rollout.mask)].max(initial=0.0))
    return exact_rollout, metrics


def set_learner_logprobs(
    components: Components, params: Params, prompt_tokens: Sequence[Sequence[int]], rollout: Rollout
) -> Rollout:
    """Replace a rollout's log-probabilities by those that the learner computes for its tokens."""
    # The same program on the same arrays as in `compute_logprobs`.
    packed = pack_responses(components, prompt_tokens, rollout)
    tokens, valid = components.layout.put((packed.tokens, packed.valid), "batch")
    logprobs = components.policy.logprobs(params, tokens, valid, packed.response_mask.shape[1])
    return dataclasses.replace(rollout, logprobs=hosts.fetch_arrays(logprobs)[: len(rollout.tokens)])


def pack_responses(
    components: Components, prompt_tokens: Sequence[Sequence[int]], rollout: Rollout
) -> PolicyBatch:
    """Pack prompts and responses into the arrays of the policy's batch, on the host."""
    # The packed rows serve both meshes: their number is a multiple of the batch shards of each.
    layouts = (components.layout, components.policy.reference_layout)
    settings = components.settings
    return packing.pack_policy_batch(
        prompt_tokens,
        rollout,
        bucket=settings.data.bucket,
        rows_multiple=math.lcm(*(layout.batch_shards for layout in layouts)),
        longest_prompt=components.longest_prompt,
    )


def pack_sequences(
    components: Components, layout: Layout, batch: PolicyBatch, rows: np.ndarray | None = None
) -> PackedRows:
    """Pack the sequences of a batch's rows -> NumPy arrays.

    layout: of the model that reads them.  batch: its tokens and valid are on the host.  rows: i64[n]; None: all.
    """
    settings = components.settings
    tokens, valid = np.asarray(batch.tokens), np.asarray(batch.valid)
    if rows is not None:
        tokens, valid = tokens[rows], valid[rows]

    # The same for all steps, so that programs are compiled once.
    config = components.policy.model.config
    plan = row_packing.choose_packing(
        components.longest_prompt + settings.rollout.max_new_tokens,
        settings.policy.microbatch,
        layout.batch_shards,
        width=config.width,
        bucket=settings.data.bucket,
        shares_prompts=settings.policy.share_prompts and transformer.supports_shared_prompts(config, layout),
        new_tokens=settings.rollout.max_new_tokens,
        shortest_prompt=components.shortest_prompt,
    )
    response_length = batch.response_mask.shape[1]
    return row_packing.pack_policy_rows(tokens, valid, response_length, plan, layout.batch_shards)


def sample_held_out_responses(components: Components, params: Params, temperature: float) -> list[Completion]:
    """Sample the evaluation's responses to the held-out problems; greedy ones at temperature 0.

    The key is the same in every evaluation, so two evaluations of one policy are equal.
    """
    settings, model = components.settings, components.policy.model

    # The rollout's settings, except for the sampling distribution.  Greedy responses to one prompt are all
    # equal, so one is enough.
    spec = dataclasses.replace(
        components.policy.sampling,
        temperature=temperature,
        top_p=settings.eval.top_p,
        top_k=0,
        min_p=0.0,
        group_size=settings.eval.samples if temperature else 1,
    )

    rollout = engine.generate(
        params,
        model.config,
        components.layout,
        components.held_out_prompts,
        range(len(components.held_out)),
        keys.make_key(settings.seed, "evaluation"),
        spec,
        shapes=engine.SharedShapes(
            longest_prompt=max(map(len, components.held_out_prompts)),
            num_prompts=len(components.held_out_prompts),
            compile_all=True,
        ),
        # A rare rollout with many rows: fewer sizes compile sooner, and cost little.
        shrink=4,
        between_segments=hosts.raise_if_stopping,
        **settings.rollout.make_engine_options(),
    )
    return engine.decode_completions(rollout, model.tokenizer.decode, spec.eos_ids)


def compute_logprobs(
    components: Components, state: State, prompt_tokens: Sequence[Sequence[int]], rollout: Rollout
) -> PolicyBatch:
    """Pack the policy's batch, with log-probabilities under the reference and under the current policy.

    With packed rows its tokens and valid stay on the host: the model computes on packed rows.
    If a step makes a single update, the current policy's log-probabilities are those that the update computes
    itself.  The forward pass is then skipped, unless the run is exact, and `old_logprobs` stays zero and unread.
    So does `ref_logprobs` in a run without a reference.
    """
    layout, reference_layout = components.layout, components.policy.reference_layout

    on_host = pack_responses(components, prompt_tokens, rollout)
    is_packed = components.policy.packs_rows
    inputs: Callable[[Layout], tuple[Any, ...]]
    if is_packed:
        batch = layout.put(on_host.without_tokens(), "batch")

        @functools.cache  # a layout's packed rows serve the reference and the policy
        def inputs(on: Layout) -> tuple[Any, ...]:
            packed = pack_sequences(components, on, on_host)
            return on.put(packed, None, "batch"), on.put(on_host.response_mask, "batch")

    else:
        batch = layout.put(on_host, "batch")

        def inputs(on: Layout) -> tuple[Any, ...]:
            arrays = batch.tokens, batch.valid
            if on != layout:
                arrays = on.put((on_host.tokens, on_host.valid), "batch")
            return *arrays, batch.response_mask.shape[1]

    # The reference is dispatched first.  If it has its own devices, it runs in parallel with the policy's
    # forward pass below, and its inputs and outputs are transferred through the host.
    ref_logprobs = None
    if components.settings.policy.has_reference:
        # With adapters the reference is the policy's own base.
        reference = state.policy.params if state.reference is None else state.reference
        ref_logprobs = components.policy.reference_logprobs(reference, *inputs(reference_layout))

    if grpo.count_updates(components.settings.policy) > 1 or components.settings.exact:
        old_logprobs = components.policy.logprobs(state.policy.params, *inputs(layout))
        batch = dataclasses.replace(batch, old_logprobs=old_logprobs)
    if ref_logprobs is not None:
        if reference_layout != layout:
            ref_logprobs = layout.put(hosts.fetch_arrays(ref_logprobs), "batch")
        batch = dataclasses.replace(batch, ref_logprobs=ref_logprobs)

    # JAX computes asynchronously: without this wait, the time would be measured in a later phase.
    batch = jax.block_until_ready(batch)
    if is_packed:
        batch = dataclasses.replace(batch, tokens=on_host.tokens, valid=on_host.valid)
    return batch


def compute_advantages(
    settings: RunSettings, rewards: np.ndarray, by_name: Mapping[str, np.ndarray] | None = None
) -> tuple[np.ndarray, float]:
    """The advantages of the responses within their groups, f32[N], and the share of zero-variance groups.

    Args:
      rewards: f32[N].
      by_name: the rewards of which they are the weighted sum, f32[N] each; read with reward.function_normalise.
    """
    group_size = settings.rollout.group_size
    options: dict[str, Any] = dict(
        baseline=settings.policy.baseline,
        std=settings.policy.std,
        eps=settings.policy.std_eps,
        floor=settings.policy.std_floor,
    )
    if by_name and settings.reward.function_normalise:
        stacked = jnp.asarray(np.stack(list(by_name.values())))
        values, zero_variance_groups = advantages.decoupled_advantages(
            stacked, settings.reward.weights, group_size, **options
        )
    else:
        values, zero_variance_groups = advantages.normalise_rewards(
            jnp.asarray(rewards), group_size, **options
        )
    return np.asarray(values), float(zero_variance_groups)


def find_excluded(
    policy: PolicyConfig,
    completions: Sequence[Completion],
    rewards: np.ndarray,
    advantages: np.ndarray,
    group_size: int,
) -> np.ndarray:
    """Find the responses without a part in the policy's loss, bool[N].

    With mask_truncated these are the truncated ones, whose rewards still count in the baselines and standard
    deviations; with mask_flat_groups, all of the groups that `find_flat_groups` finds.

    rewards, advantages: f32[N].
    """
    excluded = np.array([policy.mask_truncated and completion.truncated for completion in completions])
    if policy.mask_flat_groups:
        is_flat = find_flat_groups(rewards, advantages, group_size, policy.flat_std)
        excluded |= np.repeat(is_flat, group_size)
    return excluded


def mask_rows(components: Components, batch: PolicyBatch, masked: np.ndarray) -> PolicyBatch:
    """Take responses out of the policy's loss.  masked: bool[N], True for those that are taken out."""
    if not masked.any():
        return batch
    kept = packing.pad_rows(~masked, batch.response_mask.shape[0])
    mask = jnp.logical_and(batch.response_mask, components.layout.put(kept, "batch")[:, None])
    return dataclasses.replace(batch, response_mask=mask)


def update_policy(
    components: Components, policy: TrainState, batch: PolicyBatch, advantages: np.ndarray, step: int
) -> tuple[TrainState, Metrics]:
    """Make the step's GRPO updates.  advantages: f32[N].  The policy's input state is donated."""
    settings = components.settings

    # Padding rows get advantage 0; they have no response token, so the loss does not read it.
    padded = packing.pad_rows(np.asarray(advantages, np.float32), batch.response_mask.shape[0])
    batch = dataclasses.replace(batch, advantages=components.layout.put(padded, "batch"))
    padding: list[float] = []  # of each update
    pack = None
    if components.policy.packs_rows:

        def pack(rows: np.ndarray, batch: PolicyBatch = batch) -> PackedRows:
            packed = pack_sequences(components, components.layout, batch, rows)
            padding.append(row_packing.measure_padding(packed))
            return components.layout.put(packed, None, "batch")

        batch = batch.without_tokens()
    key = keys.make_key(settings.seed, "minibatch", step)
    policy, metrics = grpo.update_on_rollouts(
        policy, batch, key, settings.policy, components.policy.update, pack
    )
    by_name = to_host(metrics, "policy")
    if padding:
        by_name["policy/padding"] = float(np.mean(padding))
    return policy, by_name
