"""Declaration of every setting with its default.  The other config files change some of these values.

    python launch/train.py --config=configs/tiny.py --config.steps=20 --config.reward.arm=rule

Each function below makes one section.  The comment after a field, or above it, is its documentation, which
--help prints.  Sizes are in tokens unless the comment gives another unit.  An empty string means "none".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The whole configuration."""
    c = ConfigDict()
    c.name = "base"  # name of the run; each config file sets its own
    c.seed = 0  # seed of all random draws
    # Cooper steps in all, those before a resumption included; 0: run the supervised phases alone
    c.steps = 180
    c.run_dir = ""  # directory of the run; "": runs/<name>
    # Correct each rollout until its tokens and log-probabilities are those of the learner's own forward pass
    # (docs/algorithms.md)
    c.exact = False
    # Verify, ask the assistant, render and tokenise while the devices compute, and update the reward model behind
    # the next rollout; False: one after the other, with the same numbers (docs/training.md)
    c.overlap = True
    # Steps (FROM, TO) whose profile is written to the folder `profile` of the run directory; (0, 0): none
    c.profile = (0, 0)
    # A step with values that are not finite: stop | skip (leave out the updates that it makes impossible)
    c.faults = "skip"
    c.faults_in_a_row = 3  # with skip: so many such steps in a row are allowed; one more ends the run
    # End the run after so many steps in a row in which an update of the reward model was due and not made; 0: never
    c.idle_steps = 20
    # What follows an alarm of the guard against reward hacking (docs/hacked.md): off | warn | freeze (the policy,
    # until the alarm ends) | rollback (to the checkpoint before it, then fallback) | fallback (from then on the
    # rule's verdict is the reward) | stop (with the step saved)
    c.hacking_guard = "warn"
    # Training problems whose worked solutions the reward model judges at each step (`hacking/anchor`); 0: none
    c.hacking_anchor = 0
    # Go back to the checkpoint of this step, once; later checkpoints, metrics and samples are kept under other
    # names; -1: resume from the newest
    c.resume_step = -1
    c.resume = True  # resume from the newest checkpoint in run_dir; False refuses a run_dir with a checkpoint

    # --- a training step ---
    c.data = data_section()
    c.rollout = rollout_section()
    c.policy = policy_section()
    c.reward = reward_section()
    c.pairs = pairs_section()
    c.rule = rule_section()

    # --- language models that write text on request ---
    # Rewrites positives into negatives.  A third kind, corrupt, changes numbers at random instead, and PATH.py:NAME
    # is a class of the user's own (docs/extending.md).
    # Its max_new_tokens=0 limits each rewrite to the positive's number of words + 500, so that none is cut.
    c.assistant = chat_section("corrupt", max_new_tokens=0, temperature=0.7, top_p=0.95)
    c.assistant.concurrency = 128  # all requests of a step at once, as far as the server takes them
    # The request for a rewrite.  careful (ours): one plausible mistake, carried to another final answer, in the
    # positive's style; released (the authors' intent in our words): wrong and misleading throughout
    c.assistant.prompt = "careful"
    # kind=openai: ask the server one question at the start, and end the run if it does not answer
    c.assistant.probe = True
    # kind=openai: seconds in which a server that is starting, and does not answer yet, is asked again
    c.assistant.start_timeout = 0.0
    # Judges in launch/annotate.py and launch/evaluate.py if a completion's final answer equals the reference.
    c.judge = chat_section("openai", max_new_tokens=256, temperature=0.0, top_p=1.0)
    # Writes the completions that launch/annotate.py labels.
    c.source = chat_section("openai", max_new_tokens=512, temperature=0.7, top_p=0.95)

    # --- other phases and jobs ---
    c.supervised = supervised_section()
    c.annotate = annotate_section()
    c.train_rm = train_rm_section()

    # --- devices, evaluation and records ---
    c.mesh = mesh_section()
    c.benchmark = benchmark_section()
    c.serve = serve_section()
    c.eval = eval_section()
    c.checkpoint = checkpoint_section()
    c.log = log_section()
    return c


