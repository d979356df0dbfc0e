"""The reward model's stages of a step: make pairs, choose labelled rows, update the reward model.

1. `propose_pairs` starts to make contrastive pairs: correct responses beside wrong ones (reward/pairs/).
2. `choose_labelled_rows` chooses responses that the update sees one by one with their label (reward/labelled_rollouts.py).
3. `update_reward_model` makes the step's updates on both.

None of them asks for the arm of the run: the step calls them where its arm updates the reward model.

    B  prompts   G  samples a prompt   N = B * G  rows, prompt-major   S  reward-model input tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.data import packing, prompts
from cooper_jax.reward import labelled_rollouts
from cooper_jax.reward.pairs.build_pairs import PendingPairs, no_pairs, start_pairs
from cooper_jax.runtime import hosts
from cooper_jax.runtime.metrics import to_host
from cooper_jax.trainer.grading import encode_reward_input
from cooper_jax.trainer.policy_stages import ProblemBatch
from cooper_jax.trainer.state import Components
from cooper_jax.types import (
    Completion,
    LabelledBatch,
    Metrics,
    Pair,
    PairBatch,
    Problem,
    TrainState,
    Triple,
    Verdict,
)

# --- what the reward model learns from ---------------------------------------------------------------


def propose_pairs(
    components: Components,
    batch: ProblemBatch,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray,
    step: int,
) -> PendingPairs:
    """Start to make the step's pairs; the assistant's calls go on while devices work.

    completions, verdicts, scores: [N]; scores are the reward model's, before its update.  step: keys the random
    draws.  Where no term of the update's loss reads pairs, none is made and no assistant asked.
    """
    cfg = components.cfg
    if not components.settings.reward.reads_pairs:
        return no_pairs()

    def fits(answer: str) -> bool:
        return prompts.reference_fits(components.reward.model.tokenizer, answer, cfg.reward.max_tokens)

    return start_pairs(
        batch.problems,
        completions,
        verdicts,
        cfg.rollout.group_size,
        components.assistant,
        components.rule,
        components.settings.pairs,
        seed=cfg.seed,
        step=step,
        positions=batch.positions,
        scores=scores,
        exchange=cfg.reward.shuffle_labels,
        fits=fits,
    )


def choose_labelled_rows(
    components: Components,
    batch: ProblemBatch,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray,
    step: int,
    replay: labelled_rollouts.Replay,
) -> tuple[list[Triple], labelled_rollouts.Replay]:
    """The labelled rows of the reward model's update, and the replay memory after this step.

    Arguments as in `propose_pairs`.  replay: the memory before this step.
    """
    cfg = components.cfg
    return labelled_rollouts.choose_rows(
        batch.row_problems,
        completions,
        verdicts,
        scores,
        replay,
        components.settings.reward,
        seed=cfg.seed,
        step=step,
        position=batch.positions.start,
    )


# --- the update --------------------------------------------------------------------------------------


def update_reward_model(
    components: Components,
    reward: TrainState,
    pair_slots: Sequence[Pair | None],
    labelled_rows: Sequence[Triple] = (),
    updates: int = 1,
) -> tuple[TrainState, Metrics]:
    """Make `updates` updates on the same valid pairs and labelled rows; without any, nothing moves.

    pair_slots: the pairs asked for, None where none was valid.  The reward model's state given is donated.

    Metrics (`rm/...`) are those of the first update, except `rm/updates`, how many updates were applied, and
    `rm/skipped`, how many were not because loss or gradients were not finite.  With `log.pair_motion`, two more say
    how far all updates moved the valid pairs' logits: their mean and their difference.
    """
    cfg = components.cfg
    pair_batch = _pack_pairs(components, pair_slots) if components.settings.reward.reads_pairs else None
    labelled_batch = _pack_labelled_rows(components, labelled_rows) if cfg.reward.rollout_bce else None

    # Logits before the update are fetched to the host, since the update donates the parameters.
    measures_motion = cfg.log.pair_motion and pair_batch is not None
    if measures_motion:
        logits_before = _score_pairs(components, reward, pair_batch)

    each_update = []
    for _ in range(updates):
        reward, update_metrics = components.reward.update(reward, pair_batch, labelled_batch)
        each_update.append(update_metrics)

    metrics = to_host(each_update[0], "rm")
    later = [to_host({name: m[name] for name in ("lr", "skipped")}, "rm") for m in each_update[1:]]
    # An update that does not take place reports a learning rate of 0.
    metrics["rm/updates"] = float(sum(m["rm/lr"] > 0 for m in (metrics, *later)))
    metrics["rm/skipped"] += sum(m["rm/skipped"] for m in later)

    if measures_motion:
        valid = [i for i, pair in enumerate(pair_slots) if pair is not None]
        moved = (_score_pairs(components, reward, pair_batch) - logits_before)[:, valid]
        metrics["rm/common_motion"] = float(moved.mean()) if valid else float("nan")
        metrics["rm/difference_motion"] = float((moved[0] - moved[1]).mean()) if valid else float("nan")

    return reward, metrics | dict.fromkeys(_means_over_nothing(metrics), float("nan"))


# Metrics that are counts, or the optimiser's: they are 0 where others are a mean over nothing.
_COUNTS = ("valid", "rollout_rows", "loss", "grad_norm", "lr", "skipped", "updates")


def _means_over_nothing(metrics: Metrics) -> list[str]:
    """The metrics that are means over no pair or over no labelled row, and therefore no numbers."""
    means = [name for name in metrics if name.removeprefix("rm/") not in _COUNTS]
    over_rows = [name for name in means if name.startswith("rm/rollout_")]
    over_pairs = [name for name in means if name not in over_rows]

    found = []
    if metrics.get("rm/valid") == 0:
        found += over_pairs
    if metrics.get("rm/rollout_rows") == 0:
        found += over_rows
    return found


def _pack_pairs(components: Components, pair_slots: Sequence[Pair | None]) -> PairBatch:
    """The pairs as the reward model reads them, both members of equal width; a masked slot is an empty row."""
    positives: list[list[int]] = []
    negatives: list[list[int]] = []
    for pair in pair_slots:
        if pair is None:
            positive, negative = [], []
        else:
            positive, negative = _encode_members(components, pair)
        positives.append(positive)
        negatives.append(negative)

    layout = components.reward.layout
    width = packing.round_up(max(map(len, positives + negatives)), components.cfg.data.bucket)
    options = dict(bucket=width, rows_multiple=layout.batch_shards)
    positive_batch = packing.pack_score_batch(positives, **options)
    negative_batch = packing.pack_score_batch(negatives, **options)
    valid = np.array([pair is not None for pair in pair_slots])
    mask = packing.pad_rows(valid, positive_batch.tokens.shape[0])
    return layout.put(PairBatch(positive=positive_batch, negative=negative_batch, mask=mask), "batch")


def _encode_members(components: Components, pair: Pair) -> tuple[list[int], list[int]]:
    """A pair's positive and negative as token ids, each beside its own reference where it has one."""
    sides = []
    for text, reference in (
        (pair.positive, pair.positive_reference),
        (pair.negative, pair.negative_reference),
    ):
        problem = dataclasses.replace(pair.problem, reference=reference or pair.problem.reference)
        sides.append(encode_reward_input(components, problem, text))
    if pair.exchanged:  # a control: each member stands in the other's place
        sides.reverse()
    return sides[0], sides[1]


def _pack_labelled_rows(components: Components, labelled_rows: Sequence[Triple]) -> LabelledBatch:
    """The labelled rows as the reward model reads them, padded to one number of rows: padding weighs nothing."""
    layout, cfg = components.reward.layout, components.cfg
    labels = np.array([row.label for row in labelled_rows], np.float32)
    tokens = [
        encode_reward_input(components, Problem(row.question, row.reference), row.completion)
        for row in labelled_rows
    ]
    tokens += [[]] * (labelled_rollouts.max_rows_per_update(components.settings.reward) - len(tokens))

    rows = packing.pack_score_batch(tokens, bucket=cfg.data.bucket, rows_multiple=layout.batch_shards)
    count = rows.tokens.shape[0]
    weights = packing.pad_rows(labelled_rollouts.class_weights(labels), count)
    batch = LabelledBatch(rows=rows, labels=packing.pad_rows(labels, count), weights=weights)
    return layout.put(batch, "batch")


def _score_pairs(components: Components, reward: TrainState, batch: PairBatch) -> np.ndarray:
    """The logits of positives and negatives, f32[2, pairs]."""
    sides = (batch.positive, batch.negative)
    return np.stack([hosts.fetch_arrays(components.reward.score(reward.params, side)) for side in sides])
