"""The arrays of a rollout in flight, and the jitted programs that move them on.

    no_prompts -> prefill, prefill, ... -> begin -> Requests        open_slots -> Slots      segment, segment, ...
    refill: idle slots take the next requests     compact: fewer slots     resize: other columns of the cache

1. `prefill` runs each prompt once; a request is one sample of one prompt, and `begin` draws its first token.
2. A slot works on one request at a time.  When that ends, `refill` gives it the next of its shard's queue by an
   index: the prompt's keys are there, nothing is prefilled.
3. All slots write one column of the suffix cache at a time, whatever their age; a slot's own keys are the `age`
   columns before it.  So a write is a slice, updated in place.

Whose keys a slot reads (`Slots.samples`, static):

    G      slots are as many as requests and stand in their order: a prompt's samples share its keys and values
    None   in any order, by an index (`Slots.prompt_of`): for kernels, which read through it
    1      in any order, each slot with a copy of its prompt's: for plain XLA, which would copy at every token

D shards of the batch   B prompts   G samples a prompt   R requests a shard (D * R = B * G, prompt-major)
S slots a shard   P prompt tokens   T response tokens   W columns   l layers of a stack   K key/value heads
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct

from cooper_jax.kernels import platform
from cooper_jax.kernels.kv import KV, Format
from cooper_jax.model import generation
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import make_decode_schedule
from cooper_jax.rollout import sampling_spec
from cooper_jax.rollout.head_sampling import sample_from_hidden
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout

Caches = tuple[KV, ...]  # one of each stack of layers (generation.split_layers)


@dataclasses.dataclass(frozen=True)
class RolloutStatic:
    """What every program is compiled for."""

    config: ModelConfig
    layout: Layout
    spec: SamplingSpec
    implementation: str  # of the kernels: see kernels/platform.py

    @property
    def shards(self) -> int:
        return self.layout.batch_shards

    @property
    def pallas(self) -> bool:
        """Whether decode attention is a Pallas kernel, which reads only what it needs of caches in any order."""
        return platform.is_pallas(self.implementation)

    @property
    def form(self) -> Format:
        return self.spec.cache_format(self.implementation)


@struct.dataclass
class Prompts:
    """What has been prefilled."""

    hidden: jax.Array  # [B, D]: of the last token
    lengths: jax.Array  # i32[B]
    kv: Caches  # leaves [l, B, K, P, ..]


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
    start: jax.Array  # i32[D, S]: its prompt's length
    column: jax.Array  # i32[]: where its keys and values will go
    taken: jax.Array  # i32[D]: requests taken from the queue
    failed: jax.Array  # bool[]: a live row had no distribution
    prompt_of: jax.Array  # i32[D, S]: the place of the prompt that it reads, in the shard; -1: none
    copies: Caches  # () or, of samples = 1, its prompt's keys and values: leaves [l, D * S, K, P, ..]
    suffix: Caches  # leaves [l, D * S, K, W, ..]
    samples: int | None = struct.field(pytree_node=False)


STATUS = ("failed", "live", "oldest", "waiting", "idle", "column")  # of the shard that has most of it


def read_status(slots: Slots, requests: Requests, layout: Layout) -> jax.Array:
    """i32[len(STATUS)], the one thing that the host reads: on a mesh, every host the same."""
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
    out = jnp.stack([x.astype(jnp.int32) for x in counts])
    return layout.constrain(out, None)


@jax.jit
def unfinished_requests(request, taken, queue, queued) -> jax.Array:
    """bool[D, R]: requests that have not ended, from fields of `Slots` and `Requests`: not of the caches' sizes."""
    place = jnp.argsort(queue, axis=1)  # in the queue
    waits = (place >= taken[:, None]) & (place < queued[:, None])
    live = jnp.zeros(queue.shape, bool)
    return waits | jax.vmap(lambda x, at: x.at[at].set(True, mode="drop"))(live, request)


# --- programs --------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("size", "width", "setting"))
def make_prompt_cache(weights, *, size: int, width: int, setting: RolloutStatic) -> Prompts:
    """Room for `size` prompts a shard of `width` tokens."""
    s, rows = setting, size * setting.shards
    kv = generation.make_empty_suffix(s.config, weights["layers"], rows, width, s.form)
    hidden = jnp.zeros((rows, s.config.width), s.spec.dtype)
    return _placed(Prompts(hidden=hidden, lengths=jnp.ones(rows, jnp.int32), kv=kv), s.layout)


