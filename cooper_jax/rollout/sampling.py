"""How to sample: the settings, the random bits, and the draw.

1. `row_keys` gives every (prompt, sample) a key from the prompt's place in the data order and the sample's index.
2. `uniforms` folds in the token's position in the response.
3. `sample` hands logits and uniforms to the kernel.

So the bits of a token depend on (seed, step, prompt, sample, position) alone, with seed and step already in the
caller's key: not on the batch that the row runs in, the padding, or the number of devices.

B prompts   G samples a prompt   N = B * G rows, prompt-major   V vocabulary
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels import sampling as kernel


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """How to sample; hashable, so static in jit.  Raises ValueError for values that mean nothing."""

    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    max_new_tokens: int  # T, an EOS included
    group_size: int  # G
    eos_ids: tuple[int, ...]  # any of them ends a response
    segment: int  # tokens decoded between two looks of the host at whether all have ended
    dtype: str  # float32 | bfloat16, of the weights and the cache

    def __post_init__(self):
        for name in ("max_new_tokens", "group_size", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling: {name} is {getattr(self, name)}, it must be at least 1")
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"sampling: temperature is {self.temperature}, it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"sampling: top_k is {self.top_k}, it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p is {self.top_p}, it must be above 0 and at most 1 (off)")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"sampling: dtype is {self.dtype!r}, it must be float32 or bfloat16")


def row_keys(key: jax.Array, prompt_positions: jax.Array, group_size: int) -> jax.Array:
    """Keys key[N] for the rows of prompts at these places in the data order (i32[B]).

    Raises ValueError for a key that is not threefry: other generators give different bits when batched.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or jax.random.key_impl(key) != "threefry2x32":
        raise ValueError(
            f"the rollout needs a typed threefry2x32 key, got {key.dtype}: bits of other generators depend on "
            "the batch; make the key with jax.random.key(seed, impl='threefry2x32')"
        )
    prompts = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_positions)  # key[B]
    samples = jnp.arange(group_size)
    rows = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(prompts, samples)  # key[B, G]
    return rows.reshape(-1)


def uniforms(keys: jax.Array, position: jax.Array) -> jax.Array:
    """What one token's draw consumes: f32[N, LEVELS] in [0, 1), for keys key[N].

    position: the token's index in its response, i32[] for all rows or i32[N].
    """
    position = jnp.broadcast_to(position, keys.shape)
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    return jax.vmap(lambda k: jax.random.uniform(k, (kernel.LEVELS,), jnp.float32))(keys)


def sample(
    logits: jax.Array,  # f32[N, V]
    keys: jax.Array,  # key[N], of `row_keys`
    position: jax.Array,  # i32[] or i32[N]
    spec: SamplingSpec,
) -> tuple[jax.Array, jax.Array]:
    """One token a row: token i32[N] and log-probability f32[N] under the distribution drawn from.

    Temperature, then top-k, then top-p on the renormalised rest.  Rows without a distribution (a NaN among the
    logits) give token 0 and log-probability NaN; see `kernels.sampling` for ties and exactness.
    """
    bits = uniforms(keys, position)
    return kernel.sample(logits, bits, temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p)
