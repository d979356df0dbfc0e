"""One transformer for all model families: pure functions over a nested dict of arrays.

    tokens --hidden_states--> hidden --compute_logits | token_logprobs--> the policy
                                     --score_last_token-----------------> the reward model

1. `hidden_states` moves each row's real tokens to its front, so padding may be on either side or in between.
   Then positions count real tokens only, all rows share the rotary tables, and the causal mask also hides the
   padding: attention kernels need no other mask.  At the end the hidden states are moved back to the columns
   of their tokens.
2. Layers are stacked on a leading axis and scanned (layer_loops.py: also those that differ from each other).
3. Master weights are f32 (frozen ones may be bf16) and cast once per call; norms, rotations, softmax,
   logsumexp and scores are f32.

Axis legend: N rows, S tokens, T response tokens, D width, H query heads, K key/value heads, h head_dim,
F feed-forward width, L layers, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.attention import default_implementation, supports_prefixes, supports_segments
from cooper_jax.kernels.head import head_logprobs
from cooper_jax.kernels.matmul import matmul_cpu
from cooper_jax.model.config import LayerKind, ModelConfig
from cooper_jax.model.layer_loops import make_layer_scan
from cooper_jax.model.layers import (
    constrain_batch,
    flatten_projections,
    output_proj_and_mlp,
    project_qkv,
    rms_norm,
    rotary_angles,
    run_sharded,
    sharded_causal_attention,
)
from cooper_jax.model.lora import adapter_specs
from cooper_jax.runtime.mesh import Layout, ParamSpec, is_spec
from cooper_jax.runtime.optim import ADAPTERS
from cooper_jax.types import Params


def param_specs(config: ModelConfig, head: str = "logits") -> Params:
    """Declare every parameter of the model once: shape, logical axes, initialiser.

    head: "logits" (an untied model has an `lm_head`), or "score" (a vector `score` [D], no `lm_head`).

    Matrices are initialised with standard deviation 1 / sqrt(inputs).  Those that write to the residual
    stream have 1 / sqrt(2 L) of that.  With the usual 0.02 for all matrices, models of a width of about 100
    learn too little in a few hundred steps.  Raises ValueError for another head.
    """
    if head not in ("logits", "score"):
        raise ValueError(f"head {head!r} is none of logits, score")

    c = config
    L, D, H, K, h, F = c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn
    input_scale, residual_factor = D**-0.5, (2 * L) ** -0.5

    # A tied embedding is the head's matrix, too, so it has a matrix's scale: initial logits have variance 1.
    # Any other embedding enters norms and the residual stream only.  There its scale is a choice: it decides
    # how much the layers' outputs count beside it.
    embed_scale = 0.5
    if head == "logits" and c.tied:
        embed_scale = input_scale
    embed = ParamSpec((c.padded_vocab, D), ("vocab", "embed"), scale=embed_scale)

    # Norms stay float32.  Initially they multiply with 1.
    norm_init = "zeros" if c.norm_offset else "ones"

    def norm(size: int) -> ParamSpec:
        return ParamSpec((L, size), ("layers", None), norm_init, keep_f32=True)

    # One layer's parameters with the layer axis in front.
    q_axes, kv_axes = ("heads", "head_dim"), ("kv_heads", "head_dim")
    layers = {
        "attn_norm": norm(D),
        "q": ParamSpec((L, D, H, h), ("layers", "embed", *q_axes), scale=input_scale),
        "k": ParamSpec((L, D, K, h), ("layers", "embed", *kv_axes), scale=input_scale),
        "v": ParamSpec((L, D, K, h), ("layers", "embed", *kv_axes), scale=input_scale),
        "o": ParamSpec((L, H, h, D), ("layers", *q_axes, "embed"), scale=(H * h) ** -0.5 * residual_factor),
        "mlp_norm": norm(D),
        "gate": ParamSpec((L, D, F), ("layers", "embed", "ffn"), scale=input_scale),
        "up": ParamSpec((L, D, F), ("layers", "embed", "ffn"), scale=input_scale),
        "down": ParamSpec((L, F, D), ("layers", "ffn", "embed"), scale=F**-0.5 * residual_factor),
    }
    if c.qkv_bias:
        layers["q_bias"] = ParamSpec((L, H, h), ("layers", *q_axes), "zeros")
        layers["k_bias"] = ParamSpec((L, K, h), ("layers", *kv_axes), "zeros")
        layers["v_bias"] = ParamSpec((L, K, h), ("layers", *kv_axes), "zeros")
    if c.qk_norm:
        layers |= {"q_norm": norm(h), "k_norm": norm(h)}
    if c.post_norms:
        layers |= {"attn_post_norm": norm(D), "mlp_post_norm": norm(D)}

    final_norm = ParamSpec((D,), (None,), norm_init, keep_f32=True)
    specs: Params = {"embed": embed, "layers": layers, "final_norm": final_norm}
    if head == "score":
        specs["score"] = ParamSpec((D,), (None,), scale=input_scale)
    elif not c.tied:
        specs["lm_head"] = dataclasses.replace(embed, scale=input_scale)
    if c.lora is not None:
        specs = set_base_dtype(specs, c.lora.base_dtype)
        specs[ADAPTERS] = adapter_specs(c.lora, layers)
    return specs


def set_base_dtype(specs: Params, dtype: str) -> Params:
    """Declare the type in which frozen weights are stored: of all parameters but norms and the score vector."""

    def set_dtype(spec: ParamSpec) -> ParamSpec:
        return spec if spec.keep_f32 else dataclasses.replace(spec, dtype=dtype)

    return jax.tree.map(set_dtype, specs, is_leaf=is_spec) | {k: v for k, v in specs.items() if k == "score"}


def cast_layers(layers: Params, config: ModelConfig, dtype: jnp.dtype) -> Params:
    """Cast the layers' parameters to the compute dtype, except those declared to stay float32."""
    # A rollout's merged matrices are not declared.
    keep_f32 = {name for name, spec in param_specs(config)["layers"].items() if spec.keep_f32}
    return {name: w if name in keep_f32 else w.astype(dtype) for name, w in layers.items()}


