"""Data passed between the stages of a Cooper step.  No container mixes text with arrays.

Axis legend of the project:

    B  prompts in a step               P  prompt tokens
    G  samples per prompt              T  response (completion) tokens
    N  = B * G rows, prompt-major      S  tokens of a row (P + T, or a reward model's input)
    D  width   H  query heads   K  key/value heads   h  head_dim   F  feed-forward width
    L  layers  V  vocabulary (padded)

Rows are prompt-major: row n is sample n % G of prompt n // G.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
from flax import struct

Params = dict[str, Any]  # a nested dict of arrays with stable paths, by which checkpoints name them
Metrics = dict[str, float]  # "group/name" -> a Python float, as in metrics.jsonl

# --- text: frozen dataclasses, on the host only -----------------------------------------------------
#
# Every process has the same text, so none of it is sharded or transferred.


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    question: str
    reference: str

    # A worked solution, if the data has one.  Supervised phases imitate it; the reward never reads it.
    solution: str = ""

    # The row's origin, for messages.
    id: str = ""

    # Evaluations report results by subject and by level, if the data has them.
    subject: str = ""
    level: str = ""

    # The policy's prompt as (role, content) messages, if the data has it in this form; `question` is then the
    # text of the last one.  Empty: the prompt is made from the question.
    messages: tuple[tuple[str, str], ...] = ()

    # The name of the problem's source, by which evaluations on several sources report their results.
    source: str = dataclasses.field(default="", compare=False)

    # All columns of the data row, as JSON's types, for reward functions; empty for synthetic problems.  Not
    # compared: a mapping has no hash, and problems are keys of dicts.
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response as text."""

    text: str
    truncated: bool = False  # the length limit was reached before an EOS was sampled
    tokens: int = 0


class Verdict(enum.StrEnum):
    """The rule verifier's verdict on a response: decidable (usable as a label) or an abstention."""

    # Decidable.
    CORRECT = "correct"
    WRONG = "wrong"  # an answer of a recognised form that differs from the reference
    NO_ANSWER = "no_answer"

    # Abstentions: the response may be correct, so using them as labels would teach errors of the rule.
    UNRECOGNISED = "unrecognised"  # an answer or a reference of a form that the rule cannot compare
    TIMEOUT = "timeout"

    @property
    def decidable(self) -> bool:
        """True for verdicts that may be used as labels."""
        return self in (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER)


@dataclasses.dataclass(frozen=True)
class Triple:
    """A reward-model input (question, reference, completion) with its label and its origin."""

    # The input.  One template (data/prompts.py) renders it for training and for scoring.
    question: str
    reference: str
    completion: str

    label: float = 0.0  # 1.0 correct, 0.0 not

    # The origin, for splits and for reports by group; "" if unknown.
    id: str = ""  # the row's id in its data set
    source: str = ""  # the data set
    model: str = ""  # the model that wrote the completion
    kind: str = ""  # the data set's type of answer, or a synthetic problem's subject
    label_class: str = ""  # where the data set has more than two classes: correct, incorrect or invalid


@dataclasses.dataclass(frozen=True)
class Pair:
    """A contrastive pair: a correct and a wrong completion of one problem, rendered by the same template.

    The members differ in their text alone, unless one of the references below is not empty: then they have
    the same text and differ in the reference alone.
    """

    problem: Problem
    positive: str
    negative: str
    row: int  # rollout row of the positive

    # If not empty, it replaces the problem's reference in that member.
    positive_reference: str = ""
    negative_reference: str = ""

    # A control experiment with shuffled labels: the update swaps the members.
    exchanged: bool = False


# --- arrays: pytrees ---------------------------------------------------------------------------------
#
# flax.struct registers these frozen dataclasses as pytrees, so jit and donation take them as arguments.


@struct.dataclass
class Rollout:
    """Sampled responses, right-padded with zeros."""

    tokens: jax.Array  # i32[N, T]
    mask: jax.Array  # bool[N, T]: True at sampled tokens, the EOS included
    logprobs: jax.Array  # f32[N, T]: under the sampling distribution (after temperature, top-k, top-p)
    finished: jax.Array  # bool[N]: True if an EOS was sampled, False if the response was truncated
    # f32[N, T]: a token was sampled among those whose logits are above it; None: among all tokens
    thresholds: jax.Array | None = None


