"""The transformer's forward pass in generation: one prefill, then decode steps of one token per row.

    prompts --prefill_prompts--> KV --decode_step, decode_step, ...--> hidden states

rollout/head_sampling.py samples tokens from the hidden states.

1. `prepare_generation` stores the weights in the layout that is read fastest, and splits the layers into
   stacks (`split_layers`).
2. `prefill_prompts` scans over the layers of each stack for all prompts.
3. `decode_step` loops over the layers of each stack and updates the caches in place.

Axis legend: see transformer.py; W columns of the suffix cache, l layers of one stack.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cooper_jax.kernels.kv import KV, Format, make_empty_kv, pack_kv
from cooper_jax.kernels.matmul import PANEL, matmul_cpu, matmul_plain, to_panels
from cooper_jax.kernels.schedule import Schedule
from cooper_jax.model.config import LayerKind, ModelConfig
from cooper_jax.model.layer_loops import loop_layers, make_layer_scan
from cooper_jax.model.layers import (
    GATE_UP,
    QKV,
    KeyRange,
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

# In generation, models of up to this many layers keep each layer in a stack of its own; on GPUs all models do.
LAYERS_ALONE = 8


def keeps_stack(config: ModelConfig, layout: Layout) -> bool:
    """Tell whether all layers stay in one stack, which one loop runs, or each has a stack of its own.

    XLA:CPU and XLA:GPU copy a layer's matrices out of a larger stack at every token.  On TPUs they do not, and on
    CPUs and TPUs unrolled layers take long to compile, so that only models of few layers are unrolled there.
    """
    return config.layers > LAYERS_ALONE and layout.platform not in ("gpu", "cuda")


def split_layers(layers: Params, config: ModelConfig, layout: Layout) -> tuple[Params, ...]:
    """Split the stacked layers into stacks that are each run by one loop (`keeps_stack`)."""
    if keeps_stack(config, layout):
        return (layers,)
    return _unstack(layers, config.layers)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(layers: Params, count: int) -> tuple[Params, ...]:
    return tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], layers) for i in range(count))


def prepare_generation(params: Params, config: ModelConfig, layout: Layout) -> Params:
    """Convert weights to the layout that `prefill_prompts`, `decode_step` and `compute_logits` read fastest.

    Weights whose layout stays the same are not copied.
    """
    # Projections become matrices [D, H h] once here, not at every token.
    stacks = split_layers(jax.vmap(flatten_projections)(params["layers"]), config, layout)
    # Layers that stand alone are copied in any case, and no mesh axis shards their merged columns.
    if layout.fast_cpu_products and config.layers <= LAYERS_ALONE:
        stacks = tuple(map(merge_products, stacks))
    weights = params | {"layers": stacks}

    # XLA:CPU multiplies by [D, V] faster than by [V, D]; the copy costs the head's memory once more.
    head = get_head_matrix(params, config)
    if layout.fast_cpu_products and head.dtype == jnp.float32:
        weights[UNEMBED] = head.T
    return weights


@jax.jit
def merge_products(stack: Params) -> Params:
    """Put matrices [l, D, F] that multiply the same input side by side: fewer and wider products for XLA:CPU."""
    merged = dict(stack)
    for name, parts in ((QKV, ("q", "k", "v")), (GATE_UP, ("gate", "up"))):
        merged[name] = jnp.concatenate([merged.pop(part) for part in parts], axis=-1)
    return merged


@jax.jit
def store_in_panels(weights: Params) -> Params:
    """Store the matrices of a rollout in panels (kernels/matmul.py), for `decode_step` with few rows on a CPU.

    Matrices whose columns are no multiple of a panel, and those in stacks of several layers, stay as they are.
    """
    stacks = []
    for stack in weights["layers"]:
        stacks.append(stack | {name: to_panels(w) for name, w in _panel_matrices(stack).items()})
    head = {name: to_panels(w) for name, w in _panel_matrices(weights).items()}
    return weights | {"layers": tuple(stacks)} | head


def list_panel_matrices(weights: Params) -> list[jax.Array]:
    """The matrices of which `store_in_panels` makes copies."""
    groups = [_panel_matrices(group) for group in (weights, *weights["layers"])]
    return jax.tree.leaves(groups)


def _panel_matrices(group: Params) -> Params:
    """Select the matrices that are stored in panels, of a stack or of the parameters outside the layers."""
    # Only stacks of one layer have merged matrices.
    names = (UNEMBED, QKV, GATE_UP) + (("o", "down") if QKV in group else ())
    return {name: group[name] for name in names if name in group and group[name].shape[-1] % PANEL == 0}


def make_empty_suffix(
    config: ModelConfig, stacks: tuple[Params, ...], rows: int, columns: int, kv_format: Format
) -> tuple[KV, ...]:
    """Make empty caches for `columns` sampled tokens per row: one KV [l, N, K, W, ..] per stack."""
    # Any parameter of a stack has the stack's layers as its leading axis.
    caches = []
    for stack in stacks:
        layers = jax.tree.leaves(stack)[0].shape[0]
        caches.append(make_empty_kv((layers, rows, config.kv_heads, columns), config.head_dim, kv_format))
    return tuple(caches)


def prefill_prompts(
    params: Params,  # from `prepare_generation`
    config: ModelConfig,
    tokens: jax.Array,  # i32[B, P], right-padded
    lengths: jax.Array,  # i32[B], at least 1
    *,
    dtype: jnp.dtype,
    kv_format: Format,
    layout: Layout,
) -> tuple[jax.Array, tuple[KV, ...]]:
    """Run the prompts -> (hidden [B, D] of each prompt's last token, one KV [l, B, K, P, ..] per stack)."""
    # Prompts are padded on the right, so the columns are the positions, and the causal mask hides the
    # padding.
    angles = rotary_angles(config, jnp.arange(tokens.shape[1]))
    x = embed_tokens(params, config, tokens, dtype, layout)

    def layer(x: jax.Array, w: Params, kind: LayerKind) -> tuple[jax.Array, KV]:
        q, k, v = project_qkv(w, config, x, angles[kind.rope])
        heads = sharded_causal_attention(q, k, v, layout, kind.window)
        x = output_proj_and_mlp(w, config, x, heads, layout)
        return x, pack_kv(k.swapaxes(1, 2), v.swapaxes(1, 2), kv_format)  # KV [B, K, P, ..]

    scan, caches = make_layer_scan(layer), []
    for stack, kinds in _with_kinds(params["layers"], config):
        x, cache = scan(x, cast_layers(stack, config, dtype), kinds)
        caches.append(cache)

    # Only the last token's hidden state predicts a new token; RMSNorm is per token, so the others are left
    # out.
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return rms_norm(last, params["final_norm"], config), tuple(caches)


def _with_kinds(
    stacks: tuple[Params, ...], config: ModelConfig
) -> list[tuple[Params, tuple[LayerKind, ...]]]:
    """Pair each stack of layers with the kinds of its layers."""
    pairs, first = [], 0
    for stack in stacks:
        layers = jax.tree.leaves(stack)[0].shape[0]
        pairs.append((stack, config.layer_kinds[first : first + layers]))
        first += layers
    return pairs


def decode_step(
    params: Params,  # from `prepare_generation`
    config: ModelConfig,
    token: jax.Array,  # i32[N]
    position: jax.Array,  # i32[N]: the token's position in its row, the prompt included
    prompt: tuple[KV, ...],  # per stack [l, B, K, P, ..]
    schedule: Schedule,  # which rows read which prompt
    suffix: tuple[KV, ...],  # per stack [l, N, K, W, ..], from `drop_stack_axis`
    first: jax.Array,  # i32[N]: each row's oldest column in the suffix
    write_column: jax.Array,  # i32[]: column for the token's keys and values, the same in every row
    *,
    dtype: jnp.dtype,
    kv_format: Format,
    layout: Layout,
    implementation: str = "xla",
) -> tuple[jax.Array, tuple[KV, ...]]:
    """Decode one token per row -> (hidden [N, D], suffix caches).

    The caches are the given ones with the token's keys and values written at `write_column`.

    All rows write the same column, whatever number of tokens each has generated.  The write is therefore one
    slice, which XLA does in place if the cache is donated or carried by an outer loop.
    """
    angles = rotary_angles(config, position)  # f32[N, h / 2] each
    x = embed_tokens(params, config, token, dtype, layout)
    keys = KeyRange(first, write_column)
    matmul = matmul_cpu if layout.fast_cpu_products else matmul_plain

    caches = []
    stacks = _with_kinds(params["layers"], config)
    for (stack, kinds), prompt_kv, suffix_kv in zip(stacks, prompt, suffix, strict=True):
        stack = cast_layers(stack, config, dtype)
        alone = is_alone(prompt_kv)

        # The defaults bind this iteration's values: a closure would see those of the last stack.
        def layer(i, carry, kind, stack=stack, prompt_kv=prompt_kv, alone=alone):
            x, suffix_kv = carry
            w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), stack)
            q, k, v = project_qkv(w, config, x, angles[kind.rope], matmul)
            # Write before reading: the token attends to itself.
            suffix_kv = _write_kv(suffix_kv, pack_kv(k, v, kv_format), i, write_column, alone)
            heads = sharded_decode_attention(
                q,
                prompt_kv,
                add_stack_axis(suffix_kv, alone),
                schedule,
                keys.within(position, kind.window),
                i,
                layout,
                implementation,
            )
            return output_proj_and_mlp(w, config, x, heads, layout, matmul), suffix_kv

        if alone:
            x, suffix_kv = layer(0, (x, suffix_kv), kinds[0])
        else:
            x, suffix_kv = loop_layers(layer, (x, suffix_kv), kinds)
        caches.append(suffix_kv)

    return rms_norm(x, params["final_norm"], config), tuple(caches)


