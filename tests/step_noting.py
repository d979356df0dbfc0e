"""One Cooper step whose updates note what they get, for docs/one_step.md.

B prompts, G samples per prompt, N = B * G rows (prompt-major)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step import cooper_step, finish_step
from cooper_jax.types import Metrics, PairBatch, PolicyBatch

# The sources of negatives of `robust`, which a prompt's pairs take in turn.
KINDS = ("assistant", "swap", "own_answer")


@dataclasses.dataclass
class NotedStep:
    """What one step computed, on the host."""

    record: StepRecord
    metrics: Metrics
    policy_batch: dict[str, np.ndarray]  # the fields of PolicyBatch
    pair_batch: dict[str, np.ndarray]  # positive, negative (tokens) and mask
    # Logits of the pairs' members, f32[2, slots], before the first and after the last update.
    logits: tuple[np.ndarray, np.ndarray]
    decode: Callable[[Sequence[int]], str]
    prompts: list[list[int]]  # token ids

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.record.completions) // len(self.record.problems)

    @property
    def shown(self) -> int:
        """The index of the prompt that the page shows: the first one with a rewrite."""
        rewrites = [pair is not None for pair in self.record.pairs[:: len(KINDS)]]
        return rewrites.index(True) if any(rewrites) else 0

    @property
    def rows(self) -> range:
        """The rows of the shown prompt."""
        return range(self.shown * self.group_size, (self.shown + 1) * self.group_size)


def note_step(components: Components, state: State) -> NotedStep:
    """Take one step, and note what its updates get.  The input state is donated."""
    noted: dict[str, Any] = {}
    policy, reward = components.policy, components.reward
    assert reward is not None

    def update_policy(policy_state: Any, batch: PolicyBatch, *rest: Any) -> Any:
        noted["policy"] = {
            f.name: np.asarray(value)
            for f in dataclasses.fields(batch)
            if (value := getattr(batch, f.name)) is not None
        }
        return policy.update(policy_state, batch, *rest)

    def compute_logits(params: Any, batch: PairBatch) -> np.ndarray:
        members = [np.asarray(reward.compute_logits(params, x)) for x in (batch.positive, batch.negative)]
        return np.stack(members)  # [2, slots]

    def update_reward(reward_state: Any, pairs: PairBatch, labelled: Any) -> Any:
        if "pairs" not in noted:
            noted["pairs"] = {
                "positive.tokens": np.asarray(pairs.positive.tokens),
                "negative.tokens": np.asarray(pairs.negative.tokens),
                "mask": np.asarray(pairs.mask),
            }
            noted["before"] = compute_logits(reward_state.params, pairs)
        new_state, metrics = reward.update(reward_state, pairs, labelled)
        noted["after"] = compute_logits(new_state.params, pairs)
        return new_state, metrics

    watched = dataclasses.replace(
        components,
        policy=dataclasses.replace(policy, update=update_policy),
        reward=dataclasses.replace(reward, update=update_reward),
    )
    phases = PhaseTimer()
    _, metrics, record = finish_step(cooper_step(watched, state, phases), phases)

    return NotedStep(
        record=record,
        metrics=metrics,
        policy_batch=noted["policy"],
        pair_batch=noted["pairs"],
        logits=(noted["before"], noted["after"]),
        decode=components.policy.model.tokenizer.decode,
        prompts=[list(map(int, tokens)) for tokens in record.prompt_tokens],
    )
