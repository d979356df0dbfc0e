"""What the benchmark measures: a config's programs, each on a load of the size that a step gives it.

    rollout   data.prompts_per_step prompts x rollout.group_size samples of rollout.max_new_tokens tokens: no EOS
    score     the reference's log-probabilities of such responses
    train     a step's updates of the policy on them; in the cooper arm also one of the reward model, on pairs

Prompts and responses are random tokens, and a "random" model has the vocab_size of its `arch` as it stands: neither
problems nor tokenizers nor a network are needed.

B prompts   G samples a prompt   N = B * G rows, prompt-major   P prompt tokens   T response tokens at most
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import packing
from cooper_jax.model import transformer, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import roofline
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import labelled_rollouts, verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.rollout import engine
from cooper_jax.rollout.rollout_config import get_engine_options
from cooper_jax.runtime import keys, mesh, optim
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.types import LabelledBatch, PairBatch, Params, PolicyBatch, Rollout, ScoreBatch

KINDS = ("rollout", "score", "train")
SHORTEST = 0.05  # of max_new_tokens: where the lengths of a ragged load begin


@dataclasses.dataclass(frozen=True)
class Load:
    """What is worked on: every prompt has P tokens, row n has lengths[n] response tokens."""

    prompts: np.ndarray  # i32[B, P]
    lengths: np.ndarray  # i32[N]

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of all rows."""
        return int(self.prompts.shape[1] * len(self.lengths) + self.lengths.sum())


@dataclasses.dataclass(frozen=True)
class Program:
    """One thing to measure."""

    name: str
    call: Callable[[int], None]  # runs it to its end; the number is the repetition's
    tokens: int  # those that count for tokens a second
    counted: str  # what they are
    work: dict[str, roofline.Work]
    config: ModelConfig
    dtype: str  # of its matrix products
    rows: int  # of its matrix products
    prefill: Callable[[int], None] | None = None  # runs the part of it that comes before decoding


def list_bench_programs(kind: str, cfg: ConfigDict, layout: mesh.Layout, *, prompt_tokens: int, ragged: bool):
    """The programs of a kind, one after the other, so that only one holds its arrays: an iterator of Program.

    prompt_tokens: P.  ragged: draw the lengths from a Pareto distribution of exponent 1, cut off at T.  Raises
    SetupError for a config that cannot be run, and for weights that cannot be had.
    """
    if kind == "rollout":
        yield _rollout(cfg, layout, prompt_tokens, ragged)
    elif kind == "score":
        yield _score(cfg, layout, prompt_tokens, ragged)
    else:
        yield _policy_update(cfg, layout, prompt_tokens, ragged)
        if cfg.reward.arm == "cooper":
            yield _reward_update(cfg, layout, prompt_tokens, ragged)


def time_call(call: Callable[[int], None], repetition: int) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(repetition)
    return time.perf_counter() - start


# --- loads and models ------------------------------------------------------------------------------------


def make_load(cfg: ConfigDict, vocab_size: int, prompt_tokens: int, ragged: bool) -> Load:
    """Drawn from the config's seed."""
    rng = np.random.default_rng(cfg.seed)
    prompts, most = cfg.data.prompts_per_step, cfg.rollout.max_new_tokens
    lengths = np.full(prompts * cfg.rollout.group_size, most, np.int32)
    if ragged:
        pareto = max(1.0, SHORTEST * most) / (1.0 - rng.random(lengths.shape))
        lengths = np.minimum(pareto, most).astype(np.int32)
    return Load(rng.integers(vocab_size, size=(prompts, prompt_tokens), dtype=np.int32), lengths)


def make_bench_model(
    section: ConfigDict, name: str, head: str, layout: mesh.Layout, seed: int
) -> tuple[ModelConfig, Params]:
    """The model of a section, without a tokenizer."""
    with setup_errors(f"{name}.weights={section.weights!r} cannot be had"):
        if section.weights == "random":
            config = ModelConfig.from_arch(section.arch, section.arch.vocab_size, section.vocab_multiple)
            specs = transformer.param_specs(config, head)
            return config, mesh.init_params(keys.make_key(seed, f"init_{name}"), specs, layout)
        loaded = weights.load_weights(
            section.weights, num_layers=section.num_layers, head=head, layout=layout,
            vocab_multiple=section.vocab_multiple, seed=seed,
        )  # fmt: skip
        return loaded.config, loaded.params


