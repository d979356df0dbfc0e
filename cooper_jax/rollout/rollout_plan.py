"""Sizes of a rollout: few different ones, so that few programs are compiled, and small enough for memory.

1. `make_chunks` groups prompts into prefill chunks of equal width, with at most `PREFILL_TOKENS` tokens per
   shard.
2. `plan_memory` counts a rollout's bytes on one device; `Memory.slots` counts the slots that fit into a
   budget.

Z batch shards   B prompts   G samples per prompt   P prompt tokens   W columns of the suffix cache
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.kernels.kv import Format
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.transformer import param_specs
from cooper_jax.runtime.mesh import Layout, abstract_params
from cooper_jax.types import Params

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of this many tokens
PREFILL_TOKENS = 4096  # upper bound on the tokens of one prefill chunk on a shard
FEWEST_SLOTS = 8  # a shard's slots are not halved below this number
GIB = 2**30


def round_to_bucket(n: int) -> int:
    """Round n up to three significant bits: at most a quarter more, four sizes for each power of two."""
    # The value of the third bit from the top: 10001b is rounded in steps of 100b to 10100b.
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def choose_shared_prompts(n: int, platform: str) -> int:
    """Choose a number of prompts, at least n, for different rollouts: 8, 16, 32, ...; on CPUs 1, 2, 4, ..."""
    # On a CPU a padding row takes as long as a prompt; an accelerator is not filled by few rows.
    fewest = 1 if platform == "cpu" else 8
    return fewest << max(0, math.ceil(math.log2(n / fewest)))


def choose_shared_width(longest: int, platform: str) -> int:
    """Choose a width, at least `longest` tokens, for rollouts whose prompts differ in length.

    64, 128, 256, ...; on CPUs, which compute padding as slowly as text, also 96, 192, 384, ...
    """
    width = 64 << max(0, math.ceil(math.log2(longest / 64)))
    if platform == "cpu" and 64 < longest <= width // 4 * 3:
        return width // 4 * 3
    return width


def column_multiple(kv_format: Format) -> int:
    """Return the number that a cache's columns are a multiple of."""
    # Kernels, which need packed caches, copy whole tiles of columns; int8's scales lie along 128 lanes.
    if not kv_format.packed:
        return 1
    return 128 if kv_format.dtype == "int8" else 32


