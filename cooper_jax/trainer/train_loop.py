"""The training loop: Cooper steps (step.py), evaluation, logs and checkpoints.

1. The run directory is opened, the components are built, and the run starts at step 0 or resumes (resume.py).
2. After each step the loop measures giveaways in the last rewrites (every `log.giveaway_every` steps) and
   evaluates (every `eval.every` steps), appends a row to metrics.jsonl, and saves a
   checkpoint (every `checkpoint.every` steps).
3. A preempted machine gets a SIGTERM.  `hosts.raise_if_stopping` then raises hosts.Stopped within a step or
   an evaluation, on all hosts at the same call.  `train` saves the last complete step and raises it again;
   launch/common.py turns it into exit code 75.
"""

from __future__ import annotations

import contextlib
import time

import jax
from ml_collections import ConfigDict

from cooper_jax.rollout import engine
from cooper_jax.runtime import hosts
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.mesh import Layout
from cooper_jax.runtime.metrics import PhaseTimer, Progress
from cooper_jax.runtime.run_directory import RunDirectory, check_shared, run_path
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.trainer.giveaway_watch import GiveawayWatch
from cooper_jax.trainer.held_out import evaluate_held_out
from cooper_jax.trainer.loop_config import LogConfig
from cooper_jax.trainer.resume import save_checkpoint, start_or_resume
from cooper_jax.trainer.samples import StepRecord, select_samples
from cooper_jax.trainer.setup import build_components, read_settings
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step import cooper_step
from cooper_jax.types import Metrics


def train(cfg: ConfigDict) -> None:
    """Run `cfg.steps` Cooper steps; resume after the newest checkpoint in the run directory if there is one.

    Raises SetupError for settings and files that cannot be used.  Raises hosts.Stopped after a SIGTERM, once
    the checkpoint of the last complete step is written.  Before step 0 is saved there is none, and the next
    start begins again.
    """
    # Settings are checked first: a faulty config must leave no run directory behind.
    settings = read_settings(cfg)
    with setup_errors("run_dir"):
        path = run_path(cfg)

    # The stack exits its contexts in reverse order, so the run directory's lock is released last.
    with contextlib.ExitStack() as stack:
        with setup_errors("run_dir"):
            check_shared(path)
            run = stack.enter_context(RunDirectory(path, cfg, resume=settings.resume))
        components, state = stack.enter_context(build_components(cfg, path))
        with setup_errors("run_dir"):
            checkpoints = stack.enter_context(Checkpoints(path, keep=settings.checkpoint.keep))
        hosts.print_once(describe_run(components))

        phases = PhaseTimer()
        try:
            state = start_or_resume(components, state, run, checkpoints)
            if state.step >= settings.steps:
                hosts.print_once(
                    f"{path} has {state.step} complete steps already; raise --config.steps to continue"
                )
                return

            progress = stack.enter_context(
                contextlib.closing(Progress(settings.steps, state.step, quiet=not hosts.is_primary()))
            )
            watch = GiveawayWatch(settings)
            while state.step < settings.steps:
                hosts.raise_if_stopping()
                start_time = time.perf_counter()
                state, metrics, record = cooper_step(components, state, phases)
                metrics |= measure_speed(record, time.perf_counter() - start_time)

                metrics |= watch.measure(state, phases)

                # The step is complete and will be saved.  It is logged even if a SIGTERM ends the evaluation.
                try:
                    if settings.eval.every and state.step % settings.eval.every == 0:
                        with phases.phase("eval"):
                            metrics |= evaluate_held_out(components, state)
                finally:
                    log_step(settings.log, run, state.step, metrics | phases.collect(), record)
                    progress.update(state.step, metrics)

                # The loop waits only for a copy of the arrays; they are written in the background.  This phase's
                # time is logged in the next step's row.
                if state.step % settings.checkpoint.every == 0 or state.step == settings.steps:
                    with setup_errors("checkpoint"), phases.phase("checkpoint"), pause_rollout(components):
                        save_checkpoint(components, state, run, checkpoints)
        except hosts.Stopped:
            if components.rollout_thread is not None:
                components.rollout_thread.cancel()
            save_last_step(components, state, run, checkpoints)
            raise

        # The last checkpoint may not be written yet.  If its write fails, the run must end with an error.
        with setup_errors("checkpoint"):
            checkpoints.wait()
    hosts.print_once(
        f"{path}: {settings.steps} steps complete; see metrics.jsonl, samples.jsonl and checkpoints/ in it"
    )


