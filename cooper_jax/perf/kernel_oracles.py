"""Expected results of the kernels in float64, and the errors of a form beside them (kernel_checks.py).

Each `prepare_*` draws the inputs of an operation, computes what is expected on the host, and returns a function
that measures any form of the operation.  The oracles share no code with the kernels: NumPy in float64, on the
values that the kernel was given, rounded to its type.  The noise of the fused head alone is taken from
kernels/gumbel.py, in plain jnp.

N rows   B prompts   V vocabulary   D width   H query heads   K key/value heads   h head_dim
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.kernels import attention, decode_attention, gumbel, head, kv, platform, sampling
from cooper_jax.kernels.matmul import matmul_plain
from cooper_jax.kernels.schedule import make_schedule

# A draw may differ from the oracle's only where two candidates are this close.
DEAD_HEAT = 1e-3
REPEATS = 5  # timed calls; the best counts


@dataclasses.dataclass(frozen=True)
class KernelSize:
    """Sizes of the inputs: those of Qwen2.5-0.5B on a device, small ones where kernels are interpreted."""

    samples: int  # rows of a prompt
    prompts: int
    columns: int  # of a prompt's cache, and of a row's own
    group: int  # query heads of a key/value head
    vocabulary: int
    padding: int  # vocabulary entries that are never drawn
    gradient_vocabulary: int  # of the head's gradient
    width: int
    tokens: int  # of a row in causal attention
    dtype: str  # of the head and of causal attention
    all_variants: bool  # False: leave out those that others include


FULL = KernelSize(8, 4, 256, 7, 151_936, 128, 8_192, 896, 512, "bfloat16", all_variants=True)
SMALL = KernelSize(2, 2, 128, 2, 1_000, 3, 512, 32, 96, "bfloat16", all_variants=False)
KV_HEADS, HEAD_DIM, LAYERS, LAYER = 2, 64, 2, 1


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A form's error and time."""

    error: float  # NaN counts as wrong
    seconds: float | None = None  # of one call; None: not timed


# Measures a form of an operation, by the form's name.
Measure = Callable[[str], Measurement]


def _time_call(call: Callable[[], Any], form: str) -> float | None:
    """Seconds of the best of REPEATS calls; None for an interpreted kernel, whose time says nothing."""
    if form.endswith("interpret"):
        return None
    trials = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        trials.append(time.perf_counter() - start)
    return min(trials)


def _measure(run: Callable[[], Any], form: str, find_error: Callable[[Any], float]) -> Measurement:
    """Run a jitted call once for its error, and again for its time."""
    out = jax.device_get(run())
    return Measurement(float(find_error(out)), _time_call(run, form))


def _max_error(got: Any, expected: np.ndarray) -> float:
    """The largest absolute difference; NaN if there is one."""
    return float(np.max(np.abs(np.asarray(got, np.float64) - expected)))


def _relative_error(got: Any, expected: np.ndarray) -> float:
    """The norm of the difference, relative to the expected norm."""
    return float(np.linalg.norm(_to_float64(got) - expected) / np.linalg.norm(expected))


def _largest_relative_error(got: Sequence[Any], expected: Sequence[np.ndarray]) -> float:
    # np.max passes a NaN on, which the builtin may not.
    return float(np.max([_relative_error(a, b) for a, b in zip(got, expected, strict=True)]))


def _to_float64(x: Any) -> np.ndarray:
    """Convert an array, of bfloat16 as well, to float64."""
    return np.asarray(x, np.float32).astype(np.float64)


def _softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# --- decode attention ----------------------------------------------------------------------------------------


# Type of the cache, and whether there are windows; the first two include the third.
DECODE_VARIANTS = (
    ("bfloat16 with windows", "bfloat16", True),
    ("int8", "int8", False),
    ("bfloat16", "bfloat16", False),
)


