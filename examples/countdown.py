"""Countdown from scratch on a CPU: the verifier is a program, and the policy a small transformer.

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
    c.data.bucket = 8
    c.rule.judge = f"{TASK}:judge"
    c.rollout.max_new_tokens = 12
    c.reward.max_tokens = 64
    c.assistant.kind = f"{TASK.with_name('rewriter.py')}:Rewriter"

    # Before step 1 the policy imitates solutions, and the reward model learns from labelled expressions.
    c.supervised.policy_steps = 800
    c.supervised.policy_batch = c.supervised.reward_batch = 32
    c.supervised.reward_steps = 2000
    c.supervised.reward_data = f"{TASK}:labelled_rows"
    c.supervised.policy_corrupt, c.supervised.policy_habit, c.supervised.reward_habit = 0.0, (0, 0), (0, 0)

    c.eval.problems, c.eval.samples, c.eval.reward_rows, c.eval.greedy = 512, 2, 0, False
    return c