def prompt_width(longest: int, multiple: int = 1) -> int:
    """Return the padded length of prompts whose longest has `longest` tokens.

    It is a bucket (`round_to_bucket`) of multiples of 32, or of `multiple` if that is larger.
    """
    multiple = max(PROMPT_MULTIPLE, multiple)
    return round_to_bucket(-(-longest // multiple)) * multiple


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Prompts that are prefilled together: b rows of p tokens on each shard."""

    tokens: np.ndarray  # i32[Z * b, p], right-padded
    lengths: np.ndarray  # i32[Z * b]; 1 in rows without a prompt
    source: np.ndarray  # i32[B]: each prompt's row in the chunk, within its shard; -1: not in it


def list_chunk_widths(width: int) -> list[int]:
    """List the widths of chunks: 32, 64, 128, ... tokens, and `width` in place of the last."""
    doublings = max(0, math.ceil(math.log2(width / PROMPT_MULTIPLE)))
    return [min(width, PROMPT_MULTIPLE << i) for i in range(doublings + 1)]


def count_chunk_rows(width: int, prompts_per_shard: int, chunk_width: int) -> int:
    """Count the rows of every chunk of a width on a shard, if they do not depend on the prompts.

    width: of the longest prompts.
    """
    # Rows for all prompts where they have one width, otherwise for a quarter of them: other widths need some, too,
    # and more prompts of a width take several chunks.
    rows = prompts_per_shard if width == PROMPT_MULTIPLE else round_to_bucket(-(-prompts_per_shard // 4))
    return min(rows, max(1, PREFILL_TOKENS // chunk_width))


def make_empty_chunks(shards: int, prompts_per_shard: int, width: int) -> Iterator[Chunk]:
    """Make a chunk without a prompt of each shape that `make_chunks` makes with `fixed_rows`."""
    for chunk_width in list_chunk_widths(width):
        rows = count_chunk_rows(width, prompts_per_shard, chunk_width)
        yield fill_chunk([], [[] for _ in range(shards)], rows, chunk_width, prompts_per_shard)


def make_chunks(
    prompts: Sequence[Sequence[int]],
    shards: int,
    prompts_per_shard: int,
    width: int,
    *,
    fixed_rows: bool = False,
) -> Iterator[Chunk]:
    """Group all prompts into chunks by length: chunk widths are 32, 64, 128, ... tokens, at most `width`.

    Prompt i is on shard i // prompts_per_shard.  A shard with fewer prompts in a chunk than another shard is
    padded.

    fixed_rows: chunks of a width always have the rows of `count_chunk_rows`; otherwise few rows are padding.
    """
    # Doubling widths waste less than half of a row, and need few programs.
    by_width: dict[int, list[list[int]]] = {}  # width -> for each shard, the indices of its prompts
    for i, prompt in enumerate(prompts):
        doublings = max(0, math.ceil(math.log2(len(prompt) / PROMPT_MULTIPLE)))
        chunk_width = min(width, PROMPT_MULTIPLE << doublings)
        by_shard = by_width.setdefault(chunk_width, [[] for _ in range(shards)])
        by_shard[i // prompts_per_shard].append(i)

    for chunk_width, by_shard in sorted(by_width.items()):
        max_prompts = max(map(len, by_shard))  # on one shard

        # One number of rows for all chunks of a width: one program prefills them.
        rows = min(round_to_bucket(max_prompts), max(1, PREFILL_TOKENS // chunk_width))
        if fixed_rows:
            rows = count_chunk_rows(width, prompts_per_shard, chunk_width)
        for first in range(0, max_prompts, rows):
            members = [indices[first : first + rows] for indices in by_shard]
            yield fill_chunk(prompts, members, rows, chunk_width, prompts_per_shard)


def fill_chunk(
    prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    members: list[list[int]],
    rows: int,
    width: int,
    prompts_per_shard: int,
) -> Chunk:
    """Copy prompts into the arrays of a chunk.  members: for each shard, the indices of its prompts."""
    # Rows without a prompt have length 1, so that every row has a last token.
    shards = len(members)
    tokens = np.zeros((shards, rows, width), np.int32)
    lengths = np.ones((shards, rows), np.int32)
    source = np.full((shards, prompts_per_shard), -1, np.int32)
    for shard, indices in enumerate(members):
        for row, i in enumerate(indices):
            tokens[shard, row, : len(prompts[i])] = prompts[i]
            lengths[shard, row] = len(prompts[i])
            source[shard, i % prompts_per_shard] = row
    return Chunk(tokens.reshape(-1, width), lengths.reshape(-1), source.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a rollout on one device while it decodes, including the peak of its programs' temporaries.

    Caches are counted in their layout on the device: whole if the `tensor` axis does not divide their heads.
    """

    # Independent of the number of slots.
    weights: int  # the rollout's own copy
    prompts: int  # keys and values of a shard's prompts, and the activations of one prefill chunk
    requests: int  # a shard's tokens and log-probabilities, and the sampling of all first tokens
    # For each slot: activations, logits and twice its suffix cache, because resizing and compacting copy it.
    slot: int

    def total(self, slots: int) -> int:
        """Count the bytes of a rollout with this number of slots per shard."""
        return self.weights + self.prompts + self.requests + slots * self.slot

    def slots(self, budget: int) -> int:
        """Count the slots that fit into `budget` bytes.  Raises ValueError if none does."""
        num_slots = (budget - self.total(0)) // self.slot
        if num_slots < 1:
            raise ValueError(
                f"one slot needs {self.total(1) / GIB:.3f} GiB of a device "
                f"(weights {self.weights / GIB:.3f}, prompts {self.prompts / GIB:.3f}, "
                f"requests {self.requests / GIB:.3f}, the slot {self.slot / GIB:.3f}), "
                f"but rollout.memory_gib allows {budget / GIB:.3f}: raise it, shorten "
                "rollout.max_new_tokens, set rollout.kv_dtype=int8, or shard the model over more devices"
            )
        return num_slots


def should_gather(config: ModelConfig, layout: Layout, dtype: str, budget: float | None) -> bool:
    """Return True if weights gathered for the rollout (`layout.for_rollout()`) take at most half the budget.

    Otherwise they should stay sharded as in training.  Then each layer is gathered at every token when it is
    used: slow, but a model of any size can decode.

    budget: bytes of a device for the rollout, or None for no bound.
    """
    if budget is None:
        return True

    # Abstract arrays: nothing is allocated to find out.
    params = jax.tree.leaves(abstract_params(layout.for_rollout(), param_specs(config)))
    num_params = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in params)
    return num_params * jnp.dtype(dtype).itemsize <= budget / 2


def plan_memory(
    weights: Params,
    config: ModelConfig,
    layout: Layout,
    kv_format: Format,
    *,
    prompts: int,
    width: int,
    group: int,
    new_tokens: int,
    columns: int,
    own_prompts: bool,
) -> Memory:
    """Count the bytes of a rollout on one device.

    weights: arrays, or abstract arrays with shardings, in the form that the rollout reads.
    prompts: prompts per shard, of `width` tokens, with `group` samples of at most `new_tokens` tokens each.
    columns: of the suffix cache.
    own_prompts: each slot has a copy of its prompt's keys and values.
    """
    # With a shape, `layout.spec` skips mesh axes that do not divide it, and the dimension is counted whole.
    kv_shards = layout.ways(layout.spec(("kv_heads",), (config.kv_heads,))[0])
    vocab_shards = layout.ways(layout.spec(("vocab",), (config.padded_vocab,))[0])
    f32 = 4

    token_kv = kv_format.bytes_per_token(config.layers, config.kv_heads // kv_shards, config.head_dim)
    # A row's logits, and two temporaries of their size in sampling.
    logits = 3 * f32 * config.padded_vocab // vocab_shards
    # A row's activations: hidden states and the projections of one layer.
    activations = f32 * (4 * config.width + 3 * config.ffn + 4 * config.heads * config.head_dim)

    # A chunk has at least one row, which may be longer than PREFILL_TOKENS.
    prefill_tokens = min(max(PREFILL_TOKENS, width), prompts * width)
    slot_columns = columns + (width if own_prompts else 0)
    return Memory(
        weights=sum(_device_bytes(x) for x in jax.tree.leaves(weights)),
        prompts=prompts * width * token_kv + prefill_tokens * activations,
        requests=prompts * group * (new_tokens * 2 * f32 + logits),
        slot=2 * slot_columns * token_kv + activations + logits,
    )


def _device_bytes(x: jax.Array) -> int:
    """Count the bytes of an array's shard on one device."""
    return math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
