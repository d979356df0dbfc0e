"""Countdown: make a target from three numbers.  A program decides, and another one draws the rows."""

import ast
import functools
import operator
import random
import zlib

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
FORMS = ("{0}{3}{1}{4}{2}", "({0}{3}{1}){4}{2}", "{0}{3}({1}{4}{2})")


def compute(node, numbers):
    """The value of an expression of +, - and *; its numbers are appended.  ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](compute(node.left, numbers), compute(node.right, numbers))
    if not isinstance(node, ast.Constant) or type(node.value) is not int:
        raise ValueError("not an expression")
    numbers.append(node.value)
    return node.value


def judge(reference, completion, numbers):
    """True if the completion is an expression that uses each number once and makes the target."""
    used = []
    try:
        value = compute(ast.parse(completion.strip(), mode="eval").body, used)
    except (ValueError, SyntaxError):
        return False
    return value == int(reference) and sorted(used) == sorted(numbers)


def draw_rows(seed, count, held_out=False):
    """Every tenth set of numbers with a target is held out."""
    draw = random.Random(seed)
    while count:
        numbers = [draw.randint(1, 15) for _ in range(3)]
        text = draw.choice(FORMS).format(*numbers, *draw.choices("+-*", k=2))
        target = compute(ast.parse(text, mode="eval").body, [])
        is_held_out = zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 10 == 0
        if 1 <= target <= 99 and is_held_out == held_out:
            count -= 1
            question = f"{' '.join(map(str, draw.sample(numbers, 3)))} make {target} :"
            yield {"question": question, "answer": str(target), "solution": text, "numbers": numbers}


def labelled_rows():
    """Completions for a reward model: solutions, and other expressions of the same numbers."""
    draw = random.Random(4)
    for row in draw_rows(seed=3, count=16384):
        other = draw.choice(FORMS).format(*draw.sample(row["numbers"], 3), *draw.choices("+-*", k=2))
        for text in (row["solution"], other):
            label = judge(row["answer"], text, row["numbers"])
            yield {
                "question": row["question"],
                "reference_answer": row["answer"],
                "completion": text,
                "label": label,
            }


train_rows = functools.partial(draw_rows, seed=1, count=8192)
eval_rows = functools.partial(draw_rows, seed=2, count=512, held_out=True)
