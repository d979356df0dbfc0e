"""Continuous batching of requests that arrive while others are decoded: the jitted programs of a server.

    open_state -> (PromptCache, Slots, Requests)
    then, for ever: slots.prefill_chunk, admit_requests, run_segment

A rollout knows all its requests at the start; a server does not.  Here each slot has one place for a request and
one for its prompt: slot u of a shard decodes request u with prompt u, and group_size is 1.  A request that arrives
takes the three places of an idle slot; the others go on undisturbed.  The programs below work on whole batches with
masks, so that their shapes do not depend on the number of arrivals.

1. `slots.prefill_chunk` writes the prompts of new requests into the prompt cache.
2. `admit_requests` samples their first tokens and starts their slots.
3. `run_segment` stops the slots of cancelled requests, decodes up to spec.segment tokens (slots.decode_segment),
   and packs the new tokens for the host.
4. `resize_prompts` changes the width of the prompt cache: plain XLA reads all of it at every token.

Z batch shards   U slots per shard   N = Z * U rows   T response tokens   P prompt tokens
S most new tokens of a segment, spec.segment + 1: the first token is sampled at admission
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cooper_jax.kernels.sampling_rows import Array, RowSettings, make_row_settings
from cooper_jax.rollout import slots as slot_programs
from cooper_jax.rollout.rollout_state import PromptCache, Requests, RolloutStatic, Slots, Status
from cooper_jax.runtime import keys
from cooper_jax.types import Params

# The random stream of samples: a request of this seed gets the samples of `cooper_jax.Sampler` with this seed.
STREAM = "sampler"


@struct.dataclass
class Arrivals:
    """New requests, each in the row of its slot; rows without one are not admitted."""

    admitted: Array  # bool[N]
    seeds: Array  # u32[N]
    samples: Array  # u32[N]: index among the samples of the client's request
    limits: Array  # i32[N]: maximum number of response tokens, at least 1
    settings: RowSettings  # leaves [N]


@struct.dataclass
class Progress:
    """The state that the host reads after a segment."""

    status: jax.Array  # i32[6]: a packed `Status`
    live: jax.Array  # bool[N]: the row is being decoded
    num_tokens: jax.Array  # i32[N]: response tokens so far
    finished: jax.Array  # bool[N]: an EOS was sampled
    tokens: jax.Array  # i32[N, S]: from each row's `read` on
    logprobs: jax.Array  # f32[N, S]


@dataclasses.dataclass(frozen=True)
class ReadProgress:
    """`Progress` on the host."""

    status: Status
    live: np.ndarray
    num_tokens: np.ndarray
    finished: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def read(cls, progress: Progress) -> ReadProgress:
        """Copy the arrays to the host, waiting for the program that computes them."""
        host = jax.device_get(progress)
        status = Status(*host.status.tolist())
        return cls(status, host.live, host.num_tokens, host.finished, host.tokens, host.logprobs)


def make_empty_arrivals(rows: int) -> Arrivals:
    """Make arrays on the host in which no row is admitted."""
    blank = make_row_settings()
    return Arrivals(
        admitted=np.zeros(rows, bool),
        seeds=np.zeros(rows, np.uint32),
        samples=np.zeros(rows, np.uint32),
        limits=np.ones(rows, np.int32),
        settings=jax.tree.map(lambda x: np.full(rows, x, x.dtype), blank),
    )


def open_state(
    weights: Params, static: RolloutStatic, slots_per_shard: int, width: int, columns: int
) -> tuple[PromptCache, Slots, Requests]:
    """Allocate the caches of a server, in which every slot is idle.

    width: P of the prompt cache.  columns: of the suffix cache.
    """
    assert static.spec.group_size == 1
    prompts = slot_programs.make_prompt_cache(
        weights, prompts_per_shard=slots_per_shard, width=width, static=static
    )
    rows = static.shards * slots_per_shard
    positions, limits = static.layout.put((np.zeros(rows, np.int32), np.zeros(rows, np.int32)), "batch")
    requests = slot_programs.sample_first_tokens(
        weights, prompts, positions, limits, keys.make_key(0, STREAM), static=static
    )
    settings = make_empty_arrivals(rows).settings
    settings = jax.tree.map(lambda x: x.reshape(static.shards, slots_per_shard), settings)
    requests = dataclasses.replace(requests, settings=static.layout.put(settings, "batch"))
    slots, _ = slot_programs.open_slots(
        weights, requests, prompts, slots_per_shard=slots_per_shard, columns=columns, static=static
    )
    return prompts, slots, requests


def admit_requests(
    weights: Params,
    slots: Slots,
    requests: Requests,
    prompts: PromptCache,
    arrivals: Arrivals,
    *,
    static: RolloutStatic,
) -> tuple[Slots, Requests]:
    """Sample the first tokens of new requests, whose prompts are in the cache, and start their slots.

    A request that ends with its first token needs no slot: its row is not live.
    """
    # Without the caches, whose sizes change: one program serves all sizes.
    suffix, slots = slots.suffix, dataclasses.replace(slots, suffix=())
    prompts = dataclasses.replace(prompts, kv=())
    slots, requests = _admit(weights, slots, requests, prompts, arrivals, static=static)
    return dataclasses.replace(slots, suffix=suffix), requests


@functools.partial(jax.jit, static_argnames="static", donate_argnames=("slots", "requests"))
def _admit(
    weights: Params,
    slots: Slots,
    requests: Requests,
    prompts: PromptCache,
    arrivals: Arrivals,
    *,
    static: RolloutStatic,
) -> tuple[Slots, Requests]:
    """The program of `admit_requests`."""
    shards, slots_per_shard = slots.request.shape
    row_keys = keys.make_keys(jnp.asarray(arrivals.seeds), STREAM)
    # As a rollout's keys: first the position of the prompt, which is 0 here, then the sample.
    row_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(row_keys)
    row_keys = jax.vmap(jax.random.fold_in)(row_keys, arrivals.samples)

    # All rows are sampled, and those that are not admitted dropped: as much work as one step's output head.
    start = jnp.zeros((), jnp.int32)
    sampled = slot_programs.sample_requests(
        weights, prompts.hidden, row_keys, start, static, arrivals.settings
    )

    def by_shard(x):  # [N, ...] -> [Z, U, ...]
        return x.reshape(shards, slots_per_shard, *x.shape[1:])

    arrivals, token, logprob = jax.tree.map(by_shard, (arrivals, sampled.token, sampled.logprob))
    new = arrivals.admitted
    is_eos = new & slot_programs.is_eos_token(token, static.spec)
    goes_on = new & ~is_eos & (arrivals.limits > 1)

    def replace(old, value):
        return jnp.where(new, value, old)

    requests = dataclasses.replace(
        requests,
        keys=jnp.where(new, by_shard(row_keys), requests.keys),
        limits=replace(requests.limits, arrivals.limits),
        tokens=requests.tokens.at[:, :, 0].set(replace(requests.tokens[:, :, 0], token)),
        logprobs=requests.logprobs.at[:, :, 0].set(replace(requests.logprobs[:, :, 0], logprob)),
        num_tokens=replace(requests.num_tokens, 1),
        finished=replace(requests.finished, is_eos),
        settings=jax.tree.map(replace, requests.settings, arrivals.settings),
    )
    own = jnp.broadcast_to(jnp.arange(slots_per_shard, dtype=jnp.int32)[None, :], new.shape)
    slots = dataclasses.replace(
        slots,
        request=replace(slots.request, jnp.where(goes_on, own, slots_per_shard)),
        token=replace(slots.token, token),
        generated=replace(slots.generated, 0),
        prompt_len=replace(slots.prompt_len, by_shard(prompts.lengths)),
        failed=slots.failed | jnp.any(new & jnp.isnan(logprob)),
    )
    constrain = functools.partial(slot_programs.constrain_state, layout=static.layout)
    return constrain(slots), constrain(requests)


@functools.partial(jax.jit, static_argnames=("refill_at", "static"), donate_argnames=("slots", "requests"))
def run_segment(
    weights: Params,
    slots: Slots,
    requests: Requests,
    prompts: PromptCache,
    cancelled: jax.Array,  # bool[N]: rows that are not decoded any more
    read: jax.Array,  # i32[N]: response tokens that the host has read
    waiting: jax.Array,  # i32[]: requests that wait for a slot
    *,
    refill_at: int,
    static: RolloutStatic,
) -> tuple[Slots, Requests, Progress]:
    """Decode up to spec.segment tokens in every live slot.

    Ends early when no slot is live, when logits are not finite, and when `refill_at` slots of a shard are idle
    while requests wait.
    """
    slots_per_shard = slots.request.shape[1]
    cancelled = cancelled.reshape(slots.request.shape)
    slots = dataclasses.replace(
        slots,
        request=jnp.where(cancelled, slots_per_shard, slots.request),
        generated=jnp.where(cancelled, 0, slots.generated),
    )
    # decode_segment looks at the length of the queue only: it never starts a request by itself.
    requests = dataclasses.replace(requests, queue_length=slots.started + waiting)
    slots, requests, status = slot_programs.decode_segment(
        weights, slots, requests, prompts, steps=static.spec.segment, refill_at=refill_at, static=static
    )

    def flat(x):  # [Z, U, ...] -> [N, ...]
        return x.reshape(-1, *x.shape[2:])

    index = read[:, None] + jnp.arange(static.spec.segment + 1)[None, :]
    index = jnp.minimum(index, static.spec.max_new_tokens - 1)
    progress = Progress(
        status=status,
        live=flat(slots.request < slots_per_shard),
        num_tokens=flat(requests.num_tokens),
        finished=flat(requests.finished),
        tokens=jnp.take_along_axis(flat(requests.tokens), index, axis=1),
        logprobs=jnp.take_along_axis(flat(requests.logprobs), index, axis=1),
    )
    return slots, requests, progress


@functools.partial(jax.jit, static_argnames=("width", "static"))
def resize_prompts(prompts: PromptCache, *, width: int, static: RolloutStatic) -> PromptCache:
    """Change the width of the prompt cache; no prompt in use may be longer than it."""

    def resize(x):  # [L, N, K, P, ..]
        x = x[:, :, :, :width]
        padding = [(0, 0)] * x.ndim
        padding[3] = (0, width - x.shape[3])
        return jnp.pad(x, padding)

    resized = dataclasses.replace(prompts, kv=jax.tree.map(resize, prompts.kv))
    return slot_programs.constrain_state(resized, static.layout)
