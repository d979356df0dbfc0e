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
    c.steps = 60

    c.data.format = c.data.eval_format = "jsonl"
    c.data.train = f"{FOLDER}/countdown_rows.py:train_rows"
    c.data.eval = f"{FOLDER}/countdown_rows.py:eval_rows"
    c.data.solution_key = "solution"
    c.data.bucket = 8
    c.rule.judge = f"{FOLDER}/countdown_judge.py:judge"
    c.rollout.max_new_tokens = 16
    c.policy.optimiser.lr = 4e-4
    c.reward.max_tokens = 64
    c.assistant.kind = f"{FOLDER}/rewriter.py:Rewriter"

    # Pairs, and the verifier's verdicts on rollouts; `own_answer` pairs need responses that mark an answer.
    c.reward.recipe = ""
    c.reward.pair_loss, c.reward.pair_bce, c.reward.rollout_bce = "sigmoid", 1.0, 1.0
    c.reward.updates = 2
    c.reward.warmup_updates = 100
    c.pairs.per_prompt, c.pairs.negatives = 2, ("assistant", "swap")

    # Before step 1 the policy imitates solutions, and the reward model learns from labelled steps.
    c.supervised.policy_steps = 400
    c.supervised.policy_batch = c.supervised.reward_batch = 32
    c.supervised.reward_steps = 4000
    c.supervised.reward_data = f"{FOLDER}/countdown_rows.py:labelled_rows"
    c.supervised.reward_optimiser.decay = "cosine"
    c.supervised.policy_corrupt, c.supervised.policy_habit, c.supervised.reward_habit = 0.0, (0, 0), (0, 0)

    c.eval.problems, c.eval.samples, c.eval.reward_rows, c.eval.greedy = 512, 2, 0, False
    return c
