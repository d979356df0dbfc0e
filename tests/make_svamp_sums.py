"""Easy problems of real text for docs/results.md: SVAMP's single additions and subtractions, with worked solutions.

    python tests/make_svamp_sums.py SVAMP.jsonl OUT

Writes OUT/imitate.jsonl (260 problems, for the supervised phase), OUT/train.jsonl (219) and OUT/eval.jsonl (64).
A line holds a question, an answer and a solution, `703 - 246 = 457. The answer is \\boxed{457}.`
"""

import json
import sys
from pathlib import Path

PARTS = {"imitate": 260, "train": 219, "eval": 64}
TYPES, OPERATORS = ("Addition", "Subtraction"), ("+", "-")


def main(source: str, out: str) -> None:
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    made = list({row["question"]: row for row in map(problem, rows) if row}.values())
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, count in PARTS.items():
        part, made = made[:count], made[count:]
        if len(part) < count:
            sys.exit(f"{source}: {len(part)} problems are left for {name}, which needs {count}")
        text = "".join(json.dumps(row) + "\n" for row in part)
        (Path(out) / f"{name}.jsonl").write_text(text)


def problem(row: dict) -> dict | None:
    """None where it takes more than one step, another operator, or numbers that are not whole."""
    words = row["Equation"].strip("( )").split()
    if row["Type"] not in TYPES or len(words) != 3 or words[1] not in OPERATORS:
        return None
    numbers = [float(x) for x in (words[0], words[2], row["Answer"])]
    if any(x % 1 for x in numbers):
        return None
    a, b, answer = map(int, numbers)
    question = f"{row['Body'].strip().rstrip('.')}. {row['Question'].strip()}"
    solution = f"{a} {words[1]} {b} = {answer}. The answer is \\boxed{{{answer}}}."
    return {"question": question, "answer": str(answer), "solution": solution}


if __name__ == "__main__":
    main(*sys.argv[1:])
