"""Labelled completions for countdown's reward model (examples/countdown.py)."""

import random
import runpy
from pathlib import Path

# A file that a flag names imports installed packages only, so its neighbour is run.
PROBLEMS = runpy.run_path(str(Path(__file__).with_name("countdown_rows.py")))


def exchange_digit(draw, text):
    """A solution in which one digit is another one, so that a step is false."""
    place = draw.choice([i for i, sign in enumerate(text) if sign.isdigit()])
    return text[:place] + draw.choice("123456789".replace(text[place], "")) + text[place + 1 :]


def miss_target(draw, numbers, target):
    """Steps with other numbers or to another result, half of which claim the target: the mistakes of a policy."""
    while True:
        used = [draw.choice([n, n, n, draw.randint(1, 9)]) for n in numbers]
        steps, result = PROBLEMS["draw_solution"](draw, used) or ("", 0)
        if steps and (sorted(used) != sorted(numbers) or str(result) != target):
            return steps[:-1] + draw.choice([str(result), target])


def labelled_rows():
    """Yield the solution of each problem with label 1, and a mistake with label 0.

    Problems of one step teach the reward model arithmetic, which it learns from longer ones only slowly.
    """
    draw = random.Random(3)
    for row in PROBLEMS["draw_problems"](seed=4, count=32768, sizes=(2, 3)):
        mistakes = exchange_digit(draw, row["solution"]), miss_target(draw, row["numbers"], row["answer"])
        for label, completion in ((1, row["solution"]), (0, draw.choice(mistakes))):
            columns = {"question": row["question"], "reference_answer": row["answer"]}
            yield columns | {"completion": completion, "label": label}