def _take_layers(params: Params, config: ModelConfig, dtype: jnp.dtype) -> Params:
    """The layers' parameters in the compute dtype, with the adapters of each layer as its entry "lora"."""
    layers = cast_layers(params["layers"], config, dtype)
    if config.lora is None:
        return layers
    return layers | {ADAPTERS: jax.tree.map(lambda x: x.astype(dtype), params[ADAPTERS])}


# --- hidden states -------------------------------------------------------------------------------------


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,  # i32[N, S]
    valid: jax.Array,  # bool[N, S]: real tokens; padding may be anywhere
    *,
    dtype: jnp.dtype,
    remat: bool = False,
    layout: Layout,
) -> jax.Array:
    """Compute the hidden states after the final norm -> `dtype`[N, S, D].

    At padding they are finite and meaningless; padding tokens do not influence other positions.

    Args:
      remat: recompute each layer in the backward pass, which stores one [N, S, D] per layer instead of all
        activations.
    """
    # Token ids (4 bytes each) are moved before the embedding, so hidden states are moved once, at the end.
    packed_index = _packed_index(valid)
    token_index = jnp.argsort(packed_index, axis=1)  # i32[N, S]: the inverse permutation
    x = _run_layers(
        params,
        config,
        jnp.take_along_axis(tokens, token_index, axis=1),
        jnp.arange(tokens.shape[1]),
        None,
        dtype=dtype,
        remat=remat,
        layout=layout,
    )
    return _permute(x, packed_index, token_index)


def should_pack(packing: str, config: ModelConfig, layout: Layout, dtype: str) -> bool:
    """True if a model's rows are to hold several sequences.

    packing: one of typed_config.PACKINGS; "auto": True where attention over such rows has a kernel, or needs none.
    """
    if packing != "auto":
        return packing == "on"
    return supports_segments(default_implementation(jnp.dtype(dtype), config.head_dim, layout.platform))


def supports_shared_prompts(config: ModelConfig, layout: Layout) -> bool:
    """True if packed rows may have `prefixes`: the layout's attention can share them, and no layer has a window."""
    # A window counts columns, and a response that shares its prompt does not stand beside it.
    has_window = any(kind.window is not None for kind in config.layer_kinds)
    return supports_prefixes(layout.platform) and not has_window


def packed_hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,  # i32[R, C]
    segments: jax.Array,  # i32[R, C]: the sequence of each token within its row; 0 at padding, which ends the row
    positions: jax.Array,  # i32[R, C]: the token's place in its sequence
    prefixes: jax.Array
    | None = None,  # i32[R, C]: the segment of the token's prompt; None: prompts are not shared
    *,
    dtype: jnp.dtype,
    remat: bool = False,
    layout: Layout,
) -> jax.Array:
    """`hidden_states` of rows that hold several sequences, one behind the other -> `dtype`[R, C, D].

    Sequences do not influence each other: each has the hidden states that it would have in a row of its own.  With
    `prefixes` the responses to a prompt follow it as segments of their own.
    """
    return _run_layers(
        params,
        config,
        tokens,
        positions,
        segments,
        prefixes,
        dtype=dtype,
        remat=remat,
        layout=layout,
    )


