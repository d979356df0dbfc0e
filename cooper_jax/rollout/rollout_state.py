"""State of a rollout while it runs: prefilled prompts, requests, and the slots that decode them.

A request is one sample of one prompt.  A slot is one row of the decode batch: it decodes one request at a
time, and when that request has finished it takes the next request of its shard's queue (continuous batching).

In a step, all slots write the same column of the suffix cache, regardless of the lengths of their responses,
so a write is one slice that is updated in place.  A slot's own keys are the `generated` columns before the
write column.

`Slots.samples`, static under jit, tells where a slot finds the keys and values of its prompt:

    G      slots are in the requests' order, one per request: the samples of a prompt share its cache
    None   slots are in any order, and `Slots.prompt_of` is their index into the prompts' cache: for Pallas
           kernels, which read through the index
    1      slots are in any order, and each has a copy of its prompt's cache: for plain XLA, which would
           gather through an index at every token

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
from cooper_jax.kernels.sampling_rows import RowSettings
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout

Caches = tuple[KV, ...]  # one for each stack of layers (generation.split_layers)


@dataclasses.dataclass(frozen=True)
class RolloutStatic:
    """Static arguments of every rollout program; a program is compiled again for each different value."""

    config: ModelConfig
    layout: Layout
    spec: SamplingSpec
    implementation: str  # of the kernels: see kernels/platform.py

    @property
    def shards(self) -> int:
        return self.layout.batch_shards

    @property
    def pallas(self) -> bool:
        """True if decode attention is a Pallas kernel, which reads only the columns that count."""
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

    # Fixed by the caller of the rollout.
    keys: jax.Array  # key[Z, Q]
    limits: jax.Array  # i32[Z, Q]: maximum number of response tokens; 0: padding
    # i32[Z, Q]: tokens of the response that are part of the prompt; the random bits of its other tokens follow
    starts: jax.Array
    # The responses so far.
    tokens: jax.Array  # i32[Z, Q, T]
    logprobs: jax.Array  # f32[Z, Q, T]
    num_tokens: jax.Array  # i32[Z, Q]
    finished: jax.Array  # bool[Z, Q]: an EOS was sampled
    # Fixed after the first tokens.
    queue: jax.Array  # i32[Z, Q]: first the requests that need a slot, largest limit first; then the others
    queue_length: jax.Array  # i32[Z]: number of requests that need a slot
    # With top-k, top-p or min-p: see `Rollout`.
    thresholds: jax.Array | None = None  # f32[Z, Q, T]
    # Leaves [Z, Q]: sampling settings of each request, in place of the SamplingSpec's; None: those of the spec
    settings: RowSettings | None = None


@struct.dataclass
class Slots:
    """The decode batch."""

    # For each slot.
    request: jax.Array  # i32[Z, U]: index within the shard; Q: the slot is idle
    token: jax.Array  # i32[Z, U]: the last sampled token, not yet fed to the model
    generated: jax.Array  # i32[Z, U]: response tokens fed so far; also the index of `token` in the response
    prompt_len: jax.Array  # i32[Z, U]
    # For the batch.
    write_column: jax.Array  # i32[]: the cache column that the next step writes
    started: jax.Array  # i32[Z]: number of requests taken from the queue
    failed: jax.Array  # bool[]: the logits of a live row were not finite
    # The caches.
    prompt_of: jax.Array  # i32[Z, U]: index of the slot's prompt within the shard; -1: none
    prompt_copies: Caches  # with samples == 1 each slot's prompt, leaves [L, Z * U, K, P, ..]; otherwise ()
    suffix: Caches  # leaves [L, Z * U, K, W, ..]
    samples: int | None = struct.field(pytree_node=False)


class Status(NamedTuple):
    """Progress that the host reads after each segment; every number is the maximum over the batch shards."""

    failed: int  # 1: the logits of a live row were not finite
    live: int  # slots with a request
    longest: int  # `Slots.generated` of the longest live response
    waiting: int  # requests that still need a slot
    idle: int  # idle slots, on shards where requests wait
    write_column: int

    @classmethod
    def read(cls, packed: jax.Array) -> Status:
        """Copy the i32[6] of `pack_status` to the host, waiting for the program that computes it."""
        return cls(*jax.device_get(packed).tolist())


def pack_status(slots: Slots, requests: Requests, layout: Layout) -> jax.Array:
    """Pack a `Status` into one array i32[6], replicated: every host of a mesh reads the same numbers."""
    live = slots.request < requests.num_tokens.shape[1]
    waiting = requests.queue_length - slots.started  # i32[Z]
    idle = jnp.where(waiting > 0, jnp.sum(~live, axis=1), 0)

    # In the order of Status.
    numbers = (
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
    """Mark the requests that wait or are being decoded: bool[Z, Q].

    The arguments are fields of `Slots` and `Requests`.  With a whole `Slots`, this would be compiled again
    for each size of the cache.
    """
    position = jnp.argsort(queue, axis=1)  # i32[Z, Q]: each request's position in the queue
    waiting = (position >= started[:, None]) & (position < queue_length[:, None])
    live = jnp.zeros(queue.shape, bool)

    # The request of an idle slot is Q, which is out of bounds and dropped.
    return waiting | jax.vmap(lambda x, at: x.at[at].set(True, mode="drop"))(live, request)
