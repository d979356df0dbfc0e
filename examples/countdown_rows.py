"""Countdown's problems, and labelled completions for the reward model (examples/countdown.py)."""

import functools
import operator
import random
import zlib

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def draw_expression(draw, numbers):
    """A random expression of three numbers in their order, and its value."""
    a, b, c = numbers
    (first, compute_first), (second, compute_second) = draw.choices(list(OPERATORS.items()), k=2)
    if draw.random() < 0.5:
        return f"({a}{first}{b}){second}{c}", compute_second(compute_first(a, b), c)
    return f"{a}{first}({b}{second}{c})", compute_first(a, compute_second(b, c))


def draw_problems(seed, count, held_out=False):
    """Yield problems; one in ten sets of numbers with a target is held out."""
    draw = random.Random(seed)
    while count:
        numbers = [draw.randint(1, 12) for _ in range(3)]
        solution, target = draw_expression(draw, numbers)
        is_held_out = zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 10 == 0
        if 1 <= target <= 99 and is_held_out == held_out:
            count -= 1
            question = f"{' '.join(map(str, draw.sample(numbers, 3)))} make {target} :"
            yield {"question": question, "answer": str(target), "solution": solution, "numbers": numbers}


def labelled_rows():
    """Yield each solution as right, and another expression of its numbers as wrong."""
    draw = random.Random(3)
    for row in draw_problems(seed=4, count=8192):
        text, value = draw_expression(draw, draw.sample(row["numbers"], 3))
        if value != int(row["answer"]):
            for label, completion in ((1, row["solution"]), (0, text)):
                yield {
                    "question": row["question"],
                    "reference_answer": row["answer"],
                    "completion": completion,
                    "label": label,
                }


train_rows = functools.partial(draw_problems, seed=1, count=8192)
eval_rows = functools.partial(draw_problems, seed=2, count=512, held_out=True)
