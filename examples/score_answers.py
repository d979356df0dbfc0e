"""Scores answers with a trained reward model.

    python examples/score_answers.py VERIFYRM

VERIFYRM is a directory of launch/export.py, a *ForSequenceClassification directory, a hub id, or a run directory.
"""

import sys

import numpy as np

import cooper_jax

QUESTION = "Tom has 14 apples and buys 6 more. How many apples has he?"
COMPLETIONS = [
    "He has 14 + 6 = 20 apples. The answer is 20.",
    "He has 14 + 6 = 21 apples. The answer is 21.",
]


def main(weights: str) -> np.ndarray:
    """Print and return the probability that each completion is correct."""
    model = cooper_jax.VerifyRM.load(weights)
    scores = model.score(
        questions=[QUESTION] * len(COMPLETIONS),
        references=["20"] * len(COMPLETIONS),
        completions=COMPLETIONS,
    )
    for completion, score in zip(COMPLETIONS, scores, strict=True):
        print(f"{score:.3f}  {completion}")
    return scores


if __name__ == "__main__":
    main(sys.argv[1])
