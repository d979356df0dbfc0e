"""VerifyRM-1.5B (arXiv 2508.05613): Qwen2.5-Math-1.5B-Instruct with a one-logit score head.

    python launch/train_rm.py --config=configs/verifyrm_1p5b.py \\
        --config.train_rm.data=VerifyRM_training_data.parquet

The file is dataset/VerifyRM_training_data.parquet of github.com/zju-real/cooper: 58.7K completions of 7 data
sets by 11 models on which a rule verifier and a language model agree.  launch/annotate.py makes such data.
The paper reports 89.42 % on VerifyBench.

Comments name the source of each value: "paper"; "released" (the authors' train_VerifyRM/train.py, with the
defaults of the transformers Trainer that it uses); "ours" (another value, or a setting that their code does
not have).  Values that stay as in configs/base.py:

    released   train_rm: epochs = 3, lr = 2e-5, weight_decay = 0.01, max_characters = 8000, decay = linear.
               The Trainer leaves biases and norms out of weight decay; this project decays all parameters.
    ours       reward.max_tokens = 2048, about 8,000 characters of mathematics; released: 8192
               train_rm.optimiser.warmup_steps = 20; released: none
"""

from cooper_jax.configs import base
from cooper_jax.configs.qwen_1p5b import SHAPE


def get_config():
    c = base.get_config()
    c.name = "verifyrm_1p5b"

    c.reward.weights = "Qwen/Qwen2.5-Math-1.5B-Instruct"  # paper; or a directory
    # The Math model has the shape of Qwen2.5-1.5B and another base of its rotary positions.
    c.reward.arch.update(SHAPE, rope_theta=1e4)
    c.reward.vocab_multiple = 2048  # for mesh.tensor up to 8
    c.reward.dtype = "bfloat16"  # released; master weights are float32
    c.reward.microbatch = 16  # ours: 32,768 tokens in one pass, over all devices
    c.data.bucket = 128

    # Ours: three epochs of 58.7K rows are 344 updates.  With the released batch of 16,384 they would be 11.
    c.train_rm.batch = 512
    c.train_rm.widths = 8
    # Without evaluations the best model could not be chosen.
    c.train_rm.eval_every = 50  # ours; released: no evaluation

    c.checkpoint.every = 50
    return c