# --- problems and sampling ---------------------------------------------------------------------------


def data_section() -> ConfigDict:
    """Problems to train and to evaluate on, and their prompts."""
    c = ConfigDict()
    # --- files ---
    # Files, globs, folders or Hugging Face hub ids (openai/gsm8k:main:train), separated by commas, each with a
    # name for reports if you like (NAME=FILE); or the name of a tensorflow-datasets data set.  "" with format
    # "synthetic".  docs/data.md has the details.
    c.train = ""
    c.train_weights = ""  # a weight for each source, as in "3,1"; "": the sources are one set
    # auto | the name of a published format (docs/data.md) | jsonl, csv or parquet (the columns that question_key
    # and its neighbours name, whatever the file's type) | tfds | synthetic
    c.format = "auto"
    c.eval = ""  # such sources for the periodic evaluation; "": problems of eval_from_train
    c.eval_weights = ""  # shares of eval.problems for each source; "": the sources are one set
    # Without data.eval: the number of problems of the training file that are held out for evaluation, the
    # same ones in every run; 0: none, and no evaluation
    c.eval_from_train = 0
    c.eval_format = "auto"  # format of data.eval, with the values of data.format
    # Leave out problems of data.eval whose question the reward model is trained on, in this run or before it
    # (seen_questions.json beside its weights); False: evaluate on them too.  Their number is printed in both
    # cases.
    c.exclude_seen = True

    # Use the first of training problems whose question and reference are equal (DAPO-Math-17k has each 100
    # times); False: all of them
    c.drop_duplicates = False

    # --- columns and splits ---
    # A column may be nested: reward_model.ground_truth.
    c.question_key = "question"  # column of the question, which is text or a list of messages
    c.reference_key = "answer"  # column of the reference answer
    c.solution_key = ""  # column of worked solutions; "": there is none
    # Reduce a reference that is a worked solution to the answer that it marks, and refuse one that marks none;
    # False: use such references whole
    c.reduce_solutions = True
    c.tfds_dir = ""  # folder of tensorflow-datasets' prepared data sets; "": the library's default
    # Split to train on: of tensorflow-datasets, and of folders and hub data sets whose source names none
    c.split = "train"
    c.eval_split = "test"  # split to evaluate on, of the same

    # --- prompts and batches ---
    c.system = ""  # system message of the policy's prompt; "": none, or that of prompts that are messages
    # Text that follows the question in the policy's prompt; prompts that are messages stay as they are
    c.instruction = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    c.chat = True  # wrap prompts in the tokenizer's chat template
    # on | off: the value of the chat template's `enable_thinking` (Qwen3's template has it); "": not set
    c.thinking = ""
    c.prompts_per_step = 128  # B, the prompts of a step
    # Dynamic sampling (DAPO): flat groups are replaced by groups of the next problems, of which a step samples at
    # most this number; 0: off
    c.refill_prompts = 0
    c.max_prompt_tokens = 512  # longer prompts are dropped and counted
    c.bucket = 64  # widths of batches are rounded up to a multiple of this
    c.synthetic_size = 4096  # number of distinct synthetic training problems
    return c


