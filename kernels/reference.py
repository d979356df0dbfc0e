"""Causal attention in plain jnp: the reference for tests of every causal attention kernel.

Rows are right-padded (their real tokens come first), so the causal mask alone hides the padding from every
real query.  The output of padded queries is finite but meaningless.

N rows   S query tokens   S_kv key tokens   H query heads   K key/value heads   g = H / K   h head_dim
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: int = 0,
    *,
    window: int | None = None,
    first_key: int = 0,
    segments: tuple[jax.Array, jax.Array] | None = None,
    prefixes: jax.Array | None = None,
) -> jax.Array:
    """Compute causal grouped-query attention: softmax(q k^T / sqrt(h)) v, the softmax in f32.

    q [N, S, H, h], k and v [N, S_kv, K, h] -> [N, S, H, h].  Query i is token first + i of its row, key j
    token first_key + j.  A query attends to the tokens up to its own: to all, or to the last `window`.

    segments: of the queries i32[N, S] and of the keys i32[N, S_kv]; a query attends to keys of its segment only.
    prefixes: i32[N, S], a second segment that each query attends to.
    """
    # Query heads i * g to (i + 1) * g - 1 share key/value head i: a reshape, without copies of the keys.
    n, s, heads, h = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(n, s, kv_heads, heads // kv_heads, h)
    z = jnp.einsum("nskgh,nukh->nkgsu", q, k, preferred_element_type=jnp.float32) * h**-0.5

    key = jnp.arange(k.shape[1])[None, :]
    if first_key:
        key = first_key + key
    query = first + jnp.arange(s)[:, None]
    mask = key <= query  # bool[S, S_kv]
    if window is not None:
        mask = mask & (key > query - window)
    mask = mask[None, None, None]
    if segments is not None:
        own, of_keys = segments[0][:, :, None], segments[1][:, None, :]
        attended = own == of_keys  # bool[N, S, S_kv]
        if prefixes is not None:
            attended = attended | (prefixes[:, :, None] == of_keys)
        mask = mask & attended[:, None, None]
    p = jax.nn.softmax(jnp.where(mask, z, -jnp.inf), axis=-1)
    return jnp.einsum("nkgsu,nukh->nskgh", p.astype(v.dtype), v).reshape(n, s, heads, h)