def make_bench_batch(cfg: ConfigDict, config: ModelConfig, load: Load, layout: mesh.Layout) -> PolicyBatch:
    """Random responses, packed and placed as the trainer does it."""
    rng = np.random.default_rng(cfg.seed + 1)
    n, most = len(load.lengths), cfg.rollout.max_new_tokens
    responses = Rollout(
        tokens=rng.integers(config.vocab_size, size=(n, most), dtype=np.int32),
        mask=np.arange(most)[None, :] < load.lengths[:, None],
        logprobs=np.full((n, most), -np.log(config.vocab_size), np.float32),
        finished=np.zeros(n, bool),
    )
    batch = packing.pack_policy_batch(
        load.prompts.tolist(), responses, bucket=cfg.data.bucket, rows_multiple=layout.batch_shards
    )
    sampled = batch.rollout_logprobs
    advantages = packing.pad_rows(rng.standard_normal(n).astype(np.float32), len(sampled))
    batch = batch.replace(advantages=advantages, old_logprobs=sampled, ref_logprobs=sampled)
    return layout.put(batch, "batch")


# --- programs --------------------------------------------------------------------------------------------


def make_bench_sampling(cfg: ConfigDict) -> engine.SamplingSpec:
    """The config's sampling, but that no token ends a response.  Raises SetupError for settings out of range."""
    r = cfg.rollout
    with setup_errors("rollout"):
        return engine.SamplingSpec(
            temperature=r.temperature, top_k=r.top_k, top_p=r.top_p, min_p=r.min_p,
            max_new_tokens=r.max_new_tokens, group_size=r.group_size, eos_ids=(), segment=r.segment,
            dtype=r.dtype, kv_dtype=r.kv_dtype,
        )  # fmt: skip


def _rollout(cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool) -> Program:
    r = cfg.rollout
    config, params = make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    load = make_load(cfg, config.vocab_size, prompt_tokens, ragged)
    rows = len(load.lengths)
    slots = min(r.max_rows or rows, rows)
    spec = make_bench_sampling(cfg)
    prompts = load.prompts.tolist()

    def generate(repetition, spec, limits):
        rollout = engine.generate(
            params, config, layout, prompts, range(len(prompts)), keys.make_key(cfg.seed, "rollout", repetition),
            spec, limits=limits, **get_engine_options(cfg),
        )  # fmt: skip
        jax.block_until_ready(rollout)

    first = dataclasses.replace(spec, max_new_tokens=1)
    return Program(
        name="rollout",
        call=lambda repetition: generate(repetition, spec, load.lengths),
        tokens=int(load.lengths.sum()),
        counted="sampled tokens",
        work=roofline.rollout_work(
            config,
            len(prompts),
            prompt_tokens,
            load.lengths,
            slots,
            weight_bytes=jnp.dtype(r.dtype).itemsize,
            cache_bytes=jnp.dtype(r.kv_dtype or r.dtype).itemsize,
        ),  # fmt: skip
        config=config,
        dtype=r.dtype,
        rows=slots,
        prefill=lambda repetition: generate(repetition, first, np.ones(rows, np.int32)),
    )


def _score(cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool) -> Program:
    config, params = make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    load = make_load(cfg, config.vocab_size, prompt_tokens, ragged)
    batch = make_bench_batch(cfg, config, load, layout)
    logprobs = grpo.make_logprobs(
        config, layout,
        microbatch=cfg.policy.microbatch, dtype=cfg.policy.dtype, temperature=cfg.rollout.temperature,
    )  # fmt: skip
    width = batch.response_mask.shape[1]
    return Program(
        name="score",
        call=lambda _: jax.block_until_ready(logprobs(params, batch.tokens, batch.valid, width)),
        tokens=load.tokens,
        counted="prompt and response tokens",
        work=roofline.score_work(config, prompt_tokens, load.lengths),
        config=config,
        dtype=cfg.policy.dtype,
        rows=cfg.policy.microbatch * batch.tokens.shape[1],
    )


