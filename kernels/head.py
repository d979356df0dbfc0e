"""Output head fused with sampling or scoring: the head is read in pieces, and the logits are never written.

    head_sample      hidden, head, key words -> a token per row, its log-probability, the entropy
    head_logprobs    hidden, head, targets   -> log-probabilities of the targets, with a gradient; the entropy

1. A backend passes over the head in pieces: `_xla` in this file (chunks of the vocabulary, any platform),
   head_tpu.py (Mosaic) or head_triton.py (CUDA GPUs).  Each keeps `online.Accumulators` instead of logits.
2. `online.reduce_accumulators` merges lanes, splits and, under `shard_map`, shards of the vocabulary.
3. Tokens are sampled by the Gumbel-max trick: argmax z / T + g, with g a function of (key words, vocabulary
   index) alone.  So a token does not depend on tiles, shards or the batch, except through the rounding of z.
4. The gradient of `head_logprobs` recomputes the logits of one chunk of the vocabulary at a time, in plain
   XLA.  One matmul in f32 sums each entry's gradient over all rows, and it is written once.

N rows   D width   V vocabulary entries (of this shard, under `shard_map`)   C entries of a chunk
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cooper_jax.kernels import gumbel, online, platform

# Logits that exist at one time.  CHUNK of them fit into the cache of a CPU core.  Accelerators use
# LARGE_CHUNK: they read and write d_hidden [N, D] once per chunk, which costs less with fewer chunks.
CHUNK, LARGE_CHUNK = 2**19, 2**25
# Upper bound on a chunk's vocabulary entries: the chunk's part of d_head exists in f32.
MOST_ENTRIES = 2**13
Carry = TypeVar("Carry")


class HeadSampledTokens(NamedTuple):
    """One sampled token per row, with natural logarithms.

    A row with a NaN or +inf among its logits, or with only -inf, gives token 0, logprob NaN and entropy NaN.
    """

    token: jax.Array  # i32[N]
    logprob: jax.Array  # f32[N], under softmax(z / temperature); greedy: 0
    entropy: jax.Array  # f32[N], of softmax(z / temperature); greedy: of softmax(z)


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
    """Sample a token per row from softmax(z / temperature), z = hidden head^T in f32.

    temperature: static; 0 is greedy, and takes the first of the largest logits.
    vocab_size: static.  Entries from vocab_size on, counted over all shards, are padding of probability 0.
    axis_name: the mesh axis over which the vocabulary is sharded, in equal parts.

    Raises ValueError for a temperature below 0.
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

    # l is NaN or 0 in a row without a distribution (online.py), and so not above 0.
    valid = acc.l > 0.0
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
    spans_mesh: bool = False,
    thresholds: jax.Array | None = None,  # f32[N]
    implementation: str | None = None,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Compute log softmax(z / temperature) at the targets, and the entropy in nats: f32[N] each.

    thresholds: the softmax is over the entries with z >= threshold, and the target; None: over all.  The passes
      over the head are then in plain XLA.  No gradient goes through the choice of entries.

    Differentiable in hidden and head through the log-probability, and with `entropy_gradient` through the entropy
    as well.  The head is multiplied in hidden's dtype, and its gradient is accumulated in f32.  A target outside
    the vocabulary gives -inf.  A row with a NaN or +inf among its logits gives NaN.

    axis_name: the mesh axis over which the vocabulary is sharded.  Differentiate the `shard_map`, not the
      function inside it.
    width_axis: the mesh axis over which the head's columns are sharded, [V, D / w]; it also shards the rows.
      The columns are all-gathered in hidden's dtype, and their gradients reduce-scattered over that axis.
    spans_mesh: the mesh has no other axis of more than one device.

    Raises ValueError for a temperature that is not above 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"head_logprobs: temperature is {temperature}, it must be above 0")
    static = _Static(
        temperature, vocab_size, axis_name, width_axis, spans_mesh, implementation, entropy_gradient
    )
    return _logprobs(hidden, head, targets, thresholds, static)


