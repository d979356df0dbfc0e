"""The transformer while it generates: prompts are run once, then each row goes on by a token at a time.

    prompts --prefill--> KV --decode_step, decode_step, ...--> hidden states for the draw (rollout/head_sampling.py)

1. `for_generation` puts the weights as they are read fastest; layers are cut into stacks (`split_layers`).
2. `prefill` scans each stack over all prompts; `decode_step` loops over it, and updates the caches in place.

Axis legend: see transformer.py; W columns of the suffix cache, l layers of a stack.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cooper_jax.kernels.kv import KV, Format, make_empty_kv, pack_kv
from cooper_jax.kernels.matmul import matmul_cpu, matmul_plain
from cooper_jax.kernels.schedule import Schedule
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import (
    flatten_projections,
    output_proj_and_mlp,
    project_qkv,
    rms_norm,
    rotary_angles,
    sharded_causal_attention,
    sharded_decode_attention,
)
from cooper_jax.model.transformer import UNEMBED, cast_layers, embed_tokens, get_head_matrix
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params

LAYERS_ALONE = 8  # a model of so few layers keeps each in arrays of its own while it generates


def split_layers(layers: Params, config: ModelConfig) -> tuple[Params, ...]:
    """The stacked layers as generation takes them: stacks, each run by one loop.

    One stack of all; of few layers, stacks of one.  Out of a stack XLA:CPU copies a layer's matrices before it
    multiplies with them, at every token; unrolling many layers would take minutes to compile.
    """
    if config.layers > LAYERS_ALONE:
        return (layers,)
    return _apart(layers, config.layers)


@functools.partial(jax.jit, static_argnums=1)
def _apart(layers: Params, count: int) -> tuple[Params, ...]:
    return tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], layers) for i in range(count))


def prepare_generation(params: Params, config: ModelConfig, layout: Layout) -> Params:
    """The weights as `prefill`, `decode_step` and `logits` read them fastest; what stays as it is is not copied."""
    weights = params | {"layers": split_layers(jax.vmap(flatten_projections)(params["layers"]), config)}
    head = get_head_matrix(params, config)
    if layout.fast_cpu_products and head.dtype == jnp.float32:
        weights[UNEMBED] = head.T
    return weights


def make_empty_suffix(
    config: ModelConfig, stacks: tuple[Params, ...], rows: int, columns: int, form: Format
) -> tuple[KV, ...]:
    """Caches for `columns` sampled tokens of each row: of each stack a KV [l, N, K, W, ..]."""
    counts = [jax.tree.leaves(stack)[0].shape[0] for stack in stacks]
    return tuple(make_empty_kv((n, rows, config.kv_heads, columns), config.head_dim, form) for n in counts)


def prefill_prompts(
    params: Params,  # through `for_generation`
    config: ModelConfig,
    tokens: jax.Array,  # i32[B, P], right-padded
    lengths: jax.Array,  # i32[B], at least 1
    *,
    dtype: jnp.dtype,
    form: Format,
    layout: Layout,
) -> tuple[jax.Array, tuple[KV, ...]]:
    """Run the prompts once -> (hidden [B, D] of each prompt's last token, of each stack a KV [l, B, K, P, ..])."""
    rope = rotary_angles(config, jnp.arange(tokens.shape[1]))
    x = embed_tokens(params, tokens, dtype, layout)

    def layer(x, w):
        q, k, v = project_qkv(w, config, x, rope)
        x = output_proj_and_mlp(w, config, x, sharded_causal_attention(q, k, v, layout), layout)
        return x, pack_kv(k.swapaxes(1, 2), v.swapaxes(1, 2), form)

    caches = []
    for stack in params["layers"]:
        x, cache = jax.lax.scan(layer, x, cast_layers(stack, config, dtype))
        caches.append(cache)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return rms_norm(last, params["final_norm"], config.norm_eps), tuple(caches)


def decode_step(
    params: Params,  # through `for_generation`
    config: ModelConfig,
    token: jax.Array,  # i32[N]
    position: jax.Array,  # i32[N]: where it stands, its prompt's tokens counted
    prompt: tuple[KV, ...],  # of each stack [l, B, K, P, ..]
    plan: Schedule,  # which rows read which prompt
    suffix: tuple[KV, ...],  # of each stack [l, N, K, W, ..], through `bare`
    first: jax.Array,  # i32[N]: the row's oldest column of the suffix
    column: jax.Array,  # i32[]: where the token's keys and values go, in every row
    *,
    dtype: jnp.dtype,
    form: Format,
    layout: Layout,
    implementation: str = "xla",
) -> tuple[jax.Array, tuple[KV, ...]]:
    """One token further -> (hidden [N, D], the suffix caches with the token's keys and values at `column`).

    Rows of different ages write one column, a slice of the cache: donated (or carried by an outer loop), it is
    updated in place.
    """
    rope = rotary_angles(config, position)  # f32[N, h / 2] each
    x = embed_tokens(params, token, dtype, layout)
    product = matmul_cpu if layout.fast_cpu_products else matmul_plain
    caches = []
    for stack, shared, own in zip(params["layers"], prompt, suffix, strict=True):
        stack = cast_layers(stack, config, dtype)
        alone = is_alone(shared)

        def layer(i, carry, stack=stack, shared=shared, alone=alone):
            x, own = carry
            w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), stack)
            q, k, v = project_qkv(w, config, x, rope, product)
            own = _write(own, pack_kv(k, v, form), i, column, alone)
            heads = sharded_decode_attention(
                q, shared, add_stack_axis(own, alone), plan, first, column, i, layout, implementation
            )
            return output_proj_and_mlp(w, config, x, heads, layout, product), own

        count = shared.data[0].shape[0]
        x, own = layer(0, (x, own)) if alone else jax.lax.fori_loop(0, count, layer, (x, own))
        caches.append(own)
    return rms_norm(x, params["final_norm"], config.norm_eps), tuple(caches)


def is_alone(cache: KV) -> bool:
    """Whether a cache [l, N, K, W, ..] is that of a stack of one layer."""
    return cache.data[0].shape[0] == 1


def drop_stack_axis(cache: KV) -> KV:
    """A stack of one without its axis: under it XLA would write the cache twice, once into a copy."""
    return jax.tree.map(lambda x: x[0], cache) if is_alone(cache) else cache


def add_stack_axis(cache: KV, alone: bool) -> KV:
    """The inverse of `bare`.  alone: `is_alone` of the cache before it."""
    return jax.tree.map(lambda x: x[None], cache) if alone else cache


def _write(cache: KV, new: KV, layer: jax.Array, column: jax.Array, alone: bool) -> KV:
    """`new`, leaves [N, K, ..], at `column` of `layer` of leaves [L, N, K, W, ..], or of [N, K, W, ..] if alone."""

    def write(cache, new):
        new = jnp.expand_dims(new, 2) if alone else new[None, :, :, None]
        at = [0] * cache.ndim
        at[2 if alone else 3] = column
        at[0] = 0 if alone else layer
        at = [jnp.asarray(i, jnp.int32) for i in at]
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), at)

    return jax.tree.map(write, cache, new)
