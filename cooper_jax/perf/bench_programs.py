"""Programs of the benchmark: a config's rollout, scoring and updates, on batches of a step's size.

    rollout   rollout.group_size samples for each of data.prompts_per_step prompts, without EOS, so that each
              sample has rollout.max_new_tokens tokens
    score     the reference's log-probabilities of such samples
    train     a step's updates of the policy on such samples; in the cooper arm also one update of the reward
              model

Prompts and responses are random tokens, and a "random" model has the vocab_size of its `arch`, so no
problems, tokenizers or network are needed.

B prompts   G samples a prompt   N = B * G rows, prompt-major   P prompt tokens   T response tokens at most
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import packing, row_packing
from cooper_jax.model import transformer, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import roofline
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import labelled_rollouts, verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.rollout import engine
from cooper_jax.rollout.rollout_config import RolloutConfig, get_engine_options
from cooper_jax.runtime import keys, mesh, optim
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.types import (
    LabelledBatch,
    PackedLabelled,
    PackedPairs,
    PackedRows,
    PairBatch,
    Params,
    PolicyBatch,
    Rollout,
    ScoreBatch,
)

KINDS = ("rollout", "score", "train")
SHORTEST_SHARE = 0.05  # the shortest response of a ragged workload, as a share of max_new_tokens


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts of P tokens each, and the number of response tokens of each row."""

    prompts: np.ndarray  # i32[B, P]
    lengths: np.ndarray  # i32[N]

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of all rows."""
        return int(self.prompts.shape[1] * len(self.lengths) + self.lengths.sum())


@dataclasses.dataclass(frozen=True)
class BenchProgram:
    """A program to measure, with its roofline."""

    name: str
    # The measurement.
    call: Callable[[int], None]  # takes the number of the repetition; returns when the devices are done
    tokens: int  # the numerator of tokens per second
    counted: str  # a description of these tokens
    # The roofline.
    work: dict[str, roofline.Work]
    config: ModelConfig
    dtype: str  # of its matrix products
    rows: int  # of its matrix products
    # A rollout's prefill alone, to time it apart from decoding.
    prefill: Callable[[int], None] | None = None


def list_bench_programs(
    kind: str, cfg: ConfigDict, layout: mesh.Layout, *, prompt_tokens: int, ragged: bool
) -> Iterator[BenchProgram]:
    """Yield the programs of a kind (KINDS), so that only one program's arrays are in memory at a time.

    Args:
      prompt_tokens: P.
      ragged: draw the response lengths from a Pareto distribution of exponent 1, truncated at T.  If False,
        all lengths are T.

    Raises SetupError for a config that cannot be run, and for weights that cannot be loaded.
    """
    if kind == "rollout":
        yield _make_rollout(cfg, layout, prompt_tokens, ragged)
    elif kind == "score":
        yield _make_score(cfg, layout, prompt_tokens, ragged)
    else:
        yield _make_policy_update(cfg, layout, prompt_tokens, ragged)
        if cfg.reward.arm == "cooper":
            yield _make_reward_update(cfg, layout, prompt_tokens, ragged)


def time_call(call: Callable[[int], None], repetition: int) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(repetition)
    return time.perf_counter() - start


# --- workloads and models --------------------------------------------------------------------------------


def make_workload(cfg: ConfigDict, vocab_size: int, prompt_tokens: int, ragged: bool) -> Workload:
    """Draw a random workload of a step's size from the config's seed."""
    rng = np.random.default_rng(cfg.seed)
    prompts, max_new_tokens = cfg.data.prompts_per_step, cfg.rollout.max_new_tokens
    rows = prompts * cfg.rollout.group_size
    lengths = np.full(rows, max_new_tokens, np.int32)  # i32[N]
    if ragged:
        lengths = draw_lengths(rng, rows, max_new_tokens)
    return Workload(rng.integers(vocab_size, size=(prompts, prompt_tokens), dtype=np.int32), lengths)


def draw_lengths(rng: np.random.Generator, rows: int, max_new_tokens: int) -> np.ndarray:
    """Draw the response lengths of a ragged workload, i32[rows]: Pareto of exponent 1, truncated."""
    # The inverse distribution function of a Pareto distribution of exponent 1: shortest / (1 - u).
    pareto = max(1.0, SHORTEST_SHARE * max_new_tokens) / (1.0 - rng.random(rows))
    return np.minimum(pareto, max_new_tokens).astype(np.int32)


def make_bench_model(
    section: ConfigDict, name: str, head: str, layout: mesh.Layout, seed: int
) -> tuple[ModelConfig, Params]:
    """Make the model of a config section, random or loaded, without a tokenizer."""
    with setup_errors(f"{name}.weights={section.weights!r} cannot be had"):
        if section.weights == "random":
            config = ModelConfig.from_arch(section.arch, section.arch.vocab_size, section.vocab_multiple)
            # Without a tokenizer the vocabulary is the one in `arch`.
            specs = transformer.param_specs(config, head)
            return config, mesh.init_params(keys.make_key(seed, f"init_{name}"), specs, layout)

        loaded = weights.load_weights(
            section.weights, num_layers=section.num_layers, head=head, layout=layout,
            vocab_multiple=section.vocab_multiple, seed=seed,
        )  # fmt: skip
        return loaded.config, loaded.params


def make_bench_batch(
    cfg: ConfigDict, config: ModelConfig, workload: Workload, layout: mesh.Layout
) -> PolicyBatch:
    """Make a batch of random responses with random advantages, packed and placed as in training."""
    # A seed other than the workload's, so that responses do not repeat the prompts' tokens.
    rng = np.random.default_rng(cfg.seed + 1)
    n, max_new_tokens = len(workload.lengths), cfg.rollout.max_new_tokens
    responses = Rollout(
        tokens=packing.as_array(rng.integers(config.vocab_size, size=(n, max_new_tokens), dtype=np.int32)),
        mask=packing.as_array(np.arange(max_new_tokens)[None, :] < workload.lengths[:, None]),
        logprobs=packing.as_array(np.full((n, max_new_tokens), -np.log(config.vocab_size), np.float32)),
        finished=packing.as_array(np.zeros(n, bool)),
    )
    batch = packing.pack_policy_batch(
        workload.prompts.tolist(), responses, bucket=cfg.data.bucket, rows_multiple=layout.batch_shards
    )

    # Policy, reference and rollout agree: ratios of 1 take the same time as any others.
    sampled = batch.rollout_logprobs
    advantages = packing.as_array(packing.pad_rows(rng.standard_normal(n).astype(np.float32), len(sampled)))
    batch = dataclasses.replace(batch, advantages=advantages, old_logprobs=sampled, ref_logprobs=sampled)
    return layout.put(batch, "batch")


# --- programs --------------------------------------------------------------------------------------------


def make_bench_sampling(cfg: ConfigDict) -> engine.SamplingSpec:
    """Make the config's sampling settings without EOS tokens, so that every response has its full length.

    Raises SetupError for settings out of range.
    """
    with setup_errors("rollout"):
        return RolloutConfig.from_config(cfg.rollout).make_sampling_spec(eos_ids=())


def _make_rollout(cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool) -> BenchProgram:
    config, params = make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    workload = make_workload(cfg, config.vocab_size, prompt_tokens, ragged)
    rows = len(workload.lengths)
    slots = min(cfg.rollout.max_rows or rows, rows)
    prompts = workload.prompts.tolist()
    options = get_engine_options(cfg)

    # limits: the response length of each row, i32[N], in place of EOS tokens.
    def generate(repetition: int, spec: engine.SamplingSpec, limits: Any) -> None:
        rollout = engine.generate(
            params, config, layout, prompts, range(len(prompts)),
            keys.make_key(cfg.seed, "rollout", repetition), spec, limits=limits, **options,
        )  # fmt: skip
        jax.block_until_ready(rollout)

    spec = make_bench_sampling(cfg)
    # Prefill cannot be timed inside a rollout, so it is timed as a rollout of one token per row.
    one_token = dataclasses.replace(spec, max_new_tokens=1)
    work = roofline.rollout_work(
        config,
        len(prompts),
        prompt_tokens,
        workload.lengths,
        slots,
        weight_bytes=jnp.dtype(spec.dtype).itemsize,
        cache_bytes=jnp.dtype(spec.kv_dtype or spec.dtype).itemsize,
    )
    return BenchProgram(
        name="rollout",
        call=lambda repetition: generate(repetition, spec, workload.lengths),
        tokens=int(workload.lengths.sum()),
        counted="sampled tokens",
        work=work,
        config=config,
        dtype=spec.dtype,
        rows=slots,
        prefill=lambda repetition: generate(repetition, one_token, np.ones(rows, np.int32)),
    )


def _make_score(cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool) -> BenchProgram:
    config, params = make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    # The policy stands for the reference, which has the same shape.
    workload = make_workload(cfg, config.vocab_size, prompt_tokens, ragged)
    batch = make_bench_batch(cfg, config, workload, layout)

    options = dict(dtype=cfg.policy.dtype, temperature=cfg.rollout.temperature)
    logprobs: Callable[..., jax.Array]
    inputs: tuple[Any, ...]
    if _packs(cfg.policy, config, layout):
        logprobs = grpo.make_packed_logprobs(config, layout, **options)
        pack = _make_packer(cfg, config, layout, prompt_tokens, batch)
        inputs = pack(np.arange(len(batch.response_mask))), batch.response_mask
    else:
        logprobs = grpo.make_logprobs(config, layout, microbatch=cfg.policy.microbatch, **options)
        inputs = batch.tokens, batch.valid, batch.response_mask.shape[1]

    def score(_repetition: int) -> None:
        jax.block_until_ready(logprobs(params, *inputs))

    return BenchProgram(
        name="score",
        call=score,
        tokens=workload.tokens,
        counted="prompt and response tokens",
        work=roofline.score_work(
            config, prompt_tokens, workload.lengths, _count_shared_prompts(cfg, config, layout)
        ),
        config=config,
        dtype=cfg.policy.dtype,
        rows=cfg.policy.microbatch * batch.tokens.shape[1],
    )


def _make_policy_update(
    cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool
) -> BenchProgram:
    config, params = make_bench_model(cfg.policy, "policy", "logits", layout, cfg.seed)
    workload = make_workload(cfg, config.vocab_size, prompt_tokens, ragged)
    batch = make_bench_batch(cfg, config, workload, layout)

    # The same jitted update as in training, over all minibatches and epochs of a step.
    with setup_errors("policy"):
        policy = PolicyConfig.from_config(cfg.policy)
        settings = optim.OptimiserConfig.from_config(cfg.policy.optimiser, "policy.optimiser")
        optimiser = optim.make_optimiser(settings)
        update = grpo.make_update(
            config, policy, optimiser, layout,
            temperature=cfg.rollout.temperature, max_new_tokens=cfg.rollout.max_new_tokens,
            sampler_agrees=RolloutConfig.from_config(cfg.rollout).is_float32,
        )  # fmt: skip

    pack, per_row = None, batch
    if _packs(cfg.policy, config, layout):
        pack = _make_packer(cfg, config, layout, prompt_tokens, batch)
        per_row = batch.without_tokens()

    def step(state, repetition):
        key = keys.make_key(cfg.seed, "minibatch", repetition)
        return grpo.update_on_rollouts(state, per_row, key, policy, update, pack)

    # The rows of an epoch's minibatches add up to all rows, so passes are counted by epochs.
    epochs, updates = policy.epochs, grpo.count_updates(policy)
    return BenchProgram(
        name="policy update",
        call=_carry_state(step, optim.init_state(params, optimiser)),
        tokens=workload.tokens * epochs,
        counted="prompt and response tokens",
        work=roofline.update_work(
            config,
            prompt_tokens,
            workload.lengths,
            epochs,
            updates,
            _count_shared_prompts(cfg, config, layout),
        ),
        config=config,
        dtype=cfg.policy.dtype,
        rows=cfg.policy.microbatch * batch.tokens.shape[1],
    )


def _packs(section: ConfigDict, config: ModelConfig, layout: mesh.Layout) -> bool:
    """True if the rows of the model in `section` are packed, as in training."""
    return transformer.should_pack(section.packing, config, layout, section.dtype)


def _shares_prompts(cfg: ConfigDict, config: ModelConfig, layout: mesh.Layout) -> bool:
    """True if packed rows share prompts, as in training."""
    return cfg.policy.share_prompts and transformer.supports_shared_prompts(config, layout)


def _count_shared_prompts(cfg: ConfigDict, config: ModelConfig, layout: mesh.Layout) -> int:
    """The number of responses whose prompt another one of their group has computed, at best."""
    if not (_packs(cfg.policy, config, layout) and _shares_prompts(cfg, config, layout)):
        return 0
    return cfg.data.prompts_per_step * (cfg.rollout.group_size - 1)


def _make_packer(
    cfg: ConfigDict, config: ModelConfig, layout: mesh.Layout, prompt_tokens: int, batch: PolicyBatch
) -> Callable[[np.ndarray], PackedRows]:
    """Make the function that packs rows of the batch, as in training."""
    plan = row_packing.choose_packing(
        prompt_tokens + cfg.rollout.max_new_tokens,
        cfg.policy.microbatch,
        layout.batch_shards,
        width=config.width,
        bucket=cfg.data.bucket,
        shares_prompts=_shares_prompts(cfg, config, layout),
        new_tokens=cfg.rollout.max_new_tokens,
        shortest_prompt=prompt_tokens,
    )
    tokens, valid = np.asarray(batch.tokens), np.asarray(batch.valid)
    response_tokens = batch.response_mask.shape[1]

    def pack(rows: np.ndarray) -> PackedRows:
        packed = row_packing.pack_policy_rows(
            tokens[rows], valid[rows], response_tokens, plan, layout.batch_shards
        )
        return layout.put(packed, None, "batch")

    return pack


def _make_reward_update(
    cfg: ConfigDict, layout: mesh.Layout, prompt_tokens: int, ragged: bool
) -> BenchProgram:
    """Make one update of the reward model, on the kinds of rows that the config's update reads.

    These are pairs.per_prompt pairs per prompt, and labelled rows.
    Both members of a pair, and a labelled row, are as long as a prompt with its response.
    """
    config, params = make_bench_model(cfg.reward, "reward", "score", layout, cfg.seed)
    workload = make_workload(cfg, config.vocab_size, prompt_tokens, ragged)

    # The same jitted update as in training.
    with setup_errors("reward"):
        reward = RewardUpdateConfig.from_config(cfg.reward)
        settings = optim.OptimiserConfig.from_config(cfg.reward.optimiser, "reward.optimiser")
        optimiser = optim.make_optimiser(settings)
        update = verifier_model.make_reward_update(config, reward, optimiser, layout)

    def make_lengths(rows: int) -> np.ndarray:
        return np.minimum(np.resize(workload.lengths, rows) + prompt_tokens, cfg.reward.max_tokens)

    inputs = _RewardInputs(cfg, config, layout, np.random.default_rng(cfg.seed + 2))
    pair_batch: PairBatch | PackedPairs | None = None
    labelled_batch: LabelledBatch | PackedLabelled | None = None
    row_lengths: list[np.ndarray] = []
    if reward.reads_pairs:
        lengths = make_lengths(cfg.data.prompts_per_step * cfg.pairs.per_prompt)
        pair_batch = inputs.make_pairs(lengths)
        row_lengths += [lengths, lengths]
    if labelled := labelled_rollouts.max_rows_per_update(reward):
        lengths = make_lengths(labelled)
        labelled_batch = inputs.make_labelled(lengths)
        row_lengths.append(lengths)

    def step(state, _repetition):
        return update(state, pair_batch, labelled_batch)

    all_lengths = np.concatenate(row_lengths)
    return BenchProgram(
        name="reward-model update",
        call=_carry_state(step, optim.init_state(params, optimiser)),
        tokens=int(all_lengths.sum()),
        counted="tokens of pairs and labelled rows" if labelled else "tokens of pairs",
        work=roofline.pair_update_work(config, all_lengths),
        config=config,
        dtype=cfg.reward.dtype,
        rows=inputs.largest,
    )


@dataclasses.dataclass
class _RewardInputs:
    """Makes random inputs of the reward model, packed and placed as in training."""

    cfg: ConfigDict
    config: ModelConfig
    layout: mesh.Layout
    rng: np.random.Generator  # of the tokens
    largest: int = 0  # tokens of the largest microbatch that was made

    def make_pairs(self, lengths: np.ndarray) -> PairBatch | PackedPairs:
        """Make pairs.  lengths: i[B], of both members of each."""
        pairs, layout = len(lengths), self.layout
        if _packs(self.cfg.reward, self.config, layout):
            packed = self._pack(lengths, together=2)
            return PackedPairs(packed, layout.put(np.ones(pairs, bool)))

        positive, negative = self._pad(lengths), self._pad(lengths)
        self._note_size(2 * min(self.cfg.reward.microbatch, pairs) * positive.tokens.shape[1])
        # Rows added to fill the shards are masked.
        mask = packing.as_array(packing.pad_rows(np.ones(pairs, bool), len(positive.tokens)))
        return layout.put(PairBatch(positive=positive, negative=negative, mask=mask), "batch")

    def make_labelled(self, lengths: np.ndarray) -> LabelledBatch | PackedLabelled:
        """Make rows with alternating labels, and weights that sum to 1 over the rows that are not padding."""
        count, layout = len(lengths), self.layout
        labels, weights = np.arange(count, dtype=np.float32) % 2, np.full(count, 1 / count, np.float32)
        if _packs(self.cfg.reward, self.config, layout):
            return PackedLabelled(self._pack(lengths, together=1), layout.put(labels), layout.put(weights))

        rows = self._pad(lengths)
        self._note_size(min(self.cfg.reward.microbatch, count) * rows.tokens.shape[1])
        labels, weights = (packing.pad_rows(x, len(rows.tokens)) for x in (labels, weights))
        return layout.put(
            LabelledBatch(rows=rows, labels=packing.as_array(labels), weights=packing.as_array(weights)),
            "batch",
        )

    def _draw(self, lengths: np.ndarray) -> list[list[int]]:
        return [self.rng.integers(self.config.vocab_size, size=n).tolist() for n in lengths]

    def _pad(self, lengths: np.ndarray) -> ScoreBatch:
        bucket = self.cfg.data.bucket
        return packing.pack_score_batch(
            self._draw(lengths), bucket=bucket, rows_multiple=self.layout.batch_shards
        )

    def _pack(self, lengths: np.ndarray, together: int) -> PackedRows:
        cfg = self.cfg
        plan = row_packing.choose_packing(
            together * cfg.reward.max_tokens,
            cfg.reward.microbatch,
            self.layout.batch_shards,
            width=self.config.width,
            bucket=cfg.data.bucket,
        )
        rows = row_packing.pack_reward_rows(
            self._draw(np.repeat(lengths, together)), plan, self.layout.batch_shards, together=together
        )
        self._note_size(math.prod(rows.tokens.shape[1:]))
        return self.layout.put(rows, None, "batch")

    def _note_size(self, tokens: int) -> None:
        self.largest = max(self.largest, tokens)


def _carry_state(step: Callable[[Any, int], tuple[Any, Any]], state: Any) -> Callable[[int], None]:
    """Make a call that passes each update's new state to the next, since an update donates its old state."""

    def call(repetition: int) -> None:
        # Blocks until the devices are done, since JAX returns from the update before that.
        nonlocal state
        state, metrics = step(state, repetition)
        jax.block_until_ready((state, metrics))

    return call
