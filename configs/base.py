"""Declaration of every setting, with its default; the other files change only what differs.

    python launch/train.py --config=configs/tiny.py --config.steps=20 --config.reward.arm=rule

Each function below makes one section.  The comment behind a field, or above it, is its documentation: --help prints
it.  Sizes are in tokens unless the comment gives another unit.  An empty string means "none".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The whole configuration."""
    c = ConfigDict()
    c.name = "base"  # of the run; a config file has its own name here
    c.seed = 0  # of all random draws
    # Cooper steps in all; a resumed run counts those already done; 0: the supervised phases alone
    c.steps = 180
    c.run_dir = ""  # where the run is kept; "": runs/<name>
    c.resume = True  # resume from the newest checkpoint in run_dir; False refuses a run_dir that holds one

    c.data = data_section()
    c.rollout = rollout_section()
    c.policy = policy_section()
    c.reward = reward_section()
    c.pairs = pairs_section()
    c.rule = rule_section()
    # Rewrites positives into negatives.  A third kind, corrupt, edits numbers, by the seed.
    c.assistant = chat_section("corrupt", max_new_tokens=512, temperature=0.7, top_p=0.95)
    # Says whether a completion's final answer equals the reference: launch/annotate.py, launch/evaluate.py.
    c.judge = chat_section("openai", max_new_tokens=256, temperature=0.0, top_p=1.0)
    # Writes the completions that launch/annotate.py labels.
    c.source = chat_section("openai", max_new_tokens=512, temperature=0.7, top_p=0.95)
    c.supervised = supervised_section()
    c.annotate = annotate_section()
    c.train_rm = train_rm_section()
    c.mesh = mesh_section()
    c.benchmark = benchmark_section()
    c.eval = eval_section()
    c.checkpoint = checkpoint_section()
    c.log = log_section()
    return c


# --- problems and sampling ---------------------------------------------------------------------------


def data_section() -> ConfigDict:
    """Problems to train and to evaluate on, and their prompts."""
    c = ConfigDict()
    c.train = ""  # a file, or a tensorflow-datasets name; "" with format "synthetic"
    # auto | gsm8k | svamp | math500 | olympiadbench | odyssey | jsonl | parquet | tfds | synthetic
    c.format = "auto"
    c.eval = ""  # a file of problems for the periodic evaluation; "": those of eval_from_train
    # Without data.eval, so many problems of the training file are held out for evaluation and not trained on, the
    # same in every run; 0: none, and no evaluation.
    c.eval_from_train = 0
    c.eval_format = "auto"  # of data.eval, as in `format`
    # Leave out problems of data.eval whose question the reward model is trained on, here or before
    # (seen_questions.json beside its weights).  False: evaluate on them too.  Their number is printed either way.
    c.exclude_seen = True
    c.question_key = "question"  # jsonl, parquet, tfds: the column of the question
    c.reference_key = "answer"  # the column of the reference answer
    c.solution_key = ""  # the column of worked solutions, where there is one
    c.tfds_dir = ""  # where tensorflow-datasets' prepared data lie; "": its default
    c.split = "train"  # the tensorflow-datasets split to train on
    c.eval_split = "test"  # the one to evaluate on
    # Follows the question in the policy's prompt.
    c.instruction = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    c.chat = True  # wrap prompts in the tokenizer's chat template
    c.prompts_per_step = 128  # B
    c.max_prompt_tokens = 512  # longer prompts are dropped and counted
    c.bucket = 64  # widths of batches are rounded up to a multiple of this
    c.synthetic_size = 4096  # distinct synthetic training problems
    return c