def rollout_section() -> ConfigDict:
    """Sampling of the policy's responses."""
    c = ConfigDict()
    # --- sampling ---
    c.group_size = 16  # G, the responses to each prompt
    c.max_new_tokens = 512  # limit of a response; longer responses are truncated
    c.temperature = 1.0  # temperature of sampling, and of the log-probabilities in the policy's loss
    # Filters of sampling; the policy's loss renormalises over the tokens that they keep (docs/algorithms.md)
    c.top_k = 0  # keep the top_k most likely tokens; 0: off
    c.top_p = 1.0  # keep the most likely tokens whose probabilities add up to top_p; 1: off
    c.min_p = 0.0  # keep tokens of at least min_p times the largest probability; 0: off

    # --- batching ---
    # Number of slots, that is of rows decoded at once; the slot of a finished row takes the next row.  0: all
    # rows at once, so that a prompt's samples share one copy of its keys and values.
    c.max_rows = 0
    # GiB of one device for the rollout's weights, caches and slots: as many slots as fit.  0: no limit.
    c.memory_gib = 0.0
    c.segment = 64  # tokens decoded before the host checks for finished rows
    # 1: on a mesh of its own (mesh.rollout) the next step is sampled while a step is graded and trained on, with
    # weights that are one update old (docs/algorithms.md); 0: each step is sampled with the current weights
    c.ahead = 0

    # --- types and kernels ---
    c.dtype = "float32"  # type of the rollout's weights and activations: float32 or bfloat16
    # auto: Pallas kernels on TPUs and GPUs if they support the head_dim, otherwise plain XLA; xla: plain XLA
    c.kernels = "auto"
    # The rollout's copy of the weights.  gathered: by mesh.rollout_rules; sharded: as in training, each layer
    # gathered at every token, for models that do not fit otherwise; auto: gathered if that takes at most half
    # of memory_gib, or of the device's memory.
    c.weight_placement = "auto"
    c.kv_dtype = ""  # type of the KV cache: float32, bfloat16 or int8; "": as dtype
    return c


# --- models ------------------------------------------------------------------------------------------


def model_source() -> ConfigDict:
    """Settings of a model: weights, tokenizer and compute type."""
    c = ConfigDict()
    # A Hugging Face directory, a hub id, a .gguf file, "package:NAME/FILE.gguf" (a file inside an installed
    # Python package), or "random" for fresh weights of the shape in `arch`.
    c.weights = "random"
    c.tokenizer = ""  # a directory, a hub id or a .model file; "": the tokenizer beside the weights
    c.num_layers = 0  # keep only this number of first layers of the model; 0: keep all
    # The vocabulary is padded to a multiple of this number.  With 256 times mesh.tensor, every shard consists
    # of whole kernel tiles.  Padding is never sampled and not exported.
    c.vocab_multiple = 1
    c.dtype = "float32"  # compute type: float32 or bfloat16 (master weights are always float32)
    c.arch = arch()
    return c


def trained_model() -> ConfigDict:
    """Settings of a model that is trained."""
    c = model_source()
    c.remat = True  # recompute each layer's activations in the backward pass
    c.lora = lora()
    return c


def lora() -> ConfigDict:
    """Low-rank adapters (docs/lora.md): trained in place of the weights, which are frozen."""
    c = ConfigDict()
    c.rank = 0  # columns of each adapter; 0: no adapters, all weights are trained
    c.alpha = 32.0  # the adapters' product is multiplied by alpha / rank
    c.targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # matrices that have adapters
    c.rslora = False  # alpha / sqrt(rank) in place of alpha / rank
    c.base_dtype = "float32"  # of the frozen weights; bfloat16 takes half the memory
    return c


def arch() -> ConfigDict:
    """The shape of a model made from scratch (weights = "random")."""
    c = ConfigDict()
    c.family = "llama"  # llama, qwen2, qwen3, mistral, smollm3 or gemma3_text: docs/models.md
    c.layers = 2  # number of transformer blocks
    c.vocab_size = 640  # number of pieces of the sentencepiece model that is trained for the model
    c.width = 128  # width of the residual stream
    c.heads = 4  # number of query heads
    c.kv_heads = 2  # number of key and value heads, which divides that of the query heads
    c.head_dim = 32  # width of one head
    c.ffn = 384  # width of the feed-forward layer
    c.rope_theta = 10000.0  # base of the rotary positions
    c.tied = True  # the output head is the embedding, transposed
    return c


