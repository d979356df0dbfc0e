"""The parts of one layer: norm, rotary positions, projections, attention over a mesh, SwiGLU.

`x` is [..., D]: rows and tokens in the trunk, rows alone in decoding.  `w` is one layer's parameters, matrices
and biases in the compute type.  Axis legend: see transformer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.attention import causal_attention, default_implementation
from cooper_jax.kernels.decode_attention import decode_attention
from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.matmul import matmul_plain
from cooper_jax.kernels.schedule import Schedule, make_schedule
from cooper_jax.model.config import ModelConfig
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Params

Matmul = Callable[[jax.Array, jax.Array], jax.Array]  # [..., D], [D, F] -> [..., F]
Rope = tuple[jax.Array, jax.Array]  # cos and sin, f32[..., h / 2] each


def constrain_batch(x: jax.Array, layout: Layout) -> jax.Array:
    """Activations are cut over their rows alone; weights are gathered to them, not they to weights."""
    if layout.single_device:
        return x
    return layout.constrain(x, "batch", *(None,) * (x.ndim - 1))


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in f32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary_angles(config: ModelConfig, positions: jax.Array) -> Rope:
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


PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 0}  # where the heads [.., H, h, ..] of one layer's begin


def flatten_projections(w: Params) -> Params:
    """One layer with the heads of its projections as one axis, as they are multiplied."""

    def flatten(x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return w | {name: flatten(w[name], axis) for name, axis in PROJECTIONS.items()}


def project_qkv(
    w: Params, config: ModelConfig, x: jax.Array, rope: Rope, matmul: Matmul = matmul_plain
) -> tuple[jax.Array, ...]:
    """x [..., D] -> q [..., H, h], k and v [..., K, h]; q and k rotated.  w: through `flatten_projections`."""
    y = rms_norm(x, w["attn_norm"], config.norm_eps)
    q, k, v = (matmul(y, w[name]).reshape(*x.shape[:-1], -1, config.head_dim) for name in "qkv")
    if config.qkv_bias:
        q, k, v = (
            z + w[f"{name}_bias"].reshape((1,) * (x.ndim - 1) + z.shape[-2:])
            for z, name in ((q, "q"), (k, "k"), (v, "v"))
        )
    return _rotate(q, rope), _rotate(k, rope), v


def output_proj_and_mlp(
    w: Params,
    config: ModelConfig,
    x: jax.Array,
    heads: jax.Array,
    layout: Layout,
    matmul: Matmul = matmul_plain,
) -> jax.Array:
    """The rest of a layer: the output projection of `heads` [..., H, h], then the SwiGLU block."""
    x = constrain_batch(x + matmul(heads.reshape(*x.shape[:-1], -1), w["o"]), layout)
    y = rms_norm(x, w["mlp_norm"], config.norm_eps)
    return constrain_batch(
        x + matmul(jax.nn.silu(matmul(y, w["gate"])) * matmul(y, w["up"]), w["down"]), layout
    )


def sharded_causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout) -> jax.Array:
    """`attention`, run once a shard of rows and heads: kernels are not partitioned by the compiler."""
    run = functools.partial(
        causal_attention, implementation=default_implementation(q.dtype, q.shape[-1], layout.platform)
    )
    spec = layout.spec(("batch", None, "heads", "head_dim"), q.shape)
    ways = layout.ways(spec[2])
    kv_heads = k.shape[2]
    if kv_heads % ways:
        # Fewer key/value heads than shards: repeat each until every shard holds those its queries read.
        copies = ways // kv_heads if ways % kv_heads == 0 else q.shape[2] // kv_heads
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    return run_sharded(run, layout, (spec,) * 3, spec)(q, k, v)


def make_decode_schedule(
    prompt_of: jax.Array,  # i32[N]: in the shard, -1: none
    lengths: jax.Array,  # i32[B]
    samples: int | None,
    layout: Layout,
    implementation: str,
) -> Schedule:
    """`schedule`; that of Pallas kernels by shard, its leaves with an axis of shards before their own."""
    if not platform.is_pallas(implementation):
        return make_schedule(prompt_of, lengths, samples=samples)
    batch = layout.spec(("batch",))

    def run(prompt_of, lengths):
        return jax.tree.map(lambda x: x[None], make_schedule(prompt_of, lengths, samples=samples))

    return run_sharded(run, layout, (batch, batch), batch)(prompt_of, lengths)


def sharded_decode_attention(
    q: jax.Array,  # [N, H, h]
    prompt: KV,  # leaves [L, B, K, P, ..]
    suffix: KV,  # leaves [L, N, K, W, ..]
    plan: Schedule,
    first: jax.Array,  # i32[N]
    last: jax.Array,  # i32[]
    layer: jax.Array,  # i32[]
    layout: Layout,
    implementation: str,
) -> jax.Array:
    """`decode_attention`, its kernels run once a shard of rows and key/value heads."""
    attend = functools.partial(decode_attention, implementation=implementation)
    if not platform.is_pallas(implementation):
        return attend(q, prompt, suffix, plan, first, last, layer)
    last, layer = jnp.asarray(last), jnp.asarray(layer)  # of a stack of one, the layer is a plain 0
    batch = layout.spec(("batch",))[0]
    # Heads are cut where the cache's are; where those do not divide, each shard computes all of them.
    heads = layout.spec(("kv_heads",), (suffix.data[0].shape[2],))[0]
    queries = PartitionSpec(batch, heads, None)
    cache = PartitionSpec(None, batch, heads)
    rows, one = PartitionSpec(batch), PartitionSpec()

    def run(q, prompt, suffix, plan, first, last, layer):
        plan = jax.tree.map(lambda x: x[0], plan)
        return attend(q, prompt, suffix, plan, first, last, layer)

    specs = (queries, cache, cache, rows, rows, one, one)
    return run_sharded(run, layout, specs, queries)(q, prompt, suffix, plan, first, last, layer)


def run_sharded(run: Callable, layout: Layout, in_specs, out_specs) -> Callable:
    """`run` on each device's own parts: what the compiler cannot partition.  On one device, `run` itself."""
    if layout.single_device:
        return run
    # check_vma: Pallas calls do not declare over which mesh axes their outputs vary.
    return jax.shard_map(run, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