def prepare_decode_attention(size: KernelSize, dtype: str, window: bool, seed: int) -> Measure:
    """Rows of several prompts of uneven lengths, whose own columns begin at different places."""
    rng = np.random.default_rng(seed)
    rows, heads = size.prompts * size.samples, KV_HEADS * size.group

    # The last row reads no prompt, and no column of its own; rows are in no order.
    prompt_of = rng.permutation(np.repeat(np.arange(size.prompts), size.samples)).astype(np.int32)
    lengths = rng.integers(1, size.columns + 1, size.prompts).astype(np.int32)
    last = size.columns - 3
    first = rng.integers(0, last + 1, rows).astype(np.int32)
    prompt_of[-1], first[-1] = -1, last + 1
    prompt_first = None
    if window:
        prompt_first = rng.integers(0, size.columns, rows).astype(np.int32)

    def draw(n: int) -> tuple[jax.Array, jax.Array]:
        shape = LAYERS, n, KV_HEADS, size.columns, HEAD_DIM
        keys, values = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
        return keys, values

    parts = draw(size.prompts), draw(rows)
    q = jnp.asarray(rng.standard_normal((rows, heads, HEAD_DIM), np.float32), jnp.bfloat16)

    def measure(form: str) -> Measurement:
        cache_format = kv.Format(dtype, platform.is_pallas(form))
        caches = [kv.pack_kv(*part, cache_format) for part in parts]

        @jax.jit
        def run(q, caches, prompt_of, lengths, first, last, prompt_first):
            schedule = make_schedule(prompt_of, lengths)
            layer = jnp.int32(LAYER)
            prompt, suffix = caches
            return decode_attention.decode_attention(
                q, prompt, suffix, schedule, first, last, layer, prompt_first, implementation=form
            )

        arguments = (q, caches, prompt_of, lengths, first, jnp.int32(last), prompt_first)
        stored = [[np.asarray(x[LAYER], np.float64) for x in kv.unpack_kv(c, jnp.float32)] for c in caches]
        expected = _decode_oracle(
            np.asarray(q, np.float64), stored, prompt_of, lengths, first, last, prompt_first
        )
        return _measure(lambda: run(*arguments), form, lambda out: _max_error(out, expected))

    return measure


def _decode_oracle(
    q: np.ndarray,  # [N, H, h]
    stored: list[list[np.ndarray]],  # prompt and suffix: k and v [.., K, W, h]
    prompt_of: np.ndarray,
    lengths: np.ndarray,
    first: np.ndarray,
    last: int,
    prompt_first: np.ndarray | None,
) -> np.ndarray:
    """Attend one row at a time: f64[N, H, h]."""
    out = np.zeros(q.shape)
    (prompt_k, prompt_v), (own_k, own_v) = stored
    for n in range(len(q)):
        own = slice(first[n], last + 1)
        k, v = own_k[n, :, own], own_v[n, :, own]  # [K, keys, h]
        if prompt_of[n] >= 0:
            begin = 0 if prompt_first is None else prompt_first[n]
            shared = slice(begin, max(begin, lengths[prompt_of[n]]))
            k = np.concatenate([prompt_k[prompt_of[n], :, shared], k], axis=1)
            v = np.concatenate([prompt_v[prompt_of[n], :, shared], v], axis=1)
        if not k.shape[1]:
            continue
        queries = q[n].reshape(KV_HEADS, -1, HEAD_DIM)
        p = _softmax(queries @ k.swapaxes(1, 2) / np.sqrt(HEAD_DIM))
        out[n] = (p @ v).reshape(q.shape[1:])
    return out


# --- sampling ------------------------------------------------------------------------------------------------

SAMPLING_MODES: dict[str, dict[str, Any]] = {
    "all tokens": dict(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0),
    "top-k, top-p, min-p": dict(temperature=1.1, top_k=40, top_p=0.95, min_p=0.02),
}


def prepare_sampling(size: KernelSize, options: dict[str, Any], seed: int) -> Measure:
    """Log-probabilities and entropy against sorted float64 distributions; tokens against the plain form's."""
    rng = np.random.default_rng(seed)
    rows = size.prompts * size.samples
    logits = rng.normal(0, 2, (rows, size.vocabulary)).astype(np.float32)
    logits[:, size.vocabulary - size.padding :] = -np.inf
    uniforms = rng.uniform(0, 1 - 2.0**-23, (rows, sampling.LEVELS)).astype(np.float32)
    full = _softmax(logits.astype(np.float64) / options["temperature"])
    kept = np.stack([_filter(row, logit, options) for row, logit in zip(full, logits, strict=True)])

    # Tokens of rows whose draw was close are not compared.
    @jax.jit
    def choose_plainly(logits, uniforms):
        plain = sampling.sample_logits(logits, uniforms, **options, implementation="xla").token
        return plain, sampling.sampling_margin(logits, uniforms, **options)

    def measure(form: str) -> Measurement:
        run = jax.jit(functools.partial(sampling.sample_logits, **options, entropy=True, implementation=form))
        plain, margin = choose_plainly(logits, uniforms)

        def find_error(out: sampling.SampledTokens) -> float:
            at = np.arange(rows)
            with np.errstate(divide="ignore", invalid="ignore"):
                errors = [
                    _max_error(out.logprob, np.log(kept[at, out.token])),
                    _max_error(out.full_logprob, np.log(full[at, out.token])),
                    _max_error(
                        out.entropy, -np.nansum(np.where(full > 0, full * np.log(full), 0.0), axis=-1)
                    ),
                ]
            is_clear = np.asarray(margin) > DEAD_HEAT
            other_token = np.asarray(out.token) != np.asarray(plain)
            return float(np.max([*errors, float(np.any(is_clear & other_token))]))

        return _measure(lambda: run(logits, uniforms), form, find_error)

    return measure


