"""Countdown from scratch on a CPU: the verifier is a program, and the policy a small transformer.

    python launch/study.py --config=examples/countdown.py --arms=rule --arm="cooper: reward.arm=cooper" \\
        --seeds=0-2 --jobs=2 --out=runs/countdown
"""

from pathlib import Path

from cooper_jax.configs import tiny

FOLDER = Path(__file__).parent


def get_config():
    c = tiny.get_config()
    c.name = "countdown"
    c.steps = 80

    c.data.format = c.data.eval_format = "jsonl"
    c.data.train = f"{FOLDER}/countdown_rows.py:train_rows"
    c.data.eval = f"{FOLDER}/countdown_rows.py:eval_rows"
    c.data.solution_key = "solution"
    c.data.bucket = 8
    c.rule.judge = f"{FOLDER}/countdown_judge.py:judge"
    c.rollout.max_new_tokens = 16
    c.policy.optimiser.lr = 4e-4
    c.assistant.kind = f"{FOLDER}/rewriter.py:Rewriter"

    # Pairs, and the verifier's verdicts on rollouts of this step and of earlier ones.
    c.reward.recipe, c.reward.max_tokens, c.reward.optimiser.lr = "", 64, 2e-4
    c.reward.pair_loss, c.reward.pair_bce, c.reward.rollout_bce = "sigmoid", 1.0, 1.0
    c.reward.warmup_updates, c.reward.updates = 50, 2
    c.reward.replay, c.reward.replay_rows = 2048, 64

    # Before step 1 the policy imitates solutions, and the reward model learns from labelled ones.
    c.supervised.policy_steps, c.supervised.reward_steps = 400, 6000
    c.supervised.policy_batch = c.supervised.reward_batch = 32
    c.supervised.reward_data = f"{FOLDER}/countdown_labels.py:labelled_rows"
    c.supervised.reward_optimiser.decay = "cosine"
    c.supervised.policy_corrupt, c.supervised.policy_habit, c.supervised.reward_habit = 0.0, (0, 0), (0, 0)

    c.eval.problems, c.eval.samples, c.eval.reward_rows, c.eval.greedy = 512, 2, 0, False
    return c
