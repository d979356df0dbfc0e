"""What the pairs of one step are made from: the settings, and the step's problems, rule and assistant.

B  prompts   G  samples per prompt
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from cooper_jax.reward.assistants import Assistant
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.settings import bounds, typed_config
from cooper_jax.types import Problem

NEGATIVE_SOURCES = ("assistant", "own_answer", "swap")


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Settings of contrastive pairs: the config's `pairs` section."""

    per_prompt: int  # maximum number of pairs per prompt
    negatives: tuple[str, ...]  # sources of negatives, assigned to a prompt's slots round-robin
    tries: int  # rewrites, or swapped references, to try before a pair is masked
    length_ratio: float  # maximum ratio of the lengths in characters of a rewrite and its positive

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, "pairs")
        if not self.negatives or not set(self.negatives) <= set(NEGATIVE_SOURCES):
            errors.append(
                f"pairs.negatives={self.negatives}: it names one or more of {', '.join(NEGATIVE_SOURCES)}, "
                "as in --config.pairs.negatives=\"('assistant','swap')\""
            )
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> PairsConfig:
        """Read the `pairs` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "pairs", negatives=tuple(section.negatives))

    def list_slot_sources(self) -> list[tuple[str, int]]:
        """A prompt's slots as (source, k): each is the k-th slot of its source, counted from 0."""
        # For example, 3 slots of the sources assistant and swap are (assistant, 0), (swap, 0), (assistant, 1).
        sources = [self.negatives[i % len(self.negatives)] for i in range(self.per_prompt)]
        return [(source, sources[:i].count(source)) for i, source in enumerate(sources)]


@dataclasses.dataclass(frozen=True)
class PairTask:
    """Everything that is known about a step's pairs before its responses are sampled."""

    problems: Sequence[Problem]  # [B]
    group_size: int  # G

    # Without an assistant, no pairs at all are built if `cfg.negatives` names it.
    assistant: Assistant | None
    rule: RuleVerifier | SharedRule
    cfg: PairsConfig

    # All random draws are keyed by (seed, step, the prompt's position in the data order).
    seed: int
    step: int
    positions: Sequence[int] | None = None  # [B]; None: each prompt's index in the batch

    # Read for the source own_answer only: True for an answer that is short enough to be a reference.
    reference_fits: Callable[[str], bool] = lambda answer: True

    # Texts of the control tokens of the tokenizers in use: a rewrite that spells one out is refused.
    special_tokens: frozenset[str] = frozenset()

    # A control experiment: mark each pair as exchanged with probability 1/2.  The update swaps the members of
    # an exchanged pair.
    shuffle_labels: bool = False

    @property
    def uses_own_answers(self) -> bool:
        """True if own_answer is one of the sources of negatives."""
        return "own_answer" in self.cfg.negatives

    @property
    def lacks_assistant(self) -> bool:
        """True if the assistant is a source of negatives, and the run has none."""
        return self.assistant is None and "assistant" in self.cfg.negatives

    @property
    def prompt_positions(self) -> Sequence[int]:
        """The position of each prompt that keys its draws, [B]."""
        return range(len(self.problems)) if self.positions is None else self.positions