@functools.partial(jax.jit, static_argnames="setting", donate_argnames="prompts")
def prefill_chunk(weights, prompts, tokens, lengths, source, *, setting: RolloutStatic) -> Prompts:
    """Run a chunk of prompts (`plan.Chunk`: tokens i32[D * b, p], lengths, source i32[B]) and put it into place."""
    s = setting
    hidden, kv = generation.prefill_prompts(
        weights, s.config, tokens, lengths, dtype=jnp.dtype(s.spec.dtype), kv_format=s.form, layout=s.layout
    )
    here = source >= 0
    index = jnp.maximum(source, 0).reshape(s.shards, -1)

    def put(old, new):  # prompts on axis 1
        new = _take_rows(new, index)
        new = jnp.pad(
            new,
            [(0, o - n if i == 3 else 0) for i, (o, n) in enumerate(zip(old.shape, new.shape, strict=True))],
        )
        return jnp.where(here.reshape(1, -1, *(1,) * (old.ndim - 2)), new, old)

    hidden, lengths = (
        put(o[None], n[None])[0] for o, n in ((prompts.hidden, hidden), (prompts.lengths, lengths))
    )
    return _placed(Prompts(hidden=hidden, lengths=lengths, kv=jax.tree.map(put, prompts.kv, kv)), s.layout)


@functools.partial(jax.jit, static_argnames="setting")
def sample_first_tokens(weights, prompts, places, limits, key, *, setting: RolloutStatic) -> Requests:
    """Draw the first tokens: places i32[B], limits i32[B * G], 0 where nothing is asked for."""
    spec, shards = setting.spec, setting.shards
    group = spec.group_size
    each = places.shape[0] * group // shards
    keys = sampling_spec.make_row_keys(key, places, group)
    hidden = jnp.repeat(prompts.hidden, group, axis=0)
    token, logprob = _draw(weights, hidden, keys, jnp.zeros((), jnp.int32), setting)
    asked = limits > 0
    finished = asked & _is_eos(token, spec)
    needs = asked & ~finished & (limits > 1)

    def by_shard(x):
        return x.reshape(shards, each, *x.shape[1:])

    def first(values, kind):
        out = jnp.zeros((shards, each, spec.max_new_tokens), kind)
        return out.at[:, :, 0].set(by_shard(jnp.where(asked, values, 0)))

    # Those that may become longest begin first: at the end, few slots wait for them.
    order = jnp.argsort(by_shard(jnp.where(needs, -limits, 1)), axis=1, stable=True)
    requests = Requests(
        keys=by_shard(keys),
        limits=by_shard(limits),
        tokens=first(token, jnp.int32),
        logprobs=first(logprob, jnp.float32),
        count=by_shard(asked.astype(jnp.int32)),
        finished=by_shard(finished),
        queue=order.astype(jnp.int32),
        queued=jnp.sum(by_shard(needs), axis=1, dtype=jnp.int32),
    )
    return _placed(requests, setting.layout)


@functools.partial(jax.jit, static_argnames=("size", "columns", "setting"))
def open_slots(weights, requests, prompts, *, size: int, columns: int, setting: RolloutStatic):
    """`size` slots a shard with the first requests -> (Slots, status)."""
    shards, each = requests.count.shape
    aligned = size == each
    idle = jnp.full((shards, size), each, jnp.int32)
    slots = Slots(
        request=idle,
        token=jnp.zeros_like(idle),
        age=jnp.zeros_like(idle),
        start=jnp.ones_like(idle),
        column=jnp.zeros((), jnp.int32),
        taken=jnp.zeros((shards,), jnp.int32),
        failed=jnp.any(jnp.isnan(requests.logprobs[:, :, 0])),
        prompt_of=-jnp.ones_like(idle),
        copies=(),
        suffix=generation.make_empty_suffix(
            setting.config, weights["layers"], shards * size, columns, setting.form
        ),
        samples=setting.spec.group_size if aligned else None,
    )
    if aligned:
        needs = jnp.argsort(requests.queue, axis=1) < requests.queued[:, None]  # the place in the queue
        own = jnp.broadcast_to(jnp.arange(each, dtype=jnp.int32)[None, :], idle.shape)
        prompt_of = own // setting.spec.group_size
        slots = slots.replace(
            request=jnp.where(needs, own, each),
            token=requests.tokens[:, :, 0],
            start=_take(prompts.lengths.reshape(shards, -1), prompt_of),
            taken=requests.queued,
            prompt_of=prompt_of,
        )
    else:
        slots = _take_next(slots, requests, prompts, setting)
    return _placed(slots, setting.layout), read_status(slots, requests, setting.layout)


