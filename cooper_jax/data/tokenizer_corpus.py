"""The text on which tokenizers for models from scratch are trained, where problems come from a file."""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.data.policy_prompts import PromptStyle
from cooper_jax.types import Problem

PROBLEMS = 20_000  # problems whose text is used, at most


def make_task_corpus(problems: Sequence[Problem], style: PromptStyle) -> list[str]:
    """Prompts, references and solutions of at most PROBLEMS of the problems.

    style: of the policy's prompts; the instruction and the system message are part of the text.

    The problems are spread over the whole file, since files are often sorted.
    """
    texts = list(filter(None, (style.instruction, style.system)))
    for problem in problems[:: max(1, -(-len(problems) // PROBLEMS))]:
        # Joined by spaces: a model that has seen no space would lose them.
        messages = [content for _, content in problem.messages]
        texts.append(" ".join([*messages, problem.question, problem.reference, problem.solution]))
    return texts
