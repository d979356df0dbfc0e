"""Typed settings of the problems: the config's `data` section."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from cooper_jax.settings import typed_config


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the problems and of their prompts: the config's `data` section."""

    # Training problems.
    train: str  # a file or a tensorflow-datasets name; "" with format synthetic
    format: str

    # Problems of the periodic evaluation.
    eval: str  # a file of problems; "": eval_from_train problems of the training file
    eval_from_train: int  # number of problems of the training file that are held out
    eval_format: str
    exclude_seen: bool  # leave out evaluation problems on which the reward model is trained

    # Columns of jsonl, parquet and tfds.
    question_key: str
    reference_key: str
    solution_key: str

    # tensorflow-datasets.
    tfds_dir: str
    split: str
    eval_split: str

    # Prompts and batches.
    instruction: str  # appended to each question
    chat: bool  # wrap prompts in the chat template
    prompts_per_step: int  # B
    max_prompt_tokens: int  # longer prompts are dropped
    bucket: int  # batch widths are multiples of this number of tokens
    synthetic_size: int  # number of distinct synthetic training problems

    def __post_init__(self) -> None:
        at_least_1 = ("prompts_per_step", "max_prompt_tokens", "bucket", "synthetic_size")
        errors = [
            *typed_config.find_below_minimum(self, "data", 1, at_least_1),
            *typed_config.find_below_minimum(self, "data", 0, ("eval_from_train",)),
        ]
        if self.is_synthetic and (self.train or self.eval):
            errors.append(
                f"data.train={self.train!r}, data.eval={self.eval!r}: data.format=synthetic reads no file; "
                "set --config.data.format=auto"
            )
        if not self.is_synthetic and not self.train:
            errors.append("data.train is empty: give --config.data.train=FILE")
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> DataConfig:
        """Read the `data` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "data")

    @property
    def is_synthetic(self) -> bool:
        """True where problems are made from the seed instead of read from a file."""
        return self.format == "synthetic"
