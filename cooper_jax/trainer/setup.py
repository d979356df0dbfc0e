"""Setup of a run: from a config to the components and the state at step 0.

1. `load_problems` reads the training problems and those held out.  Held-out problems that the reward model is
   trained on are left out (data/contamination.py); prompts that are too long are dropped and counted.
2. `build_components` loads both models with their tokenizers, starts the rule verifier's workers and opens the
   assistant.  Nothing is compiled yet.
3. It returns `Components`, which never change, apart from the `State`, which every step replaces (state.py).

Settings that contradict each other are refused before anything is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from cooper_jax import settings
from cooper_jax.data import contamination, prompts, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.loading import Directory, load_model
from cooper_jax.local_chat import local_generate
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.placement import make_layouts
from cooper_jax.policy import grpo
from cooper_jax.reward import assistant as assistants
from cooper_jax.reward import verifier_model
from cooper_jax.reward.rule import RuleVerifier
from cooper_jax.reward.shared import over_hosts
from cooper_jax.rollout.sampling import SamplingSpec
from cooper_jax.runtime import mesh, optim
from cooper_jax.settings import SetupError, boundary
from cooper_jax.trainer.state import Components, PolicyBundle, RewardBundle, State
from cooper_jax.types import Problem, TrainState


def load_problems(cfg: ConfigDict) -> tuple[list[Problem], list[Problem]]:
    """The training problems, and all problems held out for evaluation (there may be none).

    Raises SetupError for files that cannot be read.
    """
    data = cfg.data
    if data.format == "synthetic":
        return (
            synthetic.problems(cfg.seed, data.synthetic_size, "train"),
            synthetic.problems(cfg.seed, cfg.eval.problems, "eval"),
        )

    columns = {name: data[name] for name in ("question_key", "reference_key", "solution_key", "tfds_dir")}
    with boundary(f"data.train={data.train}"):
        train = problem_sets.load(data.train, data.format, split=data.split, **columns)
    if not data.eval:
        return train, []
    with boundary(f"data.eval={data.eval}"):
        held_out = problem_sets.load(data.eval, data.eval_format, split=data.eval_split, **columns)
    return train, held_out


def encode_policy_prompt(cfg: ConfigDict, tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The token ids from which the policy answers a problem: the instruction and the chat template applied."""
    return prompts.policy_prompt(tokenizer, problem.question, cfg.data.instruction, cfg.data.chat)


@contextlib.contextmanager
def build_components(cfg: ConfigDict, run_dir: Directory) -> Iterator[tuple[Components, State]]:
    """Components and the state at step 0, before any supervised phase.  Worker processes end on exit.

    Raises SetupError for settings, files and weights that cannot be used.
    """
    settings.check(cfg)
    layouts = make_layouts(cfg)
    _check_rows(cfg, layouts["policy"])
    train, held_out = load_problems(cfg)
    held_out = contamination.set_apart(cfg, run_dir, train, held_out)[: cfg.eval.problems]

    with contextlib.ExitStack() as stack:
        policy, policy_state = build_policy_bundle(cfg, layouts, run_dir)
        reward, reward_state = None, None
        if cfg.reward.arm != "rule":
            reward, reward_state = build_reward_bundle(cfg, layouts["reward"], run_dir)

        with boundary(f"data.chat={cfg.data.chat}, data.max_prompt_tokens={cfg.data.max_prompt_tokens}"):
            train, train_prompts, dropped = _drop_long(cfg, policy.model.tokenizer, train)
            held_out, held_out_prompts, dropped_held_out = _drop_long(cfg, policy.model.tokenizer, held_out)
        if reward is not None:
            # Checked here, so that a reference that is too long does not end the run when its turn comes.
            with boundary("data.train, data.eval"):
                references = (p.reference for p in (*train, *held_out))
                prompts.check_references(reward.model.tokenizer, references, cfg.reward.max_tokens)

        with boundary("rule"):
            rule = stack.enter_context(
                RuleVerifier(
                    workers=cfg.rule.workers,
                    timeout=cfg.rule.timeout,
                    retry_timeout=cfg.rule.retry_timeout,
                    memory_mb=cfg.rule.memory_mb,
                )
            )
        assistant = None
        if settings.asks_assistant(cfg):
            assistant = build_assistant(cfg, layouts["assistant"], run_dir)
            stack.callback(assistant.close)
        rule, assistant = over_hosts(rule, assistant, jax.process_count())

        components = Components(
            cfg=cfg,
            layout=layouts["policy"],
            policy=policy,
            reward=reward,
            rule=rule,
            assistant=assistant,
            train=tuple(train),
            train_prompts=tuple(train_prompts),
            held_out=tuple(held_out),
            held_out_prompts=tuple(held_out_prompts),
            dropped=(dropped, dropped_held_out),
            oracle=synthetic.oracle if cfg.data.format == "synthetic" else None,
        )
        # This frame lives as long as the run: a reference to the first state kept here would hold a second copy
        # of all parameters and optimisers.
        state = [State(policy=policy_state, reward=reward_state, reference=None, step=0, position=0)]
        del policy_state, reward_state
        yield components, state.pop()


