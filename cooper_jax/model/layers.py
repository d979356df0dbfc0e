"""The parts of one layer: norm, rotary positions, projections, attention over a mesh, SwiGLU.

`x` is [..., D]: rows and tokens in the trunk, rows alone in decoding.  `w` is one layer's parameters, matrices
and biases in the compute type.  Axis legend: see transformer.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cooper_jax.model.config import ModelConfig
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params
from kernels.attention import attention

Rope = tuple[jax.Array, jax.Array]  # cos and sin, f32[..., h / 2] each


def pin(x: jax.Array, layout: Layout | None) -> jax.Array:
    """Activations are cut over their rows alone; weights are gathered to them, not they to weights."""
    return x if layout is None else layout.constrain(x, "batch", *(None,) * (x.ndim - 1))


def cast_layers(layers: Params, dtype: jnp.dtype) -> Params:
    """The matrices and biases in the compute type; norms stay f32, as they compute in it."""
    return {name: w if name.endswith("norm") else w.astype(dtype) for name, w in layers.items()}


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in f32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary(config: ModelConfig, positions: jax.Array) -> Rope:
    """cos and sin of the rotary angles: i32[...] -> f32[..., h / 2] each."""
    freqs = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if (s := config.rope_scaling) is not None:
        # Llama 3: waves longer than the original context / low_freq_factor are stretched by `factor`,
        # those shorter than it / high_freq_factor are kept, and between them the two are blended.
        turns = s.original_max_len * freqs / (2 * np.pi)
        kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        freqs = freqs * (kept + (1 - kept) / s.factor)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32).reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """x [N, ..., heads, h]; the rotation pairs component i with i + h / 2, in f32."""
    cos, sin = (r[..., None, :] for r in rope)  # over heads
    cos, sin = (r.reshape((1,) * (x.ndim - r.ndim) + r.shape) for r in (cos, sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def project_qkv(w: Params, config: ModelConfig, x: jax.Array, rope: Rope) -> tuple[jax.Array, ...]:
    """x [..., D] -> q [..., H, h], k and v [..., K, h]; q and k rotated."""
    y = rms_norm(x, w["attn_norm"], config.norm_eps)
    q, k, v = (jnp.einsum("...d,dnh->...nh", y, w[name]) for name in "qkv")
    if config.qkv_bias:
        q, k, v = (
            z + w[f"{name}_bias"].reshape((1,) * (x.ndim - 1) + z.shape[-2:])
            for z, name in ((q, "q"), (k, "k"), (v, "v"))
        )
    return _rotate(q, rope), _rotate(k, rope), v


def finish_layer(
    w: Params, config: ModelConfig, x: jax.Array, heads: jax.Array, layout: Layout | None
) -> jax.Array:
    """The rest of a layer: the output projection of `heads` [..., H, h], then the SwiGLU block."""
    x = pin(x + jnp.einsum("...nh,nhd->...d", heads, w["o"]), layout)
    y = rms_norm(x, w["mlp_norm"], config.norm_eps)
    return pin(x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], layout)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout | None) -> jax.Array:
    """`attention`, run once a shard of rows and heads: kernels are not partitioned by the compiler."""
    if layout is None:
        return attention(q, k, v)
    spec = layout.spec(("batch", None, "heads", "head_dim"), q.shape)
    axis = spec[2]
    ways = int(np.prod([layout.mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())]))
    kv_heads = k.shape[2]
    if kv_heads % ways:
        # Fewer key/value heads than shards: repeat each until every shard holds those its queries read.
        copies = ways // kv_heads if ways % kv_heads == 0 else q.shape[2] // kv_heads
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    specs = PartitionSpec(*spec)
    # check_vma: Pallas calls do not declare over which mesh axes their outputs vary.
    run = jax.shard_map(attention, mesh=layout.mesh, in_specs=(specs,) * 3, out_specs=specs, check_vma=False)
    return run(q, k, v)
