"""The sizes that a decode batch takes: few, so that few programs are compiled, and all of them at once if asked.

A batch with all its slots has a suffix cache of one of `list_columns`; plain XLA reads the whole cache at every
token, so it starts with a small one.  A batch of fewer slots (`shrink_slots`) has all columns.

    256 slots: 128 -> 256 -> 511 columns, then 511 columns: 128 -> 64 -> 32 -> 16 -> 8 slots

On a CPU the products of few rows take longer with each row, since they read the weights in panels
(kernels/matmul.py): batches get smaller than 8 slots there.

`compile_batch_sizes` runs the programs of all sizes on a batch without a request.  They end at once, but are
compiled.

U slots per shard   W columns of the suffix cache
"""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.kernels.matmul import PANEL_ROWS
from cooper_jax.model import generation, transformer
from cooper_jax.rollout import rollout_plan, rollout_state
from cooper_jax.rollout import slots as slot_programs
from cooper_jax.rollout.rollout_state import PromptCache, Requests, RolloutStatic, Slots, Status
from cooper_jax.types import Params

FEWEST_IN_PANELS = 3  # slots of the smallest batch whose weights are in panels

# Shares of all columns that the cache of a whole batch may have: each one more program of decode_segment.
COLUMN_SHARES = (4, 2, 1)


class BatchWeights:
    """A rollout's weights, in the form that a batch of so many slots multiplies by fastest."""

    def __init__(self, weights: Params):
        """weights: of `generation.prepare_generation`."""
        self._weights = weights
        self.has_panels = transformer.UNEMBED in weights  # on a CPU, with few slots
        self._in_panels = False

    def take(self, slots_per_shard: int) -> Params:
        """The weights for a batch; later batches have no more slots.  `prefill_prompts` does not take panels."""
        if self.has_panels and not self._in_panels and slots_per_shard <= PANEL_ROWS:
            self._weights, self._in_panels = generation.store_in_panels(self._weights), True
        return self._weights


def list_columns(static: RolloutStatic, most: int) -> tuple[int, ...]:
    """List the sizes W of a whole batch's cache, ascending; `most`, the last, is enough for every response."""
    # Pallas kernels read only the columns in use.
    if static.pallas:
        return (most,)
    segment = static.spec.segment
    sizes = {min(-(-most // (share * segment)) * segment, most) for share in COLUMN_SHARES}
    return tuple(sorted(sizes))


def choose_columns(sizes: Sequence[int], needed: int) -> int:
    """Choose the smallest size with `needed` columns, or the largest one."""
    return min((size for size in sizes if size >= needed), default=max(sizes))


def make_room(
    slots: Slots, status: Status, columns: int, sizes: Sequence[int], static: RolloutStatic
) -> tuple[Slots, int, int]:
    """Make room in the suffix cache for the next segment -> (slots, columns, write column).

    Drops the columns that no live slot reads any more, and lets the cache of plain XLA grow.

    sizes: of the cache, ascending.
    """
    segment = static.spec.segment
    write_column = status.write_column
    unread = write_column - status.longest  # the columns before those of the longest live response
    has_room = write_column + segment <= columns
    can_change = unread or columns < sizes[-1]
    # If nothing can change, all live responses end within the columns that are left.
    if has_room or not can_change:
        return slots, columns, write_column

    # If columns are dropped, the cache gets a quarter more than it needs, so that the next drop is far away.
    needed = status.longest + segment
    if unread:
        needed += needed // 4
    columns = choose_columns(sizes, needed)
    slots = slot_programs.resize_cache(slots, unread, columns=columns, static=static)
    return slots, columns, write_column - unread


def shrink_slots(slots_per_shard: int, factor: int, has_panels: bool = False) -> int | None:
    """Return the next smaller number of slots; None if the batch is not made smaller.

    has_panels: of BatchWeights.
    """
    fewer = slots_per_shard // factor
    fewest = FEWEST_IN_PANELS if has_panels else rollout_plan.FEWEST_SLOTS
    return fewer if fewer >= fewest else None


def choose_refill(slots_per_shard: int) -> int:
    """Choose the number of idle slots at which a segment ends while requests wait: an eighth of them.

    A refill costs a transfer to the host, an idle slot costs a row of every step.
    """
    return max(1, slots_per_shard // 8)


def compile_batch_sizes(
    weights: Params,
    prompts: PromptCache,
    requests: Requests,
    slots_per_shard: int,
    columns: Sequence[int],
    static: RolloutStatic,
    *,
    shrink: int,
    notifies: bool,
) -> None:
    """Compile the programs that decode `requests` in batches of all sizes.

    requests: without one that needs a slot; donated.
    columns: of `list_columns`.
    shrink: see `engine.generate`.
    notifies: the caller wants to know which requests have finished.
    """
    waiting = slots_per_shard < requests.num_tokens.shape[1]
    of_batch = BatchWeights(weights)

    def decode(slots: Slots, requests: Requests, count: int) -> tuple[Slots, Requests]:
        slots, requests, _ = slot_programs.decode_segment(
            of_batch.take(count), slots, requests, prompts,
            steps=static.spec.segment, refill_at=choose_refill(count), static=static,
        )  # fmt: skip
        if notifies:
            rollout_state.find_unfinished(slots.request, slots.started, requests.queue, requests.queue_length)
        return slots, requests

    # The whole batch.  Only with waiting requests does the cache ever get smaller, or drop columns.
    slots, _ = slot_programs.open_slots(
        weights, requests, prompts, slots_per_shard=slots_per_shard, columns=columns[0], static=static
    )
    if notifies:
        rollout_state.find_unfinished(slots.request, slots.started, requests.queue, requests.queue_length)
    for i in range(len(columns)):
        slots, requests = decode(slots, requests, slots_per_shard)
        if waiting:
            slots = slot_programs.refill_slots(slots, requests, prompts, static=static)
        following = slots
        for j, size in enumerate(columns):
            if j > i or waiting:
                resized = slot_programs.resize_cache(slots, 0, columns=size, static=static)
                following = resized if j == i + 1 else following
        slots = following

    # Smaller ones.
    count = shrink_slots(slots_per_shard, shrink, of_batch.has_panels)
    while count is not None:
        slots = slot_programs.compact_slots(slots, requests, prompts, slots_per_shard=count, static=static)
        if waiting:
            slots = slot_programs.resize_cache(slots, 0, columns=columns[-1], static=static)
        slots, requests = decode(slots, requests, count)
        count = shrink_slots(count, shrink, of_batch.has_panels)
