"""The paper's second policy: Llama-3.2-1B-Instruct (arXiv 2508.05613).

    python launch/train.py --config=configs/llama3p2_1b.py --config.reward.recipe=robust \\
        --config.data.train=gsm8k_train.jsonl --config.data.eval=gsm8k_test.jsonl \\
        --config.reward.weights=VERIFYRM_DIR --config.assistant.url=http://HOST:8000/v1

Everything else is as in configs/qwen_1p5b.py: the reward model stays VerifyRM-1.5B, with its own tokenizer.
The paper reports GSM8K 57.1, SVAMP 73.5, MATH500 34.9.
"""

from cooper_jax.configs import qwen_1p5b


def get_config():
    c = qwen_1p5b.get_config()
    c.name = "llama3p2_1b"
    c.policy.weights = "meta-llama/Llama-3.2-1B-Instruct"
    # The shape in the model's config.json.  launch/compile.py uses it without the weights; a run reads the
    # shape from the weights.
    c.policy.arch.update(
        family="llama", layers=16, vocab_size=128256, width=2048, heads=32, kv_heads=8, head_dim=64, ffn=8192,
        rope_theta=5e5, tied=True,
    )  # fmt: skip
    return c
