"""Continuous batching: the jitted programs that prefill prompts and decode requests in slots.

    make_prompt_cache -> prefill_chunk, ... -> sample_first_tokens -> Requests
    open_slots -> Slots -> decode_segment, decode_segment, ...

1. `prefill_chunk` runs each prompt once; a prompt's samples share its keys and values.  `sample_first_tokens`
   samples every request's first token from its prompt's last hidden state.
2. `decode_segment` decodes up to a fixed number of tokens in every slot.
3. `refill_slots` gives idle slots the next requests of their shard's queue.  Nothing is prefilled, because the
   prompts are in the cache: plain XLA copies their keys and values to the slots, Pallas kernels read them
   through an index.
4. `compact_slots` moves the last live slots into a smaller batch; `resize_cache` changes the number of
   columns of the suffix cache.

rollout_state.py describes the arrays.  Padding and idle slots are masked, so every shape is static.

Z batch shards   B prompts, padding included   G samples per prompt
Q requests per shard (Z * Q = B * G, prompt-major)
U slots per shard   P prompt tokens   T response tokens   W columns of the suffix cache   D width
L layers of a stack   K key/value heads
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp

from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.sampling_rows import RowSettings
from cooper_jax.model import generation
from cooper_jax.model.layers import make_decode_schedule
from cooper_jax.rollout import sampling_spec
from cooper_jax.rollout.head_sampling import NextTokens, sample_from_hidden
from cooper_jax.rollout.rollout_state import PromptCache, Requests, RolloutStatic, Slots, pack_status
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params

State = TypeVar("State", PromptCache, Requests, Slots)


# --- prefill -----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("prompts_per_shard", "width", "static"))
def make_prompt_cache(
    weights: Params, *, prompts_per_shard: int, width: int, static: RolloutStatic
) -> PromptCache:
    """Make an empty cache for `prompts_per_shard` prompts of `width` tokens on each shard."""
    # A prompt cache has the layout of a suffix cache, with prompts as rows.
    rows = prompts_per_shard * static.shards
    kv = generation.make_empty_suffix(static.config, weights["layers"], rows, width, static.kv_format)
    hidden = jnp.zeros((rows, static.config.width), static.spec.dtype)
    return constrain_state(
        PromptCache(hidden=hidden, lengths=jnp.ones(rows, jnp.int32), kv=kv), static.layout
    )


@functools.partial(jax.jit, static_argnames="static", donate_argnames="prompts")
def prefill_chunk(
    weights: Params,
    prompts: PromptCache,
    tokens: jax.Array,  # i32[Z * b, p]: b prompts of p tokens on each shard, right-padded
    lengths: jax.Array,  # i32[Z * b]
    source: jax.Array,  # i32[B]: each prompt's row in the chunk, within its shard; -1: not in it
    *,
    static: RolloutStatic,
) -> PromptCache:
    """Prefill one chunk of prompts (`rollout_plan.Chunk`) and write it into the cache."""
    hidden, kv = generation.prefill_prompts(
        weights,
        static.config,
        tokens,
        lengths,
        dtype=jnp.dtype(static.spec.dtype),
        kv_format=static.kv_format,
        layout=static.layout,
    )

    # Every prompt reads a row of the chunk, and keeps its cache if it is not in the chunk, so that shapes do
    # not depend on the number of prompts in the chunk.
    in_chunk = source >= 0
    rows = jnp.maximum(source, 0).reshape(static.shards, -1)  # i32[Z, B / Z]

    def write(cached, new):
        """Write leaves with prompts on axis 1 and tokens on axis 3, padded to the cache's width."""
        new = _take_rows(new, rows)
        padding = [(0, 0)] * new.ndim
        if new.ndim > 3:
            padding[3] = (0, cached.shape[3] - new.shape[3])
        new = jnp.pad(new, padding)
        mask = in_chunk.reshape(1, -1, *(1,) * (cached.ndim - 2))
        return jnp.where(mask, new, cached)

    # `hidden` and `lengths` get a layer axis of 1.
    written = PromptCache(
        hidden=write(prompts.hidden[None], hidden[None])[0],
        lengths=write(prompts.lengths[None], lengths[None])[0],
        kv=jax.tree.map(write, prompts.kv, kv),
    )
    return constrain_state(written, static.layout)


