"""Countdown's problems (examples/countdown.py)."""

import functools
import random
import zlib


def draw_solution(draw, numbers):
    """Steps that combine random numbers two at a time, and the last result; None unless all are from 1 to 9."""
    steps, left = [], list(numbers)
    while len(left) > 1:
        a, b, *left = draw.sample(left, len(left))
        sign, result = draw.choice([("+", a + b), ("-", a - b), ("*", a * b)])
        if not 1 <= result <= 9:
            return None
        steps.append(f"{a}{sign}{b}={result}")
        left.append(result)
    return " ".join(steps), left[0]


def draw_problems(seed, count, held_out=False, sizes=(3,)):
    """Yield problems with as many numbers as `sizes` says in turn.

    A quarter of the exercises (numbers in any order, and a target) is held out; no held-out question comes twice.
    """
    draw, seen = random.Random(seed), set()
    while count:
        numbers = [draw.randint(1, 9) for _ in range(sizes[count % len(sizes)])]
        solution, target = draw_solution(draw, numbers) or ("", 0)
        is_held_out = zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 4 == 0
        question = f"{' '.join(map(str, numbers))} make {target} :"
        if solution and is_held_out == held_out and not (held_out and question in seen):
            count -= 1
            seen.add(question)
            yield {"question": question, "answer": str(target), "solution": solution, "numbers": numbers}


train_rows = functools.partial(draw_problems, seed=1, count=8192)
eval_rows = functools.partial(draw_problems, seed=2, count=512, held_out=True)
