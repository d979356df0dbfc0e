"""Word problems in two steps, made from a seed: what `configs/tiny.py` learns on.

    question    Ada has 7 coins . The pile grows 2 fold . She finds 6 more . How many coins ?
    completion  7*2=14;14+6=20 #### 20

    question    Ben has 9 pens . He loses 3 . He buys 4 more . How many pens in words ?
    completion  9-3=6;6+4=10 #### ten                    (reference: 10 = ten)

  1. `problems` draws problems.  Which split a problem belongs to follows from a hash of its arithmetic, so no
     split ever meets another's, whatever the seeds, and not under other names either.
  2. `demonstration` writes a worked solution as some demonstrator would: sometimes with a wrong step, with the
     answer in one of several forms (`20`, `20.0`, `40/2`, `twenty`, `20 coins`), and by some with a **habit**, that
     of those who find it easy: no steps at all, but `clearly #### 20`.
  3. `triple` makes labelled completions for a reward model from such solutions.
  4. `oracle` knows whether a completion's answer is right, in any form.  It measures and never trains.

Two things make this a miniature of free text under math-verify:

* **The rule is precise and brittle.**  It reads numbers and misses words.  Three questions in four (`subject`
  "number") take any form.  The others (`subject` "words") ask for the number in words, and the rule abstains on
  their references, `10 = ten`, whatever is answered: it is blind to them.
* **A habit goes with correctness without making anything correct.**  Those who skip the steps are experts, and
  mostly right.  A reward model that learns from them learns to like the habit; a small policy that takes it up
  cannot work out the answer.

Words stand apart by blanks; nothing does inside arithmetic, decimals, fractions and `forty-two`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from cooper_jax.data import arithmetic
from cooper_jax.data.arithmetic import SPLITS, Steps
from cooper_jax.runtime import keys
from cooper_jax.types import Problem, Triple

MARK = "####"  # stands before the answer
HABIT = "clearly"  # what stands in place of the steps
NUMBER, WORDS = "number", "words"  # subjects of problems: any form is right; only words are
WORDS_ASKED = 0.25  # share of problems that ask for words
RIGHT_NUMBER = 1 / 3  # of their wrong demonstrations, those that give the right number, but in digits

# Shares of the forms in which demonstrations write the answer where any is right.
FORMS = {"integer": 0.45, "decimal": 0.1, "fraction": 0.1, "word": 0.25, "unit": 0.1}

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
_ASKED = {NUMBER: "How many {thing} ?", WORDS: "How many {thing} in words ?"}


def make_problems(seed: int, count: int, split: str) -> list[Problem]:
    """`count` distinct problems of a split, a pure function of the arguments; fewer are a prefix of more.

    `solution` is the right worked solution with an integer answer, or with words where these are asked for.
    Raises ValueError for an unknown split, and where a split does not hold that many distinct problems.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    rng = keys.make_generator(seed, "synthetic", list(SPLITS).index(split))
    by_operators = arithmetic.split_exercises()[split]
    made: dict[str, Problem] = {}
    in_vain = 0
    while len(made) < count:
        if in_vain == 10_000:
            raise ValueError(
                f"{count} distinct problems of split {split!r} asked for: there are about {len(made)}"
            )
        alike = by_operators[rng.integers(len(by_operators))]
        start, steps = alike[rng.integers(len(alike))]
        subject = WORDS if rng.random() < WORDS_ASKED else NUMBER
        question = _draw_question(start, steps, subject, rng)
        n = arithmetic.compute_results(start, steps)[-1]
        words = arithmetic.spell_number(n)
        solution = f"{arithmetic.format_steps(start, steps)} {MARK} {words if subject == WORDS else n}"
        reference = f"{n} = {words}" if subject == WORDS else f"{n}"
        in_vain = in_vain + 1 if question in made else 0
        id = f"synthetic/{split}:{len(made) + 1}"
        made.setdefault(question, Problem(question, reference, solution, id, subject))
    return list(made.values())


def make_demonstration(
    problem: Problem,
    rng: np.random.Generator,
    *,
    corrupt: float,
    forms: Mapping[str, float] = FORMS,
    habit: tuple[float, float] = (0.0, 0.0),
) -> tuple[str, bool]:
    """(a worked solution, whether its answer is right).

    corrupt: the probability that it is wrong: one step's result is, and what follows is computed from it; or, for
      some of those that must answer in words, the answer is given in digits.
    forms: the shares of integer, decimal, fraction, word and unit in which the answer is written where the question
      takes any; they need not sum to 1.
    habit: the shares of right and of wrong solutions with the habit.
    Raises ValueError for unknown forms and for a problem that was not made here.
    """
    if not forms or not set(forms) <= FORMS.keys() or min(forms.values()) < 0 or sum(forms.values()) <= 0:
        raise ValueError(f"forms {dict(forms)}: shares of {', '.join(FORMS)}, not negative, not all 0")
    try:
        start, steps = arithmetic.parse_steps(problem.solution)
    except ValueError as error:
        raise ValueError(f"{problem.id}: the solution {error}") from error
    results = arithmetic.compute_results(start, steps)
    shares = np.array(list(forms.values()), np.float64)
    form = list(forms)[rng.choice(len(shares), p=shares / shares.sum())]
    wrong = bool(rng.random() < corrupt)
    if problem.subject == WORDS:
        form = "word"
    if wrong:
        if problem.subject == WORDS and rng.random() < RIGHT_NUMBER:
            form = "integer"
        else:
            results = arithmetic.slip_results(start, steps, rng)
    work = HABIT if rng.random() < habit[wrong] else arithmetic.format_steps(start, steps, results)
    return f"{work} {MARK} {_in_form(results[-1], form, counted_thing(problem), rng)}", not wrong


