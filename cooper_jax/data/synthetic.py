"""Two-step word arithmetic, made from a seed: what `configs/tiny.py` learns on.

    question    Ada has 7 coins . The pile grows 2 fold . She finds 6 more . How many coins now ?
    completion  7 * 2 = 14 ; 14 + 6 = 20 #### 20

  1. `problems` draws problems.  Which split a problem belongs to follows from a hash of its arithmetic, so no
     split ever meets another's, whatever the seeds, and not under other names either.
  2. `demonstration` writes a worked solution as some demonstrator would: sometimes with a wrong step, and with
     the answer in one of several forms (`20`, `20.0`, `40 / 2`, `twenty`, `20 coins`).
  3. `oracle` knows whether a completion's answer is right, in any form.  It measures and never trains.

References are plain integers.  A rule that reads numbers misses the words: precise and brittle, as in the paper,
where the rule is math-verify on free text.  All words stand apart by blanks (in decimals and `forty-two` nothing
does), intermediate results lie in 0 .. 99, those of wrong solutions in 0 .. 199.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np

from cooper_jax.runtime import keys
from cooper_jax.types import Problem

MARK = "####"  # stands before the answer
MOST_START, MOST_OPERAND = 20, 5  # both from 2: small tables, which a small policy learns in a minute
TOP, WRONG_TOP = 99, 199  # largest number in a right solution, and in a wrong one
NEAR = 10  # a wrong result is at most this far from the right one

# Shares of the forms in which demonstrations write the answer.
FORMS = {"integer": 0.5, "decimal": 0.125, "fraction": 0.125, "word": 0.125, "unit": 0.125}

# Of ten hash buckets: which belong to a split.  The numbers are part of every run's record.
SPLITS = {
    "train": range(0, 4),
    "eval": range(4, 5),
    "warmup_policy": range(5, 7),
    "warmup_reward": range(7, 10),
}

NAMES = {
    "She": ("Ada", "Eva", "Ida", "Kim", "Lea", "Mia", "Nora", "Zoe"),
    "He": ("Ben", "Dan", "Finn", "Ivan", "Jon", "Leo", "Max", "Tom"),
}
OBJECTS = (
    "apples", "balls", "beads", "books", "cards", "coins", "cups", "eggs",
    "keys", "nuts", "pears", "pens", "plums", "shells", "stamps", "toys",
)  # fmt: skip
STEPS = {
    "+": ("{who} buys {n} more .", "{who} finds {n} more .", "A friend brings {n} more ."),
    "-": ("{who} loses {n} .", "{who} gives away {n} .", "{who} sells {n} of them ."),
    "*": ("The pile grows {n} fold .", "{who} swaps each for {n} ."),
    "/": ("{who} keeps 1 in {n} .", "Just 1 in {n} is left ."),
}
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

_STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
_ASKED = re.compile(r"How many (\w+) now \?$")
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_FRACTION = re.compile(r"([0-9]{1,9}) ?/ ?([0-9]{1,9})")


def problems(seed: int, count: int, split: str) -> list[Problem]:
    """`count` distinct problems of a split, a pure function of the arguments; fewer are a prefix of more.

    `solution` is the right worked solution with an integer answer.
    Raises ValueError for an unknown split, and where a split does not hold that many distinct problems.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    rng = keys.numpy_stream(seed, "synthetic", list(SPLITS).index(split))
    by_operators = _arithmetic()[split]
    made: dict[str, Problem] = {}
    in_vain = 0
    while len(made) < count:
        if in_vain == 10_000:
            raise ValueError(
                f"{count} distinct problems of split {split!r} asked for: there are about {len(made)}"
            )
        alike = by_operators[rng.integers(len(by_operators))]
        start, steps = alike[rng.integers(len(alike))]
        question = _draw_question(start, steps, rng)
        answer = str(_results(start, steps)[-1])
        solution = f"{_write(start, steps)} {MARK} {answer}"
        in_vain = in_vain + 1 if question in made else 0
        made.setdefault(question, Problem(question, answer, solution, f"synthetic/{split}:{len(made)}"))
    return list(made.values())


