"""The sizes that a rollout runs at: few of them, so that programs are compiled once, and such that they fit.

1. Prompts are cut into chunks of one length and at most `PREFILL_TOKENS` tokens a shard (`chunks`).
2. `Memory` says what a shard's device holds, and how many slots a budget has room for.

D batch shards   B prompts a shard   G samples a prompt   P prompt tokens   W columns of the suffix cache
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.kernels.kv import Format
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.transformer import param_specs
from cooper_jax.runtime.mesh import Layout, abstract_params
from cooper_jax.types import Params

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of so many tokens
PREFILL_TOKENS = 4096  # of one prefill, a shard
FEWEST_SLOTS = 8  # a shard's slots are not halved below this many
GIB = 2**30


def round_to_bucket(n: int) -> int:
    """n rounded up to three significant bits: at most a quarter more, four sizes an octave."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def column_multiple(form: Format) -> int:
    """What a cache's columns are a multiple of: kernels copy whole tiles, and int8's scales lie along 128 lanes."""
    return 1 if not form.packed else 128 if form.dtype == "int8" else 32


def prompt_width(longest: int, multiple: int = 1) -> int:
    """Tokens that every prompt has room for: a bucket of multiples of 32, or of `multiple` where that is more."""
    multiple = max(PROMPT_MULTIPLE, multiple)
    return round_to_bucket(-(-longest // multiple)) * multiple


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Prompts that are prefilled together: on each of D shards b rows of p tokens."""

    tokens: np.ndarray  # i32[D * b, p], right-padded
    lengths: np.ndarray  # i32[D * b]
    source: np.ndarray  # i32[D * B]: of each prompt of a shard, its row here; -1: it is not here


def make_chunks(prompts: Sequence[Sequence[int]], shards: int, size: int, width: int) -> Iterator[Chunk]:
    """All prompts, `size` of them on each shard, by length: widths double from 32 tokens on, up to `width`.

    Prompt i lies on shard i // size; a shard that has fewer in a chunk than another is padded.
    """
    by_width: dict[int, list[list[int]]] = {}
    for i, prompt in enumerate(prompts):
        own = min(width, PROMPT_MULTIPLE << max(0, math.ceil(math.log2(len(prompt) / PROMPT_MULTIPLE))))
        by_width.setdefault(own, [[] for _ in range(shards)])[i // size].append(i)
    for own, rows in sorted(by_width.items()):
        most = max(map(len, rows))
        rows_at_once = min(round_to_bucket(most), max(1, PREFILL_TOKENS // own))
        for first in range(0, most, rows_at_once):
            tokens = np.zeros((shards, rows_at_once, own), np.int32)
            lengths = np.ones((shards, rows_at_once), np.int32)
            source = np.full((shards, size), -1, np.int32)
            for shard in range(shards):
                for row, i in enumerate(rows[shard][first : first + rows_at_once]):
                    tokens[shard, row, : len(prompts[i])] = prompts[i]
                    lengths[shard, row] = len(prompts[i])
                    source[shard, i % size] = row
            yield Chunk(tokens.reshape(-1, own), lengths.reshape(-1), source.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a rollout decodes, with the most that its programs need beside them.

    Caches are counted as they are laid out on a device, not cut over `tensor` where their heads do not divide.
    """

    weights: int  # the rollout's own copy
    prompts: int  # keys and values of a shard's prompts, and a prefill's activations
    requests: int  # tokens and log-probabilities of a shard's requests, and the draw of their first tokens
    slot: int  # one slot: its suffix cache, twice for it is moved by a copy, activations and logits

    def total(self, slots: int) -> int:
        return self.weights + self.prompts + self.requests + slots * self.slot

    def slots(self, budget: int) -> int:
        """How many slots a shard has room for.  Raises ValueError, with both numbers, where none fits."""
        room = (budget - self.total(0)) // self.slot
        if room < 1:
            raise ValueError(
                f"one slot needs {self.total(1) / GIB:.3f} GiB of a device (weights {self.weights / GIB:.3f}, "
                f"prompts {self.prompts / GIB:.3f}, requests {self.requests / GIB:.3f}, the slot "
                f"{self.slot / GIB:.3f}), but rollout.memory_gib allows {budget / GIB:.3f}: raise it, shorten "
                "rollout.max_new_tokens, set rollout.kv_dtype=int8, or lay the model over more devices"
            )
        return room


def should_gather(config: ModelConfig, layout: Layout, dtype: str, budget: float | None) -> bool:
    """Whether a rollout's weights are gathered by `layout.for_rollout()`, or stay cut as training cuts them.

    budget: bytes of a device for the rollout, or None for no bound.  Gathered, they may take half of it.  Otherwise
    each layer is gathered when it is used, at every token: slow, but a model of any size decodes.
    """
    if budget is None:
        return True
    places = jax.tree.leaves(abstract_params(layout.for_rollout(), param_specs(config)))
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in places) * jnp.dtype(dtype).itemsize
    return size <= budget / 2


def plan_memory(
    weights: Params,
    config: ModelConfig,
    layout: Layout,
    form: Format,
    *,
    prompts: int,  # a shard
    width: int,
    group: int,
    new_tokens: int,
    columns: int,
    own_prompts: bool,  # each slot holds a copy of its prompt's keys and values
) -> Memory:
    ways = layout.ways(layout.spec(("kv_heads",), (config.kv_heads,))[0])
    vocab_ways = layout.ways(layout.spec(("vocab",), (config.padded_vocab,))[0])
    token = form.bytes_per_token(config.layers, config.kv_heads // ways, config.head_dim)
    f32 = 4
    logits = 3 * f32 * config.padded_vocab // vocab_ways  # of a row, with what is made of them
    # A row's activations: hidden states and the projections of one layer.
    row = f32 * (4 * config.width + 3 * config.ffn + 4 * config.heads * config.head_dim)
    return Memory(
        weights=sum(_device_bytes(x) for x in jax.tree.leaves(weights)),
        prompts=prompts * width * token + min(max(PREFILL_TOKENS, width), prompts * width) * row,
        requests=prompts * group * (new_tokens * 2 * f32 + logits),
        slot=2 * (columns + (width if own_prompts else 0)) * token + row + logits,
    )


def _device_bytes(x: jax.Array) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