def rollout_section() -> ConfigDict:
    """Sampling of the policy's responses."""
    c = ConfigDict()
    c.group_size = 16  # G
    c.max_new_tokens = 512  # of a response; longer ones are truncated
    c.temperature = 1.0  # of the policy's loss, too
    c.top_k = 0  # 0: off, which training needs
    c.top_p = 1.0  # 1: off, which training needs
    c.min_p = 0.0  # 0: off, which training needs
    # Number of slots, that is of rows decoded at once; a finished row's slot takes the next one.  0: all rows at
    # once, so that a prompt's samples share one copy of its keys and values.
    c.max_rows = 0
    # GiB of one device for the rollout's weights, caches and slots: as many slots as fit.  0: no limit.
    c.memory_gib = 0.0
    c.segment = 64  # tokens decoded before the host checks for finished rows
    c.dtype = "float32"  # of the rollout's weights and activations: float32 or bfloat16
    # auto: Pallas kernels on TPUs and GPUs if they support the head_dim, otherwise plain XLA; xla: plain XLA
    c.kernels = "auto"
    # The rollout's copy of the weights.  gathered: by mesh.rollout_rules; sharded: as in training, each layer
    # gathered at every token, for models that do not fit otherwise; auto: gathered if that takes at most half of
    # memory_gib, or of the device's memory.
    c.weight_placement = "auto"
    c.kv_dtype = ""  # of the KV cache: float32, bfloat16 or int8; "": as dtype
    return c


# --- models ------------------------------------------------------------------------------------------


def model_source() -> ConfigDict:
    """Settings of a model: weights, tokenizer and compute type."""
    c = ConfigDict()
    # A Hugging Face directory, a hub id, a .gguf file, "package:NAME/FILE.gguf" (a file inside an installed
    # Python package), or "random" for fresh weights of the shape in `arch`.
    c.weights = "random"
    c.tokenizer = ""  # a directory, a hub id or a .model file; "": the one that comes with the weights
    c.num_layers = 0  # keep only the first layers of the model; 0 keeps all
    # The vocabulary is padded to a multiple of this: with 256 times mesh.tensor every shard of it consists of whole
    # kernel tiles.  Padding is never sampled and not exported.
    c.vocab_multiple = 1
    c.dtype = "float32"  # compute type: float32 or bfloat16 (master weights are always float32)
    c.arch = arch()
    return c


def trained_model() -> ConfigDict:
    """Settings of a model that is trained."""
    c = model_source()
    c.remat = True  # recompute each layer's activations in the backward pass
    return c


def arch() -> ConfigDict:
    """The shape of a model made from scratch (weights = "random")."""
    c = ConfigDict()
    c.family = "llama"  # llama or qwen2 (qwen2 has biases on q, k and v)
    c.layers = 2  # transformer blocks
    c.vocab_size = 640  # pieces of the sentencepiece model that is trained for it
    c.width = 128  # of the residual stream
    c.heads = 4  # query heads
    c.kv_heads = 2  # key and value heads; they divide the query heads
    c.head_dim = 32  # width of one head
    c.ffn = 384  # width of the feed-forward layer
    c.rope_theta = 10000.0  # base of the rotary positions
    c.tied = True  # the output head is the embedding, transposed
    return c


def optimiser(lr: float, warmup_steps: int) -> ConfigDict:
    """AdamW with a linear warm-up, then constant.

    Weight decay applies to all parameters, biases and norms included, as in the authors' RL code; their VerifyRM
    training leaves both out.
    """
    c = ConfigDict()
    c.lr = lr  # learning rate after the warm-up
    c.warmup_steps = warmup_steps  # updates over which the learning rate rises linearly
    c.b1 = 0.9  # decay of the first moment
    c.b2 = 0.999  # decay of the second moment
    c.eps = 1e-8  # added to the root of the second moment
    c.weight_decay = 0.01  # decoupled, times the learning rate; on all parameters
    c.clip_norm = 1.0  # of the global gradient norm
    return c


