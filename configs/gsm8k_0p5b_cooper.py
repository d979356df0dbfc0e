"""Cooper on one GPU of 24 GB: Qwen2.5-0.5B-Instruct on GSM8K, its reward model, and itself as the assistant.

    python launch/train.py --config=configs/gsm8k_0p5b_cooper.py

The run of configs/gsm8k_0p5b.py in the arm `cooper`.  It needs no server and no trained reward model:

    assistant      the policy's initial weights, frozen, rewrite right solutions into wrong ones
    reward model   the first 12 layers of the same weights with a new score head, which is trained before step 1
                   on the worked solutions of the training problems and on corruptions of them

A model of this size is a weak assistant: a rewrite must be found wrong by the rule verifier and have about the
length of the right solution, so many pairs are left out (the metrics pairs/* count them).  **The curve of this run
has not been measured by us**; docs/first_run.md has the memory that the compilers report.
"""

from cooper_jax.configs import gsm8k_0p5b


def get_config():
    c = gsm8k_0p5b.get_config()
    c.name = "gsm8k_0p5b_cooper"

    # Two more models are in memory than in the arm `rule`.
    c.policy.microbatch = 16

    c.reward.arm = "cooper"
    c.reward.recipe = "robust"  # docs/method.md compares the recipes
    c.reward.weights = c.policy.weights
    c.reward.arch.update(gsm8k_0p5b.SHAPE)
    c.reward.num_layers = 12
    c.reward.vocab_multiple = 256
    c.reward.dtype = "bfloat16"
    c.reward.microbatch = 8
    c.reward.max_tokens = 1024

    # The score head is new: 400 updates on 16 labelled solutions each train it before step 1.
    c.supervised.reward_steps = 400
    c.supervised.reward_batch = 16
    c.supervised.reward_optimiser.lr = 2e-5

    c.assistant.kind = "local"
    c.assistant.weights = c.policy.weights
    c.assistant.arch.update(gsm8k_0p5b.SHAPE)
    c.assistant.vocab_multiple = 256
    c.assistant.dtype = "bfloat16"
    # It is asked more often than a large model, because fewer of its rewrites are usable.
    c.pairs.tries = 8
    return c
