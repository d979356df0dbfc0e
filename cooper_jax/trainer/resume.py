"""The start of a run and its checkpoints.

1. `start_or_resume` restores the newest checkpoint where there is one.
2. Otherwise it runs the supervised phases (supervised.py), or takes the models of another run's step 0
   (`supervised.start_from`).  The policy as it then stands is the frozen reference.
3. The reward model is warmed up on the policy's rollouts where the config asks for it (reward_warmup.py).
4. The policy is evaluated and everything is saved as step 0, so that a run killed later need not repeat it.
"""

from __future__ import annotations

import jax

from cooper_jax.model import transformer
from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.runtime import checkpoint, hosts, mesh, optim
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.run_directory import RunDirectory
from cooper_jax.runtime.stored_config import config_hash
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.held_out import evaluate_held_out
from cooper_jax.trainer.reward_warmup import warm_up_reward_model
from cooper_jax.trainer.state import (
    Components,
    PolicyBundle,
    RewardBundle,
    State,
    checkpoint_items,
    checkpoint_vocab_sizes,
)
from cooper_jax.trainer.supervised import imitate_solutions, train_on_labels
from cooper_jax.types import Params, TrainState


def start_or_resume(
    components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints
) -> State:
    """The state to train from: the newest checkpoint's, or that of step 0 after the supervised phases.

    state: as `build_components` returns it; the caller must not use it afterwards, since its arrays are deleted.

    Raises SetupError for a checkpoint that does not fit the config, hosts.Stopped after a SIGTERM before step 0 is
    saved.
    """
    if checkpoints.steps():
        return _resume(components, state, run, checkpoints)
    return _start(components, state, run, checkpoints)


def save_checkpoint(
    components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints
) -> None:
    """Save a state in the background.

    Returns once the arrays are copied: they may be donated then.  What was logged about the step is flushed first,
    so that metrics.jsonl is never behind the newest checkpoint.
    """
    run.flush()
    loop = {"position": state.position, "config_hash": config_hash(run.config)}
    if components.settings.reward_update.replay:
        loop["replay"] = state.replay.to_json()
    checkpoints.save(state.step, checkpoint_items(state), loop)


def _resume(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> State:
    """The newest checkpoint's state; what was logged after it is removed."""
    abstract_items = {name: checkpoint.abstract_like(tree) for name, tree in checkpoint_items(state).items()}
    # The initial arrays are deleted before others are read: together they would take twice a run's memory.
    jax.tree.map(lambda x: x.delete(), (state.policy, state.reward))
    with setup_errors(f"{checkpoints.folder}"):
        restored = checkpoints.restore_newest(abstract_items, checkpoint_vocab_sizes(components))
        assert restored is not None  # the caller has found a checkpoint
        step, items, loop = restored
    if loop["config_hash"] != config_hash(run.config):
        raise SetupError(
            f"{checkpoints.folder / str(step)} was saved under another config than the run directory's "
            "config.json says: give another --config.run_dir"
        )

    reward = None
    if "reward" in items:
        reward = checkpoint.join_state(items["reward"], items["reward_optimiser"])
    with setup_errors(f"{checkpoints.reference}"):
        reference = _restore_reference(components, checkpoints)
    with setup_errors("run_dir"):
        run.truncate(step)
    hosts.print_once(f"resumed from step {step}")
    return State(
        policy=checkpoint.join_state(items["policy"], items["policy_optimiser"]),
        reward=reward,
        reference=reference,
        step=step,
        position=loop["position"],
        replay=Replay.from_json(loop["replay"]) if "replay" in loop else Replay(),
    )


def _start(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> State:
    """The state at step 0, saved and evaluated."""
    settings = components.settings
    with setup_errors("run_dir"):
        run.truncate(None)  # what a run logged that was stopped before its step 0 was saved

    # The supervised phases have optimisers of their own: training starts with fresh ones.
    policy, reward = state.policy, state.reward
    if settings.supervised.start_from:
        policy, reward = _take_models_of_run(components, policy, reward)
    else:
        if settings.supervised.policy_steps:
            policy = optim.init_state(
                imitate_solutions(components, policy.params), components.policy.optimiser
            )
        if settings.supervised.reward_steps and reward is not None:
            reward = optim.init_state(
                train_on_labels(components, reward.params), components.reward_bundle.optimiser
            )

    with setup_errors("checkpoint"):
        checkpoints.save_reference(policy.params)
    if components.policy.reference_layout == components.layout:
        # A copy, since the policy's own arrays are donated to its updates.
        reference = jax.tree.map(lambda x: x.copy(), policy.params)
    else:
        # Devices that share none with the policy's read it from the disk.
        reference = _restore_reference(components, checkpoints)

    state = State(policy=policy, reward=reward, reference=reference, step=0, position=0)
    if reward is not None and settings.reward_update.warmup_updates:
        state = warm_up_reward_model(components, state)
    if settings.eval.every and (metrics := evaluate_held_out(components, state)):
        with setup_errors("run_dir"):
            run.log(0, metrics)
    save_checkpoint(components, state, run, checkpoints)
    return state


def _take_models_of_run(
    components: Components, policy: TrainState, reward: TrainState | None
) -> tuple[TrainState, TrainState | None]:
    """The models of the step 0 of the run directory `supervised.start_from`, with fresh optimisers."""
    source = components.settings.supervised.start_from

    def restore(
        kept: Checkpoints, name: str, bundle: PolicyBundle | RewardBundle, like: TrainState
    ) -> TrainState:
        abstract = checkpoint.abstract_like(like.params)
        params = kept.restore(0, name, abstract, bundle.model.config.vocab_size)
        return optim.init_state(params, bundle.optimiser)

    with setup_errors(f"supervised.start_from={source}"), Checkpoints(source, keep=0, read_only=True) as kept:
        policy = restore(kept, "policy", components.policy, policy)
        if reward is not None:
            reward = restore(kept, "reward", components.reward_bundle, reward)
    return policy, reward


def _restore_reference(components: Components, checkpoints: Checkpoints) -> Params:
    config = components.policy.model.config
    like = mesh.abstract_params(components.policy.reference_layout, transformer.param_specs(config))
    return checkpoints.restore_reference(like, config.vocab_size)
