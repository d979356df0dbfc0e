"""Trains a tiny policy and its reward model for a few steps, and uses both.

    python examples/train_from_python.py

It needs neither data nor weights, and takes about two minutes on two CPU cores.
"""

from collections.abc import Mapping
from typing import Any

import cooper_jax
from cooper_jax.data.synthetic import make_problems

# Fields of configs/base.py, as flags would set them.
SETTINGS = {
    "run_dir": "runs/from_python",
    "steps": 8,
    "supervised.policy_steps": 300,
    "supervised.reward_steps": 300,
    "reward.warmup_updates": 2,
    "eval.every": 0,
}


def main(settings: Mapping[str, Any] = SETTINGS) -> cooper_jax.Result:
    """Train or resume, sample four answers to a new problem, and score them."""
    result = cooper_jax.train("tiny", settings)
    for row in result.metrics:
        print(f"step {row['step']}: {row['rule/accuracy']:.0%} of the responses are correct")

    (problem,) = make_problems(seed=1, count=1, split="eval")
    (samples,) = result.policy.generate([f"{problem.question}\n"], n=4, max_new_tokens=32)
    scores = result.reward_model.score(
        [problem.question] * 4, [problem.reference] * 4, [sample.text for sample in samples]
    )
    print(f"{problem.question} (reference: {problem.reference})")
    for sample, score in zip(samples, scores, strict=True):
        print(f"  {score:.3f}  {sample.text}")
    return result


if __name__ == "__main__":
    main()
