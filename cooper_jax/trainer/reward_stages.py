"""The reward model's stages of a step: make pairs, choose labelled rows, update the reward model.

1. `open_rewrites` lets an assistant write negatives while the devices compute; `make_pairs` makes contrastive
   pairs of a correct and a wrong response of them and of other sources (reward/pairs/).
2. `choose_labelled_rows` chooses single responses with their labels (reward/labelled_rollouts.py).
3. `update_reward_model` makes the step's updates on the pairs and on the labelled rows.

The step calls these functions only in the arm that updates the reward model; they do not check the arm.

    B  prompts   G  samples per prompt   N = B * G  rows, prompt-major   S  reward-model input tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.data import packing, prompts
from cooper_jax.reward import labelled_rollouts
from cooper_jax.reward.assistants import Assistant
from cooper_jax.reward.pairs.build_pairs import PairResult, build_pairs
from cooper_jax.reward.pairs.concurrent_rewrites import ConcurrentRewrites
from cooper_jax.reward.pairs.pair_task import PairTask
from cooper_jax.runtime import hosts
from cooper_jax.runtime.metrics import to_host
from cooper_jax.trainer.grading import encode_reward_input, pack_reward_sequences
from cooper_jax.trainer.policy_stages import ProblemBatch
from cooper_jax.trainer.state import Components
from cooper_jax.types import (
    Completion,
    LabelledBatch,
    Metrics,
    PackedLabelled,
    PackedPairs,
    Pair,
    PairBatch,
    Problem,
    TrainState,
    Triple,
    Verdict,
)

# --- training data of an update ----------------------------------------------------------------------


def open_rewrites(components: Components, batch: ProblemBatch, step: int) -> ConcurrentRewrites | None:
    """Prepare the assistant's rewrites of a step, to which groups are then added as they get verdicts.

    None if the step asks no assistant that can work beside the devices.
    """
    assistant = _find_assistant(components)
    if assistant is None or not assistant.overlaps:
        return None
    return ConcurrentRewrites(make_pair_task(components, batch, step))


def asks_on_devices(components: Components) -> bool:
    """True if the steps ask an assistant that computes on this run's own devices, as all hosts' main threads do."""
    assistant = _find_assistant(components)
    return assistant is not None and not assistant.overlaps


def _find_assistant(components: Components) -> Assistant | None:
    """The assistant that the steps ask; None if they ask none."""
    settings = components.settings
    makes_pairs = settings.reward.updates_at_steps and settings.reward_update.reads_pairs
    if not makes_pairs or "assistant" not in settings.pairs.negatives:
        return None
    return components.assistant


def make_pairs(
    components: Components,
    batch: ProblemBatch,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray,
    step: int,
    rewrites: ConcurrentRewrites | None = None,
) -> PairResult:
    """Make the step's pairs, and wait for the assistant.  Collective.

    If no term of the update's loss reads pairs, no pair is made and the assistant is not asked.

    Args:
      completions, verdicts: [N].
      scores: f32[N], the reward model's, before its update.
      step: keys the random draws.
      rewrites: those that were started during the step; None: they are made here.
    """
    if not components.settings.reward_update.reads_pairs:
        return PairResult()
    return build_pairs(make_pair_task(components, batch, step), completions, verdicts, scores, rewrites)


def make_pair_task(components: Components, batch: ProblemBatch, step: int) -> PairTask:
    """Everything that the pairs of a step are made from, but its responses."""
    settings = components.settings

    # In an own_answer pair the positive's reference is an answer that the policy wrote.  References are never
    # truncated in the reward model's input, so an answer that is too long cannot be one.
    def reference_fits(answer: str) -> bool:
        return prompts.reference_fits(
            components.reward_bundle.model.tokenizer, answer, settings.reward.max_tokens
        )

    return PairTask(
        problems=batch.problems,
        group_size=settings.rollout.group_size,
        assistant=components.assistant,
        rule=components.rule,
        cfg=settings.pairs,
        seed=settings.seed,
        step=step,
        positions=batch.positions,
        reference_fits=reference_fits,
        special_tokens=components.control_texts,
        shuffle_labels=settings.reward.shuffle_labels,
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
    """Choose the labelled rows of the reward model's update; return them and the next replay memory.

    Arguments as in `make_pairs`.  replay: the replay memory before the step.
    """
    settings = components.settings
    return labelled_rollouts.choose_rows(
        batch.row_problems,
        completions,
        verdicts,
        scores,
        replay,
        settings.reward_update,
        seed=settings.seed,
        step=step,
        position=batch.positions[0],
    )


# --- the update --------------------------------------------------------------------------------------


def update_reward_model(
    components: Components,
    reward: TrainState,
    pairs: Sequence[Pair | None],
    labelled_rows: Sequence[Triple] = (),
    updates: int = 1,
) -> tuple[TrainState, Metrics]:
    """Make `updates` updates of the reward model on the same valid pairs and labelled rows.

    Without any pair or row the parameters do not change.  The reward model's input state is donated.

    pairs: those of `make_pairs`; None for a pair that could not be made.

    Metrics (`rm/...`) are those of the first update, with two exceptions: `rm/updates` is the number of
    updates that were applied, and `rm/skipped` the number skipped because the loss or a gradient was not
    finite.

    With `log.pair_motion`, two more metrics compare the logits after the last update with those before the
    first, averaged over the valid pairs.  `rm/common_motion` is the change of the mean logit of a pair's
    members, and `rm/difference_motion` the change of the positive's logit minus the negative's.
    """
    settings = components.settings

    # A term of the loss that is off gets no batch, so its forward pass is not compiled.
    pair_batch, labelled_batch = None, None
    if settings.reward_update.reads_pairs:
        pair_batch = _pack_pairs(components, pairs)
    if settings.reward_update.rollout_bce:
        labelled_batch = _pack_labelled_rows(components, labelled_rows)

    # Logits before the update are fetched to the host, since the update donates the parameters.
    measured_pairs = pair_batch if settings.log.pair_motion else None
    if measured_pairs is not None:
        logits_before = _compute_pair_logits(components, reward, measured_pairs)

    # Metrics stay on the device until all updates are dispatched.
    metrics_by_update = []
    for _ in range(updates):
        reward, update_metrics = components.reward_bundle.update(reward, pair_batch, labelled_batch)
        metrics_by_update.append(update_metrics)

    # Losses and accuracies are the first update's, since later updates see the same data again.  An update
    # that was not applied reports a learning rate of 0.
    metrics = to_host(metrics_by_update[0], "rm")
    metrics["rm/updates"] = float(metrics["rm/lr"] > 0)
    for update_metrics in metrics_by_update[1:]:
        later = to_host({name: update_metrics[name] for name in ("lr", "skipped")}, "rm")
        metrics["rm/updates"] += float(later["rm/lr"] > 0)
        metrics["rm/skipped"] += later["rm/skipped"]

    if measured_pairs is not None:
        valid = [i for i, pair in enumerate(pairs) if pair is not None]
        moved = (_compute_pair_logits(components, reward, measured_pairs) - logits_before)[:, valid]
        metrics["rm/common_motion"] = float(moved.mean()) if valid else float("nan")
        metrics["rm/difference_motion"] = float((moved[0] - moved[1]).mean()) if valid else float("nan")

    for name in _find_undefined_means(metrics):
        metrics[name] = float("nan")
    return reward, metrics


# Counts, the loss, and the optimiser's metrics: without data they are 0.  Every other metric is a mean.
_DEFINED_WITHOUT_DATA = ("valid", "rollout_rows", "loss", "grad_norm", "lr", "skipped", "updates")


def _find_undefined_means(metrics: Metrics) -> list[str]:
    """The names of metrics that are means over pairs or labelled rows of which there are none."""
    means = [name for name in metrics if name.removeprefix("rm/") not in _DEFINED_WITHOUT_DATA]
    over_rows = [name for name in means if name.startswith("rm/rollout_")]
    over_pairs = [name for name in means if name not in over_rows]

    # `get`, since each count is reported only if its term of the loss is on.
    undefined = []
    if metrics.get("rm/valid") == 0:
        undefined += over_pairs
    if metrics.get("rm/rollout_rows") == 0:
        undefined += over_rows
    return undefined


def _pack_pairs(components: Components, pairs: Sequence[Pair | None]) -> PairBatch | PackedPairs:
    """Pack pairs into the reward model's inputs.  A pair that could not be made becomes two empty rows."""
    # Empty rows keep the number of rows equal at all steps; each new number would compile another program.
    positives: list[list[int]] = []
    negatives: list[list[int]] = []
    for pair in pairs:
        members: tuple[list[int], list[int]] = ([], [])
        if pair is not None:
            members = _encode_members(components, pair)
        positives.append(members[0])
        negatives.append(members[1])

    layout = components.reward_bundle.layout
    valid = np.array([pair is not None for pair in pairs])
    if components.reward_bundle.packs_rows:
        members_in_turn = [tokens for pair in zip(positives, negatives, strict=True) for tokens in pair]
        rows = pack_reward_sequences(components, members_in_turn, together=2)
        return PackedPairs(rows, layout.put(valid))

    # Both members get the width of the longest, since the update scores them in one pass.
    width = packing.round_up(max(map(len, positives + negatives)), components.settings.data.bucket)
    # With the width as the bucket, both batches are padded to exactly that width.
    options = dict(bucket=width, rows_multiple=layout.batch_shards)
    positive_batch = packing.pack_score_batch(positives, **options)
    negative_batch = packing.pack_score_batch(negatives, **options)

    # The mask drops the empty rows, and the rows that pad the batch to the mesh.
    mask = packing.pad_rows(valid, positive_batch.tokens.shape[0])
    return PairBatch(
        positive=layout.put(positive_batch, "batch"),
        negative=layout.put(negative_batch, "batch"),
        mask=layout.put(mask, "batch"),
    )


