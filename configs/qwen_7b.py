"""A larger policy than the paper's: Qwen2.5-7B-Instruct, with the paper's reward model.

    python launch/train.py --config=configs/qwen_7b.py --config.mesh.tensor=4 --config.reward.recipe=robust \\
        --config.data.train=gsm8k_train.jsonl --config.data.eval=gsm8k_test.jsonl \\
        --config.reward.weights=VERIFYRM_DIR --config.assistant.url=http://HOST:8000/v1

Everything else is as in configs/qwen_1p5b.py, the reward model VerifyRM-1.5B included, and has not been tuned
for this size.  docs/compile.md lists the machines on which it fits.
"""

from cooper_jax.configs import qwen_1p5b


def get_config():
    c = qwen_1p5b.get_config()
    c.name = "qwen_7b"
    c.policy.weights = "Qwen/Qwen2.5-7B-Instruct"
    # The shape in the model's config.json.  launch/compile.py uses it without the weights; a run reads the
    # shape from the weights.
    c.policy.arch.update(
        family="qwen2", layers=28, vocab_size=152064, width=3584, heads=28, kv_heads=4, head_dim=128,
        ffn=18944, rope_theta=1e6, tied=False,
    )  # fmt: skip
    return c
