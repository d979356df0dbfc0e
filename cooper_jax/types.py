"""What flows between the stages of a Cooper step.  Text and arrays never share a container.

Axis legend, for the whole project:

    B  prompts in a step               P  prompt tokens
    G  samples a prompt                T  response (completion) tokens
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
    """A question with its reference answer.

    `solution` is a worked solution where the data has one (GSM8K, the synthetic problems); it feeds the
    short supervised phases and never the reward.  `id` says where the row came from, for messages.  `subject` and
    `level` are the data's own, "" where they have none: evaluations are broken down by them.
    """

    question: str
    reference: str
    solution: str = ""
    id: str = ""
    subject: str = ""
    level: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response as text.  `truncated`: it hit the length limit, no EOS was sampled."""

    text: str
    truncated: bool = False
    tokens: int = 0


class Verdict(enum.StrEnum):
    """The rule verifier's answer.  Only the decidable ones may label anything; the rest abstain."""

    CORRECT = "correct"
    WRONG = "wrong"  # an answer of a recognised form that is unequal to the reference
    NO_ANSWER = "no_answer"
    UNRECOGNISED = "unrecognised"  # an answer (or a reference) of a form the rule cannot compare
    TIMEOUT = "timeout"

    @property
    def decidable(self) -> bool:
        return self in (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER)


@dataclasses.dataclass(frozen=True)
class Triple:
    """What the reward model reads, with the label that it should give (1.0 correct, 0.0 not).

    The rest says where it comes from, "" where the data do not: `id` of the row, `source` (a data set), `model`
    (who wrote the completion), `kind` (of answer).
    """

    question: str
    reference: str
    completion: str
    label: float = 0.0
    id: str = ""
    source: str = ""
    model: str = ""
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A contrastive pair: both members answer the same problem and render alike but for what sets them apart.

    That is their text; or, where one of the references below is not empty, the reference beside one text.
    """

    problem: Problem
    positive: str
    negative: str
    row: int  # the rollout row that the positive came from
    positive_reference: str = ""  # beside the positive, in place of the problem's own
    negative_reference: str = ""  # beside the negative, likewise
    exchanged: bool = False  # a control: the update takes each member for the other


# --- arrays: pytrees ---------------------------------------------------------------------------------


@struct.dataclass
class Rollout:
    """Sampled responses, right-padded with zeros."""

    tokens: jax.Array  # i32[N, T]
    mask: jax.Array  # bool[N, T]: sampled tokens, the EOS included
    logprobs: jax.Array  # f32[N, T]: under the distribution sampled from (after T, top-k, top-p)
    finished: jax.Array  # bool[N]: an EOS was sampled; False means truncated


@struct.dataclass
class PolicyBatch:
    """The rows that a GRPO update reads.  Prompts are left-padded, so responses start at the same column P."""

    tokens: jax.Array  # i32[N, P + T]
    valid: jax.Array  # bool[N, P + T]
    response_mask: jax.Array  # bool[N, T]
    advantages: jax.Array  # f32[N]
    old_logprobs: jax.Array  # f32[N, T]: the policy's before this step; read where a step has several updates
    ref_logprobs: jax.Array  # f32[N, T]: the frozen reference's
    rollout_logprobs: jax.Array  # f32[N, T]: the sampler's own, for the mismatch metric


@struct.dataclass
class ScoreBatch:
    """Reward-model inputs; padding may be on either side."""

    tokens: jax.Array  # i32[N, S]
    valid: jax.Array  # bool[N, S]


@struct.dataclass
class PairBatch:
    """Contrastive pairs; masked rows weigh nothing."""

    positive: ScoreBatch
    negative: ScoreBatch
    mask: jax.Array  # bool[B]


@struct.dataclass
class LabelledBatch:
    """Rows with the label that the reward model should give; rows of weight 0 count for nothing."""

    rows: ScoreBatch
    labels: jax.Array  # f32[N]: 1 correct, 0 not
    weights: jax.Array  # f32[N]


@struct.dataclass
class TrainState:
    """f32 master weights with their optimiser."""

    params: Params
    opt_state: Any
    updates: jax.Array  # i32[]: updates applied
    skipped: jax.Array  # i32[]: updates left out because loss or gradients were not finite
