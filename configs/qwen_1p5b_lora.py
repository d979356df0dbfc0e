"""The paper's main run with low-rank adapters in place of all weights (docs/lora.md).

    python launch/train.py --config=configs/qwen_1p5b_lora.py --config.reward.recipe=robust \\
        --config.data.train=gsm8k_train.jsonl --config.data.eval=gsm8k_test.jsonl \\
        --config.reward.weights=VERIFYRM_DIR --config.assistant.url=http://HOST:8000/v1

Both models keep their weights, in bfloat16, and train adapters of rank 64, and the reward model its score head.
There are no gradients and moments of the weights, and no second copy of the policy as its reference.  All values
below are ours: the paper trains all weights.  Learning rates are ten times those of configs/qwen_1p5b.py, as is
usual for adapters; none of this has been run.
"""

from cooper_jax.configs import qwen_1p5b


def get_config():
    c = qwen_1p5b.get_config()
    c.name = "qwen_1p5b_lora"

    for section in (c.policy, c.reward):
        section.lora.rank = 64
        section.lora.base_dtype = "bfloat16"  # that of the published weights
        section.optimiser.lr *= 10
    return c
