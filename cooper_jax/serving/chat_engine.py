"""Sampling for a server: continuous batching of requests that arrive while others are decoded.

`ChatEngine` owns the device state of rollout/admission.py.  Its callers live in two threads:

1. Any thread calls `submit` with new requests, and `cancel` for those whose client has gone.
2. One thread, that of device_loop.py, calls `step`: it stops cancelled requests, prefills new ones into idle slots,
   decodes a segment, and passes the new tokens to `deliver`.

The shapes of all programs are fixed by `EngineSizes`, and `compile_programs` runs each of them once, so that no
request waits for a compilation.  A prompt that several samples share is prefilled once, if they start together.

Z batch shards   U slots per shard   N = Z * U rows
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cooper_jax.kernels.sampling_rows import RowSettings
from cooper_jax.rollout import admission, batch_sizes, engine, rollout_plan
from cooper_jax.rollout import slots as slot_programs
from cooper_jax.rollout.admission import ReadProgress
from cooper_jax.rollout.rollout_state import RolloutStatic, Status
from cooper_jax.types import Params

# A prefill has one of few numbers of rows.
CHUNK_ROWS = (1, 4, 16)
# The prompt cache of plain XLA, which reads all its columns at every token, has one of these shares of its width.
WIDTH_SHARES = (4, 1)
# A client that has its reply often sends the next request at once.  If a slot became free, the next segment waits
# for such requests, for at most this share of the last segment's time: a slot that misses it is idle all through.
WAITING_SHARE = 1 / 16


class QueueFull(Exception):
    """As many requests wait as the server allows."""


@dataclasses.dataclass(eq=False)
class SampleRequest:
    """One sample that a client waits for."""

    prompt: Sequence[int]  # the samples of one prompt share this object
    limit: int  # maximum number of response tokens
    seed: int  # 0 <= seed < 2^32
    sample: int  # index among the samples of the client's request
    settings: RowSettings
    # State of the engine.
    read: int = 0  # response tokens that were delivered
    cancelled: bool = False


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens of a request that were sampled in a segment."""

    request: SampleRequest
    tokens: list[int]
    logprobs: list[float]
    # stop: the last token is an EOS; length: the limit is reached; error: the engine has failed; "": more follow
    finish: str


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """Sizes of the device state."""

    slots_per_shard: int  # U
    max_prompt_tokens: int
    max_waiting: int  # requests that may wait for a slot


