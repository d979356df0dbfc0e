"""Trains a tiny policy and its reward model for a few steps, and uses both.

    python examples/train_from_python.py

It needs neither data nor weights, and takes about two minutes on two CPU cores.
"""

import cooper_jax
from cooper_jax.data.synthetic import make_problems

# Fields of configs/base.py, as flags would set them.
SETTINGS = {
    "run_dir": "runs/from_python",
    "steps": 8,
    "supervised.policy_steps": 300,
    "supervised.reward_steps": 300,
    "reward.warmup_updates": 2,
    "reward.function_weights": "1,0.1",
    "eval.every": 0,
}


def brevity(completion_lengths, **kwargs):
    """A second reward: 1 for an empty response, 0 for one of 32 tokens."""
    return [1 - length / 32 for length in completion_lengths]


def main(settings=SETTINGS):
    """Train or resume, sample four answers to a new problem, and score them."""
    result = cooper_jax.train("tiny", settings, reward_functions=["model", brevity])
    for row in result.metrics:
        print(f"step {row['step']}: {row['rule/accuracy']:.0%} correct, brevity {row['reward/brevity']:.2f}")

    (problem,) = make_problems(seed=1, count=1, split="eval")
    (samples,) = result.policy.generate([f"{problem.question}\n"], n=4, max_new_tokens=32)
    texts = [sample.text for sample in samples]
    scores = result.reward_model.score([problem.question] * 4, [problem.reference] * 4, texts)
    print(f"{problem.question} (reference: {problem.reference})")
    for text, score in zip(texts, scores, strict=True):
        print(f"  {score:.3f}  {text}")
    return result


if __name__ == "__main__":
    main()
