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

Departures from the released code: every random draw is a function of the seed, its stream's name and ids such
as the step and the problem's position (runtime/keys.py); a negative is checked against the reference, and
rendered with the same template as its positive; the pair loss is normalised over all valid pairs of the step.
"""

from __future__ import annotations

import dataclasses

from cooper_jax.reward.pairs.build_pairs import PairResult
from cooper_jax.runtime import hosts
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer import policy_stages, reward_stages
from cooper_jax.trainer.dynamic_sampling import make_rollout_key, replace_flat_groups, sample_batch
from cooper_jax.trainer.rollout_ahead import take_batch
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step_metrics import measure_step
from cooper_jax.types import Metrics


def cooper_step(
    components: Components, state: State, phases: PhaseTimer
) -> tuple[State, Metrics, StepRecord]:
    """Run one step and return the next state, the step's metrics and a record of its text.

    The input policy's state is donated, and the reward model's if the arm updates it.  Raises hosts.Stopped
    after a SIGTERM, but only before the first donation, so that the caller can still save the input state.
    """
    settings, step = components.settings, state.step + 1

    # 1. Sample.  The rule verifies each group as soon as it ends, while the devices sample the others; a reward
    # model with devices of its own scores it then, too.
    if settings.rollout.ahead:
        sampled, state = take_batch(components, state, phases)
    else:
        sampled = sample_batch(
            components,
            state.policy.params,
            phases,
            key=make_rollout_key(components, step),
            first=state.position,
            reward_params=state.reward_params,
        )
        if settings.data.refill_prompts:
            sampled = replace_flat_groups(components, state, sampled, phases)
    batch, grader, completions = sampled.problems, sampled.grader, sampled.completions

    # 2. Reward.  The rule's workers finish while the devices compute log-probabilities for point 3.  The
    # reward model scores before its update in point 5.
    scores = None
    if settings.reward.has_model:
        with phases.phase("score"):
            scores = grader.collect_scores(state.reward_params)
    hosts.raise_if_stopping()
    with phases.phase("logprobs"):
        policy_batch = policy_stages.compute_logprobs(components, state, batch.prompt_tokens, sampled.rollout)
    with phases.phase("rule"):
        verdicts = grader.collect_verdicts()
    with phases.phase("functions"):
        rewards = grader.collect_rewards(scores, verdicts, completions)

    advantages, zero_variance_groups = policy_stages.compute_advantages(
        settings, rewards.total, rewards.by_name
    )
    group_size = settings.rollout.group_size
    excluded = policy_stages.find_excluded(
        settings.policy, completions, rewards.total, advantages, group_size
    )
    policy_batch = policy_stages.mask_rows(components, policy_batch, rewards.masked | excluded)

    # The last check for a SIGTERM in this step, since the policy's update below donates the input state.
    hosts.raise_if_stopping()

    # 4. Request negatives.  This comes before the policy's update, so that the assistant works during it.
    replay = state.replay
    if settings.reward.updates_at_steps:
        assert scores is not None  # only the rule arm has no scores, and it updates no reward model
        with phases.phase("pairs"):
            pending_pairs = reward_stages.request_pairs(
                components, batch, completions, verdicts, scores, step
            )
            labelled_rows, replay = reward_stages.choose_labelled_rows(
                components, batch, completions, verdicts, scores, step, replay
            )

    # 3. Update the policy with GRPO.
    with phases.phase("policy"):
        policy, policy_metrics = policy_stages.update_policy(
            components, state.policy, policy_batch, advantages, step
        )

    # 5. Update the reward model.  The other arms leave it unchanged and make no pairs.
    reward = state.reward
    pair_result = PairResult()
    reward_metrics: Metrics = {}
    if settings.reward.updates_at_steps:
        with phases.phase("pairs"):
            pair_result = pending_pairs.result()
        with phases.phase("reward"):
            reward, reward_metrics = reward_stages.update_reward_model(
                components,
                state.reward_state,
                pair_result.pairs,
                labelled_rows,
                settings.reward_update.updates,
            )

    record = StepRecord(
        problems=batch.problems,
        completions=completions,
        verdicts=verdicts,
        rewards=rewards.total,
        advantages=advantages,
        pairs=pair_result.pairs,
        refused=pair_result.refused,
        rewards_by_name=rewards.by_name,
        sampled_tokens=sampled.sampled_tokens,
    )
    metrics = {
        # The number of training problems taken so far, and the same in epochs.
        "data/position": float(batch.next_position),
        "data/epoch": batch.next_position / len(components.train),
        "reward/zero_variance_groups": zero_variance_groups,
        **sampled.metrics,
        **measure_step(record, scores, components.oracle),
        **rewards.metrics,
        **policy_metrics,
        **reward_metrics,
    }
    next_state = dataclasses.replace(
        state,
        policy=policy,
        reward=reward,
        step=step,
        position=batch.next_position,
        replay=replay,
        recent_rewrites=state.recent_rewrites.append(pair_result.pairs, settings.log.rewrites_kept),
    )
    return next_state, metrics, record
