"""The two faces of attention, and what stands behind them on each platform.

`attention`         causal, over right-padded rows: training, scoring, prefill.
`decode_attention`  one query a row: G samples share their prompt's keys, each has its own suffix.

`implementation` is chosen when the function is traced, by `jax.default_backend()` unless it is given:

    xla      everywhere: blocks of queries, each against the keys up to its own end and recomputed in the
             backward pass: nearly half of the [S, S] scores are never computed, and half the memory goes
    cudnn    GPU, float16 and bfloat16, head_dim a multiple of 8 up to 128: flash attention
    splash   TPU: jax's own Pallas flash kernel, with grouped queries
    splash_interpret   the same, interpreted: for tests on the CPU

Kernels are not partitioned by the compiler: over a mesh, call `attention` under `jax.shard_map`, one shard
of rows and heads each.  Axis legend: see reference.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels import reference

# Queries a block of the xla form.  The blocks are unrolled, not scanned: a scan would hold one block's scores
# where XLA:CPU now holds several, but its keys must have one length, which computes the upper triangle too.
QUERY_BLOCK = 256
LANES = 128  # a TPU vector register's width; splash wants token counts in multiples of it


def default_implementation(dtype: jnp.dtype, head_dim: int) -> str:
    """What `attention` runs here: "xla", "cudnn" or "splash"."""
    platform = jax.default_backend()
    if platform == "tpu":
        return "splash"
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla"


def attention(
    q: jax.Array,  # [N, S, H, h]
    k: jax.Array,  # [N, S, K, h]
    v: jax.Array,  # [N, S, K, h]
    *,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(h)) v, causal -> [N, S, H, h].

    Rows must be right-padded; outputs at padding are finite and mean nothing.  Raises ValueError for an
    implementation that there is not.
    """
    chosen = implementation or default_implementation(q.dtype, q.shape[-1])
    if chosen == "xla":
        return _blocked(q, k, v)
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    if chosen in ("splash", "splash_interpret"):
        return _splash(q, k, v, interpret=chosen == "splash_interpret")
    raise ValueError(f"attention implementation {chosen!r} is none of xla, cudnn, splash, splash_interpret")


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The oracle, a block of queries at a time."""
    tokens = q.shape[1]
    if tokens <= QUERY_BLOCK:
        return reference.attention(q, k, v)
    out = []
    for first in range(0, tokens, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, tokens)
        block = jax.checkpoint(functools.partial(reference.attention, first=first))
        out.append(block(q[:, first:end], k[:, :end], v[:, :end]))
    return jnp.concatenate(out, axis=1)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
    """jax's splash attention.  Rows are padded on the right to whole lanes, which causality hides."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # pulls in Pallas: TPU only

    _, tokens, heads, h = q.shape
    padded = -(-tokens // LANES) * LANES
    q, k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))  # [N, heads, S', h]
        for x in (q * h**-0.5, k, v)
    )
    block = next(b for b in (512, 384, 256, 128) if padded % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v)[:, :, :tokens].swapaxes(1, 2)


def decode_attention(
    q: jax.Array,  # [N, H, h]: one query a row, prompt-major
    prompt_k: jax.Array,  # [B, K, P, h]: shared by the G = N / B samples of a prompt
    prompt_v: jax.Array,  # [B, K, P, h]
    lengths: jax.Array,  # i32[B]: prompt keys that are real
    suffix_k: jax.Array,  # [N, K, T, h]
    suffix_v: jax.Array,  # [N, K, T, h]
    first: jax.Array,  # i32[N]: the row's oldest suffix column, at most `last`
    last: jax.Array,  # i32[]: the query's own suffix column
) -> jax.Array:
    """Each row's query over its prompt's keys and its suffix columns `first` to `last` -> [N, H, h].

    The prompt part multiplies all G samples' queries with one copy of the keys, the suffix part each row's
    own; both exponentials are taken against the larger of the two maxima, so their sums simply add:

        o = (sum_p e^{z_p - m} v_p + sum_s e^{z_s - m} v_s) / (sum_p e^{z_p - m} + sum_s e^{z_s - m})
    """
    n, heads, h = q.shape
    prompts, kv_heads, _, _ = prompt_k.shape
    samples, group = n // prompts, heads // kv_heads
    scale = h**-0.5
    rows = q.reshape(n, kv_heads, group, h)
    shared = _by_prompt(rows, samples)  # [B, K, G * g, h]

    zp = jnp.einsum("bkmh,bkph->bkmp", shared, prompt_k, preferred_element_type=jnp.float32) * scale
    seen = jnp.arange(prompt_k.shape[2])[None, :] < lengths[:, None]  # bool[B, P]
    zp = jnp.where(seen[:, None, None, :], zp, -jnp.inf)
    zs = jnp.einsum("nkgh,nkth->nkgt", rows, suffix_k, preferred_element_type=jnp.float32) * scale
    column = jnp.arange(suffix_k.shape[2])[None, :]
    own = (column >= first[:, None]) & (column <= last)  # bool[N, T]
    zs = jnp.where(own[:, None, None, :], zs, -jnp.inf)

    # The suffix always holds the query's own key, so m is finite whatever the prompt's length.
    m = jnp.maximum(_by_row(zp.max(-1, keepdims=True), samples), zs.max(-1, keepdims=True))  # f32[N, K, g, 1]
    ep = jnp.exp(zp - _by_prompt(m, samples))
    es = jnp.exp(zs - m)
    op = jnp.einsum(
        "bkmp,bkph->bkmh", ep.astype(prompt_v.dtype), prompt_v, preferred_element_type=jnp.float32
    )
    os = jnp.einsum(
        "nkgt,nkth->nkgh", es.astype(suffix_v.dtype), suffix_v, preferred_element_type=jnp.float32
    )
    total = _by_row(ep.sum(-1, keepdims=True), samples) + es.sum(-1, keepdims=True)
    return ((_by_row(op, samples) + os) / total).astype(q.dtype).reshape(n, heads, h)


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
