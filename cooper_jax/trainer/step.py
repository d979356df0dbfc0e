"""One step of Cooper (arXiv 2508.05613).

1. Sample G responses to each prompt from the policy.
2. Reward each with the sigmoid of the reward model's logit before its update; the rule verifies it, too.
3. Update the policy with GRPO, while
4. the assistant rewrites positives, responses that the rule finds correct, into wrong negatives.
5. Update the reward model with the contrastive loss over the valid pairs, and on labelled responses where the
   config asks for them.

The arms of the paper's comparison differ in points 2, 4 and 5 alone: `rule` rewards with the verdict and has no
reward model, `model` keeps its reward model frozen, `cooper` updates it.

Departures from the released code: every random draw is keyed by (seed, step, position); a negative is checked
against the reference and rendered by the same template as its positive; the pair loss is normalised over all valid
pairs of the step.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from cooper_jax.reward.pairs.build_pairs import PairResult
from cooper_jax.runtime import hosts, keys
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer import policy_stages, reward_stages
from cooper_jax.trainer.grading import ResponseGrader
from cooper_jax.trainer.rewards import compute_rewards, name_rewards
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step_metrics import measure_step
from cooper_jax.types import Metrics


def cooper_step(
    components: Components, state: State, phases: PhaseTimer
) -> tuple[State, Metrics, StepRecord]:
    """Run one step: the next state, the step's metrics, and a record of its text.

    Raises hosts.Stopped after a SIGTERM, but only while the state given is whole: before the policy's update, which
    donates it.
    """
    settings, step = components.settings, state.step + 1

    # 1. Sample.  Each group is graded as soon as it ends, while the devices sample the others.
    batch = policy_stages.take_problems(components, first=state.position)
    grader = ResponseGrader(components, batch, state.reward)
    rollout_key = keys.make_key(settings.seed, "rollout", step)
    with phases.phase("rollout"):
        rollout, completions, rollout_metrics = policy_stages.sample_responses(
            components, state.policy.params, batch, rollout_key, on_group=grader.add_group
        )

    # 2. Reward.  The last verdicts arrive while the devices compute log-probabilities for point 3.
    scores = None
    if settings.reward.has_model:
        with phases.phase("score"):
            scores = grader.collect_scores()
    hosts.raise_if_stopping()
    with phases.phase("logprobs"):
        policy_batch = policy_stages.compute_logprobs(components, state, batch.prompt_tokens, rollout)
    with phases.phase("rule"):
        verdicts = grader.collect_verdicts()
    rewards = compute_rewards(name_rewards(settings.reward), scores, verdicts, completions)

    # 3. GRPO.  Advantages first.  The assistant is asked (4) before the update, so that the two overlap.
    advantages, zero_variance_groups = policy_stages.compute_advantages(settings, rewards)
    hosts.raise_if_stopping()  # the last time: the policy's update donates the state that a checkpoint would hold
    if settings.reward.updates_at_steps:
        assert scores is not None  # this arm has a reward model, which has scored above
        with phases.phase("pairs"):
            pending_pairs = reward_stages.propose_pairs(
                components, batch, completions, verdicts, scores, step
            )
            labelled_rows, replay = reward_stages.choose_labelled_rows(
                components, batch, completions, verdicts, scores, step, state.replay
            )
    with phases.phase("policy"):
        policy, policy_metrics = policy_stages.update_policy(
            components, state.policy, policy_batch, advantages, step
        )

    # 5. Update the reward model, where the arm does; elsewhere it stays as it is.
    reward, reward_metrics = state.reward, Metrics()
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
    else:
        pair_result, replay = PairResult([], Counter()), state.replay

    record = StepRecord(
        problems=batch.problems,
        completions=completions,
        verdicts=verdicts,
        rewards=rewards,
        advantages=advantages,
        pairs=pair_result.pairs,
        refused=pair_result.refused,
    )
    metrics = {
        "data/position": float(batch.positions.stop),
        "data/epoch": batch.positions.stop / len(components.train),
        "reward/zero_variance_groups": zero_variance_groups,
        **rollout_metrics,
        **measure_step(record, scores, components.oracle),
        **policy_metrics,
        **reward_metrics,
    }
    next_state = dataclasses.replace(
        state, policy=policy, reward=reward, step=step, position=batch.positions.stop, replay=replay
    )
    return next_state, metrics, record
