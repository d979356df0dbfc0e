"""Packing of token lists into rectangular arrays, on the host.

Widths are rounded up to a multiple of `bucket`, so that there are few shapes and few compilations.  The
number of rows is rounded up to a multiple of `rows_multiple`, because a batch is sharded over the mesh.  In
the rows that are added, `valid` is False everywhere.

    B   prompts
    G   samples per prompt
    N   rows, B * G
    P   prompt tokens
    T   response tokens
    S   tokens of a whole row, P + T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from cooper_jax.types import PolicyBatch, Rollout, ScoreBatch


def round_up(n: int, multiple: int) -> int:
    """Round n up to a multiple of `multiple`, at least to `multiple` itself."""
    return -(-max(n, 1) // multiple) * multiple


def pad_tokens(
    rows: Sequence[Sequence[int]], *, left: bool, bucket: int, rows_multiple: int = 1, longest: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Pad token lists with zeros to arrays (tokens i32[N, S], valid bool[N, S]).

    left: pad on the left, so that all rows end in the same column.
    longest: the width is enough for so many tokens at least.
    """
    width = round_up(max((len(row) for row in rows), default=1), bucket)
    width = max(width, round_up(longest, bucket))
    count = round_up(len(rows), rows_multiple)

    # Token 0 is a token of the vocabulary; `valid` alone tells padding apart.
    tokens = np.zeros((count, width), np.int32)
    valid = np.zeros((count, width), bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, columns] = row
        valid[i, columns] = True
    return tokens, valid


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Append rows of zeros: x [n, ...] -> [rows, ...]."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def pack_score_batch(rows: Sequence[Sequence[int]], *, bucket: int, rows_multiple: int = 1) -> ScoreBatch:
    """Pack reward-model inputs into a batch of NumPy arrays [N, S], right-padded."""
    tokens, valid = pad_tokens(rows, left=False, bucket=bucket, rows_multiple=rows_multiple)
    return ScoreBatch(tokens=as_array(tokens), valid=as_array(valid))


def as_array(x: np.ndarray) -> jax.Array:
    """Return x, typed as a jax.Array: batches contain NumPy arrays until they are put on devices."""
    return cast(jax.Array, x)


def pack_policy_batch(
    prompts: Sequence[Sequence[int]],
    rollout: Rollout,
    *,
    bucket: int,
    rows_multiple: int = 1,
    longest_prompt: int = 1,
) -> PolicyBatch:
    """Pack B prompts and their rollout of N rows into a batch of NumPy arrays.

    Advantages and the log-probabilities of the policy and the reference are 0; later stages fill them in.  All T
    columns of responses are kept, so that the batches of all steps have one width.

    longest_prompt: tokens of the longest prompt of all batches; P is enough for it.
    """
    group_size = rollout.tokens.shape[0] // len(prompts)
    responses = np.asarray(rollout.tokens)  # i32[N, T]
    mask = np.asarray(rollout.mask)  # bool[N, T]
    logprobs = np.asarray(rollout.logprobs, np.float32)  # f32[N, T]

    rows = round_up(len(responses), rows_multiple)
    responses, mask, logprobs = (
        pad_rows(x, rows) for x in (responses, mask, logprobs)
    )  # [rows, T], rows >= N

    # Row b * G + g is sample g of prompt b, so each prompt is repeated G times.  Left padding puts the last
    # token of every prompt in column P - 1 and the first token of every response in column P.
    prompt_tokens, prompt_valid = pad_tokens(
        prompts, left=True, bucket=bucket, longest=longest_prompt
    )  # [B, P]
    prompt_tokens = pad_rows(np.repeat(prompt_tokens, group_size, 0), rows)
    prompt_valid = pad_rows(np.repeat(prompt_valid, group_size, 0), rows)

    thresholds = None
    if rollout.thresholds is not None:
        bounds = pad_rows(np.asarray(rollout.thresholds, np.float32), rows)
        thresholds = as_array(np.where(mask, bounds, -np.inf))

    # The rollout's log-probabilities are zeroed outside the mask, where the sampler's values mean nothing.
    zeros = np.zeros_like(logprobs)
    return PolicyBatch(
        tokens=as_array(np.concatenate([prompt_tokens, responses], 1)),
        valid=as_array(np.concatenate([prompt_valid, mask], 1)),
        response_mask=as_array(mask),
        advantages=as_array(np.zeros((rows,), np.float32)),
        old_logprobs=as_array(zeros),
        ref_logprobs=as_array(zeros),
        rollout_logprobs=as_array(np.where(mask, logprobs, 0)),
        thresholds=thresholds,
    )