def demonstration(
    problem: Problem, rng: np.random.Generator, *, corrupt: float, forms: Mapping[str, float] = FORMS
) -> tuple[str, bool]:
    """(a worked solution, whether its answer is right).

    corrupt: the probability that one step's result is wrong; what follows is computed from it, and the final
      answer is wrong too.
    forms: the shares of integer, decimal, fraction, word and unit in which the answer is written; they need not
      sum to 1.  Raises ValueError for unknown forms and for a problem that was not made here.
    """
    if not forms or not set(forms) <= FORMS.keys() or min(forms.values()) < 0 or sum(forms.values()) <= 0:
        raise ValueError(f"forms {dict(forms)}: shares of {', '.join(FORMS)}, not negative, not all 0")
    start, steps = _read(problem)
    results = _results(start, steps)
    wrong = bool(rng.random() < corrupt)
    if wrong:
        results = _corrupted(start, steps, results, rng)
    shares = np.array(list(forms.values()), np.float64)
    form = list(forms)[rng.choice(len(shares), p=shares / shares.sum())]
    return (
        f"{_write(start, steps, results)} {MARK} {_in_form(results[-1], form, _asked(problem), rng)}",
        not wrong,
    )


def oracle(problem: Problem, completion_text: str) -> bool:
    """Whether a completion's answer equals the reference, in any form; a unit must be the one asked for.

    The answer is all that follows the one `####`: none, or several, are wrong.  The steps are not looked at.
    """
    _, mark, said = completion_text.partition(MARK)
    said = said.strip()
    if not mark or MARK in said:
        return False
    said = said.removesuffix(f" {_asked(problem)}").rstrip()
    return _value(said) == Fraction(problem.reference)


