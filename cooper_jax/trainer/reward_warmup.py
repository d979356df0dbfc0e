"""Warm-up of the reward model: updates on rollouts of the policy at step 0 (not in the paper).

A reward model that was trained on completions of other models has not seen this policy's errors.  The warm-up
trains it on them before its scores reward the policy.  Each of `reward.warmup_updates` updates

1. takes the next problems of an order of its own,
2. samples and grades responses, makes pairs and chooses labelled rows with the stages of a Cooper step,
3. updates the reward model and leaves the policy unchanged.

In the model arm the reward model is frozen afterwards.  That is the control for the updates at the steps.
"""

from __future__ import annotations

import dataclasses

from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.runtime import hosts, keys
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.trainer import policy_stages, reward_stages
from cooper_jax.trainer.grading import ResponseGrader
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step_metrics import measure_hacking, measure_verdicts
from cooper_jax.trainer.supervised import LogPhase

# The number of progress lines, at most.
REPORTS = 8

# The step number that keys the random draws of pairs and labelled rows.  Cooper steps start at 1.
STEP = 0


def warm_up_reward_model(components: Components, state: State, log: LogPhase) -> State:
    """Make `reward.warmup_updates` updates of the reward model, each on a new batch; return the new state.

    log: called with the figures of each update.

    The reward model's input state is donated.  Raises hosts.Stopped after a SIGTERM.
    """
    settings = components.settings
    count = settings.reward_update.warmup_updates
    for update in range(count):
        hosts.raise_if_stopping()

        # Sample and grade.  One key serves all updates: draws are keyed by the problems' positions as well.
        batch = policy_stages.take_problems(
            components, first=update * settings.data.prompts_per_step, stream="reward_warmup"
        )
        grader = ResponseGrader(components, batch, state.reward_params)
        _, completions, _ = policy_stages.sample_responses(
            components,
            state.policy.params,
            batch,
            keys.make_key(settings.seed, "reward_warmup"),
            on_group=grader.add_group,
        )
        scores, verdicts = grader.collect_scores(state.reward_params), grader.collect_verdicts()

        # Update.  There is no policy update to overlap with, so the pairs are awaited at once.
        made = reward_stages.make_pairs(components, batch, completions, verdicts, scores, STEP)
        labelled_rows, replay = reward_stages.choose_labelled_rows(
            components, batch, completions, verdicts, scores, STEP, state.replay
        )
        reward, reward_metrics = reward_stages.update_reward_model(
            components, state.reward_state, made.pairs, labelled_rows
        )
        state = dataclasses.replace(state, reward=reward, replay=replay)

        # The figures of the reward model are those before the update.
        figures = measure_verdicts(verdicts) | measure_hacking(scores, verdicts) | reward_metrics
        log("warmup", update + 1, figures)
        shown = (
            f"rule {figures['rule/accuracy']:.1%}  agreement {figures['rm/rule_agreement']:.3f}  "
            f"false positives {figures['rm/false_positive_rate']:.3f}"
        )
        CONSOLE.show_detail(f"{update + 1}/{count}  {shown}")
        if (update + 1) % max(1, count // REPORTS) == 0 and hosts.is_primary():
            CONSOLE.print_unless_live(
                f"warm-up of the reward model on rollouts: update {update + 1}/{count}  {shown}"
            )

    # A reward model that is never updated again has no use for past rollouts.
    if not settings.reward.updates_at_steps:
        state = dataclasses.replace(state, replay=Replay())
    return state
