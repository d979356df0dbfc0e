"""Countdown's problems, and labelled completions for the reward model (examples/countdown.py)."""

import functools
import operator
import random
import zlib

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def draw_solution(draw, numbers):
    """Steps that combine random numbers two at a time, and the last result; None unless all are from 1 to 9."""
    steps, left = [], list(numbers)
    while len(left) > 1:
        a, b, *left = draw.sample(left, len(left))
        sign = draw.choice(list(OPERATORS))
        left.append(OPERATORS[sign](a, b))
        if not 1 <= left[-1] <= 9:
            return None
        steps.append(f"{a}{sign}{b}={left[-1]}")
    return " ".join(steps), left[0]


def draw_problems(seed, count, held_out=False, sizes=(3,)):
    """Yield problems; one in ten sets of numbers with a target is held out."""
    draw = random.Random(seed)
    while count:
        numbers = [draw.randint(1, 9) for _ in range(sizes[count % len(sizes)])]
        solution, target = draw_solution(draw, numbers) or ("", 0)
        is_held_out = zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 10 == 0
        if solution and is_held_out == held_out:
            count -= 1
            question = f"{' '.join(map(str, numbers))} make {target} :"
            yield {"question": question, "answer": str(target), "solution": solution, "numbers": numbers}


def draw_mistake(draw, row):
    """The solution, or the steps from other numbers, with digits exchanged."""
    text = row["solution"]
    if draw.random() < 0.5:
        found = None
        while not found:
            found = draw_solution(draw, [draw.choice([n, n, n, draw.randint(1, 9)]) for n in row["numbers"]])
        text = found[0]
        if draw.random() < 0.7:
            text = text[:-1] + row["answer"]
    if draw.random() < 0.5:
      for place in draw.sample([i for i, sign in enumerate(text) if sign.isdigit()], draw.choice([1, 2])):
        text = text[:place] + str(draw.randint(1, 9)) + text[place + 1 :]
    return text


def labelled_rows():
    """Yield each solution with label 1, and a mistake with label 0."""
    import runpy; from pathlib import Path
    judge = runpy.run_path(str(Path(__file__).with_name("countdown_judge.py")))["judge"]
    draw = random.Random(3)
    for row in draw_problems(seed=4, count=32768, sizes=(2, 3)):
        wrong = draw_mistake(draw, row)
        while judge(row["answer"], wrong, row["numbers"]):
            wrong = draw_mistake(draw, row)
        for label, completion in ((1, row["solution"]), (0, wrong)):
            yield {**row, "reference_answer": row["answer"], "completion": completion, "label": label}


train_rows = functools.partial(draw_problems, seed=1, count=8192)
eval_rows = functools.partial(draw_problems, seed=2, count=512, held_out=True)
