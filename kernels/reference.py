"""Attention in plain jnp: the oracle that every kernel is tested against.

Rows of the causal form are right-padded (their real tokens come first), so the causal mask alone keeps
padding out of every real query's sight; what padded queries return is finite and means nothing.

Axis legend: N rows, S query tokens, U key tokens, H query heads, K key/value heads, g = H / K,
h head_dim, B prompts, G samples a prompt (N = B * G, prompt-major), P prompt keys, T suffix keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, first: int = 0) -> jax.Array:
    """Causal grouped-query attention: softmax(q k^T / sqrt(h)) v, the softmax in f32.

    q [N, S, H, h], k and v [N, U, K, h] -> [N, S, H, h].  Query i is token `first` + i of its row and sees
    keys 0 to first + i.
    """
    n, s, heads, h = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(n, s, kv_heads, heads // kv_heads, h)
    z = jnp.einsum("nskgh,nukh->nkgsu", q, k, preferred_element_type=jnp.float32) * h**-0.5
    seen = jnp.arange(k.shape[1])[None, :] <= first + jnp.arange(s)[:, None]  # bool[S, U]
    p = jax.nn.softmax(jnp.where(seen[None, None, None], z, -jnp.inf), axis=-1)
    return jnp.einsum("nkgsu,nukh->nskgh", p.astype(v.dtype), v).reshape(n, s, heads, h)


def decode_attention(
    q: jax.Array,  # [N, H, h]
    prompt_k: jax.Array,  # [B, K, P, h]
    prompt_v: jax.Array,
    lengths: jax.Array,  # i32[B]
    suffix_k: jax.Array,  # [N, K, T, h]
    suffix_v: jax.Array,
    first: jax.Array,  # i32[N]
    last: jax.Array,  # i32[]
) -> jax.Array:
    """One query a row over its prompt's `lengths` keys and its own suffix columns `first` to `last`: [N, H, h].

    Repeats each prompt's keys for all of its samples and takes one softmax over both parts.
    """
    n, heads, h = q.shape
    samples = n // prompt_k.shape[0]
    k = jnp.concatenate([jnp.repeat(prompt_k, samples, axis=0), suffix_k], axis=2)  # [N, K, P + T, h]
    v = jnp.concatenate([jnp.repeat(prompt_v, samples, axis=0), suffix_v], axis=2)
    prompt_seen = jnp.arange(prompt_k.shape[2])[None, :] < jnp.repeat(lengths, samples)[:, None]
    column = jnp.arange(suffix_k.shape[2])[None, :]
    suffix_seen = (column >= first[:, None]) & (column <= last)
    seen = jnp.concatenate([prompt_seen, suffix_seen], axis=1)  # bool[N, P + T]
    q = q.reshape(n, k.shape[1], heads // k.shape[1], h)
    z = jnp.einsum("nkgh,nkuh->nkgu", q, k, preferred_element_type=jnp.float32) * h**-0.5
    p = jax.nn.softmax(jnp.where(seen[:, None, None, :], z, -jnp.inf), axis=-1)
    return jnp.einsum("nkgu,nkuh->nkgh", p.astype(v.dtype), v).reshape(n, heads, h)
