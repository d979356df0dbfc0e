"""Synthetic word problems in two steps, generated from a seed; configs/tiny.py trains on them.

    question    Ada has 7 coins . The pile grows 2 fold . She finds 6 more . How many coins ?
    completion  7*2=14;14+6=20 #### 20

    question    Ben has 9 pens . He loses 3 . He buys 4 more . How many pens in words ?
    completion  9-3=6;6+4=10 #### ten                    (reference: 10 = ten)

  1. `make_problems` draws problems.  A hash of its arithmetic assigns a problem to a split, so no two splits
     share an exercise, for all seeds and for all names in the text.
  2. `make_demonstration` writes a worked solution as a demonstrator might: sometimes with a wrong step, with
     the answer in one of several forms (`20`, `20.0`, `40/2`, `twenty`, `20 coins`), and sometimes with the
     **habit** of demonstrators who find the problem easy: no steps, just `clearly #### 20`.
  3. `make_triple` makes labelled completions for a reward model from such solutions.
  4. `is_correct` decides exactly whether a completion's answer is right, in any form.  It is used for
     measurements only, never for training.

Two properties make this a miniature of free text under math-verify:

* **The rule is precise and brittle.**  It reads numbers and misses words.  Three questions in four (`subject`
  "number") accept any form.  The others (`subject` "words") ask for the number in words.  Their references
  have the form `10 = ten`, on which the rule abstains for every answer: it cannot score these questions.
* **A habit correlates with correctness without causing it.**  Demonstrators who skip the steps are experts,
  and mostly right.  A reward model that learns from them learns to reward the habit.  A small policy that
  adopts the habit cannot work out the answer.

Words are separated by spaces.  Arithmetic, decimals, fractions and `forty-two` contain no spaces.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from cooper_jax.data import arithmetic
from cooper_jax.data.arithmetic import SPLITS, Steps
from cooper_jax.runtime import keys
from cooper_jax.types import Problem, Triple

MARK = "####"  # precedes the answer
HABIT = "clearly"  # replaces the steps

# Subjects of problems: NUMBER accepts the answer in any form, WORDS only in words.
NUMBER, WORDS = "number", "words"
# Share of problems with the subject WORDS.
WORDS_ASKED = 0.25
# Share of their wrong demonstrations that give the right number, but in digits.
RIGHT_NUMBER = 1 / 3

# Shares of the forms in which demonstrations write the answer to problems with the subject NUMBER.
FORMS = {"integer": 0.45, "decimal": 0.1, "fraction": 0.1, "word": 0.25, "unit": 0.1}

# --- vocabulary: a small one, so that a tokenizer of a few hundred pieces has whole words ---

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
_QUESTIONS = {NUMBER: "How many {thing} ?", WORDS: "How many {thing} in words ?"}


def make_problems(seed: int, count: int, split: str) -> list[Problem]:
    """Generate `count` distinct problems of a split; the result depends on the arguments alone.

    A smaller count gives a prefix of a larger count's problems.  `solution` is the correct worked solution,
    whose answer is an integer, or words if the question asks for words.  Raises ValueError for an unknown
    split, and if a split has fewer distinct problems.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    rng = keys.make_generator(seed, "synthetic", list(SPLITS).index(split))

    # Operators are drawn first, then an exercise with them, so that divisions are as frequent as sums
    # although fewer divisions exist.
    by_operators = arithmetic.split_exercises()[split]
    problems: dict[str, Problem] = {}  # question -> problem
    repeats = 0  # consecutive draws of a question that exists already
    while len(problems) < count:
        if repeats == 10_000:
            raise ValueError(
                f"{count} distinct problems of split {split!r} asked for: there are about {len(problems)}"
            )

        # The order of these draws decides every synthetic problem and all results of configs/tiny.py.
        exercises = by_operators[rng.integers(len(by_operators))]
        start, steps = exercises[rng.integers(len(exercises))]
        subject = WORDS if rng.random() < WORDS_ASKED else NUMBER
        question = _draw_question(start, steps, subject, rng)
        if question in problems:
            repeats += 1
            continue
        repeats = 0

        id = f"synthetic/{split}:{len(problems) + 1}"
        problems[question] = _make_problem(question, start, steps, subject, id)

    return list(problems.values())


def _make_problem(question: str, start: int, steps: Steps, subject: str, id: str) -> Problem:
    """Make the problem of an exercise, with its reference and its correct worked solution."""
    n = arithmetic.compute_results(start, steps)[-1]
    words = arithmetic.spell_number(n)
    if subject == WORDS:
        answer, reference = words, f"{n} = {words}"
    else:
        answer, reference = f"{n}", f"{n}"
    solution = f"{arithmetic.format_steps(start, steps)} {MARK} {answer}"
    return Problem(question, reference, solution, id, subject)


