"""Causal attention over right-padded rows (training, scoring, prefill), by platform.

`implementation` is chosen when the function is traced, by `jax.default_backend()` unless it is given:

    xla                any platform: blocks of queries, each against the keys up to its own end and recomputed
                       in the backward pass; saves nearly half of the [S, S] scores and half the memory
    cudnn              GPU, float16 and bfloat16, head_dim a multiple of 8 up to 128: flash attention
    splash             TPU: jax's own Pallas flash kernel, with grouped queries
    splash_interpret   the same, interpreted: for tests on the CPU

The compiler does not partition kernels: on a mesh, call `causal_attention` under `jax.shard_map`, one shard
of rows and heads each.

N rows   S tokens   H query heads   K key/value heads   h head_dim
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cooper_jax.kernels import reference

# Most blocks of queries in the xla implementation, and the fewest queries of one.  They are unrolled, not
# scanned: a scan would hold one block's scores where XLA:CPU now holds several, but all its steps would need
# keys of one length, which computes the upper triangle too.
BLOCKS, QUERY_BLOCK = 8, 64
LANES = 128  # a TPU vector register's width; splash needs token counts in multiples of it


def default_implementation(dtype: jnp.dtype, head_dim: int, platform: str | None = None) -> str:
    """Return what runs on a platform (None: the default backend's): "xla", "cudnn" or "splash"."""
    platform = jax.default_backend() if platform is None else platform
    if platform == "tpu":
        return "splash"
    fits_cudnn = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform in ("gpu", "cuda") and fits_cudnn else "xla"


def causal_attention(
    q: jax.Array,  # [N, S, H, h]
    k: jax.Array,  # [N, S, K, h]
    v: jax.Array,  # [N, S, K, h]
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Compute softmax(q k^T / sqrt(h)) v with a causal mask -> [N, S, H, h].

    Rows must be right-padded; outputs at padding are finite and mean nothing.  Raises ValueError for an
    unknown implementation.
    """
    chosen = implementation or default_implementation(q.dtype, q.shape[-1])
    if chosen not in _IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {chosen!r} is none of {', '.join(_IMPLEMENTATIONS)}")
    return _IMPLEMENTATIONS[chosen](q, k, v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Run the reference a block of queries at a time."""
    tokens = q.shape[1]
    size = max(QUERY_BLOCK, -(-tokens // BLOCKS))
    if tokens <= size:
        return reference.reference_attention(q, k, v)
    out = []
    for first in range(0, tokens, size):
        end = min(first + size, tokens)
        block = jax.checkpoint(functools.partial(reference.reference_attention, first=first))
        out.append(block(q[:, first:end], k[:, :end], v[:, :end]))
    return jnp.concatenate(out, axis=1)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """Run jax's splash attention.  Rows are right-padded to whole lanes, which the causal mask hides."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # pulls in Pallas: TPU only

    _, tokens, heads, h = q.shape
    padded = -(-tokens // LANES) * LANES
    padding = ((0, 0), (0, 0), (0, padded - tokens), (0, 0))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), padding) for x in (q * h**-0.5, k, v))  # [N, heads, S', h]
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


_IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "xla": _blocked,
    "cudnn": _cudnn,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),
}
