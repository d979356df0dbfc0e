"""A first real run: Qwen2.5-0.5B-Instruct on GSM8K, rewarded by the rule verifier, on one GPU of 24 GB.

    python launch/train.py --config=configs/gsm8k_0p5b.py

Policy and problems are fetched from the Hugging Face hub (1 GB and 5 MB).  There is no reward model and no
server.  The run fits on one L4 (24 GB).  Other machines take a larger microbatch:

    one H100        --config.policy.microbatch=64
    a v5e-8 slice   --config.policy.microbatch=64

docs/first_run.md has the memory that the compilers report for each of the three.  **The accuracy curve of this
run has not been measured by us**, nor has its time; the values below are the paper's or choices that have not
been tuned.

configs/gsm8k_0p5b_cooper.py is the same run with a reward model that is trained beside the policy.
"""

from cooper_jax.configs import base

# The shape of Qwen2.5-0.5B, for launch/compile.py if the weights are not on this machine.
SHAPE = dict(
    family="qwen2",
    layers=24,
    vocab_size=151936,
    width=896,
    heads=14,
    kv_heads=2,
    head_dim=64,
    ffn=4864,
    rope_theta=1e6,
    tied=True,
)


def get_config():
    c = base.get_config()
    c.name = "gsm8k_0p5b"

    # A data set of the hub, with its config and split.  Accuracy is measured on the test problems, every 20 steps
    # on the same 256 of them.
    c.data.train = "openai/gsm8k:main:train"
    c.data.eval = "openai/gsm8k:main:test"
    c.eval.greedy = True

    # 450 steps of 16 problems are one pass over most of the 7,473 training problems.
    c.steps = 450
    c.data.prompts_per_step = 16
    c.data.max_prompt_tokens = 384

    c.policy.weights = "Qwen/Qwen2.5-0.5B-Instruct"
    c.policy.arch.update(SHAPE)
    c.policy.vocab_multiple = 256  # a whole number of kernel tiles
    # Master weights stay float32: in bfloat16 most weights would not move at a learning rate of 1e-6.
    c.policy.dtype = "bfloat16"
    c.rollout.dtype = "bfloat16"
    c.policy.microbatch = 32

    c.reward.arm = "rule"
    return c