def policy_section() -> ConfigDict:
    """The policy and its GRPO update; docs/method.md has the equations."""
    c = trained_model()
    c.optimiser = optimiser(lr=1e-6, warmup_steps=20)
    c.std_normalise = True  # divide advantages by the group's standard deviation (Dr. GRPO: False)
    c.std_eps = 1e-6  # added to the standard deviation
    c.std_floor = 0.0  # the standard deviation is at least this
    c.aggregation = "token_mean"  # token_mean | sequence_mean | sequence_sum (Dr. GRPO)
    c.clip_low = 0.2  # the probability ratio is clipped below 1 - clip_low
    c.clip_high = 0.2  # and above 1 + clip_high
    c.dual_clip = 3.0  # bound on ratio * |advantage| for negative advantages; 0: off
    c.kl_coef = 0.001  # weight of the KL divergence from the reference, the policy at step 0
    c.kl_estimator = "k3"  # k1 | k2 | k3
    c.kl_clamp = 10.0  # bound on the estimate of each token; 0: off
    c.epochs = 1  # passes over a step's rollouts
    c.minibatches = 1  # optimiser updates a pass
    c.microbatch = 64  # rows in one forward and backward pass
    return c


def reward_section() -> ConfigDict:
    """The policy's reward, and the reward model with its update; docs/reward_updates.md has the equations."""
    c = trained_model()
    c.arm = "cooper"  # rule | model (reward model frozen) | cooper
    c.optimiser = optimiser(lr=1e-5, warmup_steps=0)
    c.max_tokens = 2048  # of a reward-model input; longer completions are cut in the middle
    c.microbatch = 64  # rows, or pairs, in one pass
    # released | sigmoid | robust: sets the fields that cooper_jax/trainer/recipes.py lists; a flag that is given
    # beside it wins
    c.recipe = ""
    c.pair_loss = "logit"  # contrastive loss on: logit (released) | sigmoid (the rewards)
    c.pair_weight = 1.0  # of the contrastive loss
    c.pair_bce = 0.0  # weight of cross-entropy on the members of pairs
    c.rollout_bce = 0.0  # weight of cross-entropy on rollouts that the rule decides, both classes alike
    c.rollout_rows = 64  # such rollouts of a step, at most
    c.updates = 1  # per policy step, on the same pairs and rows
    # Updates before the first policy step, each on fresh rollouts; in the arm `model` it is frozen after them.
    c.warmup_updates = 0
    c.replay = 0  # past rollouts with a verdict that are kept, of each class
    c.replay_rows = 0  # of them, so many join each update's rollouts
    c.rule_or_model = (
        False  # control: reward 1 where the rule finds it correct, else the reward model's score
    )
    c.answer_required = False  # control: reward 0 where it is truncated, or the rule finds no answer
    c.shuffle_labels = False  # control: a pair's members are exchanged with probability 1/2
    c.allow_untrained_head = False  # let launch/train.py start from an untrained score head
    return c


def pairs_section() -> ConfigDict:
    """Contrastive pairs for the reward model's update."""
    c = ConfigDict()
    c.per_prompt = 1  # pairs of a prompt, at most
    # Where a prompt's pairs take their negatives from, in turn: assistant (a rewrite) | swap (another problem's
    # reference) | own_answer (a wrong rollout, whose positive is the same text beside the answer that it gives):
    # --config.pairs.negatives="('assistant','swap')"
    c.negatives = ("assistant",)
    c.tries = 3  # requests to the assistant, or references, before a pair is masked
    c.length_ratio = 2.0  # a negative is at most this much longer or shorter (characters)
    return c


def rule_section() -> ConfigDict:
    """The rule verifier."""
    c = ConfigDict()
    c.workers = 2  # math-verify processes
    c.timeout = 5.0  # seconds a verdict
    c.retry_timeout = 20.0  # seconds of the one further try, alone
    c.memory_mb = 2048  # of one worker
    return c