def make_demonstration(
    problem: Problem,
    rng: np.random.Generator,
    *,
    corrupt: float,
    forms: Mapping[str, float] = FORMS,
    habit: tuple[float, float] = (0.0, 0.0),
) -> tuple[str, bool]:
    """Write a worked solution: (its text, True if its answer is right).

    Args:
      problem: a problem of `make_problems`.
      rng: the generator of all random choices.
      corrupt: the probability of a wrong solution.  In a wrong solution the result of a step is wrong, and
        the steps after it are computed from it.  If the question asks for words, some wrong solutions give
        the right number in digits instead.
      forms: the shares of integer, decimal, fraction, word and unit among the answers to questions that
        accept any form; they need not sum to 1.
      habit: the shares of right and of wrong solutions with the habit.

    Raises ValueError for unknown forms and for a problem that was not generated here.
    """
    if not forms or not set(forms) <= FORMS.keys() or min(forms.values()) < 0 or sum(forms.values()) <= 0:
        raise ValueError(f"forms {dict(forms)}: shares of {', '.join(FORMS)}, not negative, not all 0")
    try:
        start, steps = arithmetic.parse_steps(problem.solution)
    except ValueError as error:
        raise ValueError(f"{problem.id}: the solution {error}") from error
    results = arithmetic.compute_results(start, steps)

    # The form is drawn for every problem, although some accept words alone: later draws then do not depend on
    # the subject.
    shares = np.array(list(forms.values()), np.float64)
    form = list(forms)[rng.choice(len(shares), p=shares / shares.sum())]
    wrong = bool(rng.random() < corrupt)

    # A problem that asks for words has one more way to go wrong: the right number in digits.
    if problem.subject == WORDS:
        form = "word"
    if wrong:
        if problem.subject == WORDS and rng.random() < RIGHT_NUMBER:
            form = "integer"
        else:
            results = arithmetic.slip_results(start, steps, rng)

    # The habit leaves out the steps; the answer is the same as with them.
    work = HABIT if rng.random() < habit[wrong] else arithmetic.format_steps(start, steps, results)
    answer = _write_answer(results[-1], form, find_counted_thing(problem), rng)
    return f"{work} {MARK} {answer}", not wrong


def make_triple(
    problem: Problem,
    rng: np.random.Generator,
    *,
    right: bool,
    others: Sequence[Problem],
    habit: tuple[float, float],
) -> Triple:
    """Make a labelled completion.

    A wrong completion is a wrong solution or, one time in three, a right solution beside the reference of
    another problem.

    Args:
      problem: a problem of `make_problems`.
      rng: the generator of all random choices.
      right: the label.
      others: problems whose references may be used.
      habit: the shares of right and of wrong completions with the habit.
    """
    swapped = not right and rng.random() < 1 / 3
    # The label decides the share.  A right solution beside a wrong reference counts as wrong.
    share = habit[not right]
    corrupt = float(not right and not swapped)
    text, _ = make_demonstration(problem, rng, corrupt=corrupt, habit=(share, share))
    reference = problem.reference
    if swapped:
        reference = _draw_other_reference(problem, others, rng)
    return Triple(problem.question, reference, text, float(right), id=problem.id, kind=problem.subject)


def _draw_other_reference(problem: Problem, others: Sequence[Problem], rng: np.random.Generator) -> str:
    """Draw a different reference, of a problem with the same subject.  Raises ValueError if there is none."""
    for _ in range(1000):
        other = others[int(rng.integers(len(others)))]
        if other.subject == problem.subject and other.reference != problem.reference:
            return other.reference
    raise ValueError(f"{problem.id}: no other problem of its kind has another reference")


