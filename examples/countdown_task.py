"""Countdown: make a target from three numbers.  Rows of the task, and a program that decides."""

import ast
import operator
import random
import zlib

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
FORMS = ("{0}{3}{1}{4}{2}", "({0}{3}{1}){4}{2}", "{0}{3}({1}{4}{2})")


def compute(text: str) -> tuple[int, list[int]]:
    """An expression's value and its numbers.  Raises ValueError or SyntaxError for anything but arithmetic."""
    numbers = []

    def visit(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return node.value
        raise ValueError("an expression has numbers, +, -, * and parentheses")

    return visit(ast.parse(text.strip(), mode="eval").body), numbers


def judge(reference: str, completion: str, numbers: list[int]) -> bool:
    """True if the completion uses each number once and makes the target."""
    try:
        value, used = compute(completion)
    except (ValueError, SyntaxError):
        return False
    return value == int(reference) and sorted(used) == sorted(numbers)


def draw_rows(seed: int, count: int, held_out: bool = False):
    """Rows whose solutions are drawn at random; one in ten sets of numbers with a target is held out."""
    draw = random.Random(seed)
    while count:
        numbers = [draw.randint(1, 15) for _ in range(3)]
        solution = draw.choice(FORMS).format(*numbers, *draw.choices("+-*", k=2))
        target = compute(solution)[0]
        is_held_out = zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 10 == 0
        if 1 <= target <= 99 and is_held_out == held_out:
            count -= 1
            question = f"{' '.join(map(str, draw.sample(numbers, 3)))} make {target} :"
            yield {"question": question, "answer": str(target), "solution": solution, "numbers": numbers}


def train_rows():
    return draw_rows(seed=1, count=8192)


def eval_rows():
    return draw_rows(seed=2, count=512, held_out=True)


def labelled_rows():
    """For a reward model: each solution, and another expression of its numbers that misses the target."""
    draw = random.Random(3)
    for row in draw_rows(seed=3, count=16384):
        texts = [row["solution"]]
        while len(texts) < 2:
            text = draw.choice(FORMS).format(*draw.sample(row["numbers"], 3), *draw.choices("+-*", k=2))
            if not judge(row["answer"], text, row["numbers"]):
                texts.append(text)
        for label, text in zip((1, 0), texts, strict=True):
            yield {
                "question": row["question"],
                "reference_answer": row["answer"],
                "completion": text,
                "label": label,
            }
