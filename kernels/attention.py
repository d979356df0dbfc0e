"""Causal attention over right-padded rows (training, scoring, prefill), by platform.

A query attends to all tokens up to its own, or with a window to the last `window` of them (sliding-window
attention); the implementations skip blocks of keys that no query of a block attends to.  Rows may hold several
sequences (`segments`), which do not attend to each other, and sequences may share a prefix (`prefixes`).

`implementation` is chosen when the function is traced; None selects the default of `jax.default_backend()`:

    xla                any platform: blocks of queries, each against the keys up to its own end and recomputed
                       in the backward pass.  Skips nearly half of the [S, S] scores and halves the memory
    cudnn              GPU, float16 and bfloat16, head_dim a multiple of 8 up to 128: flash attention; rows of
                       several sequences are computed by xla, since jax offers no segments for cuDNN
    splash             TPU: jax's own Pallas flash kernel, with grouped queries; it has no prefixes
    splash_interpret   splash, interpreted: for tests on the CPU

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

# The xla implementation uses at most BLOCKS blocks of at least QUERY_BLOCK queries.  They are unrolled, not
# scanned.  A scan would hold the scores of one block, where XLA:CPU now holds those of several; but all steps
# of a scan need keys of the same length, so it would also compute the upper triangle.
BLOCKS, QUERY_BLOCK = 8, 64
LANES = 128  # a TPU vector register's width; splash needs token counts in multiples of it


def default_implementation(dtype: jnp.dtype, head_dim: int, platform: str | None = None) -> str:
    """Return a platform's implementation: "xla", "cudnn" or "splash".  platform None: the default backend."""
    platform = jax.default_backend() if platform is None else platform
    if platform == "tpu":
        return "splash"

    # cuDNN's flash attention has neither a float32 version nor larger heads.
    fits_cudnn = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform in ("gpu", "cuda") and fits_cudnn else "xla"


def supports_segments(implementation: str) -> bool:
    """True if the implementation keeps the sequences of a row apart itself."""
    return implementation != "cudnn"  # which leaves such rows to xla


def supports_prefixes(platform: str) -> bool:
    """True if the platform's implementation can share prefixes.  platform: as jax.default_backend names it."""
    # splash compares one number for each token, and a prefix needs two; the others use xla for segments.
    return platform != "tpu"


def causal_attention(
    q: jax.Array,  # [N, S, H, h]
    k: jax.Array,  # [N, S, K, h]
    v: jax.Array,  # [N, S, K, h]
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    prefixes: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Compute softmax(q k^T / sqrt(h)) v with a causal mask -> [N, S, H, h].

    window: tokens that a query attends to, its own included; None: all up to its own.
    segments: i32[N, S], the sequence that each token belongs to; a query attends to tokens of its own sequence.
      None: a row is one sequence.
    prefixes: i32[N, S], a second segment of the row that each token attends to: that of its sequence's prefix,
      which comes before it.  Tokens of a prefix, and of sequences without one, repeat their own segment.

    Rows must be right-padded; outputs at padding are finite but meaningless.  Raises ValueError for an
    unknown implementation, for prefixes with splash, and for prefixes with a window, which counts columns.
    """
    name = implementation or default_implementation(q.dtype, q.shape[-1])
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {name!r} is none of {', '.join(_IMPLEMENTATIONS)}")
    # A window that covers the row hides nothing: the program is that of full attention.
    if window is not None and window >= q.shape[1]:
        window = None
    if prefixes is None:
        return _IMPLEMENTATIONS[name](q, k, v, window, segments)
    if window is not None or name.startswith("splash"):
        raise ValueError(f"shared prefixes with {name} and a window of {window}: pack whole sequences")
    return _blocked(q, k, v, None, segments, prefixes)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, segments: jax.Array | None
) -> jax.Array:
    if segments is not None:
        return _blocked(q, k, v, window, segments)
    local = None if window is None else (window - 1, 0)  # tokens on the left and on the right
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def _blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    segments: jax.Array | None,
    prefixes: jax.Array | None = None,
) -> jax.Array:
    """Run the reference on one block of queries at a time."""
    tokens = q.shape[1]
    block_size = max(QUERY_BLOCK, -(-tokens // BLOCKS))
    if tokens <= block_size:
        pair = None if segments is None else (segments, segments)
        return reference.reference_attention(q, k, v, window=window, segments=pair, prefixes=prefixes)

    outputs = []
    for first in range(0, tokens, block_size):
        end = min(first + block_size, tokens)
        # No query of the block sees a key behind `end`, or before the first query's window.
        first_key = 0 if window is None else max(0, first - window + 1)
        # The backward pass recomputes the block's scores instead of keeping them.
        attend = jax.checkpoint(
            functools.partial(reference.reference_attention, first=first, window=window, first_key=first_key)
        )
        pair = None if segments is None else (segments[:, first:end], segments[:, first_key:end])
        second = None if prefixes is None else prefixes[:, first:end]
        keys, values = k[:, first_key:end], v[:, first_key:end]
        outputs.append(attend(q[:, first:end], keys, values, segments=pair, prefixes=second))
    return jnp.concatenate(outputs, axis=1)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    segments: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Run jax's splash attention.  Rows are right-padded to whole lanes, which the causal mask hides."""
    # Imported here because it imports Pallas, which is slow and of no use on other platforms.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # Splash wants heads before tokens, and does not scale the scores itself.
    _, tokens, heads, h = q.shape
    padded = -(-tokens // LANES) * LANES
    padding = ((0, 0), (0, 0), (0, padded - tokens), (0, 0))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), padding) for x in (q * h**-0.5, k, v))  # [N, heads, S', h]

    # One block size for the forward pass and for the fused backward pass: the largest that divides S'.
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
    # The kernel skips blocks that the mask hides whole.
    mask: splash.CausalMask | splash.LocalMask = splash.CausalMask((padded, padded))
    if window is not None:
        mask = splash.LocalMask((padded, padded), window_size=(window - 1, 0), offset=0)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The kernel takes one row.
    if segments is None:
        return jax.vmap(kernel)(q, k, v)[:, :, :tokens].swapaxes(1, 2)
    ids = jnp.pad(segments, padding[0:1] + padding[2:3])
    attend = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))
    return attend(q, k, v, ids)[:, :, :tokens].swapaxes(1, 2)


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _blocked,
    "cudnn": _cudnn,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),
}
