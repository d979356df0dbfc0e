"""Token lists to rectangular arrays, on the host.

Widths are rounded up to a multiple of `bucket` (few shapes, few compilations) and rows to a multiple of
`rows_multiple` (a batch divides over the mesh); rows that were added are invalid everywhere.

    B prompts   G samples a prompt   N = B * G   P prompt tokens   T response tokens   S tokens of a whole row
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cooper_jax.types import PolicyBatch, Rollout, ScoreBatch


def round_up(n: int, multiple: int) -> int:
    return -(-max(n, 1) // multiple) * multiple


def pad_tokens(
    rows: Sequence[Sequence[int]], *, left: bool, bucket: int, rows_multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> (tokens i32[N, S], valid bool[N, S]), padded with zeros on one side."""
    width = round_up(max((len(r) for r in rows), default=1), bucket)
    n = round_up(len(rows), rows_multiple)
    tokens, valid = np.zeros((n, width), np.int32), np.zeros((n, width), bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place], valid[i, place] = row, True
    return tokens, valid


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """x [n, ...] -> [rows, ...], zeros below."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def pack_score_batch(rows: Sequence[Sequence[int]], *, bucket: int, rows_multiple: int = 1) -> ScoreBatch:
    """Reward-model inputs, right-padded."""
    return ScoreBatch(*pad_tokens(rows, left=False, bucket=bucket, rows_multiple=rows_multiple))


def pack_policy_batch(
    prompts: Sequence[Sequence[int]], rollout: Rollout, *, bucket: int, rows_multiple: int = 1
) -> PolicyBatch:
    """Prompts (B) and their rollout (N rows) as a batch whose log-probabilities are still to be filled in.

    The responses are cut to the longest one, rounded up to `bucket`.
    """
    group = rollout.tokens.shape[0] // len(prompts)
    mask, ids = np.asarray(rollout.mask), np.asarray(rollout.tokens)
    sampled = np.asarray(rollout.logprobs, np.float32)
    longest = int(mask.sum(1).max(initial=1))
    width = min(round_up(longest, bucket), ids.shape[1])
    left, left_valid = pad_tokens(prompts, left=True, bucket=bucket)
    n = round_up(len(ids), rows_multiple)
    ids, mask, sampled = (pad_rows(x[:, :width], n) for x in (ids, mask, sampled))
    left, left_valid = (pad_rows(np.repeat(x, group, 0), n) for x in (left, left_valid))
    zeros = np.zeros_like(sampled)
    return PolicyBatch(
        tokens=np.concatenate([left, ids], 1),
        valid=np.concatenate([left_valid, mask], 1),
        response_mask=mask,
        advantages=np.zeros((n,), np.float32),
        old_logprobs=zeros,
        ref_logprobs=zeros,
        rollout_logprobs=np.where(mask, sampled, 0),
    )
