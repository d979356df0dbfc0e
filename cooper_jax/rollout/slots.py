"""The arrays of a rollout in flight, and the jitted programs that move them on.

    start -> Requests, prompts' KV        open_slots -> Slots      segment, segment, ...
    refill: idle slots take the next requests      compact: fewer slots      shift: room for more columns

1. A request is one sample of one prompt.  `start` prefills every prompt once and draws each request's first token.
2. A slot works on one request at a time.  When that ends, `refill` gives it the next of its shard's queue by an
   index: the prompt's keys are there, nothing is prefilled.
3. All slots write one column of the suffix cache at a time, whatever their age; a slot's own keys are the `age`
   columns before it.  So a write is a slice, updated in place, and a read is the window of the oldest slot.

Where slots are as many as requests they stand in the requests' order and a prompt's samples share its keys and
values (`lengths` then counts prompts); otherwise each slot has a copy of its prompt's (and `lengths` counts slots).

D shards of the batch   B prompts   G samples a prompt   R requests a shard (D * R = B * G, prompt-major)
S slots a shard   P prompt tokens   T response tokens   W columns   L layers   K key/value heads   h head_dim
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from cooper_jax.model import transformer
from cooper_jax.model.transformer import KV
from cooper_jax.rollout import sampling
from cooper_jax.runtime.mesh import Layout


@struct.dataclass
class Requests:
    """What is asked for, and what has been drawn."""

    keys: jax.Array  # key[D, R]
    limits: jax.Array  # i32[D, R]: tokens at most
    tokens: jax.Array  # i32[D, R, T]
    logprobs: jax.Array  # f32[D, R, T]
    count: jax.Array  # i32[D, R]: tokens drawn
    finished: jax.Array  # bool[D, R]: an EOS was drawn
    queue: jax.Array  # i32[D, R]: the requests that need a slot, then the others
    queued: jax.Array  # i32[D]: how many need one


@struct.dataclass
class Slots:
    """What is being decoded."""

    request: jax.Array  # i32[D, S]; R where the slot is idle
    token: jax.Array  # i32[D, S]: the last one drawn, not yet fed
    age: jax.Array  # i32[D, S]: its index in the response
    column: jax.Array  # i32[]: where its keys and values will go
    taken: jax.Array  # i32[D]: requests taken from the queue
    failed: jax.Array  # bool[]: a live row had no distribution
    prompt: KV  # [L, B, K, P, h] or [L, D * S, K, P, h]
    lengths: jax.Array  # i32[B] or i32[D * S]
    suffix: KV  # [L, D * S, K, W, h]


STATUS = ("failed", "live", "oldest", "waiting", "idle", "column")  # of the shard that has most of it


def status(slots: Slots, requests: Requests) -> jax.Array:
    """i32[len(STATUS)], the one thing that the host reads."""
    live = slots.request < requests.count.shape[1]
    waiting = requests.queued - slots.taken  # i32[D]
    idle = jnp.where(waiting > 0, jnp.sum(~live, axis=1), 0)
    counts = (
        slots.failed,
        jnp.max(jnp.sum(live, axis=1)),
        jnp.max(jnp.where(live, slots.age, 0)),
        jnp.max(waiting),
        jnp.max(idle),
        slots.column,
    )
    return jnp.stack([x.astype(jnp.int32) for x in counts])


# --- programs --------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "layout", "spec"))
def start(weights, tokens, lengths, places, limits, key, *, config, layout, spec):
    """Prefill and draw the first tokens -> (Requests, the prompts' KV).

    tokens i32[B, P] right-padded, lengths and places i32[B], limits i32[B * G], 0 where nothing is asked for.
    """
    shards, group = _shards(layout), spec.group_size
    each = tokens.shape[0] * group // shards
    dtype = jnp.dtype(spec.dtype)
    hidden, prompt = transformer.prefill(weights, config, tokens, lengths, dtype=dtype, layout=layout)
    logits = jnp.repeat(transformer.logits(weights, config, hidden), group, axis=0)
    keys = sampling.row_keys(key, places, group)
    token, logprob = sampling.sample(_whole_rows(logits, layout), keys, jnp.zeros((), jnp.int32), spec)
    asked = limits > 0
    finished = asked & _is_eos(token, spec)
    ended = ~asked | finished | (limits == 1)

    def by_shard(x):
        return x.reshape(shards, each, *x.shape[1:])

    def first(values, kind):
        out = jnp.zeros((shards, each, spec.max_new_tokens), kind)
        return out.at[:, :, 0].set(by_shard(jnp.where(asked, values, 0)))

    requests = Requests(
        keys=by_shard(keys),
        limits=by_shard(limits),
        tokens=first(token, jnp.int32),
        logprobs=first(logprob, jnp.float32),
        count=by_shard(asked.astype(jnp.int32)),
        finished=by_shard(finished),
        queue=jnp.argsort(by_shard(ended), axis=1, stable=True).astype(jnp.int32),
        queued=jnp.sum(~by_shard(ended), axis=1, dtype=jnp.int32),
    )
    return _placed(requests, layout), _placed(prompt, layout)


@functools.partial(jax.jit, static_argnames=("size", "columns", "config", "layout", "spec"))
def open_slots(requests, prompt, lengths, *, size, columns, config, layout, spec):
    """`size` slots a shard with the first requests -> (Slots, status)."""
    shards, each = requests.count.shape
    shared = size == each
    dtype = jnp.dtype(spec.dtype)
    idle = jnp.full((shards, size), each, jnp.int32)
    slots = Slots(
        request=idle,
        token=jnp.zeros_like(idle),
        age=jnp.zeros_like(idle),
        column=jnp.zeros((), jnp.int32),
        taken=jnp.zeros((shards,), jnp.int32),
        failed=jnp.any(jnp.isnan(requests.logprobs[:, :, 0])),
        prompt=prompt,
        lengths=lengths,
        suffix=transformer.empty_suffix(config, shards * size, columns, dtype),
    )
    if shared:
        needs = jnp.argsort(requests.queue, axis=1) < requests.queued[:, None]  # the place in the queue
        request = jnp.where(needs, jnp.arange(each, dtype=jnp.int32)[None, :], each)
        slots = slots.replace(request=request, token=requests.tokens[:, :, 0], taken=requests.queued)
    else:
        slots = _take_next(slots, requests, prompt, lengths, spec)
    return _placed(slots, layout), status(slots, requests)


@functools.partial(
    jax.jit,
    static_argnames=("steps", "key_len", "refill_at", "config", "layout", "spec"),
    donate_argnames=("slots", "requests"),
)
def segment(weights, slots, requests, *, steps, key_len, refill_at, config, layout, spec):
    """Decode `steps` tokens a slot -> (Slots, Requests, status).

    Ends early when no slot is live, and when `refill_at` slots of a shard are idle while requests wait for them.
    """
    dtype = jnp.dtype(spec.dtype)
    prompt, lengths = slots.prompt, slots.lengths  # not in the loop's carry: they stay as they are

    def going(carry):
        step, slots, requests = carry
        live = slots.request < requests.count.shape[1]
        idle = jnp.where(requests.queued > slots.taken, jnp.sum(~live, axis=1), 0)
        return (step < steps) & jnp.any(live) & ~slots.failed & jnp.all(idle < refill_at)

    def token(carry):
        step, slots, requests = carry
        hidden, suffix = transformer.decode_step(
            weights,
            config,
            slots.token.reshape(-1),
            slots.age.reshape(-1),
            slots.column,
            prompt,
            lengths,
            slots.suffix,
            key_len,
            dtype=dtype,
            layout=layout,
        )
        logits = _whole_rows(transformer.logits(weights, config, hidden), layout)
        slots = slots.replace(suffix=suffix, column=slots.column + 1)
        return step + 1, *_draw(slots, requests, logits, spec)

    held = slots.replace(prompt=None, lengths=None)
    _, held, requests = jax.lax.while_loop(going, token, (jnp.zeros((), jnp.int32), held, requests))
    slots = held.replace(prompt=prompt, lengths=lengths)
    return _placed(slots, layout), _placed(requests, layout), status(slots, requests)


@functools.partial(jax.jit, static_argnames=("layout", "spec"), donate_argnames="slots")
def refill(slots, requests, prompt, lengths, *, layout, spec):
    """Idle slots take the next requests of their shard's queue."""
    return _placed(_take_next(slots, requests, prompt, lengths, spec), layout)


@functools.partial(jax.jit, static_argnames=("size", "layout", "spec"))
def compact(slots, requests, prompt, lengths, *, size, layout, spec):
    """The live slots alone, in `size` slots a shard; there must not be more of them."""
    each = requests.count.shape[1]
    kept = jnp.argsort(slots.request >= each, axis=1, stable=True)[:, :size]
    request, token, age = (_take(x, kept) for x in (slots.request, slots.token, slots.age))
    slots = slots.replace(request=request, token=token, age=age, suffix=_take_kv(slots.suffix, kept))
    return _placed(_own_prompts(slots, each, prompt, lengths, spec), layout)


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="slots")
def shift(slots, by, *, layout):
    """Move the cache `by` columns to the left: what falls off belonged to requests that have ended."""
    suffix = jax.tree.map(lambda x: jnp.roll(x, -by, axis=3), slots.suffix)
    return _placed(slots.replace(suffix=suffix, column=slots.column - by), layout)


