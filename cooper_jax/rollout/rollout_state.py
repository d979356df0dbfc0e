"""Arrays of a rollout in flight: prefilled prompts, requests, and the slots that decode them.

A request is one sample of one prompt.  A slot is one row of the decode batch: it works on one request at a
time and takes the next one of its shard's queue when that request has finished (continuous batching).

All slots write the same column of the suffix cache in one step, whatever the length of their responses, so a
write is one slice that is updated in place.  A slot's own keys are the `generated` columns before that
column.

Prompt keys that a slot reads (`Slots.samples`, static under jit):

    G      one slot per request, in the requests' order: a prompt's samples share its keys and values
    None   any order, through the index `Slots.prompt_of`: for Pallas kernels, which read through it
    1      any order, each slot with a copy of its prompt's keys and values: for plain XLA, which would
           otherwise gather them at every token

Z batch shards   B prompts   G samples per prompt   Q requests per shard (Z * Q = B * G, prompt-major)
U slots per shard   P prompt tokens   T response tokens   W columns of the suffix cache   D width
L layers of a stack   K key/value heads
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from cooper_jax.kernels import platform
from cooper_jax.kernels.kv import KV, Format
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout

Caches = tuple[KV, ...]  # one for each stack of layers (generation.split_layers)


@dataclasses.dataclass(frozen=True)
class RolloutStatic:
    """Static arguments of every rollout program: a program is compiled once for each value."""

    config: ModelConfig
    layout: Layout
    spec: SamplingSpec
    implementation: str  # of the kernels: see kernels/platform.py

    @property
    def shards(self) -> int:
        return self.layout.batch_shards

    @property
    def pallas(self) -> bool:
        """True if decode attention is a Pallas kernel, which reads only what it needs of the caches."""
        return platform.is_pallas(self.implementation)

    @property
    def kv_format(self) -> Format:
        return self.spec.cache_format(self.implementation)


@struct.dataclass
class PromptCache:
    """Prefilled prompts."""

    hidden: jax.Array  # [B, D]: hidden state of each prompt's last token
    lengths: jax.Array  # i32[B]
    kv: Caches  # leaves [L, B, K, P, ..]


@struct.dataclass
class Requests:
    """All requests, with the tokens that have been sampled for them."""

    keys: jax.Array  # key[Z, Q]
    limits: jax.Array  # i32[Z, Q]: most tokens of the response; 0: padding
    tokens: jax.Array  # i32[Z, Q, T]
    logprobs: jax.Array  # f32[Z, Q, T]
    num_tokens: jax.Array  # i32[Z, Q]: tokens sampled so far
    finished: jax.Array  # bool[Z, Q]: an EOS was sampled
    queue: jax.Array  # i32[Z, Q]: requests that need a slot, longest limit first, then the others
    queue_length: jax.Array  # i32[Z]: requests that need a slot


@struct.dataclass
class Slots:
    """The decode batch."""

    request: jax.Array  # i32[Z, U]; Q where the slot is idle
    token: jax.Array  # i32[Z, U]: the last token sampled, not yet fed to the model
    generated: jax.Array  # i32[Z, U]: response tokens fed so far, which is that token's index in the response
    prompt_len: jax.Array  # i32[Z, U]
    write_column: jax.Array  # i32[]: the cache column that the next step writes
    started: jax.Array  # i32[Z]: requests taken from the queue
    failed: jax.Array  # bool[]: the logits of a live row were not finite
    prompt_of: jax.Array  # i32[Z, U]: index of the slot's prompt within the shard; -1: none
    prompt_copies: Caches  # (), or with samples == 1 each slot's prompt: leaves [L, Z * U, K, P, ..]
    suffix: Caches  # leaves [L, Z * U, K, W, ..]
    samples: int | None = struct.field(pytree_node=False)


class Status(NamedTuple):
    """Progress as the host reads it after each segment: every number is the largest over the batch shards."""

    failed: int  # 1: the logits of a live row were not finite
    live: int  # slots with a request
    longest: int  # tokens that the longest live response has fed
    waiting: int  # requests that still need a slot
    idle: int  # slots that could take one of them
    write_column: int

    @classmethod
    def read(cls, packed: jax.Array) -> Status:
        """Copy the i32[6] of `pack_status` to the host, which waits for the program that makes it."""
        return cls(*jax.device_get(packed).tolist())


def pack_status(slots: Slots, requests: Requests, layout: Layout) -> jax.Array:
    """Pack a `Status` into one array i32[6], replicated: every host of a mesh reads the same numbers."""
    live = slots.request < requests.num_tokens.shape[1]
    waiting = requests.queue_length - slots.started  # i32[Z]
    idle = jnp.where(waiting > 0, jnp.sum(~live, axis=1), 0)
    numbers = (  # in the order of Status
        slots.failed,
        jnp.max(jnp.sum(live, axis=1)),
        jnp.max(jnp.where(live, slots.generated, 0)),
        jnp.max(waiting),
        jnp.max(idle),
        slots.write_column,
    )
    return layout.constrain(jnp.stack([x.astype(jnp.int32) for x in numbers]), None)


@jax.jit
def find_unfinished(
    request: jax.Array, started: jax.Array, queue: jax.Array, queue_length: jax.Array
) -> jax.Array:
    """Mark requests that wait or are being decoded: bool[Z, Q].

    Takes fields of `Slots` and `Requests` and not the whole of them, so that it is not compiled anew for each
    size of the cache.
    """
    position = jnp.argsort(queue, axis=1)  # i32[Z, Q]: each request's position in the queue
    waiting = (position >= started[:, None]) & (position < queue_length[:, None])
    live = jnp.zeros(queue.shape, bool)

    # An idle slot's request is Q, out of bounds: it marks nothing.
    return waiting | jax.vmap(lambda x, at: x.at[at].set(True, mode="drop"))(live, request)
