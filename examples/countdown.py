"""Countdown from scratch on a CPU: the verifier is a program (countdown_task.py), the policy a small transformer.

    python launch/study.py --config=examples/countdown.py --arms=rule --arm="cooper: reward.arm=cooper" \\
        --seeds=0-2 --jobs=2 --out=runs/countdown
"""

from pathlib import Path

from cooper_jax.configs import tiny

TASK = Path(__file__).with_name("countdown_task.py")


def get_config():
    c = tiny.get_config()
    c.name = "countdown"
    c.steps = 60

    c.data.format = c.data.eval_format = "jsonl"
    c.data.train, c.data.eval = f"{TASK}:train_rows", f"{TASK}:eval_rows"
    c.data.solution_key = "solution"
    c.rule.judge = f"{TASK}:judge"
    c.rollout.max_new_tokens = 16
    c.reward.max_tokens = 64
    c.assistant.kind = "corrupt"
    c.supervised.policy_steps, c.supervised.policy_batch = 600, 64
    c.supervised.reward_steps, c.supervised.reward_batch = 2000, 64
    c.supervised.reward_data = f"{TASK}:labelled_rows"
    c.supervised.policy_corrupt, c.supervised.policy_habit, c.supervised.reward_habit = (
        0.0,
        (0.0, 0.0),
        (0.0, 0.0),
    )
    c.eval.problems, c.eval.samples, c.eval.every, c.eval.reward_rows = 512, 2, 20, 0
    return c
