"""Sampling of tokens with settings of each row: for batches whose rows belong to different requests.

`sample_rows` gives each row the token that `sampling.sample_logits` gives a batch with the row's settings:

1. Greedy rows take the first of the largest logits.
2. For the other rows the logits are divided by the row's temperature, and those that its top-k, top-p or min-p
   drops become -inf.  `sample_logits` then samples at temperature 1 without filters.

The searches for the thresholds are plain jnp.  They run only if a row of the batch needs them.

The log-probability is the model's own, log softmax(logits): at temperature 1 and without filters, whatever the
row's settings are.

N rows   V vocabulary, or a shard's contiguous columns of it
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cooper_jax.kernels.sampling import SampledTokens, pad_to_blocks, sample_logits
from cooper_jax.kernels.sampling_statistics import (
    ONE,
    gather_shards,
    largest_threshold,
    sum_blocks,
    sum_pairwise,
)

Array = jax.Array | np.ndarray


@struct.dataclass
class RowSettings:
    """Sampling settings of each row, in the form that `sample_rows` reads; `make_row_settings` makes them."""

    inverse_temperature: Array  # f32[N]; 0: greedy
    top_k: Array  # i32[N]; 0: off
    top_p_share: Array  # i32[N], in steps of 2^-30; 2^30: off
    min_p_depth: Array  # f32[N]: distance of min-p's threshold below the largest logit; inf: off


class RowTokens(NamedTuple):
    """One sampled token per row; for a row whose logits are not finite, token 0 and NaN."""

    token: jax.Array  # i32[N]
    logprob: jax.Array  # f32[N], natural, of the model's own softmax


def make_row_settings(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> RowSettings:
    """Make the settings of one row, as NumPy arrays [], from the arguments of `sampling.sample_logits`."""
    # As in sampling_statistics: a share of the total in steps of 2^-30, and a depth in logits.
    depth = math.inf if min_p == 0 else -temperature * math.log(min_p)
    return RowSettings(
        inverse_temperature=np.asarray(0.0 if temperature == 0 else 1.0 / temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p_share=np.asarray(math.ceil(top_p * ONE), np.int32),
        min_p_depth=np.asarray(depth, np.float32),
    )


def sample_rows(
    logits: jax.Array,  # f32[N, V]; with axis_name: this shard's contiguous columns [N, V / shards]
    uniforms: jax.Array,  # f32[N, LEVELS], in [0, 1)
    settings: RowSettings,
    *,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> RowTokens:
    """Sample one token per row.  The last two arguments are those of `sampling.sample_logits`."""
    logits = pad_to_blocks(logits.astype(jnp.float32), axis_name)

    def sample(x: jax.Array, temperature: float) -> SampledTokens:
        return sample_logits(
            x, uniforms, temperature=temperature, top_k=0, top_p=1.0, axis_name=axis_name,
            implementation=implementation,
        )  # fmt: skip

    max_logit = jnp.max(logits, axis=-1)
    if axis_name is not None:
        max_logit = jax.lax.pmax(max_logit, axis_name)
    is_greedy = settings.inverse_temperature == 0.0
    scale = jnp.where(is_greedy, 1.0, settings.inverse_temperature)
    z = (logits - max_logit[:, None]) * scale[:, None]
    threshold = _find_thresholds(logits, max_logit, z, settings, axis_name)

    kept = jnp.where(logits >= threshold[:, None], z, -jnp.inf)
    kept = jnp.where(jnp.isnan(logits), jnp.nan, kept)  # a comparison with NaN is False
    sampled = sample(kept, 1.0)
    greedy = sample(logits, 0.0)
    token = jnp.where(is_greedy, greedy.token, sampled.token)

    # The greedy sample's `full_logprob` is max - logsumexp: the model's, at temperature 1, of the largest logit.
    own = _take_logit(logits, token, axis_name)
    valid = ~jnp.isnan(jnp.where(is_greedy, greedy.logprob, sampled.logprob))
    logprob = jnp.where(valid, greedy.full_logprob + (own - max_logit), jnp.nan)
    return RowTokens(token, logprob)


def _find_thresholds(
    logits: jax.Array, max_logit: jax.Array, z: jax.Array, settings: RowSettings, axis_name: str | None
) -> jax.Array:
    """Find each row's threshold f32[N]: tokens with a logit of at least this are kept; -inf: all are.

    The definitions are those of `sampling_statistics.row_statistics`.
    """
    is_random = settings.inverse_temperature > 0.0
    has_top_k = is_random & (settings.top_k > 0)
    has_top_p = is_random & (settings.top_p_share < ONE)
    all_kept = jnp.full_like(max_logit, -jnp.inf)

    def sum_over_shards(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def find_top_k(_):
        def keeps_k(v):
            # A sum of ones is exact in f32 below 2^24.
            count = jnp.sum(sum_blocks((logits >= v[:, None]).astype(jnp.float32)), axis=-1)
            return sum_over_shards(count) >= settings.top_k

        return jnp.where(has_top_k, largest_threshold(max_logit, keeps_k), -jnp.inf)

    def find_top_p(threshold):
        p = jnp.where(logits >= threshold[:, None], jnp.exp(z), 0.0)
        scale = ONE / sum_pairwise(gather_shards(sum_blocks(p), axis_name))  # f32[N]

        def keeps_p(v):
            kept = sum_blocks(jnp.where(logits >= v[:, None], p, 0.0))
            shares = jnp.round(kept * scale[:, None]).astype(jnp.int32)
            return sum_over_shards(jnp.sum(shares, axis=-1)) >= settings.top_p_share

        found = jnp.maximum(threshold, largest_threshold(max_logit, keeps_p))
        return jnp.where(has_top_p, found, threshold)

    threshold = _run_if_needed(jnp.any(has_top_k), find_top_k, all_kept, axis_name)
    threshold = _run_if_needed(jnp.any(has_top_p), find_top_p, threshold, axis_name)
    return jnp.where(is_random, jnp.maximum(threshold, max_logit - settings.min_p_depth), threshold)


def _run_if_needed(needed: jax.Array, search, threshold: jax.Array, axis_name: str | None) -> jax.Array:
    """Run a search if a row needs it.  Over several shards it always runs: it contains collectives."""
    if axis_name is not None:
        return search(threshold)
    return jax.lax.cond(needed, search, lambda x: x, threshold)


def _take_logit(logits: jax.Array, token: jax.Array, axis_name: str | None) -> jax.Array:
    """Take each row's logit of a token, f32[N]; the shard that has it sends it to the others."""
    if axis_name is None:
        return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    column = token - jax.lax.axis_index(axis_name) * logits.shape[1]
    has_token = (column >= 0) & (column < logits.shape[1])
    column = jnp.clip(column, 0, logits.shape[1] - 1)
    own = jnp.take_along_axis(logits, column[:, None], axis=1)[:, 0]
    return jax.lax.psum(jnp.where(has_token, own, 0.0), axis_name)
