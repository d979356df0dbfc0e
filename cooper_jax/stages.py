"""The stages of a Cooper step, each a function of the machinery and the state.

    sample -> Rollout, completions      score -> reward-model logits      logprobs -> PolicyBatch
    propose_pairs -> pairs (pending)    choose_lessons -> labelled rows
    update_policy                       update_reward_model

Text goes in and out on the host, the same on every one; arrays are packed by `data/packing.py`, placed by the
layout of the model that reads them, and every stage pads its rows to what the mesh divides and crops them again.

    B prompts   G samples a prompt   N = B * G rows, prompt-major   P prompt tokens   T response tokens
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from cooper_jax import settings
from cooper_jax.assembly import Cooper, State
from cooper_jax.data import packing, prompts
from cooper_jax.placement import rollout_options
from cooper_jax.policy import grpo
from cooper_jax.reward import lessons, pairs
from cooper_jax.rollout import engine
from cooper_jax.runtime import hosts, keys
from cooper_jax.runtime.metrics import to_host
from cooper_jax.types import (
    Completion,
    LabelledBatch,
    Metrics,
    Pair,
    PairBatch,
    PolicyBatch,
    Problem,
    Rollout,
    ScoreBatch,
    TrainState,
    Triple,
    Verdict,
)


def sample(
    cooper: Cooper,
    state: State,
    prompt_tokens: Sequence[Sequence[int]],
    positions: Sequence[int],
    *,
    key: jax.Array | None = None,
    on_prompt: Callable[[int, list[Completion]], None] | None = None,
    report: Callable[[Metrics], None] | None = None,
) -> tuple[Rollout, list[Completion]]:
    """G responses to each prompt, as arrays and as text.

    key: of another stream than this step's own.
    on_prompt: is given a prompt's place and its responses when they have ended, while others are being sampled.
    report: is given metrics of the sampling itself.
    """
    model, spec = cooper.policy.model, cooper.policy.sampling
    key = keys.stream(cooper.cfg.seed, "rollout", state.step + 1) if key is None else key

    def text(rollout: Rollout) -> list[Completion]:
        return engine.completions(rollout, model.tokenizer.decode, spec.eos_ids)

    def on_groups(places: list[int], rows: Rollout) -> None:
        responses = text(rows)
        for i, place in enumerate(places):
            on_prompt(place, responses[i * spec.group_size : (i + 1) * spec.group_size])

    rollout = engine.generate(
        state.policy.params, model.config, cooper.layout, prompt_tokens, positions, key, spec,
        on_groups=on_groups if on_prompt else None, report=report, **rollout_options(cooper.cfg),
    )  # fmt: skip
    return rollout, text(rollout)


def sample_held_out(cooper: Cooper, state: State, temperature: float) -> list[Completion]:
    """The evaluation's responses, at 0 the most likely ones; the same keys each time."""
    model, section = cooper.policy.model, cooper.cfg.eval
    spec = dataclasses.replace(
        cooper.policy.sampling,
        temperature=temperature,
        top_p=section.top_p,
        top_k=0,
        group_size=section.samples if temperature else 1,
    )
    key = keys.stream(cooper.cfg.seed, "evaluation")
    rollout = engine.generate(
        state.policy.params, model.config, cooper.layout, cooper.held_out_prompts,
        range(len(cooper.held_out)), key, spec, **rollout_options(cooper.cfg),
    )  # fmt: skip
    return engine.completions(rollout, model.tokenizer.decode, spec.eos_ids)


def render(cooper: Cooper, problem: Problem, completion: str) -> list[int]:
    """The reward model's input: the one template, for scoring, for pairs and for the supervised phase.

    References are checked before: those of files at setup, those that the policy wrote in `propose_pairs`.  So no
    text of the policy makes this raise, and end the run at every restart.
    """
    return prompts.verifier_tokens(
        cooper.reward.model.tokenizer,
        problem.question,
        problem.reference,
        completion,
        cooper.cfg.reward.max_tokens,
        last_resort=True,
    )


def score_batch(cooper: Cooper, rows: Sequence[Sequence[int]]) -> ScoreBatch:
    layout = cooper.reward.layout
    batch = packing.score_batch(rows, bucket=cooper.cfg.data.bucket, rows_multiple=layout.batch_shards)
    return layout.put(batch, "batch")


def score(
    cooper: Cooper, state: State, problems: Sequence[Problem], completions: Sequence[Completion]
) -> np.ndarray | None:
    """The reward model's logits f32[N], before this step's update; None in the rule arm."""
    if cooper.reward is None:
        return None
    rows = [render(cooper, p, c.text) for p, c in zip(problems, completions, strict=True)]
    logits = cooper.reward.score(state.reward.params, score_batch(cooper, rows))
    return hosts.fetch(logits)[: len(rows)]


