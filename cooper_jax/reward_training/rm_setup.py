"""What a reward-model training is built from: checked settings, data, shapes, programs, the state at update 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import packing
from cooper_jax.model import loading
from cooper_jax.reward import verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.reward_training import batches, examples, rm_report
from cooper_jax.runtime import device_layouts, mesh, optim
from cooper_jax.settings.setup_errors import Problems, setup_errors
from cooper_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Job:
    """The machinery of a run; nothing in it changes from update to update."""

    cfg: ConfigDict
    path: loading.Directory
    layout: mesh.Layout
    model: loading.Model
    head_trained: bool  # the score head came with the weights
    data: examples.Data
    lengths: np.ndarray  # i64[N], of the training rows
    labels: np.ndarray  # f32[N]
    shapes: tuple[batches.Shape, ...]
    accumulator: optim.Accumulator
    score: Callable  # (params, ScoreBatch) -> f32[N], logits
    steps: int  # updates in all
    eval_every: int


def check_rm_settings(cfg: ConfigDict) -> None:
    """Raise SetupError with every setting that is out of its range or contradicts another."""
    problems = Problems()
    need = problems.need
    s, r = cfg.train_rm, cfg.reward
    need(bool(s.data), "train_rm.data is empty: give --config.train_rm.data=FILE")
    need(
        bool(r.weights), "reward.weights is empty: give --config.reward.weights=DIR, a hub id or a .gguf file"
    )
    for section, names in (
        ("train_rm", ("epochs", "batch", "widths")),
        ("reward", ("microbatch", "max_tokens", "vocab_multiple")),
        ("data", ("bucket",)),
        ("checkpoint", ("every",)),
    ):
        for name in names:
            value = cfg[section][name]
            need(value >= 1, f"{section}.{name}={value}: it must be at least 1")
    for name in ("max_characters", "eval_every", "patience"):
        need(s[name] >= 0, f"train_rm.{name}={s[name]}: it must be at least 0")
    need(0 < s.eval_share < 1, f"train_rm.eval_share={s.eval_share}: it is a share, above 0 and below 1")
    need(0 <= s.attacked <= 1, f"train_rm.attacked={s.attacked}: it is a share, from 0 to 1")
    kinds = ", ".join(rm_report.BETTER)
    need(s.keep_best in rm_report.BETTER, f"train_rm.keep_best={s.keep_best!r}: it is one of {kinds}")
    need(r.dtype in ("float32", "bfloat16"), f"reward.dtype={r.dtype!r}; it is float32 or bfloat16")
    need(cfg.seed >= 0, f"seed={cfg.seed}: it must be at least 0")
    for name in ("reward", "reference", "assistant"):
        need(
            not cfg.mesh[name],
            f"mesh.{name}={cfg.mesh[name]!r}: a reward model that is trained alone has all devices, laid out by "
            "mesh.data, .fsdp and .tensor; leave it empty",
        )
    with problems.collect("mesh"):
        device_layouts.make_policy_layout(cfg)
    with problems.collect("train_rm"):
        optim.make_optimiser(s.optimiser, s.decay, updates=1)
    problems.raise_if_any()


def build_rm_job(cfg: ConfigDict, path: loading.Directory) -> tuple[Job, TrainState]:
    """The machinery and the state at update 0.  Data are read first, for they are what is wrong most often."""
    layout = device_layouts.make_policy_layout(cfg)
    described = loading.describe_model(cfg.reward, "reward", path, layout)
    loading.check_length(described.config, "reward", {"reward.max_tokens": cfg.reward.max_tokens})
    data = examples.load_examples(cfg, described.tokenizer)
    s = cfg.train_rm
    per_epoch = batches.count_updates_per_epoch(len(data.train), s.batch)
    steps = s.epochs * per_epoch
    with setup_errors("train_rm"):
        section = optim.OptimiserConfig.from_config(s.optimiser, "train_rm.optimiser")
        optimiser = optim.make_optimiser(section, s.decay, steps)
        updates = RewardUpdateConfig.from_config(cfg.reward)
    model, params, head_trained = loading.load_model(cfg.reward, "reward", "score", layout, path, cfg.seed)
    lengths = data.train.lengths
    job = Job(
        cfg=cfg,
        path=path,
        layout=layout,
        model=model,
        head_trained=head_trained,
        data=data,
        lengths=lengths,
        labels=data.train.labels,
        shapes=batches.choose_shapes(
            np.concatenate([lengths, data.held_out.lengths]),
            bucket=cfg.data.bucket,
            most=s.widths,
            budget=cfg.reward.microbatch * cfg.reward.max_tokens,
            batch=s.batch,
            rows_multiple=layout.batch_shards,
        ),
        accumulator=verifier_model.make_bce_accumulator(model.config, updates, optimiser, layout),
        # A rectangle is one microbatch already.
        score=verifier_model.make_score_fn(model.config, layout, dtype=cfg.reward.dtype, microbatch=2**30),
        steps=steps,
        eval_every=s.eval_every or per_epoch,
    )
    return job, optim.init_state(params, optimiser)


def place_microbatch(job: Job, m: batches.Microbatch, share: float) -> tuple[jax.Array, ...]:
    """A microbatch on the devices: (ScoreBatch, labels, shares), a share for each row that is there."""
    labels = packing.pad_rows(job.labels[m.rows], m.shape.rows)
    shares = packing.pad_rows(np.full(len(m.rows), share, np.float32), m.shape.rows)
    return job.layout.put((batches.fill_rectangle(job.data.train.tokens, m), labels, shares), "batch")


def describe_rm_job(job: Job) -> str:
    """What is about to run."""
    data, config, s = job.data, job.model.config, job.cfg.train_rm
    share = data.train.labels.mean()
    shapes = ", ".join(f"{x.rows} x {x.width}" for x in job.shapes)
    left = "left out" if data.excluded else "kept"
    lines = [
        f"{job.cfg.name}: {config.family} of {config.layers} layers x {config.width}, {len(data.train)} rows "
        f"({share:.1%} correct; {data.too_long} dropped: over {s.max_characters} characters; "
        f"{data.train.cut} cut to {job.cfg.reward.max_tokens} tokens; {data.attacked} are reward hacks), "
        f"{len(data.held_out)} held out ({data.overlapping} with a training question {left}), "
        f"{s.epochs} epochs of {job.steps // s.epochs} updates, mesh "
        + " x ".join(f"{name} {size}" for name, size in job.layout.mesh.shape.items()),
        f"microbatches of {shapes} tokens: a program each",
    ]
    return "\n".join(lines)
