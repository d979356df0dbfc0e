"""Decode attention: one query per row, over the keys of a shared prompt and of the row's own suffix.

    o = (sum_p e^(z_p - m) v_p + sum_s e^(z_s - m) v_s) / (sum_p e^(z_p - m) + sum_s e^(z_s - m))
    z = q k / sqrt(h)    m = max z    p prompt keys    s suffix keys

1. `make_schedule` (schedule.py) runs once, and again when rows change their prompts.  It puts rows of one
   prompt side by side in tiles, so that a tile reads its prompt's keys once.
2. `decode_attention` runs for every token and layer.  It takes the stacked caches whole and the layer as an
   index, so that no layer is ever copied out.

Backends: xla in this file, tpu and triton in decode_attention_tpu.py and decode_attention_triton.py.  The two
kernels need packed caches (kv.py).  They read only the columns within a prompt's length and from `first` to
`last`: exactly these columns on GPUs; on TPUs whole tiles of 8 columns (of 128 in int8), whose entries must
all be finite.

Sliding windows: `prompt_first` gives each row's oldest prompt column, and `first` is raised by the caller.  The
kernels then read a prompt from the oldest column of a tile's rows on, in whole blocks.

The compiler does not partition kernels: on a mesh, call both functions under `jax.shard_map`.

L layers   N rows   B prompts   G samples per prompt   Y tiles of R rows   H query heads   K key/value heads
g = H / K   h head_dim   P prompt keys   W suffix columns
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cooper_jax.kernels import platform
from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.schedule import LOWEST, Schedule, prompt_lengths


def supports_head_dim(implementation: str, head_dim: int) -> bool:
    """Tell whether an implementation reads caches of this head_dim."""
    backend = platform.resolve_implementation(implementation).backend
    if backend == "tpu":
        return head_dim % 64 == 0
    if backend == "triton":
        return head_dim >= 16 and head_dim & (head_dim - 1) == 0  # a power of two
    return True


def decode_attention(
    q: jax.Array,  # [N, H, h]
    prompt: KV,  # leading axes [L, B, K, P]
    suffix: KV,  # leading axes [L, N, K, W]
    schedule: Schedule,
    first: jax.Array,  # i32[N]: the row's oldest suffix column; above `last`: it has none
    last: jax.Array,  # i32[]: the newest column of every row
    layer: jax.Array,  # i32[]
    prompt_first: jax.Array | None = None,  # i32[N]: the row's oldest prompt column; None: 0
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Attend from each row's query to its prompt and its suffix columns `first` to `last` -> [N, H, h].

    A row with neither prompt nor suffix columns gets zeros.  The xla backend reads all columns, the others
    only those that count.  Raises ValueError for shapes or cache formats that the implementation cannot read.
    """
    backend, interpret = platform.resolve_implementation(implementation)
    if backend != "xla" and not (prompt.packed and suffix.packed):
        raise ValueError(
            f"the {backend} kernel reads packed caches only; these have separate arrays of keys and values"
        )
    attend = _BACKENDS[backend]
    return attend(q, prompt, suffix, schedule, first, last, layer, prompt_first, interpret=interpret)


# The kernels are imported when they are called: Pallas is slow to import, and the CPU does not need it.
def _tpu(*arguments: Any, interpret: bool) -> jax.Array:
    from cooper_jax.kernels import decode_attention_tpu

    return decode_attention_tpu.decode_attention(*arguments, interpret=interpret)


def _triton(*arguments: Any, interpret: bool) -> jax.Array:
    from cooper_jax.kernels import decode_attention_triton

    return decode_attention_triton.decode_attention(*arguments, interpret=interpret)