def optimiser(lr: float, warmup_steps: int, decay: str = "constant") -> ConfigDict:
    """AdamW with a linear warm-up and then a learning rate that is constant or decays.

    Weight decay applies to all parameters, biases and norms included, as in the authors' RL code; their
    VerifyRM training leaves both out.
    """
    c = ConfigDict()
    c.lr = lr  # learning rate after the warm-up
    c.warmup_steps = warmup_steps  # updates over which the learning rate rises linearly
    # constant | linear | cosine: how the learning rate falls after the warm-up, to 0 at the run's last update
    c.decay = decay
    c.b1 = 0.9  # decay of the first moment
    c.b2 = 0.999  # decay of the second moment
    c.eps = 1e-8  # added to the root of the second moment
    c.weight_decay = 0.01  # decoupled, times the learning rate; on all parameters
    c.clip_norm = 1.0  # gradients are scaled down to this global norm
    # Type in which AdamW's first moment is stored: float32, or bfloat16, which takes 2 of the 12 bytes of a trained
    # weight less.  The second moment is always float32
    c.first_moment = "float32"
    return c


def policy_section() -> ConfigDict:
    """The policy and its GRPO update; docs/method.md has the equations."""
    c = trained_model()
    c.optimiser = optimiser(lr=1e-6, warmup_steps=20)

    # released | grpo | dr_grpo | dapo | gspo | gspo_token | cispo | rloo | reinforce_pp | reinforce_pp_baseline:
    # sets the fields that cooper_jax/policy/algorithms.py lists; a flag for one of these fields takes precedence
    c.algorithm = ""

    # --- advantages ---
    # What is subtracted from a reward: the mean of its group's (group_mean), of the group's others (leave_one_out),
    # or of the step's (batch_mean)
    c.baseline = "group_mean"
    # The standard deviation by which advantages are divided: of the group's rewards (group), of all advantages of
    # the step (batch), or none
    c.std = "group"
    c.std_eps = 1e-6  # added to the standard deviation
    c.std_floor = 0.0  # lower bound of the standard deviation
    # A group is flat if its rewards have at most this standard deviation, or if they are all equal: see
    # mask_flat_groups and data.refill_prompts
    c.flat_std = 0.0

    # --- loss ---
    c.loss = "clip"  # clip (PPO, GRPO) | gspo | gspo_token | cispo; docs/algorithms.md has the equations
    c.aggregation = "token_mean"  # token_mean | sequence_mean | sequence_sum (Dr. GRPO)
    c.mask_truncated = False  # leave truncated responses out of the loss (DAPO)
    # Leave flat groups out of the loss and its normalisation.  Without an advantage they otherwise make the other
    # groups' part smaller
    c.mask_flat_groups = False
    c.clip_low = 0.2  # the probability ratio is clipped below 1 - clip_low
    c.clip_high = 0.2  # the probability ratio is clipped above 1 + clip_high
    c.dual_clip = 3.0  # bound on ratio * |advantage| for negative advantages; 0: off
    # Weight of the KL divergence from the reference, which is the policy at step 0; 0: no reference is held
    c.kl_coef = 0.001
    c.kl_estimator = "k3"  # k1 | k2 | k3
    c.kl_clamp = 10.0  # bound on the estimate of each token; 0: off
    c.entropy_coef = 0.0  # weight of the policy's entropy, which is maximised; 0: off

    # --- difference between the sampler's and the learner's log-probabilities (docs/algorithms.md) ---
    # Importance weights in the loss: none | token | sequence (truncated) | token_mask | sequence_mask; auto: token
    # if the rollout's weights or cache are not float32, else none
    c.correction = "auto"
    c.correction_cap = 2.0  # bound of a weight

    # --- updates ---
    c.epochs = 1  # passes over a step's rollouts
    c.minibatches = 1  # optimiser updates per pass
    c.microbatch = 64  # rows in one forward and backward pass
    # Several responses share a row of the update and of the log-probabilities, so that little is computed for
    # padding.  A microbatch has at most as many tokens as `microbatch` rows of the longest prompt and response.
    # auto (on CPUs and TPUs, and on GPUs without cuDNN's attention; not with exact=True) | on | off
    c.packing = "auto"
    # With packing, the responses to a prompt that share a row share the prompt, which is computed once.  On TPUs
    # and for models with sliding windows each has its own, as with share_prompts=False.
    c.share_prompts = True
    return c


