"""Grades of responses: the rule verifier's verdicts and the reward model's scores.

1. `encode_reward_input` renders a problem and a response with the reward model's template, the same for
   scoring, for pairs, for labelled rows and for supervised training.
2. `compute_response_logits` computes the reward model's logits for many responses, calibrated if the run is
   (reward.calibrated).
3. `ResponseGrader` grades a step's responses group by group, while other groups are still being sampled, and
   rewards them.

    B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.data import packing, prompts, row_packing
from cooper_jax.reward import reward_losses
from cooper_jax.reward.calibration import apply_calibration
from cooper_jax.rule.worker_process import make_item
from cooper_jax.runtime import hosts
from cooper_jax.trainer.policy_stages import ProblemBatch
from cooper_jax.trainer.reward_functions import CombinedRewards, StepRewards
from cooper_jax.trainer.rewards import compute_rewards, name_rewards, penalise_length
from cooper_jax.trainer.state import Components
from cooper_jax.types import Completion, PackedRows, Params, Problem, ScoreBatch, Verdict


def encode_reward_input(components: Components, problem: Problem, completion: str) -> list[int]:
    """The reward model's input as token ids, at most `reward.max_tokens` of them.

    Question and completion are truncated as far as necessary, so that no sampled response can end the run: a
    resumed run would sample it again.  References are never truncated, and one that does not fit raises
    ValueError.  They are therefore checked earlier: those of data files at setup, and the policy's own
    answers when pairs are made (`reference_fits` in `reward_stages.make_pair_task`).
    """
    return prompts.encode_verifier_input(
        components.reward_bundle.model.tokenizer,
        problem.question,
        problem.reference,
        completion,
        components.settings.reward.max_tokens,
        truncate_below_minimum=True,
    )


def pack_reward_inputs(components: Components, rows: Sequence[Sequence[int]]) -> ScoreBatch | PackedRows:
    """Pack token ids into a batch on the reward model's devices: several in a row if rows are packed."""
    if components.reward_bundle.packs_rows:
        return pack_reward_sequences(components, rows)
    return pad_reward_inputs(components, rows)


def pad_reward_inputs(components: Components, rows: Sequence[Sequence[int]]) -> ScoreBatch:
    """Put token ids on the reward model's devices, a row each, padded to a multiple of the batch shards."""
    layout = components.reward_bundle.layout
    batch = packing.pack_score_batch(
        rows, bucket=components.settings.data.bucket, rows_multiple=layout.batch_shards
    )
    return layout.put(batch, "batch")


def pack_reward_sequences(
    components: Components, sequences: Sequence[Sequence[int]], together: int = 1
) -> PackedRows:
    """Pack several of the reward model's inputs in each row, and put them on its devices.

    together: see `row_packing.pack_reward_rows`.
    """
    settings, bundle = components.settings, components.reward_bundle
    plan = row_packing.choose_packing(
        together * settings.reward.max_tokens,
        settings.reward_update.microbatch,
        bundle.layout.batch_shards,
        width=bundle.model.config.width,
        bucket=settings.data.bucket,
    )
    packed = row_packing.pack_reward_rows(sequences, plan, bundle.layout.batch_shards, together=together)
    return bundle.layout.put(packed, None, "batch")


def compute_response_logits(
    components: Components,
    params: Params,
    problems: Sequence[Problem],
    completions: Sequence[Completion],
) -> np.ndarray:
    """The logits f32[N] whose sigmoids are the rewards: the reward model's, calibrated if the run is.

    Args:
      params: the reward model's parameters.
      problems: [N], the problem of each completion.
      completions: [N].
    """
    rows = [
        encode_reward_input(components, problem, completion.text)
        for problem, completion in zip(problems, completions, strict=True)
    ]
    return compute_input_logits(components, params, rows)


