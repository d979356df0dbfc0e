"""One transformer for Llama and Qwen2: pure functions over a nested dict of arrays.

    tokens --trunk--> hidden --logits | token_logprobs--> the policy
                             --score------------------> the reward model

1. `trunk` moves each row's real tokens to its front.  Padding may then lie left, right or in a gap: positions
   count real tokens alone, one rotary table serves all rows, and the causal mask alone hides the padding,
   so that no attention kernel needs another.  The hidden states go back to where their tokens came from.
2. Layers are stacked on a leading axis and scanned.
3. Master weights are f32 and cast once a call; norms, rotations, softmax, logsumexp and scores are f32.

Axis legend: N rows, S tokens, T response tokens, D width, H query heads, K key/value heads, h head_dim,
F feed-forward width, L layers, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.head import head_logprobs
from cooper_jax.kernels.matmul import matmul_cpu
from cooper_jax.model.config import ModelConfig
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
from cooper_jax.runtime.mesh import Layout, ParamSpec
from cooper_jax.types import Params


def param_specs(config: ModelConfig, head: str = "logits") -> Params:
    """Every parameter of the model, declared once: shape, logical axes, initial values.

    head: "logits" (an untied model has an `lm_head`), or "score" (a vector `score` [D], no `lm_head`).
    Matrices start with a deviation of 1 / sqrt(inputs), those that write to the residual stream smaller by
    sqrt(2 L): at widths of a hundred the customary .02 starts too small to learn in a few hundred steps.
    """
    if head not in ("logits", "score"):
        raise ValueError(f"head {head!r} is none of logits, score")
    c = config
    L, D, H, K, h, F = c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn
    wide, depth = D**-0.5, (2 * L) ** -0.5
    is_head = head == "logits" and c.tied
    vocab = ParamSpec((c.padded_vocab, D), ("vocab", "embed"), scale=wide if is_head else 0.5)
    q_axes, kv_axes = ("heads", "head_dim"), ("kv_heads", "head_dim")
    layers = {
        "attn_norm": ParamSpec((L, D), ("layers", None), "ones", keep_f32=True),
        "q": ParamSpec((L, D, H, h), ("layers", "embed", *q_axes), scale=wide),
        "k": ParamSpec((L, D, K, h), ("layers", "embed", *kv_axes), scale=wide),
        "v": ParamSpec((L, D, K, h), ("layers", "embed", *kv_axes), scale=wide),
        "o": ParamSpec((L, H, h, D), ("layers", *q_axes, "embed"), scale=(H * h) ** -0.5 * depth),
        "mlp_norm": ParamSpec((L, D), ("layers", None), "ones", keep_f32=True),
        "gate": ParamSpec((L, D, F), ("layers", "embed", "ffn"), scale=wide),
        "up": ParamSpec((L, D, F), ("layers", "embed", "ffn"), scale=wide),
        "down": ParamSpec((L, F, D), ("layers", "ffn", "embed"), scale=F**-0.5 * depth),
    }
    if c.qkv_bias:
        layers["q_bias"] = ParamSpec((L, H, h), ("layers", *q_axes), "zeros")
        layers["k_bias"] = ParamSpec((L, K, h), ("layers", *kv_axes), "zeros")
        layers["v_bias"] = ParamSpec((L, K, h), ("layers", *kv_axes), "zeros")
    final_norm = ParamSpec((D,), (None,), "ones", keep_f32=True)
    specs: Params = {"embed": vocab, "layers": layers, "final_norm": final_norm}
    if head == "score":
        specs["score"] = ParamSpec((D,), (None,), scale=wide)
    elif not c.tied:
        specs["lm_head"] = dataclasses.replace(vocab, scale=wide)
    return specs


def cast_layers(layers: Params, config: ModelConfig, dtype: jnp.dtype) -> Params:
    """The layers' parameters in the compute type, but for those declared to stay float32."""
    specs = param_specs(config)["layers"]
    return {name: w if specs[name].keep_f32 else w.astype(dtype) for name, w in layers.items()}


# --- the trunk -----------------------------------------------------------------------------------------


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
    """Hidden states after the final norm -> `dtype`[N, S, D].

    Those of padding are finite and mean nothing; nothing that a padding token holds reaches another.
    `remat` recomputes each layer in the backward pass, keeping one [N, S, D] a layer.
    """
    slot = _slots(valid)
    packed = jnp.argsort(slot, axis=1)  # i32[N, S]: which token lies in each slot
    rope = rotary_angles(config, jnp.arange(tokens.shape[1]))  # f32[S, h / 2] each
    x = embed_sharded(params, jnp.take_along_axis(tokens, packed, axis=1), dtype, layout)

    def layer(x, w):
        w = flatten_projections(w)
        q, k, v = project_qkv(w, config, x, rope)
        return output_proj_and_mlp(w, config, x, sharded_causal_attention(q, k, v, layout), layout), None

    if remat:
        layer = jax.checkpoint(layer)
    x, _ = jax.lax.scan(layer, x, cast_layers(params["layers"], config, dtype))
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    return _permute(x, slot, packed)


