"""Where two rollouts of the same requests part, and how narrowly.

Same keys, same weights: rollouts in other slots, segments or meshes differ where the last bits of the logits tip a
draw.  `first_differences` finds each row's first such token and its margin: how near the draw lay to another token.
A small margin is rounding; a large one means that something else differs.

N rows   P prompt tokens   T response tokens   V vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.kernels import gumbel
from cooper_jax.kernels import sampling as kernel
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
    index: int  # in the response
    tokens: tuple[int, int]  # -1: the row had ended
    logprobs: tuple[float, float]
    # Drawn by the inverse CDF or greedily: a share of probability, as `kernels.sampling.margin` says; by the Gumbel
    # race of the fused head: the distance of the two best z / T + g, in nats.
    margin: float


def first_differences(
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
    """The rows of `a` and `b` that differ, by row; their arguments are those of `engine.generate`.

    fused: they were drawn by the fused head (`head_sampling.should_fuse_head`).  Margins are computed from the common prefix, in f32
    and one row at a time, which every batch shard of the layout repeats.
    """
    a, b = (jax.device_get(x) for x in (a, b))
    tokens = [np.where(x.mask, x.tokens, -1) for x in (a, b)]
    differs = tokens[0] != tokens[1]
    rows = np.flatnonzero(differs.any(axis=1))
    keys = sampling_spec.make_row_keys(key, jnp.asarray(positions), spec.group_size)
    width = max(map(len, prompts)) + spec.max_new_tokens  # one width: compiled once
    found = []
    for row in rows.tolist():
        t = int(differs[row].argmax())
        prefix = [*prompts[row // spec.group_size], *a.tokens[row, :t].tolist()]
        line = np.zeros((layout.batch_shards, width), np.int32)
        line[:, : len(prefix)] = prefix
        valid = np.broadcast_to(np.arange(width)[None, :] < len(prefix), line.shape)
        margin = _margin(
            params, line, valid, len(prefix) - 1, keys[row : row + 1], t, config, spec, layout, fused
        )
        found.append(
            Difference(
                row=row,
                index=t,
                tokens=(int(tokens[0][row, t]), int(tokens[1][row, t])),
                logprobs=(float(a.logprobs[row, t]), float(b.logprobs[row, t])),
                margin=float(margin),
            )
        )
    return found


@jax.jit(static_argnums=(6, 7, 8, 9))
def _margin(params, line, valid, last, key, index, config, spec, layout, fused) -> jax.Array:
    hidden = transformer.hidden_states(params, config, line, valid, dtype=jnp.float32, layout=layout)[:1]
    z = transformer.compute_logits(
        params, config, jax.lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False)
    )
    if fused and spec.temperature > 0:
        words = sampling_spec.make_key_words(key, index)  # u32[1, 2]
        noise = gumbel.gumbel_at(
            words[:, :1], words[:, 1:], jnp.arange(z.shape[1], dtype=jnp.uint32)[None, :]
        )
        best = jax.lax.top_k(z / spec.temperature + noise, 2)[0]
        return best[0, 0] - best[0, 1]
    return kernel.sampling_margin(
        z, sampling_spec.draw_uniforms(key, index),
        temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p, min_p=spec.min_p,
    )[0]  # fmt: skip