def reward_section() -> ConfigDict:
    """The policy's reward, and the reward model with its update; docs/reward_updates.md has the equations."""
    c = trained_model()
    c.arm = "cooper"  # rule | model (reward model frozen) | cooper
    c.optimiser = optimiser(lr=1e-5, warmup_steps=0)
    c.max_tokens = 2048  # limit of a reward-model input; longer completions are truncated in the middle
    c.microbatch = 64  # rows, or pairs, in one pass
    # Several inputs share a row of scores and updates, as with policy.packing: auto | on | off
    c.packing = "auto"
    # released | sigmoid | robust: sets the fields that cooper_jax/trainer/recipes.py lists; a flag for one of
    # these fields takes precedence
    c.recipe = ""

    # --- loss ---
    c.pair_loss = "logit"  # contrastive loss on: logit (released) | sigmoid (the rewards)
    c.pair_weight = 1.0  # weight of the contrastive loss
    c.pair_bce = 0.0  # weight of cross-entropy on the members of pairs
    c.rollout_bce = 0.0  # weight of cross-entropy on rollouts with a verdict of the rule, classes balanced
    c.rollout_rows = 64  # largest number of such rollouts per step

    # --- updates ---
    c.updates = 1  # updates per policy step, on the same pairs and rows
    # Updates before the first policy step, each on fresh rollouts; the arm `model` freezes the reward model
    # after them
    c.warmup_updates = 0
    c.replay = 0  # number of past rollouts with a verdict that are kept, of each class
    c.replay_rows = 0  # number of these past rollouts that join the rollouts of each update

    # --- rewards by name, in place of the arm's (docs/extending.md) ---
    # Functions (prompts, completions, **columns) -> list of numbers or None, as PATH.py:NAME, and built-in rewards
    # (rule, model, rule_or_model, rule_then_model, answer_required), separated by commas; "": the arm's reward
    c.functions = ""
    c.function_weights = ""  # their weights in the sum, separated by commas, as in 1,0.5; "": 1 each
    c.function_normalise = False  # normalise each within its group before the sum (GDPO, arXiv 2601.05242)
    # Pass prompts and completions as lists of messages, as TRL does for conversational data; False: as text
    c.function_messages = False
    c.function_timeout = 60.0  # seconds per call of a user's function, for the responses to one prompt

    # --- rewards ---
    # Rewards sigmoid((z - b) / T), with temperature T and threshold b of calibration.json beside reward.weights;
    # False: sigmoid(z), as in the paper
    c.calibrated = False

    # Tokens before rollout.max_new_tokens in which a response loses up to 1 of its reward, linearly (DAPO's penalty
    # on long responses, arXiv 2503.14476, eq. 13); 0: no penalty
    c.overlong_tokens = 0

    # --- controls ---
    # Control: reward 1 or 0 where the rule decides (correct, wrong, no answer), and the reward model's score where
    # it abstains; not together with rule_or_model
    c.rule_then_model = False
    # Control: reward 1 if the rule finds a response correct, otherwise the reward model's score
    c.rule_or_model = False
    c.answer_required = False  # control: reward 0 for a truncated response and if the rule finds no answer
    c.shuffle_labels = False  # control: a pair's members are exchanged with probability 1/2
    c.allow_untrained_head = False  # let launch/train.py start from an untrained score head
    return c


def pairs_section() -> ConfigDict:
    """Contrastive pairs for the reward model's update."""
    c = ConfigDict()
    c.per_prompt = 1  # largest number of pairs per prompt
    # Sources of negatives, which a prompt's pairs take in turn: assistant (a rewrite) | swap (the reference
    # of another problem) | own_answer (a wrong rollout, whose positive is the same text beside the answer
    # that it states): --config.pairs.negatives="('assistant','swap')"
    c.negatives = ("assistant",)
    c.tries = 3  # requests to the assistant, or references, before a pair is masked
    c.length_ratio = 2.0  # bound on the ratio of the lengths of negative and positive, in characters
    return c


