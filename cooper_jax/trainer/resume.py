"""The start of a run and its checkpoints.

1. `start_or_resume` restores the newest checkpoint, if the run has one, and is done.
2. Otherwise it runs the supervised phases (supervised.py), or loads the models of another run's step 0
   (`supervised.start_from`, `supervised.reward_from`).  A copy of the resulting policy is the frozen reference.
3. It warms the reward model up on the policy's rollouts, if the config says so (reward_warmup.py).
4. It evaluates the policy and saves everything as step 0, so that a restart does not repeat these phases.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from cooper_jax.model import transformer
from cooper_jax.model.loading import Directory
from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.reward.pairs.giveaway_probe import RecentRewrites
from cooper_jax.runtime import checkpoint, hosts, mesh, optim, remote_files
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.checkpoint_checks import Unreadable
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.runtime.hosts import RunFault
from cooper_jax.runtime.run_directory import RunDirectory
from cooper_jax.runtime.stored_config import config_hash
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.fault_watch import check_weights
from cooper_jax.trainer.hacking_guard import GuardState, mark_rolled_back
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

    With `resume_step` the run goes back to an earlier checkpoint first.

    state: as `build_components` yields it.  Its arrays are deleted or donated, so the caller must not use it
      afterwards.

    Raises SetupError for a checkpoint that does not fit the config.  Raises hosts.Stopped after a SIGTERM
    before step 0 is saved.
    """
    wanted = components.settings.resume_step
    if steps := checkpoints.steps():
        if wanted > max(steps):
            raise SetupError(
                f"resume_step={wanted}: {checkpoints.folder} has the checkpoints {steps}; leave it out to resume "
                "from the newest"
            )
        # The same command may be started again after it has gone back: its checkpoints say so.
        if 0 <= wanted < max(steps) and _read_went_back(checkpoints, max(steps)) != wanted:
            _go_back(wanted, run, checkpoints)
        return _resume(components, state, run, checkpoints)
    if wanted >= 0:
        raise SetupError(f"resume_step={wanted}: {checkpoints.folder} has no checkpoint; leave it out")
    return _start(components, state, run, checkpoints)


def save_checkpoint(
    components: Components,
    state: State,
    run: RunDirectory,
    checkpoints: Checkpoints,
    faults: Mapping[str, Any] | None = None,
) -> None:
    """Save a complete state in the background; return once its arrays are copied and may be donated.

    faults: the counts of the run's faults (fault_watch.py); None if nothing has counted them yet.

    Raises RunFault for weights that are not finite, which are not saved.
    """
    assert state.finish is None, f"step {state.step} is not complete: its reward model is not updated"
    newest = max(checkpoints.steps(), default=None)
    check_weights(
        state, "there is no checkpoint" if newest is None else f"step {newest} is the newest checkpoint"
    )

    # Flushed first: a resumed run would never write metrics that are missing before its checkpoint.
    run.flush()

    # The state's Python values, and a hash that ties the checkpoint to the run's config.
    loop = {"position": state.position, "config_hash": config_hash(run.config)}
    if components.settings.reward_update.replay:
        loop["replay"] = state.replay.to_json()
    if components.settings.resume_step >= 0:
        loop["went_back_to"] = components.settings.resume_step
    if components.settings.guard.hacking_guard != "off":
        loop["guard"] = state.guard.to_json()
    if faults:
        loop["faults"] = dict(faults)
    if components.settings.holds_reference:
        loop["reference_has_checksums"] = True
    if components.settings.log.rewrites_kept:
        loop["recent_rewrites"] = state.recent_rewrites.to_json()
    checkpoints.save(state.step, checkpoint_items(state), loop, checkpoint_vocab_sizes(components))


def _read_went_back(checkpoints: Checkpoints, step: int) -> int | None:
    """The step that a checkpoint's run had gone back to; None if to none, or if the checkpoint is damaged."""
    with setup_errors(f"{checkpoints.folder / str(step)}"):
        try:
            return checkpoints.loop(step).get("went_back_to")
        except Unreadable:
            return None  # `_resume` sets it aside


def _go_back(step: int, run: RunDirectory, checkpoints: Checkpoints) -> None:
    """Make an earlier checkpoint the newest.  Later ones, and their metrics and samples, get other names."""
    # The copies first: a start after a kill in between makes both again.
    with setup_errors("run_dir"):
        run.keep_copies(f"before_going_back_to_{step}")
    with setup_errors("resume_step"):
        names = checkpoints.go_back(step)
    moved = f": later checkpoints are now {', '.join(names)}" if names else ""
    hosts.print_once(f"going back to step {step}{moved}", always=True)


