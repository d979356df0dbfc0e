"""Packing of token lists into rectangular arrays, on the host.

Widths are rounded up to a multiple of `bucket` (few shapes, few compilations), and the number of rows to a
multiple of `rows_multiple` (a batch is sharded over the mesh).  Rows that are added are invalid everywhere.

    B prompts   G samples a prompt   N = B * G   P prompt tokens   T response tokens   S tokens of a whole row
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from cooper_jax.types import PolicyBatch, Rollout, ScoreBatch


def round_up(n: int, multiple: int) -> int:
    """The least positive multiple of `multiple` that is at least n."""
    return -(-max(n, 1) // multiple) * multiple


def pad_tokens(
    rows: Sequence[Sequence[int]], *, left: bool, bucket: int, rows_multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> (tokens i32[N, S], valid bool[N, S]), padded with zeros on one side.

    left: pad on the left, so that all rows end at the same column.
    """
    width = round_up(max((len(row) for row in rows), default=1), bucket)
    count = round_up(len(rows), rows_multiple)

    tokens = np.zeros((count, width), np.int32)
    valid = np.zeros((count, width), bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, columns] = row
        valid[i, columns] = True
    return tokens, valid


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """x [n, ...] -> [rows, ...], with rows of zeros at the end."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def pack_score_batch(rows: Sequence[Sequence[int]], *, bucket: int, rows_multiple: int = 1) -> ScoreBatch:
    """Reward-model inputs as a batch of NumPy arrays [N, S], right-padded."""
    tokens, valid = pad_tokens(rows, left=False, bucket=bucket, rows_multiple=rows_multiple)
    return ScoreBatch(tokens=_as_array(tokens), valid=_as_array(valid))


def _as_array(x: np.ndarray) -> jax.Array:
    """The array itself, for the type checker: batches hold NumPy arrays until they are put on devices."""
    return cast(jax.Array, x)


def pack_policy_batch(
    prompts: Sequence[Sequence[int]], rollout: Rollout, *, bucket: int, rows_multiple: int = 1
) -> PolicyBatch:
    """Prompts (B) and their rollout (N rows) as a batch of NumPy arrays, advantages and log-probabilities 0.

    Responses are truncated to the longest one, rounded up to `bucket`: columns that no response uses cost as
    much as others.
    """
    group_size = rollout.tokens.shape[0] // len(prompts)
    responses = np.asarray(rollout.tokens)  # i32[N, T]
    mask = np.asarray(rollout.mask)  # bool[N, T]
    logprobs = np.asarray(rollout.logprobs, np.float32)  # f32[N, T]

    longest = int(mask.sum(1).max(initial=1))
    width = min(round_up(longest, bucket), responses.shape[1])
    rows = round_up(len(responses), rows_multiple)
    responses, mask, logprobs = (pad_rows(x[:, :width], rows) for x in (responses, mask, logprobs))

    # Each prompt stands before all of its samples.
    prompt_tokens, prompt_valid = pad_tokens(prompts, left=True, bucket=bucket)  # [B, P]
    prompt_tokens = pad_rows(np.repeat(prompt_tokens, group_size, 0), rows)
    prompt_valid = pad_rows(np.repeat(prompt_valid, group_size, 0), rows)

    zeros = np.zeros_like(logprobs)
    return PolicyBatch(
        tokens=_as_array(np.concatenate([prompt_tokens, responses], 1)),
        valid=_as_array(np.concatenate([prompt_valid, mask], 1)),
        response_mask=_as_array(mask),
        advantages=_as_array(np.zeros((rows,), np.float32)),
        old_logprobs=_as_array(zeros),
        ref_logprobs=_as_array(zeros),
        rollout_logprobs=_as_array(np.where(mask, logprobs, 0)),
    )
