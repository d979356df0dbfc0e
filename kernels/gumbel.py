"""Gumbel noise from a counter: a function of (a row's key words, a vocabulary index) and of nothing else.

1. `threefry2x32` hashes a counter under a key (Salmon et al. 2011, 20 rounds), in operations that every
   kernel backend supports.
2. One hash gives two words, for two vocabulary entries: v and v + 128, where v lies in the first half of a
   PAIR of 256.  Vector registers have 128 lanes, so the two words go to two registers and are not shuffled.
3. `gumbel_from_bits` turns a word into noise.  The token with the largest z + g is a draw from softmax(z).

Rare tokens are decided by the largest noise, so large values are resolved finely: g goes up to 33 ln 2 =
22.9, and a token of probability 2^-30 can be drawn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PAIR = 256  # vocabulary entries that share 128 hashes
HALF = PAIR // 2
# The counter's first word.  jax's own draws and fold_ins from a key count with a first word of 0.
DOMAIN = 0x68656164

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(k0: jax.Array, k1: jax.Array, c0: jax.Array, c1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hash two words of a key and two of a counter to two random words; u32 arrays that broadcast."""
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x, y = c0 + k0, c1 + k1
    for i in range(5):
        for by in _ROTATIONS[i % 2]:
            x = x + y
            y = ((y << jnp.uint32(by)) | (y >> jnp.uint32(32 - by))) ^ x
        x, y = x + keys[(i + 1) % 3], y + (keys[(i + 2) % 3] + jnp.uint32(i + 1))
    return x, y


def gumbel_from_bits(bits: jax.Array) -> jax.Array:
    """Turn random words u32 into Gumbel noise f32: -log(e), e = -log(1 - u), u = (bits + 1/2) / 2^32.

    e has relative precision 2^-24 near 0, where it decides rare tokens, and ends at 24 ln 2.
    """
    # u32 -> f32 by halves: not every compiler converts unsigned words.
    high = (bits >> jnp.uint32(16)).astype(jnp.int32).astype(jnp.float32)
    low = (bits & jnp.uint32(0xFFFF)).astype(jnp.int32).astype(jnp.float32)
    u = jnp.minimum(high * 2.0**-16 + (low + 0.5) * 2.0**-32, 1.0 - 2.0**-24)

    # log1p by hand: compilers for accelerators may take log(1 + x), which rounds x below 2^-24 away.
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))  # relative error 2^-26 below 1/64
    return -jnp.log(jnp.where(u < 1 / 64, series, -jnp.log(1.0 - u)))


def gumbel_pair(k0: jax.Array, k1: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Make the noise of entries v and v + 128; count = 128 (v div 256) + v mod 128, u32."""
    first, second = threefry2x32(k0, k1, jnp.uint32(DOMAIN), count)
    return gumbel_from_bits(first), gumbel_from_bits(second)


def gumbel_at(k0: jax.Array, k1: jax.Array, index: jax.Array) -> jax.Array:
    """Make the noise of any vocabulary entries, at twice the cost: index u32."""
    count = ((index >> jnp.uint32(8)) << jnp.uint32(7)) | (index & jnp.uint32(HALF - 1))
    first, second = threefry2x32(k0, k1, jnp.uint32(DOMAIN), count)
    return gumbel_from_bits(jnp.where((index & jnp.uint32(HALF)) == 0, first, second))