def _run_layers(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,  # i32[N, S], padding behind the real ones
    positions: jax.Array,  # i32[S] or i32[N, S]
    segments: jax.Array | None = None,  # i32[N, S]; None: a row is one sequence
    prefixes: jax.Array | None = None,  # i32[N, S]; None: prompts are not shared
    *,
    dtype: jnp.dtype,
    remat: bool,
    layout: Layout,
) -> jax.Array:
    angles = rotary_angles(config, positions)  # f32[.., S, h / 2] each
    x = embed_sharded(params, config, tokens, dtype, layout)

    # A loop's body is compiled once.  The weights of all layers are cast before it, once per call.
    def layer(x: jax.Array, w: Params, kind: LayerKind) -> tuple[jax.Array, None]:
        w = flatten_projections(w)
        q, k, v = project_qkv(w, config, x, angles[kind.rope])
        attention = sharded_causal_attention(q, k, v, layout, kind.window, segments, prefixes)
        return output_proj_and_mlp(w, config, x, attention, layout), None

    if remat:
        layer = jax.checkpoint(layer, static_argnums=2)
    weights = _take_layers(params, config, dtype)
    x, _ = make_layer_scan(layer)(x, weights, config.layer_kinds)
    return rms_norm(x, params["final_norm"], config)


def _packed_index(valid: jax.Array) -> jax.Array:
    """Each token's index when the real tokens are moved to the front, in order: bool[N, S] -> i32[N, S]."""
    # A real token's index is the number of real tokens before it.  Padding follows all real tokens, in order.
    real = valid.astype(jnp.int32)
    before = jnp.cumsum(real, axis=1) - real
    padding_before = jnp.arange(valid.shape[1])[None, :] - before
    return jnp.where(valid, before, real.sum(axis=1, keepdims=True) + padding_before)


@jax.custom_vjp
def _permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Permute each row's positions: x[n, index[n, s]].

    The backward pass applies the inverse permutation, so it is a gather, too, instead of a scatter.
    """
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


_permute.defvjp(
    lambda x, index, inverse: (_permute(x, index, inverse), inverse),
    lambda inverse, g: (jnp.take_along_axis(g, inverse[:, :, None], axis=1), None, None),
)


def embed_tokens(
    params: Params, config: ModelConfig, tokens: jax.Array, dtype: jnp.dtype, layout: Layout
) -> jax.Array:
    """Look tokens up in the embedding table: i32[N, ..] -> `dtype`[N, .., D]."""
    x = _scale_embedding(params["embed"][tokens].astype(dtype), config)
    return constrain_batch(x, layout)


def _scale_embedding(x: jax.Array, config: ModelConfig) -> jax.Array:
    """Multiply embeddings [.., D] with sqrt(D), where the family does; the factor is rounded to x's dtype."""
    if not config.scaled_embedding:
        return x
    return x * jnp.asarray(config.width**0.5, x.dtype)


def embed_sharded(
    params: Params, config: ModelConfig, tokens: jax.Array, dtype: jnp.dtype, layout: Layout
) -> jax.Array:
    """Look tokens i32[N, S] up in a table whose width is sharded over a mesh axis of the batch (FSDP).

    Each device looks up its part of the width for all rows of that axis, and an all-to-all redistributes the
    result: the traffic is the result's size.  Without this the compiler gathers the table, or all rows, on
    every device.
    """
    # The mesh axes of each dimension.
    table = params["embed"]
    batch_axes = layout.spec(("batch",))[0]
    vocab_axis, width_axis = layout.spec(("vocab", "embed"), table.shape)

    # The plain look-up serves an unsharded width, and a width on an axis that does not shard the batch.
    is_sharded = width_axis is not None and layout.ways(width_axis) > 1
    shares_batch_axis = isinstance(batch_axes, tuple) and batch_axes[-1] == width_axis
    if not (is_sharded and shares_batch_axis):
        return embed_tokens(params, config, tokens, dtype, layout)

    def run(table, tokens):  # one device's shards of [V, D] and i32[N, S]
        # Gathering tokens is cheap: each has 4 bytes, and its hidden state has D values.
        tokens = jax.lax.all_gather(tokens, width_axis, axis=0, tiled=True)
        if vocab_axis is None:
            x = table[tokens].astype(dtype)
        else:
            # The vocabulary is sharded, too: one device has the token's row, the others add zeros.
            row = tokens - jax.lax.axis_index(vocab_axis) * table.shape[0]
            is_local = (row >= 0) & (row < table.shape[0])
            x = jnp.where(is_local[:, :, None], table[jnp.where(is_local, row, 0)], 0).astype(dtype)
            x = jax.lax.psum(x, vocab_axis)
        return jax.lax.all_to_all(x, width_axis, split_axis=0, concat_axis=2, tiled=True)

    rows = PartitionSpec(batch_axes)
    specs = (PartitionSpec(vocab_axis, width_axis), rows)
    x = _scale_embedding(run_sharded(run, layout, specs, rows)(table, tokens), config)
    return constrain_batch(x, layout)


