"""Labelled rollouts: responses of this and earlier steps, labelled by the rule verifier.

1. A response has label 1 if the rule finds it correct and it is not truncated, and label 0 if the rule finds
   it wrong or finds no answer in it.  Responses on which the rule abstains are left out.  The exact truth of
   synthetic problems is never used.
2. Each step chooses at most `rollout_rows` of its responses, half of them from each class; if one class is
   too small, the other fills the rest.  Half of the wrong ones are those with the highest reward; all other
   rows are random.
3. With `replay`, correct responses, and wrong responses with a reward above one half, are kept for later
   steps: up to `replay` per class, first in, first out.  `replay_rows` of the rows kept *before* this step
   are added to its rows.
4. Both classes have the same total weight: the weights of each class sum to one half.

All random draws are keyed by (seed, step, first position).  The paper has no labelled rollouts: this module
is our extension; see docs/reward_updates.md.

    N  rows of a step, prompt-major   n  labelled rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.runtime import keys
from cooper_jax.types import Completion, Problem, Triple, Verdict

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Replay:
    """Labelled rollouts of earlier steps, oldest first.  Immutable; part of a run's checkpointed state."""

    wrong: tuple[Triple, ...] = ()  # each had a reward above one half at its own step
    correct: tuple[Triple, ...] = ()

    # A new object, and not a change in place: a checkpoint of the state before the step stays valid.
    def append(self, wrong: Sequence[Triple], correct: Sequence[Triple], capacity: int) -> Replay:
        """A new memory with these rows added, cut to the newest `capacity` rows of each class."""
        return Replay(
            wrong=(*self.wrong, *wrong)[-capacity:],
            correct=(*self.correct, *correct)[-capacity:],
        )

    def to_json(self) -> dict[str, list[list[str]]]:
        """Class name -> [question, reference, completion] of each row."""
        return {"wrong": _triples_to_json(self.wrong), "correct": _triples_to_json(self.correct)}

    @classmethod
    def from_json(cls, rows_by_class: dict[str, list[list[str]]]) -> Replay:
        """The memory that `to_json` returned as JSON."""
        return cls(
            wrong=_triples_from_json(rows_by_class["wrong"], label=0.0),
            correct=_triples_from_json(rows_by_class["correct"], label=1.0),
        )


def _triples_to_json(triples: Sequence[Triple]) -> list[list[str]]:
    return [[t.question, t.reference, t.completion] for t in triples]


def _triples_from_json(rows: Sequence[Sequence[str]], label: float) -> tuple[Triple, ...]:
    return tuple(Triple(question, reference, text, label) for question, reference, text in rows)


def max_rows_per_update(cfg: RewardUpdateConfig) -> int:
    """The largest number of labelled rows in one update; 0 if its loss does not read labelled rows."""
    if not cfg.rollout_bce:
        return 0
    return cfg.rollout_rows + (cfg.replay_rows if cfg.replay else 0)


def choose_rows(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray,
    replay: Replay,
    cfg: RewardUpdateConfig,
    *,
    seed: int,
    step: int,
    position: int,
) -> tuple[list[Triple], Replay]:
    """Choose a step's labelled rows; also returns the replay memory after the step.

    Args:
      problems, completions, verdicts: [N], one per row.
      scores: f32[N], the reward model's rewards before its update.
      replay: the memory before this step.
      position: the step's first position in the data order.

    Without `rollout_bce` there are no rows, and the memory is returned unchanged.
    """
    if not cfg.rollout_bce:
        return [], replay
    rng = keys.make_generator(seed, "lessons", step, position)

    def label_rows(rows: Sequence[int], label: float) -> list[Triple]:
        return [Triple(problems[n].question, problems[n].reference, completions[n].text, label) for n in rows]

    # A truncated response may contain the correct answer, but it has no label: it is not a complete solution.
    correct = [n for n, v in enumerate(verdicts) if v is Verdict.CORRECT and not completions[n].truncated]
    wrong = [n for n, v in enumerate(verdicts) if v.decidable and v is not Verdict.CORRECT]

    # The wrong responses with the highest reward are the ones that the reward model most needs to unlearn;
    # random others keep the rows representative of the policy.
    wrong_count, correct_count = split_evenly(len(wrong), len(correct), cfg.rollout_rows)
    by_reward = sorted(wrong, key=lambda n: -scores[n])  # stable: ties are in row order
    half = -(-wrong_count // 2)  # rounded up
    highest_reward_wrong, other_wrong = by_reward[:half], by_reward[half:]
    chosen_wrong = [
        *highest_reward_wrong,
        *_choose_random(other_wrong, wrong_count - len(highest_reward_wrong), rng),
    ]
    chosen = label_rows(chosen_wrong, 0.0)
    chosen += label_rows(_choose_random(correct, correct_count, rng), 1.0)

    # Replayed rows are drawn before this step's rows are stored: otherwise a row could occur twice in an
    # update.
    if cfg.replay:
        wrong_count, correct_count = split_evenly(len(replay.wrong), len(replay.correct), cfg.replay_rows)
        chosen += _choose_random(replay.wrong, wrong_count, rng)
        chosen += _choose_random(replay.correct, correct_count, rng)

        # Of the wrong responses, only those that fool the reward model are worth replaying.
        rewarded_wrong = [n for n in wrong if scores[n] > 0.5]
        replay = replay.append(label_rows(rewarded_wrong, 0.0), label_rows(correct, 1.0), cfg.replay)
    return chosen, replay


def split_evenly(first_size: int, second_size: int, total: int) -> tuple[int, int]:
    """The numbers of members to take from two classes of these sizes, at most `total` together.

    Each class gives half of `total`.  If one class is smaller than that, the other fills the rest.
    """
    # The first class takes its half, plus what the second one cannot fill.
    first_count = min(first_size, max(total // 2, total - second_size))
    return first_count, min(second_size, total - first_count)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Labels f32[n] -> weights f32[n]; each class's weights sum to one half, even if the other is absent."""
    # The size of each row's own class, f32[n]; the maximum guards against no rows at all.
    counts = np.where(labels > 0.5, (labels > 0.5).sum(), (labels <= 0.5).sum())
    return (0.5 / np.maximum(counts, 1)).astype(np.float32)


def _choose_random(items: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """`count` of the items in random order; all of them if there are fewer."""
    return [items[i] for i in rng.permutation(len(items))[:count]]
