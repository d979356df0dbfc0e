"""Batches of rows of uneven length, packed into microbatches of few shapes.

1. `order_batches` shuffles an epoch and splits it into batches of equal size.  The split does not depend on
   the rows' lengths, so every batch is an unbiased sample.
2. `choose_shapes` picks a few widths that pad the given lengths least.  Each width has microbatches of
   two row counts: as many rows as a token budget holds, and half as many.  Few shapes mean few programs to
   compile, and little padding keeps updates fast.
3. `split_microbatches` sorts a batch by length and splits it into microbatches with the fewest tokens.  The
   order of rows within a batch has no effect, because the gradients of its microbatches are summed.

    N  rows   S  width (tokens per row)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.data import packing
from cooper_jax.runtime import keys
from cooper_jax.types import ScoreBatch


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a microbatch."""

    rows: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch, padding included."""
        return self.rows * self.width


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """At most `shape.rows` row indices; padding rows fill the rest of the microbatch."""

    rows: np.ndarray  # i64[n]
    shape: Shape


def order_batches(num_rows: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffle an epoch's rows into batches of row indices, i64[<= batch_size] each; every row occurs once.

    The order depends on (seed, epoch) only.  Batch sizes differ by at most one: a small last batch would get
    as large an update as the others, from a noisier gradient.
    """
    shuffled = keys.make_generator(seed, "train_rm", epoch).permutation(num_rows)
    return np.array_split(shuffled, count_updates_per_epoch(num_rows, batch_size))