# --- inside ----------------------------------------------------------------------------------------------


def _draw(slots: Slots, requests: Requests, logits: jax.Array, spec) -> tuple[Slots, Requests]:
    """The next token of every live slot from logits f32[D * S, V]."""
    each = requests.count.shape[1]
    live = slots.request < each
    own = jnp.minimum(slots.request, each - 1)
    index = slots.age + 1  # of the token in its response
    keys = _take(requests.keys, own).reshape(-1)
    token, logprob = sampling.sample(logits, keys, index.reshape(-1), spec)
    token, logprob = token.reshape(live.shape), logprob.reshape(live.shape)
    eos = _is_eos(token, spec)
    over = live & (eos | (index + 1 >= _take(requests.limits, own)))

    def put(x, *where_and_what):  # idle slots' index is out of bounds: they write nothing
        return jax.vmap(lambda x, *at: x.at[at[:-1]].set(at[-1], mode="drop"))(x, *where_and_what)

    requests = requests.replace(
        tokens=put(requests.tokens, slots.request, index, token),
        logprobs=put(requests.logprobs, slots.request, index, logprob),
        count=put(requests.count, slots.request, index + 1),
        finished=put(requests.finished, slots.request, eos),
    )
    slots = slots.replace(
        request=jnp.where(over, each, slots.request),
        token=jnp.where(live, token, 0),
        age=index,
        failed=slots.failed | jnp.any(live & jnp.isnan(logprob)),
    )
    return slots, requests


