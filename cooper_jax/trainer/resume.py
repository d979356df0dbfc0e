"""The start of a run and its checkpoints.

1. `start_or_resume` restores the newest checkpoint, if the run has one, and is done.
2. Otherwise it runs the supervised phases (supervised.py), or loads the models of another run's step 0
   (`supervised.start_from`).  A copy of the resulting policy is the frozen reference.
3. It warms the reward model up on the policy's rollouts, if the config says so (reward_warmup.py).
4. It evaluates the policy and saves everything as step 0, so that a restart does not repeat these phases.
"""

from __future__ import annotations

import dataclasses

import jax

from cooper_jax.model import transformer
from cooper_jax.model.loading import Directory
from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.reward.pairs.giveaway_probe import RecentRewrites
from cooper_jax.runtime import checkpoint, hosts, mesh, optim, remote_files
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.run_directory import RunDirectory
from cooper_jax.runtime.stored_config import config_hash
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.held_out import evaluate_held_out
from cooper_jax.trainer.reward_warmup import warm_up_reward_model
from cooper_jax.trainer.rollout_ahead import copy_to_rollout
from cooper_jax.trainer.state import (
    Components,
    PolicyBundle,
    RewardBundle,
    State,
    checkpoint_items,
    checkpoint_vocab_sizes,
    list_models,
)
from cooper_jax.trainer.supervised import imitate_solutions, train_on_labels
from cooper_jax.types import Params, TrainState


def start_or_resume(
    components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints
) -> State:
    """Return the state to train from: the newest checkpoint's, or step 0 after the supervised phases.

    state: as `build_components` yields it.  Its arrays are deleted or donated, so the caller must not use it
      afterwards.

    Raises SetupError for a checkpoint that does not fit the config.  Raises hosts.Stopped after a SIGTERM
    before step 0 is saved.
    """
    if checkpoints.steps():
        return _resume(components, state, run, checkpoints)
    return _start(components, state, run, checkpoints)


def save_checkpoint(
    components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints
) -> None:
    """Save a state in the background; return once its arrays are copied and may be donated."""
    # Flushed first: a resumed run would never write metrics that are missing before its checkpoint.
    run.flush()

    # The state's Python values, and a hash that ties the checkpoint to the run's config.
    loop = {"position": state.position, "config_hash": config_hash(run.config)}
    if components.settings.reward_update.replay:
        loop["replay"] = state.replay.to_json()
    if components.settings.log.rewrites_kept:
        loop["recent_rewrites"] = state.recent_rewrites.to_json()
    checkpoints.save(state.step, checkpoint_items(state), loop)


