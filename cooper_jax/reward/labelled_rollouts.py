"""Labelled rows for the reward model: this step's rollouts that the rule decides, and past ones.

1. Label 1: the rule finds the response correct, and it is not truncated.  Label 0: it finds it wrong, or finds no
   answer in it.  Where the rule abstains, no row is made.  Exact truth is never asked.
2. At most `rollout_rows` of a step are drawn, half of each class; where one has fewer, the other fills the rest.
   Of the wrong ones half are those that the reward model likes best, ties by row; the rest, and the correct ones,
   are any.
3. With `replay`, wrong ones that the reward model liked (reward above one half) and correct ones are remembered, so
   many of each class, first in first out; `replay_rows` of what was remembered *before* this step join its rows.
4. Both classes weigh the same: each class's weights sum to one half.

All draws are keyed by (seed, step, first position).  All of this is ours; see docs/reward_updates.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.runtime import keys
from cooper_jax.types import Completion, Problem, Triple, Verdict


@dataclasses.dataclass(frozen=True)
class Replay:
    """Past decided rollouts, oldest first; an immutable value, and part of a run's state."""

    wrong: tuple[Triple, ...] = ()  # and liked by the reward model of their step
    correct: tuple[Triple, ...] = ()

    def with_more(self, wrong: Sequence[Triple], correct: Sequence[Triple], capacity: int) -> Replay:
        """The newest `capacity` of each class."""
        return Replay(
            *((*old, *new)[-capacity:] for old, new in ((self.wrong, wrong), (self.correct, correct)))
        )

    def to_json(self) -> dict[str, list[list[str]]]:
        return {
            name: [[t.question, t.reference, t.completion] for t in triples]
            for name, triples in (("wrong", self.wrong), ("correct", self.correct))
        }

    @classmethod
    def from_json(cls, found: dict[str, list[list[str]]]) -> Replay:
        return cls(
            *(tuple(Triple(*t, label) for t in found[n]) for n, label in (("wrong", 0.0), ("correct", 1.0)))
        )


def max_rows_per_update(cfg: RewardUpdateConfig) -> int:
    """The number of rows that an update reads at most; 0 without the term."""
    return cfg.rollout_rows + (cfg.replay_rows if cfg.replay else 0) if cfg.rollout_bce else 0


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
    """The labelled rows of a step, and what is remembered after it.

    problems, completions, verdicts, scores: [N], each row's own; scores are the reward model's rewards f32[N]
    before its update.  position: the step's first.  Without `rollout_bce` there is no row.
    """
    if not cfg.rollout_bce:
        return [], replay
    rng = keys.make_generator(seed, "lessons", step, position)
    correct = [n for n, v in enumerate(verdicts) if v is Verdict.CORRECT and not completions[n].truncated]
    wrong = [n for n, v in enumerate(verdicts) if v.decidable and v is not Verdict.CORRECT]

    def triples(rows: Sequence[int], label: float) -> list[Triple]:
        return [Triple(problems[n].question, problems[n].reference, completions[n].text, label) for n in rows]

    of_wrong, of_correct = split_evenly(len(wrong), len(correct), cfg.rollout_rows)
    liked_first = sorted(wrong, key=lambda n: -scores[n])  # stable: ties by row
    liked, others = liked_first[: -(-of_wrong // 2)], liked_first[-(-of_wrong // 2) :]
    drawn = triples([*liked, *_any(others, of_wrong - len(liked), rng)], 0.0)
    drawn += triples(_any(correct, of_correct, rng), 1.0)
    if cfg.replay:
        of_wrong, of_correct = split_evenly(len(replay.wrong), len(replay.correct), cfg.replay_rows)
        drawn += [*_any(replay.wrong, of_wrong, rng), *_any(replay.correct, of_correct, rng)]
        hacks = [n for n in wrong if scores[n] > 0.5]
        replay = replay.with_more(triples(hacks, 0.0), triples(correct, 1.0), cfg.replay)
    return drawn, replay


def split_evenly(first: int, second: int, most: int) -> tuple[int, int]:
    """How many to take of two classes of so many: half of `most` each, and more where the other has fewer."""
    taken = min(first, max(most // 2, most - second))
    return taken, min(second, most - taken)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """labels f32[n] -> weights f32[n]: those of each class sum to one half, whether or not the other is there."""
    counts = np.where(labels > 0.5, (labels > 0.5).sum(), (labels <= 0.5).sum())
    return (0.5 / np.maximum(counts, 1)).astype(np.float32)


def _any(items: Sequence, count: int, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))[:count]]