def _take_next(slots: Slots, requests: Requests, prompt: KV, lengths: jax.Array, spec) -> Slots:
    each = requests.count.shape[1]
    idle = slots.request >= each
    place = slots.taken[:, None] + jnp.cumsum(idle, axis=1, dtype=jnp.int32) - 1
    fresh = idle & (place < requests.queued[:, None])
    new = _take(requests.queue, jnp.minimum(place, each - 1))
    slots = slots.replace(
        request=jnp.where(fresh, new, slots.request),
        token=jnp.where(fresh, _take(requests.tokens[:, :, 0], new), slots.token),
        age=jnp.where(fresh, 0, slots.age),
        taken=slots.taken + jnp.sum(fresh, axis=1, dtype=jnp.int32),
    )
    return _own_prompts(slots, each, prompt, lengths, spec)


def _own_prompts(slots: Slots, each: int, prompt: KV, lengths: jax.Array, spec) -> Slots:
    """Each slot with a copy of its prompt's keys and values."""
    which = jnp.minimum(slots.request, each - 1) // spec.group_size  # i32[D, S]: in the shard
    by_shard = lengths.reshape(which.shape[0], -1)
    return slots.replace(prompt=_take_kv(prompt, which), lengths=_take(by_shard, which).reshape(-1))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [D, n, ...] at index i32[D, m], shard by shard -> [D, m, ...]."""
    return jax.vmap(lambda x, i: x[i])(x, index)


def _take_kv(kv: KV, index: jax.Array) -> KV:
    """[L, D * n, ...] at index i32[D, m], shard by shard -> [L, D * m, ...]."""
    shards = index.shape[0]

    def take(x):
        x = x.reshape(x.shape[0], shards, -1, *x.shape[2:])
        x = jax.vmap(lambda x, i: x[:, i], in_axes=(1, 0), out_axes=1)(x, index)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(take, kv)


def _is_eos(token: jax.Array, spec) -> jax.Array:
    ids = jnp.asarray(spec.eos_ids, jnp.int32).reshape((1,) * token.ndim + (-1,))
    return jnp.any(token[..., None] == ids, axis=-1)


def _shards(layout: Layout | None) -> int:
    return 1 if layout is None else layout.batch_shards


def _whole_rows(logits: jax.Array, layout: Layout | None) -> jax.Array:
    """A draw needs a row's whole vocabulary on its device."""
    return logits if layout is None else layout.constrain(logits, "batch", None)


def _placed(tree, layout: Layout | None):
    """Pin shards to their places, so that every program finds its input where the last one left it."""
    if layout is None:
        return tree

    def place(x):
        if isinstance(x, KV):
            axes = ("layers", "batch", "kv_heads", None, "head_dim")
            return jax.tree.map(lambda a: layout.constrain(a, *axes), x)
        return layout.constrain(x, *("batch", None, None)[: x.ndim])

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, KV))