def chat_section(kind: str, max_new_tokens: int, temperature: float, top_p: float) -> ConfigDict:
    """A language model that writes text on request: local weights, or a server."""
    c = model_source()
    c.kind = kind  # local (our rollout) | openai (a server)
    c.url = ""  # openai: the server's base address, http://HOST:PORT/v1
    c.model = ""  # openai: the model's name there
    c.key_env = "OPENAI_API_KEY"  # the environment variable that holds the key
    c.concurrency = 16  # openai: requests at a time
    c.timeout = 60.0  # openai: seconds a request
    c.retries = 3  # on connection errors, 429 and 5xx, with back-off
    # on | off: what the chat template is told by `enable_thinking` (Qwen3's has it); "": nothing.  To a server it
    # goes as `chat_template_kwargs`, a field that vLLM and SGLang know and others may refuse.
    c.thinking = ""
    # local: longer conversations fail, one by one; 0: the model's maximum length minus max_new_tokens
    c.max_prompt_tokens = 0
    c.max_new_tokens = max_new_tokens  # of a reply
    c.temperature = temperature  # 0: greedy
    c.top_p = top_p  # 1: off
    return c


# --- phases and jobs beside the steps ----------------------------------------------------------------


def supervised_section() -> ConfigDict:
    """Supervised phases before step 1."""
    c = ConfigDict()
    # A run directory: start from its models at step 0 instead of running the supervised phases.
    c.start_from = ""
    c.policy_steps = 0  # updates of the policy: imitation of worked solutions; 0: none
    c.policy_batch = 64  # solutions an update
    c.policy_corrupt = 0.0  # share of demonstrations with a corrupted step (synthetic problems)
    # Synthetic problems: shares of right and of wrong demonstrations with the habit (cooper_jax/data/synthetic.py)
    c.policy_habit = (0.0, 0.0)
    # The same, of the labelled completions that the reward model is trained on
    c.reward_habit = (0.0, 0.0)
    c.policy_optimiser = optimiser(lr=1e-3, warmup_steps=50)
    c.reward_steps = 0  # updates of the reward model: binary cross-entropy on labelled triples; 0: none
    c.reward_batch = 64  # triples an update, half of them right
    # JSONL of question, reference_answer, completion, label; "" builds triples from worked solutions
    c.reward_data = ""
    c.reward_optimiser = optimiser(lr=1e-3, warmup_steps=50)
    return c


def annotate_section() -> ConfigDict:
    """launch/annotate.py: completions are labelled where the rule and the judge agree."""
    c = ConfigDict()
    c.problems = 0  # of each problem set, at most, drawn by the seed; 0: all
    c.samples = 1  # completions of a problem, from the source
    c.batch = 32  # local models: conversations answered at once; a SIGKILL loses at most so many
    # Of labelled rows, the larger class keeps at most max_ratio times as many as the smaller: within each source
    # (source), over all rows (overall), or not (off).  What is left out stays in the ledger.
    c.balance = "source"
    c.max_ratio = 1.0  # larger class over smaller, after balancing
    c.ask_again = False  # repeat the requests that failed in earlier starts
    return c


def train_rm_section() -> ConfigDict:
    """launch/train_rm.py: trains the model of `reward` alone, on labelled completions."""
    c = ConfigDict()
    # Files of labelled completions (cooper_jax/data/labelled_completions.py), separated by commas.
    c.data = ""
    c.eval_data = ""  # the same, held out; "" holds out a part of `data`, whole questions
    c.eval_share = 0.1  # without eval_data: the share of rows held out
    c.exclude_overlap = True  # leave out held-out rows whose question is in the training data
    c.max_characters = 8000  # longer training texts are dropped; 0 keeps all
    # This share of the wrong training completions is shown once more under a known reward hack, as wrong.
    c.attacked = 0.0
    c.epochs = 3  # passes over the training rows
    c.batch = 256  # rows an update, at most: an epoch is split into equal parts
    c.optimiser = optimiser(lr=2e-5, warmup_steps=20)
    c.decay = "linear"  # of the learning rate, to 0 at the end: constant | linear | cosine
    # Number of microbatch widths (multiples of data.bucket, chosen for the data).  A microbatch holds about as many
    # tokens as reward.microbatch rows of reward.max_tokens, or half as many; each shape is one program.
    c.widths = 6
    c.eval_every = 0  # updates; 0: at the end of each epoch
    c.keep_best = "auroc"  # auroc | accuracy | loss, on the held-out rows
    c.patience = 0  # stop after so many evaluations without a better one; 0: never
    return c