def _xla(
    q: jax.Array,
    prompt: KV,
    suffix: KV,
    schedule: Schedule,
    first: jax.Array,
    last: jax.Array,
    layer: jax.Array,
    prompt_first: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """Attend in plain jnp.

    The prompt part multiplies all queries of a prompt's samples with one copy of its keys; the suffix part
    multiplies each row's queries with the row's own keys.  The exponentials of both parts are relative to the
    larger of the two maxima, so their sums can be added.
    """
    n, heads, h = q.shape

    # The caches of this layer alone: k and v [B, K, P, h] of prompts, [N, K, W, h] of suffixes.
    prompt, suffix = (
        jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)
        for cache in (prompt, suffix)
    )

    # Rows in any order get a copy of their prompt's keys each; prompt-major rows share them by a reshape.
    if schedule.samples is not None:
        lengths, samples = schedule.lengths, schedule.samples
    else:
        lengths, samples = prompt_lengths(schedule.prompt_of, schedule.lengths), 1
        prompt = jax.tree.map(lambda x: x[jnp.maximum(schedule.prompt_of, 0)], prompt)

    (k_prompt, v_prompt), (k_suffix, v_suffix) = _split_kv(prompt, q.dtype), _split_kv(suffix, q.dtype)
    kv_heads = k_suffix.shape[1]
    queries = q.reshape(n, kv_heads, heads // kv_heads, h)

    # Scores of the prompt keys f32[B, K, G * g, P]: -inf at padding.
    z_prompt = _scores(_by_prompt(queries, samples), k_prompt)
    z_prompt = _apply_scales(z_prompt * h**-0.5, prompt, 0)
    real = jnp.arange(z_prompt.shape[-1])[None, :] < lengths[:, None]  # bool[B, P]
    z_prompt = jnp.where(real[:, None, None, :], z_prompt, -jnp.inf)
    if prompt_first is not None:
        # Each row has a window of its own.
        group = heads // kv_heads
        oldest = jnp.repeat(prompt_first.reshape(-1, samples), group, axis=1)  # i32[B, G * g]
        in_window = jnp.arange(z_prompt.shape[-1])[None, None, :] >= oldest[:, :, None]
        z_prompt = jnp.where(in_window[:, None], z_prompt, -jnp.inf)

    # Scores of the suffix keys f32[N, K, g, W]: -inf outside the row's columns.
    z_suffix = _scores(queries, k_suffix)
    z_suffix = _apply_scales(z_suffix * h**-0.5, suffix, 0)
    column = jnp.arange(z_suffix.shape[-1])[None, :]
    own = (column >= first[:, None]) & (column <= last)  # bool[N, W]
    z_suffix = jnp.where(own[:, None, None, :], z_suffix, -jnp.inf)

    # One softmax over both parts.  LOWEST keeps a row without any key finite.
    m_prompt = _by_row(z_prompt.max(-1, keepdims=True), samples)
    m = jnp.maximum(m_prompt, z_suffix.max(-1, keepdims=True))  # f32[N, K, g, 1]
    m = jnp.maximum(m, LOWEST)
    p_prompt = jnp.exp(z_prompt - _by_prompt(m, samples))
    p_suffix = jnp.exp(z_suffix - m)
    l = _by_row(p_prompt.sum(-1, keepdims=True), samples) + p_suffix.sum(-1, keepdims=True)

    # The weighted values.  int8's value scales multiply the probabilities: P or W numbers instead of P * h.
    p_prompt = _apply_scales(p_prompt, prompt, 1).astype(v_prompt.dtype)
    p_suffix = _apply_scales(p_suffix, suffix, 1).astype(v_suffix.dtype)
    acc_prompt = jnp.einsum("bkmp,bkph->bkmh", p_prompt, v_prompt, preferred_element_type=jnp.float32)
    acc_suffix = jnp.einsum("nkgt,nkth->nkgh", p_suffix, v_suffix, preferred_element_type=jnp.float32)
    out = (_by_row(acc_prompt, samples) + acc_suffix) / jnp.where(l > 0.0, l, 1.0)
    return out.astype(q.dtype).reshape(n, heads, h)


_BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": _xla, "tpu": _tpu, "triton": _triton}


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Multiply q [N, K, J, h] with k [N, K, W, h] -> f32[N, K, J, W].

    XLA:CPU packs the right operand of a product into blocks, which costs more than a product of few queries.
    With 256 keys, 2 queries and one core, the plain form (keys on the right) takes 1,484 us, one query at a
    time 244 us, and the keys on the left 316 us.
    """
    queries, f32 = q.shape[2], jnp.float32
    if queries <= 2:
        z = [jnp.einsum("rkh,rkwh->rkw", q[:, :, i], k, preferred_element_type=f32) for i in range(queries)]
        return jnp.stack(z, axis=2)
    if queries <= 8:
        return jnp.einsum("rkwh,rkmh->rkwm", k, q, preferred_element_type=f32).swapaxes(2, 3)
    return jnp.einsum("rkmh,rkwh->rkmw", q, k, preferred_element_type=f32)


def _split_kv(kv: KV, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Return k and v [.., h] in the dtype of their products: int8 in `dtype`, with scales not applied."""
    k, v = jnp.split(kv.data[0], 2, axis=-1) if kv.packed else kv.data
    return (k.astype(dtype), v.astype(dtype)) if kv.scales else (k, v)


def _apply_scales(x: jax.Array, kv: KV, which: int) -> jax.Array:
    """Multiply x [.., K, J, W] with the scales [.., K, W] of k (which = 0) or of v (which = 1)."""
    return x * kv.scales[which][..., None, :] if kv.scales else x


def _by_prompt(x: jax.Array, samples: int) -> jax.Array:
    """Reshape [N, K, g, d] -> [B, K, G * g, d]: the queries of a prompt's samples, side by side."""
    n, kv_heads, group, d = x.shape
    x = x.reshape(n // samples, samples, kv_heads, group, d).swapaxes(1, 2)
    return x.reshape(n // samples, kv_heads, samples * group, d)


def _by_row(x: jax.Array, samples: int) -> jax.Array:
    """Invert `_by_prompt`: [B, K, G * g, d] -> [N, K, g, d]."""
    prompts, kv_heads, queries, d = x.shape
    x = x.reshape(prompts, kv_heads, samples, queries // samples, d).swapaxes(1, 2)
    return x.reshape(prompts * samples, kv_heads, queries // samples, d)