@struct.dataclass
class PolicyBatch:
    """Rows of a GRPO update.  Prompts are left-padded, so all responses start at column P."""

    # The model's input.
    tokens: jax.Array  # i32[N, P + T]
    valid: jax.Array  # bool[N, P + T]: False at padding

    # The loss.
    response_mask: jax.Array  # bool[N, T]
    advantages: jax.Array  # f32[N]

    # Log-probabilities of the response tokens, f32[N, T], by the model that they are from.
    old_logprobs: jax.Array  # the policy before this step; read only if a step has several updates
    ref_logprobs: jax.Array  # the frozen reference
    rollout_logprobs: jax.Array  # the rollout engine, for the mismatch metric
    # f32[N, T]: the policy is its softmax over the tokens with logits above it, as in the rollout; None: over all
    thresholds: jax.Array | None = None

    def without_tokens(self) -> PolicyBatch:
        """The batch without the model's input, for a model that reads `PackedRows` in its place."""
        nothing: Any = None
        return dataclasses.replace(self, tokens=nothing, valid=nothing)


@struct.dataclass
class PackedRows:
    """Rows of C tokens that hold several of a batch's N sequences each (data/row_packing.py).

    M microbatches of R rows; a row has at most K sequences and Q response tokens.
    """

    tokens: jax.Array  # i32[M, R, C]
    # i32[M, R, C]: 1, 2, ... for the sequences of a row, or for its prompts and responses; 0 at padding
    segments: jax.Array
    positions: jax.Array  # i32[M, R, C]: places of the tokens in their sequences

    # The columns whose hidden states are read; 0 behind the last one.  The policy's predict the response tokens of
    # a row, one sequence behind the other.  The reward model's are the last tokens of the sequences; Q is K.
    predictors: jax.Array  # i32[M, R, Q]

    rows: jax.Array  # i32[M, R, K]: the index in the batch of each sequence; -1: none
    first: (
        jax.Array | None
    )  # i32[M, R, K]: the policy's; the place of its first response token in `predictors`
    # i32[]: the number of microbatches that hold sequences, which are the first ones; None: all hold some
    count: jax.Array | None

    # The policy's.
    targets: jax.Array | None = None  # i32[M, R, Q]: the response tokens, which `predictors` predict
    # i32[M, R, C]: the segment of each token's prompt, where the responses to a prompt share it; None: they do not
    prefixes: jax.Array | None = None


@struct.dataclass
class ScoreBatch:
    """Reward-model inputs; padding may be on either side."""

    tokens: jax.Array  # i32[N, S]
    valid: jax.Array  # bool[N, S]


@struct.dataclass
class PairBatch:
    """Contrastive pairs: row i of `positive` and row i of `negative` are one pair."""

    positive: ScoreBatch
    negative: ScoreBatch
    mask: jax.Array  # bool[B]: False at rows without a valid pair, which have no weight


@struct.dataclass
class PackedPairs:
    """Contrastive pairs in packed rows: sequence 2 i is the positive of pair i, 2 i + 1 the negative beside it."""

    rows: PackedRows
    mask: jax.Array  # bool[B], as in PairBatch


@struct.dataclass
class PackedLabelled:
    """Labelled reward-model inputs in packed rows."""

    rows: PackedRows
    labels: jax.Array  # f32[N]
    weights: jax.Array  # f32[N], as in LabelledBatch


@struct.dataclass
class LabelledBatch:
    """Labelled reward-model inputs; rows of weight 0 are padding."""

    rows: ScoreBatch
    labels: jax.Array  # f32[N]: 1 correct, 0 not
    weights: jax.Array  # f32[N]: each row's factor in the summed loss


@struct.dataclass
class TrainState:
    """A model's f32 master weights and its optimiser's state."""

    params: Params
    opt_state: Any  # the optax state; its type depends on the optimiser

    # Arrays, not ints: they change inside the jitted update.
    updates: jax.Array  # i32[]: updates applied
    skipped: jax.Array  # i32[]: updates skipped because the loss or a gradient was not finite
