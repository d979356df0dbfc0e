"""Counter-based Gumbel noise: a function of a row's key words and a vocabulary index alone.

1. `threefry2x32` hashes a counter under a key (Salmon et al. 2011, 20 rounds), in operations that every
   kernel backend supports.
2. One hash gives two words, for two vocabulary entries: v and v + 128, where v is in the first half of a PAIR
   of 256.  Vector registers have 128 lanes, so the two words go to two registers without a shuffle.
3. `gumbel_from_bits` turns a word into noise g.  The token with the largest z + g is a sample of softmax(z).

A rare token is sampled only when its noise is very large, so large values need a fine resolution: g reaches
33 ln 2 = 22.9, and a token of probability 2^-30 can be sampled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PAIR = 256  # vocabulary entries that share 128 hashes
HALF = PAIR // 2
# The counter's first word.  It keeps this noise apart from jax's own draws and fold_ins under the same key,
# whose counters have a first word of 0.
DOMAIN = 0x68656164

# Threefry's constants: the rotations of even and odd groups of four rounds, and the key schedule's parity.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(k0: jax.Array, k1: jax.Array, c0: jax.Array, c1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hash a key of two words and a counter of two words to two random words; u32 arrays that broadcast."""
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x, y = c0 + k0, c1 + k1
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = x + y
            y = ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))) ^ x
        # After every fourth round: add two words of the key, and the number of the group against symmetry.
        x, y = x + keys[(i + 1) % 3], y + (keys[(i + 2) % 3] + jnp.uint32(i + 1))
    return x, y


def gumbel_from_bits(bits: jax.Array) -> jax.Array:
    """Turn random words u32 into Gumbel noise f32: -log(e), e = -log(1 - u), u = (bits + 1/2) / 2^32.

    e has a relative precision of 2^-24 near 0, which large noise comes from, and is at most 24 ln 2.
    """
    # u32 -> f32 by halves, since not every compiler converts unsigned words.
    high = (bits >> jnp.uint32(16)).astype(jnp.int32).astype(jnp.float32)
    low = (bits & jnp.uint32(0xFFFF)).astype(jnp.int32).astype(jnp.float32)
    u = jnp.minimum(high * 2.0**-16 + (low + 0.5) * 2.0**-32, 1.0 - 2.0**-24)

    # log1p from its series: compilers for accelerators may use log(1 + x), which loses any x below 2^-24.
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))  # relative error 2^-26 below 1/64
    return -jnp.log(jnp.where(u < 1 / 64, series, -jnp.log(1.0 - u)))


def gumbel_pair(k0: jax.Array, k1: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Make the noise of entries v and v + 128 from u32 `count` = 128 (v div 256) + v mod 128: f32 each."""
    first, second = threefry2x32(k0, k1, jnp.uint32(DOMAIN), count)
    return gumbel_from_bits(first), gumbel_from_bits(second)


def gumbel_at(k0: jax.Array, k1: jax.Array, index: jax.Array) -> jax.Array:
    """Make the noise of any vocabulary entries, at twice the cost of `gumbel_pair`: index u32 -> f32."""
    # The pair's count is the index without bit 7; that bit selects the word of the hash.
    count = ((index >> jnp.uint32(8)) << jnp.uint32(7)) | (index & jnp.uint32(HALF - 1))
    first, second = threefry2x32(k0, k1, jnp.uint32(DOMAIN), count)
    return gumbel_from_bits(jnp.where((index & jnp.uint32(HALF)) == 0, first, second))
