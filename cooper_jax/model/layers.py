"""Parts of one transformer layer: RMSNorm, rotary embeddings, projections, attention over a mesh, the MLP.

`x` is [N, S, D] in a full forward pass and [N, D] in decoding.  `w` is the dict of one layer's parameters,
with matrices and biases in the compute dtype.  Axis legend: see transformer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.attention import causal_attention, default_implementation
from cooper_jax.kernels.decode_attention import decode_attention
from cooper_jax.kernels.kv import KV
from cooper_jax.kernels.matmul import matmul_plain
from cooper_jax.kernels.schedule import Schedule, make_schedule
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.rope import Rope, compute_frequencies
from cooper_jax.runtime.mesh import Layout
from cooper_jax.runtime.optim import ADAPTERS
from cooper_jax.types import Params

Matmul = Callable[[jax.Array, jax.Array], jax.Array]  # [..., D], [D, F] -> [..., F]
Angles = tuple[jax.Array, jax.Array]  # cos and sin, f32[..., h / 2] each


def constrain_batch(x: jax.Array, layout: Layout) -> jax.Array:
    """Shard activations over the batch only, so that weights are all-gathered (FSDP), not activations."""
    if layout.single_device:
        return x
    return layout.constrain(x, "batch", *(None,) * (x.ndim - 1))


def rms_norm(x: jax.Array, gain: jax.Array, config: ModelConfig) -> jax.Array:
    """RMSNorm over the last axis, computed in f32: x [..., D], gain [D] -> [..., D] in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    gain = gain.astype(jnp.float32)
    if config.norm_offset:
        gain = gain + config.norm_offset
    return (y * gain.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary_angles(config: ModelConfig, positions: jax.Array) -> dict[Rope | None, Angles | None]:
    """Compute (cos, sin) of the angles of every rotary embedding that the layers have.

    positions i32[...] -> f32[..., h / 2] each, by `LayerKind.rope`; None for layers that do not rotate.
    """
    angles: dict[Rope | None, Angles | None] = {}
    for rope in dict.fromkeys(kind.rope for kind in config.layer_kinds):
        angles[rope] = None if rope is None else _compute_angles(rope, config.head_dim, positions)
    return angles


def _compute_angles(rope: Rope, head_dim: int, positions: jax.Array) -> Angles:
    freqs = compute_frequencies(rope, head_dim)
    # Angles in f32: bfloat16 cannot represent positions above 256.
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32).reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Rotate x [N, ..., heads, h] in f32; component i is paired with i + h / 2, as in Hugging Face."""
    # Broadcast [..., h / 2] over heads, and over rows if all rows share one table.
    cos, sin = (r[..., None, :] for r in angles)
    cos, sin = (r.reshape((1,) * (x.ndim - r.ndim) + r.shape) for r in (cos, sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# The functions of config.ACTIVATIONS.
_GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# Name -> index of the axis H, which h follows, in one layer's parameter: q, k, v [D, H, h], o [H, h, D].
PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 0}
# Matrices of one input side by side, in the weights of a rollout (generation.merge_products): one product each.
QKV, GATE_UP = "qkv", "gate_up"


def flatten_projections(w: Params) -> Params:
    """Merge the axes H and h of one layer's projections, so that each is a matrix."""

    def flatten(x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    flat = w | {name: flatten(w[name], axis) for name, axis in PROJECTIONS.items()}
    if ADAPTERS not in w:
        return flat

    # The inputs of `o` are H and h, those of the others D; the other end of an adapter is its rank.
    adapters = {}
    for name, adapter in w[ADAPTERS].items():
        rank = adapter["a"].shape[-1]
        adapters[name] = {"a": adapter["a"].reshape(-1, rank), "b": adapter["b"].reshape(rank, -1)}
    return flat | {ADAPTERS: adapters}


def multiply(w: Params, name: str, config: ModelConfig, x: jax.Array, matmul: Matmul) -> jax.Array:
    """Multiply x [..., in] with a layer's matrix, and with its adapters if it has any -> [..., out].

    w: one layer after `flatten_projections`.
    """
    out = matmul(x, w[name])
    if config.lora is None or name not in w[ADAPTERS]:
        return out
    adapter = w[ADAPTERS][name]
    return out + config.lora.scale * matmul(matmul(x, adapter["a"]), adapter["b"])


def project_qkv(
    w: Params, config: ModelConfig, x: jax.Array, angles: Angles | None, matmul: Matmul = matmul_plain
) -> tuple[jax.Array, ...]:
    """Norm, project and rotate: x [..., D] -> q [..., H, h], k and v [..., K, h], q and k rotated.

    w: one layer after `flatten_projections`.  angles: None for a layer that does not rotate.
    """
    y = rms_norm(x, w["attn_norm"], config)
    if QKV in w:
        ends = config.heads * config.head_dim, (config.heads + config.kv_heads) * config.head_dim
        parts = jnp.split(matmul(y, w[QKV]), ends, axis=-1)
    else:
        parts = [multiply(w, name, config, y, matmul) for name in "qkv"]
    q, k, v = (part.reshape(*x.shape[:-1], -1, config.head_dim) for part in parts)
    if config.qkv_bias:
        # Biases [H, h] get leading axes of size 1: implicit rank promotion is an error in the tests.
        leading = (1,) * (x.ndim - 1)
        q = q + w["q_bias"].reshape(leading + q.shape[-2:])
        k = k + w["k_bias"].reshape(leading + k.shape[-2:])
        v = v + w["v_bias"].reshape(leading + v.shape[-2:])
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"], config), rms_norm(k, w["k_norm"], config)
    if angles is not None:
        q, k = _rotate(q, angles), _rotate(k, angles)

    # Attention divides the scores by sqrt(h).
    scalar = config.query_pre_attn_scalar
    if scalar is not None and scalar != config.head_dim:
        q = q * (config.head_dim / scalar) ** 0.5
    return q, k, v


def output_proj_and_mlp(
    w: Params,
    config: ModelConfig,
    x: jax.Array,
    heads: jax.Array,
    layout: Layout,
    matmul: Matmul = matmul_plain,
) -> jax.Array:
    """Apply the output projection to `heads` [..., H, h], then the gated feed-forward block -> [..., D].

    Both add to the residual stream `x`.
    """
    out = multiply(w, "o", config, heads.reshape(*x.shape[:-1], -1), matmul)
    if config.post_norms:
        out = rms_norm(out, w["attn_post_norm"], config)
    x = constrain_batch(x + out, layout)

    y = rms_norm(x, w["mlp_norm"], config)
    if GATE_UP in w:
        gate, up = jnp.split(matmul(y, w[GATE_UP]), 2, axis=-1)
    else:
        gate, up = (multiply(w, name, config, y, matmul) for name in ("gate", "up"))
    out = multiply(w, "down", config, _GATES[config.activation](gate) * up, matmul)
    if config.post_norms:
        out = rms_norm(out, w["mlp_post_norm"], config)
    return constrain_batch(x + out, layout)


def sharded_causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: Layout,
    window: int | None = None,
    segments: jax.Array | None = None,
    prefixes: jax.Array | None = None,
) -> jax.Array:
    """Run causal attention on each device's shard of rows and heads: the compiler cannot partition kernels.

    q [N, S, H, h], k and v [N, S, K, h] -> [N, S, H, h].  window, segments, prefixes: see `causal_attention`.
    """
    implementation = default_implementation(q.dtype, q.shape[-1], layout.platform)

    # Attention needs all positions of a row, and none of another row or head: no communication.
    def run(q, k, v, segments, prefixes):
        return causal_attention(
            q, k, v, window=window, segments=segments, prefixes=prefixes, implementation=implementation
        )

    spec = layout.spec(("batch", None, "heads", "head_dim"), q.shape)
    ways = layout.ways(spec[2])
    kv_heads = k.shape[2]
    if kv_heads % ways:
        # Key/value heads that do not divide over the shards are repeated, so that every shard has those that
        # its queries read: up to one per shard if that suffices, else one per query head.
        copies = ways // kv_heads if ways % kv_heads == 0 else q.shape[2] // kv_heads
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    rows = PartitionSpec(spec[0])
    return run_sharded(run, layout, (spec, spec, spec, rows, rows), spec)(q, k, v, segments, prefixes)