def pause_rollout(components: Components) -> contextlib.AbstractContextManager[None]:
    """The context in which a checkpoint is saved: on several hosts no rollout runs in it.

    Orbax synchronises the hosts by a program on all devices.  Hosts that launched it before and others that
    launched it after the same segment of a rollout would wait for each other for ever.
    """
    if components.rollout_thread is None or jax.process_count() == 1:
        return contextlib.nullcontext()
    return components.rollout_thread.pause()


def measure_speed(record: StepRecord, seconds: float) -> Metrics:
    """The wall-clock seconds of a step, and its sampled tokens per second.

    The time includes all phases of the step, not only the sampling.
    """
    return {"time/step": seconds, "time/tokens_per_second": record.sampled_tokens / seconds}


def log_step(settings: LogConfig, run: RunDirectory, step: int, metrics: Metrics, record: StepRecord) -> None:
    """Append a step's metrics to metrics.jsonl and, every `samples_every` steps, samples to samples.jsonl."""
    with setup_errors("run_dir"):
        run.log(step, metrics)

        # Step 1 is always dumped: a wrong template or prompt shows in it at once.
        if settings.samples_every and (step % settings.samples_every == 0 or step == 1):
            run.dump_samples(step, select_samples(record, settings.samples))


def save_last_step(components: Components, state: State, run: RunDirectory, checkpoints: Checkpoints) -> None:
    """Save the last complete step of a run that a SIGTERM ends, and wait until it is written."""
    with setup_errors("checkpoint"):
        checkpoints.wait()  # an earlier save may be running in the background

        # Without any checkpoint, the phases before step 1 were interrupted (resume.py), and their state cannot be
        # saved.
        if not checkpoints.steps():
            hosts.print_once(
                "stopped by a signal before step 0 was saved; the same command starts from the beginning"
            )
            return
        if state.step not in checkpoints.steps():
            save_checkpoint(components, state, run, checkpoints)
            checkpoints.wait()
    hosts.print_once(f"stopped by a signal; step {state.step} is saved")


def describe_run(components: Components) -> str:
    """One line that describes a run: its arm, policy, data, mesh and kernels."""
    settings, layout = components.settings, components.layout
    config = components.policy.model.config

    # The policy's mesh, then the meshes of models with their own devices.
    mesh = _describe_mesh(layout)
    other_layouts = {}
    if components.reward is not None:
        other_layouts["reward"] = components.reward.layout
    other_layouts["reference"] = components.policy.reference_layout
    for name, other_layout in other_layouts.items():
        if other_layout != layout:
            mesh += f", {name} {_describe_mesh(other_layout)}"
    if jax.process_count() > 1:
        mesh += f" on {jax.process_count()} hosts"

    # Dropped prompts and a missing evaluation are easy to overlook in a config, so the line names them.
    dropped_train, dropped_held_out = components.dropped
    limit = settings.data.max_prompt_tokens
    problems = _describe_problems(len(components.train), "problems", dropped_train, limit)
    held_out = _describe_problems(len(components.held_out), "held out", dropped_held_out, limit)
    if not settings.eval.every:
        held_out = "no evaluation"
    elif not components.held_out:
        held_out = "no evaluation (give --config.data.eval=FILE or --config.data.eval_from_train=N)"

    # `auto` is resolved as the rollout engine resolves it.
    kernels = settings.rollout.kernels
    if kernels == "auto":
        kernels = engine.choose_kernels(config, layout)
    return (
        f"{settings.name}: arm {settings.reward.arm}, "
        f"{config.family} of {config.layers} layers x {config.width}, "
        f"{problems}, {held_out}, "
        f"{settings.data.prompts_per_step} x {settings.rollout.group_size} responses a step, "
        f"mesh {mesh}, kernels {kernels}"
    )


def _describe_mesh(layout: Layout) -> str:
    return " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())


def _describe_problems(count: int, kind: str, dropped: int, limit: int) -> str:
    text = f"{count} {kind}"
    if dropped:
        text += f" ({dropped} dropped: longer than {limit} tokens)"
    return text
