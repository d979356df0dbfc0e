"""Sampling settings, the random bits of each token, and sampling from logits.

1. `make_row_keys` gives every (prompt, sample) a key, from the prompt's position in the data order and the
   sample's index.
2. `draw_uniforms` folds in the token's position in the response.
3. `sample_tokens` passes logits and uniforms to the kernel.  Kernels that make their own noise take
   `make_key_words` instead.

So a token's random bits are a function of (seed, step, prompt, sample, position) alone; seed and step are in
the caller's key.  They do not depend on the row's batch, its padding or the number of devices.

B prompts   G samples per prompt   N = B * G rows, prompt-major   V vocabulary
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.kernels import kv, platform
from cooper_jax.kernels import sampling as kernel


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """Sampling settings; hashable, so static in jit.  Raises ValueError for values out of range."""

    # The distribution; `min_p` below belongs to it too.
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    # The responses.
    max_new_tokens: int  # T, EOS included
    group_size: int  # G
    eos_ids: tuple[int, ...]  # any of these ends a response
    # The engine.
    segment: int  # upper bound on the tokens decoded between two reads of the status by the host
    dtype: str  # float32 | bfloat16, of the weights and activations
    # Fields with defaults.
    min_p: float = 0.0  # 0: off
    kv_dtype: str = ""  # float32 | bfloat16 | int8, of the cache; "": as dtype

    def __post_init__(self):
        # RolloutConfig checks a config's values; these checks are for specs that are made without one.
        for name in ("max_new_tokens", "group_size", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling: {name} is {getattr(self, name)}, it must be at least 1")
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"sampling: temperature is {self.temperature}, it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"sampling: top_k is {self.top_k}, it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p is {self.top_p}, it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(
                f"sampling: min_p is {self.min_p}, it must be 0 (off) to 1 (the most likely token alone)"
            )

        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"sampling: dtype is {self.dtype!r}, it must be float32 or bfloat16")
        if self.kv_dtype not in ("", *kv.DTYPES):
            raise ValueError(
                f"sampling: kv_dtype is {self.kv_dtype!r}, it must be {', '.join(kv.DTYPES)} "
                "or empty (as dtype)"
            )

    @property
    def full_softmax(self) -> bool:
        """True if nothing filters the softmax (no top-k, top-p or min-p), or sampling is greedy."""
        return self.temperature == 0 or (self.top_k == 0 and self.top_p == 1 and self.min_p == 0)

    def cache_format(self, implementation: str) -> kv.Format:
        """Return the KV cache format for a kernel implementation."""
        return kv.Format(dtype=self.kv_dtype or self.dtype, packed=platform.is_pallas(implementation))


def make_row_keys(
    key: jax.Array, prompt_positions: jax.Array, group_size: int, samples: jax.Array | None = None
) -> jax.Array:
    """Make the rows' keys key[N] from the prompts' positions in the data order, i32[B].

    samples: i32[N], the index of each row among the samples of its prompt; None: 0 .. group_size - 1.

    Raises ValueError for a key of another generator than threefry.
    """
    # Other generators may give other bits under vmap, and so make them depend on the batch.
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or jax.random.key_impl(key) != "threefry2x32":
        raise ValueError(
            f"the rollout needs a typed threefry2x32 key, got {key.dtype}: bits of other generators depend "
            "on the batch; make the key with jax.random.key(seed, impl='threefry2x32')"
        )

    # First the prompt's position, then the sample's index: prompt-major rows.
    prompts = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_positions)  # key[B]
    if samples is not None:
        return jax.vmap(jax.random.fold_in)(jnp.repeat(prompts, group_size), samples)
    samples = jnp.arange(group_size)
    rows = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(prompts, samples)  # key[B, G]
    return rows.reshape(-1)


def make_key_words(keys: jax.Array, position: jax.Array) -> jax.Array:
    """Make the two words u32[N, 2] from which a kernel makes the noise of one token, for keys key[N].

    position: the token's index in its response, i32[] for all rows or i32[N].
    """
    # The same key as in `draw_uniforms`; a token uses only one of the two.
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(position, keys.shape)))


def draw_uniforms(keys: jax.Array, position: jax.Array) -> jax.Array:
    """Draw the uniforms for sampling one token by inverse CDF: f32[N, LEVELS] in [0, 1), for keys key[N].

    position: the token's index in its response, i32[] for all rows or i32[N].
    """
    position = jnp.broadcast_to(position, keys.shape)
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    return jax.vmap(lambda k: jax.random.uniform(k, (kernel.LEVELS,), jnp.float32))(keys)


def sample_tokens(
    logits: jax.Array,  # f32[N, V]
    keys: jax.Array,  # key[N], from `make_row_keys`
    position: jax.Array,  # i32[] or i32[N]: the token's index in its response
    spec: SamplingSpec,
    *,
    axis_name: str | None = None,
    entropy: bool = False,
    implementation: str | None = None,
) -> kernel.SampledTokens:
    """Sample one token per row, with its log-probabilities.

    The order is temperature, top-k, top-p on the renormalised distribution that top-k left, min-p.  A row
    whose logits are not finite gives token 0 and log-probability NaN.  See `kernels.sampling` for ties,
    exactness and the last three arguments.
    """
    return kernel.sample_logits(
        logits,
        draw_uniforms(keys, position),
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
        axis_name=axis_name,
        entropy=entropy,
        implementation=implementation,
    )