def make_decode_schedule(
    prompt_of: jax.Array,  # i32[N]: index of each row's prompt within the shard; -1: none
    lengths: jax.Array,  # i32[B]
    samples: int | None,
    layout: Layout,
    implementation: str,
) -> Schedule:
    """Make the decode schedule; for Pallas kernels one per shard, with a leading shard axis on all leaves."""
    # XLA's implementation is partitioned by the compiler, and takes one schedule of all rows.
    if not platform.is_pallas(implementation):
        return make_schedule(prompt_of, lengths, samples=samples)
    batch = layout.spec(("batch",))

    # Each shard numbers its own prompts, so the schedules are made inside shard_map.
    def run(prompt_of, lengths):
        return jax.tree.map(lambda x: x[None], make_schedule(prompt_of, lengths, samples=samples))

    return run_sharded(run, layout, (batch, batch), batch)(prompt_of, lengths)


class KeyRange(NamedTuple):
    """The columns of the two caches that each row's query attends to, up to the newest."""

    first: jax.Array  # i32[N]: oldest column in the suffix
    last: jax.Array  # i32[]: newest column in the suffix, of all rows
    prompt_first: jax.Array | None = None  # i32[N]: oldest column of the row's prompt; None: 0

    def within(self, position: jax.Array, window: int | None) -> KeyRange:
        """Return the range of a layer whose queries attend to `window` tokens, their own included.

        position: i32[N], of the query in its row, prompt included.
        """
        if window is None:
            return self
        first = jnp.maximum(self.first, self.last - (window - 1))
        return KeyRange(first, self.last, jnp.maximum(position - (window - 1), 0))


