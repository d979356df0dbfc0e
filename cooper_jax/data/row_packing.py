"""Packing of sequences of uneven length into rows of equal length, on the host.

A batch padded to its longest response is mostly padding.  Here several sequences share a row, one behind the
other, and `transformer.packed_hidden_states` keeps them apart:

1. `choose_packing` chooses the length of rows, once for a run.
2. `assign_rows` assigns sequences to rows (best fit, longest first).
3. `pack_policy_rows` makes the arrays that grpo.py computes on, `pack_reward_rows` those of verifier_model.py.

The arrays of a run have few shapes, so that few programs are compiled: M has room for each sequence in a row of
its own, and `PackedRows.count` says how many of the microbatches hold sequences.  The others are not computed.

    N  sequences (rows of the unpacked batch)   S  columns of the unpacked batch   T  response columns
    M  microbatches   R  rows of a microbatch   C  tokens of a row   Q  response tokens of a row, at most
    K  sequences of a row, at most
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from cooper_jax.data.packing import as_array, round_up
from cooper_jax.types import PackedRows

# A row holds at most one sequence for every so many tokens, and at least MIN_SEQUENCES.
TOKENS_PER_SEQUENCE, MIN_SEQUENCES = 32, 16
PASS_COST = 0.02  # time of a microbatch beside its rows, as a share of the largest microbatch's
RESPONSE_WIDTHS = 4  # Q is a multiple of C / 4, so that it has four values at most


@dataclasses.dataclass(frozen=True)
class Packing:
    """The sizes of a run's packed rows."""

    row_tokens: int  # C
    rows: int  # R, at most; a multiple of the mesh's batch shards

    @property
    def sequences(self) -> int:
        """K."""
        return max(MIN_SEQUENCES, round_up(self.row_tokens // TOKENS_PER_SEQUENCE, 2))

    def count_read(self, tokens: int) -> int:
        """Q for rows with at most so many response tokens: a multiple of a part of C, so that it has few values."""
        return min(round_up(tokens, -(-self.row_tokens // RESPONSE_WIDTHS)), self.row_tokens)

    def choose_microbatches(self, used: int, sequences: int, shards: int) -> tuple[int, int]:
        """Choose (M, R) for `used` rows, with room for each of so many sequences in a row of its own.

        Of microbatches between the largest and half of it, those are taken with which the fewest rows are computed;
        each microbatch counts as PASS_COST of the largest one in addition.  Sizes are in steps of about an eighth,
        so that batches of similar sizes have the same R.
        """
        most = -(-min(self.rows, sequences) // shards)  # rows of a shard
        needed = max(-(-used // shards), 1)
        most = min(most, _round_up_size(needed))
        sizes = {min(_round_up_size(rows), most) for rows in range(-(-most // 2), most + 1)}
        costs = {rows: -(-needed // rows) * (rows + PASS_COST * most) for rows in sizes}
        rows = min(sizes, key=lambda rows: (costs[rows], -rows)) * shards
        return -(-sequences // rows), rows


def _round_up_size(rows: int) -> int:
    """Round up by at most an eighth: 1, 2, .. 16, 18, .. 32, 36, .. 64, 72, .."""
    return round_up(rows, 1 << max((rows - 1).bit_length() - 4, 0))


def choose_packing(longest: int, microbatch: int, shards: int, *, width: int, bucket: int) -> Packing:
    """Choose the sizes of packed rows, once for a run.

    Longer rows have less padding where most sequences are nearly as long as the longest one.  But attention, whose
    cost grows with C, also computes scores between sequences: they take about C / (12 width) of the time of the
    matrix products.  So C is the longest sequence, or two to four times as much if that is at most `width`: a whole
    multiple, so that sequences which are all of the largest length leave no padding.  A microbatch has no more
    tokens than its longest sequences have, on each shard.

    Args:
      longest: tokens of the longest sequence that may occur.
      microbatch: as many of these sequences make a microbatch, rounded up to a multiple of `shards`.
      shards: of a batch over the mesh.
      width: the model's.
      bucket: C is a multiple of it.
    """
    longest = round_up(longest, bucket)
    fitting = -(-microbatch // shards)  # of the longest sequences in a microbatch, on one shard
    multiple = max(min(width // longest, 4, fitting), 1)
    return Packing(multiple * longest, fitting // multiple * shards)


def assign_rows(lengths: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """Assign sequences to rows of at most `capacity` tokens and `most` sequences -> the sequences of each row.

    The longest sequence comes first; each goes to the fullest row that has room for it.  Sequences without a token
    are in no row.  Raises ValueError for a sequence of more than `capacity` tokens.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens that are left, row), ascending; full rows are not in it
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        if length > capacity:
            raise ValueError(f"sequence {i} has {length} tokens; a packed row has {capacity}")
        if length == 0:
            continue
        place = bisect.bisect_left(free, (length, -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > length and len(rows[row]) < most:
            bisect.insort(free, (left - length, row))
    return rows


def measure_padding(packed: PackedRows) -> float:
    """The share of padding among the tokens that are computed; 0 if there are none."""
    segments = np.asarray(packed.segments)[: None if packed.count is None else int(packed.count)]
    return float(1 - (segments > 0).mean()) if segments.size else 0.0


def pack_policy_rows(
    tokens: np.ndarray,  # i32[N, S], left-padded prompts and then T columns of responses
    valid: np.ndarray,  # bool[N, S]
    response_length: int,  # T
    plan: Packing,
    shards: int = 1,
) -> PackedRows:
    """Pack a policy's batch -> NumPy arrays.

    Raises ValueError for a sequence of more than C tokens, and for a response without a prompt.
    """
    count, total = valid.shape
    lengths = valid.sum(axis=1)
    prompt_lengths = valid[:, : total - response_length].sum(axis=1)
    if (orphans := np.flatnonzero((prompt_lengths == 0) & (lengths > 0))).size:
        raise ValueError(f"row {orphans[0]} has a response and no prompt")
    assigned = assign_rows(lengths.tolist(), plan.row_tokens, plan.sequences)
    microbatches, size = plan.choose_microbatches(len(assigned), count, shards)

    responses = np.where(lengths > 0, lengths - prompt_lengths, 0)
    read = plan.count_read(max((int(responses[members].sum()) for members in assigned), default=1))
    predictors = np.zeros((microbatches * size, read), np.int32)
    first = np.zeros((microbatches * size, plan.sequences), np.int32)
    for r, members in enumerate(assigned):
        # The hidden state of a column predicts the token of the next one.
        ends = np.cumsum(lengths[members])
        columns = [np.arange(end - responses[n], end) - 1 for n, end in zip(members, ends, strict=True)]
        predicted = np.concatenate(columns)
        predictors[r, : len(predicted)] = predicted
        first[r, : len(members)] = np.cumsum(responses[members]) - responses[members]
    sequences = [tokens[n, valid[n]] for n in range(count)]
    return _fill_rows(sequences, assigned, plan, (microbatches, size), predictors, first)


def pack_reward_rows(
    sequences: Sequence[Sequence[int]], plan: Packing, shards: int = 1, *, together: int = 1
) -> PackedRows:
    """Pack the reward model's inputs -> NumPy arrays.

    together: so many neighbouring sequences are packed into one row, side by side: 2 for the members of pairs.  It
      divides K and the number of sequences.

    Raises ValueError for inputs that have more than C tokens together.
    """
    units = [list(range(i, i + together)) if sequences[i] else [] for i in range(0, len(sequences), together)]
    lengths = [sum(len(sequences[i]) for i in unit) for unit in units]
    rows = assign_rows(lengths, plan.row_tokens, plan.sequences // together)
    assigned = [[i for unit in row for i in units[unit]] for row in rows]
    microbatches, size = plan.choose_microbatches(len(assigned), len(units), shards)

    last = np.zeros((microbatches * size, plan.sequences), np.int32)
    for r, members in enumerate(assigned):
        last[r, : len(members)] = np.cumsum([len(sequences[i]) for i in members]) - 1
    return _fill_rows(sequences, assigned, plan, (microbatches, size), last, None)


def _fill_rows(
    sequences: Sequence[Sequence[int] | np.ndarray],
    assigned: list[list[int]],
    plan: Packing,
    sizes: tuple[int, int],  # M, R
    predictors: np.ndarray,
    first: np.ndarray | None,
) -> PackedRows:
    """Write the assigned sequences of each row, one behind the other."""
    microbatches, size = sizes
    tokens, segments, positions = (
        np.zeros((microbatches * size, plan.row_tokens), np.int32) for _ in range(3)
    )
    rows = np.full((microbatches * size, plan.sequences), -1, np.int32)
    for r, members in enumerate(assigned):
        rows[r, : len(members)] = members
        start = 0
        for k, n in enumerate(members):
            end = start + len(sequences[n])
            tokens[r, start:end] = sequences[n]
            segments[r, start:end] = k + 1
            positions[r, start:end] = np.arange(end - start)
            start = end

    def split(x: np.ndarray) -> jax.Array:
        return as_array(x.reshape(microbatches, size, -1))

    return PackedRows(
        tokens=split(tokens),
        segments=split(segments),
        positions=split(positions),
        predictors=split(predictors),
        rows=split(rows),
        first=None if first is None else split(first),
        count=as_array(np.array(-(-len(assigned) // size), np.int32)),
    )