def compute_input_logits(components: Components, params: Params, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """`compute_response_logits` of inputs that are token ids already.  rows: [N]."""
    logits = components.reward_bundle.compute_logits(params, pack_reward_inputs(components, rows))

    # Every process gets all logits; the padding rows are at the end.
    fetched = hosts.fetch_arrays(logits)[: len(rows)]
    return apply_calibration(fetched, components.reward_bundle.calibration)


def can_score_during_rollout(components: Components) -> bool:
    """True if the reward model has its own devices, which would be idle while the policy samples."""
    return components.reward is not None and components.reward.layout != components.layout


class ResponseGrader:
    """Rule verdicts, reward-model scores and rewards of a step's responses.

    `add_group` starts the grading of a group as soon as its responses have ended.  The rule verifier's worker
    processes then run while the devices sample the remaining groups, and so does a thread that renders the reward
    model's inputs.  A reward model with its own devices scores them then, too; one that shares the policy's
    devices scores all responses after the rollout, since scoring earlier would only delay the decoding.

    With overlap=False nothing is started before it is collected.
    """

    def __init__(
        self,
        components: Components,
        batch: ProblemBatch,
        reward_params: Params | None,
        *,
        rewards_policy: bool = False,
    ):
        """Prepare the grading of a step.

        Args:
          reward_params: the reward model's parameters, to score responses while others are sampled; None in
            the rule arm, and if the reward model will change before `collect_scores`.
          rewards_policy: True if `collect_rewards` will be called: the functions of reward.functions are started.
        """
        self._components = components
        self._starts_early = components.settings.overlap
        self._rewards: StepRewards | None = None
        if rewards_policy and components.reward_functions is not None:
            self._rewards = StepRewards(components.reward_functions, batch.problems)
        self._problems = batch.problems

        # Responses and their token ids, keyed by the problem's index in the batch: groups end in any order, which
        # depends on the sampled tokens alone.
        self._groups: dict[int, tuple[Sequence[Completion], Sequence[Sequence[int]]]] = {}
        self._pending_verdicts: dict[int, Any] = {}  # handles of `rule.submit`, for `rule.collect`
        self._verdicts: list[Verdict] | None = None

        # Scores: by microbatches during the rollout, or of inputs that a thread renders during the rollout.
        self._scorer = None
        self._inputs: dict[int, concurrent.futures.Future[list[list[int]]]] = {}
        self._renderer: concurrent.futures.ThreadPoolExecutor | None = None
        if reward_params is not None and can_score_during_rollout(components):
            self._scorer = _OverlappedScorer(components, reward_params)
        elif components.reward is not None:
            self._renderer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reward inputs")

    def add_group(
        self, index: int, responses: Sequence[Completion], tokens: Sequence[Sequence[int]] = ()
    ) -> None:
        """Start to grade the G responses to problem `index`, and return without waiting.

        tokens: [G], the responses' token ids, which the functions of reward.functions get.
        """
        self._groups[index] = (responses, tokens)
        if self._starts_early:
            self._start_rewards(index)
            self._start_verdicts(index)
            self._start_scores(index)

    def _start_rewards(self, index: int) -> None:
        if self._rewards is not None:
            self._rewards.add_group(index, *self._groups[index])

    def _start_verdicts(self, index: int) -> None:
        responses, _ = self._groups[index]
        problem = self._problems[index]
        self._pending_verdicts[index] = self._components.rule.submit(
            [make_item(problem, response.text) for response in responses]
        )

    def _start_scores(self, index: int) -> None:
        responses, _ = self._groups[index]
        if self._scorer is not None:
            self._scorer.add(index * len(responses), self._problems[index], responses)
        elif self._renderer is not None:
            self._inputs[index] = self._renderer.submit(self._render_inputs, index)

    def _render_inputs(self, index: int) -> list[list[int]]:
        """The reward model's inputs for the responses to one problem, as token ids."""
        problem, (responses, _) = self._problems[index], self._groups[index]
        return [encode_reward_input(self._components, problem, response.text) for response in responses]

    def collect_scores(self, reward_params: Params | None) -> np.ndarray:
        """The reward model's scores sigmoid(logit), f32[N], in row order.

        reward_params: the reward model's parameters; equal to those of the constructor, if it got any.

        Raises ValueError in the rule arm.
        """
        if reward_params is None:
            raise ValueError("there is no reward model: in the rule arm responses have verdicts only")
        if not self._starts_early:
            for index in self._groups:
                self._start_scores(index)
        if self._scorer is not None:
            logits = self._scorer.collect()
        else:
            # Groups ended in any order; rows are in the order of the problems.
            rows: list[list[int]] = []
            for index in range(len(self._problems)):
                rows += self._inputs[index].result()
            assert self._renderer is not None
            self._renderer.shutdown()
            logits = compute_input_logits(self._components, reward_params, rows)
        return np.asarray(reward_losses.rewards_from_logits(jnp.asarray(logits)))

    def collect_verdicts(self) -> list[Verdict]:
        """Wait for the rule verifier and return its verdicts [N], in row order.  Collective at the first call."""
        if self._verdicts is None:
            if not self._starts_early:
                for index in self._groups:
                    self._start_verdicts(index)
            pending = [self._pending_verdicts[index] for index in range(len(self._problems))]
            self._verdicts = self._components.rule.collect(pending)
        return self._verdicts

    def collect_rewards(
        self,
        scores: np.ndarray | None,
        verdicts: Sequence[Verdict],
        completions: Sequence[Completion],
        by_rule: bool = False,
    ) -> CombinedRewards:
        """The rewards of the responses: those of reward.functions, or the arm's.

        Args:
          scores: f32[N]; None in the rule arm.
          verdicts: [N]; empty if the rewards do not depend on them (RewardConfig.reads_verdicts).
          completions: [N].
          by_rule: the rule's rewards in place of the arm's (hacking_guard.py); not with reward.functions.

        Raises what StepRewards.collect raises.
        """
        if not self._starts_early:
            for index in self._groups:
                self._start_rewards(index)
        settings = self._components.settings
        penalty = None
        if overlong_tokens := settings.reward.overlong_tokens:
            penalty = penalise_length(completions, settings.rollout.max_new_tokens, overlong_tokens)

        if self._rewards is not None:
            return self._rewards.collect(scores, verdicts, completions, penalty)
        names = ["rule"] if by_rule else name_rewards(settings.reward)
        total = compute_rewards(names, scores, verdicts, completions)
        return CombinedRewards(total if penalty is None else total + penalty, {}, penalty=penalty)


@dataclasses.dataclass(frozen=True)
class Grades:
    """Grades that were collected already, behind the methods of ResponseGrader with which they are collected."""

    scores: np.ndarray | None  # f32[N]; None in the rule arm
    verdicts: list[Verdict]  # [N]
    rewards: CombinedRewards

    def collect_scores(self, reward_params: Params | None) -> np.ndarray:
        """The scores of the reward model with these parameters, f32[N].  Raises ValueError in the rule arm."""
        if self.scores is None:
            raise ValueError("there is no reward model: in the rule arm responses have verdicts only")
        return self.scores

    def collect_verdicts(self) -> list[Verdict]:
        """The rule verifier's verdicts, [N]."""
        return self.verdicts

    def collect_rewards(
        self,
        scores: np.ndarray | None,
        verdicts: Sequence[Verdict],
        completions: Sequence[Completion],
        by_rule: bool = False,
    ) -> CombinedRewards:
        """The rewards, which were computed from these arguments before."""
        return self.rewards

    def concatenate(self, other: Grades) -> Grades:
        """The grades of these responses and then those of `other`, of the same run."""
        scores = None
        if self.scores is not None and other.scores is not None:
            scores = np.concatenate([self.scores, other.scores])
        return Grades(scores, self.verdicts + other.verdicts, self.rewards.concatenate(other.rewards))

    def take(self, rows: np.ndarray) -> Grades:
        """The grades of some responses.  rows: i[n]."""
        scores = None if self.scores is None else self.scores[rows]
        return Grades(scores, [self.verdicts[n] for n in rows], self.rewards.take(rows))


class _OverlappedScorer:
    """Scores responses one microbatch at a time, as they end, on the reward model's own devices.

    Microbatches are filled in the order in which groups end.  That order depends on the sampled tokens alone,
    not on timing, so logits are reproducible.
    """

    def __init__(self, components: Components, params: Params):
        self._components, self._params = components, params
        shards = components.reward_bundle.layout.batch_shards
        self._batch_rows = packing.round_up(components.settings.reward_update.microbatch, shards)

        # Responses that do not fill a microbatch yet: (row, token ids).
        self._waiting: list[tuple[int, list[int]]] = []

        # Launched microbatches: (rows, logits f32[batch_rows]); logits beyond those of `rows` are padding.
        self._running: list[tuple[list[int], jax.Array]] = []

    def add(self, first_row: int, problem: Problem, completions: Sequence[Completion]) -> None:
        """Add the responses to one problem, rows `first_row` onwards; launch full microbatches."""
        for i, completion in enumerate(completions):
            tokens = encode_reward_input(self._components, problem, completion.text)
            self._waiting.append((first_row + i, tokens))
        while len(self._waiting) >= self._batch_rows:
            self._launch()

    def collect(self) -> np.ndarray:
        """Wait for the logits f32[N] of all responses, in row order, calibrated if the run is."""
        while self._waiting:
            self._launch()

        logits = np.zeros(sum(len(rows) for rows, _ in self._running), np.float32)
        for rows, values in self._running:
            logits[rows] = hosts.fetch_arrays(values)[: len(rows)]
        return apply_calibration(logits, self._components.reward_bundle.calibration)

    def _launch(self) -> None:
        """Score the first waiting responses.  JAX dispatches the computation and returns without waiting."""
        batch, self._waiting = self._waiting[: self._batch_rows], self._waiting[self._batch_rows :]

        # The last microbatch is filled with empty rows, so that no other batch size is compiled.
        inputs = [tokens for _, tokens in batch] + [[]] * (self._batch_rows - len(batch))
        logits = self._components.reward_bundle.compute_logits(
            self._params, pack_reward_inputs(self._components, inputs)
        )
        self._running.append(([row for row, _ in batch], logits))
