"""The data that a run holds: fixed components on one side, the trained state on the other.

1. `Components` is built once (setup.py) and never changes: models without their parameters, compiled functions,
   problems, the rule verifier, the assistant.
2. `State` holds everything that training changes.  A step takes one `State` and returns the next.
3. `checkpoint_items` names the parts of a `State` that a checkpoint stores.

    N  rows (responses)   T  response tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import struct

from cooper_jax.model.loading import Model
from cooper_jax.reward.assistants import Assistant
from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import checkpoint, mesh, optim
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.types import Params, Problem, TrainState

LogprobsFunction = Callable[..., jax.Array]  # (params, tokens, valid, T) -> f32[N, T]


@dataclasses.dataclass(frozen=True)
class PolicyBundle:
    """The policy and its frozen reference, without their parameters."""

    model: Model
    sampling: SamplingSpec
    logprobs: LogprobsFunction
    reference_layout: mesh.Layout  # the policy's, unless `mesh.reference` gives the reference its own devices
    reference_logprobs: LogprobsFunction  # on the reference's devices
    update: Callable  # (TrainState, PolicyBatch) -> (TrainState, metrics)
    optimiser: optim.Optimiser


@dataclasses.dataclass(frozen=True)
class RewardBundle:
    """The reward model, without its parameters."""

    model: Model
    layout: mesh.Layout
    score: Callable  # (params, ScoreBatch) -> logits f32[N]
    update: Callable  # (TrainState, PairBatch | None, LabelledBatch | None) -> (TrainState, metrics)
    optimiser: optim.Optimiser


@dataclasses.dataclass(frozen=True)
class Components:
    """Everything that a step needs and does not change."""

    settings: RunSettings
    layout: mesh.Layout  # the policy's
    policy: PolicyBundle
    reward: RewardBundle | None  # None in the rule arm
    rule: RuleVerifier | SharedRule
    assistant: Assistant | None  # None where no negative is written by an assistant
    train: tuple[Problem, ...]
    train_prompts: tuple[Sequence[int], ...]  # token ids, one prompt a training problem
    held_out: tuple[Problem, ...]
    held_out_prompts: tuple[Sequence[int], ...]
    dropped: tuple[int, int]  # training and held-out problems left out because their prompts are too long
    oracle: Callable[[Problem, str], bool] | None  # exact truth of synthetic problems; measures, never trains

    @property
    def reward_bundle(self) -> RewardBundle:
        """The reward model, for code that runs only where there is one.  Raises ValueError in the rule arm."""
        if self.reward is None:
            raise ValueError("there is no reward model in the rule arm")
        return self.reward


@struct.dataclass
class State:
    """Everything that a step replaces."""

    policy: TrainState
    reward: TrainState | None  # None in the rule arm
    reference: Params | None  # the policy at step 0; None until the supervised phases are over
    step: int = struct.field(pytree_node=False)  # Cooper steps done
    position: int = struct.field(pytree_node=False)  # problems consumed, over all epochs
    replay: Replay = struct.field(pytree_node=False, default=Replay())  # past rollouts for the reward model

    @property
    def reward_state(self) -> TrainState:
        """The reward model, for code that runs only where there is one.  Raises ValueError in the rule arm."""
        if self.reward is None:
            raise ValueError("there is no reward model in the rule arm")
        return self.reward


def checkpoint_items(state: State) -> dict[str, Any]:
    """A state's arrays as named checkpoint items, weights apart from optimisers.

    The reference is not among them: it never changes, so it is stored once, beside the checkpoints.
    """
    models = {"policy": state.policy}
    if state.reward is not None:
        models["reward"] = state.reward

    items = {}
    for name, train_state in models.items():
        items[name], items[f"{name}_optimiser"] = checkpoint.split_state(train_state)
    return items


def checkpoint_vocab_sizes(components: Components) -> dict[str, int]:
    """The true vocabulary size of each checkpoint item.

    A mesh pads the vocabulary to a multiple of its shards, so a checkpoint from another mesh may be padded
    differently; the true size says how much of the stored rows is real.
    """
    bundles: dict[str, PolicyBundle | RewardBundle] = {"policy": components.policy}
    if components.reward is not None:
        bundles["reward"] = components.reward

    sizes: dict[str, int] = {}
    for name, bundle in bundles.items():
        sizes[name] = sizes[f"{name}_optimiser"] = bundle.model.config.vocab_size
    return sizes
