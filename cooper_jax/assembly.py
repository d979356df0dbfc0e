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
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from etils import epath
from flax import struct
from ml_collections import ConfigDict

from cooper_jax import settings
from cooper_jax.data import contamination, prompts, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.model import tokenizer as tokenizers
from cooper_jax.model import transformer, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.policy import grpo
from cooper_jax.reward import assistant as assistants
from cooper_jax.reward import chat as chats
from cooper_jax.reward import verifier_model
from cooper_jax.reward.rule import RuleVerifier
from cooper_jax.reward.shared import SharedRule, over_hosts
from cooper_jax.rollout import engine
from cooper_jax.runtime import hosts, keys, mesh, optim
from cooper_jax.settings import SetupError, boundary
from cooper_jax.types import Params, Problem, TrainState

Directory = Path | epath.Path  # a run's, here or under gs://


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: static shape and text side.  Its parameters live in the State."""

    config: ModelConfig
    tokenizer: tokenizers.Tokenizer


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
    update: Callable  # (TrainState, PairBatch) -> (TrainState, metrics)
    optimiser: optim.Optimiser


@dataclasses.dataclass(frozen=True)
class Cooper:
    """The machinery of a run; nothing in it changes from step to step."""

    cfg: ConfigDict
    layout: mesh.Layout  # the policy's
    policy: PolicyWing
    reward: RewardWing | None  # None in the rule arm
    rule: RuleVerifier | SharedRule
    assistant: assistants.Assistant | None  # None but in the cooper arm
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
        return train, []
    with boundary(f"data.eval={d.eval}"):
        held_out = problem_sets.load(d.eval, d.eval_format, split=d.eval_split, **columns)
    return train, held_out


def load_tokenizer(section: ConfigDict, name: str, run_dir: Directory) -> tokenizers.Tokenizer:
    """The tokenizer that `section` names; for random weights, one trained from the synthetic corpus."""
    source = section.tokenizer or section.weights
    with boundary(f"{name}.tokenizer={section.tokenizer!r}, {name}.weights={section.weights!r}"):
        if source != "random":
            return tokenizers.load(source)
        path = run_dir / f"tokenizer_{section.arch.vocab_size}.model"

        def train() -> None:
            if not path.exists():
                symbols = [*prompts.VERIFIER_TAGS, "\n"]
                tokenizers.train_sentencepiece(
                    synthetic.corpus(), path, section.arch.vocab_size, symbols=symbols
                )

        hosts.first(f"tokenizer of {name}", train)
        return tokenizers.load(str(path))


def describe_model(section: ConfigDict, name: str, run_dir: Directory, layout: mesh.Layout) -> Model:
    """A model of `section` without its parameters, its vocabulary padded so that it divides over the mesh."""
    tokenizer = load_tokenizer(section, name, run_dir)
    multiple = math.lcm(section.vocab_multiple, layout.first_ways("vocab"))
    with boundary(f"{name}.weights={section.weights!r}"):
        if section.weights == "random":
            config = ModelConfig.from_arch(section.arch, tokenizer.vocab_size, multiple)
            return Model(config, tokenizer)
        config = weights.read_config(section.weights, section.num_layers)
        config = dataclasses.replace(config, vocab_multiple=multiple)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the embedding {config.vocab_size} rows: set "
                f"--config.{name}.tokenizer to the one that belongs to these weights"
            )
        return Model(config, tokenizer)


def load_model(
    section: ConfigDict, name: str, head: str, layout: mesh.Layout, run_dir: Directory, seed: int
) -> tuple[Model, Params, bool]:
    """A model of `section` with its parameters; the last value says whether its head has been trained."""
    model = describe_model(section, name, run_dir, layout)
    with boundary("mesh"):
        mesh.check_cut(layout, transformer.param_specs(model.config, head))
    with boundary(f"{name}.weights={section.weights!r}"):
        if section.weights == "random":
            specs = transformer.param_specs(model.config, head)
            params = mesh.init_params(keys.stream(seed, f"init_{name}"), specs, layout)
            return model, params, head == "logits"
        loaded = weights.load(
            section.weights,
            num_layers=section.num_layers,
            head=head,
            layout=layout,
            vocab_multiple=model.config.vocab_multiple,
            seed=seed,
        )
        return model, loaded.params, loaded.head_trained


def make_layouts(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> dict[str, mesh.Layout]:
    """Where each model lives, by its name: the config's meshes over the devices at hand, with their rules."""
    m = cfg.mesh

    def frozen(x):
        return tuple(frozen(y) for y in x) if isinstance(x, list | tuple) else x

    def layout(devices, data, fsdp, tensor):
        made = mesh.make_mesh(data, fsdp, tensor, devices, m.across)
        return mesh.Layout(made, frozen(m.rules), frozen(m.rollout_rules))

    sizes = {}
    for name, asked in (("reward", m.reward), ("reference", m.reference), ("assistant", m.assistant)):
        with boundary(f"mesh.{name}"):
            sizes |= {name: mesh.parse_sizes(asked)} if asked else {}
    with boundary("mesh"):
        left, taken = mesh.split_devices(jax.devices() if devices is None else devices, sizes)
        out = dict.fromkeys(
            ("policy", "reward", "reference", "assistant"), layout(left, m.data, m.fsdp, m.tensor)
        )
        return out | {name: layout(own, *sizes[name]) for name, own in taken.items()}


