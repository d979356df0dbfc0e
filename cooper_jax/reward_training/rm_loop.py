"""Training of a reward model on labelled completions (arXiv 2508.05613, VerifyRM), with held-out evaluation.

1. `examples.load_examples` reads, splits, filters and tokenises the data; `batches` chooses an update's rows.
2. An update sums the gradients of its microbatches, which differ in width, and applies them once.
3. Every `train_rm.eval_every` updates the held-out rows are scored.  A model that is better than all before
   is written to <run_dir>/best/ at once, and its logits to predictions.jsonl.
4. At the end the best model's logits become report.json, reliability.png and a table.

    <run_dir>/best/              AutoModelForSequenceClassification with its tokenizer: a `reward.weights`
              predictions.jsonl  its logits on the held-out rows
              report.json  reliability.png
              seen_questions.json  the questions it was trained on; in best/ too
              config.json  metrics.jsonl  checkpoints/  as in every run (runtime/run_directory.py)

The same command resumes from the newest checkpoint, bit for bit: the rows of an update follow from the seed
and the update's number, and a checkpoint contains the rest of the state, including the best evaluation and
the number of evaluations since then.  Updates after the last checkpoint of a killed run are repeated with
the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.reward_training import batches, best_model, examples, rm_report, rm_setup
from cooper_jax.reward_training.best_model import BestEvaluation
from cooper_jax.reward_training.rm_config import SELECTION_METRICS
from cooper_jax.reward_training.rm_display import RmDisplay
from cooper_jax.runtime import checkpoint, hosts
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.runtime.extras import import_extra
from cooper_jax.runtime.finiteness import describe_non_finite
from cooper_jax.runtime.metrics import parse_numbers, to_host, to_jsonable
from cooper_jax.runtime.run_directory import RunDirectory, check_shared, run_path
from cooper_jax.runtime.stored_config import config_hash
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Metrics, Params, TrainState


@dataclasses.dataclass(frozen=True)
class RewardTrainState:
    """Everything that training changes: the model, and the state that chooses the best model."""

    # The model, with the optimiser's moments.
    reward: TrainState
    step: int  # updates done

    # The choice of the best model.
    best: BestEvaluation | None = None  # None before the first evaluation
    evaluations_since_best: int = 0

    # Metrics of the last update until they are logged; stored if its evaluation was interrupted.
    unlogged: Metrics | None = None


def train_reward_model(cfg: ConfigDict) -> None:
    """Train for all epochs, or for the rest of them after the newest checkpoint in the run directory.

    Raises SetupError for settings, data or weights that cannot be used, and hosts.Stopped after a SIGTERM,
    once a checkpoint of the last complete update is written.
    """
    # Everything that can be checked without data and devices is checked first.
    settings = rm_setup.RmSettings.from_config(cfg)
    # The figure is drawn after the training, which is too late to find that a package is missing.
    with setup_errors("reliability.png"):
        import_extra("matplotlib", "figures")
    with setup_errors("run_dir"):
        path = run_path(cfg)

    with contextlib.ExitStack() as stack:
        # The directory is locked before data and weights are read, so a second start fails at once.
        with setup_errors("run_dir"):
            check_shared(path)
            # While the first checkpoint is written, updates up to the second are made.
            uncovered = 2 * cfg.checkpoint.every
            run = stack.enter_context(RunDirectory(path, cfg, resume=cfg.resume, uncovered=uncovered))
        CONSOLE.begin_stage("reading the data and the reward model")
        job, reward = rm_setup.build_rm_job(cfg, settings, path)

        # The record of the training questions precedes the first checkpoint that a model can be loaded from.
        with setup_errors("run_dir"):
            best_model.write_seen_record(job)
            checkpoints = stack.enter_context(Checkpoints(path, keep=cfg.checkpoint.keep))

        hosts.print_once(rm_setup.describe_rm_job(job))
        stack.callback(CONSOLE.close)
        CONSOLE.begin_stage("reading the newest checkpoint, if there is one")
        state = _start_or_resume(job, reward, run, checkpoints)
        CONSOLE.end_stage()
        del reward  # otherwise the initial parameters and moments would stay in memory
        state = _run_updates(job, state, run, checkpoints)
    hosts.print_once(_finish(job, state), always=True)


def _run_updates(
    job: rm_setup.Job, state: RewardTrainState, run: RunDirectory, checkpoints: Checkpoints
) -> RewardTrainState:
    """Update, evaluate, log and save until the training has ended."""
    checkpoint_every, steps = job.cfg.checkpoint.every, job.steps
    rows = run.read_metrics()
    display = RmDisplay(steps, job.eval_every, rows, _find_best_update(state), state.step)
    with CONSOLE.open_activity("updates"):
        while state.unlogged is not None or not _has_ended(job, state):
            # 1. Update and evaluate.  The update is skipped if a checkpoint restored one whose evaluation was
            # interrupted.
            try:
                metrics = state.unlogged
                if metrics is None:
                    display.show_detail(f"update {state.step + 1}/{steps}")
                    state, metrics = _update(job, state)
                    state = dataclasses.replace(state, unlogged=metrics)
                if state.step % job.eval_every == 0 or state.step == steps:
                    display.show_detail(f"evaluation after update {state.step}")
                    state, evaluation = _evaluate(job, state)
                    metrics = metrics | evaluation
            except hosts.Stopped:
                _save_stopped(job, state, run, checkpoints)
                raise
            state = dataclasses.replace(state, unlogged=None)

            # 2. Log and save.
            with setup_errors("run_dir"):
                run.log(state.step, metrics)
            display.show_update(state.step, metrics, _find_best_update(state))
            is_due = state.step % checkpoint_every == 0 or _has_ended(job, state)
            # A run that was stopped in this update's evaluation has saved the update already.
            if is_due and state.step not in checkpoints.steps():
                with setup_errors("checkpoint"):
                    _save(job, state, run, checkpoints)
    return state


def _find_best_update(state: RewardTrainState) -> int | None:
    """The update of the best evaluation so far; None before the first evaluation."""
    return None if state.best is None else state.best.step


def _has_ended(job: rm_setup.Job, state: RewardTrainState) -> bool:
    """True after the last update, and after `patience` evaluations without improvement."""
    patience = job.settings.train_rm.patience
    return state.step >= job.steps or 0 < patience <= state.evaluations_since_best


def _update(job: rm_setup.Job, state: RewardTrainState) -> tuple[RewardTrainState, Metrics]:
    """Make one update.  Raises hosts.Stopped between microbatches, in which case `state` remains valid."""
    began = time.perf_counter()
    train = job.data.train
    # The rows follow from the seed and the update's number alone, so there is no data position to restore.
    epoch, index = divmod(state.step, job.updates_per_epoch)
    rows = batches.order_batches(len(train), job.settings.train_rm.batch, job.cfg.seed, epoch)[index]
    microbatches = batches.split_microbatches(rows, job.lengths, job.shapes)

    # Gradients are summed on the devices; the optimiser is applied once, in `finish`.
    sums = job.accumulator.start(state.reward.params)
    for microbatch in microbatches:
        hosts.raise_if_stopping()
        # Each row has the weight 1 / len(rows), so the sum over all microbatches is the mean over the batch.
        placed = rm_setup.place_microbatch(job, microbatch, 1.0 / len(rows))
        sums = job.accumulator.add(state.reward.params, sums, placed)
    reward, update_metrics = job.accumulator.finish(state.reward, sums)

    # Fetching the metrics waits for the devices, so the time below includes the whole update.
    metrics = to_host(update_metrics, "train_rm")
    tokens, seconds = int(job.lengths[rows].sum()), time.perf_counter() - began
    metrics |= {
        "train_rm/epoch": (state.step + 1) / job.updates_per_epoch,
        "train_rm/rows": len(rows),
        "train_rm/tokens": tokens,
        "train_rm/microbatches": len(microbatches),
        "train_rm/padding": batches.compute_padding_share(microbatches, job.lengths),
        "time/step": seconds,
        "time/tokens_per_second": tokens / seconds,
    }
    return dataclasses.replace(state, reward=reward, step=state.step + 1), metrics


# --- evaluation ----------------------------------------------------------------------------------------


def score_rows(job: rm_setup.Job, params: Params, rows: examples.Examples) -> np.ndarray:
    """Compute the logits f32[N] of rows in the microbatch shapes of training.

    Raises hosts.Stopped between microbatches.
    """
    logits = np.zeros(len(rows), np.float32)
    for microbatch in batches.split_microbatches(np.arange(len(rows)), rows.lengths, job.shapes):
        hosts.raise_if_stopping()
        batch = job.layout.put(batches.pack_microbatch(rows.tokens, microbatch), "batch")
        # Padding rows are at the end of each microbatch and are cut off.
        logits[microbatch.rows] = hosts.fetch_arrays(job.compute_logits(params, batch))[
            : len(microbatch.rows)
        ]
    return logits


def _evaluate(job: rm_setup.Job, state: RewardTrainState) -> tuple[RewardTrainState, Metrics]:
    """Measure the held-out rows, and store the model if it is the best so far."""
    began = time.perf_counter()
    logits = score_rows(job, state.reward.params, job.data.held_out)
    if not np.isfinite(logits).all():
        raise SetupError(
            f"update {state.step}: {(~np.isfinite(logits)).sum()} of {len(logits)} held-out logits are not "
            "finite: lower --config.train_rm.optimiser.lr, or set --config.reward.dtype=float32, in a new "
            "run_dir"
        )

    # Ties keep the earlier model.
    metrics = rm_report.compute_evaluation_metrics(job.data.held_out, logits)
    selection = job.settings.train_rm.keep_best
    value, sign = metrics[f"eval/{selection}"], SELECTION_METRICS[selection]
    is_best = state.best is None or sign * (value - state.best.value) > 0
    if is_best:
        # Written before the next checkpoint: after SIGKILL in between, the update is repeated and the model
        # written again.
        with setup_errors("run_dir"):
            best_model.keep_best_model(job, state.reward.params, state.step, value, logits)
        best = BestEvaluation(state.step, value)
        state = dataclasses.replace(state, best=best, evaluations_since_best=0)
    else:
        state = dataclasses.replace(state, evaluations_since_best=state.evaluations_since_best + 1)
    return state, metrics | {"eval/best": float(is_best), "time/eval": time.perf_counter() - began}


# --- checkpoints ---------------------------------------------------------------------------------------


def _start_or_resume(
    job: rm_setup.Job, reward: TrainState, run: RunDirectory, checkpoints: Checkpoints
) -> RewardTrainState:
    """Restore the newest checkpoint, or start from `reward` if there is none.

    If there is a checkpoint, the arrays of `reward` are deleted.  Raises SetupError for a checkpoint of
    another config or other data.
    """
    # A run that was killed before its first checkpoint may have logged updates; they are dropped.
    if not checkpoints.steps():
        with setup_errors("run_dir"):
            run.truncate(None)
        return RewardTrainState(reward=reward, step=0)

    abstract = {name: checkpoint.abstract_like(tree) for name, tree in _checkpoint_items(reward).items()}
    # The initial and the restored state together would take twice the memory of a run.
    frozen = checkpoint.delete_stored(reward)
    with setup_errors(f"{checkpoints.folder}"):
        restored = checkpoints.restore_newest(abstract, dict.fromkeys(abstract, job.model.config.vocab_size))
    if restored is None:
        raise SetupError(
            f"{checkpoints.folder}: no checkpoint in it can be read: give another --config.run_dir"
        )
    step, trees, loop = restored

    # With another config or other data the run would not continue as it began.
    for name, current in (("config", config_hash(job.cfg)), ("data", job.data.digest)):
        if loop[name] != current:
            raise SetupError(
                f"{checkpoints.folder / str(step)} was saved with another {name} ({loop[name]}, now "
                f"{current}): give the old one, or another --config.run_dir"
            )

    # Metrics after the checkpoint are dropped.  An update whose evaluation was interrupted is not logged yet.
    with setup_errors("run_dir"):
        run.truncate(step if loop["due"] is None else step - 1)
    hosts.print_once(f"resumed from update {step}")
    return RewardTrainState(
        reward=checkpoint.join_state(trees["reward"], trees["reward_optimiser"], frozen),
        step=step,
        best=None if loop["best"] is None else BestEvaluation(**loop["best"]),
        evaluations_since_best=loop["stale"],
        unlogged=None if loop["due"] is None else parse_numbers(loop["due"]),
    )


def _save_stopped(
    job: rm_setup.Job, state: RewardTrainState, run: RunDirectory, checkpoints: Checkpoints
) -> None:
    """Complete a checkpoint of the last update before the process ends."""
    with setup_errors("checkpoint"):
        checkpoints.wait()  # a checkpoint of this update may be in progress
        if state.step not in checkpoints.steps():
            _save(job, state, run, checkpoints)
        checkpoints.wait()
    hosts.print_once(
        f"stopped by a signal; update {state.step} is saved; the same command resumes", always=True
    )


def _save(job: rm_setup.Job, state: RewardTrainState, run: RunDirectory, checkpoints: Checkpoints) -> None:
    """Begin to write a checkpoint, after the metrics of its updates are on disk.

    Raises RunFault for values that are not finite: they must not replace a good checkpoint.
    """
    if bad := describe_non_finite({"reward": state.reward}):
        raise hosts.RunFault(
            f"update {state.step}: {bad}; this state is not saved: check the weights that the training began with, "
            "or lower --config.train_rm.optimiser.lr in a new --config.run_dir"
        )
    run.flush()
    # The names "stale" and "due" are part of the checkpoint format.
    loop = {
        "best": None if state.best is None else to_jsonable(dataclasses.asdict(state.best)),
        "stale": state.evaluations_since_best,
        "due": to_jsonable(state.unlogged),
        "config": config_hash(job.cfg),
        "data": job.data.digest,
    }
    items = _checkpoint_items(state.reward)
    checkpoints.save(state.step, items, loop, dict.fromkeys(items, job.model.config.vocab_size))


def _checkpoint_items(reward: TrainState) -> dict[str, Any]:
    """Split the state into the parts that a checkpoint stores, by name."""
    params, optimiser = checkpoint.split_state(reward)
    return {"reward": params, "reward_optimiser": optimiser}


# --- the end -------------------------------------------------------------------------------------------


def _finish(job: rm_setup.Job, state: RewardTrainState) -> str:
    """Write the best model's report; returns a summary for the terminal."""
    summary = ""
    with setup_errors("run_dir"):
        # The last update is always evaluated, so there is a best model.
        if hosts.is_primary() and state.best is not None:
            summary = best_model.write_final_report(job, state.step, state.best)
    skipped = int(hosts.fetch_arrays(state.reward.skipped))
    if skipped and skipped >= state.step:
        raise hosts.RunFault(
            f"all {skipped} updates were skipped, since loss or gradients were not finite: the model is the one "
            "that the training began with; lower --config.train_rm.optimiser.lr, or set "
            "--config.reward.dtype=float32, in a new --config.run_dir"
        )
    if skipped:
        summary += f"\n{skipped} updates were skipped: loss or gradients were not finite"
    return summary
