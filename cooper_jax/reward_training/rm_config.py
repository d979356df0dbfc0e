"""Typed settings of a reward model's own training: the config's `train_rm` section."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from cooper_jax.settings import bounds, typed_config

# Held-out metrics that may choose the best model: 1 where higher is better, -1 where lower is.
SELECTION_METRICS = {"auroc": 1, "accuracy": 1, "loss": -1}


@dataclasses.dataclass(frozen=True)
class TrainRmConfig:
    """Settings of a reward model's training: the config's `train_rm` section without its optimiser."""

    # Data.
    data: str  # files of labelled completions, separated by commas
    eval_data: str  # the same, held out; "": a share of `data` is held out
    eval_share: float  # share of the rows of `data` that is held out, by whole questions
    exclude_overlap: bool  # leave out held-out rows whose question was trained on
    max_characters: int  # longer training texts are dropped; 0 keeps all

    # Rows that are added to the training rows, as shares of their number (added_rows.py).
    attacked: float  # copies under a reward hack, made from as many right as wrong completions
    other_references: float  # right completions beside another reference, as wrong
    own_references: float  # wrong completions beside their own answer, as right

    # Optimisation.
    epochs: int
    batch: int  # the maximum number of rows per update
    widths: int  # the maximum number of different microbatch widths; each costs a compilation

    # Evaluation and the choice of the best model.
    eval_every: int  # updates between evaluations; 0: an epoch
    keep_best: str  # one of SELECTION_METRICS
    patience: int  # training ends after this many evaluations without improvement; 0: never

    def __post_init__(self) -> None:
        # All errors are collected, so that one start reports them together.
        errors = []
        if not self.data:
            errors.append("train_rm.data is empty: give --config.train_rm.data=FILE")
        errors += bounds.find_out_of_bounds(self, "train_rm")
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> TrainRmConfig:
        """Read the `train_rm` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "train_rm")