def _check_rows(cfg: ConfigDict, layout: mesh.Layout) -> None:
    """Raise SetupError where a step's rows do not divide over its minibatches and the mesh."""
    rows = cfg.data.prompts_per_step * cfg.rollout.group_size
    if cfg.policy.minibatches > 1 and rows % (layout.batch_shards * cfg.policy.minibatches):
        raise SetupError(
            f"policy.minibatches={cfg.policy.minibatches}: a step's {rows} rows (data.prompts_per_step x "
            f"rollout.group_size) must divide into that many parts of a multiple of {layout.batch_shards} rows, "
            "the mesh's batch shards"
        )
    if 0 < cfg.rollout.max_rows < layout.batch_shards:
        raise SetupError(
            f"rollout.max_rows={cfg.rollout.max_rows} is less than a row on each of the mesh's "
            f"{layout.batch_shards} batch shards: raise it, or set 0 for no bound"
        )


def _drop_long(
    cfg: ConfigDict, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> tuple[list[Problem], list[list[int]], int]:
    """The problems whose prompts fit `data.max_prompt_tokens`, their prompts, and how many did not fit."""
    if not problems:
        return [], [], 0
    return problem_sets.drop_long(
        problems, lambda p: encode_policy_prompt(cfg, tokenizer, p), cfg.data.max_prompt_tokens
    )


def build_policy_bundle(
    cfg: ConfigDict, layouts: dict[str, mesh.Layout], run_dir: Directory
) -> tuple[PolicyBundle, TrainState]:
    """The policy and its reference: functions that are jitted when first called, and the initial state."""
    layout, reference = layouts["policy"], layouts["reference"]
    model, params, _ = load_model(cfg.policy, "policy", "logits", layout, run_dir, cfg.seed)
    rollout = cfg.rollout
    sampling = SamplingSpec(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        max_new_tokens=rollout.max_new_tokens,
        group_size=rollout.group_size,
        eos_ids=model.tokenizer.eos_ids,
        segment=rollout.segment,
        dtype=rollout.dtype,
        kv_dtype=rollout.kv_dtype,
    )

    with boundary("policy"):
        optimiser = optim.make(cfg.policy.optimiser)
        options = dict(
            microbatch=cfg.policy.microbatch, dtype=cfg.policy.dtype, temperature=rollout.temperature
        )
        logprobs = grpo.make_logprobs(model.config, layout, **options)
        # One compiled function serves both where they share their devices.
        reference_logprobs = logprobs
        if reference != layout:
            reference_logprobs = grpo.make_logprobs(model.config, reference, **options)
        update = grpo.make_update(
            model.config, cfg.policy, optimiser, layout,
            temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens,
        )  # fmt: skip

    bundle = PolicyBundle(
        model=model,
        sampling=sampling,
        logprobs=logprobs,
        reference_layout=reference,
        reference_logprobs=reference_logprobs,
        update=update,
        optimiser=optimiser,
    )
    return bundle, optim.init(params, optimiser)


def build_reward_bundle(
    cfg: ConfigDict, layout: mesh.Layout, run_dir: Directory
) -> tuple[RewardBundle, TrainState]:
    """The reward model: functions that are jitted when first called, and the initial state."""
    model, params, head_trained = load_model(cfg.reward, "reward", "score", layout, run_dir, cfg.seed)
    if not (head_trained or cfg.warmup.reward_steps or cfg.reward.allow_untrained_head):
        raise SetupError(
            f"reward.weights={cfg.reward.weights!r} brings no trained score head, so its rewards would be noise: "
            "give a *ForSequenceClassification directory, train one with --config.warmup.reward_steps=N, or "
            "accept it with --config.reward.allow_untrained_head"
        )

    with boundary("reward"):
        optimiser = optim.make(cfg.reward.optimiser)
        bundle = RewardBundle(
            model=model,
            layout=layout,
            score=verifier_model.make_score(
                model.config, layout, dtype=cfg.reward.dtype, microbatch=cfg.reward.microbatch
            ),
            update=verifier_model.make_update(model.config, cfg.reward, optimiser, layout),
            optimiser=optimiser,
        )
    return bundle, optim.init(params, optimiser)


def build_assistant(cfg: ConfigDict, layout: mesh.Layout, run_dir: Directory) -> assistants.Assistant:
    """The assistant of the config: programmatic, a server's model, or local weights on our own devices."""
    with boundary("assistant"):
        generate = None
        if cfg.assistant.kind == "local":
            generate = local_generate(cfg, cfg.assistant, "assistant", layout, run_dir)
        return assistants.make(cfg.assistant, generate)
