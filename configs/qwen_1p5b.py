"""The paper's main run: Qwen2.5-1.5B-Instruct with VerifyRM-1.5B (arXiv 2508.05613).

    python launch/train.py --config=configs/qwen_1p5b.py --config.reward.recipe=robust \\
        --config.data.train=gsm8k_train.jsonl --config.data.eval=gsm8k_test.jsonl \\
        --config.reward.weights=VERIFYRM_DIR --config.assistant.url=http://HOST:8000/v1

A run needs the policy's weights (a hub id, or --config.policy.weights=DIR), a reward model with a trained
score head (a *ForSequenceClassification directory; docs/verifyrm.md explains how to train one), and a server
with an OpenAI-compatible API for the assistant.  The paper reports GSM8K 77.0, SVAMP 87.7, MATH500 58.1
(8 samples, temperature 0.7, top-p 0.95).

Without a recipe the reward model is updated as in the authors' released code.  In this project's miniature
the policy hacks a reward model that is updated in this way, and a run prints a warning.  `robust` is our
recipe.  docs/method.md compares the two.

Comments name the source of each value: "paper"; "released" (the authors' code, github.com/zju-real/cooper);
"ours" (paper and code give no value, or another one).  Values that stay as in configs/base.py:

    paper      rollout: group_size = 16, temperature = 1
    released   data.max_prompt_tokens = 512, rollout.max_new_tokens = 512
               policy: lr = 1e-6, warmup_steps = 20, aggregation = token_mean, dual_clip = 3, kl_coef = 0.001,
               kl_clamp = 10, epochs = 1, minibatches = 1 (a minibatch is the whole batch)
               reward: lr = 1e-5, pair_loss = logit; weight_decay = 0.01 of both optimisers
               assistant.temperature = 0.7, pairs.tries = 3, and the limit of a rewrite (max_new_tokens = 0)
    ours       steps = 180, where the authors' published curves end; the released example trains 15 epochs
               data.prompts_per_step = 128; the released example, for one GPU, has 4
               data.instruction, policy.microbatch = 64, reward.max_tokens = 2048
               reward.optimiser.warmup_steps = 0; released: 1 % of the run's steps
               assistant.top_p = 0.95; released: not set
               assistant.prompt = careful, harder negatives than those of `released`
               eval.every = 20 steps, on eval.problems = 256
"""

from cooper_jax.configs import base

# The shape of Qwen2.5-1.5B, for launch/compile.py if the weights are not on this machine.
SHAPE = dict(
    family="qwen2",
    layers=28,
    vocab_size=151936,
    width=1536,
    heads=12,
    kv_heads=2,
    head_dim=128,
    ffn=8960,
    tied=True,
)


def get_config():
    c = base.get_config()
    c.name = "qwen_1p5b"

    # The paper does not name the RL data; the released example trains on GSM8K's training problems.  Without
    # --config.data.eval=FILE this number of them is held out, so that every run has an accuracy curve.
    c.data.eval_from_train = 256  # ours

    # Master weights stay float32: in bfloat16 most weights would not move at a learning rate of 1e-6.
    c.rollout.dtype = "bfloat16"  # ours

    c.policy.weights = "Qwen/Qwen2.5-1.5B-Instruct"  # paper
    c.policy.arch.update(SHAPE, rope_theta=1e6)
    c.policy.vocab_multiple = 2048  # for mesh.tensor up to 8
    c.policy.dtype = "bfloat16"

    # A VerifyRM directory.  There is no default, because an untrained score head must not go unnoticed.
    c.reward.weights = ""
    c.reward.arch.update(SHAPE, rope_theta=1e4)  # of Qwen2.5-Math-1.5B
    c.reward.dtype = "bfloat16"

    c.eval.samples = 8  # paper
    c.eval.temperature = 0.7  # paper
    c.eval.top_p = 0.95  # paper

    # Ours, like its prompt (cooper_jax/data/prompts.py).  The released prompt is in
    # recipe/cooper/collaborate.py of the authors' code.
    c.assistant.kind = "openai"
    c.assistant.model = "Qwen/Qwen2.5-7B-Instruct"
    c.assistant.dtype = "bfloat16"

    # All checkpoints (one every 20 steps) are kept, so that each point of a curve can be evaluated on whole
    # benchmarks afterwards.  A checkpoint has about 37 GB (two models of 1.5e9 weights, 12 bytes per weight
    # with AdamW's moments), ten have 370 GB.  --config.checkpoint.keep=2 keeps the newest two.
    c.checkpoint.keep = 0  # ours
    return c
