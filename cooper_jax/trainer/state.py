"""The objects of a run: fixed components on one side, the trained state on the other.

1. `Components` is built once (setup.py) and never changes: models without their parameters, jitted functions,
   problems, the rule verifier, the assistant.
2. `State` is everything that training changes.  A step takes one `State` and returns the next.
3. `checkpoint_items` names the parts of a `State` that a checkpoint stores.

    N  rows (responses)   T  response tokens
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import struct

from cooper_jax.data.mixtures import DataOrder
from cooper_jax.model.loading import Model
from cooper_jax.reward.assistants import Assistant
from cooper_jax.reward.calibration import Calibration
from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.reward.pairs.giveaway_probe import RecentRewrites
from cooper_jax.rollout.exact import Resample
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import checkpoint, mesh, optim
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer.hacking_guard import GuardState
from cooper_jax.trainer.reward_functions import RewardFunctions
from cooper_jax.trainer.rollout_thread import PendingRollout, RolloutThread
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.types import Metrics, Params, Problem, TrainState

# (params, tokens, valid, T) -> f32[N, T]; with packed rows (params, PackedRows, response_mask) -> f32[N, T]
LogprobsFunction = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class PolicyBundle:
    """The policy and its frozen reference, without their parameters."""

    model: Model
    sampling: SamplingSpec
    packs_rows: bool  # rows of updates and log-probabilities hold several responses (data/row_packing.py)

    # Log-probabilities of responses.  The reference has the policy's layout, unless `mesh.reference` gives it
    # devices of its own.
    logprobs: LogprobsFunction
    reference_layout: mesh.Layout
    reference_logprobs: LogprobsFunction  # on the reference's devices

    # Of the training rollouts: the policy's, unless they are sampled one step ahead (rollout_ahead.py).
    rollout_layout: mesh.Layout

    # Updates.  The update donates its input state.
    update: Callable  # (TrainState, PolicyBatch[, PackedRows]) -> (TrainState, metrics)
    optimiser: optim.Optimiser

    resample: Resample | None = None  # corrects the rollouts of an exact run


@dataclasses.dataclass(frozen=True)
class RewardBundle:
    """The reward model, without its parameters."""

    model: Model
    packs_rows: bool  # rows of scores and updates hold several inputs
    layout: mesh.Layout  # the policy's, unless `mesh.reward` gives the reward model its own devices
    compute_logits: Callable  # (params, ScoreBatch) -> logits f32[N]

    # Updates.  The update donates its input state.
    update: Callable  # (TrainState, PairBatch | None, LabelledBatch | None) -> (TrainState, metrics)
    optimiser: optim.Optimiser

    # Applied to logits that become rewards, and not in updates; None: rewards are sigmoid(logit).
    calibration: Calibration | None = None


@dataclasses.dataclass(frozen=True)
class Components:
    """Everything that a step reads and does not change."""

    settings: RunSettings
    layout: mesh.Layout  # the policy's

    # Models.
    policy: PolicyBundle
    reward: RewardBundle | None  # None in the rule arm

    # The rule verifier's worker processes, and the assistant that writes negatives.
    rule: RuleVerifier | SharedRule
    assistant: Assistant | None  # None if the run asks no assistant

    # Texts of the control tokens of all tokenizers in use, which no rewrite may contain.
    control_texts: frozenset[str]

    # Problems with their prompts as token ids, in the same order.
    train: tuple[Problem, ...]
    train_prompts: tuple[Sequence[int], ...]
    data_order: DataOrder  # of the training problems
    held_out: tuple[Problem, ...]
    held_out_prompts: tuple[Sequence[int], ...]
    dropped: tuple[int, int]  # numbers of training and held-out problems dropped for too long prompts

    # (problem, response text) -> correct, exactly; None unless problems are synthetic.  Metrics alone use it:
    # training on it would hide the errors of the rule and of the reward model.
    oracle: Callable[[Problem, str], bool] | None

    # The functions of reward.functions; None: the arm's reward.
    reward_functions: RewardFunctions | None = None

    # Samples the batch of the next step; None with rollout.ahead=0.
    rollout_thread: RolloutThread | None = None

    @functools.cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest training prompt."""
        return max(map(len, self.train_prompts))

    @functools.cached_property
    def shortest_prompt(self) -> int:
        """Tokens of the shortest training prompt."""
        return min(map(len, self.train_prompts))

    @property
    def reward_bundle(self) -> RewardBundle:
        """The reward model's bundle, never None.  Raises ValueError in the rule arm."""
        if self.reward is None:
            raise ValueError("there is no reward model in the rule arm")
        return self.reward