class ScoreBeside:
    """The same scores, on devices of the reward model's own, while the policy's still decode.

    Responses are taken as they end, a microbatch at a time.  Which ones share a microbatch depends on what was
    sampled alone, not on the time it took.
    """

    def __init__(self, cooper: Cooper, state: State):
        self._cooper, self._params = cooper, state.reward.params
        shards = cooper.reward.layout.batch_shards
        self._batch = -(-cooper.cfg.reward.microbatch // shards) * shards
        self._waiting: list[tuple[int, list[int]]] = []  # (row, tokens)
        self._under_way: list[tuple[list[int], jax.Array]] = []  # (rows, logits)

    @staticmethod
    def possible(cooper: Cooper) -> bool:
        """Whether the reward model has devices of its own."""
        return cooper.reward is not None and cooper.reward.layout != cooper.layout

    def add(self, first: int, problem: Problem, completions: Sequence[Completion]) -> None:
        """Responses to one problem, rows from `first` on; returns at once."""
        rows = ((first + i, render(self._cooper, problem, c.text)) for i, c in enumerate(completions))
        self._waiting.extend(rows)
        while len(self._waiting) >= self._batch:
            self._send(self._batch)

    def result(self) -> np.ndarray:
        """f32[N], in the order of the rows."""
        while self._waiting:
            self._send(self._batch)
        out = np.zeros(sum(len(rows) for rows, _ in self._under_way), np.float32)
        for rows, logits in self._under_way:
            out[rows] = hosts.fetch(logits)[: len(rows)]
        return out

    def _send(self, count: int) -> None:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        tokens = [row for _, row in taken] + [[]] * (count - len(taken))  # one number of rows, one program
        logits = self._cooper.reward.score(self._params, score_batch(self._cooper, tokens))
        self._under_way.append(([n for n, _ in taken], logits))


def logprobs(
    cooper: Cooper, state: State, prompt_tokens: Sequence[Sequence[int]], rollout: Rollout
) -> PolicyBatch:
    """The policy's batch with the reference's log-probabilities, and the policy's own before its first update.

    A step with a single update needs no pass for the latter: they are that update's own, and the ratio is 1.
    """
    cfg, layout, away = cooper.cfg.policy, cooper.layout, cooper.policy.reference_layout
    multiple = math.lcm(layout.batch_shards, away.batch_shards)
    packed = packing.policy_batch(
        prompt_tokens, rollout, bucket=cooper.cfg.data.bucket, rows_multiple=multiple
    )
    single = cfg.epochs * cfg.minibatches == 1
    flag = layout.put(np.asarray(single))
    batch = layout.put(dataclasses.replace(packed, old_is_current=np.zeros(())), "batch").replace(
        old_is_current=flag
    )
    width = batch.response_mask.shape[1]
    apart = away != layout
    seen = away.put((packed.tokens, packed.valid), "batch") if apart else (batch.tokens, batch.valid)
    ref = cooper.policy.reference_logprobs(state.reference, *seen, width)
    old = (
        batch.old_logprobs
        if single
        else cooper.policy.logprobs(state.policy.params, batch.tokens, batch.valid, width)
    )
    if apart:
        ref = layout.put(hosts.fetch(ref), "batch")
    return jax.block_until_ready(batch.replace(ref_logprobs=ref, old_logprobs=old))


def propose_pairs(
    cooper: Cooper,
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    positions: Sequence[int],
    step: int,
    scores: np.ndarray | None,
) -> pairs.PendingPairs:
    """Positives and their negatives; none but in the cooper arm, and where the update reads them.

    scores: the reward model's rewards f32[N].
    """
    cfg = cooper.cfg
    if not settings.makes_pairs(cfg):
        return pairs.none()

    def fits(answer: str) -> bool:
        return prompts.reference_fits(cooper.reward.model.tokenizer, answer, cfg.reward.max_tokens)

    return pairs.start(
        problems, completions, verdicts, cfg.rollout.group_size, cooper.assistant, cooper.rule, cfg.pairs,
        seed=cfg.seed, step=step, positions=positions, scores=scores, exchange=cfg.reward.shuffle_labels,
        fits=fits,
    )  # fmt: skip


def choose_lessons(
    cooper: Cooper,
    state: State,
    rows: Sequence[Problem],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    positions: range,
    step: int,
    scores: np.ndarray | None,
) -> tuple[list[Triple], lessons.Replay]:
    """The labelled rows of the reward model's update, and what is remembered after it; arguments [N] row by row."""
    cfg = cooper.cfg
    if cfg.reward.arm != "cooper":
        return [], state.replay
    return lessons.choose(
        rows, completions, verdicts, scores, state.replay, cfg.reward,
        seed=cfg.seed, step=step, position=positions.start,
    )  # fmt: skip


def update_policy(
    cooper: Cooper, state: State, batch: PolicyBatch, advantages: np.ndarray, step: int
) -> tuple[TrainState, Metrics]:
    """GRPO; advantages f32[N]."""
    rows = packing.pad_rows(np.asarray(advantages, np.float32), batch.tokens.shape[0])
    batch = batch.replace(advantages=cooper.layout.put(rows, "batch"))
    key = keys.stream(cooper.cfg.seed, "minibatch", step)
    policy, metrics = grpo.train_step(state.policy, batch, key, cooper.cfg.policy, cooper.policy.update)
    return policy, to_host(metrics, "policy")


def updates_of(cfg: ConfigDict, false_positive_rate: float) -> int:
    """How many reward-model updates a step makes.  cfg: the config's `reward` section."""
    return cfg.updates_most if cfg.updates_most and false_positive_rate > cfg.fp_target else cfg.updates


def update_reward_model(
    cooper: Cooper,
    state: State,
    made: Sequence[Pair | None],
    rows: Sequence[Triple] = (),
    updates: int = 1,
) -> tuple[TrainState | None, Metrics]:
    """`updates` updates over valid pairs and labelled rows; nothing moves without one, or outside the cooper arm.

    Metrics are those of the first update, but for `rm/skipped`, the sum, and `rm/updates`, how many took place.
    With `log.pair_motion`: how far all of them moved the valid pairs' logits, common mode and difference.
    """
    cfg, reward = cooper.cfg, state.reward
    if cfg.reward.arm != "cooper":
        return reward, {}
    pairs_batch = _pair_batch(cooper, made) if settings.weighs_pairs(cfg.reward) else None
    rows_batch = _labelled_batch(cooper, rows) if cfg.reward.rollout_bce else None
    motion = cfg.log.pair_motion and pairs_batch is not None
    before = _pair_logits(cooper, reward, pairs_batch) if motion else None
    seen = []
    for _ in range(updates):
        reward, metrics = cooper.reward.update(reward, pairs_batch, rows_batch)
        seen.append(metrics)
    out = to_host(seen[0], "rm")
    rest = [to_host({n: metrics[n] for n in ("lr", "skipped")}, "rm") for metrics in seen[1:]]
    out["rm/updates"] = float(sum(x["rm/lr"] > 0 for x in (out, *rest)))
    out["rm/skipped"] += sum(x["rm/skipped"] for x in rest)
    if motion:
        moved = np.subtract(_pair_logits(cooper, reward, pairs_batch), before)[
            :, [i for i, p in enumerate(made) if p is not None]
        ]
        out["rm/common_motion"] = float(moved.mean()) if moved.size else float("nan")
        out["rm/difference_motion"] = float((moved[0] - moved[1]).mean()) if moved.size else float("nan")
    return reward, out | dict.fromkeys(_of_nothing(out), float("nan"))


# Metrics that are counts, or the optimiser's: 0 where others are a mean over nothing.
_COUNTS = ("valid", "rollout_rows", "loss", "grad_norm", "lr", "skipped", "updates")


def _of_nothing(metrics: Metrics) -> list[str]:
    """The names of the means over nothing: of pairs where none is valid, of rows where there is none."""
    names = [n for n in metrics if n.removeprefix("rm/") not in _COUNTS]
    of_rows = [n for n in names if n.startswith("rm/rollout_")]
    of_pairs = [n for n in names if n not in of_rows]
    return (of_pairs if metrics.get("rm/valid") == 0 else []) + (
        of_rows if metrics.get("rm/rollout_rows") == 0 else []
    )


def _pair_batch(cooper: Cooper, made: Sequence[Pair | None]) -> PairBatch:
    """The pairs as the reward model reads them; a masked slot is an empty row."""

    def members(p: Pair) -> tuple[list[int], list[int]]:
        sides = (p.positive, p.positive_reference), (p.negative, p.negative_reference)
        both = [
            render(cooper, dataclasses.replace(p.problem, reference=reference or p.problem.reference), text)
            for text, reference in sides
        ]
        return tuple(both[::-1] if p.exchanged else both)

    rows = [members(p) if p else ([], []) for p in made]
    layout, bucket = cooper.reward.layout, cooper.cfg.data.bucket
    width = packing.round_up(max(len(side) for row in rows for side in row), bucket)
    positive, negative = (
        packing.score_batch([row[i] for row in rows], bucket=width, rows_multiple=layout.batch_shards)
        for i in (0, 1)
    )
    mask = packing.pad_rows(np.array([p is not None for p in made]), positive.tokens.shape[0])
    return layout.put(PairBatch(positive=positive, negative=negative, mask=mask), "batch")


def _labelled_batch(cooper: Cooper, triples: Sequence[Triple]) -> LabelledBatch:
    """The labelled rows as the reward model reads them, as many every time: empty ones weigh nothing."""
    layout, cfg = cooper.reward.layout, cooper.cfg
    labels = np.array([t.label for t in triples], np.float32)
    tokens = [render(cooper, Problem(t.question, t.reference), t.completion) for t in triples]
    tokens += [[]] * (lessons.most_rows(cfg.reward) - len(tokens))
    rows = packing.score_batch(tokens, bucket=cfg.data.bucket, rows_multiple=layout.batch_shards)
    count = rows.tokens.shape[0]
    weights = packing.pad_rows(lessons.class_weights(labels), count)
    batch = LabelledBatch(rows=rows, labels=packing.pad_rows(labels, count), weights=weights)
    return layout.put(batch, "batch")


def _pair_logits(cooper: Cooper, reward: TrainState, batch: PairBatch) -> np.ndarray:
    """Logits of positives and negatives, f32[2, B]."""
    sides = (batch.positive, batch.negative)
    return np.stack([hosts.fetch(cooper.reward.score(reward.params, side)) for side in sides])