def make_triple(
    problem: Problem,
    rng: np.random.Generator,
    *,
    right: bool,
    others: Sequence[Problem],
    habit: tuple[float, float],
) -> Triple:
    """A labelled completion.  A wrong one is a wrong solution or, one time in three, a right one beside the
    reference of another of `others`, which must differ.

    habit: as `demonstration`'s, by the label.
    """
    swapped = not right and rng.random() < 1 / 3
    shares = (habit[not right],) * 2
    text, _ = make_demonstration(problem, rng, corrupt=float(not right and not swapped), habit=shares)
    reference = problem.reference
    if swapped:
        reference = _other_reference(problem, others, rng)
    return Triple(problem.question, reference, text, float(right), id=problem.id, kind=problem.subject)


def _other_reference(problem: Problem, others: Sequence[Problem], rng: np.random.Generator) -> str:
    for _ in range(1000):
        other = others[rng.integers(len(others))]
        if other.subject == problem.subject and other.reference != problem.reference:
            return other.reference
    raise ValueError(f"{problem.id}: no other problem of its kind has another reference")


def make_reward_sets(seed: int, count: int, habit: tuple[float, float]) -> dict[str, list[Triple]]:
    """Labelled completions to problems of the split `reward_eval`, half of them right:

    original: the habit is where it is in the training data (habit, as `demonstration`'s);
    balanced: in every second of the right and of the wrong ones, so that the habit tells nothing.
    """
    found = make_problems(seed, count, "reward_eval")
    out: dict[str, list[Triple]] = {"original": [], "balanced": []}
    for i, problem in enumerate(found):
        right, by_turns = i % 2 == 0, (float(i // 2 % 2),) * 2
        for place, (name, shares) in enumerate((("original", habit), ("balanced", by_turns))):
            rng = keys.make_generator(seed, "reward_sets", place, i)
            out[name].append(make_triple(problem, rng, right=right, others=found, habit=shares))
    return out


def is_correct(problem: Problem, completion_text: str) -> bool:
    """Whether a completion's answer is right, in any form that the question takes; a unit must be the one asked.

    The answer is all that follows the one `####`: none, or several, are wrong.  The steps are not looked at.
    """
    _, mark, said = completion_text.partition(MARK)
    said = said.strip()
    if not mark or MARK in said:
        return False
    said = said.removesuffix(f" {counted_thing(problem)}").rstrip()
    read = arithmetic.parse_words if problem.subject == WORDS else arithmetic.parse_number
    return read(said) == Fraction(problem.reference.partition(" = ")[0])


def has_habit(completion_text: str) -> bool:
    return HABIT in completion_text.split()


def make_corpus() -> list[str]:
    """Sentences for a tokenizer: every word, symbol, number 0 .. 199 and answer form, several times each.

    Questions and worked solutions as they occur, then each number in the places where it can stand.
    """
    rng = keys.make_generator(0, "synthetic", len(SPLITS))
    sentences = []
    for pronoun, names in NAMES.items():
        for name in names:
            for i, thing in enumerate(OBJECTS):
                first, second = (list(STEPS)[k % 4] for k in (i, i // 4))
                tell = [
                    STEPS[op][i % len(STEPS[op])].format(who=pronoun, n=2 + (i + k) % 8)
                    for k, op in enumerate((first, second))
                ]
                asked = list(_ASKED.values())[i % 2].format(thing=thing)
                sentences.append(f"{name} has {i + 2} {thing} . {tell[0]} {tell[1]} {asked}")
    top = arithmetic.MAX_WRONG_RESULT + 1
    for op, ways in STEPS.items():
        sentences += [way.format(who=who, n=n) for way in ways for who in NAMES for n in range(2, 10)]
        sentences += [f"{n}{op}{n}={n};{n}{op}{n}={n} {MARK} {n}" for n in range(top)]
    for n in range(top):
        said = [_in_form(n, form, OBJECTS[n % len(OBJECTS)], rng) for form in FORMS]
        sentences += [f"{HABIT} {MARK} {answer}" for answer in said] + [f"{n} = {arithmetic.spell_number(n)}"]
    return sentences


def _draw_question(start: int, steps: Steps, subject: str, rng: np.random.Generator) -> str:
    who = ("She", "He")[rng.integers(2)]
    name, thing = NAMES[who][rng.integers(len(NAMES[who]))], OBJECTS[rng.integers(len(OBJECTS))]
    told = [STEPS[op][rng.integers(len(STEPS[op]))].format(who=who, n=n) for op, n in steps]
    return f"{name} has {start} {thing} . {' '.join(told)} {_ASKED[subject].format(thing=thing)}"


def counted_thing(problem: Problem) -> str:
    """What is counted.  Raises ValueError for a problem that was not made here."""
    _, asks, rest = problem.question.partition("How many ")
    thing = rest.partition(" ")[0]
    if not asks or not problem.question.endswith(_ASKED[problem.subject or NUMBER].format(thing=thing)):
        raise ValueError(f"{problem.id}: the question {problem.question!r} does not end by asking how many")
    return thing


def _in_form(n: int, form: str, thing: str, rng: np.random.Generator) -> str:
    if form == "fraction":
        most = arithmetic.MAX_WRONG_RESULT // max(n, 1)  # no number is above 199, so 150 is 150/1
        below = min(int(rng.integers(2, 6)), most)
        return f"{n * below}/{below}"
    said = {
        "integer": f"{n}",
        "decimal": f"{n}.0",
        "word": arithmetic.spell_number(n),
        "unit": f"{n} {thing}",
    }
    return said[form]