def _policy_update(cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool) -> Program:
    config, params = make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    load = make_load(cfg, config.vocab_size, prompt_tokens, ragged)
    batch = make_bench_batch(cfg, config, load, layout)
    with setup_errors("policy"):
        policy = PolicyConfig.from_config(cfg.policy)
        section = optim.OptimiserConfig.from_config(cfg.policy.optimiser, "policy.optimiser")
        optimiser = optim.make_optimiser(section)
        update = grpo.make_update(
            config, policy, optimiser, layout,
            temperature=cfg.rollout.temperature, max_new_tokens=cfg.rollout.max_new_tokens,
        )  # fmt: skip

    def step(state, repetition):
        key = keys.make_key(cfg.seed, "minibatch", repetition)
        return grpo.update_on_rollouts(state, batch, key, policy, update)

    epochs, updates = policy.epochs, grpo.count_updates(policy)
    return Program(
        name="policy update",
        call=_held(step, optim.init_state(params, optimiser)),
        tokens=load.tokens * epochs,
        counted="prompt and response tokens",
        work=roofline.update_work(config, prompt_tokens, load.lengths, epochs, updates),
        config=config,
        dtype=cfg.policy.dtype,
        rows=cfg.policy.microbatch * batch.tokens.shape[1],
    )


def _reward_update(cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool) -> Program:
    """pairs.per_prompt pairs a prompt, both members as long as a prompt with its response, and labelled rows alike.

    Each where the update reads them.
    """
    config, params = make_bench_model(cfg.reward, "reward", "score", layout, cfg.seed)
    load = make_load(cfg, config.vocab_size, prompt_tokens, ragged)
    rng = np.random.default_rng(cfg.seed + 2)

    def lengths_of(rows: int) -> np.ndarray:
        return np.minimum(np.resize(load.lengths, rows) + prompt_tokens, cfg.reward.max_tokens)

    def batch_of(lengths: np.ndarray) -> ScoreBatch:
        rows = [rng.integers(config.vocab_size, size=n).tolist() for n in lengths]
        return packing.pack_score_batch(rows, bucket=cfg.data.bucket, rows_multiple=layout.batch_shards)

    batch: list[PairBatch | LabelledBatch | None] = [None, None]
    tokens, widest = [], 0
    with setup_errors("reward"):
        reward = RewardUpdateConfig.from_config(cfg.reward)
    if reward.reads_pairs:
        pairs = cfg.data.prompts_per_step * cfg.pairs.per_prompt
        lengths = lengths_of(pairs)
        positive, negative = batch_of(lengths), batch_of(lengths)
        mask = packing.pad_rows(np.ones(pairs, bool), len(positive.tokens))
        batch[0] = layout.put(PairBatch(positive=positive, negative=negative, mask=mask), "batch")
        tokens += [lengths, lengths]
        widest = 2 * min(reward.microbatch, pairs) * positive.tokens.shape[1]
    if count := labelled_rollouts.max_rows_per_update(reward):
        lengths = lengths_of(count)
        rows = batch_of(lengths)
        labels = packing.pad_rows(np.arange(count, dtype=np.float32) % 2, len(rows.tokens))
        weights = packing.pad_rows(np.full(count, 1 / count, np.float32), len(rows.tokens))
        batch[1] = layout.put(LabelledBatch(rows=rows, labels=labels, weights=weights), "batch")
        tokens.append(lengths)
        widest = max(widest, min(reward.microbatch, count) * rows.tokens.shape[1])
    tokens = np.concatenate(tokens)
    with setup_errors("reward"):
        section = optim.OptimiserConfig.from_config(cfg.reward.optimiser, "reward.optimiser")
        optimiser = optim.make_optimiser(section)
        update = verifier_model.make_reward_update(config, reward, optimiser, layout)
    return Program(
        name="reward-model update",
        call=_held(lambda state, _: update(state, *batch), optim.init_state(params, optimiser)),
        tokens=int(tokens.sum()),
        counted="tokens of pairs and labelled rows"
        if labelled_rollouts.max_rows_per_update(reward)
        else "tokens of pairs",
        work=roofline.pair_update_work(config, tokens),
        config=config,
        dtype=cfg.reward.dtype,
        rows=widest,
    )


def _held(step: Callable[[Any, int], tuple[Any, Any]], state: Any) -> Callable[[int], None]:
    """A call that moves a state on: an update donates the one before."""

    def call(repetition):
        nonlocal state
        state, metrics = step(state, repetition)
        jax.block_until_ready((state, metrics))

    return call
