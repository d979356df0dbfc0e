"""Arithmetic exercises with two steps on whole numbers, wrong solutions of them, and numbers in words.

Starts are in 2 .. 20 and operands in 2 .. 5, so that a small policy learns the arithmetic in a minute.
Results of correct solutions are in 0 .. 99, those of wrong ones in 0 .. 199.
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
# The smallest start and the smallest operand are 2.
MAX_START, MAX_OPERAND = 20, 5
# Largest number in a correct solution, and in a wrong one.
MAX_RESULT, MAX_WRONG_RESULT = 99, 199
# Largest distance of a wrong result from the correct one.
MAX_SLIP = 10

# Each exercise falls into one of ten hash buckets, and each bucket belongs to one split at most.  The hash is
# of the arithmetic alone, so no exercise of one split appears in another one under other words.
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
    """Map each split to its exercises (start, steps), in one list for each pair of operators.

    The grouping allows each pair of operators to be drawn with the same probability.
    """
    groups: dict[str, dict[tuple[str, str], list[tuple[int, Steps]]]] = {split: {} for split in SPLITS}
    starts, operands = range(2, MAX_START + 1), range(2, MAX_OPERAND + 1)

    # All exercises are enumerated, about 4,900 before the filter; the loop takes milliseconds and is cached.
    for first_op, second_op, start in itertools.product(OPERATORS, OPERATORS, starts):
        for first_n, second_n in itertools.product(operands, repeat=2):
            steps = ((first_op, first_n), (second_op, second_n))
            if all(0 <= result <= MAX_RESULT for result in compute_results(start, steps)):
                split = _find_split(format_steps(start, steps))
                groups[split].setdefault((first_op, second_op), []).append((start, steps))
    return {split: list(by_operators.values()) for split, by_operators in groups.items()}


def _find_split(arithmetic: str) -> str:
    """The split of an exercise, chosen by a hash of its text."""
    digest = hashlib.blake2b(arithmetic.encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest) % 10
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def _apply(a: int, op: str, b: int) -> int:
    """The result of one step; -1 where it is not a whole number."""
    if op == "/":
        return a // b if a % b == 0 else -1
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def compute_results(start: int, steps: Steps) -> list[int]:
    """The result of each step; -1 from the first result on that is negative or not a whole number."""
    results = []
    for op, n in steps:
        result = _apply(start, op, n) if start >= 0 else -1
        results.append(max(result, -1))
        start = results[-1]
    return results


def slip_results(start: int, steps: Steps, rng: np.random.Generator) -> list[int]:
    """Draw results with one wrong step; the steps after it are computed correctly from the wrong result."""
    results = compute_results(start, steps)
    wrong_step = int(rng.integers(len(steps)))
    options = list(_iterate_slips(steps, results, wrong_step))
    # A wrong first step may admit no whole numbers after it; a wrong last step always has options.
    if not options:
        options = list(_iterate_slips(steps, results, len(steps) - 1))
    return options[rng.integers(len(options))]


def _iterate_slips(steps: Steps, results: list[int], wrong_step: int) -> Iterator[list[int]]:
    """All results with a wrong `wrong_step` whose answer is wrong and which stay in 0 .. MAX_WRONG_RESULT."""
    correct = results[wrong_step]
    lowest = max(0, correct - MAX_SLIP)
    highest = min(MAX_WRONG_RESULT, correct + MAX_SLIP)
    for wrong in range(lowest, highest + 1):
        slipped = [*results[:wrong_step], wrong, *compute_results(wrong, steps[wrong_step + 1 :])]
        # This also drops the correct value itself, and steps that become negative or not whole (-1).
        if slipped[-1] != results[-1] and all(0 <= r <= MAX_WRONG_RESULT for r in slipped):
            yield slipped


# --- text ------------------------------------------------------------------------------------------------


def format_steps(start: int, steps: Steps, results: list[int] | None = None) -> str:
    """Write steps as `7*2=14;14+6=20`.  results: one for each step; None computes the correct ones."""
    if results is None:
        results = compute_results(start, steps)
    lines = zip([start, *results[:-1]], steps, results, strict=True)
    return ";".join(f"{left}{op}{n}={result}" for left, (op, n), result in lines)


def parse_steps(text: str) -> tuple[int, Steps]:
    """Parse (start, steps) from the text of `format_steps`.  Raises ValueError unless it has two steps."""
    steps = _STEP.findall(text)
    if len(steps) != 2:
        raise ValueError(f"{text!r} has {len(steps)} steps, not 2")
    start = int(steps[0][0])
    return start, tuple((op, int(n)) for _, op, n, _ in steps)


_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# The policy writes the texts to parse, so the number of their digits is bounded.
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_FRACTION = re.compile(r"([0-9]{1,9}) ?/ ?([0-9]{1,9})")


def spell_number(n: int) -> str:
    """Write 0 .. 199 in words: `seven`, `forty-two`, `one hundred six`."""
    if n == 100:
        return "one hundred"
    if n > 100:
        return f"one hundred {spell_number(n - 100)}"
    if n < 20:
        return _UNITS[n]
    tens, unit = _TENS[n // 10 - 2], n % 10
    return f"{tens}-{_UNITS[unit]}" if unit else tens


# The inverse of `spell_number`, over all numbers that a solution can contain.
_WORDS = {spell_number(n): n for n in range(MAX_WRONG_RESULT + 1)}


def parse_words(text: str) -> Fraction | None:
    """The value of a number in words; None for any other text."""
    return Fraction(_WORDS[text]) if text in _WORDS else None


def parse_number(text: str) -> Fraction | None:
    """The value of a number in words or digits; None for any other text."""
    if (value := parse_words(text)) is not None:
        return value
    try:
        if _DECIMAL.fullmatch(text):
            return Fraction(text)
        if (ratio := _FRACTION.fullmatch(text)) and int(ratio[2]):
            return Fraction(int(ratio[1]), int(ratio[2]))
    except ValueError:  # Python refuses integers of more than 4,300 digits, which a policy may write
        pass
    return None
