"""Two steps of whole-number arithmetic: which there are, how they go wrong, and numbers in words.

Starts in 2 .. 20, operands in 2 .. 5: small tables, which a small policy learns in a minute.  Results of right
solutions lie in 0 .. 99, those of wrong ones in 0 .. 199.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

OPERATORS = "+-*/"
MOST_START, MOST_OPERAND = 20, 5  # both from 2
TOP, WRONG_TOP = 99, 199  # largest number in a right solution, and in a wrong one
NEAR = 10  # a wrong result is at most this far from the right one

# Of ten hash buckets: which belong to a split.
SPLITS = {
    "train": range(0, 4),
    "eval": range(4, 5),
    "supervised_policy": range(5, 7),
    "supervised_reward": range(7, 9),
    "reward_eval": range(9, 10),
}

Steps = tuple[tuple[str, int], ...]  # two of (operator, operand)

_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@functools.cache
def split_exercises() -> dict[str, list[list[tuple[int, Steps]]]]:
    """All (start, steps) of each split, grouped by operators so that each pair of operators is drawn as often."""
    groups: dict[str, dict[tuple[str, str], list]] = {split: {} for split in SPLITS}
    for (op, then), start in itertools.product(
        itertools.product(OPERATORS, repeat=2), range(2, MOST_START + 1)
    ):
        for n, m in itertools.product(range(2, MOST_OPERAND + 1), repeat=2):
            steps = ((op, n), (then, m))
            if all(0 <= r <= TOP for r in compute_results(start, steps)):
                bucket = _bucket(format_steps(start, steps))
                split = next(name for name, buckets in SPLITS.items() if bucket in buckets)
                groups[split].setdefault((op, then), []).append((start, steps))
    return {split: list(by_operators.values()) for split, by_operators in groups.items()}


def _apply(a: int, op: str, b: int) -> int:
    """The result; -1 where it is no whole number."""
    if op == "/":
        return a // b if a % b == 0 else -1
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def compute_results(start: int, steps: Steps) -> list[int]:
    """The result of each step; -1 from where one is negative or no whole number."""
    out = []
    for op, n in steps:
        result = _apply(start, op, n) if start >= 0 else -1
        out.append(max(result, -1))
        start = out[-1]
    return out


def slip_results(start: int, steps: Steps, rng: np.random.Generator) -> list[int]:
    """Results with one slip: in the first step, and then carried through, or in the last."""
    results = compute_results(start, steps)
    at = int(rng.integers(len(steps)))
    options = list(_slips(steps, results, at)) or list(_slips(steps, results, len(steps) - 1))
    return options[rng.integers(len(options))]


def _slips(steps: Steps, results: list[int], at: int) -> Iterator[list[int]]:
    """All ways in which step `at` can go wrong nearby and the answer be wrong for it, in 0 .. 199."""
    for wrong in range(max(0, results[at] - NEAR), min(WRONG_TOP, results[at] + NEAR) + 1):
        carried = compute_results(wrong, steps[at + 1 :])
        moved = [*results[:at], wrong, *carried]
        if moved[-1] != results[-1] and all(0 <= r <= WRONG_TOP for r in moved):
            yield moved


def _bucket(arithmetic: str) -> int:
    """0 .. 9."""
    return int.from_bytes(hashlib.blake2b(arithmetic.encode(), digest_size=4).digest()) % 10


# --- text ------------------------------------------------------------------------------------------------


def format_steps(start: int, steps: Steps, results: list[int] | None = None) -> str:
    """`7*2=14;14+6=20`; results: wrong ones may be given."""
    results = compute_results(start, steps) if results is None else results
    lefts = [start, *results]
    lines = zip(lefts, steps, results, strict=False)  # the last left-hand side is the answer
    return ";".join(f"{left}{op}{n}={result}" for left, (op, n), result in lines)


def parse_steps(text: str) -> tuple[int, Steps]:
    """(start, steps) of what `write` wrote.  Raises ValueError where there are not two steps."""
    steps = _STEP.findall(text)
    if len(steps) != 2:
        raise ValueError(f"{text!r} has {len(steps)} steps, not 2")
    return int(steps[0][0]), tuple((op, int(n)) for _, op, n, _ in steps)


_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_FRACTION = re.compile(r"([0-9]{1,9}) ?/ ?([0-9]{1,9})")


def number_in_words(n: int) -> str:
    """0 .. 199 in words: `seven`, `forty-two`, `one hundred six`."""
    if n >= 100:
        return f"one hundred {number_in_words(n - 100)}" if n > 100 else "one hundred"
    if n < 20:
        return _UNITS[n]
    tens, unit = _TENS[n // 10 - 2], n % 10
    return f"{tens}-{_UNITS[unit]}" if unit else tens


_WORDS = {number_in_words(n): n for n in range(WRONG_TOP + 1)}


def parse_words(said: str) -> Fraction | None:
    """The number that words say, if they say one and nothing else."""
    return Fraction(_WORDS[said]) if said in _WORDS else None


def parse_number(said: str) -> Fraction | None:
    """The number that a text says, in words or digits, if it says one and nothing else."""
    if (words := parse_words(said)) is not None:
        return words
    try:
        if _DECIMAL.fullmatch(said):
            return Fraction(said)
        if (ratio := _FRACTION.fullmatch(said)) and int(ratio[2]):
            return Fraction(int(ratio[1]), int(ratio[2]))
    except ValueError:  # Python reads no integer of over 4,300 digits, and the policy may write one
        pass
    return None
