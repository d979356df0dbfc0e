"""The training loop: Cooper steps (step.py), evaluation, logs and checkpoints.

1. The run directory is opened, the components are built, and the run starts at step 0 or resumes (resume.py).
2. A step is completed behind the next rollout (step.py), or at once if what follows needs its whole state: the
   loop measures giveaways in the last rewrites (every `log.giveaway_every` steps), evaluates (every `eval.every`
   steps, and at the end) and saves a checkpoint (every `checkpoint.every` steps).  Each complete step is a row of
   metrics.jsonl.
3. A preempted machine gets a SIGTERM.  `hosts.raise_if_stopping` then raises hosts.Stopped within a step or
   an evaluation, on all hosts at the same call.  `train` saves the last complete step and raises it again;
   launch/common.py turns it into exit code 75.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.rollout import engine
from cooper_jax.rule.worker_process import WorkerError
from cooper_jax.runtime import hosts
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.runtime.mesh import Layout
from cooper_jax.runtime.metrics import HOST_PHASES, PhaseTimer
from cooper_jax.runtime.profiler import StepProfiler
from cooper_jax.runtime.run_directory import RunDirectory, check_shared, run_path
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.trainer.closing_summary import describe_end, describe_resumption
from cooper_jax.trainer.fault_watch import FaultWatch
from cooper_jax.trainer.giveaway_watch import GiveawayWatch
from cooper_jax.trainer.hacking_response import HackingResponse, RollBack
from cooper_jax.trainer.held_out import evaluate_held_out
from cooper_jax.trainer.resume import roll_back, save_checkpoint, start_or_resume
from cooper_jax.trainer.run_display import RunDisplay
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.samples import StepRecord, select_samples
from cooper_jax.trainer.setup import build_components, read_settings
from cooper_jax.trainer.state import Components, State
from cooper_jax.trainer.step import cooper_step, finish_step, finishes_behind_rollout
from cooper_jax.types import Metrics


def train(cfg: ConfigDict) -> None:
    """Run `cfg.steps` Cooper steps; resume after the newest checkpoint in the run directory if there is one.

    Raises SetupError for settings and files that cannot be used, hosts.RunFault for a fault that no restart mends
    (fault_watch.py).  Raises hosts.Stopped after a SIGTERM, once the checkpoint of the last complete step is
    written.  Before step 0 is saved there is none, and the next start begins again.
    """
    begun = time.monotonic()
    # Settings are checked first: a faulty config must leave no run directory behind.
    settings = read_settings(cfg)
    with setup_errors("run_dir"):
        path = run_path(cfg)

    # The stack exits its contexts in reverse order, so the run directory's lock is released last.
    with contextlib.ExitStack() as stack:
        stack.callback(CONSOLE.close)
        with setup_errors("run_dir"):
            check_shared(path)
            run = stack.enter_context(RunDirectory(path, cfg, resume=settings.resume, uncovered=0))
        components, state = stack.enter_context(build_components(cfg, path))
        with setup_errors("run_dir"):
            checkpoints = stack.enter_context(Checkpoints(path, keep=settings.checkpoint.keep))
        hosts.print_once(describe_run(components))

        loop = TrainingLoop(components, run, checkpoints)
        try:
            state = start_or_resume(components, state, run, checkpoints)
            CONSOLE.end_stage()
            if state.step >= settings.steps:
                hosts.print_once(
                    f"{path} has {state.step} complete steps already; raise --config.steps to continue",
                    always=True,
                )
                return
            loop.run(state)
        except hosts.Stopped:
            loop.save_last_step()
            raise

        # The last checkpoint may not be written yet.  If its write fails, the run must end with an error.
        with setup_errors("checkpoint"), CONSOLE.open_activity("writing the last checkpoint"):
            checkpoints.wait()
        rows = run.read_metrics()
    hosts.print_once(describe_end(settings, str(path), rows, time.monotonic() - begun), always=True)


class TrainingLoop:
    """Runs steps, and keeps the last state that can be saved."""

    def __init__(self, components: Components, run: RunDirectory, checkpoints: Checkpoints):
        self._components, self._run, self._checkpoints = components, run, checkpoints
        self._state: State | None = None  # None until step 0 is saved
        self._phases = PhaseTimer()
        self._watch = GiveawayWatch(components.settings)
        settings = components.settings
        self._faults = FaultWatch(settings.faults, updates_reward=settings.reward.updates_at_steps)

    def run(self, state: State) -> None:
        """Run the steps that are left.  Raises hosts.Stopped after a SIGTERM, hosts.RunFault for a fault.

        state: of the newest checkpoint.  Its arrays are donated.
        """
        self._take_up(state)
        while not self._run_from_state():
            assert self._state is not None
            self._take_up(roll_back(self._components, self._state, self._run, self._checkpoints))

    def _take_up(self, state: State) -> None:
        """Go on from a state, with the counts of faults that its checkpoint has."""
        self._state = state
        # Step 0, which may not be written yet, has none.
        with setup_errors("checkpoint"):
            self._faults.restore(self._checkpoints.loop(state.step).get("faults", {}) if state.step else {})

    def _run_from_state(self) -> bool:
        """Run the steps that are left; False for an alarm after which the run is to go back."""
        # Outside of the handler nothing refers to the arrays of the step that the exception has ended.
        try:
            self._run_steps()
        except RollBack:
            return False
        return True

    def _run_steps(self) -> None:
        """Run the steps that are left.  Raises RollBack for an alarm after which the run is to go back."""
        assert self._state is not None
        components, settings = self._components, self._components.settings
        self._response = HackingResponse(settings.guard.hacking_guard, self._state.guard)
        decode = components.policy.model.tokenizer.decode
        display = RunDisplay(settings, self._run.read_metrics(), self._state.step, decode)
        phases = self._phases
        phases.observer = display
        with StepProfiler(settings.profile, str(self._run.path / "profile")) as profiler:
            self._log = StepLog(components, self._run, display, phases, self._checkpoints)
            self._respond(self._state)
            while (step := self._state.step + 1) <= settings.steps:
                hosts.raise_if_stopping()
                profiler.begin_step(step)
                try:
                    with phases.in_step(step):
                        self._run_step()
                except (FloatingPointError, WorkerError) as error:
                    # Logits from which no token can be sampled are so on all hosts; workers may fail on one.
                    of_this_host = isinstance(error, WorkerError)
                    raise hosts.RunFault(f"step {step}: {error}", of_this_host) from error
                profiler.end_step(step)

    def _run_step(self) -> None:
        """Run a step; complete, evaluate and save it, unless the next one is to complete it."""
        assert self._state is not None
        components, settings, phases = self._components, self._components.settings, self._phases
        start_time, compiled = time.perf_counter(), CONSOLE.compile_seconds
        self._state = state = cooper_step(components, self._state, phases, self._take_finished)

        is_complete = needs_complete_state(settings, state.step) or not finishes_behind_rollout(components)
        if is_complete:
            state, metrics, record = finish_step(state, phases)
            self._state = state
        self._log.take_times(state.step, time.perf_counter() - start_time, CONSOLE.compile_seconds - compiled)
        if not is_complete:
            return

        # The step is complete and will be saved.  It is logged even if a SIGTERM ends the evaluation.
        try:
            metrics |= self._watch.measure(state, phases)
            if is_evaluated_after(settings, state.step):
                with phases.phase("eval"):
                    metrics |= evaluate_held_out(components, state)
        finally:
            # An evaluation may compile, too.
            compile_seconds = {"time/compile": CONSOLE.compile_seconds - compiled}
            self._log.write(state.step, metrics | phases.collect() | compile_seconds, record)
            self._faults.check(state.step, metrics, self._save_good_state)
        self._respond(state)

        # The loop waits only for a copy of the arrays; they are written in the background.  This phase's time is
        # logged in the next step's row.
        if state.step % settings.checkpoint.every == 0 or state.step == settings.steps:
            with setup_errors("checkpoint"), phases.phase("checkpoint"), pause_rollout(components):
                self._save(state)

    def _take_finished(self, state: State, metrics: Metrics, record: StepRecord) -> None:
        """Take the state of a step that the next step has completed: the one before can no longer be saved."""
        self._state = state
        self._log.write(state.step, metrics, record)
        self._faults.check(state.step, metrics, self._save_good_state)
        self._respond(state)

    def _respond(self, state: State) -> None:
        """Do what an alarm of the guard against reward hacking requires.  Raises RollBack and RunFault."""
        self._response.act(state.step, state.guard, self._save_good_state)

    def _save_good_state(self) -> None:
        """Save the last complete state before a fault ends the run, unless it is saved already."""
        assert self._state is not None
        with pause_rollout(self._components):
            self._save_and_wait(self._state)

    def _save_and_wait(self, state: State) -> None:
        """Save a complete state unless it is saved already, and wait until it is written."""
        with setup_errors("checkpoint"):
            self._checkpoints.wait()  # an earlier save may be running in the background
            if state.step not in self._checkpoints.steps():
                self._save(state)
                self._checkpoints.wait()

    def _save(self, state: State) -> None:
        """Save a complete state, with the counts of faults."""
        save_checkpoint(self._components, state, self._run, self._checkpoints, self._faults.to_json())

    def save_last_step(self) -> None:
        """Complete and save the last step of a run that a SIGTERM ends, and wait until it is written.

        Raises RunFault for a fault of this step.
        """
        if self._components.rollout_thread is not None:
            self._components.rollout_thread.cancel()
        # Without a state, the phases before step 1 were interrupted (resume.py), and theirs cannot be saved.
        if self._state is None:
            with setup_errors("checkpoint"):
                self._checkpoints.wait()
            hosts.print_once(
                "stopped by a signal before step 0 was saved; the same command starts from the beginning",
                always=True,
            )
            return
        state = self._state
        if state.finish is not None:
            state, metrics, record = finish_step(state, self._phases)
            self._log.write(state.step, metrics, record)
            self._faults.check(state.step, metrics, lambda: self._save_and_wait(state))
        self._save_and_wait(state)
        hosts.print_once(
            f"stopped by a signal; step {state.step} is saved; {describe_resumption()}", always=True
        )


def needs_complete_state(settings: RunSettings, step: int) -> bool:
    """True if something after this step reads or saves the whole state."""
    intervals = (settings.eval.every, settings.checkpoint.every, settings.log.giveaway_every)
    return step == settings.steps or any(every and step % every == 0 for every in intervals)


def is_evaluated_after(settings: RunSettings, step: int) -> bool:
    """True if the held-out problems are evaluated after this step: every `eval.every` steps, and after the last."""
    every = settings.eval.every
    return bool(every) and (step % every == 0 or step == settings.steps)


def pause_rollout(components: Components) -> contextlib.AbstractContextManager[None]:
    """The context in which a checkpoint is saved: no rollout runs in it.

    The checksums of the rollout's weights are programs of its devices, and Orbax synchronises several hosts by a
    program on all devices.  Devices that got such a program before a segment of a rollout, and others that got it
    behind, would wait for each other for ever.
    """
    if components.rollout_thread is None:
        return contextlib.nullcontext()
    return components.rollout_thread.pause()


class StepLog:
    """Writes the rows of complete steps, with their times and samples, and shows them."""

    def __init__(
        self,
        components: Components,
        run: RunDirectory,
        display: RunDisplay,
        phases: PhaseTimer,
        checkpoints: Checkpoints,
    ):
        self._components, self._settings = components, components.settings.log
        self._run, self._display, self._phases = run, display, phases
        self._checkpoints: Checkpoints | None = checkpoints  # until the first row is written
        self._times: dict[int, Metrics] = {}  # of steps that are not written yet

    def take_times(self, step: int, seconds: float, compile_seconds: float) -> None:
        """Take the times of a step's phases from the timer.

        If a step is completed behind the next rollout, its row has the times of its own phases up to the policy's
        update, and of those that completed the step before.

        seconds: wall-clock time of the step, with all its phases.
        compile_seconds: what of it something was traced or compiled.
        """
        times = self._phases.collect()
        waiting = sum(times.get(f"time/{name}", 0.0) for name in HOST_PHASES)
        self._times[step] = {
            **times,
            "time/step": seconds,
            "time/waiting": waiting,
            "time/compile": compile_seconds,
        }

    def write(self, step: int, metrics: Metrics, record: StepRecord) -> None:
        """Append a step's metrics to metrics.jsonl and, every `samples_every` steps, samples to samples.jsonl."""
        # Tokens per second of the whole step, not only of the sampling.  A step that a SIGTERM ended has no times.
        times = self._times.pop(step, {})
        if times:
            times["time/tokens_per_second"] = record.sampled_tokens / times["time/step"]
        metrics = {**times, **metrics}

        # A row of a step shows that there was a checkpoint (resume.py), so step 0 must be complete by now.
        if self._checkpoints is not None:
            with setup_errors("checkpoint"):
                self._checkpoints.wait()
            self._checkpoints = None
        with setup_errors("run_dir"):
            self._run.log(step, metrics)

            # Step 1 is always dumped: a wrong template or prompt shows in it at once.
            every = self._settings.samples_every
            if every and (step % every == 0 or step == 1):
                self._run.dump_samples(step, self._select_samples(record))
        self._display.show_step(step, metrics, record)

    def _select_samples(self, record: StepRecord) -> list[dict[str, Any]]:
        components = self._components
        decode = components.policy.model.tokenizer.decode
        return select_samples(record, self._settings.samples, components.oracle, decode)


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