@functools.partial(
    jax.jit, static_argnames=("steps", "refill_at", "setting"), donate_argnames=("slots", "requests")
)
def decode_segment(weights, slots, requests, prompts, *, steps: int, refill_at: int, setting: RolloutStatic):
    """Decode `steps` tokens a slot -> (Slots, Requests, status).

    Ends early when no slot is live, and when `refill_at` slots of a shard are idle while requests wait for them.
    """
    s = setting
    each = requests.count.shape[1]
    copies, prompt_of = slots.copies, slots.prompt_of  # not in the loop's carry: they stay as they are
    lengths = slots.start.reshape(-1) if copies else prompts.lengths
    plan = make_decode_schedule(prompt_of.reshape(-1), lengths, slots.samples, s.layout, s.implementation)

    def going(carry):
        step, slots, requests = carry
        live = slots.request < each
        idle = jnp.where(requests.queued > slots.taken, jnp.sum(~live, axis=1), 0)
        return (step < steps) & jnp.any(live) & ~slots.failed & jnp.all(idle < refill_at)

    def token(carry):
        step, slots, requests = carry
        first = jnp.where(slots.request < each, slots.column - slots.age, slots.column + 1)
        hidden, suffix = generation.decode_step(
            weights,
            s.config,
            slots.token.reshape(-1),
            (slots.start + slots.age).reshape(-1),
            copies or prompts.kv,
            plan,
            slots.suffix,
            first.reshape(-1),
            slots.column,
            dtype=jnp.dtype(s.spec.dtype),
            kv_format=s.form,
            layout=s.layout,
            implementation=s.implementation,
        )
        slots = slots.replace(suffix=suffix, column=slots.column + 1)
        return step + 1, *_next_tokens(weights, hidden, slots, requests, s)

    held = slots.replace(
        copies=(), prompt_of=None, suffix=tuple(generation.drop_stack_axis(kv) for kv in slots.suffix)
    )
    _, held, requests = jax.lax.while_loop(going, token, (jnp.zeros((), jnp.int32), held, requests))
    suffix = tuple(
        generation.add_stack_axis(kv, generation.is_alone(before))
        for kv, before in zip(held.suffix, slots.suffix, strict=True)
    )
    slots = held.replace(copies=copies, prompt_of=prompt_of, suffix=suffix)
    return _placed(slots, s.layout), _placed(requests, s.layout), read_status(slots, requests, s.layout)


@functools.partial(jax.jit, static_argnames="setting", donate_argnames="slots")
def refill_slots(slots, requests, prompts, *, setting: RolloutStatic) -> Slots:
    """Idle slots take the next requests of their shard's queue."""
    return _placed(_take_next(slots, requests, prompts, setting), setting.layout)


@functools.partial(jax.jit, static_argnames=("size", "setting"))
def compact_slots(slots, requests, prompts, *, size: int, setting: RolloutStatic) -> Slots:
    """The live slots alone, in `size` slots a shard; there must not be more of them."""
    each = requests.count.shape[1]
    kept = jnp.argsort(slots.request >= each, axis=1, stable=True)[:, :size]
    names = ("request", "token", "age", "start")
    slots = slots.replace(
        **{name: _take(getattr(slots, name), kept) for name in names},
        suffix=jax.tree.map(lambda x: _take_rows(x, kept), slots.suffix),
    )
    return _placed(_find_prompts(slots, each, prompts, setting), setting.layout)