def rule_section() -> ConfigDict:
    """The rule verifier."""
    c = ConfigDict()
    c.workers = 2  # number of worker processes
    c.timeout = 1.0  # CPU seconds per verdict
    # CPU seconds that all verdicts over the limit may take until a step's verdicts are collected; then the limit
    # is 0.2 s
    c.step_budget = 2.0
    c.memory_mb = 2048  # memory of one worker, in MB
    # PATH.py:NAME of a function (question, reference, completion, **columns) -> True, False or None (no verdict),
    # which decides in place of the rule, in the same processes; "": the rule (docs/extending.md)
    c.judge = ""
    return c


def chat_section(kind: str, max_new_tokens: int, temperature: float, top_p: float) -> ConfigDict:
    """A language model that writes text on request: local weights, or a server."""
    c = model_source()
    c.kind = kind  # local (our rollout) | openai (a server)

    # --- servers ---
    c.url = ""  # openai: the server's base address, http://HOST:PORT/v1; without a key in it
    c.model = ""  # openai: the model's name on the server
    # openai: the environment variable that contains the key; its name in capital letters, never the key itself
    c.key_env = "OPENAI_API_KEY"
    c.concurrency = 16  # openai: number of simultaneous requests
    c.timeout = 60.0  # openai: seconds per request
    c.retries = 3  # openai: retries after connection errors, 429 and 5xx, with back-off
    # openai: request fields that the server refuses: FIELD=NEW_NAME renames one, FIELD= drops it, as in
    # "max_tokens=max_completion_tokens,seed="; of max_tokens, temperature, top_p, seed and chat_template_kwargs
    c.fields = ""

    # --- requests and replies ---
    # on | off: the value of the chat template's `enable_thinking` (Qwen3's template has it); "": not set.
    # Servers get it in `chat_template_kwargs`, a field that vLLM and SGLang accept and others may refuse.
    c.thinking = ""
    # local: longer conversations fail, each by itself; 0: the model's maximum length minus max_new_tokens
    c.max_prompt_tokens = 0
    c.max_new_tokens = max_new_tokens  # limit of a reply
    c.temperature = temperature  # 0: greedy
    c.top_p = top_p  # 1: off
    return c


# --- phases and jobs beside the steps ----------------------------------------------------------------


def supervised_section() -> ConfigDict:
    """Supervised phases before step 1."""
    c = ConfigDict()
    # A run directory: start from this run's models at step 0 instead of running the supervised phases
    c.start_from = ""
    # The reward model alone, in place of that of start_from: a run directory whose reward model at step 0 is taken,
    # or own: reward.weights, and the phase below; "": that of start_from
    c.reward_from = ""

    # --- policy: imitation of worked solutions ---
    c.policy_steps = 0  # number of updates of the policy; 0: none
    c.policy_batch = 64  # solutions per update
    c.policy_corrupt = 0.0  # synthetic problems: share of demonstrations with a corrupted step
    # Synthetic problems: shares of right and of wrong demonstrations with the habit of skipping the steps
    # (cooper_jax/data/synthetic.py)
    c.policy_habit = (0.0, 0.0)
    # Synthetic problems: the same shares of the labelled completions that train the reward model
    c.reward_habit = (0.0, 0.0)
    c.policy_optimiser = optimiser(lr=1e-3, warmup_steps=50)

    # --- reward model: binary cross-entropy on labelled completions ---
    c.reward_steps = 0  # number of updates of the reward model; 0: none
    c.reward_batch = 64  # completions per update, half of them right
    # A file of labelled completions (cooper_jax/data/labelled_completions.py); "": make them from the worked
    # solutions
    c.reward_data = ""
    c.reward_optimiser = optimiser(lr=1e-3, warmup_steps=50)
    return c


def annotate_section() -> ConfigDict:
    """launch/annotate.py: completions are labelled where the rule and the judge agree."""
    c = ConfigDict()
    c.problems = 0  # largest number of problems per problem set, drawn by the seed; 0: all
    c.samples = 1  # completions that the source writes per problem
    c.batch = 32  # local models: conversations answered at once, which a SIGKILL can lose
    # Drop rows of the larger class within each source (source) or over all rows (overall) until it has at
    # most max_ratio times as many as the smaller class; off: keep all rows.  Dropped rows stay in the ledger.
    c.balance = "source"
    c.max_ratio = 1.0  # largest ratio of the larger class to the smaller one after balancing
    c.ask_again = False  # repeat the requests that failed in earlier starts of the job
    return c