# (state, phases) -> (state, metrics, record); see State.finish.
FinishStep = Callable[["State", PhaseTimer], tuple["State", Metrics, StepRecord]]


@struct.dataclass
class State:
    """Everything that a step replaces."""

    # Arrays.
    policy: TrainState
    reward: TrainState | None  # None in the rule arm
    # The policy at step 0; None until the supervised phases are complete, in a run without a KL term, and with
    # adapters, whose base it is.
    reference: Params | None

    # Python values; checkpoints store them as JSON.
    step: int = struct.field(pytree_node=False)  # Cooper steps completed
    position: int = struct.field(pytree_node=False)  # problems consumed, over all epochs
    replay: Replay = struct.field(pytree_node=False, default=Replay())  # past rollouts for the reward model
    # The last rewrites, for the measurement of giveaways.
    recent_rewrites: RecentRewrites = struct.field(pytree_node=False, default=RecentRewrites())
    # What the guard against reward hacking has seen, up to the last complete step.
    guard: GuardState = struct.field(pytree_node=False, default=GuardState())

    # With rollout.ahead=1: the weights with which the next step is sampled, on the rollout's devices, and that
    # rollout.  It is no part of a checkpoint: a resumed run samples it again.
    rollout_params: Params | None = None
    pending_rollout: PendingRollout | None = struct.field(pytree_node=False, default=None)

    # Completes step `step`, whose reward model has not been updated yet: (state, phases) -> (the complete state,
    # the step's metrics, its record).  None: the step is complete.  Only a complete state can be saved.
    finish: FinishStep | None = struct.field(pytree_node=False, default=None)

    @property
    def sampling_params(self) -> Params:
        """The policy's parameters with which the next step is sampled."""
        return self.policy.params if self.rollout_params is None else self.rollout_params

    @property
    def reward_params(self) -> Params | None:
        """The reward model's parameters; None in the rule arm."""
        return None if self.reward is None else self.reward.params

    @property
    def reward_state(self) -> TrainState:
        """The reward model's state, never None.  Raises ValueError in the rule arm."""
        if self.reward is None:
            raise ValueError("there is no reward model in the rule arm")
        return self.reward


def list_models(state: State) -> dict[str, TrainState]:
    """The trained models of a state, by their names in checkpoints."""
    models = {"policy": state.policy}
    if state.reward is not None:
        models["reward"] = state.reward
    return models


def checkpoint_items(state: State) -> dict[str, Any]:
    """A state's arrays as named checkpoint items.

    The reference is not among them: it never changes, so it is stored once, beside the checkpoints.
    """
    # Weights and optimiser are separate items, so that export and evaluation read the weights alone.
    items = {}
    for name, train_state in list_models(state).items():
        items[name], items[f"{name}_optimiser"] = checkpoint.split_state(train_state)
    if state.rollout_params is not None:
        items["rollout_policy"] = optim.select_trained(state.rollout_params)
    return items


def checkpoint_vocab_sizes(components: Components) -> dict[str, int]:
    """The vocabulary size, without padding, of each checkpoint item's model.

    The vocabulary is padded to a multiple of the mesh's shards, so a checkpoint from another mesh may have
    another padding.  The unpadded size tells which stored rows to read.
    """
    bundles: dict[str, PolicyBundle | RewardBundle] = {"policy": components.policy}
    if components.reward is not None:
        bundles["reward"] = components.reward

    sizes: dict[str, int] = {}
    for name, bundle in bundles.items():
        sizes[name] = sizes[f"{name}_optimiser"] = bundle.model.config.vocab_size
    sizes["rollout_policy"] = sizes["policy"]
    return sizes
