"""First differing token of each row between two rollouts of the same requests, with its sampling margin.

Two rollouts with the same keys and weights, but other slots, segments or meshes, differ only where the last
bits of the logits change the sampled token.  `find_first_differences` finds each row's first such token and
its margin: how close the row came to sampling another token.  A small margin means that rounding explains
the difference; a large margin means that something else differs.

N rows   P prompt tokens   T response tokens   V vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.kernels import gumbel, sampling
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout import sampling_spec
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params, Rollout


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first token in which a row differs."""

    row: int
    index: int  # of the token in the response
    # In the first and in the second rollout.
    tokens: tuple[int, int]  # -1: the row had ended
    logprobs: tuple[float, float]
    # Sampled from logits: a share of probability, see `kernels.sampling.sampling_margin`.  Sampled by the
    # fused head: the difference between the two largest values of z / T + Gumbel noise, in nats.
    margin: float


def find_first_differences(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    key: jax.Array,
    spec: SamplingSpec,
    a: Rollout,
    b: Rollout,
    *,
    fused: bool,
) -> list[Difference]:
    """List the rows of `a` and `b` that differ, by row; the other arguments are those of `engine.generate`.

    fused: the rollouts were sampled by the fused head (`head_sampling.should_fuse_head`).

    Margins are computed from the common prefix, in f32, one row at a time.  All batch shards of the layout
    compute the same row.
    """
    a, b = (jax.device_get(x) for x in (a, b))
    tokens = [np.where(x.mask, x.tokens, -1) for x in (a, b)]  # i32[N, T] each
    differs = tokens[0] != tokens[1]
    rows = np.flatnonzero(differs.any(axis=1))
    keys = sampling_spec.make_row_keys(key, jnp.asarray(positions), spec.group_size)

    # One width for all rows, so that one program is compiled.
    width = max(map(len, prompts)) + spec.max_new_tokens

    differences = []
    for row in rows.tolist():
        # Up to its first difference a row is the same in both rollouts.
        index = int(differs[row].argmax())
        prefix = [*prompts[row // spec.group_size], *a.tokens[row, :index].tolist()]
        padded = np.zeros((layout.batch_shards, width), np.int32)
        padded[:, : len(prefix)] = prefix
        valid = np.broadcast_to(np.arange(width)[None, :] < len(prefix), padded.shape)
        row_key = keys[row : row + 1]
        margin = _margin(params, padded, valid, len(prefix) - 1, row_key, index, config, spec, layout, fused)
        differences.append(
            Difference(
                row=row,
                index=index,
                tokens=(int(tokens[0][row, index]), int(tokens[1][row, index])),
                logprobs=(float(a.logprobs[row, index]), float(b.logprobs[row, index])),
                margin=float(margin),
            )
        )
    return differences


@jax.jit(static_argnums=(6, 7, 8, 9))
def _margin(
    params: Params,
    tokens: jax.Array,  # i32[Z, P + T]: the same row on each of Z batch shards
    valid: jax.Array,  # bool[Z, P + T]
    last: jax.Array,  # i32[]: the last valid token
    key: jax.Array,  # key[1]
    index: jax.Array,  # i32[]: of the next token in its response
    config: ModelConfig,
    spec: SamplingSpec,
    layout: Layout,
    fused: bool,
) -> jax.Array:
    """Compute the margin of the token that follows `tokens`: f32[]."""
    hidden = transformer.hidden_states(params, config, tokens, valid, dtype=jnp.float32, layout=layout)[:1]
    hidden = jax.lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False)  # f32[1, D]
    logits = transformer.compute_logits(params, config, hidden)  # f32[1, V]

    # The fused head samples by the Gumbel-max trick, whose noise is a function of the key words: it is made
    # again here.  Greedy rows have no noise in either head.
    if fused and spec.temperature > 0:
        words = sampling_spec.make_key_words(key, index)  # u32[1, 2]
        entries = jnp.arange(logits.shape[1], dtype=jnp.uint32)[None, :]
        noise = gumbel.gumbel_at(words[:, :1], words[:, 1:], entries)
        top_two = jax.lax.top_k(logits / spec.temperature + noise, 2)[0]
        return top_two[0, 0] - top_two[0, 1]

    # The other head inverts the CDF with uniforms of the same key.
    margin = sampling.sampling_margin(
        logits,
        sampling_spec.draw_uniforms(key, index),
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
    )
    return margin[0]