@functools.partial(jax.jit, static_argnames="static")
def sample_first_tokens(
    weights: Params,
    prompts: PromptCache,
    positions: jax.Array,  # i32[B]: each prompt's position in the data order
    limits: jax.Array,  # i32[B * G]: maximum number of tokens of each response; 0: padding
    key: jax.Array,
    samples: jax.Array
    | None = None,  # i32[B * G]: each row's index among its prompt's samples; None: 0 .. G - 1
    starts: jax.Array | None = None,  # i32[B * G]: see Requests; None: 0
    *,
    static: RolloutStatic,
) -> Requests:
    """Sample the first token of every request and queue those that need more."""
    spec, shards = static.spec, static.shards
    group = spec.group_size
    requests_per_shard = positions.shape[0] * group // shards

    # Samples of one prompt have the same hidden state and different keys.
    keys = sampling_spec.make_row_keys(key, positions, group, samples)
    starts = jnp.zeros_like(limits) if starts is None else starts
    hidden = jnp.repeat(prompts.hidden, group, axis=0)  # [B * G, D]
    token, logprob, threshold = sample_requests(weights, hidden, keys, starts, static)

    # A response may end with its first token.
    requested = limits > 0
    finished = requested & is_eos_token(token, spec)
    needs_slot = requested & ~finished & (limits > 1)

    def by_shard(x):  # [Z * Q, ...] -> [Z, Q, ...]
        return x.reshape(shards, requests_per_shard, *x.shape[1:])

    def start_rows(values, dtype):  # [Z * Q] -> [Z, Q, T]
        out = jnp.zeros((shards, requests_per_shard, spec.max_new_tokens), dtype)
        return out.at[:, :, 0].set(by_shard(jnp.where(requested, values, 0)))

    # Requests with the largest limits start first, so that few long responses are left at the end.
    queue = jnp.argsort(by_shard(jnp.where(needs_slot, -limits, 1)), axis=1, stable=True)
    requests = Requests(
        keys=by_shard(keys),
        limits=by_shard(limits),
        starts=by_shard(starts),
        tokens=start_rows(token, jnp.int32),
        logprobs=start_rows(logprob, jnp.float32),
        num_tokens=by_shard(requested.astype(jnp.int32)),
        finished=by_shard(finished),
        queue=queue.astype(jnp.int32),
        queue_length=jnp.sum(by_shard(needs_slot), axis=1, dtype=jnp.int32),
        thresholds=None if threshold is None else start_rows(threshold, jnp.float32),
    )
    return constrain_state(requests, static.layout)


# --- decoding ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("slots_per_shard", "columns", "static"))
def open_slots(
    weights: Params,
    requests: Requests,
    prompts: PromptCache,
    *,
    slots_per_shard: int,
    columns: int,
    static: RolloutStatic,
) -> tuple[Slots, jax.Array]:
    """Make a decode batch with an empty cache and start the first requests -> (Slots, packed Status)."""
    shards, requests_per_shard = requests.num_tokens.shape
    group = static.spec.group_size
    aligned = slots_per_shard == requests_per_shard  # one slot per request, in the requests' order

    # All slots idle.  A first token without a finite log-probability fails the rollout here.
    idle = jnp.full((shards, slots_per_shard), requests_per_shard, jnp.int32)
    slots = Slots(
        request=idle,
        token=jnp.zeros_like(idle),
        generated=jnp.zeros_like(idle),
        prompt_len=jnp.ones_like(idle),
        write_column=jnp.zeros((), jnp.int32),
        started=jnp.zeros((shards,), jnp.int32),
        failed=jnp.any(jnp.isnan(requests.logprobs[:, :, 0])),
        prompt_of=-jnp.ones_like(idle),
        prompt_copies=(),
        suffix=generation.make_empty_suffix(
            static.config, weights["layers"], shards * slots_per_shard, columns, static.kv_format
        ),
        samples=group if aligned else None,
    )

    # Start the first requests.  Aligned slots take their own request whatever the queue's order, so that the
    # samples of a prompt stay side by side.
    if aligned:
        position = jnp.argsort(requests.queue, axis=1)  # i32[Z, Q]: each request's position in the queue
        needs_slot = position < requests.queue_length[:, None]
        own = jnp.arange(requests_per_shard, dtype=jnp.int32)
        own = jnp.broadcast_to(own[None, :], idle.shape)
        prompt_of = own // group
        slots = dataclasses.replace(
            slots,
            request=jnp.where(needs_slot, own, requests_per_shard),
            token=requests.tokens[:, :, 0],
            prompt_len=_take(prompts.lengths.reshape(shards, -1), prompt_of),
            started=requests.queue_length,
            prompt_of=prompt_of,
        )
    else:
        slots = _start_requests(slots, requests, prompts, static)
    return constrain_state(slots, static.layout), pack_status(slots, requests, static.layout)