@functools.partial(jax.jit, static_argnames=("columns", "setting"))
def resize_cache(slots, by, *, columns: int, setting: RolloutStatic) -> Slots:
    """Move the cache `by` columns to the left, into `columns`: what falls off belonged to requests that ended."""

    def move(x):
        x = jnp.roll(x, -by, axis=3)[:, :, :, :columns]
        return jnp.pad(x, [(0, columns - x.shape[3] if axis == 3 else 0) for axis in range(x.ndim)])

    slots = slots.replace(suffix=jax.tree.map(move, slots.suffix), column=slots.column - by)
    return _placed(slots, setting.layout)


# --- inside ----------------------------------------------------------------------------------------------


def _next_tokens(weights, hidden, slots: Slots, requests: Requests, setting) -> tuple[Slots, Requests]:
    """The next token of every live slot from its hidden state [D * S, D]."""
    each, spec = requests.count.shape[1], setting.spec
    live = slots.request < each
    own = jnp.minimum(slots.request, each - 1)
    index = slots.age + 1  # of the token in its response
    keys = _take(requests.keys, own).reshape(-1)
    token, logprob = _draw(weights, hidden, keys, index.reshape(-1), setting)
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
        age=jnp.where(live, index, 0),
        failed=slots.failed | jnp.any(live & jnp.isnan(logprob)),
    )
    return slots, requests


def _draw(weights, hidden, keys, position, setting) -> tuple[jax.Array, jax.Array]:
    s = setting
    return sample_from_hidden(weights, s.config, hidden, keys, position, s.spec, s.layout, s.implementation)


def _take_next(slots: Slots, requests: Requests, prompts: Prompts, setting) -> Slots:
    each = requests.count.shape[1]
    idle = slots.request >= each
    place = slots.taken[:, None] + jnp.cumsum(idle, axis=1, dtype=jnp.int32) - 1
    fresh = idle & (place < requests.queued[:, None])
    new = _take(requests.queue, jnp.minimum(place, each - 1))
    by_shard = prompts.lengths.reshape(new.shape[0], -1)
    slots = slots.replace(
        request=jnp.where(fresh, new, slots.request),
        token=jnp.where(fresh, _take(requests.tokens[:, :, 0], new), slots.token),
        age=jnp.where(fresh, 0, slots.age),
        start=jnp.where(fresh, _take(by_shard, new // setting.spec.group_size), slots.start),
        taken=slots.taken + jnp.sum(fresh, axis=1, dtype=jnp.int32),
    )
    return _find_prompts(slots, each, prompts, setting)


def _find_prompts(slots: Slots, each: int, prompts: Prompts, setting) -> Slots:
    """Where each slot reads its prompt, when slots do not stand in the requests' order."""
    which = jnp.minimum(slots.request, each - 1) // setting.spec.group_size  # i32[D, S]: in the shard
    if setting.pallas:
        prompt_of = jnp.where(slots.request < each, which, -1)
        return slots.replace(prompt_of=prompt_of, samples=None)
    copies = jax.tree.map(lambda x: _take_rows(x, which), prompts.kv)
    own = jnp.broadcast_to(jnp.arange(which.shape[1], dtype=jnp.int32)[None, :], which.shape)
    return slots.replace(prompt_of=own, copies=copies, samples=1)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [D, n, ...] at index i32[D, m], shard by shard -> [D, m, ...]."""
    return jax.vmap(lambda x, i: x[i])(x, index)


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """[l, D * n, ...] at index i32[D, m], shard by shard -> [l, D * m, ...]."""
    x = x.reshape(x.shape[0], index.shape[0], -1, *x.shape[2:])
    x = jax.vmap(lambda x, i: x[:, i], in_axes=(1, 0), out_axes=1)(x, index)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _is_eos(token: jax.Array, spec) -> jax.Array:
    ids = jnp.asarray(spec.eos_ids, jnp.int32).reshape((1,) * token.ndim + (-1,))
    return jnp.any(token[..., None] == ids, axis=-1)


def _placed(tree, layout: Layout):
    """Pin shards to their places, so that every program finds its input where the last one left it."""

    def place(x):
        if isinstance(x, KV):
            axes = ("layers", "batch", "kv_heads", None, "head_dim")
            return jax.tree.map(lambda a: layout.constrain(a, *axes[: a.ndim]), x)
        return layout.constrain(x, *("batch", None, None)[: x.ndim])

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, KV))
