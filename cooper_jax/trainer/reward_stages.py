"""The reward side of a step: grade responses, make pairs, choose labelled rows, update the reward model.

1. `ResponseGrader` collects a rule verdict for each response, and a reward-model score, while others are sampled.
2. `propose_pairs` starts to make contrastive pairs: correct responses beside wrong ones (reward/pairs.py).
3. `choose_labelled_rows` chooses responses that the update sees one by one with their label (reward/lessons.py).
4. `update_reward_model` makes the step's updates on both.

None of them asks for the arm of the run: the step calls those that its arm needs.  The reward model reads text
through the one template of `encode_reward_input`, with its own tokenizer.

    B  prompts   G  samples a prompt   N = B * G  rows, prompt-major   S  reward-model input tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cooper_jax.data import packing, prompts
from cooper_jax.reward import lessons, losses, pairs
from cooper_jax.runtime import hosts
from cooper_jax.runtime.metrics import to_host
from cooper_jax.settings import weighs_pairs
from cooper_jax.trainer.policy_stages import ProblemBatch
from cooper_jax.trainer.state import Components
from cooper_jax.types import (
    Completion,
    LabelledBatch,
    Metrics,
    Pair,
    PairBatch,
    Params,
    Problem,
    ScoreBatch,
    TrainState,
    Triple,
    Verdict,
)

# --- scores and verdicts -----------------------------------------------------------------------------


def encode_reward_input(components: Components, problem: Problem, completion: str) -> list[int]:
    """The reward model's input as token ids: the one template, for scoring, pairs and supervised training."""
    return prompts.verifier_tokens(
        components.reward.model.tokenizer,
        problem.question,
        problem.reference,
        completion,
        components.cfg.reward.max_tokens,
    )


def pack_reward_inputs(components: Components, rows: Sequence[Sequence[int]]) -> ScoreBatch:
    """Token ids as a batch on the reward model's devices, with padding rows that the mesh needs."""
    layout = components.reward.layout
    batch = packing.score_batch(rows, bucket=components.cfg.data.bucket, rows_multiple=layout.batch_shards)
    return layout.put(batch, "batch")


def score_responses(
    components: Components,
    params: Params,
    problems: Sequence[Problem],
    completions: Sequence[Completion],
) -> np.ndarray:
    """The reward model's logits f32[N], one a response.  problems: [N], each response's own."""
    rows = [
        encode_reward_input(components, problem, completion.text)
        for problem, completion in zip(problems, completions, strict=True)
    ]
    logits = components.reward.score(params, pack_reward_inputs(components, rows))
    return hosts.fetch(logits)[: len(rows)]


def scores_during_rollout(components: Components) -> bool:
    """True where the reward model has devices of its own, which are idle while the policy samples."""
    return components.reward is not None and components.reward.layout != components.layout


class ResponseGrader:
    """Rule verdicts and reward-model scores of a step's responses, requested group by group as they end.

    The rule verifier's processes work while the devices sample the remaining groups.  So does a reward model with
    devices of its own; one that shares the policy's devices scores all responses after the rollout, since its
    programs would only delay the decoding.
    """

    def __init__(self, components: Components, batch: ProblemBatch, reward: TrainState | None):
        """reward: the reward model that scores; None in the rule arm, which has none."""
        self._components = components
        self._problems = batch.problems
        self._reward = reward
        self._groups: dict[int, Sequence[Completion]] = {}  # by the problem's index in the batch
        self._pending_verdicts: dict[int, Any] = {}  # likewise; in the form of the rule verifier
        self._scorer = None
        if reward is not None and scores_during_rollout(components):
            self._scorer = _OverlappedScorer(components, reward.params)

    def add_group(self, index: int, responses: Sequence[Completion]) -> None:
        """Take the responses to problem `index`, which have all ended, and return at once."""
        problem = self._problems[index]
        self._groups[index] = responses
        self._pending_verdicts[index] = self._components.rule.submit(
            [(problem.reference, response.text) for response in responses]
        )
        if self._scorer is not None:
            self._scorer.add(index * len(responses), problem, responses)

    def collect_scores(self) -> np.ndarray:
        """The reward model's scores sigmoid(z), f32[N], by the parameters given at the start.

        Raises ValueError without a reward model.
        """
        if self._reward is None:
            raise ValueError("there is no reward model: in the rule arm responses have verdicts only")
        if self._scorer is not None:
            logits = self._scorer.collect()
        else:
            problems, completions = [], []
            for index, problem in enumerate(self._problems):
                completions += self._groups[index]
                problems += [problem] * len(self._groups[index])
            logits = score_responses(self._components, self._reward.params, problems, completions)
        return np.asarray(losses.rewards(logits))

    def collect_verdicts(self) -> list[Verdict]:
        """Wait for the rule verifier: its verdicts [N], in the order of the rows."""
        pending = [self._pending_verdicts[index] for index in range(len(self._problems))]
        return self._components.rule.collect(pending)


