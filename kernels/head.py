"""Output head fused with sampling or scoring: the vocabulary streams past the rows, logits are never written.

    head_sample      hidden, head, key words -> a token per row, its log-probability, the entropy
    head_logprobs    hidden, head, targets   -> log-probabilities of the targets, with a gradient; the entropy

1. A backend of `stream_head` passes over the head in pieces: `xla` here (chunks of the vocabulary, any
   platform), `head_tpu` (Mosaic), `head_triton` (CUDA GPUs).  Each keeps `online.Accumulators`, and no
   logits.
2. Lanes, splits and, under `shard_map`, shards of the vocabulary merge by one rule,
   `online.reduce_accumulators`.
3. Tokens are drawn by the Gumbel-max trick: argmax z / T + g, with g a function of (key words, vocabulary
   index) alone.  So a token does not depend on tiles, shards or the batch, except through the rounding of z.
4. The gradient of `head_logprobs` recomputes logits a chunk of the vocabulary at a time, in plain XLA: each
   entry's gradient is then summed over all rows by one matmul, in f32, and written once.

N rows   D width   V vocabulary entries (of this shard, under `shard_map`)   C entries of a chunk
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cooper_jax.kernels import gumbel, online, platform

# Logits that exist at a time.  Those of plain XLA fit into a core's cache.  Accelerators add each chunk's
# part of d_hidden [N, D] to the rest in memory, which takes less of the time the larger the chunks are.
CHUNK, LARGE_CHUNK = 2**19, 2**25
MOST_ENTRIES = 2**13  # of a chunk: its part of d_head is held in f32
Carry = TypeVar("Carry")


class HeadSampledTokens(NamedTuple):
    """One draw per row.  A row with a NaN or +inf among its logits, or only -inf, gives 0, NaN, NaN."""

    token: jax.Array  # i32[N]
    logprob: jax.Array  # f32[N], natural, under softmax(z / temperature); greedy: 0
    entropy: jax.Array  # f32[N], nats, of the same distribution; greedy: of softmax(z)


def head_sample(
    hidden: jax.Array,  # [N, D], f32 or bf16
    head: jax.Array,  # [V, D]; under `axis_name`, this shard's rows
    key_words: jax.Array,  # u32[N, 2]: each row's own
    *,
    temperature: float,
    vocab_size: int,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> HeadSampledTokens:
    """Draw a token per row from softmax(z / temperature), z = hidden head^T in f32.

    temperature (0: greedy, the first of the largest) and vocab_size are static.  Entries from vocab_size on,
    counted over all shards, are padding: never drawn, and of probability 0.  axis_name: the mesh axis over
    which the vocabulary is sharded, in equal parts.  Raises ValueError for a temperature below 0.
    """
    if not temperature >= 0.0:
        raise ValueError(f"head_sample: temperature is {temperature}, it must be 0 (greedy) or more")
    acc = _stream_head(
        hidden,
        head,
        key_words,
        mode="draw" if temperature > 0.0 else "greedy",
        temperature=temperature,
        vocab_size=vocab_size,
        axis_name=axis_name,
        implementation=implementation,
    )
    assert acc.token is not None  # both modes sample
    valid = acc.l > 0.0  # False for NaN
    log_l = jnp.log(acc.l)
    logprob = acc.logit - acc.m - log_l if temperature > 0.0 else jnp.zeros_like(acc.l)
    return HeadSampledTokens(
        token=jnp.where(valid, acc.token, 0),
        logprob=jnp.where(valid, logprob, jnp.nan),
        entropy=jnp.where(valid, log_l - acc.moment / acc.l, jnp.nan),
    )


def head_logprobs(
    hidden: jax.Array,  # [N, D], f32 or bf16: row n predicts targets[n]
    head: jax.Array,  # [V, D], of any float dtype; under `axis_name`, this shard's rows
    targets: jax.Array,  # i32[N]
    *,
    temperature: float,
    vocab_size: int,
    axis_name: str | None = None,
    width_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute log softmax(z / temperature) at the targets, and the entropy in nats: f32[N] each.

    Differentiable in hidden and head through the log-probability; the entropy has no gradient.  The head is
    multiplied in hidden's dtype, and its gradient accumulated in f32.  A target outside the vocabulary scores
    -inf; a row with a NaN or +inf among its logits, NaN.

    axis_name: the mesh axis over which the vocabulary is sharded; differentiate the `shard_map`, not inside
      of it.
    width_axis: the mesh axis, which also shards the rows, over which the head's columns are sharded: [V, D /
      w].  They are all-gathered in hidden's dtype, and their gradients reduce-scattered over that axis.

    Raises ValueError for a temperature that is not above 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"head_logprobs: temperature is {temperature}, it must be above 0")
    return _logprobs(hidden, head, targets, temperature, vocab_size, axis_name, width_axis, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _logprobs(hidden, head, targets, temperature, vocab_size, axis_name, width_axis, implementation):
    return _forward(hidden, head, targets, temperature, vocab_size, axis_name, width_axis, implementation)[0]


def _forward(hidden, head, targets, temperature, vocab_size, axis_name, width_axis, implementation):
    own_head = head  # [V, D / w] with width_axis
    if width_axis is not None:
        head = jax.lax.all_gather(head.astype(hidden.dtype), width_axis, axis=1, tiled=True)
    acc = _stream_head(
        hidden,
        head,
        targets[:, None],
        mode="score",
        temperature=temperature,
        vocab_size=vocab_size,
        axis_name=axis_name,
        implementation=implementation,
    )
    log_l = jnp.where(acc.l > 0.0, jnp.log(acc.l), jnp.nan)
    logsumexp = acc.m + log_l
    saved = (hidden, head, own_head, targets, logsumexp)
    return (acc.logit - logsumexp, log_l - acc.moment / acc.l), saved


def _backward(temperature, vocab_size, axis_name, width_axis, implementation, saved, cotangents):
    """Compute the gradients from d logprob[n] / d z[n, v] = ((v == target) - p[n, v]) / temperature."""
    hidden, head, own_head, targets, logsumexp = saved
    slope = cotangents[0] / temperature
    if axis_name is not None:
        # Every shard returns the same log-probabilities, and its cotangent is its share of their cotangent.
        slope = jax.lax.psum(slope, axis_name)
    first, _ = _shard_bounds(head, vocab_size, axis_name)

    def add_chunk(start, size, carry):
        d_hidden, d_head = carry
        w = jax.lax.dynamic_slice_in_dim(head, start, size).astype(hidden.dtype)  # [C, D]
        p = jnp.exp(_logits(hidden, w) / temperature - logsumexp[:, None])  # f32[N, C]
        index = (first + start + jnp.arange(size))[None, :]
        d_z = slope[:, None] * ((index == targets[:, None]) - p)
        d_z = jnp.where(index < vocab_size, d_z, 0.0).astype(hidden.dtype)
        d_hidden += _matmul(d_z, w, ((1,), (0,)))
        d_w = _matmul(d_z, hidden, ((0,), (0,)))
        if width_axis is not None:
            d_w = jax.lax.psum_scatter(d_w, width_axis, scatter_dimension=1, tiled=True)
        d_w = d_w.astype(own_head.dtype)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_w, start, 0)

    carry = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(own_head)
    most_logits = LARGE_CHUNK if platform.is_pallas(implementation) else CHUNK
    d_hidden, d_head = _loop_over_chunks(head.shape[0], most_logits // len(hidden), add_chunk, carry)
    return d_hidden.astype(hidden.dtype), d_head, None


_logprobs.defvjp(_forward, _backward)


# --- the pass over the vocabulary ----------------------------------------------------------------------


def _stream_head(
    hidden: jax.Array,
    head: jax.Array,
    ids: jax.Array,  # key words u32[N, 2], or targets i32[N, 1]
    *,
    mode: str,  # "draw" | "greedy" | "score"
    temperature: float,
    vocab_size: int,
    axis_name: str | None,
    implementation: str | None,
) -> online.Accumulators:
    """Accumulate every row's logits over all shards: arrays [N]."""
    backend, interpret = platform.resolve_implementation(implementation)
    aligned = axis_name is None or head.shape[0] % gumbel.PAIR == 0
    acc = _BACKENDS[backend](
        hidden,
        head.astype(hidden.dtype),
        ids,
        _shard_bounds(head, vocab_size, axis_name),
        mode=mode,
        temperature=temperature,
        aligned=aligned,
        interpret=interpret,
    )
    acc = online.reduce_accumulators(acc, -1)
    if axis_name is None:
        return acc
    return online.reduce_accumulators(jax.lax.all_gather(acc, axis_name), 0)