@functools.partial(
    jax.jit, static_argnames=("steps", "refill_at", "static"), donate_argnames=("slots", "requests")
)
def decode_segment(
    weights: Params,
    slots: Slots,
    requests: Requests,
    prompts: PromptCache,
    *,
    steps: int,
    refill_at: int,
    static: RolloutStatic,
) -> tuple[Slots, Requests, jax.Array]:
    """Decode up to `steps` tokens in every slot -> (Slots, Requests, packed Status).

    Ends early when no slot is live, when logits are not finite, and when `refill_at` slots of a shard are
    idle while requests wait for them.
    """
    requests_per_shard = requests.num_tokens.shape[1]

    # Slots keep their prompts within a segment, so the prompts stay outside the loop's carry and are not
    # copied, and one schedule serves all steps.
    prompt_copies, prompt_of = slots.prompt_copies, slots.prompt_of
    lengths = slots.prompt_len.reshape(-1) if prompt_copies else prompts.lengths
    schedule = make_decode_schedule(
        prompt_of.reshape(-1), lengths, slots.samples, static.layout, static.implementation
    )

    def has_work(carry):
        step, slots, requests = carry
        live = slots.request < requests_per_shard
        idle = jnp.where(requests.queue_length > slots.started, jnp.sum(~live, axis=1), 0)
        return (step < steps) & jnp.any(live) & ~slots.failed & jnp.all(idle < refill_at)

    def decode_token(carry):
        step, slots, requests = carry
        live = slots.request < requests_per_shard

        # An idle slot gets a first suffix column to the right of the newest one, and so reads nothing.
        first = jnp.where(live, slots.write_column - slots.generated, slots.write_column + 1)
        hidden, suffix = generation.decode_step(
            weights,
            static.config,
            slots.token.reshape(-1),
            (slots.prompt_len + slots.generated).reshape(-1),
            prompt_copies or prompts.kv,
            schedule,
            slots.suffix,
            first.reshape(-1),
            slots.write_column,
            dtype=jnp.dtype(static.spec.dtype),
            kv_format=static.kv_format,
            layout=static.layout,
            implementation=static.implementation,
        )
        slots = dataclasses.replace(slots, suffix=suffix, write_column=slots.write_column + 1)
        return step + 1, *_sample_next_tokens(weights, hidden, slots, requests, static)

    # A stack of one layer drops its layer axis in the carry, and gets it back after the loop.
    carried = dataclasses.replace(
        slots,
        prompt_copies=(),
        prompt_of=None,  # type: ignore[arg-type]  # not in the carry: set again after the loop
        suffix=tuple(generation.drop_stack_axis(kv) for kv in slots.suffix),
    )
    start = (jnp.zeros((), jnp.int32), carried, requests)
    _, carried, requests = jax.lax.while_loop(has_work, decode_token, start)

    suffix = tuple(
        generation.add_stack_axis(kv, generation.is_alone(before))
        for kv, before in zip(carried.suffix, slots.suffix, strict=True)
    )
    slots = dataclasses.replace(carried, prompt_copies=prompt_copies, prompt_of=prompt_of, suffix=suffix)
    status = pack_status(slots, requests, static.layout)
    return constrain_state(slots, static.layout), constrain_state(requests, static.layout), status


@functools.partial(jax.jit, static_argnames="static", donate_argnames="slots")
def refill_slots(slots: Slots, requests: Requests, prompts: PromptCache, *, static: RolloutStatic) -> Slots:
    """Give idle slots the next requests of their shard's queue."""
    return constrain_state(_start_requests(slots, requests, prompts, static), static.layout)