class _OverlappedScorer:
    """Logits of responses as they end, a microbatch at a time, on devices of the reward model's own.

    Which responses share a microbatch depends on the order in which groups end, and that on what was sampled alone:
    never on the time that anything took.
    """

    def __init__(self, components: Components, params: Params):
        self._components, self._params = components, params
        shards = components.reward.layout.batch_shards
        self._batch_rows = packing.round_up(components.cfg.reward.microbatch, shards)
        self._waiting: list[tuple[int, list[int]]] = []  # (row, token ids)
        self._running: list[tuple[list[int], jax.Array]] = []  # (rows, their logits, padding at the end)

    def add(self, first_row: int, problem: Problem, completions: Sequence[Completion]) -> None:
        """Take responses to one problem, rows from `first_row` on, and return at once."""
        for i, completion in enumerate(completions):
            tokens = encode_reward_input(self._components, problem, completion.text)
            self._waiting.append((first_row + i, tokens))
        while len(self._waiting) >= self._batch_rows:
            self._launch()

    def collect(self) -> np.ndarray:
        """The logits f32[N] of all responses, in the order of the rows."""
        while self._waiting:
            self._launch()
        logits = np.zeros(sum(len(rows) for rows, _ in self._running), np.float32)
        for rows, values in self._running:
            logits[rows] = hosts.fetch(values)[: len(rows)]
        return logits

    def _launch(self) -> None:
        taken, self._waiting = self._waiting[: self._batch_rows], self._waiting[self._batch_rows :]
        # Empty rows fill the last microbatch up, so that one compiled program scores all of them.
        tokens = [row for _, row in taken] + [[]] * (self._batch_rows - len(taken))
        logits = self._components.reward.score(self._params, pack_reward_inputs(self._components, tokens))
        self._running.append(([row for row, _ in taken], logits))


# --- what the reward model learns from ---------------------------------------------------------------


def propose_pairs(
    components: Components,
    batch: ProblemBatch,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray,
    step: int,
) -> pairs.PendingPairs:
    """Start to make the step's pairs; the assistant's calls go on while devices work.

    completions, verdicts, scores: [N]; scores are the reward model's, before its update.  step: keys the random
    draws.  Where no term of the update's loss reads pairs, none is made and no assistant asked.
    """
    cfg = components.cfg
    if not weighs_pairs(cfg.reward):
        return pairs.none()
    return pairs.start(
        batch.problems,
        completions,
        verdicts,
        cfg.rollout.group_size,
        components.assistant,
        components.rule,
        cfg.pairs,
        seed=cfg.seed,
        step=step,
        positions=batch.positions,
        scores=scores,
        exchange=cfg.reward.shuffle_labels,
    )


def choose_labelled_rows(
    components: Components,
    batch: ProblemBatch,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    scores: np.ndarray,
    step: int,
    replay: lessons.Replay,
) -> tuple[list[Triple], lessons.Replay]:
    """The labelled rows of the reward model's update, and the replay memory after this step.

    Arguments as in `propose_pairs`.  replay: the memory before this step.
    """
    cfg = components.cfg
    return lessons.choose(
        batch.row_problems,
        completions,
        verdicts,
        scores,
        replay,
        cfg.reward,
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
    pair_batch = _pack_pairs(components, pair_slots) if weighs_pairs(cfg.reward) else None
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
    positive_batch = packing.score_batch(positives, **options)
    negative_batch = packing.score_batch(negatives, **options)
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
    tokens += [[]] * (lessons.most_rows(cfg.reward) - len(tokens))

    rows = packing.score_batch(tokens, bucket=cfg.data.bucket, rows_multiple=layout.batch_shards)
    count = rows.tokens.shape[0]
    weights = packing.pad_rows(lessons.class_weights(labels), count)
    batch = LabelledBatch(rows=rows, labels=packing.pad_rows(labels, count), weights=weights)
    return layout.put(batch, "batch")


def _score_pairs(components: Components, reward: TrainState, batch: PairBatch) -> np.ndarray:
    """The logits of positives and negatives, f32[2, pairs]."""
    sides = (batch.positive, batch.negative)
    return np.stack([hosts.fetch(components.reward.score(reward.params, side)) for side in sides])