def _filter(p: np.ndarray, logits: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Filter a distribution f64[V] by top-k, then top-p, then min-p, by sorting."""
    p = p.copy()
    order = np.argsort(-logits, kind="stable")
    if options["top_k"]:
        p[logits < logits[order[options["top_k"] - 1]]] = 0.0
        p /= p.sum()
    if options["top_p"] < 1:
        before = np.cumsum(p[order]) - p[order]
        p[logits < logits[order[before < options["top_p"]]].min()] = 0.0
    p[p < options["min_p"] * p.max()] = 0.0
    return p / p.sum()


# --- the head ------------------------------------------------------------------------------------------------


def _draw_head(size: KernelSize, vocabulary: int, seed: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Hidden states [N, D], a head [V, D] and their logits f64[N, V], of which the last `padding` are none."""
    rng = np.random.default_rng(seed)
    rows = size.prompts * size.samples
    hidden = jnp.asarray(rng.standard_normal((rows, size.width), np.float32), size.dtype)
    weights = rng.standard_normal((vocabulary, size.width), np.float32) * 2 * size.width**-0.5
    table = jnp.asarray(weights, size.dtype)
    # Products of bfloat16 numbers are exact in float32, and a sum of D of them nearly so.
    logits = _to_float64(hidden) @ np.asarray(table, np.float32).T
    return hidden, table, logits[:, : vocabulary - size.padding]


def prepare_head_sample(size: KernelSize, seed: int) -> Measure:
    """The token that wins the race of float64 logits with the kernel's own noise, and its log-probability."""
    hidden, table, logits = _draw_head(size, size.vocabulary, seed)
    rows, real = logits.shape
    rng = np.random.default_rng(seed + 1)
    words = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    index = jnp.arange(real, dtype=jnp.uint32)[None, :]
    noise = np.asarray(jax.jit(gumbel.gumbel_at)(words[:, :1], words[:, 1:], index), np.float64)
    p = _softmax(logits)
    entropy = -np.sum(p * np.log(p), axis=-1)
    race = logits + noise

    def measure(form: str) -> Measurement:
        run = jax.jit(
            functools.partial(head.head_sample, temperature=1.0, vocab_size=real, implementation=form)
        )

        def find_error(out: head.HeadSampledTokens) -> float:
            at, token = np.arange(rows), np.asarray(out.token)
            if not np.all((token >= 0) & (token < real)):
                return float("inf")
            lost = race.max(-1) - race[at, token]
            errors = [
                _max_error(out.logprob, np.log(p[at, token])),
                _max_error(out.entropy, entropy),
                float(np.any(lost > DEAD_HEAT)),
            ]
            return float(np.max(errors))

        return _measure(lambda: run(hidden, table, words), form, find_error)

    return measure


def prepare_head_logprobs(size: KernelSize, seed: int) -> Measure:
    """Log-probabilities of targets, the entropy, and the gradients of the former."""
    hidden, table, logits = _draw_head(size, size.gradient_vocabulary, seed)
    rows, real = logits.shape
    rng = np.random.default_rng(seed + 1)
    targets = jnp.asarray(rng.integers(0, real, rows), jnp.int32)
    slopes = rng.standard_normal((rows,), np.float32)
    at = np.arange(rows)
    p = _softmax(logits)

    # d sum(slope * logprob) / d z = slope * (onehot - p)
    d_logits = np.negative(p * slopes[:, None])
    d_logits[at, targets] += slopes
    d_hidden = d_logits @ _to_float64(table)[:real]
    d_table = np.zeros((size.gradient_vocabulary, size.width))
    d_table[:real] = d_logits.T @ _to_float64(hidden)

    def measure(form: str) -> Measurement:
        @jax.jit
        def run(hidden, table):
            def loss(hidden, table):
                logprobs, entropy = head.head_logprobs(
                    hidden, table, targets, temperature=1.0, vocab_size=real, implementation=form
                )
                return jnp.sum(logprobs * slopes), (logprobs, entropy)

            gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, table)
            return *out, *gradients

        def find_error(out: Any) -> float:
            errors = [
                _max_error(out[0], np.log(p[at, targets])),
                _max_error(out[1], -np.sum(p * np.log(p), axis=-1)),
                _relative_error(out[2], d_hidden),
                _relative_error(out[3], d_table),
            ]
            return float(np.max(errors))

        return _measure(lambda: run(hidden, table), form, find_error)

    return measure