@functools.partial(jax.jit, static_argnames=("slots_per_shard", "static"))
def compact_slots(
    slots: Slots, requests: Requests, prompts: PromptCache, *, slots_per_shard: int, static: RolloutStatic
) -> Slots:
    """Move the live slots into a batch of `slots_per_shard` slots, which must be enough for them."""
    # A stable sort puts live slots first, in their order.
    requests_per_shard = requests.num_tokens.shape[1]
    is_idle = slots.request >= requests_per_shard
    kept = jnp.argsort(is_idle, axis=1, stable=True)[:, :slots_per_shard]
    slots = dataclasses.replace(
        slots,
        request=_take(slots.request, kept),
        token=_take(slots.token, kept),
        generated=_take(slots.generated, kept),
        prompt_len=_take(slots.prompt_len, kept),
        suffix=jax.tree.map(lambda x: _take_rows(x, kept), slots.suffix),
    )
    return constrain_state(_assign_prompts(slots, requests_per_shard, prompts, static), static.layout)


@functools.partial(jax.jit, static_argnames=("columns", "static"))
def resize_cache(slots: Slots, by: jax.Array, *, columns: int, static: RolloutStatic) -> Slots:
    """Shift the suffix cache `by` columns to the left and resize it to `columns` columns.

    The first `by` columns are dropped: no live slot may have its first column among them.
    """

    def shift(x):  # [L, Z * U, K, W, ..]
        # After the roll, dropped columns are at the write column or to the right of it, where the next steps
        # overwrite them.
        x = jnp.roll(x, -by, axis=3)[:, :, :, :columns]
        padding = [(0, 0)] * x.ndim
        padding[3] = (0, columns - x.shape[3])
        return jnp.pad(x, padding)

    slots = dataclasses.replace(
        slots, suffix=jax.tree.map(shift, slots.suffix), write_column=slots.write_column - by
    )
    return constrain_state(slots, static.layout)


# --- parts of the programs ---------------------------------------------------------------------------------


def _sample_next_tokens(
    weights: Params,
    hidden: jax.Array,  # [Z * U, D]
    slots: Slots,
    requests: Requests,
    static: RolloutStatic,
) -> tuple[Slots, Requests]:
    """Sample the next token of every live slot, record it, and free the slots of requests that have ended."""
    requests_per_shard, spec = requests.num_tokens.shape[1], static.spec
    live = slots.request < requests_per_shard
    own = jnp.minimum(slots.request, requests_per_shard - 1)  # within bounds for idle slots too
    index = slots.generated + 1  # of the new token in its response

    # Idle slots sample too, and their tokens are dropped.
    keys = _take(requests.keys, own).reshape(-1)
    position = index + _take(requests.starts, own)
    settings = jax.tree.map(lambda x: _take(x, own).reshape(-1), requests.settings)
    sampled = sample_requests(weights, hidden, keys, position.reshape(-1), static, settings)
    token, logprob, threshold = jax.tree.map(lambda x: x.reshape(live.shape), sampled)
    is_eos = is_eos_token(token, spec)
    ended = live & (is_eos | (index + 1 >= _take(requests.limits, own)))

    # The request of an idle slot is out of bounds: "drop" writes nothing for it.
    def scatter(x, *indices, values):
        def one_shard(x, values, *indices):
            return x.at[indices].set(values, mode="drop")

        return jax.vmap(one_shard)(x, values, *indices)

    requests = dataclasses.replace(
        requests,
        tokens=scatter(requests.tokens, slots.request, index, values=token),
        logprobs=scatter(requests.logprobs, slots.request, index, values=logprob),
        num_tokens=scatter(requests.num_tokens, slots.request, values=index + 1),
        finished=scatter(requests.finished, slots.request, values=is_eos),
    )
    if requests.thresholds is not None:
        thresholds = scatter(requests.thresholds, slots.request, index, values=threshold)
        requests = dataclasses.replace(requests, thresholds=thresholds)

    # A request that has ended leaves its slot idle until the host refills it.
    slots = dataclasses.replace(
        slots,
        request=jnp.where(ended, requests_per_shard, slots.request),
        token=jnp.where(live, token, 0),
        generated=jnp.where(live, index, 0),
        failed=slots.failed | jnp.any(live & jnp.isnan(logprob)),
    )
    return slots, requests


