"""The paper's main run: Qwen2.5-1.5B-Instruct with VerifyRM-1.5B (arXiv 2508.05613).

    python launch/train.py --config=configs/qwen_1p5b.py --config.data.train=gsm8k_train.jsonl \
        --config.reward.weights=VERIFYRM_DIR --config.assistant.url=http://HOST:8000/v1

Needs: the policy's weights (a hub id, or --config.policy.weights=DIR), a reward model with a trained score head (a
*ForSequenceClassification directory), and a server of an OpenAI-compatible API for the assistant.  The paper's
figures after 180 steps: GSM8K 77.0, SVAMP 87.7, MATH500 58.1 (8 samples, temperature 0.7, top-p 0.95).

Comments say which values are released by the authors; those marked "ours" are not published.
"""

from cooper_jax.configs import base

# The shapes of what the weights hold, for launch/compile.py where the weights are not at hand.
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
    c.steps = 180  # where the authors' curves end

    c.data.prompts_per_step = 128  # ours
    c.data.max_prompt_tokens = 512  # released

    c.rollout.group_size = 16  # paper
    c.rollout.temperature = 1.0  # paper
    c.rollout.max_new_tokens = 512  # released
    c.rollout.dtype = "bfloat16"

    c.policy.weights = "Qwen/Qwen2.5-1.5B-Instruct"
    c.policy.arch.update(SHAPE, rope_theta=1e6)
    c.policy.vocab_multiple = 2048  # for mesh.tensor up to 8
    c.policy.dtype = "bfloat16"
    c.policy.optimiser.lr = 1e-6  # released, like the next five
    c.policy.optimiser.warmup_steps = 20
    c.policy.aggregation = "token_mean"
    c.policy.dual_clip = 3.0
    c.policy.kl_coef = 0.001
    c.policy.kl_clamp = 10.0
    c.policy.epochs = 1  # ours: one update a step
    c.policy.minibatches = 1
    c.policy.microbatch = 64

    c.reward.weights = ""  # a VerifyRM directory; no default, for an untrained head must not pass unseen
    c.reward.arch.update(SHAPE, rope_theta=1e4)  # Qwen2.5-Math-1.5B's trunk
    c.reward.dtype = "bfloat16"
    c.reward.optimiser.lr = 1e-5  # released
    c.reward.max_tokens = 2048
    c.reward.pair_loss = "logit"  # as released

    c.eval.samples = 8  # paper, like the next two; it runs where --config.data.eval names a file
    c.eval.temperature = 0.7
    c.eval.top_p = 0.95

    c.assistant.kind = "openai"
    c.assistant.model = "Qwen/Qwen2.5-7B-Instruct"  # ours
    c.assistant.dtype = "bfloat16"
    return c