def _slots(valid: jax.Array) -> jax.Array:
    """i32[N, S]: where each token goes when the real ones are moved to the front, in order."""
    real = valid.astype(jnp.int32)
    before = jnp.cumsum(real, axis=1) - real
    padding_before = jnp.arange(valid.shape[1])[None, :] - before
    return jnp.where(valid, before, real.sum(axis=1, keepdims=True) + padding_before)


@jax.custom_vjp
def _permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[n, index[n, s]].  A permutation's transpose is its inverse: a gather in the backward pass too."""
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


_permute.defvjp(
    lambda x, index, inverse: (_permute(x, index, inverse), inverse),
    lambda inverse, g: (jnp.take_along_axis(g, inverse[:, :, None], axis=1), None, None),
)


def embed_tokens(params: Params, tokens: jax.Array, dtype: jnp.dtype, layout: Layout) -> jax.Array:
    """i32[N, ..] -> `dtype`[N, .., D]."""
    return constrain_batch(params["embed"][tokens].astype(dtype), layout)


def embed_sharded(params: Params, tokens: jax.Array, dtype: jnp.dtype, layout: Layout) -> jax.Array:
    """`embed` of i32[N, S] for a table whose width is cut over an axis that also cuts rows, as in training.

    Each device looks up its part of the width for all of the axis's rows, and then they trade: what travels is the
    result's size.  Left to itself the compiler gathers the table, or all rows, on every device.
    """
    table = params["embed"]
    rows = layout.spec(("batch",))[0]
    vocab, width = layout.spec(("vocab", "embed"), table.shape)
    if width is None or layout.ways(width) == 1 or not isinstance(rows, tuple) or rows[-1] != width:
        return embed_tokens(params, tokens, dtype, layout)

    def run(table, tokens):  # [V / v, D / w], i32[n, S]
        tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        if vocab is None:
            x = table[tokens].astype(dtype)
        else:
            own = tokens - jax.lax.axis_index(vocab) * table.shape[0]
            here = (own >= 0) & (own < table.shape[0])
            x = jnp.where(here[:, :, None], table[jnp.where(here, own, 0)], 0).astype(dtype)
            x = jax.lax.psum(x, vocab)
        return jax.lax.all_to_all(x, width, split_axis=0, concat_axis=2, tiled=True)

    specs = (PartitionSpec(vocab, width), PartitionSpec(rows))
    return constrain_batch(run_sharded(run, layout, specs, PartitionSpec(rows))(table, tokens), layout)


# --- heads ---------------------------------------------------------------------------------------------


UNEMBED = "unembed"  # [D, V]: a rollout's own copy of the head, where XLA:CPU multiplies faster with it so


def get_head_matrix(params: Params, config: ModelConfig) -> jax.Array:
    """[V, D]."""
    return params["embed"] if config.tied else params["lm_head"]


def compute_logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> f32[..., V]; the padded columns are -inf."""
    if UNEMBED in params:
        z = matmul_cpu(hidden, params[UNEMBED]).astype(jnp.float32)
    else:
        head = get_head_matrix(params, config).astype(hidden.dtype)
        z = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    if config.padded_vocab == config.vocab_size:
        return z
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
) -> tuple[jax.Array, jax.Array]:
    """log softmax(logits / temperature) at the targets, and that distribution's entropy in nats.

    -> (logprobs f32[N, T], entropy f32[N, T]); no gradient flows through the entropy.  Logits exist a chunk of
    the vocabulary at a time; over a mesh, each device takes its rows and its part of the vocabulary.
    """
    head = get_head_matrix(params, config)  # as it is kept, so that its gradient adds up in that type
    batch, (vocab, width) = layout.spec(("batch",))[0], layout.spec(("vocab", "embed"), head.shape)
    vocab, width = (axis if layout.ways(axis) > 1 else None for axis in (vocab, width))
    width = width if width in (batch if isinstance(batch, tuple) else (batch,)) else None

    def run(hidden, head, targets):
        logprobs, entropy = head_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            targets.reshape(-1),
            temperature=temperature,
            vocab_size=config.vocab_size,
            axis_name=vocab,
            width_axis=width,
            implementation=platform.default_implementation(layout.platform),
        )
        return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)

    rows = PartitionSpec(batch)
    return run_sharded(run, layout, (rows, PartitionSpec(vocab, width), rows), rows)(hidden, head, targets)


def score_last_token(params: Params, config: ModelConfig, hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """One logit a row, from its last real token: hidden [N, S, D], valid bool[N, S] -> f32[N].

    As Hugging Face's *ForSequenceClassification with one label.  A row without a real token scores the
    hidden state of its first column: finite, and meaningless.
    """
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1])[None, :], 0), axis=1)  # i32[N]
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [N, D]
    return jnp.einsum("nd,d->n", final.astype(jnp.float32), params["score"].astype(jnp.float32))
