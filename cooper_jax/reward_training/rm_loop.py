"""Trains a reward model on labelled completions (arXiv 2508.05613, VerifyRM), and measures it while it learns.

1. `examples.load_examples` reads, holds out, drops and tokenises; `batches` says which rows an update reads.
2. An update adds up the gradients of its microbatches, whose widths differ, and moves the state once.
3. Every `train_rm.eval_every` updates the held-out rows are scored.  A model that is better than all before goes to
   <run_dir>/best/ at once, its logits to predictions.jsonl.
4. At the end the best model's logits become report.json, reliability.png and a table.

    <run_dir>/best/              AutoModelForSequenceClassification with its tokenizer: a `reward.weights`
              predictions.jsonl  its logits on the held-out rows
              report.json  reliability.png
              seen_questions.json  what its model is trained on; in best/ too
              config.json  metrics.jsonl  checkpoints/  as of any run (runtime/run_directory.py)

The same command goes on from the newest checkpoint, bit for bit: an update's rows follow from (seed, its number),
and a checkpoint holds what else decides, the best figure and how long ago it was.  What a killed run did after its
checkpoint is done again, with the same outcome.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.reward_training import batches, best_model, examples, rm_report, rm_setup
from cooper_jax.runtime import checkpoint, hosts
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.extras import import_extra
from cooper_jax.runtime.metrics import Progress, parse_numbers, to_host, to_jsonable
from cooper_jax.runtime.run_directory import RunDirectory, check_shared, run_path
from cooper_jax.runtime.stored_config import config_hash
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class RewardTrainState:
    """What an update replaces, and what the choice of the best model remembers."""

    reward: TrainState
    step: int  # updates done
    best: dict[str, float] | None = None  # step, and value of train_rm.keep_best
    stale: int = 0  # evaluations since
    due: Metrics | None = None  # metrics of the last update, whose evaluation was broken off


class TrainProgress(Progress):
    SHOWN = (
        ("loss", "train_rm/loss", ".4f"),
        ("accuracy", "train_rm/accuracy", ".1%"),
        ("held-out auroc", "eval/auroc", ".4f"),
        ("held-out accuracy", "eval/accuracy", ".1%"),
        ("tokens/s", "time/tokens_per_second", ",.0f"),
    )


def train_reward_model(cfg: ConfigDict) -> None:
    """Run the epochs, or what is left of them after the newest checkpoint in the run directory.

    Raises hosts.Stopped after a SIGTERM, when a checkpoint of the last whole update is complete.
    """
    rm_setup.check_rm_settings(cfg)
    with setup_errors(
        "reliability.png"
    ):  # drawn when the training is over: too late to find a package missing
        import_extra("matplotlib", "figures")
    with setup_errors("run_dir"):
        path = run_path(cfg)
    with contextlib.ExitStack() as stack:
        with setup_errors("run_dir"):
            check_shared(path)
            run = stack.enter_context(RunDirectory(path, cfg, resume=cfg.resume))
        job, reward = rm_setup.build_rm_job(cfg, path)
        with setup_errors("run_dir"):
            best_model.write_seen_record(job)
            checkpoints = stack.enter_context(Checkpoints(path, keep=cfg.checkpoint.keep))
        hosts.print_once(rm_setup.describe_rm_job(job))
        state = _start_or_resume(job, reward, run, checkpoints)
        del reward
        state = _updates(job, state, run, checkpoints)
    hosts.print_once(_conclude(job, state))


def _updates(
    job: rm_setup.Job, state: RewardTrainState, run: RunDirectory, checkpoints: Checkpoints
) -> RewardTrainState:
    cfg, steps = job.cfg, job.steps
    progress = TrainProgress(steps, state.step, quiet=not hosts.is_primary())
    with contextlib.closing(progress):
        while state.due is not None or not _ended(job, state):
            try:
                if state.due is None:
                    state, metrics = _update(job, state)
                    state = dataclasses.replace(state, due=metrics)
                metrics = dict(state.due)
                if state.step % job.eval_every == 0 or state.step == steps:
                    state, found = _evaluate(job, state)
                    metrics |= found
                    _say_evaluation(progress, job, state, found)
            except hosts.Stopped:
                with setup_errors("checkpoint"):
                    checkpoints.wait()  # it may be under way
                    if state.step not in checkpoints.steps():
                        _save(job, state, run, checkpoints)
                    checkpoints.wait()
                hosts.print_once(f"stopped by a signal; update {state.step} is saved")
                raise
            state = dataclasses.replace(state, due=None)
            with setup_errors("run_dir"):
                run.log(state.step, metrics)
            progress.update(state.step, metrics)
            due = state.step % cfg.checkpoint.every == 0 or _ended(job, state)
            if due and state.step not in checkpoints.steps():  # that whose evaluation was broken off is there
                with setup_errors("checkpoint"):
                    _save(job, state, run, checkpoints)
    return state


def _ended(job: rm_setup.Job, state: RewardTrainState) -> bool:
    patience = job.cfg.train_rm.patience
    return state.step >= job.steps or 0 < patience <= state.stale


def _update(job: rm_setup.Job, state: RewardTrainState) -> tuple[RewardTrainState, Metrics]:
    """One update.  Raises hosts.Stopped between microbatches, the state being as it was."""
    began = time.perf_counter()
    train, cfg = job.data.train, job.cfg.train_rm
    epoch, place = divmod(state.step, job.steps // cfg.epochs)
    rows = batches.order_batches(len(train), cfg.batch, job.cfg.seed, epoch)[place]
    microbatches = batches.cut_microbatches(rows, job.lengths, job.shapes)
    sums = job.accumulator.start(state.reward.params)
    for m in microbatches:
        hosts.raise_if_stopping()
        sums = job.accumulator.add(
            state.reward.params, sums, rm_setup.place_microbatch(job, m, 1.0 / len(rows))
        )
    reward, moved = job.accumulator.finish(state.reward, sums)
    metrics = to_host(moved, "train_rm")
    tokens, seconds = int(job.lengths[rows].sum()), time.perf_counter() - began
    metrics |= {
        "train_rm/epoch": (state.step + 1) / (job.steps // cfg.epochs),
        "train_rm/rows": len(rows),
        "train_rm/tokens": tokens,
        "train_rm/microbatches": len(microbatches),
        "train_rm/padding": batches.padding_share(microbatches, job.lengths),
        "time/step": seconds,
        "time/tokens_per_second": tokens / seconds,
    }
    return dataclasses.replace(state, reward=reward, step=state.step + 1), metrics


def score_rows(job: rm_setup.Job, params: Any, rows: examples.Examples) -> np.ndarray:
    """Logits f32[N] of rows, in rectangles as in training.  Raises hosts.Stopped between them."""
    out = np.zeros(len(rows), np.float32)
    for m in batches.cut_microbatches(np.arange(len(rows)), rows.lengths, job.shapes):
        hosts.raise_if_stopping()
        batch = job.layout.put(batches.fill_rectangle(rows.tokens, m), "batch")
        out[m.rows] = hosts.fetch_arrays(job.score(params, batch))[: len(m.rows)]
    return out


def _evaluate(job: rm_setup.Job, state: RewardTrainState) -> tuple[RewardTrainState, Metrics]:
    """Measure the held-out rows; keep the model where it is the best so far."""
    began = time.perf_counter()
    logits = score_rows(job, state.reward.params, job.data.held_out)
    if not np.isfinite(logits).all():
        raise SetupError(
            f"update {state.step}: {(~np.isfinite(logits)).sum()} of {len(logits)} held-out logits are not finite: "
            "lower --config.train_rm.optimiser.lr, or set --config.reward.dtype=float32, in a new run_dir"
        )
    metrics = rm_report.evaluation_metrics(job.data.held_out, logits)
    name = job.cfg.train_rm.keep_best
    value = metrics[f"eval/{name}"]
    better = state.best is None or rm_report.BETTER[name] * (value - state.best["value"]) > 0
    if better:
        with setup_errors("run_dir"):
            best_model.keep_best_model(job, state.reward.params, state.step, value, logits)
        state = dataclasses.replace(state, best={"step": state.step, "value": value}, stale=0)
    else:
        state = dataclasses.replace(state, stale=state.stale + 1)
    return state, metrics | {"eval/best": float(better), "time/eval": time.perf_counter() - began}


def _say_evaluation(progress: Progress, job: rm_setup.Job, state: RewardTrainState, found: Metrics) -> None:
    if not hosts.is_primary():
        return
    shown = "  ".join(f"{n} {found[f'eval/{n}']:.4f}" for n in ("loss", "accuracy", "auroc", "ece"))
    best = "the best so far" if found["eval/best"] else f"the best is of update {state.best['step']:.0f}"
    progress.note(f"held out, {len(job.data.held_out)} rows: {shown}  ({found['time/eval']:.0f} s, {best})")


# --- checkpoints ---------------------------------------------------------------------------------------


def _start_or_resume(
    job: rm_setup.Job, reward: TrainState, run: RunDirectory, checkpoints: Checkpoints
) -> RewardTrainState:
    """The state to go on from: the newest checkpoint's, or the one given."""
    if not checkpoints.steps():
        with setup_errors("run_dir"):
            run.truncate(None)
        return RewardTrainState(reward=reward, step=0)
    likes = {name: checkpoint.abstract_like(tree) for name, tree in _items(reward).items()}
    # What the checkpoint replaces goes first: together they would be twice a run's memory.
    jax.tree.map(lambda x: x.delete(), reward)
    with setup_errors(f"{checkpoints.folder}"):
        step, trees, loop = checkpoints.restore_newest(
            likes, dict.fromkeys(likes, job.model.config.vocab_size)
        )
    for what, now in (("config", config_hash(job.cfg)), ("data", job.data.digest)):
        if loop[what] != now:
            raise SetupError(
                f"{checkpoints.folder / str(step)} was saved with another {what} ({loop[what]}, now {now}): give "
                "the old one, or another --config.run_dir"
            )
    with setup_errors("run_dir"):
        run.truncate(step if loop["due"] is None else step - 1)
    hosts.print_once(f"resumed from update {step}")
    return RewardTrainState(
        reward=checkpoint.join_state(trees["reward"], trees["reward_optimiser"]),
        step=step,
        best=loop["best"],
        stale=loop["stale"],
        due=None if loop["due"] is None else parse_numbers(loop["due"]),
    )


def _items(reward: TrainState) -> dict[str, Any]:
    params, optimiser = checkpoint.split_state(reward)
    return {"reward": params, "reward_optimiser": optimiser}


def _save(job: rm_setup.Job, state: RewardTrainState, run: RunDirectory, checkpoints: Checkpoints) -> None:
    run.flush()
    loop = {name: to_jsonable(getattr(state, name)) for name in ("best", "stale", "due")}
    loop |= {"config": config_hash(job.cfg), "data": job.data.digest}
    checkpoints.save(state.step, _items(state.reward), loop)


# --- the end -------------------------------------------------------------------------------------------


def _conclude(job: rm_setup.Job, state: RewardTrainState) -> str:
    """Write the best model's report; what to tell the user."""
    said = ""
    with setup_errors("run_dir"):
        if hosts.is_primary():
            said = best_model.write_final_report(job, state.step, state.best)
    skipped = int(hosts.fetch_arrays(state.reward.skipped))
    if skipped:
        said += f"\n{skipped} updates were left out: loss or gradients were not finite"
    return said