def roll_back(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> State:
    """Take a run back to the newest checkpoint before the first alarm of its guard; return the state there.

    The state's guard knows that it was rolled back, which the next checkpoint stores.  A run that is killed before
    that repeats the steps up to the alarm, the same ones, and goes back again.

    state: after the alarm, complete.  Its arrays are deleted.

    Raises RunFault if there is no such checkpoint.
    """
    with setup_errors("checkpoint"):
        checkpoints.wait()
    steps = checkpoints.steps()
    earlier = [step for step in steps if step < state.guard.first_alarm]
    if not earlier:
        raise RunFault(
            f"step {state.step}: no checkpoint before the alarm of step {state.guard.first_alarm} is left, only "
            f"{steps}: start the same command with --config.hacking_guard=fallback, or a new --config.run_dir "
            "with a larger --config.checkpoint.keep"
        )
    if components.rollout_thread is not None:
        components.rollout_thread.cancel()
    if state.reference is not None:
        jax.tree.map(lambda x: x.delete(), state.reference)
    _go_back(max(earlier), run, checkpoints)
    restored = _resume(components, state, run, checkpoints)
    return dataclasses.replace(restored, guard=mark_rolled_back(restored.guard, state.guard))


def _resume(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> State:
    """Restore the newest checkpoint's state, and remove metrics and samples of later steps."""
    abstract_items = {name: checkpoint.abstract_like(tree) for name, tree in checkpoint_items(state).items()}
    if components.settings.rollout.ahead:
        specs = optim.select_trained(transformer.param_specs(components.policy.model.config))
        abstract_items["rollout_policy"] = mesh.abstract_params(components.policy.rollout_layout, specs)

    CONSOLE.begin_stage("reading the newest checkpoint")
    # The initial arrays are deleted before the checkpoint is read: both together would need twice the memory.
    # The frozen base of adapters stays, since no checkpoint has it.
    frozen = {name: checkpoint.delete_stored(model) for name, model in list_models(state).items()}
    with setup_errors(f"{checkpoints.folder}"):
        restored = checkpoints.restore_newest(abstract_items, checkpoint_vocab_sizes(components))
        assert restored is not None  # the caller has found a checkpoint
        step, items, loop = restored

    _check_same_run(loop, run, f"{checkpoints.folder / str(step)}")
    reward = None
    if "reward" in items:
        reward = checkpoint.join_state(items["reward"], items["reward_optimiser"], frozen["reward"])
    reference = None
    if components.settings.holds_reference:
        with setup_errors(f"{checkpoints.reference}"):
            has_checksums = loop.get("reference_has_checksums", False)
            reference = _restore_reference(components, checkpoints, has_checksums)
    rollout_params = None
    if components.settings.rollout.ahead:
        base = copy_to_rollout(components, frozen["policy"])
        rollout_params = base | items["rollout_policy"]
    with setup_errors("run_dir"):
        run.truncate(step)
    hosts.print_once(f"resumed from step {step}")
    state = State(
        policy=checkpoint.join_state(items["policy"], items["policy_optimiser"], frozen["policy"]),
        reward=reward,
        reference=reference,
        step=step,
        position=loop["position"],
        replay=Replay.from_json(loop["replay"]) if "replay" in loop else Replay(),
        recent_rewrites=RecentRewrites.from_json(loop.get("recent_rewrites", [])),
        guard=GuardState.from_json(loop["guard"]) if "guard" in loop else GuardState(),
        rollout_params=rollout_params,
    )
    check_weights(state, f"the checkpoint of step {step} holds it")
    return state


def _check_same_run(loop: Mapping[str, Any], run: RunDirectory, checkpoint_path: str) -> None:
    """Raise SetupError for a checkpoint that another run has saved.

    The run directory has checked its own config.json already; this finds a mixture of two runs.
    """
    # Checkpoints without checksums are of earlier versions, which computed another hash of the same settings.
    if "checksums" in loop and loop["config_hash"] != config_hash(run.config):
        raise SetupError(
            f"{checkpoint_path} was saved with another config than the run directory's config.json: give another "
            "--config.run_dir"
        )


def _start(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> State:
    """Make the state at step 0, evaluate it and save it."""
    settings = components.settings
    check_weights(state, "nothing is saved yet")

    # An earlier start may have been stopped before step 0 was saved: its metrics are removed.  Those of later steps
    # are only written once step 0 is saved.
    CONSOLE.begin_stage("opening the run directory")
    with setup_errors("run_dir"):
        run.truncate(None, uncovered=0)

    # The supervised phases use optimisers of their own, so training starts with fresh optimiser states.
    policy, reward, section = state.policy, state.reward, settings.supervised
    if section.start_from:
        CONSOLE.begin_stage(f"reading the policy of {section.start_from}")
        policy = _load_model_of_run(
            "start_from", section.start_from, "policy", components.policy, policy, run
        )
    elif section.policy_steps:
        CONSOLE.begin_stage("supervised training of the policy")
        params = imitate_solutions(components, policy.params, run.log_phase)
        policy = optim.init_state(params, components.policy.optimiser)
    if reward is not None:
        field = "reward_from" if section.reward_from else "start_from"
        bundle = components.reward_bundle
        if source := section.reward_source:
            CONSOLE.begin_stage(f"reading the reward model of {source}")
            reward = _load_model_of_run(field, source, "reward", bundle, reward, run)
        elif section.reward_steps:
            CONSOLE.begin_stage("supervised training of the reward model")
            params = train_on_labels(components, reward.params, run.log_phase)
            reward = optim.init_state(params, bundle.optimiser)

    reference = None
    if settings.holds_reference:
        CONSOLE.begin_stage("saving the policy as the reference")
        reference = _start_reference(components, policy, checkpoints)

    # Warm-up, evaluation, checkpoint.  In this order step 0 shows the reward model that step 1 uses.
    state = State(policy=policy, reward=reward, reference=reference, step=0, position=0)
    if reward is not None and settings.reward_update.warmup_updates:
        CONSOLE.begin_stage("warm-up of the reward model on rollouts")
        state = warm_up_reward_model(components, state, run.log_phase)
    if settings.rollout.ahead:
        state = dataclasses.replace(state, rollout_params=copy_to_rollout(components, policy.params))
    if settings.eval.every and components.held_out:
        CONSOLE.begin_stage(f"evaluation on {len(components.held_out)} held-out problems")
        begun, compiled = time.perf_counter(), CONSOLE.compile_seconds
        metrics = evaluate_held_out(components, state)
        times = {
            "time/eval": time.perf_counter() - begun,
            "time/compile": CONSOLE.compile_seconds - compiled,
        }
        with setup_errors("run_dir"):
            run.log(0, times | metrics)
    CONSOLE.begin_stage("saving step 0")
    save_checkpoint(components, state, run, checkpoints)
    return state


def _start_reference(components: Components, policy: TrainState, checkpoints: Checkpoints) -> Params:
    """Save the policy at step 0 as the reference, once: checkpoints do not include it, since it never changes."""
    with setup_errors("checkpoint"):
        checkpoints.save_reference(policy.params, components.policy.model.config.vocab_size)
    if components.policy.reference_layout == components.layout:
        # A copy, since the policy's own arrays are donated to the first update.
        return jax.tree.map(lambda x: x.copy(), policy.params)
    # The reference has its own devices, and reads its parameters from the file just saved.
    return _restore_reference(components, checkpoints, has_checksums=True)


def _load_model_of_run(
    field: str, path: str, name: str, bundle: PolicyBundle | RewardBundle, like: TrainState, run: RunDirectory
) -> TrainState:
    """Load a model from step 0 of another run, with a fresh optimiser.

    Args:
      field: of the section `supervised`, which names the run's directory, `path`.
      name: policy or reward.
      like: the initial state, for the shapes and shardings of the parameters.

    Raises SetupError for a model that does not fit the config, and for a tokenizer other than this run's.
    """
    # Read-only, since the other run may still be training.
    with (
        setup_errors(f"supervised.{field}={path}"),
        Checkpoints(path, keep=0, read_only=True) as source,
    ):
        _check_tokenizers(run.path, remote_files.to_path(path))
        abstract = checkpoint.abstract_like(like.params)
        params = source.restore(0, name, abstract, bundle.model.config.vocab_size)
        return optim.init_state(params, bundle.optimiser)


def _check_tokenizers(own: Directory, other: Directory) -> None:
    """Raise ValueError if two run directories have different tokenizers, which models from scratch have in them.

    The pieces have other ids then, so a model of one run would read and write nonsense in the other.
    """
    for path in sorted(own.glob("tokenizer_*.model")):
        # A run of the rule arm has no tokenizer of a reward model.
        if (other / path.name).exists() and path.read_bytes() != (other / path.name).read_bytes():
            raise ValueError(
                f"its {path.name} is not the one of this run, which was trained on another text: start from a run "
                "with the same data.train"
            )


def _restore_reference(components: Components, checkpoints: Checkpoints, has_checksums: bool) -> Params:
    """Read the reference's parameters onto its devices.  has_checksums: they must be stored beside it."""
    config = components.policy.model.config
    abstract = mesh.abstract_params(components.policy.reference_layout, transformer.param_specs(config))
    return checkpoints.restore_reference(abstract, config.vocab_size, has_checksums)
