"""The stages of a Cooper step, each a function of the machinery and the state.

    sample -> Rollout, completions      score -> reward-model logits      logprobs -> PolicyBatch
    propose_pairs -> pairs (pending)    update_policy                     update_reward_model

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

from cooper_jax.assembly import Cooper, State
from cooper_jax.data import packing, prompts
from cooper_jax.placement import rollout_options
from cooper_jax.policy import grpo
from cooper_jax.reward import pairs
from cooper_jax.rollout import engine
from cooper_jax.runtime import hosts, keys
from cooper_jax.runtime.metrics import to_host
from cooper_jax.types import (
    Completion,
    Metrics,
    Pair,
    PairBatch,
    PolicyBatch,
    Problem,
    Rollout,
    ScoreBatch,
    TrainState,
    Verdict,
)


def sample(
    cooper: Cooper,
    state: State,
    prompt_tokens: Sequence[Sequence[int]],
    positions: Sequence[int],
    *,
    on_prompt: Callable[[int, list[Completion]], None] | None = None,
    report: Callable[[Metrics], None] | None = None,
) -> tuple[Rollout, list[Completion]]:
    """G responses to each prompt, as arrays and as text.

    on_prompt: is given a prompt's place and its responses when they have ended, while others are being sampled.
    report: is given metrics of the sampling itself.
    """
    model, spec = cooper.policy.model, cooper.policy.sampling
    key = keys.stream(cooper.cfg.seed, "rollout", state.step + 1)

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


def sample_held_out(cooper: Cooper, state: State) -> list[Completion]:
    """The evaluation's responses; the same keys each time."""
    model, section = cooper.policy.model, cooper.cfg.eval
    spec = dataclasses.replace(
        cooper.policy.sampling,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=0,
        group_size=section.samples,
    )
    key = keys.stream(cooper.cfg.seed, "evaluation")
    rollout = engine.generate(
        state.policy.params, model.config, cooper.layout, cooper.held_out_prompts,
        range(len(cooper.held_out)), key, spec, **rollout_options(cooper.cfg),
    )  # fmt: skip
    return engine.completions(rollout, model.tokenizer.decode, spec.eos_ids)


def render(cooper: Cooper, problem: Problem, completion: str) -> list[int]:
    """The reward model's input: the one template, for scoring, for pairs and for the supervised phase."""
    return prompts.verifier_tokens(
        cooper.reward.model.tokenizer,
        problem.question,
        problem.reference,
        completion,
        cooper.cfg.reward.max_tokens,
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
) -> pairs.PendingPairs:
    """Positives and their rewritten negatives; none but in the cooper arm."""
    cfg = cooper.cfg
    return pairs.start(
        problems, completions, verdicts, cfg.rollout.group_size, cooper.assistant, cooper.rule, cfg.pairs,
        seed=cfg.seed, step=step, positions=positions,
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


def update_reward_model(
    cooper: Cooper, state: State, made: Sequence[Pair | None]
) -> tuple[TrainState | None, Metrics]:
    """The contrastive update over the valid pairs; nothing moves without one, or outside the cooper arm."""
    if cooper.cfg.reward.arm != "cooper":
        return state.reward, {}
    rows = [
        (render(cooper, p.problem, p.positive), render(cooper, p.problem, p.negative)) if p else ([], [])
        for p in made
    ]
    layout, bucket = cooper.reward.layout, cooper.cfg.data.bucket
    width = packing.round_up(max(len(side) for row in rows for side in row), bucket)
    positive, negative = (
        packing.score_batch([row[i] for row in rows], bucket=width, rows_multiple=layout.batch_shards)
        for i in (0, 1)
    )
    mask = packing.pad_rows(np.array([p is not None for p in made]), positive.tokens.shape[0])
    batch = layout.put(PairBatch(positive=positive, negative=negative, mask=mask), "batch")
    reward, metrics = cooper.reward.update(state.reward, batch)
    out = to_host(metrics, "rm")
    if not out["rm/valid"]:  # a mean over nothing
        names = ("pair_loss", "margin", "accuracy", "positive_mean", "negative_mean")
        out |= {f"rm/{name}": float("nan") for name in names}
    return reward, out