class _Static(NamedTuple):
    """The arguments of `head_logprobs` that are no arrays."""

    temperature: float
    vocab_size: int
    axis_name: str | None
    width_axis: str | None
    spans_mesh: bool
    implementation: str | None
    entropy_gradient: bool

    @property
    def by_column(self) -> bool:
        """True if the gathered head is [D, V], each device's columns behind the other's.

        XLA:TPU gathers [V, D / w] in this order, too, and would copy the result for a kernel that reads [V, D].
        """
        return (
            self.width_axis is not None
            and platform.resolve_implementation(self.implementation).backend == "tpu"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs(hidden, head, targets, thresholds, static):
    return _forward(hidden, head, targets, thresholds, static)[0]


def _forward(hidden, head, targets, thresholds, static):
    """Compute the log-probabilities and the entropy, and what the backward pass needs."""
    own_head = head  # [V, D / w] with width_axis
    if static.by_column:
        head = jax.lax.all_gather(head.astype(hidden.dtype).T, static.width_axis, axis=0, tiled=True)
    elif static.width_axis is not None:
        head = jax.lax.all_gather(head.astype(hidden.dtype), static.width_axis, axis=1, tiled=True)
    acc = _stream_head(
        hidden,
        head,
        targets[:, None],
        mode="score",
        temperature=static.temperature,
        vocab_size=static.vocab_size,
        axis_name=static.axis_name,
        implementation=static.implementation,
        thresholds=thresholds,
        by_column=static.by_column,
    )
    log_l = jnp.where(acc.l > 0.0, jnp.log(acc.l), jnp.nan)
    logsumexp, entropy = acc.m + log_l, log_l - acc.moment / acc.l

    # Nothing of size [N, V] is saved: p = exp(z - logsumexp) is recomputed.
    saved = (hidden, head, own_head, targets, thresholds, logsumexp, entropy)
    return (acc.logit - logsumexp, entropy), saved


def _backward(static, saved, cotangents):
    """Compute the gradients, with u = z / temperature and log p = u - logsumexp, from

    d logprob[n] / d u[n, v] = (v == target) - p[n, v]
    d entropy[n] / d u[n, v] = -p[n, v] (log p[n, v] + entropy[n])
    """
    hidden, head, own_head, targets, thresholds, logsumexp, entropy = saved
    temperature, axis_name, width_axis = static.temperature, static.axis_name, static.width_axis
    slope, entropy_slope = (cotangent / temperature for cotangent in cotangents)
    if axis_name is not None:
        # All shards return the same log-probabilities, whose cotangent is the sum of the shards' cotangents.
        slope, entropy_slope = jax.lax.psum((slope, entropy_slope), axis_name)
    by_column = static.by_column
    entries = head.shape[1 if by_column else 0]
    first, _ = _shard_bounds(entries, static.vocab_size, axis_name)

    def add_chunk(start, size, carry):
        """Add the part of both gradients that comes from entries `start` to start + size - 1."""
        d_hidden, d_head = carry
        w = _take_entries(head, start, size, by_column).astype(hidden.dtype)

        # d_z f32[N, C]: 0 at padding, whose logits are not part of the softmax.
        z = _logits(hidden, w, by_column)
        log_p = z / temperature - logsumexp[:, None]  # f32[N, C]
        index = (first + start + jnp.arange(size))[None, :]
        p = jnp.exp(log_p)
        if thresholds is not None:
            p = jnp.where(_is_kept(z, index, thresholds, targets[:, None]), p, 0.0)
        d_z = slope[:, None] * ((index == targets[:, None]) - p)
        if static.entropy_gradient:
            d_z -= entropy_slope[:, None] * p * (log_p + entropy[:, None])
        d_z = jnp.where(index < static.vocab_size, d_z, 0.0).astype(hidden.dtype)

        # No other chunk has these rows of d_head, so they are written once; d_hidden sums over all chunks.
        d_hidden += _matmul(d_z, w, ((1,), (1 if by_column else 0,)))
        d_w = _matmul(d_z, hidden, ((0,), (0,)))
        if width_axis is not None:
            d_w = _scatter_columns(d_w, static)
        d_w = d_w.astype(own_head.dtype)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_w, start, 0)

    carry = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(own_head)
    most_logits = LARGE_CHUNK if platform.is_pallas(static.implementation) else CHUNK
    d_hidden, d_head = _loop_over_chunks(entries, most_logits // len(hidden), add_chunk, carry)
    return d_hidden.astype(hidden.dtype), d_head, None, None


_logprobs.defvjp(_forward, _backward)


def _scatter_columns(x: jax.Array, static: _Static) -> jax.Array:
    """Sum x [C, D] over the devices of `width_axis`, each of which keeps its own columns -> [C, D / w].

    Over all chips of a slice XLA:TPU would sum whole arrays and slice them afterwards, which sends twice as much.
    Over every second chip, and then over pairs of neighbours, it scatters.
    """
    axis = static.width_axis
    assert axis is not None
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, scatter_dimension=1, tiled=True)
    size = jax.lax.axis_size(axis)
    on_tpu = platform.resolve_implementation(static.implementation).backend == "tpu"
    if not (static.spans_mesh and on_tpu and size >= 4 and size % 2 == 0):
        return scatter(x)

    every_second = [list(range(first, size, 2)) for first in range(2)]
    neighbours = [[i, i + 1] for i in range(0, size, 2)]
    return scatter(scatter(x, axis_index_groups=every_second), axis_index_groups=neighbours)


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
    thresholds: jax.Array | None = None,
    by_column: bool = False,
) -> online.Accumulators:
    """Accumulate every row's logits over all shards: arrays [N].

    thresholds: see `head_logprobs`.  by_column: the head is [D, V]; the backends tpu and xla take it.
    """
    backend, interpret = platform.resolve_implementation(implementation)
    options: dict[str, Any] = {"by_column": True} if by_column else {}
    if thresholds is not None:
        backend, options = "xla", options | {"thresholds": thresholds}

    # Without whole pairs in a shard, a hash would serve entries of two shards: each entry gets its own hash.
    entries = head.shape[1 if by_column else 0]
    aligned = axis_name is None or entries % gumbel.PAIR == 0
    acc = _BACKENDS[backend](
        hidden,
        head.astype(hidden.dtype),
        ids,
        _shard_bounds(entries, vocab_size, axis_name),
        mode=mode,
        temperature=temperature,
        aligned=aligned,
        interpret=interpret,
        **options,
    )

    # First the lanes or splits of a backend, then the shards: all-gathered, a few numbers per row.
    acc = online.reduce_accumulators(acc, -1)
    if axis_name is None:
        return acc
    return online.reduce_accumulators(jax.lax.all_gather(acc, axis_name), 0)