def _encode_members(components: Components, pair: Pair) -> tuple[list[int], list[int]]:
    """A pair's positive and negative as token ids.

    A member's own reference, if the pair has one, replaces the problem's.
    """
    sides = []
    for text, reference in (
        (pair.positive, pair.positive_reference),
        (pair.negative, pair.negative_reference),
    ):
        problem = dataclasses.replace(pair.problem, reference=reference or pair.problem.reference)
        sides.append(encode_reward_input(components, problem, text))

    # The control `reward.shuffle_labels`: the loss sees the negative as the positive, and vice versa.
    if pair.exchanged:
        sides.reverse()
    return sides[0], sides[1]


def _pack_labelled_rows(
    components: Components, labelled_rows: Sequence[Triple]
) -> LabelledBatch | PackedLabelled:
    """Pack labelled rows into the reward model's inputs.  Padding rows have weight 0."""
    layout, settings = components.reward_bundle.layout, components.settings
    labels = np.array([row.label for row in labelled_rows], np.float32)
    tokens = [
        encode_reward_input(components, Problem(row.question, row.reference), row.completion)
        for row in labelled_rows
    ]

    # Padded to the maximum, since each new number of rows would compile another program.
    tokens += [[]] * (labelled_rollouts.max_rows_per_update(settings.reward_update) - len(tokens))
    if components.reward_bundle.packs_rows:
        weights = labelled_rollouts.class_weights(labels)
        padded = [layout.put(packing.pad_rows(x, len(tokens))) for x in (labels, weights)]
        return PackedLabelled(pack_reward_sequences(components, tokens), *padded)

    rows = packing.pack_score_batch(tokens, bucket=settings.data.bucket, rows_multiple=layout.batch_shards)
    count = rows.tokens.shape[0]
    weights = packing.pad_rows(labelled_rollouts.class_weights(labels), count)
    return LabelledBatch(
        rows=layout.put(rows, "batch"),
        labels=layout.put(packing.pad_rows(labels, count), "batch"),
        weights=layout.put(weights, "batch"),
    )


def _compute_pair_logits(
    components: Components, reward: TrainState, batch: PairBatch | PackedPairs
) -> np.ndarray:
    """The logits of the positives and of the negatives, f32[2, rows]."""
    if isinstance(batch, PackedPairs):
        logits = components.reward_bundle.compute_logits(reward.params, batch.rows)
        return hosts.fetch_arrays(logits)[: 2 * len(batch.mask)].reshape(-1, 2).T
    sides = (batch.positive, batch.negative)
    return np.stack(
        [hosts.fetch_arrays(components.reward_bundle.compute_logits(reward.params, side)) for side in sides]
    )
