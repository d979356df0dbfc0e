"""Sampling of a token from each row's hidden state: the output head and the sampling, fused where possible.

    xla kernels, or with top-k, top-p or min-p          logits [N, V], then `sampling_spec.sample_tokens`
    with settings of each row (serving)                 logits [N, V], then `kernels.sampling_rows`
    TPU and GPU kernels, temperature alone or greedy    `kernels.head`: logits are never written

On a mesh, each row is sampled on the shard that decodes it.  If a mesh axis shards the vocabulary, small
collectives combine the results of its shards.

N rows   D width   V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.head import head_sample
from cooper_jax.kernels.sampling_rows import RowSettings, sample_rows
from cooper_jax.kernels.sampling_statistics import BLOCK
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import run_sharded
from cooper_jax.rollout import sampling_spec
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params


class NextTokens(NamedTuple):
    """A sampled token per row."""

    token: jax.Array  # i32[N]
    logprob: jax.Array  # f32[N], under the sampled distribution
    # f32[N]: the logit that separates the tokens which top-k, top-p and min-p keep from the others; None: no filter
    threshold: jax.Array | None


def should_fuse_head(implementation: str, spec: SamplingSpec) -> bool:
    """Return True if `sample_from_hidden` samples in the head's kernel, which does not write logits."""
    return platform.is_pallas(implementation) and spec.full_softmax


def sample_from_hidden(
    weights: Params,
    config: ModelConfig,
    hidden: jax.Array,  # [N, D]
    keys: jax.Array,  # key[N], from `sampling_spec.make_row_keys`
    position: jax.Array,  # i32[] or i32[N]: the token's index in its response
    spec: SamplingSpec,
    layout: Layout,
    implementation: str,
    *,
    settings: RowSettings | None = None,  # leaves [N]: of each row, in place of the spec's
) -> NextTokens:
    """Sample one token per row.

    With `settings`, log-probabilities are those of `kernels.sampling_rows`, and there are no thresholds.

    A row whose logits are not finite gives token 0 and log-probability NaN.
    """
    # Kernels are not partitioned by the compiler: both ways run under `shard_map` on a mesh.
    head = transformer.get_head_matrix(weights, config)
    batch_axis = layout.spec(("batch",))[0]
    vocab_axis = layout.spec(("vocab",), head.shape)[0]
    if layout.ways(vocab_axis) == 1:
        vocab_axis = None
    rows = PartitionSpec(batch_axis)

    if settings is None and should_fuse_head(implementation, spec):

        def sample_fused(hidden, head, words):
            sampled = head_sample(
                hidden,
                head,
                words,
                temperature=spec.temperature,
                vocab_size=config.vocab_size,
                axis_name=vocab_axis,
                implementation=implementation,
            )
            return NextTokens(sampled.token, sampled.logprob, None)

        words = sampling_spec.make_key_words(keys, position)
        in_specs = rows, PartitionSpec(vocab_axis), rows
        return run_sharded(sample_fused, layout, in_specs, rows)(hidden, head.astype(hidden.dtype), words)

    # Sampling from sharded logits exchanges blocks of the vocabulary between neighbours.  If a shard is too
    # small for that, the compiler gathers the logits.
    if vocab_axis is not None and head.shape[0] < layout.ways(vocab_axis) ** 2 * BLOCK:
        vocab_axis = None

    def sample_logits(logits, keys, position):
        sampled = sampling_spec.sample_tokens(
            logits, keys, position, spec, axis_name=vocab_axis, implementation=implementation
        )
        return NextTokens(sampled.token, sampled.logprob, sampled.threshold)

    def sample_own(logits, keys, position, settings):
        uniforms = sampling_spec.draw_uniforms(keys, position)
        sampled = sample_rows(logits, uniforms, settings, axis_name=vocab_axis, implementation=implementation)
        return NextTokens(sampled.token, sampled.logprob, None)

    logits = transformer.compute_logits(weights, config, hidden)
    position = jnp.broadcast_to(position, keys.shape)
    in_specs = PartitionSpec(batch_axis, vocab_axis), rows, rows
    if settings is not None:
        run = run_sharded(sample_own, layout, (*in_specs, rows), rows)
        return run(logits, keys, position, settings)
    return run_sharded(sample_logits, layout, in_specs, rows)(logits, keys, position)
