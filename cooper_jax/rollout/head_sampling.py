"""From hidden states to tokens: the head and the draw, fused where that pays.

    xla kernels, or anything is cut away (top-k, top-p, min-p)    logits [N, V], then `sampling_spec.sample_tokens`
    TPU and GPU kernels, temperature alone or greedy              `kernels.head`: logits are never written

Over a mesh rows are drawn where they are decoded, and a vocabulary that is cut over an axis is reduced by small
collectives.

N rows   D width   V vocabulary
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.head import head_sample
from cooper_jax.kernels.sampling_statistics import BLOCK
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import run_sharded
from cooper_jax.rollout import sampling_spec
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params


def should_fuse_head(implementation: str, spec: SamplingSpec) -> bool:
    """Whether `draw` samples in the head's kernel, without writing logits."""
    return platform.is_pallas(implementation) and spec.uncut


def sample_from_hidden(
    weights: Params,
    config: ModelConfig,
    hidden: jax.Array,  # [N, D]
    keys: jax.Array,  # key[N], of `sampling_spec.make_row_keys`
    position: jax.Array,  # i32[] or i32[N]: the token's index in its response
    spec: SamplingSpec,
    layout: Layout,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    """One token a row: i32[N] and its log-probability f32[N] under the distribution drawn from.

    A row without a distribution gives token 0 and NaN.
    """
    head = transformer.get_head_matrix(weights, config)
    batch, vocab = layout.spec(("batch",))[0], layout.spec(("vocab",), head.shape)[0]
    vocab = vocab if layout.ways(vocab) > 1 else None
    rows = PartitionSpec(batch)

    if should_fuse_head(implementation, spec):

        def fused(hidden, head, words):
            drawn = head_sample(
                hidden, head, words,
                temperature=spec.temperature, vocab_size=config.vocab_size,
                axis_name=vocab, implementation=implementation,
            )  # fmt: skip
            return drawn.token, drawn.logprob

        words = sampling_spec.make_key_words(keys, position)
        places = rows, PartitionSpec(vocab), rows
        return run_sharded(fused, layout, places, rows)(hidden, head.astype(hidden.dtype), words)

    def from_logits(logits, keys, position):
        drawn = sampling_spec.sample_tokens(
            logits, keys, position, spec, axis_name=vocab, implementation=implementation
        )
        return drawn.token, drawn.logprob

    if vocab is not None and head.shape[0] < layout.ways(vocab) ** 2 * BLOCK:
        vocab = None  # shards too small to trade blocks: such logits are gathered
    logits = transformer.compute_logits(weights, config, hidden)
    position = jnp.broadcast_to(position, keys.shape)
    places = PartitionSpec(batch, vocab), rows, rows
    return run_sharded(from_logits, layout, places, rows)(logits, keys, position)
