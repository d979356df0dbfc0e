"""Attention of one query a row: over a prompt's keys that rows share, and a suffix of its own.

    o = (sum_p e^(z_p - m) v_p + sum_s e^(z_s - m) v_s) / (sum_p e^(z_p - m) + sum_s e^(z_s - m))
    z = q k / sqrt(h)    m = max z

1. `schedule` (schedule.py), once while rows keep their prompts: rows of one prompt stand side by side, in tiles of
   at most `rows`, so that a tile reads its prompt's keys once.
2. `decode_attention`, for every token and layer: takes the stacked caches whole and the layer as an index, so that
   no layer is ever copied out.

Forms: xla here, tpu and triton in the files of that name.  Those read packed caches (see kv.py), and of them
only what lies within a prompt's length and between `first` and `last`: to the column on GPUs, to whole tiles of 8
columns on TPUs (in int8 of 128), whose entries must all be finite.

Kernels are not partitioned by the compiler: over a mesh, call both functions under `jax.shard_map`.

Axis legend: L layers, N rows, B prompts, G samples a prompt, T tiles of R slots, H query heads, K key/value heads,
g = H / K, h head_dim, P prompt keys, W suffix columns.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cooper_jax.kernels import platform
from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.schedule import LOWEST, Schedule, prompt_lengths


def supports_head_dim(implementation: str, head_dim: int) -> bool:
    """Whether a form reads caches of this head_dim."""
    return _READABLE[platform.resolve_implementation(implementation).form](head_dim)


_READABLE = {
    "xla": lambda head_dim: True,
    "tpu": lambda head_dim: head_dim % 64 == 0,
    "triton": lambda head_dim: head_dim >= 16 and head_dim & (head_dim - 1) == 0,
}


def decode_attention(
    q: jax.Array,  # [N, H, h]
    prompt: KV,  # leading axes [L, B, K, P]
    suffix: KV,  # leading axes [L, N, K, W]
    plan: Schedule,
    first: jax.Array,  # i32[N]: the row's oldest suffix column; above `last`: it has none
    last: jax.Array,  # i32[]: the newest column of every row
    layer: jax.Array,  # i32[]
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Each row's query over its prompt's keys and its suffix columns `first` to `last` -> [N, H, h].

    A row that has neither gets zeros.  The xla form reads all columns, the others those that they need.  Raises
    ValueError for shapes or cache forms that the implementation cannot read.
    """
    form, interpret = platform.resolve_implementation(implementation)
    if form != "xla" and not (prompt.packed and suffix.packed):
        raise ValueError(f"the {form} kernel reads packed caches alone; these are apart")
    return _FORMS[form](q, prompt, suffix, plan, first, last, layer, interpret=interpret)


def _tpu(*arguments: Any, interpret: bool) -> jax.Array:
    from cooper_jax.kernels import decode_attention_tpu  # here: Pallas is slow to import

    return decode_attention_tpu.decode_attention(*arguments, interpret=interpret)


def _triton(*arguments: Any, interpret: bool) -> jax.Array:
    from cooper_jax.kernels import decode_attention_triton  # here: Pallas is slow to import

    return decode_attention_triton.decode_attention(*arguments, interpret=interpret)