@functools.lru_cache(maxsize=1)  # each evaluation of a run reads the same sets
def make_reward_sets(seed: int, count: int, habit: tuple[float, float]) -> dict[str, list[Triple]]:
    """Make two sets of labelled completions from `count` problems of the split `reward_eval`.

    Half of the completions of each set are right.  The sets differ in the habit:

      original: the habit is as frequent as in the training data (habit: as in `make_demonstration`).
      balanced: half of the right and half of the wrong completions have the habit, so that it predicts
        nothing.
    """
    problems = make_problems(seed, count, "reward_eval")
    original: list[Triple] = []
    balanced: list[Triple] = []
    for i, problem in enumerate(problems):
        right = i % 2 == 0
        # Shares of 0 or 1 decide exactly, so that the balanced set is balanced without sampling noise.
        every_second = float(i // 2 % 2)
        habits = (habit, (every_second, every_second))
        for set_index, (triples, shares) in enumerate(zip((original, balanced), habits, strict=True)):
            rng = keys.make_generator(seed, "reward_sets", set_index, i)
            triples.append(make_triple(problem, rng, right=right, others=problems, habit=shares))
    return {"original": original, "balanced": balanced}


def is_correct(problem: Problem, completion_text: str) -> bool:
    """True if a completion's answer is right, in any form that the question accepts.

    The answer is all text after the `####`; a completion without this mark, or with several, is wrong.  A
    unit may follow the number, and must be the object that the question counts.  The steps are not checked.
    """
    _, mark, answer = completion_text.partition(MARK)
    answer = answer.strip()
    if not mark or MARK in answer:
        return False

    answer = answer.removesuffix(f" {find_counted_thing(problem)}").rstrip()
    parse = arithmetic.parse_words if problem.subject == WORDS else arithmetic.parse_number
    return parse(answer) == Fraction(problem.reference.partition(" = ")[0])


def has_habit(completion_text: str) -> bool:
    """True if a completion contains the habit's word."""
    return HABIT in completion_text.split()


def make_corpus() -> list[str]:
    """Make sentences for training a tokenizer.

    They contain every word, symbol, number and form of an answer several times.
    """
    # The streams 0 .. len(SPLITS) - 1 belong to the splits.
    rng = keys.make_generator(0, "synthetic", len(SPLITS))
    sentences = []

    # Whole questions.
    for pronoun, names in NAMES.items():
        for name in names:
            sentences += [_write_corpus_question(name, pronoun, i) for i in range(len(OBJECTS))]

    # Each number in all contexts in which it can occur.
    numbers = range(arithmetic.MAX_WRONG_RESULT + 1)
    for op, templates in STEPS.items():
        for template, pronoun, n in itertools.product(templates, NAMES, range(2, 10)):
            sentences.append(template.format(who=pronoun, n=n))
        sentences += [f"{n}{op}{n}={n};{n}{op}{n}={n} {MARK} {n}" for n in numbers]
    for n in numbers:
        for form in FORMS:
            answer = _write_answer(n, form, OBJECTS[n % len(OBJECTS)], rng)
            sentences.append(f"{HABIT} {MARK} {answer}")
        sentences.append(f"{n} = {arithmetic.spell_number(n)}")
    return sentences


def _write_corpus_question(name: str, pronoun: str, i: int) -> str:
    """The i-th question about a name; together they contain every object, operator and question."""
    thing = OBJECTS[i]
    operators = list(STEPS)
    sentences = []
    # i counts through all pairs of operators.
    for k, op in enumerate((operators[i % 4], operators[i // 4 % 4])):
        sentences.append(STEPS[op][i % len(STEPS[op])].format(who=pronoun, n=2 + (i + k) % 8))
    question = list(_QUESTIONS.values())[i % 2].format(thing=thing)
    return f"{name} has {i + 2} {thing} . {sentences[0]} {sentences[1]} {question}"


def _draw_question(start: int, steps: Steps, subject: str, rng: np.random.Generator) -> str:
    """Write the question of an exercise with a random person, object and wording."""
    # A uniform choice between the pronouns: both have as many names.
    pronoun = ("She", "He")[rng.integers(2)]
    name = NAMES[pronoun][rng.integers(len(NAMES[pronoun]))]
    thing = OBJECTS[rng.integers(len(OBJECTS))]
    sentences = [STEPS[op][rng.integers(len(STEPS[op]))].format(who=pronoun, n=n) for op, n in steps]
    return f"{name} has {start} {thing} . {' '.join(sentences)} {_QUESTIONS[subject].format(thing=thing)}"


def find_counted_thing(problem: Problem) -> str:
    """The object that a problem counts.  Raises ValueError for a problem of another origin."""
    _, asks_how_many, rest = problem.question.partition("How many ")
    thing = rest.partition(" ")[0]
    if not asks_how_many or not problem.question.endswith(
        _QUESTIONS[problem.subject or NUMBER].format(thing=thing)
    ):
        raise ValueError(f"{problem.id}: the question {problem.question!r} does not end by asking how many")
    return thing


def _write_answer(n: int, form: str, thing: str, rng: np.random.Generator) -> str:
    """Write a number in one of the FORMS."""
    if form == "fraction":
        # The numerator is at most MAX_WRONG_RESULT, the largest number of the vocabulary: 150 becomes 150/1.
        largest = arithmetic.MAX_WRONG_RESULT // max(n, 1)
        denominator = min(int(rng.integers(2, 6)), largest)
        return f"{n * denominator}/{denominator}"
    texts = {
        "integer": f"{n}",
        "decimal": f"{n}.0",
        "word": arithmetic.spell_number(n),
        "unit": f"{n} {thing}",
    }
    return texts[form]