def corpus() -> list[str]:
    """Sentences for a tokenizer: every word, symbol, number 0 .. 199 and answer form, several times each.

    Questions and worked solutions as they occur, then each number in the places where it can stand.
    """
    rng = keys.numpy_stream(0, "synthetic", len(SPLITS))
    sentences = []
    for pronoun, names in NAMES.items():
        for name in names:
            for i, thing in enumerate(OBJECTS):
                first, second = (list(STEPS)[k % 4] for k in (i, i // 4))
                tell = [
                    STEPS[op][i % len(STEPS[op])].format(who=pronoun, n=2 + (i + k) % 8)
                    for k, op in enumerate((first, second))
                ]
                sentences.append(f"{name} has {i + 2} {thing} . {tell[0]} {tell[1]} How many {thing} now ?")
    for op, ways in STEPS.items():
        sentences += [way.format(who=who, n=n) for way in ways for who in NAMES for n in range(2, 10)]
        sentences += [f"{n} {op} {n} = {n} ; {n} {op} {n} = {n} {MARK} {n}" for n in range(WRONG_TOP + 1)]
    for n in range(WRONG_TOP + 1):
        said = [_in_form(n, form, OBJECTS[n % len(OBJECTS)], rng) for form in FORMS]
        sentences += [f"{MARK} {answer}" for answer in said]
    return sentences


# --- arithmetic ------------------------------------------------------------------------------------------

Steps = tuple[tuple[str, int], ...]  # two of (operator, operand)


@functools.cache
def _arithmetic() -> dict[str, list[list[tuple[int, Steps]]]]:
    """All (start, steps) of each split, grouped by operators so that each pair of operators is drawn as often.

    Starts in 2 .. 50, operands in 2 .. 9, all results whole and in 0 .. 99: 20,917 in all.
    """
    groups: dict[str, dict[tuple[str, str], list]] = {split: {} for split in SPLITS}
    for (op, then), start in itertools.product(itertools.product(STEPS, repeat=2), range(2, MOST_START + 1)):
        for n, m in itertools.product(range(2, MOST_OPERAND + 1), repeat=2):
            steps = ((op, n), (then, m))
            if all(0 <= r <= TOP for r in _results(start, steps)):
                bucket = _bucket(_write(start, steps))
                split = next(name for name, buckets in SPLITS.items() if bucket in buckets)
                groups[split].setdefault((op, then), []).append((start, steps))
    return {split: list(by_operators.values()) for split, by_operators in groups.items()}


def _apply(a: int, op: str, b: int) -> int:
    """The result; -1 where it is no whole number."""
    if op == "/":
        return a // b if a % b == 0 else -1
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def _results(start: int, steps: Steps) -> list[int]:
    """The result of each step; -1 from where one is negative or no whole number."""
    out = []
    for op, n in steps:
        result = _apply(start, op, n) if start >= 0 else -1
        out.append(max(result, -1))
        start = out[-1]
    return out


def _corrupted(start: int, steps: Steps, results: list[int], rng: np.random.Generator) -> list[int]:
    """Results with one slip: in the first step, and then carried through, or in the last."""
    at = int(rng.integers(len(steps)))
    options = list(_slips(steps, results, at)) or list(_slips(steps, results, len(steps) - 1))
    return options[rng.integers(len(options))]


def _slips(steps: Steps, results: list[int], at: int) -> Iterator[list[int]]:
    """All ways in which step `at` can go wrong nearby and the answer be wrong for it, in 0 .. 199."""
    for wrong in range(max(0, results[at] - NEAR), min(WRONG_TOP, results[at] + NEAR) + 1):
        carried = _results(wrong, steps[at + 1 :])
        slipped = [*results[:at], wrong, *carried]
        if slipped[-1] != results[-1] and all(0 <= r <= WRONG_TOP for r in slipped):
            yield slipped


def _bucket(arithmetic: str) -> int:
    """0 .. 9."""
    return int.from_bytes(hashlib.blake2b(arithmetic.encode(), digest_size=4).digest()) % 10


# --- text ------------------------------------------------------------------------------------------------


def _draw_question(start: int, steps: Steps, rng: np.random.Generator) -> str:
    who = ("She", "He")[rng.integers(2)]
    name, thing = NAMES[who][rng.integers(len(NAMES[who]))], OBJECTS[rng.integers(len(OBJECTS))]
    told = [STEPS[op][rng.integers(len(STEPS[op]))].format(who=who, n=n) for op, n in steps]
    return f"{name} has {start} {thing} . {' '.join(told)} How many {thing} now ?"


def _write(start: int, steps: Steps, results: list[int] | None = None) -> str:
    results = _results(start, steps) if results is None else results
    lefts = [start, *results]
    lines = zip(lefts, steps, results, strict=False)  # the last left-hand side is the answer
    return " ; ".join(f"{left} {op} {n} = {result}" for left, (op, n), result in lines)


def _read(problem: Problem) -> tuple[int, Steps]:
    steps = _STEP.findall(problem.solution)
    if len(steps) != 2:
        raise ValueError(f"{problem.id}: the solution {problem.solution!r} has {len(steps)} steps, not 2")
    return int(steps[0][0]), tuple((op, int(n)) for _, op, n, _ in steps)


def _asked(problem: Problem) -> str:
    """The thing that is counted."""
    if not (found := _ASKED.search(problem.question)):
        raise ValueError(f"{problem.id}: the question {problem.question!r} does not end by asking how many")
    return found[1]


def _in_form(n: int, form: str, thing: str, rng: np.random.Generator) -> str:
    if form == "fraction":
        most = WRONG_TOP // max(n, 1)  # no number is above 199, so 150 is 150 / 1
        below = min(int(rng.integers(2, 6)), most)
        return f"{n * below} / {below}"
    return {"integer": f"{n}", "decimal": f"{n}.0", "word": _in_words(n), "unit": f"{n} {thing}"}[form]


def _in_words(n: int) -> str:
    """0 .. 199 in words: `seven`, `forty-two`, `one hundred six`."""
    if n >= 100:
        return f"one hundred {_in_words(n - 100)}" if n > 100 else "one hundred"
    if n < 20:
        return _UNITS[n]
    tens, unit = _TENS[n // 10 - 2], n % 10
    return f"{tens}-{_UNITS[unit]}" if unit else tens


_WORDS = {_in_words(n): n for n in range(WRONG_TOP + 1)}


def _value(said: str) -> Fraction | None:
    """The number that a text says, if it says one and nothing else."""
    if said in _WORDS:
        return Fraction(_WORDS[said])
    if _DECIMAL.fullmatch(said):
        return Fraction(said)
    if (ratio := _FRACTION.fullmatch(said)) and int(ratio[2]):
        return Fraction(int(ratio[1]), int(ratio[2]))
    return None
