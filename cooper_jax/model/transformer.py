"""One transformer for Llama and Qwen2: pure functions over a nested dict of arrays.

    tokens --trunk--> hidden --logits | token_logprobs--> the policy
                             --score------------------> the reward model
    prompts --prefill--> KV --decode_step, decode_step, ...--> the rollout

1. `trunk` moves each row's real tokens to its front.  Padding may then lie left, right or in a gap: positions
   count real tokens alone, one rotary table serves all rows, and the causal mask alone hides the padding,
   so that no attention kernel needs another.  The hidden states go back to where their tokens came from.
2. Layers are stacked on a leading axis: a scan in `trunk` and `prefill`, an indexed loop in `decode_step`, whose
   caches are updated in place.  Generation cuts the stack where layers are few (`split_layers`).
3. Master weights are f32 and cast once a call; norms, rotations, softmax, logsumexp and scores are f32.

Axis legend: N rows, S tokens, T response tokens, B prompts, G samples a prompt, P prompt tokens, D width,
H query heads, K key/value heads, h head_dim, F feed-forward width, L layers, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import (
    attend,
    by_shard,
    cast_layers,
    decode_attend,
    finish_layer,
    flat_heads,
    pin,
    project_qkv,
    rms_norm,
    rotary,
)
from cooper_jax.runtime.mesh import Layout, ParamSpec
from cooper_jax.types import Params
from kernels import platform
from kernels.head import head_logprobs
from kernels.kv import KV, Format, pack, zeros
from kernels.matmul import matmul, matmul_cpu
from kernels.schedule import Schedule


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
        "attn_norm": ParamSpec((L, D), ("layers", None), "ones"),
        "q": ParamSpec((L, D, H, h), ("layers", "embed", *q_axes), scale=wide),
        "k": ParamSpec((L, D, K, h), ("layers", "embed", *kv_axes), scale=wide),
        "v": ParamSpec((L, D, K, h), ("layers", "embed", *kv_axes), scale=wide),
        "o": ParamSpec((L, H, h, D), ("layers", *q_axes, "embed"), scale=(H * h) ** -0.5 * depth),
        "mlp_norm": ParamSpec((L, D), ("layers", None), "ones"),
        "gate": ParamSpec((L, D, F), ("layers", "embed", "ffn"), scale=wide),
        "up": ParamSpec((L, D, F), ("layers", "embed", "ffn"), scale=wide),
        "down": ParamSpec((L, F, D), ("layers", "ffn", "embed"), scale=F**-0.5 * depth),
    }
    if c.qkv_bias:
        layers["q_bias"] = ParamSpec((L, H, h), ("layers", *q_axes), "zeros")
        layers["k_bias"] = ParamSpec((L, K, h), ("layers", *kv_axes), "zeros")
        layers["v_bias"] = ParamSpec((L, K, h), ("layers", *kv_axes), "zeros")
    specs: Params = {"embed": vocab, "layers": layers, "final_norm": ParamSpec((D,), (None,), "ones")}
    if head == "score":
        specs["score"] = ParamSpec((D,), (None,), scale=wide)
    elif not c.tied:
        specs["lm_head"] = dataclasses.replace(vocab, scale=wide)
    return specs


# --- the trunk -----------------------------------------------------------------------------------------


def trunk(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,  # i32[N, S]
    valid: jax.Array,  # bool[N, S]: real tokens; padding may be anywhere
    *,
    dtype: jnp.dtype,
    remat: bool = False,
    layout: Layout | None = None,
) -> jax.Array:
    """Hidden states after the final norm -> `dtype`[N, S, D].

    Those of padding are finite and mean nothing; nothing that a padding token holds reaches another.
    `remat` recomputes each layer in the backward pass, keeping one [N, S, D] a layer.
    """
    slot = _slots(valid)
    packed = jnp.argsort(slot, axis=1)  # i32[N, S]: which token lies in each slot
    rope = rotary(config, jnp.arange(tokens.shape[1]))  # f32[S, h / 2] each
    x = _embed(params, jnp.take_along_axis(tokens, packed, axis=1), dtype, layout)

    def layer(x, w):
        q, k, v = project_qkv(w, config, x, rope)
        return finish_layer(w, config, x, attend(q, k, v, layout), layout), None

    if remat:
        layer = jax.checkpoint(layer)
    x, _ = jax.lax.scan(layer, x, cast_layers(params["layers"], dtype))
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


def _embed(params: Params, tokens: jax.Array, dtype: jnp.dtype, layout: Layout | None) -> jax.Array:
    return pin(params["embed"][tokens].astype(dtype), layout)


# --- heads ---------------------------------------------------------------------------------------------


UNEMBED = "unembed"  # [D, V]: a rollout's own copy of the head, where XLA:CPU multiplies faster with it so


def head_matrix(params: Params, config: ModelConfig) -> jax.Array:
    """[V, D]."""
    return params["embed"] if config.tied else params["lm_head"]


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> f32[..., V]; the padded columns are -inf."""
    if UNEMBED in params:
        z = matmul_cpu(hidden, params[UNEMBED]).astype(jnp.float32)
    else:
        head = head_matrix(params, config).astype(hidden.dtype)
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
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(logits / temperature) at the targets, and that distribution's entropy in nats.

    -> (logprobs f32[N, T], entropy f32[N, T]); no gradient flows through the entropy.  Logits exist a chunk of
    the vocabulary at a time; over a mesh, each device takes its rows and its part of the vocabulary.
    """
    head = head_matrix(params, config)  # as it is kept, so that its gradient adds up in that type
    batch, vocab = None, None
    if layout is not None:
        batch, vocab = layout.spec(("batch",))[0], layout.spec(("vocab",), head.shape)[0]
        vocab = vocab if layout.ways(vocab) > 1 else None

    def run(hidden, head, targets):
        logprobs, entropy = head_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            targets.reshape(-1),
            temperature=temperature,
            vocab_size=config.vocab_size,
            axis_name=vocab,
            implementation=platform.default(layout and layout.platform),
        )
        return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)

    if layout is not None:
        rows = PartitionSpec(batch)
        run = by_shard(run, layout, (rows, PartitionSpec(vocab), rows), rows)
    return run(hidden, head, targets)


def score(params: Params, config: ModelConfig, hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """One logit a row, from its last real token: hidden [N, S, D], valid bool[N, S] -> f32[N].

    As Hugging Face's *ForSequenceClassification with one label.  A row without a real token scores the
    hidden state of its first column: finite, and meaningless.
    """
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1])[None, :], 0), axis=1)  # i32[N]
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [N, D]
    return jnp.einsum("nd,d->n", final.astype(jnp.float32), params["score"].astype(jnp.float32))


# --- generation ----------------------------------------------------------------------------------------

LAYERS_ALONE = 8  # a model of so few layers keeps each in arrays of its own while it generates


def split_layers(layers: Params, config: ModelConfig) -> tuple[Params, ...]:
    """The stacked layers as generation takes them: stacks, each run by one loop.

    One stack of all; of few layers, stacks of one.  Out of a stack XLA:CPU copies a layer's matrices before it
    multiplies with them, at every token; unrolling many layers would take minutes to compile.
    """
    if config.layers > LAYERS_ALONE:
        return (layers,)
    return tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], layers) for i in range(config.layers))


@functools.partial(jax.jit, static_argnums=(1, 2))
def for_generation(params: Params, config: ModelConfig, layout: Layout | None) -> Params:
    """The weights as `prefill`, `decode_step` and `logits` read them fastest."""
    weights = params | {"layers": split_layers(flat_heads(params["layers"]), config)}
    head = head_matrix(params, config)
    if _on_cpu(layout, "xla") and head.dtype == jnp.float32:
        weights[UNEMBED] = head.T
    return weights


def empty_suffix(
    config: ModelConfig, stacks: tuple[Params, ...], rows: int, columns: int, form: Format
) -> tuple[KV, ...]:
    """Caches for `columns` sampled tokens of each row: of each stack a KV [l, N, K, W, ..]."""
    counts = [jax.tree.leaves(stack)[0].shape[0] for stack in stacks]
    return tuple(zeros((n, rows, config.kv_heads, columns), config.head_dim, form) for n in counts)


def prefill(
    params: Params,  # its layers through `split_layers`
    config: ModelConfig,
    tokens: jax.Array,  # i32[B, P], right-padded
    lengths: jax.Array,  # i32[B], at least 1
    *,
    dtype: jnp.dtype,
    form: Format,
    layout: Layout | None = None,
) -> tuple[jax.Array, tuple[KV, ...]]:
    """Run the prompts once -> (hidden [B, D] of each prompt's last token, of each stack a KV [l, B, K, P, ..])."""
    rope = rotary(config, jnp.arange(tokens.shape[1]))
    x = _embed(params, tokens, dtype, layout)

    def layer(x, w):
        q, k, v = project_qkv(w, config, x, rope)
        x = finish_layer(w, config, x, attend(q, k, v, layout), layout)
        return x, pack(k.swapaxes(1, 2), v.swapaxes(1, 2), form)

    caches = []
    for stack in params["layers"]:
        x, cache = jax.lax.scan(layer, x, cast_layers(stack, dtype))
        caches.append(cache)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return rms_norm(last, params["final_norm"], config.norm_eps), tuple(caches)


def decode_step(
    params: Params,  # its layers through `split_layers`
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
    layout: Layout | None = None,
    implementation: str = "xla",
) -> tuple[jax.Array, tuple[KV, ...]]:
    """One token further -> (hidden [N, D], the suffix caches with the token's keys and values at `column`).

    Rows of different ages write one column, a slice of the cache: donated (or carried by an outer loop), it is
    updated in place.
    """
    rope = rotary(config, position)  # f32[N, h / 2] each
    x = _embed(params, token, dtype, layout)
    product = matmul_cpu if _on_cpu(layout, implementation) else matmul
    caches = []
    for stack, shared, own in zip(params["layers"], prompt, suffix, strict=True):
        stack = cast_layers(stack, dtype)

        def layer(i, carry, stack=stack, shared=shared):
            x, own = carry
            w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), stack)
            q, k, v = project_qkv(w, config, x, rope, product)
            own = _write(own, pack(k, v, form), i, column)
            heads = decode_attend(q, shared, stacked(own), plan, first, column, i, layout, implementation)
            return finish_layer(w, config, x, heads, layout, product), own

        count = jax.tree.leaves(stack)[0].shape[0]
        x, own = layer(0, (x, own)) if count == 1 else jax.lax.fori_loop(0, count, layer, (x, own))
        caches.append(own)
    return rms_norm(x, params["final_norm"], config.norm_eps), tuple(caches)


def _on_cpu(layout: Layout | None, implementation: str) -> bool:
    return implementation == "xla" and layout is None and jax.default_backend() == "cpu"


def bare(cache: KV) -> KV:
    """A stack of one without its axis: under it XLA would write the cache twice, once into a copy."""
    return jax.tree.map(lambda x: x[0], cache) if cache.data[0].shape[0] == 1 else cache


def stacked(cache: KV) -> KV:
    """The inverse of `bare`."""
    return jax.tree.map(lambda x: x[None], cache) if cache.data[0].ndim == 4 else cache


def _write(cache: KV, new: KV, layer: jax.Array, column: jax.Array) -> KV:
    """`new`, leaves [N, K, ..], at `column` of leaves [N, K, W, ..], or of `layer` of [L, N, K, W, ..]."""
    alone = cache.data[0].ndim == 4

    def write(cache, new):
        new = jnp.expand_dims(new, 2) if alone else new[None, :, :, None]
        at = [0] * cache.ndim
        at[2 if alone else 3] = column
        at[0] = 0 if alone else layer
        at = [jnp.asarray(i, jnp.int32) for i in at]
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), at)

    return jax.tree.map(write, cache, new)
