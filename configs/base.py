"""Declaration of every setting, with its default; the other files change only what differs.

    python launch/train.py --config=configs/tiny.py --config.steps=20 --config.reward.arm=rule

Sizes are in tokens unless they say otherwise.  An empty string means "none".
"""

from ml_collections import ConfigDict


def model_source() -> ConfigDict:
    """Settings of a model: weights, tokenizer and compute type."""
    c = ConfigDict()
    # A Hugging Face directory, a hub id, a .gguf file, "package:NAME/FILE.gguf" (a file inside an installed
    # Python package), or "random" for fresh weights of the shape in `arch`.
    c.weights = "random"
    c.tokenizer = ""  # a directory, a hub id or a .model file; "" takes the one that comes with the weights
    c.num_layers = 0  # keep only the first layers of the trunk; 0 keeps all
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
    c.layers = 2
    c.vocab_size = 640  # pieces of the sentencepiece model that is trained for it
    c.width = 128
    c.heads = 4
    c.kv_heads = 2
    c.head_dim = 32
    c.ffn = 384
    c.rope_theta = 10000.0
    c.tied = True  # the output head is the embedding, transposed
    return c


def optimiser(lr: float, warmup_steps: int) -> ConfigDict:
    """AdamW with a linear warm-up, then constant.

    Weight decay applies to all parameters, biases and norms included, as in the authors' RL code; their VerifyRM
    training leaves both out.
    """
    c = ConfigDict()
    c.lr = lr
    c.warmup_steps = warmup_steps
    c.b1 = 0.9
    c.b2 = 0.999
    c.eps = 1e-8
    c.weight_decay = 0.01
    c.clip_norm = 1.0  # of the global gradient norm
    return c