class ChatEngine:
    """Samples responses to requests as they arrive.  See the module's text for the threads that may call it."""

    def __init__(
        self,
        weights: Params,
        static: RolloutStatic,
        sizes: EngineSizes,
        deliver: Callable[[list[NewTokens]], None],
    ):
        """Allocate the caches.

        Args:
          weights: of `engine.copy_rollout_weights`.
          static: its spec has the limit of response tokens, the EOS ids and the segment's length; group_size is 1.
          deliver: receives the new tokens of each segment, in the thread that calls `step`.
        """
        self.sizes, self.num_slots = sizes, static.shards * sizes.slots_per_shard
        self._static, self._deliver = static, deliver
        self._weights = weights
        self._decode_weights = batch_sizes.BatchWeights(weights).take(sizes.slots_per_shard)

        # The sizes that the caches take.
        multiple = rollout_plan.column_multiple(static.kv_format)
        self._widths = _list_widths(static, sizes.max_prompt_tokens, multiple)
        most_columns = engine.count_cache_columns(static, waiting=True)
        self._columns_sizes = batch_sizes.list_columns(static, most_columns)
        self._refill_at = batch_sizes.choose_refill(sizes.slots_per_shard)
        self._open()

        # Shared by the threads, under the lock.
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._waiting: deque[SampleRequest] = deque()
        self._rows: list[SampleRequest | None] = [None] * self.num_slots
        self._failed = False

        # Of the last segment.
        self._freed_slots, self._seconds = 0, 0.0

        # For metrics.
        self.prompt_tokens = self.sampled_tokens = self.segments = 0

    def _open(self) -> None:
        self._width, self._columns = self._widths[0], self._columns_sizes[0]
        self._prompts, self._slots, self._requests = admission.open_state(
            self._weights, self._static, self.sizes.slots_per_shard, self._width, self._columns
        )
        self._status = Status(0, 0, 0, 0, 0, 0)

    # --- called by any thread ---

    @property
    def busy_slots(self) -> int:
        """Number of slots that have a request."""
        return sum(request is not None for request in self._rows)

    @property
    def waiting_requests(self) -> int:
        """Number of requests without a slot."""
        return len(self._waiting)

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Queue requests.  Raises QueueFull if there are too many, and RuntimeError after `fail`."""
        with self._lock:
            if self._failed:
                raise RuntimeError("the engine has failed")
            in_flight = self.busy_slots + len(self._waiting)
            if in_flight + len(requests) > self.num_slots + self.sizes.max_waiting:
                raise QueueFull
            self._waiting.extend(requests)
            self._arrived.notify()

    def cancel(self, request: SampleRequest) -> None:
        """Drop a request; nothing happens if it has ended.  Its slot is free from the next segment on."""
        with self._lock:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)

    def fail(self) -> None:
        """Answer all requests with an error, and refuse new ones."""
        with self._lock:
            self._failed = True
            ended = [*self._waiting, *(request for request in self._rows if request is not None)]
            self._waiting.clear()
            self._rows = [None] * self.num_slots
        self._deliver([NewTokens(request, [], [], "error") for request in ended if not request.cancelled])

    # --- called by the device's thread ---

    def step(self) -> bool:
        """Decode a segment; returns False if there is nothing to do.

        Raises FloatingPointError for logits that are not finite.
        """
        started = time.perf_counter()
        with self._lock:
            self._wait_for_next_requests()
            cancelled = self._release_cancelled()
            arrivals = self._assign_slots()
            waiting = len(self._waiting)
            is_busy = bool(cancelled) or self.busy_slots > 0
            # `fail` may empty the rows at any time.
            longest = max((len(request.prompt) for request in self._rows if request is not None), default=0)
        if not is_busy:
            return False
        if arrivals:
            self._admit(arrivals, longest)
            cancelled = [row for row in cancelled if row not in arrivals]
        progress = self._run_segment(cancelled, waiting)
        events = self._collect(progress)
        self._freed_slots = sum(event.finish != "" for event in events)
        self._seconds = time.perf_counter() - started
        self._deliver(events)
        return True

    def compile_programs(self) -> Iterator[str]:
        """Run each program that a request may need, on no request; yields what is compiled next."""
        empty = admission.make_empty_arrivals(self.num_slots)
        yield "admission"
        self._start(empty)
        for width in self._widths:
            yield f"prefill, prompts of up to {width} tokens"
            self._resize_prompts(width)
            for chunk_width, rows in self._list_chunks(width):
                nobody: list[list[int]] = [[] for _ in range(self._static.shards)]
                self._prefill_chunk(
                    rollout_plan.fill_chunk({}, nobody, rows, chunk_width, self.sizes.slots_per_shard)
                )
            for columns in self._columns_sizes:
                yield f"decode, prompts of up to {width} tokens, {columns} columns"
                self._resize_cache(columns)
                self._run_segment([], 0)
                for other in self._columns_sizes:
                    slot_programs.resize_cache(self._slots, 0, columns=other, static=self._static)
        for width in self._widths:
            self._resize_prompts(width)
        self._resize_prompts(self._widths[0])
        self._resize_cache(self._columns_sizes[0])

    # --- parts of a step ---

    def _wait_for_next_requests(self) -> None:
        """Wait a moment for as many requests as have ended in the last segment.  The lock is held."""
        freed, self._freed_slots = self._freed_slots, 0
        if freed and self.busy_slots:
            self._arrived.wait_for(lambda: len(self._waiting) >= freed, WAITING_SHARE * self._seconds)

    def _release_cancelled(self) -> list[int]:
        """Take cancelled requests out of their rows; returns the rows."""
        released = []
        for row, request in enumerate(self._rows):
            if request is not None and request.cancelled:
                self._rows[row] = None
                released.append(row)
        return released

    def _assign_slots(self) -> dict[int, SampleRequest]:
        """Give idle slots the first waiting requests: row -> request."""
        # Slots of the shard with the most idle slots come first, so that the shards have as much to do.
        per_shard = self.sizes.slots_per_shard
        idle: list[list[int]] = [[] for _ in range(self._static.shards)]
        for row, request in enumerate(self._rows):
            if request is None:
                idle[row // per_shard].append(row)
        arrivals: dict[int, SampleRequest] = {}
        while self._waiting and any(idle):
            row = max(idle, key=len).pop(0)
            arrivals[row] = self._rows[row] = self._waiting.popleft()
        return arrivals

    def _admit(self, arrivals: dict[int, SampleRequest], longest: int) -> None:
        """Prefill the prompts of new requests and sample their first tokens.

        longest: number of tokens of the longest prompt in any slot.
        """
        self._resize_prompts(batch_sizes.choose_columns(self._widths, longest))
        for chunk in self._make_chunks(arrivals):
            self._prefill_chunk(chunk)

        arrays = admission.make_empty_arrivals(self.num_slots)
        for row, request in arrivals.items():
            arrays.admitted[row] = True
            arrays.seeds[row], arrays.samples[row] = request.seed, request.sample
            arrays.limits[row] = request.limit
            for field in dataclasses.fields(RowSettings):
                getattr(arrays.settings, field.name)[row] = getattr(request.settings, field.name)
        self._start(arrays)
        prompts = {id(request.prompt): len(request.prompt) for request in arrivals.values()}
        self.prompt_tokens += sum(prompts.values())

    def _make_chunks(self, arrivals: dict[int, SampleRequest]) -> Iterator[rollout_plan.Chunk]:
        """Group the prompts of new requests into chunks of similar length; a shared prompt is in one row."""
        per_shard, shards = self.sizes.slots_per_shard, self._static.shards
        sharing: dict[tuple[int, int], list[int]] = {}  # (shard, prompt) -> rows
        for row, request in arrivals.items():
            sharing.setdefault((row // per_shard, id(request.prompt)), []).append(row)

        by_width: dict[
            int, list[list[int]]
        ] = {}  # chunk width -> for each shard, the first row of each prompt
        for (shard, _), rows in sharing.items():
            length = len(arrivals[rows[0]].prompt)
            width = min(w for w in rollout_plan.list_chunk_widths(self._width) if w >= length)
            by_width.setdefault(width, [[] for _ in range(shards)])[shard].append(rows[0])

        prompts = {row: request.prompt for row, request in arrivals.items()}
        others = {rows[0]: rows[1:] for rows in sharing.values()}
        for width, members in by_width.items():
            sizes = self._list_chunk_rows(width)
            while most := max(map(len, members)):
                count = self._choose_chunk_rows(sizes, most)
                taken = [rows[:count] for rows in members]
                members = [rows[count:] for rows in members]
                chunk = rollout_plan.fill_chunk(prompts, taken, count, width, per_shard)
                for first in itertools.chain.from_iterable(taken):
                    chunk.source[others[first]] = chunk.source[first]
                yield chunk

    def _list_chunks(self, cache_width: int) -> list[tuple[int, int]]:
        """List the shapes (width, rows) of chunks for a prompt cache of a width."""
        widths = rollout_plan.list_chunk_widths(cache_width)
        return [(width, rows) for width in widths for rows in self._list_chunk_rows(width)]

    def _list_chunk_rows(self, width: int) -> list[int]:
        """List the numbers of rows that a chunk of a width may have, ascending."""
        most = min(self.sizes.slots_per_shard, max(1, rollout_plan.PREFILL_TOKENS // width))
        return [rows for rows in CHUNK_ROWS if rows <= most]

    def _choose_chunk_rows(self, sizes: Sequence[int], prompts: int) -> int:
        """Choose the rows of the next chunk for a number of prompts."""
        # On a CPU a padding row takes as long as a prompt; an accelerator is not filled by few rows.
        if self._static.layout.platform == "cpu":
            return max(size for size in sizes if size <= prompts)
        return min((size for size in sizes if size >= prompts), default=sizes[-1])

    def _collect(self, progress: ReadProgress) -> list[NewTokens]:
        """Read the new tokens of all requests, and free the slots of those that have ended."""
        events = []
        with self._lock:
            for row, request in enumerate(self._rows):
                if request is None:
                    continue
                new = int(progress.num_tokens[row]) - request.read
                request.read += new
                self.sampled_tokens += new
                finish = ""
                if not progress.live[row]:
                    finish = "stop" if progress.finished[row] else "length"
                    self._rows[row] = None
                if not request.cancelled:
                    tokens, logprobs = progress.tokens[row, :new], progress.logprobs[row, :new]
                    events.append(NewTokens(request, tokens.tolist(), logprobs.tolist(), finish))
        return events

    # --- programs ---

    def _prefill_chunk(self, chunk: rollout_plan.Chunk) -> None:
        arrays = self._static.layout.put((chunk.tokens, chunk.lengths, chunk.source), "batch")
        self._prompts = slot_programs.prefill_chunk(
            self._weights, self._prompts, *arrays, static=self._static
        )

    def _start(self, arrays: admission.Arrivals) -> None:
        self._slots, self._requests = admission.admit_requests(
            self._weights,
            self._slots,
            self._requests,
            self._prompts,
            self._static.layout.put(arrays, "batch"),
            static=self._static,
        )

    def _resize_prompts(self, width: int) -> None:
        if width != self._width:
            self._prompts = admission.resize_prompts(self._prompts, width=width, static=self._static)
            self._width = width

    def _resize_cache(self, columns: int) -> None:
        if columns != self._columns:
            self._slots = slot_programs.resize_cache(self._slots, 0, columns=columns, static=self._static)
            self._columns = columns

    def _run_segment(self, cancelled: Sequence[int], waiting: int) -> ReadProgress:
        """Decode a segment, and wait for it.  Raises FloatingPointError for logits that are not finite."""
        self._slots, self._columns, _ = batch_sizes.make_room(
            self._slots, self._status, self._columns, self._columns_sizes, self._static
        )
        stopped = np.zeros(self.num_slots, bool)
        stopped[list(cancelled)] = True
        read = np.asarray([0 if request is None else request.read for request in self._rows], np.int32)
        stopped, read = self._static.layout.put((stopped, read), "batch")
        self._slots, self._requests, progress = admission.run_segment(
            self._decode_weights,
            self._slots,
            self._requests,
            self._prompts,
            stopped,
            read,
            np.int32(waiting),
            refill_at=self._refill_at,
            static=self._static,
        )
        found = ReadProgress.read(progress)
        self._status = found.status
        self.segments += 1
        if found.status.failed:
            raise FloatingPointError(
                "the model's logits are not finite, so no token can be sampled: the weights contain NaN or "
                f"overflow in {self._static.spec.dtype}"
            )
        return found


def _list_widths(static: RolloutStatic, longest: int, multiple: int) -> tuple[int, ...]:
    """List the widths of the prompt cache, ascending."""
    # Pallas kernels read only the columns in use.
    shares = (1,) if static.pallas else WIDTH_SHARES
    return tuple(sorted({rollout_plan.prompt_width(-(-longest // share), multiple) for share in shares}))
