"""The text on which tokenizers for models from scratch are trained, where problems come from a file."""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.types import Problem

PROBLEMS = 20_000  # problems whose text is used, at most


def make_task_corpus(problems: Sequence[Problem], instruction: str) -> list[str]:
    """Questions, references and solutions of at most PROBLEMS of the problems, and the prompt's instruction.

    The problems are spread over the whole file, since files are often sorted.
    """
    texts = [instruction] if instruction else []
    for problem in problems[:: max(1, -(-len(problems) // PROBLEMS))]:
        # Joined by spaces: a model that has seen no space would lose them.
        texts.append(" ".join([problem.question, problem.reference, problem.solution]))
    return texts