def sharded_decode_attention(
    q: jax.Array,  # [N, H, h]
    prompt: KV,  # leaves [L, B, K, P, ..]
    suffix: KV,  # leaves [L, N, K, W, ..]
    schedule: Schedule,
    keys: KeyRange,
    layer: jax.Array | int,  # i32[]; the int 0 for a stack of one layer
    layout: Layout,
    implementation: str,
) -> jax.Array:  # [N, H, h]
    """Run decode attention; Pallas kernels run on each device's shard of rows and key/value heads."""
    attend: Callable[..., jax.Array] = functools.partial(decode_attention, implementation=implementation)
    if not platform.is_pallas(implementation):
        return attend(q, prompt, suffix, schedule, keys.first, keys.last, layer, keys.prompt_first)

    last, layer = jnp.asarray(keys.last), jnp.asarray(layer)  # shard_map takes arrays only
    batch = layout.spec(("batch",))[0]
    # Query heads are sharded like the cache's heads.  If those do not divide, every device has all heads.
    heads = layout.spec(("kv_heads",), (suffix.data[0].shape[2],))[0]
    queries = PartitionSpec(batch, heads, None)
    cache = PartitionSpec(None, batch, heads)
    rows, replicated = PartitionSpec(batch), PartitionSpec()

    def run(q, prompt, suffix, schedule, first, last, layer, prompt_first):
        schedule = jax.tree.map(lambda x: x[0], schedule)  # without the shard axis of make_decode_schedule
        return attend(q, prompt, suffix, schedule, first, last, layer, prompt_first)

    specs = (queries, cache, cache, rows, rows, replicated, replicated, rows)
    arguments = (q, prompt, suffix, schedule, keys.first, last, layer, keys.prompt_first)
    return run_sharded(run, layout, specs, queries)(*arguments)


def run_sharded(run: Callable, layout: Layout, in_specs: Any, out_specs: Any) -> Callable:
    """Map `run` over the devices' shards with shard_map; return `run` itself on one device."""
    if layout.single_device:
        return run
    # check_vma=False: Pallas calls do not declare over which mesh axes their outputs vary.
    return jax.shard_map(run, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