def _resume(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> State:
    """Restore the newest checkpoint's state, and remove metrics and samples of later steps."""
    abstract_items = {name: checkpoint.abstract_like(tree) for name, tree in checkpoint_items(state).items()}
    if components.settings.rollout.ahead:
        specs = optim.select_trained(transformer.param_specs(components.policy.model.config))
        abstract_items["rollout_policy"] = mesh.abstract_params(components.policy.rollout_layout, specs)

    # The initial arrays are deleted before the checkpoint is read: both together would need twice the memory.
    # The frozen base of adapters stays, since no checkpoint has it.
    frozen = {name: checkpoint.delete_stored(model) for name, model in list_models(state).items()}
    with setup_errors(f"{checkpoints.folder}"):
        restored = checkpoints.restore_newest(abstract_items, checkpoint_vocab_sizes(components))
        assert restored is not None  # the caller has found a checkpoint
        step, items, loop = restored

    # The run directory has checked its own config.json already; this finds a mixture of two runs.
    if loop["config_hash"] != config_hash(run.config):
        raise SetupError(
            f"{checkpoints.folder / str(step)} was saved with another config than the run directory's "
            "config.json: give another --config.run_dir"
        )

    reward = None
    if "reward" in items:
        reward = checkpoint.join_state(items["reward"], items["reward_optimiser"], frozen["reward"])
    reference = None
    if components.settings.holds_reference:
        with setup_errors(f"{checkpoints.reference}"):
            reference = _restore_reference(components, checkpoints)
    rollout_params = None
    if components.settings.rollout.ahead:
        base = copy_to_rollout(components, frozen["policy"])
        rollout_params = base | items["rollout_policy"]
    with setup_errors("run_dir"):
        run.truncate(step)
    hosts.print_once(f"resumed from step {step}")
    return State(
        policy=checkpoint.join_state(items["policy"], items["policy_optimiser"], frozen["policy"]),
        reward=reward,
        reference=reference,
        step=step,
        position=loop["position"],
        replay=Replay.from_json(loop["replay"]) if "replay" in loop else Replay(),
        recent_rewrites=RecentRewrites.from_json(loop.get("recent_rewrites", [])),
        rollout_params=rollout_params,
    )


def _start(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> State:
    """Make the state at step 0, evaluate it and save it."""
    settings = components.settings

    # An earlier start may have been stopped before step 0 was saved: its metrics are removed.
    with setup_errors("run_dir"):
        run.truncate(None)

    # The supervised phases use optimisers of their own, so training starts with fresh optimiser states.
    policy, reward = state.policy, state.reward
    if settings.supervised.start_from:
        policy, reward = _load_models_of_run(components, policy, reward, run)
    else:
        if settings.supervised.policy_steps:
            policy = optim.init_state(
                imitate_solutions(components, policy.params), components.policy.optimiser
            )
        if settings.supervised.reward_steps and reward is not None:
            reward = optim.init_state(
                train_on_labels(components, reward.params), components.reward_bundle.optimiser
            )

    reference = _start_reference(components, policy, checkpoints) if settings.holds_reference else None

    # Warm-up, evaluation, checkpoint.  In this order step 0 shows the reward model that step 1 uses.
    state = State(policy=policy, reward=reward, reference=reference, step=0, position=0)
    if reward is not None and settings.reward_update.warmup_updates:
        state = warm_up_reward_model(components, state)
    if settings.rollout.ahead:
        state = dataclasses.replace(state, rollout_params=copy_to_rollout(components, policy.params))
    if settings.eval.every and (metrics := evaluate_held_out(components, state)):
        with setup_errors("run_dir"):
            run.log(0, metrics)
    save_checkpoint(components, state, run, checkpoints)
    return state


def _start_reference(components: Components, policy: TrainState, checkpoints: Checkpoints) -> Params:
    """Save the policy at step 0 as the reference, once: checkpoints do not include it, since it never changes."""
    with setup_errors("checkpoint"):
        checkpoints.save_reference(policy.params)
    if components.policy.reference_layout == components.layout:
        # A copy, since the policy's own arrays are donated to the first update.
        return jax.tree.map(lambda x: x.copy(), policy.params)
    # The reference has its own devices, and reads its parameters from the file just saved.
    return _restore_reference(components, checkpoints)


def _load_models_of_run(
    components: Components, policy: TrainState, reward: TrainState | None, run: RunDirectory
) -> tuple[TrainState, TrainState | None]:
    """Load both models from step 0 of the run directory `supervised.start_from`, with fresh optimisers.

    policy, reward: the initial states, for the shapes and shardings of the parameters.

    Raises SetupError for models that do not fit the config, and for a tokenizer other than this run's.
    """
    start_from = components.settings.supervised.start_from

    def restore(
        source: Checkpoints, name: str, bundle: PolicyBundle | RewardBundle, like: TrainState
    ) -> TrainState:
        abstract = checkpoint.abstract_like(like.params)
        params = source.restore(0, name, abstract, bundle.model.config.vocab_size)
        return optim.init_state(params, bundle.optimiser)

    # Read-only, since the other run may still be training.
    with (
        setup_errors(f"supervised.start_from={start_from}"),
        Checkpoints(start_from, keep=0, read_only=True) as source,
    ):
        _check_tokenizers(run.path, remote_files.to_path(start_from))
        policy = restore(source, "policy", components.policy, policy)
        if reward is not None:
            reward = restore(source, "reward", components.reward_bundle, reward)
    return policy, reward


def _check_tokenizers(own: Directory, other: Directory) -> None:
    """Raise ValueError if two run directories have different tokenizers, which models from scratch have in them.

    The pieces have other ids then, so a model of one run would read and write nonsense in the other.
    """
    for path in sorted(own.glob("tokenizer_*.model")):
        if path.read_bytes() != (other / path.name).read_bytes():
            raise ValueError(
                f"its {path.name} is not the one of this run, which was trained on another text: start from a run "
                "with the same data.train"
            )


def _restore_reference(components: Components, checkpoints: Checkpoints) -> Params:
    """Read the reference's parameters onto its devices."""
    config = components.policy.model.config
    abstract = mesh.abstract_params(components.policy.reference_layout, transformer.param_specs(config))
    return checkpoints.restore_reference(abstract, config.vocab_size)
