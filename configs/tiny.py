"""A Cooper run from scratch on a laptop's CPU: two-step word arithmetic with a chain of thought.

    python launch/train.py --config=configs/tiny.py
    python launch/train.py --config=configs/tiny.py --config.reward.arm=rule --config.run_dir=runs/tiny_rule

The run takes 8 to 13 minutes on two CPU cores; held-out accuracy rises from 28 % to 71 % (seed 0, exact
truth).  It needs no data and no weights: problems are made from the seed, and a sentencepiece tokenizer is
trained on their words.  The policy first imitates demonstrations that are often wrong, and the reward model
is trained by binary cross-entropy on labelled demonstrations.

**Why the policy can hack the reward model.** The reward model learns from *other* demonstrators than the
policy.  The experts among them skip the steps and write `clearly #### 20`, and experts are mostly right: half
of the right and 5 % of the wrong solutions that the reward model sees have this form.  The reward model
therefore learns to score the habit high, as real reward models do with length, confidence and layout.  The
policy first has the habit in 10 % of its solutions, most of which are wrong, because it cannot find the
answer without the steps.  The labels contain no errors: among the demonstrators the habit does correlate with
correctness.  A solution with the habit ends with an answer, so a check for truncation does not stop the hack.
"""

from cooper_jax.configs import base


def get_config():
    c = base.get_config()
    c.name = "tiny"
    c.steps = 100

    # Problems of cooper_jax/data/synthetic.py; their words need neither an instruction nor a chat template.
    c.data.format = "synthetic"
    c.data.instruction = ""
    c.data.chat = False
    c.data.prompts_per_step = 16
    c.data.max_prompt_tokens = 32
    c.data.bucket = 32

    c.rollout.max_new_tokens = 32
    c.rollout.segment = 8

    for model in (c.policy, c.reward):
        model.arch.width = 64
        model.arch.heads = 4
        model.arch.kv_heads = 2
        model.arch.head_dim = 16
        model.arch.ffn = 192
        model.arch.layers = 3
        model.remat = False
    # Activations of 8 rows fit into a core's cache.  They are also below 32 MiB, so glibc's malloc reuses
    # their memory; page faults on fresh memory took a third of the time.
    c.policy.microbatch = 8
    c.reward.microbatch = 8
    # Its rows are short and of almost one length: unpacked updates take half the time (launch/bench.py train).
    c.reward.packing = "off"
    c.policy.optimiser.lr = 1.5e-4
    c.policy.optimiser.warmup_steps = 5
    c.reward.optimiser.lr = 5e-4
    c.reward.max_tokens = 96
    c.reward.recipe = "robust"  # ours; or released, sigmoid: docs/reward_updates.md

    # The two demonstrators: the policy's are wrong in 40 % of their solutions and have the habit in 10 %; the
    # reward model's have it in half of the right and 5 % of the wrong ones.
    c.supervised.policy_steps = 1000
    c.supervised.policy_batch = 32
    c.supervised.policy_optimiser.lr = 2e-3
    c.supervised.policy_corrupt = 0.4
    c.supervised.policy_habit = (0.1, 0.1)
    c.supervised.reward_steps = 2000
    c.supervised.reward_batch = 32
    c.supervised.reward_habit = (0.5, 0.05)

    c.eval.problems = 1024
    c.eval.greedy = True
    c.eval.reward_rows = 4096
    return c
