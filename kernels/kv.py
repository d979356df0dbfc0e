"""Key/value caches: two layouts and three dtypes.

    apart    data = (k [.., h], v [.., h])    XLA's own dots read it without a copy
    packed   data = (kv [.., 2 h],)           keys in the first half of the last axis, values in the second

A TPU stores the last axis in tiles of 128 lanes.  At head_dim 64 an array [.., 64] would be padded to twice
its size, or laid out with another axis last and copied before every kernel; packed keys and values fill the
lanes exactly.  At head_dim 128 they are two tiles, which a kernel separates at no cost.

In int8 each token and head has one f32 scale for its key and one for its value, max |x| / 127.  A key or
value is data * scale.

L layers   N rows (prompts or slots)   K key/value heads   W tokens   h head_dim
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

DTYPES = ("float32", "bfloat16", "int8")


class KV(NamedTuple):
    """Keys and values; leading axes [L, N, K, W] in a cache, [N, K] or [N, W, K] for new tokens."""

    data: tuple[jax.Array, ...]  # apart: (k, v), [.., h] each; packed: (kv,), [.., 2 h]
    scales: tuple[jax.Array, ...]  # int8: (scales of k, scales of v), f32[..] each; otherwise ()

    @property
    def packed(self) -> bool:
        return len(self.data) == 1


class Format(NamedTuple):
    """Format of a cache; static under jit.  dtype: float32, bfloat16 or int8."""

    dtype: str
    packed: bool

    def bytes_per_token(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Count the bytes of a token's keys and values in all layers and heads, without padding to tiles."""
        # int8 adds two f32 scales per head.
        scales = 2 * 4 if self.dtype == "int8" else 0
        return layers * kv_heads * (2 * head_dim * jnp.dtype(self.dtype).itemsize + scales)


def pack_kv(k: jax.Array, v: jax.Array, kv_format: Format) -> KV:
    """Store k and v [.., h], of any float dtype, in a cache's format."""
    scales: tuple[jax.Array, ...] = ()
    if kv_format.dtype == "int8":
        (k, k_scale), (v, v_scale) = _quantise(k), _quantise(v)
        scales = (k_scale, v_scale)
    else:
        k, v = k.astype(kv_format.dtype), v.astype(kv_format.dtype)

    # The scales have no last axis to join, and stay apart in both layouts.
    if kv_format.packed:
        return KV((jnp.concatenate([k, v], axis=-1),), scales)
    return KV((k, v), scales)


def unpack_kv(kv: KV, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Invert `pack_kv`, for tests: k and v [.., h] in `dtype`, with the scales applied."""
    k, v = jnp.split(kv.data[0], 2, axis=-1) if kv.packed else kv.data
    if not kv.scales:
        return k.astype(dtype), v.astype(dtype)

    # Scales are applied in f32, whatever `dtype` is.
    k, v = (x.astype(jnp.float32) * s[..., None] for x, s in zip((k, v), kv.scales, strict=True))
    return k.astype(dtype), v.astype(dtype)


def make_empty_kv(shape: tuple[int, ...], head_dim: int, kv_format: Format) -> KV:
    """Make a cache of zeros with leading axes `shape`."""
    data: tuple[jax.Array, ...]
    if kv_format.packed:
        data = (jnp.zeros((*shape, 2 * head_dim), kv_format.dtype),)
    else:
        k, v = (jnp.zeros((*shape, head_dim), kv_format.dtype) for _ in range(2))
        data = (k, v)
    scales = (jnp.zeros(shape, jnp.float32),) * 2 if kv_format.dtype == "int8" else ()
    return KV(data, scales)


def _quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise x [.., h] -> int8 [.., h] and its scales f32 [..]."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0

    # A vector of zeros keeps its scale of 0, but is not divided by it.
    divisor = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / divisor[..., None]).astype(jnp.int8), scale