def _shard_bounds(head: jax.Array, vocab_size: int, axis_name: str | None) -> jax.Array:
    """Return i32[2]: the vocabulary index of head[0], and how many entries of this shard are not padding."""
    first = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name) * head.shape[0]
    return jnp.stack([first, jnp.clip(vocab_size - first, 0, head.shape[0])])


def _tpu(*arguments: jax.Array, interpret: bool, **static: Any) -> online.Accumulators:
    from cooper_jax.kernels import head_tpu  # here: Pallas is slow to import, and the CPU does without it

    return head_tpu.stream_head(*arguments, **static, interpret=interpret)


def _triton(*arguments: jax.Array, interpret: bool, **static: Any) -> online.Accumulators:
    from cooper_jax.kernels import head_triton  # here: Pallas is slow to import, and the CPU does without it

    return head_triton.stream_head(*arguments, **static, interpret=interpret)


def _xla(
    hidden: jax.Array,
    head: jax.Array,
    ids: jax.Array,
    bounds: jax.Array,
    *,
    mode: str,
    temperature: float,
    aligned: bool,
    interpret: bool = False,
) -> online.Accumulators:
    """Accumulate a chunk of the vocabulary at a time, in plain jnp: arrays [N, 1]."""
    sampling = mode != "score"

    def add_chunk(start, size, acc):
        w = jax.lax.dynamic_slice_in_dim(head, start, size)
        column = (start + jnp.arange(size))[None, :]
        z = jnp.where(column < bounds[1], _logits(hidden, w) * (1.0 / (temperature or 1.0)), -jnp.inf)
        score = z
        if mode == "draw":
            score = z + _noise(ids, bounds[0] + start, size, aligned)
        chunk = online.accumulate_logits(
            z,
            1,
            index=bounds[0] + column,
            score=score if sampling else None,
            target=None if sampling else ids,
        )
        return online.merge_accumulators(acc, chunk)

    start = online.init_accumulators(hidden.shape[:1], sampling)
    acc = _loop_over_chunks(head.shape[0], CHUNK // len(hidden), add_chunk, start)
    return jax.tree.map(lambda x: x[:, None], acc)


_BACKENDS: dict[str, Callable[..., online.Accumulators]] = {"xla": _xla, "tpu": _tpu, "triton": _triton}


def _noise(words: jax.Array, first: jax.Array, size: int, aligned: bool) -> jax.Array:
    """Make the Gumbel noise of `size` entries from vocabulary index `first` on: f32[N, size].

    aligned: first is a multiple of gumbel.PAIR, so that one hash serves two entries.
    """
    words = words[:, :, None, None]  # [N, 2, 1, 1]
    if not aligned:
        index = (first + jnp.arange(size)).astype(jnp.uint32)
        return gumbel.gumbel_at(words[:, 0, 0], words[:, 1, 0], index[None, :])
    pairs = -(-size // gumbel.PAIR)
    count = (first >> 1) + jnp.arange(pairs * gumbel.HALF)
    count = count.astype(jnp.uint32).reshape(1, pairs, gumbel.HALF)
    noise = jnp.stack(gumbel.gumbel_pair(words[:, 0], words[:, 1], count), axis=2)  # f32[N, pairs, 2, 128]
    return noise.reshape(noise.shape[0], -1)[:, :size]


def _loop_over_chunks(
    vocabulary: int, wanted: int, add_chunk: Callable[[jax.Array | int, int, Carry], Carry], carry: Carry
) -> Carry:
    """Run add_chunk(start, size, carry) over the vocabulary in sizes of about `wanted`, the rest last."""
    size = min(max(min(wanted, MOST_ENTRIES) // gumbel.PAIR, 1) * gumbel.PAIR, vocabulary)
    whole, rest = divmod(vocabulary, size)
    carry = jax.lax.fori_loop(0, whole, lambda i, c: add_chunk(i * size, size, c), carry)
    return add_chunk(whole * size, rest, carry) if rest else carry


def _logits(hidden: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply [N, D] with [C, D] -> f32[N, C]."""
    return _matmul(hidden, w, ((1,), (1,)))


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Multiply in f32: bf16 factors as they are, f32 ones without the TPU's rounding of them to bf16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