def asked_model(kind: str, max_new_tokens: int, temperature: float, top_p: float) -> ConfigDict:
    """Settings of a language model that writes text on request: local weights, or a server."""
    c = model_source()
    c.kind = kind  # local (our rollout) | openai (a server)
    c.url = ""  # openai: the server's base address, http://HOST:PORT/v1
    c.model = ""  # openai: the model's name there
    c.key_env = "OPENAI_API_KEY"  # the environment variable that holds the key
    c.concurrency = 16
    c.timeout = 60.0  # seconds a request
    c.retries = 3  # on connection errors, 429 and 5xx, with back-off
    # on | off: what the chat template is told by `enable_thinking` (Qwen3's has it); "": nothing.  To a server it
    # goes as `chat_template_kwargs`, a field that vLLM and SGLang know and others may refuse.
    c.thinking = ""
    # local: longer conversations fail, one by one; 0: the model's maximum length minus max_new_tokens
    c.max_prompt_tokens = 0
    c.max_new_tokens = max_new_tokens
    c.temperature = temperature
    c.top_p = top_p
    return c


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "base"
    c.seed = 0
    c.steps = (
        180  # Cooper steps in all; a resumed run counts those already done; 0: the supervised phases alone
    )
    c.run_dir = ""  # "" is runs/<name>
    c.resume = True  # resume from the newest checkpoint in run_dir; False refuses a run_dir that holds one

    # --- problems ---
    c.data = ConfigDict()
    c.data.train = ""  # a file, or a tensorflow-datasets name; "" with format "synthetic"
    # auto | gsm8k | svamp | math500 | olympiadbench | odyssey | jsonl | parquet | tfds | synthetic
    c.data.format = "auto"
    c.data.eval = ""  # a file of problems for the periodic evaluation; "": those of eval_from_train
    # Without data.eval, so many problems of the training file are held out for evaluation and not trained on, the
    # same in every run; 0: none, and no evaluation.
    c.data.eval_from_train = 0
    c.data.eval_format = "auto"
    # Leave out problems of data.eval whose question the reward model is trained on, here or before
    # (seen_questions.json beside its weights).  False: evaluate on them too.  Their number is printed either way.
    c.data.exclude_seen = True
    c.data.question_key = "question"  # column names for jsonl, parquet and tfds
    c.data.reference_key = "answer"
    c.data.solution_key = ""  # a column with worked solutions, where there is one
    c.data.tfds_dir = ""  # where tensorflow-datasets' prepared data lie; "" is its default
    c.data.split = "train"  # the tensorflow-datasets split
    c.data.eval_split = "test"
    c.data.instruction = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    c.data.chat = True  # wrap prompts in the tokenizer's chat template
    c.data.prompts_per_step = 128  # B
    c.data.max_prompt_tokens = 512  # longer prompts are dropped and counted
    c.data.bucket = 64  # widths of batches are rounded up to a multiple of this
    c.data.synthetic_size = 4096  # distinct synthetic training problems

    # --- sampling ---
    c.rollout = ConfigDict()
    c.rollout.group_size = 16  # G
    c.rollout.max_new_tokens = 512
    c.rollout.temperature = 1.0
    c.rollout.top_k = 0  # 0: off
    c.rollout.top_p = 1.0  # 1: off
    c.rollout.min_p = 0.0  # 0: off
    # Number of slots, that is of rows decoded at once; a finished row's slot takes the next one.  0: all rows at
    # once, so that a prompt's samples share one copy of its keys and values.
    c.rollout.max_rows = 0
    # GiB of one device for the rollout's weights, caches and slots: as many slots as fit.  0: no limit.
    c.rollout.memory_gib = 0.0
    c.rollout.segment = 64  # tokens decoded before the host checks for finished rows
    c.rollout.dtype = "float32"  # of the rollout's weights and activations
    # auto: Pallas kernels on TPUs and GPUs if they support the head_dim, otherwise plain XLA; xla: plain XLA
    c.rollout.kernels = "auto"
    # The rollout's copy of the weights.  gathered: by mesh.rollout_rules; sharded: as in training, each layer
    # gathered at every token, for models that do not fit otherwise; auto: gathered if that takes at most half of
    # memory_gib, or of the device's memory.
    c.rollout.weight_placement = "auto"
    c.rollout.kv_dtype = ""  # of the KV cache: float32, bfloat16 or int8; "": as dtype

    # --- policy ---
    c.policy = trained_model()
    c.policy.optimiser = optimiser(lr=1e-6, warmup_steps=20)
    c.policy.std_normalise = True  # divide advantages by the group's standard deviation (Dr. GRPO: False)
    c.policy.std_eps = 1e-6
    c.policy.std_floor = 0.0  # the standard deviation is at least this
    c.policy.aggregation = "token_mean"  # token_mean | sequence_mean | sequence_sum (Dr. GRPO)
    c.policy.clip_low = 0.2
    c.policy.clip_high = 0.2
    c.policy.dual_clip = 3.0  # bound on ratio * |advantage| for negative advantages; 0: off
    c.policy.kl_coef = 0.001
    c.policy.kl_estimator = "k3"  # k1 | k2 | k3
    c.policy.kl_clamp = 10.0  # bound on the estimate of each token; 0: off
    c.policy.epochs = 1  # passes over a step's rollouts
    c.policy.minibatches = 1  # optimiser updates a pass
    c.policy.microbatch = 64  # rows in one forward and backward pass

    # --- reward model ---
    c.reward = trained_model()
    c.reward.arm = "cooper"  # rule | model (reward model frozen) | cooper
    c.reward.optimiser = optimiser(lr=1e-5, warmup_steps=0)
    c.reward.max_tokens = 2048  # of a reward-model input; longer completions are cut in the middle
    c.reward.microbatch = 64
    # --- its update in the cooper arm: docs/reward_updates.md has the equations ---
    # released | sigmoid | robust: sets the fields that cooper_jax/trainer/recipes.py lists; a flag given beside it wins
    c.reward.recipe = ""
    c.reward.pair_loss = "logit"  # contrastive loss on: logit (released) | sigmoid (the rewards)
    c.reward.pair_weight = 1.0  # of the contrastive loss
    c.reward.pair_bce = 0.0  # weight of cross-entropy on the members of pairs
    c.reward.rollout_bce = (
        0.0  # weight of cross-entropy on rollouts that the rule decides, both classes alike
    )
    c.reward.rollout_rows = 64  # of them, so many of a step at most
    c.reward.updates = 1  # per policy step, on the same pairs and rows
    # Updates before the first policy step, each on fresh rollouts; in the arm `model` it is frozen after them.
    c.reward.warmup_updates = 0
    c.reward.replay = 0  # past rollouts with a verdict that are kept, of each class
    c.reward.replay_rows = 0  # so many of them join each update's rollouts
    # Controls.
    c.reward.rule_or_model = False  # reward 1 where the rule finds it correct, else the reward model's score
    c.reward.answer_required = False  # reward 0 where it is truncated, or the rule finds no answer
    c.reward.shuffle_labels = False  # a pair's members are exchanged with probability 1/2
    c.reward.allow_untrained_head = False  # let launch/train.py start from an untrained score head

    c.pairs = ConfigDict()
    c.pairs.per_prompt = 1  # at most so many pairs per prompt
    # Where a prompt's pairs take their negatives from, in turn: assistant (a rewrite) | swap (another problem's
    # reference) | own_answer (a wrong rollout, whose positive is the same text beside the answer that it gives):
    # --config.pairs.negatives="('assistant','swap')"
    c.pairs.negatives = ("assistant",)
    c.pairs.tries = 3  # requests to the assistant, or references, before a pair is masked
    c.pairs.length_ratio = 2.0  # a negative is at most this much longer or shorter (characters)

    c.rule = ConfigDict()
    c.rule.workers = 2  # math-verify processes
    c.rule.timeout = 5.0  # seconds a verdict
    c.rule.retry_timeout = 20.0  # seconds of the one further try, alone
    c.rule.memory_mb = 2048  # of one worker

    # --- language models that are asked ---
    # Rewrites positives into negatives.  A third kind, corrupt, edits numbers, seeded.
    c.assistant = asked_model("corrupt", max_new_tokens=512, temperature=0.7, top_p=0.95)
    # Says whether a completion's final answer equals the reference: launch/annotate.py, launch/evaluate.py.
    c.judge = asked_model("openai", max_new_tokens=256, temperature=0.0, top_p=1.0)
    # Writes the completions that launch/annotate.py labels.
    c.source = asked_model("openai", max_new_tokens=512, temperature=0.7, top_p=0.95)

    # --- supervised phases before step 1 ---
    c.supervised = ConfigDict()
    # A run directory: start from its models at step 0 instead of running the supervised phases.
    c.supervised.start_from = ""
    c.supervised.policy_steps = 0  # imitation of worked solutions
    c.supervised.policy_batch = 64
    c.supervised.policy_corrupt = 0.0  # share of demonstrations with a corrupted step (synthetic problems)
    # Synthetic problems: shares of right and of wrong solutions with the habit (cooper_jax/data/synthetic.py).
    c.supervised.policy_habit = (0.0, 0.0)
    c.supervised.reward_habit = (0.0, 0.0)
    c.supervised.policy_optimiser = optimiser(lr=1e-3, warmup_steps=50)
    c.supervised.reward_steps = 0  # binary cross-entropy on labelled triples
    c.supervised.reward_batch = 64
    # JSONL of question, reference_answer, completion, label; "" builds triples from worked solutions
    c.supervised.reward_data = ""
    c.supervised.reward_optimiser = optimiser(lr=1e-3, warmup_steps=50)

    # --- launch/annotate.py: completions are labelled where the rule and the judge agree ---
    c.annotate = ConfigDict()
    c.annotate.problems = 0  # at most so many of each problem set, drawn by the seed; 0: all
    c.annotate.samples = 1  # completions of a problem, from the source
    c.annotate.batch = 32  # local models: conversations answered at once; a kill loses at most so many
    # Of labelled rows, the larger class keeps at most max_ratio times as many as the smaller: within each source
    # (source), over all rows (overall), or not (off).  What is left out stays in the ledger.
    c.annotate.balance = "source"
    c.annotate.max_ratio = 1.0
    c.annotate.ask_again = False  # repeat the requests that failed in earlier starts

    # --- a reward model alone: launch/train_rm.py trains the model of `reward` on labelled completions ---
    c.train_rm = ConfigDict()
    c.train_rm.data = (
        ""  # files of labelled completions (cooper_jax/data/labelled_completions.py), separated by commas
    )
    c.train_rm.eval_data = ""  # the same, held out; "" holds out a part of `data`, whole questions
    c.train_rm.eval_share = 0.1  # so large a part, of the rows
    c.train_rm.exclude_overlap = True  # leave out held-out rows whose question is in the training data
    c.train_rm.max_characters = 8000  # training texts of more are dropped; 0 keeps all
    # This share of the wrong training completions is shown once more under a known reward hack, as wrong.
    c.train_rm.attacked = 0.0
    c.train_rm.epochs = 3
    c.train_rm.batch = 256  # rows an update, at most: an epoch is cut into equal parts
    c.train_rm.optimiser = optimiser(lr=2e-5, warmup_steps=20)
    c.train_rm.decay = "linear"  # of the learning rate, to 0 at the end: constant | linear | cosine
    # Number of microbatch widths (multiples of data.bucket, chosen for the data).  A microbatch holds about as many
    # tokens as reward.microbatch rows of reward.max_tokens, or half as many; each shape is one program.
    c.train_rm.widths = 6
    c.train_rm.eval_every = 0  # updates; 0: at the end of each epoch
    c.train_rm.keep_best = "auroc"  # auroc | accuracy | loss, on the held-out rows
    c.train_rm.patience = 0  # stop after so many evaluations without a better one; 0: never

    # --- devices ---
    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1
    # The axis that spans slices, where devices lie in several: TPU pods that a network joins, hosts of GPUs.
    c.mesh.across = "data"
    # A separate mesh for a model, data x fsdp x tensor as in "1x2x1", on the last devices of every host; "" shares
    # the policy's.  A reward model on its own mesh scores responses while others are still decoded.
    c.mesh.reward = ""
    c.mesh.reference = ""
    c.mesh.assistant = ""  # of a local one
    # Logical axis -> mesh axis, first that fits (None replicates).
    c.mesh.rules = (
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
    c.mesh.rollout_rules = (("embed", None),)

    # --- launch/evaluate.py ---
    c.benchmark = ConfigDict()
    c.benchmark.samples = 8  # a problem; like the next two, the paper's
    c.benchmark.temperature = 0.7
    c.benchmark.top_p = 0.95
    c.benchmark.max_new_tokens = 1024
    c.benchmark.max_prompt_tokens = 2048  # problems whose prompts are longer are dropped and counted
    c.benchmark.problems = 0  # of each benchmark: a fixed part, the same in every evaluation; 0: all
    c.benchmark.judged_by = "rule"  # rule | model (the reward model, above 0.5) | both
    c.benchmark.chunk = 64  # problems sampled at once; a kill loses at most so many
    c.benchmark.bootstrap = 1000  # resamplings behind each 95 % interval
    c.benchmark.exclude_seen = (
        True  # leave out questions that the reward model was trained on, where it judges
    )

    # --- what is kept ---
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # steps
    c.checkpoint.keep = 2  # newest ones; 0 keeps all
    c.eval = ConfigDict()
    c.eval.every = 20  # steps, from step 0 on; 0: never
    c.eval.problems = 256  # of data.eval, drawn over the whole file, the same in every run
    c.eval.samples = 1
    c.eval.temperature = 1.0
    c.eval.top_p = 1.0
    c.eval.greedy = False  # evaluate greedy responses as well
    c.eval.reward_rows = (
        0  # synthetic problems: labelled rows of each set on which the reward model is measured
    )
    c.log = ConfigDict()
    c.log.samples_every = 10  # steps between sample dumps
    c.log.samples = 2  # prompts in a dump
    c.log.pair_motion = (
        False  # measure how far each reward-model update moves its pairs (scores them twice more)
    )
    c.log.tensorboard = True
    return c
