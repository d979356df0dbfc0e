"""Order of training problems from one source or several weighted ones.

Without weights all sources together are one set, which `problems.problem_at` visits in epochs.

With weights w the order consists of blocks of sum(w) positions (weights 3 and 1: of 4).  Each block has exactly
w[s] positions of source s, in an order that is a function of (seed, block).  The positions of a source, counted
over all blocks, visit its problems in epochs of its own.  A position's problem is therefore a function of
(seed, position) alone, as with one source.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from cooper_jax.data.problems import problem_at
from cooper_jax.runtime import keys

MAX_BLOCK = 10_000  # positions in a block


@dataclasses.dataclass(frozen=True)
class DataOrder:
    """The order in which a run visits its problems, which are those of all sources, one after the other."""

    sizes: tuple[int, ...]  # problems of each source
    shares: tuple[int, ...] = ()  # positions of each source in a block; (): no weights

    def __post_init__(self) -> None:
        if self.shares and len(self.shares) != len(self.sizes):
            raise ValueError(f"{len(self.shares)} weights for {len(self.sizes)} sources")
        if self.shares and 0 in self.sizes:
            raise ValueError(f"source {self.sizes.index(0) + 1} of {len(self.sizes)} has no problem left")

    def problem_at(self, position: int, seed: int, stream: str = "shuffle") -> int:
        """The index of the problem at a position.  stream: the random stream of the order."""
        if not self.shares:
            return problem_at(position, sum(self.sizes), seed, stream)

        block, index = divmod(position, sum(self.shares))
        sources = _order_block(self.shares, seed, block, stream)
        source = int(sources[index])
        earlier = block * self.shares[source] + int((sources[:index] == source).sum())
        return sum(self.sizes[:source]) + problem_at(earlier, self.sizes[source], seed, stream)


@functools.lru_cache(maxsize=64)  # a batch may have many short blocks
def _order_block(shares: tuple[int, ...], seed: int, block: int, stream: str) -> np.ndarray:
    """The source of each position of a block, i64[sum(shares)]."""
    rng = keys.make_generator(seed, "mixture", keys.STREAMS[stream], block)
    sources = np.repeat(np.arange(len(shares)), shares)
    # Raw words are the same in all versions of NumPy, but `permutation` is not.
    ordered = sources[np.argsort(rng.bit_generator.random_raw(len(sources)), kind="stable")]
    # All callers share the cached array, so none may change it.
    ordered.setflags(write=False)
    return ordered


def parse_weights(text: str, count: int) -> tuple[int, ...]:
    """Parse weights such as "0.7,0.3" as the smallest integers with the same ratios: (7, 3); "" as ().

    count: the number of sources.

    Raises ValueError for another number of weights, weights that are not positive numbers, and ratios that
    need blocks of more than MAX_BLOCK positions.
    """
    if not text:
        return ()
    try:
        weights = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is not a list of numbers, as in 3,1") from error
    if len(weights) != count:
        raise ValueError(f"{text!r} has {len(weights)} weights, and there are {count} sources")
    if min(weights) <= 0:
        raise ValueError(f"{text!r}: every weight must be above 0; leave out a source without weight")

    scale = math.lcm(*(w.denominator for w in weights))
    integers = [int(w * scale) for w in weights]
    shares = tuple(i // math.gcd(*integers) for i in integers)
    if sum(shares) > MAX_BLOCK:
        raise ValueError(
            f"{text!r} are in the ratio {':'.join(map(str, shares))}, whose sum is above {MAX_BLOCK}: give weights "
            "with fewer digits"
        )
    return shares


def apportion(count: int, shares: Sequence[int]) -> list[int]:
    """Divide `count` in proportion to the shares, by the largest remainders; the parts add up to `count`."""
    total = sum(shares)
    parts = [count * share // total for share in shares]
    # Among equal remainders, the earlier source gets one more.
    by_remainder = sorted(range(len(shares)), key=lambda s: -(count * shares[s] % total))
    for s in by_remainder[: count - sum(parts)]:
        parts[s] += 1
    return parts
