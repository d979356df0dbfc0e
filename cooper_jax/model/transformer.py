"""One transformer for Llama and Qwen2: pure functions over a nested dict of arrays.

    tokens --trunk--> hidden --logits | token_logprobs--> the policy
                             --score------------------> the reward model
    prompts --prefill--> KV --decode_step, decode_step, ...--> the rollout

1. `trunk` moves each row's real tokens to its front.  Padding may then lie left, right or in a gap: positions
   count real tokens alone, one rotary table serves all rows, and the causal mask alone hides the padding,
   so that no attention kernel needs another.  The hidden states go back to where their tokens came from.
2. Layers are stacked on a leading axis: a scan in `trunk` and `prefill`, an indexed loop in `decode_step`,
   whose caches are updated in place when the caller donates them.
3. Master weights are f32 and cast once a call; norms, rotations, softmax, logsumexp and scores are f32.

Axis legend: N rows, S tokens, T response tokens, B prompts, G samples a prompt, P prompt tokens, D width,
H query heads, K key/value heads, h head_dim, F feed-forward width, L layers, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import attend, cast_layers, finish_layer, pin, project_qkv, rms_norm, rotary
from cooper_jax.runtime.mesh import Layout, ParamSpec
from cooper_jax.types import Params
from kernels.attention import decode_attention


@struct.dataclass
class KV:
    """Keys and values of every layer; keys are already rotated."""

    k: jax.Array  # [L, rows, K, tokens, h]
    v: jax.Array  # [L, rows, K, tokens, h]


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


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> f32[..., V]; the padded columns are -inf."""
    head = params["embed"] if config.tied else params["lm_head"]  # [V, D]
    z = jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
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
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(logits / temperature) at the targets, and that distribution's entropy in nats.

    -> (logprobs f32[N, T], entropy f32[N, T]); no gradient flows through the entropy.  Logits exist for
    `chunk` positions of each row at a time, [N, chunk, V] in f32, and again in the backward pass.
    """
    n, tokens, width = hidden.shape
    chunk = min(chunk, tokens)
    pieces = -(-tokens // chunk)
    extra = pieces * chunk - tokens
    hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0))).reshape(n, pieces, chunk, width).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, extra))).reshape(n, pieces, chunk).swapaxes(0, 1)
    columns = jnp.arange(config.padded_vocab)[None, None, :]

    # The head is cast inside the loop, so that its gradient accumulates over the chunks in f32.
    @jax.checkpoint
    def one(piece):
        z = logits(params, config, piece[0]) / temperature  # f32[N, chunk, V]
        lse = jax.nn.logsumexp(z, axis=-1)
        # A masked sum and not a gather: its transpose is elementwise, and vocabulary shards just add.
        chosen = jnp.sum(jnp.where(columns == piece[1][:, :, None], z, 0.0), axis=-1)
        p = jnp.exp(z - lse[:, :, None])
        entropy = lse - jnp.sum(p * jnp.where(columns < config.vocab_size, z, 0.0), axis=-1)
        return chosen - lse, jax.lax.stop_gradient(entropy)

    logprobs, entropy = jax.lax.map(one, (hidden, targets))  # f32[pieces, N, chunk] each
    return tuple(x.swapaxes(0, 1).reshape(n, pieces * chunk)[:, :tokens] for x in (logprobs, entropy))


def score(params: Params, config: ModelConfig, hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """One logit a row, from its last real token: hidden [N, S, D], valid bool[N, S] -> f32[N].

    As Hugging Face's *ForSequenceClassification with one label.  A row without a real token scores the
    hidden state of its first column: finite, and meaningless.
    """
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1])[None, :], 0), axis=1)  # i32[N]
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [N, D]
    return jnp.einsum("nd,d->n", final.astype(jnp.float32), params["score"].astype(jnp.float32))


# --- generation ----------------------------------------------------------------------------------------


def empty_suffix(config: ModelConfig, rows: int, tokens: int, dtype: jnp.dtype) -> KV:
    """A cache for `tokens` sampled tokens of each row."""
    shape = (config.layers, rows, config.kv_heads, tokens, config.head_dim)
    return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,  # i32[B, P], right-padded
    lengths: jax.Array,  # i32[B], at least 1
    *,
    dtype: jnp.dtype,
    layout: Layout | None = None,
) -> tuple[jax.Array, KV]:
    """Run the prompts once -> (hidden [B, D] of each prompt's last token, KV [L, B, K, P, h])."""
    rope = rotary(config, jnp.arange(tokens.shape[1]))
    x = _embed(params, tokens, dtype, layout)

    def layer(x, w):
        q, k, v = project_qkv(w, config, x, rope)
        return finish_layer(w, config, x, attend(q, k, v, layout), layout), (
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
        )

    x, (k, v) = jax.lax.scan(layer, x, cast_layers(params["layers"], dtype))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return rms_norm(last, params["final_norm"], config.norm_eps), KV(k=k, v=v)


def decode_step(
    params: Params,
    config: ModelConfig,
    token: jax.Array,  # i32[N], prompt-major: the G samples of a prompt side by side
    age: jax.Array,  # i32[N]: index of `token` in its row's response
    column: jax.Array,  # i32[]: where its keys and values go; a row's others stand in the `age` columns before
    prompt_kv: KV,  # [L, B, K, P, h]: shared by a prompt's samples
    lengths: jax.Array,  # i32[B]: real prompt tokens
    suffix_kv: KV,  # [L, N, K, T, h]
    key_len: int,  # static, > every age that counts: suffix columns that are read, those up to `column`
    *,
    dtype: jnp.dtype,
    layout: Layout | None = None,
) -> tuple[jax.Array, KV]:
    """One token further -> (hidden [N, D], the suffix cache with the token's keys and values at `column`).

    The token stands at position lengths + age.  Rows of different ages write one column, a slice of the cache:
    donated (or carried by an outer loop), it is updated in place.
    """
    samples = token.shape[0] // lengths.shape[0]
    rope = rotary(config, jnp.repeat(lengths, samples) + age)  # f32[N, h / 2] each
    start = jnp.clip(column + 1 - key_len, 0, suffix_kv.k.shape[3] - key_len)
    layers = cast_layers(params["layers"], dtype)
    x = _embed(params, token, dtype, layout)

    def layer(i, carry):
        x, cache = carry
        w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), layers)
        q, k, v = project_qkv(w, config, x, rope)
        cache = KV(k=_write(cache.k, k, i, column), v=_write(cache.v, v, i, column))
        pk, pv = (jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in (prompt_kv.k, prompt_kv.v))
        sk, sv = _read(cache.k, i, start, key_len), _read(cache.v, i, start, key_len)
        heads = decode_attention(q, pk, pv, lengths, sk, sv, column - age - start, column - start)
        return finish_layer(w, config, x, heads, layout), cache

    x, suffix_kv = jax.lax.fori_loop(0, config.layers, layer, (x, suffix_kv))
    return rms_norm(x, params["final_norm"], config.norm_eps), suffix_kv


def _write(cache: jax.Array, new: jax.Array, layer: jax.Array, column: jax.Array) -> jax.Array:
    """cache [L, N, K, T, h] with `new` [N, K, h] at (layer, :, :, column)."""
    zero = jnp.zeros((), jnp.int32)
    start = (jnp.asarray(layer, jnp.int32), zero, zero, jnp.asarray(column, jnp.int32), zero)
    return jax.lax.dynamic_update_slice(cache, new[None, :, :, None].astype(cache.dtype), start)


def _read(cache: jax.Array, layer: jax.Array, start: jax.Array, key_len: int) -> jax.Array:
    """`key_len` columns of a layer, from `start` on: [L, N, K, T, h] -> [N, K, key_len, h]."""
    _, n, kv_heads, _, h = cache.shape
    zero = jnp.zeros((), jnp.int32)
    at = (jnp.asarray(layer, jnp.int32), zero, zero, jnp.asarray(start, jnp.int32), zero)
    return jax.lax.dynamic_slice(cache, at, (1, n, kv_heads, key_len, h))[0]
