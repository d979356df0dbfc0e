"""Setup of a run: from a config to the components and the state at step 0.

1. `read_settings` checks the config and returns typed settings, or reports all errors of the config at once.
2. run_problems.py reads the training and the held-out problems.  Held-out problems on which the reward model
   is trained are excluded (data/contamination.py), and a part of the others is chosen.  Problems with too long
   prompts are dropped and counted.
3. `build_components` loads both models with their tokenizers, starts the rule verifier's workers and the
   assistant, and yields `Components`, which never change, and `State`, which every step replaces (state.py).
   Nothing is compiled yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from cooper_jax.data import contamination, policy_prompts, prompts, synthetic
from cooper_jax.data.tokenizer_corpus import make_task_corpus
from cooper_jax.llm.chat import ChatConfig
from cooper_jax.llm.local_chat import make_local_generate
from cooper_jax.llm.probe import probe_server
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.loading import (
    Directory,
    check_length,
    describe_model,
    load_model,
    load_tokenizer,
    train_tokenizer,
)
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.policy import grpo
from cooper_jax.policy.sampler_mismatch import choose_correction
from cooper_jax.reward import assistants, verifier_model
from cooper_jax.reward.calibration import Calibration
from cooper_jax.reward.multihost import check_same_code, share_over_hosts
from cooper_jax.rollout import engine, exact
from cooper_jax.rule.verifier import READY_ITEM, RuleVerifier
from cooper_jax.rule.worker_process import make_item
from cooper_jax.runtime import hosts, mesh, optim
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.runtime.device_layouts import lay_out_models, make_layouts
from cooper_jax.settings.setup_errors import ErrorCollector, SetupError, setup_errors
from cooper_jax.trainer import run_problems
from cooper_jax.trainer.input_digests import check_inputs
from cooper_jax.trainer.reward_functions import load_reward_functions
from cooper_jax.trainer.rollout_thread import open_rollout_thread
from cooper_jax.trainer.run_calibration import load_run_calibration
from cooper_jax.trainer.run_problems import RunProblems
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.state import Components, LogprobsFunction, PolicyBundle, RewardBundle, State
from cooper_jax.trainer.user_files import check_user_assistant, list_user_code
from cooper_jax.types import Problem, TrainState


def load_inputs(settings: RunSettings, layouts: dict[str, mesh.Layout], run_dir: Directory) -> RunProblems:
    """Load the problems, record their sources, and check the models' directories before weights are read.

    Raises SetupError with every file that cannot be read and every model without a tokenizer or a shape, so
    that one start of a run shows them all; then with every file that is not what the run began with.
    """
    errors = ErrorCollector()
    with errors.collect("assistant"):
        check_user_assistant(settings)
    problems = RunProblems([], [])
    with errors.collect("data"):
        problems = run_problems.load_problems(settings, run_dir)
    sources = {"policy": settings.policy_model}
    if settings.reward.has_model:
        sources["reward"] = settings.reward_model
    if settings.assistant is not None and settings.assistant.kind == "local":
        sources["assistant"] = settings.assistant_model
    for name, source in sources.items():
        with errors.collect(name):
            # Models from scratch read the text of the task.  Without it no tokenizer is trained: the next start of
            # the run would find it.
            if source.weights == "random" and not source.tokenizer and not settings.data.is_synthetic:
                if not problems.train:
                    continue
                texts = make_task_corpus(problems.train, settings.data.prompt_style)
                train_tokenizer(source.arch.vocab_size, name, run_dir, texts)
            model = describe_model(source, name, run_dir, layouts[name])
            if name == "reward":
                check_length(model.config, name, {"reward.max_tokens": settings.reward.max_tokens})
                prompts.check_response_room(
                    model.tokenizer, settings.rollout.max_new_tokens, settings.reward.max_tokens
                )
    errors.raise_if_any()
    with setup_errors("run_dir"):
        check_inputs(settings, problems, sources, run_dir)
        run_problems.record_sources(problems, run_dir)
    return problems


def read_settings(cfg: ConfigDict) -> RunSettings:
    """Read and check the config's typed settings.

    Raises SetupError that lists all errors that can be found without reading a file.
    """
    errors = ErrorCollector()
    with errors.collect("settings"):
        settings = RunSettings.from_config(cfg)

    # The mesh is read from cfg, since a config with an error in another section has no RunSettings.
    with errors.collect("mesh"):
        _check_rows(cfg, make_layouts(cfg)["policy"].batch_shards, errors)
    errors.raise_if_any()
    return settings


def _check_rows(cfg: ConfigDict, shards: int, errors: ErrorCollector) -> None:
    """Check that a step's rows divide over the mesh.

    shards: the batch shards of the policy's mesh.  errors: receives the messages.
    """
    # A single minibatch is padded to a multiple of the shards.  Several minibatches must divide exactly,
    # since the permutation would spread the padding rows unevenly.
    rows, minibatches = cfg.data.prompts_per_step * cfg.rollout.group_size, cfg.policy.minibatches
    errors.require(
        minibatches <= 1 or rows % (shards * minibatches) == 0,
        f"policy.minibatches={minibatches}: a step has {rows} rows (data.prompts_per_step x "
        f"rollout.group_size); this must be a multiple of {minibatches * shards}, the minibatches times the "
        f"mesh's {shards} batch shards",
    )
    errors.require(
        cfg.rollout.max_rows <= 0 or cfg.rollout.max_rows >= shards,
        f"rollout.max_rows={cfg.rollout.max_rows} is less than one row on each of the mesh's {shards} batch "
        "shards: raise it, or set 0 for no bound",
    )


@contextlib.contextmanager
def build_components(cfg: ConfigDict, run_dir: Directory) -> Iterator[tuple[Components, State]]:
    """Build the components and the state at step 0, before any supervised phase.

    On exit the rule's worker processes end and the assistant is closed.  Raises SetupError for settings,
    files and weights that cannot be used.
    """
    settings = read_settings(cfg)
    CONSOLE.begin_stage("finding the devices")
    layouts = lay_out_models(settings.mesh)
    CONSOLE.begin_stage("reading the problems")
    problems = load_inputs(settings, layouts, run_dir)
    reward_functions = load_reward_functions(settings.reward, problems.train, settings.data.prompt_style)
    calibration = load_run_calibration(settings, run_dir)
    CONSOLE.begin_stage("comparing held-out problems with training questions")
    unseen = contamination.exclude_contaminated(cfg, run_dir, problems.train, problems.held_out)
    chosen = run_problems.choose_held_out(
        unseen, problems.held_out, settings.eval.problems, settings.data.eval_shares
    )

    with contextlib.ExitStack() as stack:
        if reward_functions is not None:
            stack.callback(reward_functions.close)

        CONSOLE.begin_stage("starting the rule verifier")
        # This first request starts a worker process of the rule verifier while the models are loaded.
        with setup_errors("rule"):
            local_rule = stack.enter_context(RuleVerifier(settings.rule))
            check_same_code([local_rule.judge, *list_user_code(settings, reward_functions)])

            # A user's judge is tried on a problem of the run; the answer to it need not be right.
            first = READY_ITEM
            if settings.rule.judge:
                first = make_item(
                    problems.train[0], problems.train[0].solution or problems.train[0].reference
                )
            local_rule.submit([first])

        # Models.
        CONSOLE.begin_stage("loading the policy")
        policy, policy_state = build_policy_bundle(settings, layouts, run_dir)
        reward, reward_state = None, None
        if settings.reward.has_model:
            CONSOLE.begin_stage("loading the reward model")
            reward, reward_state = build_reward_bundle(settings, layouts["reward"], run_dir, calibration)

        CONSOLE.begin_stage("encoding the problems")
        # Prompts need the policy's tokenizer, so problems are encoded after the models are loaded.
        data = settings.data
        with setup_errors(f"data.chat={data.chat}, data.max_prompt_tokens={data.max_prompt_tokens}"):
            policy_prompts.check_thinking(policy.model.tokenizer, data.prompt_style)
            train = run_problems.encode_problems(data, policy.model.tokenizer, problems.train)
            held_out = run_problems.encode_problems(data, policy.model.tokenizer, chosen)
        for line in run_problems.describe_sources(
            problems, train, held_out, data.max_prompt_tokens, verified=not settings.rule.judge
        ):
            hosts.print_once(line)
        if reward is not None:
            _check_reward_inputs(settings, reward.model.tokenizer, (*train.problems, *held_out.problems))

        CONSOLE.begin_stage("waiting for the rule verifier")
        # Services.  `check_ready` waits for the rule's first answer; a local assistant loads a third model.
        with setup_errors("rule"):
            local_rule.check_ready(first)
        assistant = None
        if settings.assistant is not None:
            CONSOLE.begin_stage("starting the assistant")
            if settings.assistant.kind == "openai" and settings.rewrite.probe:
                with setup_errors("assistant"):
                    probe_server(settings.assistant, settings.rewrite.start_timeout)
            assistant = build_assistant(
                cfg, settings.assistant, settings.rewrite, layouts["assistant"], run_dir
            )
            stack.callback(assistant.close)
            if isinstance(assistant, assistants.UserAssistant):
                check_same_code([assistant.code])
        rule = share_over_hosts(local_rule, jax.process_count())

        CONSOLE.end_stage()
        # It ends before the services that it uses.
        rollout_thread = stack.enter_context(open_rollout_thread(settings.rollout.ahead))
        components = Components(
            settings=settings,
            layout=layouts["policy"],
            policy=policy,
            reward=reward,
            rule=rule,
            assistant=assistant,
            control_texts=collect_control_texts(
                settings,
                [bundle.model.tokenizer for bundle in (policy, reward) if bundle is not None],
                run_dir,
            ),
            train=tuple(train.problems),
            train_prompts=tuple(train.prompts),
            data_order=run_problems.make_data_order(data, train.problems),
            held_out=tuple(held_out.problems),
            held_out_prompts=tuple(held_out.prompts),
            dropped=(sum(train.too_long.values()), sum(held_out.too_long.values())),
            oracle=synthetic.is_correct if data.is_synthetic else None,
            reward_functions=reward_functions,
            rollout_thread=rollout_thread,
        )

        # This generator lives as long as the run.  If it kept a reference to the first state, a second copy
        # of all parameters and optimiser states would stay in memory, so `pop` removes its last reference.
        state = [State(policy=policy_state, reward=reward_state, reference=None, step=0, position=0)]
        del policy_state, reward_state
        yield components, state.pop()


def collect_control_texts(
    settings: RunSettings, loaded: Iterable[Tokenizer], run_dir: Directory
) -> frozenset[str]:
    """Texts of the control tokens of the loaded tokenizers, and of the tokenizer of a local assistant.

    An assistant on a server does not say which tokenizer it has.
    """
    tokenizers = [*loaded]
    if settings.assistant is not None and settings.assistant.kind == "local":
        tokenizers.append(load_tokenizer(settings.assistant_model, "assistant", run_dir))
    return frozenset[str]().union(*(tokenizer.control_texts for tokenizer in tokenizers))


def _check_reward_inputs(settings: RunSettings, tokenizer: Tokenizer, problems: Sequence[Problem]) -> None:
    """Raise SetupError if a reference does not fit `reward.max_tokens`.

    Without this check a reference that is too long would end the run at the step that scores it.
    """
    # Once each: encoding every problem's takes seconds, and many problems have the same.
    references = dict.fromkeys(p.reference for p in problems)
    with setup_errors("data.train, data.eval"):
        prompts.check_references(tokenizer, references, settings.reward.max_tokens)


def build_policy_bundle(
    settings: RunSettings, layouts: dict[str, mesh.Layout], run_dir: Directory
) -> tuple[PolicyBundle, TrainState]:
    """Load the policy: its bundle, whose functions compile at their first call, and its initial state."""
    layout, reference_layout = layouts["policy"], layouts["reference"]
    rollout = settings.rollout

    # The longest row must fit the model's positions; the error message names both settings.
    lengths = {
        "data.max_prompt_tokens": settings.data.max_prompt_tokens,
        "rollout.max_new_tokens": rollout.max_new_tokens,
    }
    model, params, _ = load_model(
        settings.policy_model, "policy", "logits", layout, run_dir, settings.seed, lengths
    )

    # An older policy's log-probabilities differ from the current one's, whatever their type is.
    sampler_agrees = settings.exact or (rollout.is_float32 and not rollout.ahead)
    correction = choose_correction(settings.policy.correction, sampler_agrees)
    if rollout.ahead and correction == "none":
        hosts.print_once(
            "warning: rollout.ahead=1 with policy.correction=none: responses are sampled with weights that are one "
            "update old, and nothing corrects the loss for it; leave policy.correction at auto",
            always=True,
        )
    if rollout.kv_dtype == "int8" and correction == "none" and not settings.exact:
        hosts.print_once(
            "warning: rollout.kv_dtype=int8 with policy.correction=none: the sampler's distribution differs from "
            "the one in the loss, and nothing corrects it; leave policy.correction at auto, and watch "
            "policy/rollout_mismatch_p99",
            always=True,
        )

    # An exact rollout repeats the learner's forward pass on rows of one response each.
    packs_rows = not settings.exact and transformer.should_pack(
        settings.policy.packing, model.config, layout, settings.policy.dtype
    )
    with setup_errors("policy"):
        updates = settings.steps * grpo.count_updates(settings.policy)
        optimiser = optim.make_optimiser(settings.policy_optimiser, updates)

        def make_logprobs(config: ModelConfig, model_layout: mesh.Layout) -> LogprobsFunction:
            policy, temperature = settings.policy, rollout.temperature
            if packs_rows:
                return grpo.make_packed_logprobs(
                    config, model_layout, dtype=policy.dtype, temperature=temperature
                )
            return grpo.make_logprobs(
                config,
                model_layout,
                microbatch=policy.microbatch,
                dtype=policy.dtype,
                temperature=temperature,
            )

        # If the reference has the policy's devices and no adapters less, one compiled function serves both.
        logprobs = make_logprobs(model.config, layout)
        reference_logprobs = logprobs
        if reference_layout != layout or model.config.lora is not None:
            reference_logprobs = make_logprobs(model.config.base, reference_layout)

        update = grpo.make_update(
            model.config,
            settings.policy,
            optimiser,
            layout,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            sampler_agrees=sampler_agrees,
            reads_old_logprobs=settings.exact,
        )

    spec = rollout.make_sampling_spec(model.tokenizer.eos_ids)
    resample = None
    if settings.exact:
        implementation = rollout.make_engine_options()["implementation"]
        resample = exact.make_resample(
            model.config,
            layout,
            microbatch=settings.policy.microbatch,
            dtype=settings.policy.dtype,
            spec=spec,
            implementation=implementation or engine.choose_kernels(model.config, layout),
        )

    bundle = PolicyBundle(
        model=model,
        sampling=spec,
        packs_rows=packs_rows,
        logprobs=logprobs,
        reference_layout=reference_layout,
        reference_logprobs=reference_logprobs,
        rollout_layout=layouts["rollout"],
        update=update,
        optimiser=optimiser,
        resample=resample,
    )
    return bundle, optim.init_state(params, optimiser)


def build_reward_bundle(
    settings: RunSettings, layout: mesh.Layout, run_dir: Directory, calibration: Calibration | None = None
) -> tuple[RewardBundle, TrainState]:
    """Load the reward model: its bundle, whose functions compile at their first call, and its initial state.

    calibration: of the rewards; None: they are sigmoid(logit).

    Raises SetupError for weights without a trained score head, unless the config trains or allows one.
    """
    lengths = {"reward.max_tokens": settings.reward.max_tokens}
    source = settings.reward_model
    model, params, head_trained = load_model(
        source, "reward", "score", layout, run_dir, settings.seed, lengths
    )

    # Language-model weights have no score head, and a random one gives rewards that look plausible.
    if not (head_trained or settings.supervised.reward_steps or settings.reward.allow_untrained_head):
        raise SetupError(
            f"reward.weights={source.weights!r} has no trained score head, so rewards would be noise: "
            "give a *ForSequenceClassification directory, train one with --config.supervised.reward_steps=N, "
            "or accept it with --config.reward.allow_untrained_head"
        )

    with setup_errors("reward"):
        # A step without a valid pair makes no update, so a run may have fewer.
        section = settings.reward_update
        updates = section.warmup_updates + settings.steps * section.updates
        optimiser = optim.make_optimiser(settings.reward_optimiser, updates)
        bundle = RewardBundle(
            model=model,
            packs_rows=transformer.should_pack(section.packing, model.config, layout, section.dtype),
            layout=layout,
            compute_logits=verifier_model.make_score_fn(
                model.config,
                layout,
                dtype=settings.reward_update.dtype,
                microbatch=settings.reward_update.microbatch,
            ),
            update=verifier_model.make_reward_update(model.config, settings.reward_update, optimiser, layout),
            optimiser=optimiser,
            calibration=calibration,
        )
    return bundle, optim.init_state(params, optimiser)


def build_assistant(
    cfg: ConfigDict,
    chat_config: ChatConfig,
    rewrite: assistants.RewriteConfig,
    layout: mesh.Layout,
    run_dir: Directory,
) -> assistants.Assistant:
    """Make the config's assistant: programmatic, a model behind a server, or a local model on `layout`."""
    with setup_errors("assistant"):
        # Only a local assistant loads weights here and takes device memory.
        generate = None
        if chat_config.kind == "local":
            generate = make_local_generate(cfg, chat_config, layout, run_dir)
        return assistants.make_assistant(chat_config, generate, rewrite)
