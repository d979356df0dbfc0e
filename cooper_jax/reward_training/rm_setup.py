"""Setup of a reward model's training: settings, data, microbatch shapes, jitted programs, initial state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import packing
from cooper_jax.model import loading
from cooper_jax.model.model_source import ModelSource
from cooper_jax.reward import verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.reward_training import batches, examples
from cooper_jax.reward_training.rm_config import TrainRmConfig
from cooper_jax.runtime import device_layouts, mesh, optim
from cooper_jax.runtime.trackers.tracker_choice import find_name_errors
from cooper_jax.settings.secrets import check_secrets
from cooper_jax.settings.setup_errors import ErrorCollector
from cooper_jax.types import TrainState

# Rows per microbatch of the scoring program: its batches are single microbatches and must not be split.
_NO_SPLIT = 2**30


@dataclasses.dataclass(frozen=True)
class RmSettings:
    """Typed settings of a reward model's training, section by section."""

    train_rm: TrainRmConfig
    optimiser: optim.OptimiserConfig
    update: RewardUpdateConfig

    @classmethod
    def from_config(cls, cfg: ConfigDict) -> RmSettings:
        """Read and check a whole config.

        Raises SetupError with every setting that is out of its range or contradicts another.
        """
        errors = ErrorCollector()
        read: dict[str, Any] = {}

        # Each section is read by itself, so that the errors of all are reported at once.
        with errors.collect("train_rm"):
            read["train_rm"] = TrainRmConfig.from_config(cfg.train_rm)
        with errors.collect("train_rm.optimiser"):
            read["optimiser"] = optim.OptimiserConfig.from_config(
                cfg.train_rm.optimiser, "train_rm.optimiser"
            )
        with errors.collect("reward"):
            read["update"] = RewardUpdateConfig.from_config(cfg.reward)
        # The config is stored whole, with the sections that this job does not read.
        with errors.collect("config"):
            check_secrets(cfg)
        _check_shared_sections(cfg, errors)
        _check_mesh(cfg, errors)

        errors.raise_if_any()
        return cls(**read)


