"""One step of Cooper (arXiv 2508.05613).

1. Sample G responses to each prompt from the policy.  With data.refill_prompts, groups of equal rewards are
   replaced by groups of further problems.  With rollout.ahead=1 they were sampled during the step before.
2. Reward each response with the sigmoid of the reward model's logit, and verify it with the rule.  With
   reward.functions the user's functions reward it, as soon as its group has ended.
3. Update the policy with GRPO.
4. Meanwhile, the assistant rewrites correct responses (positives) into wrong ones (negatives).  The rule
   verifies both.
5. Update the reward model with the contrastive loss over the valid pairs of a positive and a negative and, if
   the config says so, on labelled responses.

The arms of the paper's comparison differ in points 2, 4 and 5.  In the arm `rule` the reward is the rule's
verdict, and there is no reward model.  In `model` the reward model is frozen.  In `cooper` it is updated.

No device waits for verdicts or for the assistant (overlap=True): point 5 is behind the *next* step's point 1.  The
next rollout does not read the reward model, and its rewards come after point 5, so the numbers are those of the
sequence above.  `cooper_step` is points 1 to 3, and `State.finish` the rest.

Departures from the released code: every random draw is a function of the seed, its stream's name and ids such
as the step and the problem's position (runtime/keys.py); a negative is checked against the reference, and
rendered with the same template as its positive; the pair loss is normalised over all valid pairs of the step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from cooper_jax.reward.pairs.build_pairs import PairResult
from cooper_jax.runtime import hosts
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer import policy_stages, reward_stages
from cooper_jax.trainer.dynamic_sampling import (
    SampledBatch,
    make_rollout_key,
    replace_flat_groups,
    sample_batch,
)
from cooper_jax.trainer.grading import can_score_during_rollout
from cooper_jax.trainer.hacking_guard import freezes_policy, measure_guard, observe, rewards_by_rule
from cooper_jax.trainer.hacking_signals import measure_anchor
from cooper_jax.trainer.reward_functions import CombinedRewards
from cooper_jax.trainer.rollout_ahead import take_batch
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step_metrics import measure_step
from cooper_jax.types import Metrics, Verdict

# Called with the state of a step that has just been completed, its metrics and its record.
OnFinished = Callable[[State, Metrics, StepRecord], None]


@dataclasses.dataclass(frozen=True)
class TrainedStep:
    """What is known of a step whose policy is updated."""

    sampled: SampledBatch
    scores: np.ndarray | None  # f32[N], the reward model's; None in the rule arm
    rewards: CombinedRewards
    advantages: np.ndarray  # f32[N]
    pairs: PairResult | None  # None if they are not made yet
    metrics: Metrics  # of points 1 to 3


def cooper_step(
    components: Components, state: State, phases: PhaseTimer, on_finished: OnFinished | None = None
) -> State:
    """Run points 1 to 3 of a step, and complete the one before it; return the state, to be completed likewise.

    The input policy's state is donated, and the reward model's if the arm updates it.  Raises hosts.Stopped
    after a SIGTERM, but only while the caller can still save the input state, or that of `on_finished`.

    on_finished: called with the state before this step, once it is complete; not if it was complete already.
      What it raises abandons this step.
    """
    settings, step = components.settings, state.step + 1

    # 1. Sample.  The rule verifies each group as soon as it ends, and the assistant rewrites its correct responses
    # then, while the devices sample the others; a reward model with devices of its own scores it then, too.
    if settings.rollout.ahead:
        sampled, state = take_batch(components, state, phases)
    else:
        sampled = sample_batch(
            components,
            state.policy.params,
            phases,
            key=make_rollout_key(components, step),
            step=step,
            first=state.position,
            reward_params=state.reward_params,
        )

    try:
        # 5. of the step before, whose assistant had the time of a rollout.
        if state.finish is not None:
            state, finished_metrics, finished_record = finish_step(state, phases)
            if on_finished is not None:
                on_finished(state, finished_metrics, finished_record)
        if settings.data.refill_prompts and not settings.rollout.ahead:
            sampled = replace_flat_groups(components, state, sampled, phases)
        return _reward_and_update(components, state, sampled, phases)
    except BaseException:
        # Nobody will take the rewrites of a step that is abandoned.
        if sampled.rewrites is not None:
            sampled.rewrites.cancel()
        raise


def _reward_and_update(
    components: Components, state: State, sampled: SampledBatch, phases: PhaseTimer
) -> State:
    """Points 2 and 3 of a step, and the beginning of point 4."""
    settings, step = components.settings, state.step + 1
    batch, grader, completions = sampled.problems, sampled.grader, sampled.completions

    # 2. Reward.  The rule's workers finish while the devices compute log-probabilities for point 3, and later
    # still if no reward depends on a verdict.  The reward model scores before its update in point 5.
    scores = None
    if settings.reward.has_model:
        with phases.phase("score"):
            scores = grader.collect_scores(state.reward_params)
    hosts.raise_if_stopping()
    with phases.phase("logprobs"):
        policy_batch = policy_stages.compute_logprobs(components, state, batch.prompt_tokens, sampled.rollout)
    by_rule = rewards_by_rule(state.guard, settings.guard.hacking_guard)
    verdicts: list[Verdict] = []
    if settings.reward.reads_verdicts or by_rule:
        with phases.phase("rule"):
            verdicts = grader.collect_verdicts()
    with phases.phase("functions"):
        rewards = grader.collect_rewards(scores, verdicts, completions, by_rule)

    advantages, zero_variance_groups = policy_stages.compute_advantages(
        settings, rewards.total, rewards.by_name
    )
    group_size = settings.rollout.group_size
    excluded = policy_stages.find_excluded(
        settings.policy, completions, rewards.total, advantages, group_size
    )
    policy_batch = policy_stages.mask_rows(components, policy_batch, rewards.masked | excluded)

    # 4. Two assistants begin only here: one whose groups dynamic sampling has only now decided on, and one on this
    # run's own devices, which leaves nothing to overlap with.
    if settings.data.refill_prompts and settings.overlap:
        sampled = _start_rewrites(components, sampled, step)
    pairs = None
    if reward_stages.asks_on_devices(components):
        pairs = _make_pairs(components, sampled, scores, phases, step)

    # The last check for a SIGTERM in this step, since the policy's update below donates the input state.
    hosts.raise_if_stopping()

    # 3. Update the policy with GRPO, unless the guard against reward hacking has frozen it.
    policy = state.policy
    policy_metrics: Metrics = {}
    if not freezes_policy(state.guard, settings.guard.hacking_guard):
        with phases.phase("policy"):
            policy, policy_metrics = policy_stages.update_policy(
                components, state.policy, policy_batch, advantages, step
            )

    metrics = {
        # The number of training problems taken so far, and the same in epochs.
        "data/position": float(batch.next_position),
        "data/epoch": batch.next_position / len(components.train),
        "reward/zero_variance_groups": zero_variance_groups,
        **sampled.metrics,
        **policy_metrics,
        **rewards.metrics,
    }

    trained = TrainedStep(sampled, scores, rewards, advantages, pairs, metrics)
    return dataclasses.replace(
        state,
        policy=policy,
        step=step,
        position=batch.next_position,
        finish=functools.partial(_update_and_measure, components, trained),
    )


def finish_step(state: State, phases: PhaseTimer) -> tuple[State, Metrics, StepRecord]:
    """Complete the step of a state of `cooper_step`: (the complete state, the step's metrics, its record).

    The reward model's input state is donated if the arm updates it.
    """
    assert state.finish is not None, f"step {state.step} is complete"

    # A step that has updated the policy can only be saved once it is complete, even after a SIGTERM.
    with hosts.ignore_stop(), phases.in_step(state.step):
        complete, metrics, record = state.finish(state, phases)
    return dataclasses.replace(complete, finish=None), metrics, record


def finishes_behind_rollout(components: Components) -> bool:
    """True if a step is to be completed within the next one; False if it is to be completed at once."""
    settings = components.settings

    # A reward model that scores during the rollout must be up to date before it.  A rollout that is a step ahead
    # has given the assistant its time already, and one on our devices has replied.  Other arms wait for nothing.
    if can_score_during_rollout(components) or settings.rollout.ahead:
        return False
    if reward_stages.asks_on_devices(components):
        return False
    return settings.overlap and settings.reward.updates_at_steps


def _update_and_measure(
    components: Components, trained: TrainedStep, state: State, phases: PhaseTimer
) -> tuple[State, Metrics, StepRecord]:
    """Points 4 and 5 of a step whose policy is updated: (the state, the step's metrics, its record)."""
    sampled, scores, rewards, pairs = trained.sampled, trained.scores, trained.rewards, trained.pairs
    settings, step = components.settings, state.step
    batch, completions = sampled.problems, sampled.completions
    reward, replay = state.reward, state.replay
    reward_metrics: Metrics = {}
    with phases.phase("rule"):
        verdicts = sampled.grader.collect_verdicts()

    # Before its update below, like the scores.
    anchor_metrics = measure_anchor(components, state.reward_params)

    # The other arms leave the reward model unchanged and make no pairs.
    if settings.reward.updates_at_steps:
        assert scores is not None  # only the rule arm has no scores, and it updates no reward model

        # 4. Take the assistant's rewrites, and make the pairs of the other sources.
        if pairs is None:
            pairs = _make_pairs(components, sampled, scores, phases, step)
        with phases.phase("pairs"):
            labelled_rows, replay = reward_stages.choose_labelled_rows(
                components, batch, completions, verdicts, scores, step, replay
            )

        # 5. Update the reward model.
        with phases.phase("reward"):
            reward, reward_metrics = reward_stages.update_reward_model(
                components,
                state.reward_state,
                pairs.pairs,
                labelled_rows,
                settings.reward_update.updates,
            )

    pairs = PairResult() if pairs is None else pairs
    record = StepRecord(
        problems=batch.problems,
        completions=completions,
        verdicts=verdicts,
        rewards=rewards.total,
        advantages=trained.advantages,
        pairs=pairs.pairs,
        refused=pairs.refused,
        rewards_by_name=rewards.by_name,
        sampled_tokens=sampled.sampled_tokens,
        scores=scores,
        prompt_tokens=batch.prompt_tokens,
    )
    metrics = {
        **trained.metrics,
        **measure_step(record, scores, components.oracle),
        **anchor_metrics,
        **reward_metrics,
    }
    guard = state.guard
    if settings.guard.hacking_guard != "off":
        guard = observe(state.guard, step, metrics, len(record.completions))
        metrics |= measure_guard(state.guard, guard, settings.guard.hacking_guard)
    state = dataclasses.replace(
        state,
        guard=guard,
        reward=reward,
        replay=replay,
        recent_rewrites=state.recent_rewrites.append(pairs.pairs, settings.log.rewrites_kept),
    )
    return state, metrics, record


def _make_pairs(
    components: Components,
    sampled: SampledBatch,
    scores: np.ndarray | None,  # f32[N]
    phases: PhaseTimer,
    step: int,
) -> PairResult:
    """Wait for the verdicts and for the assistant, and make the pairs of a step."""
    assert scores is not None  # only the rule arm has no scores, and it makes no pairs
    with phases.phase("rule"):
        verdicts = sampled.grader.collect_verdicts()
    with phases.phase("pairs"):
        return reward_stages.make_pairs(
            components, sampled.problems, sampled.completions, verdicts, scores, step, sampled.rewrites
        )


def _start_rewrites(components: Components, sampled: SampledBatch, step: int) -> SampledBatch:
    """Start the assistant on all groups of a batch, whose verdicts are known."""
    rewrites = reward_stages.open_rewrites(components, sampled.problems, step)
    if rewrites is not None:
        rewrites.add_groups(sampled.completions, sampled.grader.collect_verdicts())
    return dataclasses.replace(sampled, rewrites=rewrites)