def make_layout(cfg: ConfigDict) -> mesh.Layout:
    """The policy's."""
    return make_layouts(cfg)["policy"]


def policy_prompt(cfg: ConfigDict, tokenizer: tokenizers.Tokenizer, problem: Problem) -> list[int]:
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
        if cfg.reward.arm == "cooper":
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
            update=verifier_model.make_pair_update(model.config, cfg.reward, optimiser, layout),
            optimiser=optimiser,
        )
    return wing, optim.init(params, optimiser)


def rollout_options(cfg: ConfigDict) -> dict[str, float | str | None]:
    """What holds for every rollout of a run: the bounds of its slots, and its kernels."""
    r = cfg.rollout
    implementation = None if r.kernels == "auto" else r.kernels
    return dict(
        max_rows=r.max_rows or None,
        memory_gib=r.memory_gib or None,
        weights=r.weights,
        implementation=implementation,
    )


def open_chat(cfg: ConfigDict, name: str, layout: mesh.Layout, run_dir: Directory) -> chats.Chat:
    """The language model of the config's section `name`: assistant, judge or source.

    A local one is loaded onto `layout`.  Raises SetupError; the caller closes it.
    """
    section = cfg[name]
    if section.kind == "local" and section.weights in ("", "random"):
        raise SetupError(
            f"{name}.weights={section.weights!r}: a local {name} needs trained weights: give "
            f"--config.{name}.weights=DIR, a hub id or a .gguf file, or ask a server (--config.{name}.kind=openai)"
        )
    with boundary(name):
        local = section.kind == "local"
        generate = local_generate(cfg, section, name, layout, run_dir) if local else None
        return chats.make(section, name, generate)


def local_generate(
    cfg: ConfigDict, section: ConfigDict, name: str, layout: mesh.Layout, run_dir: Directory
) -> chats.Generate:
    """Sampling from the weights of `section`: (messages of each request, their ids) -> replies.

    ids are (seed, step, row, attempt), row below 2^31; requests that share all but the row are sampled together.
    Conversations that are too long are refused: Failure("too_long").
    """
    told = chats.thinking(section, name)
    model, params, _ = load_model(section, name, "logits", layout, run_dir, cfg.seed)
    params = engine.rollout_weights(params, model.config, layout, section.dtype)
    spec = engine.SamplingSpec(
        temperature=section.temperature,
        top_k=0,
        top_p=section.top_p,
        max_new_tokens=section.max_new_tokens,
        group_size=1,
        eos_ids=model.tokenizer.eos_ids,
        segment=cfg.rollout.segment,
        dtype=section.dtype,
        kv_dtype=cfg.rollout.kv_dtype,
    )
    most = model.config.max_len - section.max_new_tokens
    if section.max_prompt_tokens:
        most = min(most, section.max_prompt_tokens)
    if most < 1:
        raise ValueError(
            f"--config.{name}.max_new_tokens={section.max_new_tokens} leaves no room for a conversation: the model "
            f"was trained for {model.config.max_len} tokens in all"
        )

    def generate(messages: Sequence[chats.Messages], ids: Sequence[chats.Ids]) -> list[chats.Reply]:
        rows = [model.tokenizer.chat(m, fallback=True, variables=told) for m in messages]
        replies: list[chats.Reply] = [chats.Failure("too_long")] * len(rows)
        together: dict[tuple[int, int, int], list[int]] = {}
        for i, (seed, step, _, attempt) in enumerate(ids):
            if len(rows[i]) <= most:
                together.setdefault((seed, step, attempt), []).append(i)
        for (seed, step, attempt), members in together.items():
            rollout = engine.generate(
                params, model.config, layout, [rows[i] for i in members], [ids[i][2] for i in members],
                keys.stream(seed, name, step, attempt), spec, **rollout_options(cfg),
            )  # fmt: skip
            for i, text in zip(
                members, engine.completions(rollout, model.tokenizer.decode, spec.eos_ids), strict=True
            ):
                replies[i] = text
        return replies

    return generate
