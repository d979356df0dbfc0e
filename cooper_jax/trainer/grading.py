"""Grades of responses: the rule verifier's verdicts and the reward model's scores.

1. `encode_reward_input` renders a problem and a response with the one template that the reward model reads: for
   scoring, for pairs, for labelled rows and in supervised training.
2. `score_responses` computes the reward model's logits of many responses.
3. `ResponseGrader` grades the responses of a step while others are still sampled.

    B  prompts   G  samples a prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.data import packing, prompts
from cooper_jax.reward import reward_losses
from cooper_jax.runtime import hosts
from cooper_jax.trainer.policy_stages import ProblemBatch
from cooper_jax.trainer.state import Components
from cooper_jax.types import Completion, Params, Problem, ScoreBatch, TrainState, Verdict


def encode_reward_input(components: Components, problem: Problem, completion: str) -> list[int]:
    """The reward model's input as token ids.

    References are checked before: those of files at setup, those that the policy wrote in `propose_pairs`.  So no
    text of the policy makes this raise, and end the run at every restart.
    """
    return prompts.encode_verifier_input(
        components.reward_bundle.model.tokenizer,
        problem.question,
        problem.reference,
        completion,
        components.settings.reward.max_tokens,
        last_resort=True,
    )


def pack_reward_inputs(components: Components, rows: Sequence[Sequence[int]]) -> ScoreBatch:
    """Token ids as a batch on the reward model's devices, with padding rows that the mesh needs."""
    layout = components.reward_bundle.layout
    batch = packing.pack_score_batch(
        rows, bucket=components.settings.data.bucket, rows_multiple=layout.batch_shards
    )
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
    logits = components.reward_bundle.score(params, pack_reward_inputs(components, rows))
    return hosts.fetch_arrays(logits)[: len(rows)]


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
            problems: list[Problem] = []
            completions: list[Completion] = []
            for index, problem in enumerate(self._problems):
                completions += self._groups[index]
                problems += [problem] * len(self._groups[index])
            logits = score_responses(self._components, self._reward.params, problems, completions)
        return np.asarray(reward_losses.rewards_from_logits(jnp.asarray(logits)))

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
        shards = components.reward_bundle.layout.batch_shards
        self._batch_rows = packing.round_up(components.settings.reward_update.microbatch, shards)
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
            logits[rows] = hosts.fetch_arrays(values)[: len(rows)]
        return logits

    def _launch(self) -> None:
        taken, self._waiting = self._waiting[: self._batch_rows], self._waiting[self._batch_rows :]
        # Empty rows fill the last microbatch up, so that one compiled program scores all of them.
        tokens = [row for _, row in taken] + [[]] * (self._batch_rows - len(taken))
        logits = self._components.reward_bundle.score(
            self._params, pack_reward_inputs(self._components, tokens)
        )
        self._running.append(([row for row, _ in taken], logits))
