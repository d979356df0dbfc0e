"""How much a sampler's draws move when the logits do, and how well it reaches the tail.

    python tests/bench/sampling_noise.py [--vocabulary 151936] [--noises 20] [--draws 10000]

Logits are a language model's in kind: a Zipf law, its ranks shuffled, with an entropy of some 2 nats.

flips      the chance that a draw changes when normal noise of 1e-5 is added to the logits and the random bits stay,
           from the overlaps of each token's interval before and after; for Gumbel token i stays with
           probability 1 / sum_j max(p_j / p_i, q_j / q_i)
measured   the same, counted by drawing in float32
tail       of tokens rarer than 1e-7: the total variation between what they are drawn with and what they should be,
           as a share of their probability.  Uniforms are multiples of 2^-23, which is what limits each.

Three levels are kernels.sampling's: groups of 128 blocks, blocks of 128 tokens, tokens; two levels, the same
without the groups.  Each level has a uniform of its own.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from cooper_jax.kernels import sampling  # noqa: E402

NOISE = 1e-5
GRID = 2**23
RARE = 1e-7
FANOUT = {"one uniform": (), "two levels": (128,), "three levels": (128, 128)}  # below the first level


def logits_of(rng: np.random.Generator, vocabulary: int) -> np.ndarray:
    rank = rng.permutation(vocabulary) + 1
    return (-1.9 * np.log(rank) + rng.normal(0, 0.5, vocabulary)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def levels(mass: np.ndarray, fanout: tuple[int, ...]) -> list[np.ndarray]:
    """Masses [parents, children] of each level, from the top."""
    out = []
    for width in reversed(fanout):
        mass = np.pad(mass, (0, -len(mass) % width)).reshape(-1, width)
        out.append(mass)
        mass = mass.sum(axis=1)
    return [mass[None], *reversed(out)]


def product(shares: list[np.ndarray], vocabulary: int) -> np.ndarray:
    """What each token has when its ancestors' shares are multiplied: [V]."""
    total = np.ones(1)
    for share in shares:
        total = (total[: len(share), None] * share).reshape(-1)
    return total[:vocabulary]


def borders(mass: np.ndarray) -> np.ndarray:
    """[parents, children + 1], from 0 to 1; of parents without mass 0."""
    running = np.concatenate([np.zeros((len(mass), 1)), np.cumsum(mass, axis=1)], axis=1)
    return running / np.maximum(running[:, -1:], 1e-300)


def flips(p: np.ndarray, q: np.ndarray, fanout: tuple[int, ...]) -> float:
    overlaps = []
    for before, after in zip(levels(p, fanout), levels(q, fanout), strict=True):
        a, b = borders(before), borders(after)
        overlaps.append(np.maximum(np.minimum(a[:, 1:], b[:, 1:]) - np.maximum(a[:, :-1], b[:, :-1]), 0.0))
    return 1.0 - product(overlaps, len(p)).sum()


def gumbel_flips(p: np.ndarray, q: np.ndarray) -> float:
    order = np.argsort(q / p)
    p, q = p[order], q[order]
    lower = np.cumsum(p)  # of tokens whose ratio is no larger
    return 1.0 - np.sum(1.0 / (lower / p + np.maximum(1.0 - np.cumsum(q), 0.0) / q))


def tail(drawn: np.ndarray, p: np.ndarray) -> float:
    rare = p < RARE
    return 0.5 * np.abs(drawn - p)[rare].sum() / p[rare].sum()


def on_the_grid(logits: np.ndarray, fanout: tuple[int, ...]) -> np.ndarray:
    """What tokens are drawn with by uniforms k / 2^23 and running sums in f32: [V]."""
    shares = []
    for mass in levels(np.exp(logits - logits.max()), fanout):
        running = np.asarray(jnp.cumsum(jnp.asarray(mass, jnp.float32), axis=1), np.float64)
        first = np.ceil(running / np.maximum(running[:, -1:], 1e-300) * GRID)  # multiples below each border
        shares.append(np.diff(first, axis=1, prepend=0.0) / GRID)
    return product(shares, len(logits))