def _check_shared_sections(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check the settings in sections that this job shares with others."""
    require, reward = errors.require, cfg.reward
    with errors.collect("reward"):
        ModelSource.from_config(reward, "reward")
    require(
        bool(reward.weights),
        "reward.weights is empty: give --config.reward.weights=DIR, a hub id or a .gguf file",
    )

    require(
        reward.packing != "on",
        "reward.packing=on: this job groups rows by their length, and packs none; leave it out",
    )

    errors.messages += find_name_errors(cfg.log.to)

    # Numbers with a lower bound.
    require(cfg.seed >= 0, f"seed={cfg.seed}: it must be at least 0")
    for name, value in (
        ("reward.microbatch", reward.microbatch),
        ("reward.max_tokens", reward.max_tokens),
        ("data.bucket", cfg.data.bucket),
        ("checkpoint.every", cfg.checkpoint.every),
    ):
        require(value >= 1, f"{name}={value}: it must be at least 1")


def _check_mesh(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check that one mesh covers all devices, and that its sizes multiply to their number."""
    # RLVR training may give models their own devices; here there is one model only.
    for name in ("reward", "reference", "assistant"):
        errors.require(
            not cfg.mesh[name],
            f"mesh.{name}={cfg.mesh[name]!r}: a reward model that is trained alone uses all devices, by "
            "mesh.data, .fsdp and .tensor; leave it empty",
        )
    with errors.collect("mesh"):
        device_layouts.make_policy_layout(cfg)


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that an update needs and does not change."""

    # Settings.
    cfg: ConfigDict
    settings: RmSettings
    path: loading.Directory  # the run directory

    # Devices and model.
    layout: mesh.Layout
    model: loading.Model
    head_trained: bool  # True if the score head was loaded with the weights

    # Data.
    data: examples.RewardData
    lengths: np.ndarray  # i64[N], tokens of each training row
    labels: np.ndarray  # f32[N], of each training row
    shapes: tuple[batches.Shape, ...]  # of the microbatches

    # Jitted programs, compiled once per shape.
    accumulator: optim.Accumulator
    compute_logits: Callable  # (params, ScoreBatch) -> logits f32[N]

    # Schedule.
    steps: int  # updates in total
    eval_every: int  # updates between evaluations

    @property
    def updates_per_epoch(self) -> int:
        """Updates in one pass over the training rows."""
        return self.steps // self.settings.train_rm.epochs


def build_rm_job(cfg: ConfigDict, settings: RmSettings, path: loading.Directory) -> tuple[Job, TrainState]:
    """Build the job and the state at update 0.  path: the run directory.

    Raises SetupError for data and weights that cannot be used.
    """
    layout = device_layouts.make_policy_layout(cfg)
    train_rm = settings.train_rm

    # Data are read before the weights: most errors are in the data, and loading weights takes long.  The
    # tokenizer and the architecture are needed for that, and they load quickly.
    described = loading.describe_model(cfg.reward, "reward", path, layout)
    loading.check_length(described.config, "reward", {"reward.max_tokens": cfg.reward.max_tokens})
    data = examples.load_examples(cfg, train_rm, described.tokenizer)

    # The schedule's length is known from the data alone.
    lengths = data.train.lengths
    updates_per_epoch = batches.count_updates_per_epoch(len(data.train), train_rm.batch)
    steps = train_rm.epochs * updates_per_epoch

    optimiser = optim.make_optimiser(settings.optimiser, steps)

    # Now the weights, onto the mesh.
    model, params, head_trained = loading.load_model(cfg.reward, "reward", "score", layout, path, cfg.seed)
    job = Job(
        cfg=cfg,
        settings=settings,
        path=path,
        layout=layout,
        model=model,
        head_trained=head_trained,
        data=data,
        lengths=lengths,
        labels=data.train.labels,
        # Held-out rows are scored in the same shapes, so their lengths take part in the choice.
        shapes=batches.choose_shapes(
            np.concatenate([lengths, data.held_out.lengths]),
            bucket=cfg.data.bucket,
            max_widths=train_rm.widths,
            token_budget=cfg.reward.microbatch * cfg.reward.max_tokens,
            batch_size=train_rm.batch,
            rows_multiple=layout.batch_shards,
        ),
        accumulator=verifier_model.make_bce_accumulator(model.config, settings.update, optimiser, layout),
        compute_logits=verifier_model.make_score_fn(
            model.config, layout, dtype=cfg.reward.dtype, microbatch=_NO_SPLIT
        ),
        steps=steps,
        eval_every=train_rm.eval_every or updates_per_epoch,
    )
    return job, optim.init_state(params, optimiser)


def place_microbatch(job: Job, microbatch: batches.Microbatch, weight: float) -> tuple[jax.Array, ...]:
    """Put a microbatch of training rows on the devices: (ScoreBatch, labels f32[rows], weights f32[rows]).

    weight: each row's weight in the update's loss; padding rows have weight 0.
    """
    # Labels and weights are padded to the microbatch's rows like the tokens.
    num_rows = microbatch.shape.rows
    labels = packing.pad_rows(job.labels[microbatch.rows], num_rows)
    weights = packing.pad_rows(np.full(len(microbatch.rows), weight, np.float32), num_rows)
    batch = batches.pack_microbatch(job.data.train.tokens, microbatch)
    return job.layout.put((batch, labels, weights), "batch")


def describe_rm_job(job: Job) -> str:
    """Summarise model, data, mesh and microbatch shapes for the terminal."""
    data, config, train_rm = job.data, job.model.config, job.settings.train_rm
    shapes = ", ".join(f"{shape.rows} x {shape.width}" for shape in job.shapes)
    mesh_sizes = " x ".join(f"{name} {size}" for name, size in job.layout.mesh.shape.items())
    overlap = "left out" if data.overlap_excluded else "kept"
    added = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in data.added.items() if count)
    return (
        f"{job.cfg.name}: {config.family} of {config.layers} layers x {config.width}, {len(data.train)} rows "
        f"({data.train.labels.mean():.1%} correct; {data.too_long} dropped: over {train_rm.max_characters} "
        f"characters; {data.train.truncated} cut to {job.cfg.reward.max_tokens} tokens; added: "
        f"{added or 'none'}), {len(data.held_out)} held out ({data.overlapping} with a training question "
        f"{overlap}), {train_rm.epochs} epochs of {job.steps // train_rm.epochs} updates, mesh {mesh_sizes}\n"
        f"microbatches of {shapes} tokens: a program each"
    )