def sample_requests(
    weights: Params,
    hidden: jax.Array,  # [N, D]
    keys: jax.Array,  # key[N]
    position: jax.Array,  # i32[] or i32[N]: the token's index in its response
    static: RolloutStatic,
    settings: RowSettings | None = None,  # leaves [N]; None: those of static.spec
) -> NextTokens:
    """Sample a token from each hidden state."""
    return sample_from_hidden(
        weights, static.config, hidden, keys, position, static.spec, static.layout, static.implementation,
        settings=settings,
    )  # fmt: skip


def _start_requests(slots: Slots, requests: Requests, prompts: PromptCache, static: RolloutStatic) -> Slots:
    """Give idle slots the next requests of the queue, which have a first token and no suffix yet."""
    requests_per_shard = requests.num_tokens.shape[1]
    is_idle = slots.request >= requests_per_shard

    # The i-th idle slot of a shard takes the request at position started + i of the queue, if there is one.
    position = slots.started[:, None] + jnp.cumsum(is_idle, axis=1, dtype=jnp.int32) - 1
    starts = is_idle & (position < requests.queue_length[:, None])
    request = _take(requests.queue, jnp.minimum(position, requests_per_shard - 1))

    # The suffix cache is not cleared: `generated` = 0 leaves none of its columns to the new request.
    lengths = prompts.lengths.reshape(request.shape[0], -1)
    prompt_len = _take(lengths, request // static.spec.group_size)
    slots = dataclasses.replace(
        slots,
        request=jnp.where(starts, request, slots.request),
        token=jnp.where(starts, _take(requests.tokens[:, :, 0], request), slots.token),
        generated=jnp.where(starts, 0, slots.generated),
        prompt_len=jnp.where(starts, prompt_len, slots.prompt_len),
        started=slots.started + jnp.sum(starts, axis=1, dtype=jnp.int32),
    )
    return _assign_prompts(slots, requests_per_shard, prompts, static)


def _assign_prompts(
    slots: Slots, requests_per_shard: int, prompts: PromptCache, static: RolloutStatic
) -> Slots:
    """Set the prompt keys and values that each slot reads, for slots that are not in the requests' order."""
    # Prompt-major: request q of a shard is a sample of its prompt q // G.
    prompt = jnp.minimum(slots.request, requests_per_shard - 1) // static.spec.group_size  # i32[Z, U]
    if static.pallas:
        prompt_of = jnp.where(slots.request < requests_per_shard, prompt, -1)
        return dataclasses.replace(slots, prompt_of=prompt_of, samples=None)

    # Plain XLA: a copy per slot, made once per refill instead of a gather at every token.
    copies = jax.tree.map(lambda x: _take_rows(x, prompt), prompts.kv)
    own = jnp.broadcast_to(jnp.arange(prompt.shape[1], dtype=jnp.int32)[None, :], prompt.shape)
    return dataclasses.replace(slots, prompt_of=own, prompt_copies=copies, samples=1)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Index each shard's entries: x [Z, n, ...], index i32[Z, m] -> [Z, m, ...]."""
    return jax.vmap(lambda x, i: x[i])(x, index)


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Index each shard's rows of a cache: x [L, Z * n, ...], index i32[Z, m] -> [L, Z * m, ...]."""
    x = x.reshape(x.shape[0], index.shape[0], -1, *x.shape[2:])
    x = jax.vmap(lambda x, i: x[:, i], in_axes=(1, 0), out_axes=1)(x, index)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def is_eos_token(token: jax.Array, spec: SamplingSpec) -> jax.Array:
    """Mark EOS tokens: bool of the shape of `token`."""
    ids = jnp.asarray(spec.eos_ids, jnp.int32).reshape((1,) * token.ndim + (-1,))
    return jnp.any(token[..., None] == ids, axis=-1)


def constrain_state(state: State, layout: Layout) -> State:
    """Constrain every array's sharding, so that no program has to reshard the output of the previous one."""

    def constrain(x):
        if isinstance(x, KV):
            # Data have all five axes; scales lack the last.
            axes = ("layers", "batch", "kv_heads", None, "head_dim")
            return jax.tree.map(lambda a: layout.constrain(a, *axes[: a.ndim]), x)
        return layout.constrain(x, *("batch", None, None)[: x.ndim])

    return jax.tree.map(constrain, state, is_leaf=lambda x: isinstance(x, KV))
