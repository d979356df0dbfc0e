"""Packing of sequences of uneven length into rows of equal length, on the host.

A batch padded to its longest response is mostly padding.  Here several sequences share a row, one behind the
other, and `transformer.packed_hidden_states` keeps them apart:

1. `choose_packing` chooses the length of rows, once for a run.
2. `assign_rows` assigns sequences to rows (best fit, longest first).
3. `pack_policy_rows` makes the arrays that grpo.py computes on, `pack_reward_rows` those of verifier_model.py.

Where attention allows (`kernels.attention.supports_prefixes`), the responses to a prompt that share a row share the
prompt, too: it comes once, and each response attends to it and to itself.

The arrays of all steps have the same shapes, so that nothing is compiled after the first: M has room for each
sequence in a row of its own, and `PackedRows.count` says how many of the microbatches hold sequences.  The others
are not computed.

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
USUAL_LENGTH = 1 / 3  # of a sequence, as a share of the longest that may occur: 0.3 to 0.4 with GSM8K
USUAL_SHARED_LENGTH = 1 / 6  # the same without a prompt that it shares
MIN_PASSES = 12  # microbatches of a batch, at least, as far as R allows
READ_PARTS = 4  # Q is a multiple of C / 4


@dataclasses.dataclass(frozen=True)
class Packing:
    """The sizes of a run's packed rows."""

    row_tokens: int  # C
    rows: int  # R, at most; a multiple of the mesh's batch shards
    longest_in_row: int = 1  # sequences of the largest length that a row holds
    read: int = 0  # Q of the policy's rows; 0: C
    shares_prompts: bool = False  # the responses to a prompt that are in one row share it

    @property
    def sequences(self) -> int:
        """K."""
        return max(MIN_SEQUENCES, round_up(self.row_tokens // TOKENS_PER_SEQUENCE, 2))

    @property
    def read_tokens(self) -> int:
        """Q."""
        return self.read or self.row_tokens

    def choose_microbatches(self, sequences: int, shards: int) -> tuple[int, int]:
        """Choose (M, R) for so many sequences, with room for each of them in a row of its own.

        R does not depend on the sequences' lengths, so that one program serves all steps.  On average half of the
        last microbatch is padding; so R is such that sequences of usual lengths fill MIN_PASSES microbatches, if
        memory allows no fewer.
        """
        usual = USUAL_SHARED_LENGTH if self.shares_prompts else USUAL_LENGTH
        expected = sequences * usual / (self.longest_in_row * shards)  # rows of a shard
        rows = max(min(int(expected / MIN_PASSES), self.rows // shards), 1) * shards
        return -(-sequences // rows), rows


def choose_packing(
    longest: int,
    microbatch: int,
    shards: int,
    *,
    width: int,
    bucket: int,
    new_tokens: int = 0,
    shortest_prompt: int = 1,
    shares_prompts: bool = False,
) -> Packing:
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
      new_tokens, shortest_prompt: of the policy's sequences, tokens of the longest response and of the shortest
        prompt; 0 for new_tokens: the hidden states of all columns may be read.
      shares_prompts: see Packing.
    """
    longest = round_up(longest, bucket)
    fitting = -(-microbatch // shards)  # of the longest sequences in a microbatch, on one shard
    multiple = max(min(width // longest, 4, fitting), 1)
    plan = Packing(multiple * longest, fitting // multiple * shards, multiple, shares_prompts=shares_prompts)

    # The most response tokens that a row of k sequences may have: their prompts take k shortest ones at least, or
    # one if they share it.
    most = 0
    for k in range(1, plan.sequences + 1):
        prompts = 1 if shares_prompts else k
        most = max(most, min(k * new_tokens, plan.row_tokens - prompts * shortest_prompt))
    part = -(-plan.row_tokens // READ_PARTS)
    return dataclasses.replace(plan, read=min(round_up(most, part), plan.row_tokens) if most else 0)


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
    responses = np.where(lengths > 0, lengths - prompt_lengths, 0)
    sequences = [tokens[n, valid[n]] for n in range(count)]
    if plan.shares_prompts:
        assigned = _assign_groups(sequences, responses, plan)
    else:
        whole = assign_rows(lengths.tolist(), plan.row_tokens, plan.sequences)
        assigned = [[[n] for n in row] for row in whole]
    microbatches, size = plan.choose_microbatches(count, shards)
    rows = [_lay_out_row(units, sequences, responses) for units in assigned]
    return _fill_rows(rows, plan, (microbatches, size), plan.read_tokens, of_policy=True)


@dataclasses.dataclass
class _Row:
    """The contents of a row of C tokens."""

    members: list[int] = dataclasses.field(default_factory=list)  # the sequences
    first: list[int] = dataclasses.field(default_factory=list)  # see PackedRows.first

    # One for each token.
    tokens: list[int] = dataclasses.field(default_factory=list)
    segments: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    prefixes: list[int] = dataclasses.field(default_factory=list)

    # One for each hidden state that is read.
    predictors: list[int] = dataclasses.field(default_factory=list)
    targets: list[int] = dataclasses.field(default_factory=list)

    def add_segment(self, tokens: Sequence[int] | np.ndarray, position: int = 0, prefix: int = 0) -> None:
        """Add a segment.  position: of its first token.  prefix: the segment of its prompt; 0: it has none."""
        segment = (self.segments[-1] if self.segments else 0) + 1
        self.tokens += list(tokens)
        self.segments += [segment] * len(tokens)
        self.positions += range(position, position + len(tokens))
        self.prefixes += [prefix or segment] * len(tokens)

    def read_response(self, member: int, response: Sequence[int] | np.ndarray, before: int) -> None:
        """Read the hidden states that predict a response, which ends the row as it is now.

        before: the column of the prompt's last token.
        """
        self.members.append(member)
        self.first.append(len(self.targets))
        if len(response):
            # The hidden state of a column predicts the token of the next one, or of the response's first one.
            begin = len(self.tokens) - len(response)
            self.predictors += [before, *range(begin, len(self.tokens) - 1)]
            self.targets += list(response)


def _assign_groups(
    sequences: Sequence[np.ndarray],
    responses: np.ndarray,  # i64[N], tokens of each response
    plan: Packing,
) -> list[list[list[int]]]:
    """Assign responses to rows -> the units of each row: responses to one prompt, which they share.

    The longest group comes first, and goes to the fullest row that has room for it.  If none has, a part of it goes
    to the emptiest row, as long as that part has more tokens than the prompt that is then computed once more.
    Sequences without a response are in no row.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for n, sequence in enumerate(sequences):
        if responses[n]:
            by_prompt.setdefault(sequence[: len(sequence) - responses[n]].tobytes(), []).append(n)
    groups = []
    for members in by_prompt.values():
        prompt = len(sequences[members[0]]) - int(responses[members[0]])
        groups.append((prompt, sorted(members, key=lambda n: (-responses[n], n))))

    rows: list[list[list[int]]] = []
    free: list[int] = []  # tokens that are left in each row
    room: list[int] = []  # of K
    for prompt, left in sorted(groups, key=lambda group: -(group[0] + int(responses[group[1]].sum()))):
        while left:
            total = prompt + int(responses[left].sum())
            fitting = [r for r in range(len(rows)) if free[r] >= total and room[r] >= len(left)]
            if fitting:
                row, part = min(fitting, key=lambda r: free[r]), left
            else:
                row = max(range(len(rows)), key=lambda r: (free[r], -r), default=-1)
                part = [] if row < 0 else _take_fitting(left, responses, free[row] - prompt, room[row])
                if responses[part].sum() <= prompt:
                    row, part = (
                        len(rows),
                        _take_fitting(left, responses, plan.row_tokens - prompt, plan.sequences),
                    )
                    rows.append([])
                    free.append(plan.row_tokens)
                    room.append(plan.sequences)
            rows[row].append(part)
            free[row] -= prompt + int(responses[part].sum())
            room[row] -= len(part)
            taken = set(part)
            left = [n for n in left if n not in taken]
    return rows


def _take_fitting(members: Sequence[int], responses: np.ndarray, tokens: int, count: int) -> list[int]:
    """Take responses, in their order, as long as they have at most so many tokens and are at most so many."""
    taken: list[int] = []
    for n in members:
        if responses[n] <= tokens and len(taken) < count:
            taken.append(n)
            tokens -= int(responses[n])
    return taken


def _lay_out_row(
    units: Sequence[Sequence[int]], sequences: Sequence[np.ndarray], responses: np.ndarray
) -> _Row:
    """The row of these units, one behind the other: a prompt and its response, or all its responses."""
    row = _Row()
    for unit in units:
        length = len(sequences[unit[0]]) - responses[unit[0]]  # of the prompt
        if len(unit) == 1:
            row.add_segment(sequences[unit[0]])
            before = len(row.tokens) - int(responses[unit[0]]) - 1
            row.read_response(unit[0], sequences[unit[0]][length:], before)
            continue
        row.add_segment(sequences[unit[0]][:length])
        before, prompt = len(row.tokens) - 1, row.segments[-1]
        for n in unit:
            row.add_segment(sequences[n][length:], position=length, prefix=prompt)
            row.read_response(n, sequences[n][length:], before)
    return row


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
    chosen = assign_rows(lengths, plan.row_tokens, plan.sequences // together)
    assigned = [[i for unit in row for i in units[unit]] for row in chosen]
    microbatches, size = plan.choose_microbatches(len(units), shards)

    rows_of_units = []
    for members in assigned:
        row = _Row(members=members)
        for n in members:
            row.add_segment(sequences[n])
            row.predictors.append(len(row.tokens) - 1)
        rows_of_units.append(row)
    return _fill_rows(rows_of_units, plan, (microbatches, size), plan.sequences, of_policy=False)


def _fill_rows(
    rows: Sequence[_Row],
    plan: Packing,
    sizes: tuple[int, int],  # M, R
    read: int,  # Q
    *,
    of_policy: bool,
) -> PackedRows:
    """Write rows to the arrays of a batch."""
    microbatches, size = sizes

    def write(name: str, columns: int, empty: int = 0) -> jax.Array:
        out = np.full((microbatches * size, columns), empty, np.int32)
        for r, row in enumerate(rows):
            values = getattr(row, name)
            out[r, : len(values)] = values
        return as_array(out.reshape(microbatches, size, -1))

    return PackedRows(
        tokens=write("tokens", plan.row_tokens),
        segments=write("segments", plan.row_tokens),
        positions=write("positions", plan.row_tokens),
        predictors=write("predictors", read),
        rows=write("members", plan.sequences, empty=-1),
        first=write("first", plan.sequences) if of_policy else None,
        targets=write("targets", read) if of_policy else None,
        prefixes=write("prefixes", plan.row_tokens) if plan.shares_prompts else None,
        count=as_array(np.array(-(-len(rows) // size), np.int32)),
    )