def benchmark_section() -> ConfigDict:
    """launch/evaluate.py: benchmarks."""
    c = ConfigDict()
    c.samples = 8  # a problem; the paper's, like temperature and top_p
    c.temperature = 0.7  # of the responses
    c.top_p = 0.95  # of the responses; 1: off
    c.max_new_tokens = 1024  # of a response
    c.max_prompt_tokens = 2048  # problems whose prompts are longer are dropped and counted
    c.problems = 0  # of each benchmark: a fixed part, the same in every evaluation; 0: all
    c.judged_by = "rule"  # rule | model (the reward model, above 0.5) | both
    c.chunk = 64  # problems sampled at once; a SIGKILL loses at most so many
    c.bootstrap = 1000  # resamplings behind each 95 % interval
    c.exclude_seen = True  # leave out questions that the reward model was trained on, where it judges
    return c


# --- devices and records -----------------------------------------------------------------------------


def mesh_section() -> ConfigDict:
    """Devices of the models, and the rules by which arrays are sharded over them."""
    c = ConfigDict()
    c.data = 1  # devices along the axis `data`, which splits the batch and copies the weights; -1: the rest
    c.fsdp = -1  # devices along `fsdp`, which splits the batch and the weights; -1: the rest
    c.tensor = (
        1  # devices along `tensor`, which splits heads, feed-forward layers and vocabulary; -1: the rest
    )
    # The axis that spans slices, where devices lie in several: TPU pods that a network joins, hosts of GPUs.
    c.across = "data"
    # A separate mesh for the reward model, data x fsdp x tensor as in "1x2x1", on the last devices of every host;
    # "" shares the policy's.  On its own mesh it scores responses while others are still decoded.
    c.reward = ""
    c.reference = ""  # likewise for the frozen reference
    c.assistant = ""  # likewise for a local assistant
    # Logical axis -> mesh axis, first that fits (None replicates).
    c.rules = (
        ("batch", ("data", "fsdp")),
        ("vocab", "tensor"),
        ("vocab", None),
        ("embed", "fsdp"),
        ("embed", None),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("kv_heads", None),
        ("ffn", "tensor"),
        ("layers", None),
        ("head_dim", None),
    )
    # Tried first for a rollout's copy of the weights, which is then gathered once per step, not at every token.
    c.rollout_rules = (("embed", None),)
    return c


def eval_section() -> ConfigDict:
    """The periodic evaluation on held-out problems."""
    c = ConfigDict()
    c.every = 20  # steps, from step 0 on; 0: never
    c.problems = 256  # of data.eval, drawn over the whole file, the same in every run
    c.samples = 1  # responses a problem
    c.temperature = 1.0  # of the responses
    c.top_p = 1.0  # of the responses; 1: off
    c.greedy = False  # evaluate greedy responses as well
    c.reward_rows = 0  # synthetic problems: rows of each labelled set on which the reward model is measured
    return c


def checkpoint_section() -> ConfigDict:
    """Checkpoints in the run directory."""
    c = ConfigDict()
    c.every = 20  # steps
    c.keep = 2  # newest ones; 0 keeps all
    return c


def log_section() -> ConfigDict:
    """Logs in the run directory."""
    c = ConfigDict()
    c.samples_every = 10  # steps between dumps of samples, the first step's included; 0: never
    c.samples = 2  # prompts in a dump
    # Measure how far each update of the reward model moves its pairs' logits; scores the pairs twice more.
    c.pair_motion = False
    c.tensorboard = True  # write TensorBoard events beside metrics.jsonl
    return c
