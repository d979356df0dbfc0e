"""Typed settings of the problems: the config's `data` section."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from cooper_jax.data import data_sources, mixtures
from cooper_jax.data.policy_prompts import PromptStyle
from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.setup_errors import ErrorCollector


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the problems and of their prompts: the config's `data` section."""

    # Training problems.
    train: str  # sources (data_sources.py) or a tensorflow-datasets name; "" with format synthetic
    train_weights: str  # a weight for each source; "": the sources are one set
    format: str

    drop_duplicates: bool  # use only the first of equal training problems

    # Problems of the periodic evaluation.
    eval: str  # sources; "": eval_from_train problems of the training data
    eval_weights: str  # a weight for each source; "": the sources are one set
    eval_from_train: int  # number of problems of the training file that are held out
    eval_format: str
    exclude_seen: bool  # leave out evaluation problems on which the reward model is trained

    # Columns of jsonl, csv, parquet and tfds.
    question_key: str
    reference_key: str
    solution_key: str
    reduce_solutions: bool  # of a reference that is a worked solution, use the answer that it marks

    # tensorflow-datasets.
    tfds_dir: str
    split: str
    eval_split: str

    # Prompts and batches.
    instruction: str  # appended to each question
    system: str  # system message of each prompt; "": none, or that of the data
    chat: bool  # wrap prompts in the chat template
    thinking: str  # `enable_thinking` of the chat template: on, off, or "" for its default
    prompts_per_step: int  # B
    refill_prompts: int  # further prompts of a step at most, in place of those of flat groups
    max_prompt_tokens: int  # longer prompts are dropped
    bucket: int  # batch widths are multiples of this number of tokens
    synthetic_size: int  # number of distinct synthetic training problems

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, "data")
        if self.is_synthetic and (self.train or self.eval):
            errors.append(
                f"data.train={self.train!r}, data.eval={self.eval!r}: data.format=synthetic reads no file; "
                "set --config.data.format=auto"
            )
        if not self.is_synthetic and not self.train:
            errors.append("data.train is empty: give --config.data.train=FILE")
        collector = ErrorCollector(errors)
        with collector.collect("data.train"):
            train_sources = self.train_sources
            with collector.collect(f"data.train_weights={self.train_weights!r}"):
                mixtures.parse_weights(self.train_weights, len(train_sources))
        with collector.collect("data.eval"):
            eval_sources = self.eval_sources
            with collector.collect(f"data.eval_weights={self.eval_weights!r}"):
                mixtures.parse_weights(self.eval_weights, len(eval_sources))
        with collector.collect("data"):
            _ = self.prompt_style
        collector.raise_if_any()

    @property
    def train_sources(self) -> list[str]:
        """The texts of the training data's sources."""
        return self._split(self.train, self.format)

    @property
    def eval_sources(self) -> list[str]:
        """The texts of the sources of data.eval."""
        return self._split(self.eval, self.eval_format)

    def _split(self, text: str, format: str) -> list[str]:
        # Of tensorflow-datasets one data set is read, whose name may have a config: name/config.
        return [text] if format == "tfds" else data_sources.split_sources(text)

    @property
    def train_shares(self) -> tuple[int, ...]:
        """The training sources' shares of the data order; () without weights."""
        return mixtures.parse_weights(self.train_weights, len(self.train_sources))

    @property
    def eval_shares(self) -> tuple[int, ...]:
        """The shares of the sources of data.eval in the evaluation; () without weights."""
        return mixtures.parse_weights(self.eval_weights, len(self.eval_sources))

    @property
    def prompt_style(self) -> PromptStyle:
        """The settings of the policy's prompts."""
        return PromptStyle(self.instruction, self.system, self.chat, self.thinking)

    @classmethod
    def from_config(cls, section: ConfigDict) -> DataConfig:
        """Read the `data` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "data")

    @property
    def is_synthetic(self) -> bool:
        """True where problems are made from the seed instead of read from a file."""
        return self.format == "synthetic"