def gumbel_on_the_grid(p: np.ndarray) -> np.ndarray:
    """The mean of u^((1 - p) / p) over u = 1 - m / 2^23: a token wins if its own u is large enough."""
    return 1.0 / np.expm1(np.minimum((1.0 - p) / p / GRID, 700.0)) / GRID


@jax.jit
def one_uniform(logits, uniforms):
    running = jnp.cumsum(jnp.exp(logits - jnp.max(logits)))
    return jnp.searchsorted(running, uniforms[:, 0] * running[-1], side="right")


@jax.jit
def two_levels(logits, uniforms):
    mass = jnp.exp(logits - jnp.max(logits))
    mass = jnp.pad(mass, (0, -len(mass) % sampling.BLOCK)).reshape(-1, sampling.BLOCK)
    running = jnp.cumsum(jnp.sum(mass, axis=1))
    block = jnp.searchsorted(running, uniforms[:, 0] * running[-1], side="right")
    running = jnp.cumsum(mass, axis=1)[block]
    lane = jnp.sum(running <= uniforms[:, 1:2] * running[:, -1:], axis=1)
    return block * sampling.BLOCK + lane


@jax.jit
def three_levels(logits, uniforms):
    rows = jnp.broadcast_to(logits[None, :], (len(uniforms), len(logits)))
    return sampling.sample_logits(
        rows, uniforms, temperature=1.0, top_k=0, top_p=1.0, implementation="xla"
    ).token


@jax.jit
def gumbel(logits, keys):
    return jax.lax.map(lambda key: jnp.argmax(logits + jax.random.gumbel(key, logits.shape)), keys)


def measured(draw, logits: np.ndarray, noises: np.ndarray, bits) -> str:
    """Changed draws of all draws; `bits(i)` are those that go with noise i."""
    changed = [np.asarray(draw(logits, bits(i)) != draw(logits + n, bits(i))) for i, n in enumerate(noises)]
    return f"{np.sum(changed):,} of {np.size(changed):,}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--noises", type=int, default=20)
    parser.add_argument("--draws", type=int, default=10_000, help="for each noise, by one uniform")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    logits = logits_of(rng, args.vocabulary)
    noises = rng.normal(0, NOISE, (args.noises, args.vocabulary)).astype(np.float32)
    p, moved = softmax(logits), [softmax(logits + n) for n in noises]
    rare = p < RARE
    print(
        f"vocabulary {args.vocabulary:,}, entropy {-np.sum(p * np.log(p)):.2f} nats, largest {p.max():.2f}; "
        f"{rare.sum():,} tokens rarer than {RARE:.0e} have {p[rare].sum():.1e} of the probability"
    )
    variation = np.mean([np.abs(p - q).sum() / 2 for q in moved])
    print(f"total variation under noise of {NOISE:.0e}, what no sampler goes below: {variation:.1e}\n")

    def uniforms(draws, i):
        return jax.random.uniform(jax.random.key(i), (draws, sampling.LEVELS))

    def keys(draws, i):
        return jax.random.split(jax.random.key(i), draws)

    few = max(1, args.draws // 50)
    counted = {
        "one uniform": measured(one_uniform, logits, noises, functools.partial(uniforms, args.draws)),
        "two levels": measured(two_levels, logits, noises, functools.partial(uniforms, args.draws)),
        "three levels": measured(three_levels, logits, noises, functools.partial(uniforms, 5 * few)),
        "gumbel": measured(gumbel, logits, noises, functools.partial(keys, few)),
    }
    print(f"{'':14}{'flips':>10}{'measured':>20}{'tail':>10}")
    for name, count in counted.items():
        if name == "gumbel":
            rate, drawn = np.mean([gumbel_flips(p, q) for q in moved]), gumbel_on_the_grid(p)
        else:
            rate = np.mean([flips(p, q, FANOUT[name]) for q in moved])
            drawn = on_the_grid(logits, FANOUT[name])
        print(f"{name:14}{rate:10.1e}{count:>20}{tail(drawn, p):10.1e}")


if __name__ == "__main__":
    main()
