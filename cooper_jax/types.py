"""Data passed between the stages of a Cooper step.  Text and arrays never share a container.

Axis legend, for the whole project:

    B  prompts in a step               P  prompt tokens
    G  samples per prompt              T  response (completion) tokens
    N  = B * G rows, prompt-major      S  tokens of a whole row (P + T, or a reward model's input)
    D  width   H  query heads   K  key/value heads   h  head_dim   F  feed-forward width
    L  layers  V  vocabulary (padded)

Rows are prompt-major: row n belongs to prompt n // G and is its sample n % G.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
from flax import struct

Params = dict[str, Any]  # a nested dict of arrays with stable paths
Metrics = dict[str, float]  # slash-grouped names -> host floats

# --- text: frozen dataclasses, host only ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    question: str
    reference: str
    solution: str = ""  # worked solution, if the data has one; for supervised phases, never for the reward
    id: str = ""  # origin of the row, for messages
    subject: str = ""  # evaluations are broken down by subject and level, if the data has them
    level: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response as text."""

    text: str
    truncated: bool = False  # the length limit was reached before an EOS was sampled
    tokens: int = 0


class Verdict(enum.StrEnum):
    """The rule verifier's verdict.  Only decidable ones may be used as labels; the others abstain."""

    CORRECT = "correct"
    WRONG = "wrong"  # an answer of a recognised form that differs from the reference
    NO_ANSWER = "no_answer"
    UNRECOGNISED = "unrecognised"  # an answer or a reference of a form that the rule cannot compare
    TIMEOUT = "timeout"

    @property
    def decidable(self) -> bool:
        """True if the verdict may be used as a label."""
        return self in (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER)


@dataclasses.dataclass(frozen=True)
class Triple:
    """A reward-model input (question, reference, completion) with its label and origin ("" if unknown)."""

    question: str
    reference: str
    completion: str
    label: float = 0.0  # 1.0 correct, 0.0 not
    id: str = ""  # of the row
    source: str = ""  # data set
    model: str = ""  # that wrote the completion
    kind: str = ""  # of answer


@dataclasses.dataclass(frozen=True)
class Pair:
    """A contrastive pair: a correct and a wrong completion of one problem, rendered by the same template.

    The members differ in their text.  If one of the references below is not empty, they have the same text
    and differ in the reference.
    """

    problem: Problem
    positive: str
    negative: str
    row: int  # rollout row of the positive
    positive_reference: str = ""  # replaces the problem's reference in the positive
    negative_reference: str = ""  # replaces the problem's reference in the negative
    exchanged: bool = False  # a control: the update swaps the members


# --- arrays: pytrees ---------------------------------------------------------------------------------


@struct.dataclass
class Rollout:
    """Sampled responses, right-padded with zeros."""

    tokens: jax.Array  # i32[N, T]
    mask: jax.Array  # bool[N, T]: sampled tokens, the EOS included
    logprobs: jax.Array  # f32[N, T]: under the distribution sampled from (after temperature, top-k, top-p)
    finished: jax.Array  # bool[N]: an EOS was sampled; False means truncated


@struct.dataclass
class PolicyBatch:
    """Rows of a GRPO update.  Prompts are left-padded, so that all responses start at column P."""

    tokens: jax.Array  # i32[N, P + T]
    valid: jax.Array  # bool[N, P + T]
    response_mask: jax.Array  # bool[N, T]
    advantages: jax.Array  # f32[N]
    old_logprobs: jax.Array  # f32[N, T]: of the policy before this step; used if a step has several updates
    ref_logprobs: jax.Array  # f32[N, T]: of the frozen reference
    rollout_logprobs: jax.Array  # f32[N, T]: of the rollout engine, for the mismatch metric


@struct.dataclass
class ScoreBatch:
    """Reward-model inputs; padding may be on either side."""

    tokens: jax.Array  # i32[N, S]
    valid: jax.Array  # bool[N, S]


@struct.dataclass
class PairBatch:
    """Contrastive pairs; masked rows have no weight."""

    positive: ScoreBatch
    negative: ScoreBatch
    mask: jax.Array  # bool[B]


@struct.dataclass
class LabelledBatch:
    """Labelled reward-model inputs; rows of weight 0 are padding."""

    rows: ScoreBatch
    labels: jax.Array  # f32[N]: 1 correct, 0 not
    weights: jax.Array  # f32[N]


@struct.dataclass
class TrainState:
    """f32 master weights and optimiser state."""

    params: Params
    opt_state: Any
    updates: jax.Array  # i32[]: updates applied
    skipped: jax.Array  # i32[]: updates skipped because the loss or gradients were not finite
