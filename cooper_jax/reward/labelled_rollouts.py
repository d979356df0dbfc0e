"""Labelled rollouts: responses of this and earlier steps, labelled by the rule verifier.

1. Label 1: the rule finds the response correct, and it is not truncated.  Label 0: the rule finds it wrong,
   or finds no answer in it.  Where the rule abstains, no row is made.  The exact truth of synthetic problems
   is never used.
2. At most `rollout_rows` of a step are chosen, half of each class; where one class has fewer, the other fills
   the rest.  Half of the wrong ones are those with the highest reward; the remaining rows are random.
3. With `replay`, wrong responses with a reward above one half and correct responses are kept, up to `replay`
   of each class, first in first out.  `replay_rows` of those kept *before* this step join its rows.
4. Both classes have the same weight: each class's weights sum to one half.

All random draws are keyed by (seed, step, first position).  All of this is ours; see docs/reward_updates.md.

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
    """Labelled rollouts of earlier steps, oldest first; immutable, and part of a run's state."""

    wrong: tuple[Triple, ...] = ()  # each with a reward above one half in its own step
    correct: tuple[Triple, ...] = ()

    def append(self, wrong: Sequence[Triple], correct: Sequence[Triple], capacity: int) -> Replay:
        """A memory with these rows too, of which the newest `capacity` of each class are kept."""
        return Replay(
            wrong=(*self.wrong, *wrong)[-capacity:],
            correct=(*self.correct, *correct)[-capacity:],
        )

    def to_json(self) -> dict[str, list[list[str]]]:
        """Class -> [question, reference, completion] of each row."""
        return {"wrong": _triples_to_json(self.wrong), "correct": _triples_to_json(self.correct)}

    @classmethod
    def from_json(cls, found: dict[str, list[list[str]]]) -> Replay:
        """The memory that `to_json` wrote."""
        return cls(
            wrong=_triples_from_json(found["wrong"], label=0.0),
            correct=_triples_from_json(found["correct"], label=1.0),
        )


def _triples_to_json(triples: Sequence[Triple]) -> list[list[str]]:
    return [[t.question, t.reference, t.completion] for t in triples]


def _triples_from_json(rows: Sequence[Sequence[str]], label: float) -> tuple[Triple, ...]:
    return tuple(Triple(question, reference, text, label) for question, reference, text in rows)


def max_rows_per_update(cfg: RewardUpdateConfig) -> int:
    """The most labelled rows that an update reads; 0 where its loss has no term of them."""
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
    """The labelled rows of a step, and the replay memory after it.

    Args:
      problems, completions, verdicts: [N], each row's own.
      scores: f32[N], the reward model's rewards before its update.
      replay: the memory before this step.
      position: the step's first position in the data order.

    Without `rollout_bce` there are no rows, and the memory stays as it is.
    """
    if not cfg.rollout_bce:
        return [], replay
    rng = keys.make_generator(seed, "lessons", step, position)

    def label_rows(rows: Sequence[int], label: float) -> list[Triple]:
        return [Triple(problems[n].question, problems[n].reference, completions[n].text, label) for n in rows]

    # A truncated response is never an example of a correct one, whatever answer the rule finds in it.
    correct = [n for n, v in enumerate(verdicts) if v is Verdict.CORRECT and not completions[n].truncated]
    wrong = [n for n, v in enumerate(verdicts) if v.decidable and v is not Verdict.CORRECT]

    # This step's rows.  The wrong ones with the highest reward are those that the reward model most needs to
    # unlearn; random others keep the rows representative.
    wrong_count, correct_count = split_evenly(len(wrong), len(correct), cfg.rollout_rows)
    by_reward = sorted(wrong, key=lambda n: -scores[n])  # stable: ties by row
    half = -(-wrong_count // 2)
    highest_reward_wrong, other_wrong = by_reward[:half], by_reward[half:]
    chosen_wrong = [
        *highest_reward_wrong,
        *_choose_random(other_wrong, wrong_count - len(highest_reward_wrong), rng),
    ]
    chosen = label_rows(chosen_wrong, 0.0)
    chosen += label_rows(_choose_random(correct, correct_count, rng), 1.0)

    # Rows of earlier steps, from the memory as it was before this step.
    if cfg.replay:
        wrong_count, correct_count = split_evenly(len(replay.wrong), len(replay.correct), cfg.replay_rows)
        chosen += _choose_random(replay.wrong, wrong_count, rng)
        chosen += _choose_random(replay.correct, correct_count, rng)
        rewarded_wrong = [n for n in wrong if scores[n] > 0.5]
        replay = replay.append(label_rows(rewarded_wrong, 0.0), label_rows(correct, 1.0), cfg.replay)
    return chosen, replay


def split_evenly(first: int, second: int, most: int) -> tuple[int, int]:
    """The numbers to take from two classes of so many members: half of `most` each.

    Where one class has fewer than half, the other fills the rest.
    """
    taken = min(first, max(most // 2, most - second))
    return taken, min(second, most - taken)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Labels f32[n] -> weights f32[n]; those of each class sum to one half, even without the other class."""
    counts = np.where(labels > 0.5, (labels > 0.5).sum(), (labels <= 0.5).sum())
    return (0.5 / np.maximum(counts, 1)).astype(np.float32)


def _choose_random(items: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """`count` of the items in random order, all where there are fewer."""
    return [items[i] for i in rng.permutation(len(items))[:count]]