def train_rm_section() -> ConfigDict:
    """launch/train_rm.py: trains the model of `reward` alone, on labelled completions."""
    c = ConfigDict()
    # --- data ---
    # Files of labelled completions (cooper_jax/data/labelled_completions.py), separated by commas
    c.data = ""
    c.eval_data = ""  # such files for the evaluation; "": hold out some questions of train_rm.data
    c.eval_share = 0.1  # without eval_data: the share of rows held out
    c.exclude_overlap = True  # leave out held-out rows whose question is in the training data
    c.max_characters = 8000  # longer training texts are dropped; 0: keep all
    # The next three are rows that are added to the training rows, as shares of their number; the paper has none.
    # Copies under a known reward hack, made from as many right as wrong completions
    c.attacked = 0.0
    # Right completions beside another reference, as wrong; the rule verifier (section rule) confirms it
    c.other_references = 0.0
    # Wrong completions beside the answer that they give themselves, as right; the rule verifier confirms it
    c.own_references = 0.0

    # --- updates ---
    c.epochs = 3  # passes over the training rows
    c.batch = 256  # largest number of rows per update; an epoch is split into equal parts
    c.optimiser = optimiser(lr=2e-5, warmup_steps=20, decay="linear")
    # Number of microbatch widths (multiples of data.bucket, chosen for the data).  A microbatch has about as
    # many tokens as reward.microbatch rows of reward.max_tokens, or half as many; each shape is one program.
    c.widths = 6

    # --- evaluation ---
    c.eval_every = 0  # updates between evaluations; 0: evaluate at the end of each epoch
    c.keep_best = "auroc"  # measure of the best model on the held-out rows: auroc | accuracy | loss
    c.patience = 0  # stop after this number of evaluations without an improvement; 0: never
    return c


def benchmark_section() -> ConfigDict:
    """launch/evaluate.py: benchmarks."""
    c = ConfigDict()
    c.samples = 8  # responses per problem; the paper's value, like temperature and top_p
    c.temperature = 0.7  # sampling temperature of the responses
    c.top_p = 0.95  # top-p of the responses; 1: off
    c.max_new_tokens = 1024  # limit of a response
    c.max_prompt_tokens = 2048  # problems with longer prompts are dropped and counted
    c.problems = 0  # number of problems per benchmark, the same ones in every evaluation; 0: all
    c.judged_by = "rule"  # rule | model (the reward model, correct above 0.5) | both
    c.chunk = 64  # problems sampled at once, which a SIGKILL can lose
    c.bootstrap = 1000  # resamplings for each 95 % interval
    c.exclude_seen = True  # if the reward model judges, leave out questions that it was trained on
    return c


def serve_section() -> ConfigDict:
    """launch/serve.py: an OpenAI-compatible server."""
    c = ConfigDict()
    # --- what is served, and to whom ---
    # policy (chat completions) | reward (scores) | all: those that the run has or whose weights are set
    c.models = "all"
    c.policy_name = "policy"  # the policy's name in requests (`model`)
    c.reward_name = "verifyrm"  # the reward model's name in requests
    c.host = "127.0.0.1"  # address to listen on; others than this machine's own need a key
    c.port = 8000  # port to listen on; 0: a free one, which is printed
    # Environment variable that contains the API key (its name in capital letters); without a value in it no key is
    # asked for.  "": never a key
    c.key_env = "COOPER_API_KEY"

    # --- sizes, which are fixed when the server starts ---
    c.slots = 16  # replies that are decoded at a time
    c.max_prompt_tokens = 1024  # longer conversations are refused
    c.max_new_tokens = 1024  # limit of a reply, and its length where a request sets none
    c.segment = 8  # tokens decoded between two looks for new requests; also those of a streamed piece

    # --- limits ---
    c.max_waiting = 256  # replies that may wait for a slot; more are refused (429)
    c.max_waiting_scores = 4096  # completions that may wait for a score; more are refused (429)
    c.max_body_mb = 4.0  # megabytes of a request's body; larger ones are refused (413)
    c.body_timeout = 30.0  # seconds that a client may take to send a body (408)
    c.timeout = 600.0  # seconds that a request may take, waiting included (504)
    c.shutdown_timeout = 30.0  # seconds that requests get to finish after SIGTERM; then they fail (503)
    return c