def _xla(q, prompt, suffix, plan, first, last, layer, *, interpret: bool):
    """The prompt part multiplies all queries that share a prompt with one copy of its keys, the suffix part each
    row's own; both exponentials are taken against the larger of the two maxima, so their sums simply add.
    """
    n, heads, h = q.shape
    prompt, suffix = (
        jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)
        for cache in (prompt, suffix)
    )
    if plan.samples is not None:
        lengths, samples = plan.lengths, plan.samples
    else:  # a copy of its prompt for every row
        lengths, samples = prompt_lengths(plan.prompt_of, plan.lengths), 1
        prompt = jax.tree.map(lambda x: x[jnp.maximum(plan.prompt_of, 0)], prompt)
    (pk, pv), (sk, sv) = _halves(prompt, q.dtype), _halves(suffix, q.dtype)
    kv_heads = sk.shape[1]
    rows = q.reshape(n, kv_heads, heads // kv_heads, h)

    zp = _scores(_by_prompt(rows, samples), pk)
    zp = _scaled(zp * h**-0.5, prompt, 0)
    seen = jnp.arange(zp.shape[-1])[None, :] < lengths[:, None]  # bool[B, P]
    zp = jnp.where(seen[:, None, None, :], zp, -jnp.inf)
    zs = _scores(rows, sk)
    zs = _scaled(zs * h**-0.5, suffix, 0)
    column = jnp.arange(zs.shape[-1])[None, :]
    own = (column >= first[:, None]) & (column <= last)  # bool[N, W]
    zs = jnp.where(own[:, None, None, :], zs, -jnp.inf)

    m = jnp.maximum(_by_row(zp.max(-1, keepdims=True), samples), zs.max(-1, keepdims=True))  # f32[N, K, g, 1]
    m = jnp.maximum(m, LOWEST)
    ep = jnp.exp(zp - _by_prompt(m, samples))
    es = jnp.exp(zs - m)
    total = _by_row(ep.sum(-1, keepdims=True), samples) + es.sum(-1, keepdims=True)
    ep, es = _scaled(ep, prompt, 1).astype(pv.dtype), _scaled(es, suffix, 1).astype(sv.dtype)
    op = jnp.einsum("bkmp,bkph->bkmh", ep, pv, preferred_element_type=jnp.float32)
    os = jnp.einsum("nkgt,nkth->nkgh", es, sv, preferred_element_type=jnp.float32)
    out = (_by_row(op, samples) + os) / jnp.where(total > 0.0, total, 1.0)
    return out.astype(q.dtype).reshape(n, heads, h)


_FORMS = {"xla": _xla, "tpu": _tpu, "triton": _triton}


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [R, K, m, h] against k [R, K, W, h] -> f32[R, K, m, W].

    XLA:CPU packs the right side of a product, here the keys: at 256 of them and two queries that is six times the
    work (one core: 1,484 us as written, 244 query by query, 316 with the keys on the left).
    """
    few, f32 = q.shape[2], jnp.float32
    if few <= 2:
        each = [jnp.einsum("rkh,rkwh->rkw", q[:, :, i], k, preferred_element_type=f32) for i in range(few)]
        return jnp.stack(each, axis=2)
    if few <= 8:
        return jnp.einsum("rkwh,rkmh->rkwm", k, q, preferred_element_type=f32).swapaxes(2, 3)
    return jnp.einsum("rkmh,rkwh->rkmw", q, k, preferred_element_type=f32)


def _halves(kv: KV, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """k and v [.., h] as they are multiplied: int8 in `dtype`, without its scales."""
    k, v = jnp.split(kv.data[0], 2, axis=-1) if kv.packed else kv.data
    return (k.astype(dtype), v.astype(dtype)) if kv.scales else (k, v)


def _scaled(x: jax.Array, kv: KV, which: int) -> jax.Array:
    """x [.., K, m, W] times the scales [.., K, W] of k (0) or v (1)."""
    return x * kv.scales[which][..., None, :] if kv.scales else x


def _by_prompt(x: jax.Array, samples: int) -> jax.Array:
    """[N, K, g, d] -> [B, K, G * g, d]: the queries of a prompt's samples, side by side."""
    n, kv_heads, group, d = x.shape
    x = x.reshape(n // samples, samples, kv_heads, group, d).swapaxes(1, 2)
    return x.reshape(n // samples, kv_heads, samples * group, d)


def _by_row(x: jax.Array, samples: int) -> jax.Array:
    """The inverse of `_by_prompt`: [B, K, G * g, d] -> [N, K, g, d]."""
    prompts, kv_heads, both, d = x.shape
    x = x.reshape(prompts, kv_heads, samples, both // samples, d).swapaxes(1, 2)
    return x.reshape(prompts * samples, kv_heads, both // samples, d)