def _shard_bounds(entries: int, vocab_size: int, axis_name: str | None) -> jax.Array:
    """Return i32[2]: the vocabulary index of the shard's first entry, and how many entries are not padding."""
    first = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name) * entries
    return jnp.stack([first, jnp.clip(vocab_size - first, 0, entries)])


# The kernels are imported when they are called: Pallas is slow to import, and the CPU does not need it.
def _tpu(*arguments: jax.Array, interpret: bool, **static: Any) -> online.Accumulators:
    from cooper_jax.kernels import head_tpu

    return head_tpu.stream_head(*arguments, **static, interpret=interpret)


def _triton(*arguments: jax.Array, interpret: bool, **static: Any) -> online.Accumulators:
    from cooper_jax.kernels import head_triton

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
    thresholds: jax.Array | None = None,
    by_column: bool = False,
) -> online.Accumulators:
    """Accumulate one chunk of the vocabulary at a time, in plain jnp: arrays [N, 1]."""
    sampling = mode != "score"

    def add_chunk(start, size, acc):
        """Accumulate the logits of this shard's entries `start` to start + size - 1."""
        w = _take_entries(head, start, size, by_column)
        column = (start + jnp.arange(size))[None, :]
        logits = _logits(hidden, w, by_column)
        included = column < bounds[1]
        if thresholds is not None:
            included &= _is_kept(logits, bounds[0] + column, thresholds, ids)
        z = jnp.where(included, logits * (1.0 / (temperature or 1.0)), -jnp.inf)

        # Greedy decoding takes the argmax of the logits themselves.
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
    entries = head.shape[1 if by_column else 0]
    acc = _loop_over_chunks(entries, CHUNK // len(hidden), add_chunk, start)
    return jax.tree.map(lambda x: x[:, None], acc)


_BACKENDS: dict[str, Callable[..., online.Accumulators]] = {"xla": _xla, "tpu": _tpu, "triton": _triton}


def _is_kept(z: jax.Array, index: jax.Array, thresholds: jax.Array, targets: jax.Array) -> jax.Array:
    """True for the entries of the softmax under `thresholds` f32[N]: bool[N, C].

    The target i32[N, 1] is one of them whatever its logit: the sampler, which drew it, may have rounded otherwise.
    """
    return (z >= thresholds[:, None]) | (index == targets)


def _noise(words: jax.Array, first: jax.Array, size: int, aligned: bool) -> jax.Array:
    """Make the Gumbel noise of `size` entries, the first at vocabulary index `first`: f32[N, size].

    aligned: first is a multiple of gumbel.PAIR, so that one hash serves two entries.
    """
    words = words[:, :, None, None]  # [N, 2, 1, 1]
    if not aligned:
        index = (first + jnp.arange(size)).astype(jnp.uint32)
        return gumbel.gumbel_at(words[:, 0, 0], words[:, 1, 0], index[None, :])

    # Whole pairs, of which the entries past `size` are dropped.
    pairs = -(-size // gumbel.PAIR)
    count = (first >> 1) + jnp.arange(pairs * gumbel.HALF)
    count = count.astype(jnp.uint32).reshape(1, pairs, gumbel.HALF)
    noise = jnp.stack(gumbel.gumbel_pair(words[:, 0], words[:, 1], count), axis=2)  # f32[N, pairs, 2, 128]
    return noise.reshape(noise.shape[0], -1)[:, :size]


def choose_chunk(vocabulary: int, target_size: int) -> int:
    """Choose the entries of a chunk: about `target_size`, whole pairs, so that aligned chunks begin at a pair."""
    return min(max(min(target_size, MOST_ENTRIES) // gumbel.PAIR, 1) * gumbel.PAIR, vocabulary)


def _loop_over_chunks(
    vocabulary: int, target_size: int, add_chunk: Callable[[jax.Array | int, int, Carry], Carry], carry: Carry
) -> Carry:
    """Run carry = add_chunk(start, size, carry) over the vocabulary in chunks of about `target_size`."""
    size = choose_chunk(vocabulary, target_size)

    # A loop over the chunks of full size, then one smaller chunk, whose size is static too.
    whole, rest = divmod(vocabulary, size)
    carry = jax.lax.fori_loop(0, whole, lambda i, c: add_chunk(i * size, size, c), carry)
    return add_chunk(whole * size, rest, carry) if rest else carry


def _take_entries(head: jax.Array, start: jax.Array | int, size: int, by_column: bool) -> jax.Array:
    """Take a chunk of the head: [C, D] of [V, D], or by column [D, C] of [D, V]."""
    return jax.lax.dynamic_slice_in_dim(head, start, size, axis=1 if by_column else 0)


def _logits(hidden: jax.Array, w: jax.Array, by_column: bool) -> jax.Array:
    """Multiply [N, D] with [C, D], or by column with [D, C] -> f32[N, C]."""
    return _matmul(hidden, w, ((1,), (0 if by_column else 1,)))


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Multiply, accumulating in f32.  HIGHEST keeps a TPU from rounding f32 factors to bf16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