# --- causal attention and products ---------------------------------------------------------------------------


def prepare_causal_attention(size: KernelSize, variant: str, seed: int) -> Measure:
    """Attention of training and prefill with its gradients: full, with a window, or over packed rows."""
    rng = np.random.default_rng(seed)
    rows, tokens, heads = 2, size.tokens, KV_HEADS * size.group
    shapes = (rows, tokens, heads, HEAD_DIM), *[(rows, tokens, KV_HEADS, HEAD_DIM)] * 2
    q, k, v = (jnp.asarray(rng.standard_normal(s, np.float32), size.dtype) for s in shapes)
    slopes = jnp.asarray(rng.standard_normal(shapes[0], np.float32), size.dtype)
    window = tokens // 3 if variant == "window" else None
    segments = None
    if variant == "packed":
        # Three sequences of uneven lengths in each row.
        ends = jnp.asarray([tokens // 2, tokens // 2 + tokens // 3])
        segments = jnp.broadcast_to(jnp.searchsorted(ends, jnp.arange(tokens), side="right"), (rows, tokens))
    exact_q, exact_k, exact_v, exact_slopes = (_to_float64(x) for x in (q, k, v, slopes))
    numbers = None if segments is None else np.asarray(segments)
    expected = _causal_oracle(exact_q, exact_k, exact_v, exact_slopes, window, numbers)

    def measure(form: str) -> Measurement:
        @jax.jit
        def run(q, k, v):
            def loss(q, k, v):
                out = attention.causal_attention(
                    q, k, v, window=window, segments=segments, implementation=form
                )
                return jnp.sum(out.astype(jnp.float32) * slopes), out

            gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return out, *gradients

        def find_error(out: Any) -> float:
            return _largest_relative_error(out, expected)

        return _measure(lambda: run(q, k, v), form, find_error)

    return measure


def _causal_oracle(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    slopes: np.ndarray,
    window: int | None,
    segments: np.ndarray | None,
) -> tuple[np.ndarray, ...]:
    """Attention and its gradients (d q, d k, d v) under the cotangent `slopes`, in float64."""
    tokens, heads, h = q.shape[1:]
    kv_heads = k.shape[2]
    q, slopes = (
        x.reshape(len(x), tokens, kv_heads, heads // kv_heads, h).transpose(0, 2, 3, 1, 4)
        for x in (q, slopes)
    )  # [N, K, g, S, h]
    k, v = (x.transpose(0, 2, 1, 3)[:, :, None] for x in (k, v))  # [N, K, 1, S, h]

    query, key = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    mask = mask[None, None, None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])[:, None, None]

    p = _softmax(np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(h), -np.inf))
    out = p @ v
    # d z = p (d p - sum p d p)
    d_p = slopes @ v.swapaxes(-1, -2)
    d_z = p * (d_p - np.sum(p * d_p, axis=-1, keepdims=True)) / np.sqrt(h)
    d_q = d_z @ k
    d_k = np.sum(d_z.swapaxes(-1, -2) @ q, axis=2)
    d_v = np.sum(p.swapaxes(-1, -2) @ slopes, axis=2)

    def by_token(x: np.ndarray) -> np.ndarray:  # [N, K, g, S, h] -> [N, S, H, h]
        return x.transpose(0, 3, 1, 2, 4).reshape(len(x), tokens, heads, h)

    return by_token(out), by_token(d_q), d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def prepare_matmul(size: KernelSize, seed: int) -> Measure:
    """The training step's matrix product with its gradients."""
    rng = np.random.default_rng(seed)
    rows, width, ffn = 4 * size.tokens, size.width, 2 * size.width
    shapes = (rows, width), (width, ffn), (rows, ffn)
    x, w, slopes = (jnp.asarray(rng.standard_normal(s, np.float32), size.dtype) for s in shapes)
    exact_x, exact_w, exact_slopes = (_to_float64(a) for a in (x, w, slopes))
    expected = exact_x @ exact_w, exact_slopes @ exact_w.T, exact_x.T @ exact_slopes

    def measure(form: str) -> Measurement:
        @jax.jit
        def run(x, w):
            out, pull_back = jax.vjp(matmul_plain, x, w)
            return out, *pull_back(slopes)

        def find_error(out: Any) -> float:
            return _largest_relative_error(out, expected)

        return _measure(lambda: run(x, w), form, find_error)

    return measure