# --- devices and records -----------------------------------------------------------------------------


def mesh_section() -> ConfigDict:
    """Devices of the models, and the rules by which arrays are sharded over them."""
    c = ConfigDict()
    # --- the policy's mesh ---
    c.data = 1  # devices along the axis `data`, which splits the batch and copies the weights; -1: the rest
    c.fsdp = -1  # devices along the axis `fsdp`, which splits the batch and the weights; -1: the rest
    # Devices along the axis `tensor`, which splits heads, feed-forward layers and vocabulary; -1: the rest
    c.tensor = 1
    # The axis that spans several slices (TPU pods, or hosts with GPUs), whose network is slower
    c.across = "data"
    # On TPUs: multiply with pieces of a gathered matrix while others travel.  Scores then move 3.2 times the bytes
    # of device memory (docs/compile.md)
    c.collective_matmul = False

    # --- meshes of the other models, and of the rollouts ---
    # A separate mesh for the reward model, data x fsdp x tensor as in "1x2x1", on the last devices of every
    # host; "": share the policy's mesh.  On its own mesh it scores responses while others are still decoded.
    c.reward = ""
    c.reference = ""  # a separate mesh for the frozen reference, as for the reward model
    c.assistant = ""  # a separate mesh for a local assistant, as for the reward model
    c.rollout = ""  # a separate mesh for the training rollouts: rollout.ahead=1 needs it

    # --- sharding ---
    # Logical axis -> mesh axis; the first rule that fits applies (None: replicate)
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
    # Rules that are tried first for a rollout's copy of the weights, which is then gathered once per step,
    # not at every token
    c.rollout_rules = (("embed", None),)
    return c


def eval_section() -> ConfigDict:
    """The periodic evaluation on held-out problems."""
    c = ConfigDict()
    c.every = 20  # steps between evaluations, from step 0 on; 0: never
    c.problems = 256  # number of problems, drawn over the whole file of data.eval, the same in every run
    c.samples = 1  # responses per problem
    c.temperature = 1.0  # sampling temperature of the responses
    c.top_p = 1.0  # top-p of the responses; 1: off
    c.greedy = False  # evaluate greedy responses as well
    c.reward_rows = 0  # synthetic problems: rows of each labelled set on which the reward model is measured
    return c


def checkpoint_section() -> ConfigDict:
    """Checkpoints in the run directory."""
    c = ConfigDict()
    c.every = 20  # steps between checkpoints
    c.keep = 2  # number of newest checkpoints that are kept; 0: all
    return c


def log_section() -> ConfigDict:
    """Logs in the run directory."""
    c = ConfigDict()
    c.samples_every = 10  # steps between dumps of samples, besides the dump of step 1; 0: never
    c.samples = 2  # number of prompts in a dump
    # Measure how far each update of the reward model moves the logits of its pairs, which costs two more
    # forward passes over the pairs
    c.pair_motion = False
    # Steps between measurements of giveaways: how well n-grams, length and layout alone tell the last rewrites
    # from their positives (pairs/giveaway_auroc; 0.5: not at all); 0: never
    c.giveaway_every = 10
    c.giveaway_pairs = 256  # number of last rewrites that are measured, which checkpoints keep
    # Steps between responses that are shown on the terminal, besides one of step 1; 0: never
    c.show_samples = 20
    # Trackers that get metrics and samples, separated by commas: tensorboard | wandb | trackio | mlflow, and
    # classes or functions of your own as PATH.py:NAME (docs/trackers.md); "": none
    c.to = "tensorboard"
    return c
