"""Labelled completions for countdown's reward model (examples/countdown.py)."""

import random
import runpy
from pathlib import Path

# A file that a flag names imports installed packages only, so its neighbours are run.
FOLDER = Path(__file__).parent
PROBLEMS = runpy.run_path(str(FOLDER / "countdown_rows.py"))
JUDGE = runpy.run_path(str(FOLDER / "countdown_judge.py"))


def draw_attempt(draw, row):
    """Steps as a policy writes them: right ones, or others that claim the target; often one character is wrong."""
    found = PROBLEMS["draw_solution"](draw, row["numbers"]) if draw.random() < 0.5 else None
    steps = found[0] if found else row["solution"]
    if draw.random() < 0.5:
        steps = steps[:-1] + row["answer"]
    if draw.random() < 0.7:
        place = draw.choice([i for i, sign in enumerate(steps) if sign not in "= "])
        others = "123456789" if steps[place].isdigit() else "+-*"
        steps = steps[:place] + draw.choice(others) + steps[place + 1 :]
    return steps


def labelled_rows():
    """Yield the solution of each problem with label 1, and a wrong attempt with label 0.

    Problems of one step teach the reward model arithmetic, which it learns from longer ones only slowly.
    """
    draw = random.Random(3)
    for row in PROBLEMS["draw_problems"](seed=4, count=32768, sizes=(2, 3)):
        wrong = row["solution"]
        while JUDGE["judge"](row["answer"], wrong, row["numbers"]):
            wrong = draw_attempt(draw, row)
        for label, completion in ((1, row["solution"]), (0, wrong)):
            columns = {"question": row["question"], "reference_answer": row["answer"]}
            yield columns | {"completion": completion, "label": label}