def count_updates_per_epoch(num_rows: int, batch_size: int) -> int:
    """The number of updates in an epoch, ceil(num_rows / batch_size)."""
    return -(-num_rows // batch_size)


def choose_shapes(
    lengths: Sequence[int] | np.ndarray,
    *,
    bucket: int,
    max_widths: int,
    token_budget: int,
    batch_size: int,
    rows_multiple: int = 1,
) -> tuple[Shape, ...]:
    """Choose the microbatch shapes that add the least padding to rows of the given lengths.

    Args:
      lengths: tokens of each row, [N]; the widest shape holds the longest row.
      bucket: all widths are multiples of it.
      max_widths: the maximum number of different widths.
      token_budget: the maximum number of tokens in a microbatch.
      batch_size: the maximum number of rows in a microbatch.
      rows_multiple: all row counts are multiples of it, even where that exceeds the two limits above.

    Returns shapes of ascending width.  Each width has a full shape first, then one of half the tokens, for
    the remainder of a batch.
    """
    # Lengths are compared after rounding to the bucket, so there are few distinct widths to choose from.
    rounded = -(-np.maximum(np.asarray(lengths), 1) // bucket) * bucket
    widths, counts = np.unique(rounded, return_counts=True)
    max_rows = packing.round_up(batch_size, rows_multiple)

    def fit_rows(tokens: int, width: int) -> int:
        # At least one row per data shard, even if that alone exceeds the token budget.
        multiples = max(tokens // width // rows_multiple, 1)
        return min(multiples * rows_multiple, max_rows)

    shapes = []
    for width in _choose_widths(widths, counts, max_widths):
        full = fit_rows(token_budget, width)
        half = fit_rows(full * width // 2, width)
        # Both are equal if a full microbatch has the minimum number of rows already; it is listed once.
        shapes += [Shape(rows, width) for rows in dict.fromkeys((full, half))]
    return tuple(shapes)


def _choose_widths(widths: np.ndarray, counts: np.ndarray, max_widths: int) -> list[int]:
    """Choose at most `max_widths` of the widths, ascending, such that the rows need the least padding.

    Args:
      widths: ascending, i64[n].
      counts: rows of each width, i64[n].

    Dynamic programming over the widths takes O(max_widths * n^2) operations.
    """
    n = len(widths)
    # rows_before[j]: rows of the first j widths.
    rows_before = np.concatenate([[0], np.cumsum(counts)])

    # cost[k, j]: tokens, padding included, of the rows of the first j widths if k widths are chosen and the
    # largest chosen one is widths[j - 1].
    # previous[k, j]: the index j of the next smaller chosen width.
    cost = np.full((min(max_widths, n) + 1, n + 1), np.inf)
    previous = np.zeros_like(cost, int)
    cost[0, 0] = 0
    for k in range(1, len(cost)):
        for j in range(1, n + 1):
            # candidates[i]: rows of widths i to j - 1 are padded to widths[j - 1]; the others cost
            # cost[k - 1, i].
            candidates = cost[k - 1, :j] + widths[j - 1] * (rows_before[j] - rows_before[:j])
            previous[k, j] = candidates.argmin()
            cost[k, j] = candidates.min()

    # Follow the choices back from the largest width, which is always chosen.
    k, j = int(cost[:, n].argmin()), n
    chosen = []
    while k:
        chosen.append(int(widths[j - 1]))
        k, j = k - 1, int(previous[k, j])
    return chosen[::-1]


def split_microbatches(rows: np.ndarray, lengths: np.ndarray, shapes: Sequence[Shape]) -> list[Microbatch]:
    """Split a batch into microbatches of the given shapes, widest first, with the fewest tokens in total.

    Args:
      rows: row indices of the batch, i64[n].
      lengths: tokens of every row of the data, i64[N].
      shapes: as from `choose_shapes`; if two of them lead to equally many tokens, the first is used.

    A microbatch has the narrowest width that fits its longest row.  Dynamic programming over the row at
    which a microbatch begins.
    """
    # Longest rows first: each microbatch's first row decides its width.
    ordered = np.asarray(rows)[np.argsort(-lengths[rows], kind="stable")]
    n = len(ordered)
    # The row counts that are available at each width, and the narrowest width that fits each row.
    widths = sorted({shape.width for shape in shapes})
    shapes_by_width: dict[int, list[Shape]] = {width: [] for width in widths}
    for shape in shapes:
        shapes_by_width[shape.width].append(shape)
    needed_widths = [widths[k] for k in np.searchsorted(widths, lengths[ordered])]

    # tokens[i]: the fewest tokens in which rows i to n - 1 fit; first_shapes[i]: the shape of the microbatch
    # that begins at row i in that solution.
    tokens = [0] * (n + 1)
    first_shapes = [shapes[0]] * n
    for i in reversed(range(n)):
        candidates = shapes_by_width[needed_widths[i]]
        costs = [shape.tokens + tokens[min(i + shape.rows, n)] for shape in candidates]
        tokens[i] = min(costs)
        first_shapes[i] = candidates[costs.index(tokens[i])]

    # Follow the choices from the first row.
    microbatches = []
    i = 0
    while i < n:
        shape = first_shapes[i]
        microbatches.append(Microbatch(ordered[i : i + shape.rows], shape))
        i += shape.rows
    return microbatches


def pack_microbatch(tokens: Sequence[Sequence[int]], microbatch: Microbatch) -> ScoreBatch:
    """Pack a microbatch's tokens into [rows, S], padded on the right; padding rows have no valid token.

    tokens: the token ids of every row of the data.
    """
    shape = microbatch.shape
    rows = [tokens[i] for i in microbatch.rows]
    batch = packing.pack_score_batch(rows, bucket=shape.width, rows_multiple=shape.rows)
    assert batch.tokens.shape == (shape.rows, shape.width), batch.tokens.shape
    return batch


def compute_padding_share(microbatches: Sequence[Microbatch], lengths: np.ndarray) -> float:
    """The share of padding among the microbatches' tokens.

    lengths: tokens of every row of the data, i64[N].
    """
    valid = sum(int(lengths[m.rows].sum()) for m in microbatches)
    return 1.0 - valid / sum(m.shape.tokens for m in microbatches)
