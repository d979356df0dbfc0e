"""Which rows an update reads, in which order, and in which rectangles.

1. `order` shuffles an epoch and cuts it at random into equal batches: each is an unbiased sample, whatever the
   lengths of its rows.
2. `choose_shapes` picks few widths for the lengths at hand (least padding for that number of widths), each with as
   many rows as a budget of tokens holds, and with half as many: few programs to compile.
3. `cut` sorts a batch by length, so that a row lies beside rows of its own length, and cuts it into such rectangles
   of the fewest tokens.  Within a batch order means nothing: its microbatches are summed.

    N  rows   S  width
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
    """A rectangle of tokens."""

    rows: int
    width: int

    @property
    def tokens(self) -> int:
        return self.rows * self.width


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Rows by their numbers, at most `shape.rows` of them; what is left of the rectangle is padding."""

    rows: np.ndarray  # i64[n]
    shape: Shape


def order_batches(rows: int, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The epoch's batches, i64[<= batch] each: every row once, in an order of (seed, epoch) alone.

    Sizes differ by one at most, so that no small remainder gets an update of full size.
    """
    shuffled = keys.make_generator(seed, "train_rm", epoch).permutation(rows)
    return np.array_split(shuffled, count_updates_per_epoch(rows, batch))


def count_updates_per_epoch(rows: int, batch: int) -> int:
    return -(-rows // batch)


def choose_shapes(
    lengths: Sequence[int], *, bucket: int, most: int, budget: int, batch: int, rows_multiple: int = 1
) -> tuple[Shape, ...]:
    """Rectangles of at most `most` widths, narrowest first, the widest of which holds the longest row.

    Of each width a whole one, and a half one for what is left of a batch; whole ones first.

    Widths are multiples of `bucket`; of all such choices the one that pads the given lengths least (dynamic
    programming over the widths that occur).  budget: tokens of a rectangle, at most; batch: rows of one, at most.
    Rows are a multiple of `rows_multiple`, which goes before both.
    """
    rounded = -(-np.maximum(np.asarray(lengths), 1) // bucket) * bucket
    widths, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    n = len(widths)
    # cost[k][j]: tokens of the first j widths' rows in k chosen widths, the last of which is widths[j - 1].
    cost = np.full((min(most, n) + 1, n + 1), np.inf)
    last = np.zeros_like(cost, int)
    cost[0, 0] = 0
    for k in range(1, len(cost)):
        for j in range(1, n + 1):
            tried = cost[k - 1, :j] + widths[j - 1] * (before[j] - before[:j])
            last[k, j] = tried.argmin()
            cost[k, j] = tried.min()
    k, j = int(cost[:, n].argmin()), n
    chosen = []
    while k:
        chosen.append(int(widths[j - 1]))
        k, j = k - 1, int(last[k, j])
    whole = packing.round_up(batch, rows_multiple)

    def rows(tokens: int, width: int) -> int:
        return min(max(tokens // width // rows_multiple, 1) * rows_multiple, whole)

    out = []
    for width in reversed(chosen):
        full = rows(budget, width)
        out += [Shape(n, width) for n in dict.fromkeys((full, rows(full * width // 2, width)))]
    return tuple(out)


def cut_microbatches(rows: np.ndarray, lengths: np.ndarray, shapes: Sequence[Shape]) -> list[Microbatch]:
    """The rows of a batch in rectangles, widest first.

    lengths: of all rows of the data, by number.  Each rectangle has the width that its longest row needs.  Of all
    cuts of the sorted rows the one of the fewest tokens, with whole rectangles where that is the same (dynamic
    programming over where a rectangle begins).
    """
    ordered = np.asarray(rows)[np.argsort(-lengths[rows], kind="stable")]
    n, widths = len(ordered), sorted({s.width for s in shapes})
    options = {w: [s for s in shapes if s.width == w] for w in widths}
    needed = [widths[k] for k in np.searchsorted(widths, lengths[ordered])]
    tokens, chosen = (
        [0] * (n + 1),
        [shapes[0]] * n,
    )  # from each row on: tokens at least, and its first rectangle
    for i in reversed(range(n)):
        costs = [s.tokens + tokens[min(i + s.rows, n)] for s in options[needed[i]]]
        tokens[i] = min(costs)
        chosen[i] = options[needed[i]][costs.index(tokens[i])]
    out, i = [], 0
    while i < n:
        out.append(Microbatch(ordered[i : i + chosen[i].rows], chosen[i]))
        i += chosen[i].rows
    return out


def fill_rectangle(tokens: Sequence[Sequence[int]], microbatch: Microbatch) -> ScoreBatch:
    """The rectangle itself, right-padded: rows that are not there have no valid token."""
    rows = [tokens[i] for i in microbatch.rows]
    batch = packing.pack_score_batch(rows, bucket=microbatch.shape.width, rows_multiple=microbatch.shape.rows)
    assert batch.tokens.shape == (microbatch.shape.rows, microbatch.shape.width), batch.tokens.shape
    return batch


def padding_share(microbatches: Sequence[Microbatch], lengths: np.ndarray) -> float:
    """The share of the rectangles' tokens that are padding."""
    real = sum(int(lengths[m.rows].sum()) for m in microbatches)
    return 1.0 - real / sum(m.shape.tokens for m in microbatches)
