"""Builds what a Cooper step needs from a config: problems, both wings, the rule, the assistant.

1. `settings.check` refuses configs that contradict themselves.
2. `load_problems` reads the training problems and those held out; over-long prompts are dropped and counted.
   Held-out ones that the reward model is trained on are left out (data/contamination.py).
3. `build` loads weights and tokenizers, starts the rule's workers, compiles nothing yet, and returns the
   machinery (`Cooper`, which never changes) apart from the state (`State`, which every step replaces).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import struct
from ml_collections import ConfigDict

from cooper_jax import settings
from cooper_jax.data import contamination, prompts, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.loading import Directory, Model, load_model
from cooper_jax.local_chat import local_generate
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.placement import make_layouts
from cooper_jax.policy import grpo
from cooper_jax.reward import assistant as assistants
from cooper_jax.reward import verifier_model
from cooper_jax.reward.lessons import Replay
from cooper_jax.reward.rule import RuleVerifier
from cooper_jax.reward.shared import SharedRule, over_hosts
from cooper_jax.rollout import engine
from cooper_jax.runtime import keys, mesh, optim
from cooper_jax.settings import SetupError, boundary
from cooper_jax.types import Params, Problem, TrainState


@dataclasses.dataclass(frozen=True)
class PolicyWing:
    model: Model
    sampling: engine.SamplingSpec
    logprobs: Callable  # (params, tokens, valid, T) -> f32[N, T]
    reference_layout: mesh.Layout
    reference_logprobs: Callable  # the same, where the reference lies
    update: Callable  # (TrainState, PolicyBatch) -> (TrainState, metrics)
    optimiser: optim.Optimiser


@dataclasses.dataclass(frozen=True)
class RewardWing:
    model: Model
    layout: mesh.Layout
    score: Callable  # (params, ScoreBatch) -> f32[N], logits
    update: Callable  # (TrainState, PairBatch or None, LabelledBatch or None) -> (TrainState, metrics)
    optimiser: optim.Optimiser


@dataclasses.dataclass(frozen=True)
class Cooper:
    """The machinery of a run; nothing in it changes from step to step."""

    cfg: ConfigDict
    layout: mesh.Layout  # the policy's
    policy: PolicyWing
    reward: RewardWing | None  # None in the rule arm
    rule: RuleVerifier | SharedRule
    assistant: assistants.Assistant | None  # None where no pair asks for one
    train: tuple[Problem, ...]
    train_prompts: tuple[tuple[int, ...], ...]
    held_out: tuple[Problem, ...]
    held_out_prompts: tuple[tuple[int, ...], ...]
    dropped: tuple[int, int]  # problems left out, of each kind, because their prompts are too long
    oracle: Callable[[Problem, str], bool] | None  # exact truth (synthetic problems): never a reward


@struct.dataclass
class State:
    """What a step replaces."""

    policy: TrainState
    reward: TrainState | None
    reference: Params | None  # the policy at step 0; None before that
    step: int = struct.field(pytree_node=False)  # Cooper steps done
    position: int = struct.field(pytree_node=False)  # problems consumed, over all epochs
    replay: Replay = struct.field(pytree_node=False, default=Replay())  # past rollouts for the reward model


def load_problems(cfg: ConfigDict) -> tuple[list[Problem], list[Problem]]:
    """Training problems, and all those held out for evaluation (may be none)."""
    d = cfg.data
    if d.format == "synthetic":
        return (
            synthetic.problems(cfg.seed, d.synthetic_size, "train"),
            synthetic.problems(cfg.seed, cfg.eval.problems, "eval"),
        )
    columns = {name: d[name] for name in ("question_key", "reference_key", "solution_key", "tfds_dir")}
    with boundary(f"data.train={d.train}"):
        train = problem_sets.load(d.train, d.format, split=d.split, **columns)
    if not d.eval:
        return take_held_out(train, d.eval_from_train) if cfg.eval.every else (train, [])
    with boundary(f"data.eval={d.eval}"):
        held_out = problem_sets.load(d.eval, d.eval_format, split=d.eval_split, **columns)
    return train, held_out


def take_held_out(train: list[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """Split off `count` problems for evaluation: (the others, those), both in the file's order.

    The choice depends on the number of problems alone, so runs with other seeds are evaluated on the same ones.
    A question that occurs more than once goes to one side as a whole.  Raises SetupError where none would be left
    to train on.
    """
    if not count:
        return train, []
    if count >= len(train):
        raise SetupError(
            f"data.eval_from_train={count}: the training file has {len(train)} problems, and some must be left to "
            "train on; take fewer, or name an evaluation file with --config.data.eval=FILE"
        )
    words = keys.numpy_stream(0, "benchmark").bit_generator.random_raw(len(train))
    chosen = np.argsort(words, kind="stable")[:count]
    questions = {train[i].question for i in chosen}
    rest = [problem for problem in train if problem.question not in questions]
    return rest, [train[i] for i in sorted(chosen)]


def policy_prompt(cfg: ConfigDict, tokenizer: Tokenizer, problem: Problem) -> list[int]:
    return prompts.policy_prompt(tokenizer, problem.question, cfg.data.instruction, cfg.data.chat)


@contextlib.contextmanager
def build(cfg: ConfigDict, run_dir: Directory) -> Iterator[tuple[Cooper, State]]:
    """The machinery and the state at step 0, before any supervised phase; worker processes end on exit."""
    settings.check(cfg)
    layouts = make_layouts(cfg)
    layout = layouts["policy"]
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
    train, held_out = load_problems(cfg)
    held_out = contamination.set_apart(cfg, run_dir, train, held_out)[: cfg.eval.problems]
    with contextlib.ExitStack() as stack:
        policy, policy_state = _policy_wing(cfg, layouts, run_dir)
        reward, reward_state = _reward_wing(cfg, layouts["reward"], run_dir)
        with boundary(f"data.chat={cfg.data.chat}, data.max_prompt_tokens={cfg.data.max_prompt_tokens}"):
            kept = [
                problem_sets.drop_long(
                    found,
                    lambda p: policy_prompt(cfg, policy.model.tokenizer, p),
                    cfg.data.max_prompt_tokens,
                )
                if found
                else ([], [], 0)
                for found in (train, held_out)
            ]
        (train, train_prompts, dropped), (held_out, held_out_prompts, dropped_held_out) = kept
        if reward is not None:
            # Now, and not in mid-run, where such a problem's turn comes.
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
            with boundary("assistant"):
                local = cfg.assistant.kind == "local"
                generate = (
                    local_generate(cfg, cfg.assistant, "assistant", layouts["assistant"], run_dir)
                    if local
                    else None
                )
                assistant = assistants.make(cfg.assistant, generate)
            stack.callback(assistant.close)
        rule, assistant = over_hosts(rule, assistant, jax.process_count())
        cooper = Cooper(
            cfg=cfg,
            layout=layout,
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
        # Handed over, not kept: this frame lives as long as the run, and would hold a second copy of everything.
        state = [State(policy=policy_state, reward=reward_state, reference=None, step=0, position=0)]
        del policy_state, reward_state
        yield cooper, state.pop()


def _policy_wing(
    cfg: ConfigDict, layouts: dict[str, mesh.Layout], run_dir: Directory
) -> tuple[PolicyWing, TrainState]:
    layout, reference = layouts["policy"], layouts["reference"]
    model, params, _ = load_model(cfg.policy, "policy", "logits", layout, run_dir, cfg.seed)
    r = cfg.rollout
    sampling = engine.SamplingSpec(
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        max_new_tokens=r.max_new_tokens,
        group_size=r.group_size,
        eos_ids=model.tokenizer.eos_ids,
        segment=r.segment,
        dtype=r.dtype,
        kv_dtype=r.kv_dtype,
    )
    with boundary("policy"):
        optimiser = optim.make(cfg.policy.optimiser)
        scoring = dict(microbatch=cfg.policy.microbatch, dtype=cfg.policy.dtype, temperature=r.temperature)
        logprobs = grpo.make_logprobs(model.config, layout, **scoring)
        apart = reference != layout
        wing = PolicyWing(
            model=model,
            sampling=sampling,
            logprobs=logprobs,
            reference_layout=reference,
            reference_logprobs=grpo.make_logprobs(model.config, reference, **scoring) if apart else logprobs,
            update=grpo.make_update(
                model.config, cfg.policy, optimiser, layout,
                temperature=r.temperature, max_new_tokens=r.max_new_tokens,
            ),
            optimiser=optimiser,
        )  # fmt: skip
    return wing, optim.init(params, optimiser)


def _reward_wing(
    cfg: ConfigDict, layout: mesh.Layout, run_dir: Directory
) -> tuple[RewardWing | None, TrainState | None]:
    if cfg.reward.arm == "rule":
        return None, None
    model, params, head_trained = load_model(cfg.reward, "reward", "score", layout, run_dir, cfg.seed)
    if not (head_trained or cfg.warmup.reward_steps or cfg.reward.allow_untrained_head):
        raise SetupError(
            f"reward.weights={cfg.reward.weights!r} brings no trained score head, so its rewards would be noise: "
            "give a *ForSequenceClassification directory, train one with --config.warmup.reward_steps=N, or "
            "accept it with --config.reward.allow_untrained_head"
        )
    with boundary("reward"):
        optimiser = optim.make(cfg.reward.optimiser)
        wing = RewardWing(
            model=model,
            layout=layout,
            score=verifier_model.make_score(
                model.config, layout, dtype=cfg.reward.dtype, microbatch=cfg.reward.microbatch
            ),
            update=verifier_model.make_update(model.config, cfg.reward, optimiser, layout),
            optimiser=optimiser,
        )
    return wing, optim.init(params, optimiser)