# --- heads ---------------------------------------------------------------------------------------------


UNEMBED = "unembed"  # [D, V]: a rollout's transposed copy of the head, with which XLA:CPU multiplies faster


def get_head_matrix(params: Params, config: ModelConfig) -> jax.Array:
    """Return the matrix [V, D] of the language-model head: the embedding if tied."""
    return params["embed"] if config.tied else params["lm_head"]


def compute_logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Compute logits: hidden [..., D] -> f32[..., V]; padded vocabulary columns are -inf."""
    if UNEMBED in params:
        z = matmul_cpu(hidden, params[UNEMBED]).astype(jnp.float32)
    else:
        head = get_head_matrix(params, config).astype(hidden.dtype)
        z = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    if config.padded_vocab == config.vocab_size:
        return z

    # Padded rows of the embedding have values (zeros or initial ones), so their logits must be masked.
    real = jnp.arange(config.padded_vocab) < config.vocab_size
    return jnp.where(real.reshape((1,) * (z.ndim - 1) + (-1,)), z, -jnp.inf)


def token_logprobs(
    params: Params,
    config: ModelConfig,
    hidden: jax.Array,  # [N, T, D]: position t predicts targets[:, t]
    targets: jax.Array,  # i32[N, T]
    *,
    temperature: float = 1.0,
    layout: Layout,
    entropy_gradient: bool = False,
    thresholds: jax.Array | None = None,  # f32[N, T]: see `head_logprobs`
) -> tuple[jax.Array, jax.Array]:
    """Compute log softmax(logits / temperature) at the targets, and the distribution's entropy in nats.

    -> (logprobs f32[N, T], entropy f32[N, T]); the entropy has a gradient only if `entropy_gradient`.  Logits are
    computed for one chunk of the vocabulary at a time, so that [N, T, V] never exists; on a mesh each device
    computes its rows and its part of the vocabulary.
    """
    head = get_head_matrix(params, config)  # not cast: its gradient accumulates in the dtype it is stored in

    # Mesh axes of the head's two dimensions; None for a dimension that is whole on every device.
    batch_axes = layout.spec(("batch",))[0]
    axes = layout.spec(("vocab", "embed"), head.shape)
    vocab_axis, width_axis = (axis if layout.ways(axis) > 1 else None for axis in axes)

    # The kernel gathers a width sharded like the batch (FSDP); other shardings are left to the compiler.
    if width_axis not in (batch_axes if isinstance(batch_axes, tuple) else (batch_axes,)):
        width_axis = None

    def run(hidden, head, targets, thresholds):
        logprobs, entropy = head_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            targets.reshape(-1),
            temperature=temperature,
            vocab_size=config.vocab_size,
            axis_name=vocab_axis,
            width_axis=width_axis,
            spans_mesh=layout.ways(width_axis) == layout.mesh.size,
            implementation=platform.default_implementation(layout.platform),
            entropy_gradient=entropy_gradient,
            thresholds=None if thresholds is None else thresholds.reshape(-1),
        )
        return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)

    rows = PartitionSpec(batch_axes)
    specs = (rows, PartitionSpec(vocab_axis, width_axis), rows, rows)
    return run_sharded(run, layout, specs, rows)(hidden, head, targets, thresholds)


def score_last_token(params: Params, config: ModelConfig, hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """Compute one logit per row from its last real token: hidden [N, S, D], valid bool[N, S] -> f32[N].

    Equals Hugging Face's *ForSequenceClassification with one label.  A row without a real token gets the
    logit of its first column: finite and meaningless.
    """
    # The last real token attends to all others, and the score is f32 whatever the compute dtype.
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1])[None, :], 0), axis=1)  # i32[N]
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [N, D]
    return score_hidden(params, final)


def score_hidden(params: Params, hidden: jax.Array) -> jax.Array:
    """Compute the score of hidden states [..., D] -> f32[...]."""
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), params["score"].astype(jnp.float32))
