"""Sampling of a step's responses, and dynamic sampling: flat groups are replaced by groups of the next problems.

1. `sample_batch` samples responses to the next problems and starts to grade them.
2. `replace_flat_groups` grades them to the end and finds the flat groups: those without an advantage, or whose
   rewards deviate by at most `policy.flat_std`.  As many further problems as there are flat groups are sampled and
   graded, and so on, until no group is flat or `data.refill_prompts` further problems were sampled.  Flat groups
   that could not be replaced stay in the batch.

Source: DAPO (arXiv 2503.14476, section 3.2), which samples without a limit, in batches of a constant size.

A refill is a part of its step.  After a SIGTERM within it the step starts again from its first problem, so a
resumed run takes the same problems and samples the same responses.

    B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cooper_jax.policy.advantages import find_flat_groups
from cooper_jax.reward.pairs.concurrent_rewrites import ConcurrentRewrites
from cooper_jax.runtime import hosts, keys
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer import policy_stages, reward_stages
from cooper_jax.trainer.grading import Grades, ResponseGrader
from cooper_jax.trainer.hacking_guard import rewards_by_rule
from cooper_jax.trainer.policy_stages import ProblemBatch
from cooper_jax.trainer.state import Components, State
from cooper_jax.types import Completion, Metrics, Params, Rollout, Verdict


@dataclasses.dataclass(frozen=True)
class SampledBatch:
    """The problems of a step, their responses, and the grader that grades these."""

    problems: ProblemBatch
    rollout: Rollout
    completions: list[Completion]  # [N]
    grader: ResponseGrader | Grades
    metrics: Metrics
    sampled_tokens: int  # also those of groups that were replaced
    rewrites: ConcurrentRewrites | None = None  # the assistant's, which are being made


def make_rollout_key(components: Components, step: int) -> jax.Array:
    """Make the key of a step's rollouts.

    One key serves all batches of a step: draws are keyed by the problems' positions as well.
    """
    return keys.make_key(components.settings.seed, "rollout", step)


def sample_batch(
    components: Components,
    params: Params,
    phases: PhaseTimer,
    *,
    key: jax.Array,
    step: int,
    first: int,
    count: int | None = None,
    reward_params: Params | None = None,
    between_segments: Callable[[], None] = hosts.raise_if_stopping,
) -> SampledBatch:
    """Sample G responses to each of the next problems.

    The rule verifies each group as soon as it ends, and the assistant is asked to rewrite its correct responses
    then, while the other groups are being sampled.

    Args:
      params: the policy's, on the rollout's devices.
      key: of the step's draws, from `make_rollout_key`.
      step: keys the draws of the rewrites.
      first: position of the first problem.
      count: the number of problems; None: data.prompts_per_step.
      reward_params: the reward model's, to score responses while others are sampled; None: they are scored
        later.
      between_segments: called between two decode segments; what it raises ends the rollout.
    """
    batch = policy_stages.take_problems(components, first, count=count)
    grader = ResponseGrader(components, batch, reward_params, rewards_policy=True)

    # Groups that dynamic sampling may still replace are not rewritten.
    rewrites = None
    if components.settings.overlap and not components.settings.data.refill_prompts:
        rewrites = reward_stages.open_rewrites(components, batch, step)

    ended = 0

    def start_grading(index: int, responses: Sequence[Completion], tokens: Sequence[Sequence[int]]) -> None:
        nonlocal ended
        ended += 1
        CONSOLE.show_detail(f"{ended} of {len(batch.problems)} groups")
        grader.add_group(index, responses, tokens)
        if rewrites is not None:
            rewrites.add_group(index, responses)

    try:
        with phases.phase("rollout"):
            rollout, completions, metrics = policy_stages.sample_responses(
                components,
                params,
                batch,
                key,
                layout=components.policy.rollout_layout,
                on_group=start_grading,
                between_segments=between_segments,
            )
    except BaseException:
        # Nobody will take the rewrites of a rollout that is abandoned.
        if rewrites is not None:
            rewrites.cancel()
        raise
    tokens = sum(completion.tokens for completion in completions)
    return SampledBatch(batch, rollout, completions, grader, metrics, tokens, rewrites)


def replace_flat_groups(
    components: Components, state: State, sampled: SampledBatch, phases: PhaseTimer
) -> SampledBatch:
    """Replace flat groups by groups of further problems, at most `data.refill_prompts` of them.

    Args:
      state: before the step.
      sampled: the step's first batch, sampled with the weights of `state.sampling_params`.

    The result has as many groups, in the order of their problems' positions.  Its metrics are those of the first
    rollout, and

        data/refill_prompts    further problems that were sampled
        data/refill_rounds     rollouts in which they were sampled
        data/replaced_groups   flat groups that were replaced
        rule/sampled_accuracy  the share of correct responses among all that were sampled
    """
    wanted, budget = len(sampled.problems.problems), components.settings.data.refill_prompts
    reward_params = state.reward_params
    by_rule = rewards_by_rule(state.guard, components.settings.guard.hacking_guard)
    graded = _grade(components, sampled, reward_params, phases, by_rule)
    flat, sampled_prompts, rounds = graded.flat, 0, 0
    while flat.any() and sampled_prompts < budget:
        hosts.raise_if_stopping()

        # Smaller batches than the first: the rows of the groups that are still missing.
        missing = min(wanted - int((~flat).sum()), budget - sampled_prompts)
        if missing <= 0:
            break
        more = sample_batch(
            components,
            state.sampling_params,
            phases,
            key=make_rollout_key(components, state.step + 1),
            step=state.step + 1,
            first=graded.next_position,
            count=missing,
            reward_params=reward_params,
        )
        graded = graded.concatenate(_grade(components, more, reward_params, phases, by_rule))
        flat, sampled_prompts, rounds = graded.flat, sampled_prompts + missing, rounds + 1

    # All groups that are not flat, then flat ones if they are too few, each in the order of the data.
    chosen = np.sort(np.argsort(flat, kind="stable")[:wanted])
    correct = [verdict is Verdict.CORRECT for verdict in graded.grades.verdicts]
    metrics = {
        "data/refill_prompts": float(sampled_prompts),
        "data/refill_rounds": float(rounds),
        "data/replaced_groups": float(flat.sum() - flat[chosen].sum()),
        "rule/sampled_accuracy": float(np.mean(correct)),
    }
    kept = graded.take_groups(chosen)
    if components.policy.resample is not None:
        # The learner's log-probabilities again, in the batch in which the update computes them: as exact.py says,
        # they are those of one program on the same arrays.
        rollout = policy_stages.set_learner_logprobs(
            components, state.policy.params, kept.problems.prompt_tokens, kept.rollout
        )
        kept = dataclasses.replace(kept, rollout=rollout)
    return dataclasses.replace(kept, metrics=sampled.metrics | metrics)


@dataclasses.dataclass(frozen=True)
class _GradedBatch:
    """Responses with their grades, of one rollout or of several."""

    problems: Sequence[ProblemBatch]
    rollouts: Sequence[Rollout]
    completions: list[Completion]
    grades: Grades
    flat: np.ndarray  # bool[B]

    @property
    def next_position(self) -> int:
        """Position of the first problem that was not sampled."""
        return self.problems[-1].next_position

    def concatenate(self, other: _GradedBatch) -> _GradedBatch:
        """These responses and then those of `other`."""
        return _GradedBatch(
            [*self.problems, *other.problems],
            [*self.rollouts, *other.rollouts],
            self.completions + other.completions,
            self.grades.concatenate(other.grades),
            np.concatenate([self.flat, other.flat]),
        )

    def take_groups(self, groups: np.ndarray) -> SampledBatch:
        """The batch of some groups.  groups: i[n], ascending indices."""
        group_size = len(self.completions) // len(self.flat)
        rows = (groups[:, None] * group_size + np.arange(group_size)[None, :]).reshape(-1)

        # Every rollout has T columns.
        def take_rows(name: str) -> np.ndarray | None:
            parts = [getattr(rollout, name) for rollout in self.rollouts]
            return None if parts[0] is None else np.concatenate(parts)[rows]

        # NumPy arrays, as in every rollout on the host.
        arrays: dict[str, Any] = {field.name: take_rows(field.name) for field in dataclasses.fields(Rollout)}
        problems = [problem for batch in self.problems for problem in batch.problems]
        tokens = [prompt for batch in self.problems for prompt in batch.prompt_tokens]
        positions = [position for batch in self.problems for position in batch.positions]
        row_problems = [problem for batch in self.problems for problem in batch.row_problems]
        return SampledBatch(
            problems=ProblemBatch(
                problems=[problems[i] for i in groups],
                prompt_tokens=[tokens[i] for i in groups],
                positions=[positions[i] for i in groups],
                next_position=self.next_position,
                row_problems=[row_problems[n] for n in rows],
            ),
            rollout=Rollout(**arrays),
            completions=[self.completions[n] for n in rows],
            grader=self.grades.take(rows),
            metrics={},
            sampled_tokens=sum(completion.tokens for completion in self.completions),
        )


def _grade(
    components: Components,
    sampled: SampledBatch,
    reward_params: Params | None,
    phases: PhaseTimer,
    by_rule: bool,
) -> _GradedBatch:
    """Wait for the grades of a batch, and find its flat groups.  by_rule: see `ResponseGrader.collect_rewards`."""
    settings, grader = components.settings, sampled.grader
    scores = None
    if settings.reward.has_model:
        with phases.phase("score"):
            scores = grader.collect_scores(reward_params)
    with phases.phase("rule"):
        verdicts = grader.collect_verdicts()
    with phases.phase("functions"):
        rewards = grader.collect_rewards(scores, verdicts, sampled.completions, by_rule)
    advantages, _ = policy_stages.compute_advantages(settings, rewards.total, rewards.by_name)
    flat = find_flat_groups(rewards.total, advantages, settings.rollout.group_size, settings.policy.flat_std)
    grades = Grades(scores, verdicts, rewards)
    return _GradedBatch([sampled.problems], [sampled.rollout], sampled.completions, grades, flat)