def is_alone(cache: KV) -> bool:
    """Tell whether a cache [l, N, K, W, ..] belongs to a stack of one layer."""
    return cache.data[0].shape[0] == 1


def drop_stack_axis(cache: KV) -> KV:
    """Drop the leading axis of a stack of one layer; with it, XLA would copy the cache at every write."""
    return jax.tree.map(lambda x: x[0], cache) if is_alone(cache) else cache


def add_stack_axis(cache: KV, alone: bool) -> KV:
    """Undo `drop_stack_axis`.  alone: `is_alone` of the cache with its axis."""
    return jax.tree.map(lambda x: x[None], cache) if alone else cache


def _write_kv(cache: KV, new: KV, layer: jax.Array | int, column: jax.Array, alone: bool) -> KV:
    """Write `new`, leaves [N, K, ..], at `column` of one layer of `cache`.

    The cache's leaves are [l, N, K, W, ..], or [N, K, W, ..] for a stack of one layer (alone).
    """

    # One column of all rows and heads: [N, K, ..] at [layer, 0, 0, column, 0..].
    def write(cache, new):
        if alone:
            new = jnp.expand_dims(new, 2)  # [N, K, 1, ..]
            start = [0, 0, column]
        else:
            new = new[None, :, :, None]  # [1, N, K, 1, ..]
            start = [layer, 0, 0, column]
        start += [0] * (cache.ndim - len(start))  # quantised caches have leaves of different ranks
        indices = [jnp.asarray(i, jnp.int32) for i in start]
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), indices)

    return jax.tree.map(write, cache, new)
