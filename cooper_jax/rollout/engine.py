"""Rollout engine: samples G responses to each prompt with continuous batching.

`generate` takes prompts as token ids and returns a `Rollout` of arrays:

1. The weights are cast once (`copy_rollout_weights`) and resharded for decoding: if memory allows it, they
   are all-gathered from the mesh axis that shards them in training.
2. Each prompt is prefilled once, in chunks of similar length (rollout_plan.py), and its G samples share its
   keys and values.  Every (prompt, sample) is a request, whose first token is sampled from the prompt's last
   hidden state.
3. Requests are decoded in slots, the rows of the decode batch.  There is one slot per request, unless
   `max_rows` or `memory_gib` allows fewer.  A slot whose request has finished takes the next request without
   a prefill (slots.py), so no slot waits for a long response in another.
4. Decoding runs in jitted segments of at most `spec.segment` tokens with donated state.  After each segment
   the host reads one small array (with `on_groups`, also the rows of the prompts that have finished); then it
   refills idle slots, moves the last live slots into a smaller batch (batch_sizes.py), or stops.

Compilation: shapes are rounded up so that few programs are compiled.  Prompts are padded to a multiple of 32
tokens.  The number of prompts on each batch shard is rounded up to three significant bits (1 to 8, 10, 12,
14, 16, 20, ...); padding prompts request nothing, and their rows are dropped.  The suffix cache, which holds
the keys and values of responses, has a size that depends on the kernels.  Plain XLA reads the whole cache, so
the cache of the whole batch grows with the longest response, in three sizes (batch_sizes.py).  Pallas kernels
read only columns in use, so their cache has all columns from the start, and one decode program is compiled for
each number of slots.  A caller with many rollouts gives `shapes`: then all of them have the same ones,
and the first compiles every program that a later one may need.

Results: a sampled EOS is inside the mask and nothing follows it; truncated rows have no EOS.  A row's random
bits are a function of the key, its prompt's position in the data order, its sample index and the token's
index alone.  They do not depend on its slot or on the time at which the slot took it.

B prompts   G samples per prompt   N = B * G rows, prompt-major   P prompt tokens   T response tokens
Z batch shards   Q requests per shard   U slots per shard   W columns of the suffix cache
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.decode_attention import supports_head_dim
from cooper_jax.model import generation, transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import PROJECTIONS
from cooper_jax.model.lora import merge_adapters
from cooper_jax.rollout import batch_sizes, rollout_plan, rollout_state
from cooper_jax.rollout import slots as slot_programs
from cooper_jax.rollout.rollout_state import PromptCache, Requests, RolloutStatic, Slots, Status
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime import device_memory, hosts
from cooper_jax.runtime.mesh import Layout, is_spec, make_shardings
from cooper_jax.types import Completion, Metrics, Params, Rollout

# Callback for prompts whose rows have all finished: (indices of these prompts, their rows).
OnGroups = Callable[[list[int], Rollout], None]
Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Responses that are continued: each prompt ends with the first tokens of one response (group_size is 1)."""

    samples: Sequence[int]  # [B], the response's index among the samples of its prompt
    starts: Sequence[int]  # [B], the number of its tokens that are part of the prompt


@dataclasses.dataclass(frozen=True)
class SharedShapes:
    """Sizes that several rollouts have in common, so that they run the same programs."""

    longest_prompt: int  # tokens of the longest prompt of all these rollouts
    num_prompts: int  # of the largest of them; prompts that a rollout lacks are padding
    compile_all: bool = False  # the first rollout compiles the programs of all sizes that later ones may take


def generate(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    prompts: Prompts,
    positions: Sequence[int],
    key: jax.Array,
    spec: SamplingSpec,
    *,
    limits: Sequence[int] | np.ndarray | None = None,
    continued: Continuation | None = None,
    max_rows: int | None = None,
    memory_gib: float | None = None,
    weight_placement: str = "auto",
    on_groups: OnGroups | None = None,
    between_segments: Callable[[], None] | None = None,
    report: Callable[[Metrics], None] | None = None,
    implementation: str | None = None,
    shapes: SharedShapes | None = None,
    shrink: int = 2,
) -> Rollout:
    """Sample spec.group_size responses to each prompt -> Rollout of N = B * G rows, T = spec.max_new_tokens.

    params: as trained, or the result of `copy_rollout_weights`, which is not cast again.
    positions: each prompt's position in the data order; with `key` (of this step's rollout stream) they
      determine the random bits.
    limits: maximum number of tokens of each row, [N], from 1 to T; None: T for all.
    continued: the prompts end with first tokens of responses, whose other tokens get the random bits that they
      would have had; None: they do not.
    max_rows: number of slots on all shards together, which is the number of rows decoded at a time.
    memory_gib: GiB of one device for weights, caches and slots; as many slots are opened as fit.
    weight_placement: gathered, sharded or auto: see `rollout_plan.should_gather`.
    on_groups: receives each prompt's rows on the host, once, while other prompts are still decoded.
    between_segments: called on the host before the prefill and before each decode segment, equally often on
      every host.  An exception that it raises ends the rollout and reaches the caller.
    report: receives `rollout/*` metrics at the end: slot use and load balance over the batch shards.
    implementation: the kernels to use (kernels/platform.py); None: those of `choose_kernels`.
    shapes: for a caller that makes many rollouts.  None: sizes fit these prompts alone.
    shrink: the last live requests move into a batch of so many times fewer slots.  Each size is a program.

    On a mesh, prompts, positions, key and limits must be the same on every host.  The Rollout consists of
    NumPy arrays, the same on every host.

    Raises ValueError if prompts are missing, empty or outside the vocabulary, or if no slot fits into
    the memory.  Raises FloatingPointError if a live row's logits are not finite.
    """
    # The rollout's matrices include the adapters, so only the copy of the weights knows of these.
    trained_config, config = config, config.base

    # Check the inputs, and collect the static arguments of all programs.
    num_rows = len(prompts) * spec.group_size
    row_limits = np.full(num_rows, spec.max_new_tokens) if limits is None else np.asarray(limits)
    _check_inputs(config, prompts, positions, row_limits, spec)
    fixed_rows = shapes is not None
    if shapes is None:
        shapes = SharedShapes(longest_prompt=max(map(len, prompts)), num_prompts=len(prompts))
    _check_shapes(shapes, prompts)
    if implementation is None:
        implementation = choose_kernels(config, layout)
    static = RolloutStatic(config, layout, spec, implementation)
    prompts_per_shard = rollout_plan.round_to_bucket(-(-shapes.num_prompts // static.shards))

    # The rollout's own copy of the weights.
    gathered = should_gather(config, layout, spec, weight_placement, memory_gib)
    weights = copy_rollout_weights(params, trained_config, layout, spec.dtype, gathered)
    if between_segments is not None:
        between_segments()

    # Slots are counted first, so that a budget that is too small fails before the caches are allocated.
    width = _prompt_width(static, shapes.longest_prompt)
    slots_per_shard = count_slots(
        weights, static, shapes.longest_prompt, prompts_per_shard, max_rows, memory_gib
    )
    prompt_cache = _prefill(weights, static, prompts, prompts_per_shard, width, fixed_rows)

    # Padding prompts get a limit of 0: they request nothing.
    padded_positions = np.zeros(prompts_per_shard * static.shards, np.int32)
    padded_limits = np.zeros(prompts_per_shard * static.shards * spec.group_size, np.int32)
    padded_positions[: len(prompts)] = positions
    padded_limits[:num_rows] = row_limits
    rows = []  # of a continuation: samples and starts
    if continued is not None:
        for values in (continued.samples, continued.starts):
            rows.append(np.zeros(len(padded_limits), np.int32))
            rows[-1][:num_rows] = values
    arrays = layout.put((padded_positions, padded_limits, np.zeros_like(padded_limits)), "batch")
    on_devices, limits_on_devices, no_limits = arrays
    continuation = layout.put(rows, "batch")

    def start_requests(row_limits: jax.Array) -> Requests:
        return slot_programs.sample_first_tokens(
            weights, prompt_cache, on_devices, row_limits, key, *continuation, static=static
        )

    if shapes.compile_all:
        sizes = slots_per_shard, prompts_per_shard, width, on_groups is not None, bool(rows), shrink
        if (static, sizes) not in _COMPILED:
            _compile_all(
                weights, prompt_cache, start_requests(no_limits), static, slots_per_shard,
                shrink=shrink, notifies=on_groups is not None,
            )  # fmt: skip
            _COMPILED.add((static, sizes))
    requests = start_requests(limits_on_devices)

    # Decode, and crop the padding: rows are prompt-major, and padding prompts are the last.
    notifier = None
    if on_groups is not None:
        notifier = _GroupNotifier(on_groups, len(prompts), spec)
    requests = _decode(
        weights, prompt_cache, requests, slots_per_shard, static, notifier, between_segments, report, shrink
    )
    return _fetch_rows(requests, slice(num_rows), spec)


def choose_kernels(config: ModelConfig, layout: Layout) -> str:
    """Choose the kernels for the layout's devices if they support the head_dim, otherwise plain XLA."""
    native = platform.default_implementation(layout.platform)
    return native if supports_head_dim(native, config.head_dim) else "xla"


# --- weights ---------------------------------------------------------------------------------------------


def copy_rollout_weights(
    params: Params, config: ModelConfig, layout: Layout, dtype: str, gathered: bool = True
) -> Params:
    """Copy the weights for a step's rollout: matrices in `dtype`, norms unchanged, layers split into stacks.

    Adapters (model/lora.py) are added to their matrices in float32, and are no part of the copy.

    gathered: on a mesh, all-gather the weights once (`layout.for_rollout()`), and not at every token.

    On one device, arrays that need no change are not copied: do not donate them while the result is in use.
    """
    # Only a rollout's copy has its layers as a tuple of stacks, so these weights are such a copy.
    if isinstance(params["layers"], tuple):
        return params
    if layout.single_device:
        if config.lora is None:
            params = _cast(params, config, dtype)
        else:
            params, config = _merge_and_cast(params, config, dtype), config.base
        return generation.prepare_generation(params, config, layout)
    return reshard_weights(params, config=config, layout=layout, dtype=dtype, gathered=gathered)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _merge_and_cast(params: Params, config: ModelConfig, dtype: str) -> Params:
    """Merge adapters and cast in one program, which need not hold all merged matrices in float32."""
    assert config.lora is not None
    return _cast(merge_adapters(params, config.lora), config.base, dtype)


@functools.partial(jax.jit, static_argnames=("config", "layout", "dtype", "gathered"))
def reshard_weights(
    params: Params, *, config: ModelConfig, layout: Layout, dtype: str, gathered: bool = True
) -> Params:
    """Copy the weights as `copy_rollout_weights` does, on a mesh and in one program."""
    if config.lora is not None:
        params, config = merge_adapters(params, config.lora), config.base

    # Cast before the all-gather: bfloat16 halves the bytes that are sent.
    target = layout.for_rollout() if gathered else layout
    specs = transformer.param_specs(config)
    placed = make_shardings(target, specs)
    if not generation.keeps_stack(config, layout):
        # Split before the all-gather, so that the whole stack is never there besides.
        placed["layers"] = make_shardings(layout, specs)["layers"]
    weights = jax.lax.with_sharding_constraint(_cast(params, config, dtype), placed)
    weights = generation.prepare_generation(weights, config, layout)

    # Splitting the layers must not make the compiler choose another sharding.
    shardings = make_layer_shardings(target, specs)
    stacks = tuple(jax.lax.with_sharding_constraint(w, shardings) for w in weights["layers"])
    return weights | {"layers": stacks}


def make_layer_shardings(layout: Layout, specs: Params) -> Params:
    """Make the shardings of a stack of layers: those declared, with heads and head_dim as one axis."""

    def make_sharding(name, declared):
        spec = layout.spec(declared.axes, declared.shape)
        # A rollout's projections are matrices, whose heads and head_dim are one axis, sharded as the heads.
        if name in PROJECTIONS:
            parts = zip(spec, declared.axes, strict=True)
            spec = PartitionSpec(*(part for part, axis in parts if axis != "head_dim"))
        return NamedSharding(layout.mesh, spec)

    return {name: make_sharding(name, declared) for name, declared in specs["layers"].items()}


def _cast(params: Params, config: ModelConfig, dtype: str) -> Params:
    """Cast all weights to `dtype`, except those that are declared to stay in float32."""

    def cast(spec, x):
        return x if x.dtype == dtype or spec.keep_f32 else x.astype(dtype)

    return jax.tree.map(cast, transformer.param_specs(config), params, is_leaf=is_spec)


def should_gather(
    config: ModelConfig, layout: Layout, spec: SamplingSpec, weight_placement: str, memory_gib: float | None
) -> bool:
    """True if the weights are to be all-gathered for the rollout.

    With weight_placement "auto" they are gathered if they take at most half of `memory_gib` or, if that is not
    set, half of the device's memory.  If neither is known, they are gathered.
    """
    if weight_placement != "auto":
        return weight_placement != "sharded"
    budget: float | None
    if memory_gib:
        budget = memory_gib * rollout_plan.GIB
    else:
        budget = device_memory.read_device_memory(layout.mesh.devices.flat[0])
    return rollout_plan.should_gather(config, layout, spec.dtype, budget)


# --- text ------------------------------------------------------------------------------------------------


def decode_completions(
    rollout: Rollout, decode: Callable[[Sequence[int]], str], eos_ids: Sequence[int]
) -> list[Completion]:
    """Decode each row to text, without the EOS of a finished row; a truncated row keeps its last token.

    `Completion.tokens` counts the sampled tokens, EOS included.  Raises ValueError if a finished row does not
    end with one of eos_ids, which means that the rollout was sampled with other EOS ids.
    """
    tokens, mask, finished = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.finished))
    completions = []
    for n in range(len(tokens)):
        ids = tokens[n][mask[n]].tolist()
        if finished[n] and ids[-1] not in eos_ids:
            raise ValueError(
                f"row {n} finished with token {ids[-1]}, which is none of the EOS ids {eos_ids}: pass the "
                "ids that the rollout was sampled with"
            )
        text = decode(ids[:-1] if finished[n] else ids)
        completions.append(Completion(text=text, truncated=not finished[n], tokens=len(ids)))
    return completions


def list_tokens(rollout: Rollout) -> list[list[int]]:
    """The sampled token ids of each row, the EOS included."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    return [row[sampled].tolist() for row, sampled in zip(tokens, mask, strict=True)]


# --- sizes -----------------------------------------------------------------------------------------------


def count_slots(
    weights: Params,
    static: RolloutStatic,
    longest_prompt: int,
    prompts_per_shard: int,
    max_rows: int | None,
    memory_gib: float | None,
) -> int:
    """Count the slots of each shard: one per request, or as many as `max_rows` and `memory_gib` allow.

    longest_prompt: tokens of the longest prompt.

    Raises ValueError if not even one slot fits.
    """
    spec, shards = static.spec, static.shards
    slots = prompts_per_shard * spec.group_size

    # Rows are divided evenly over the shards.
    if max_rows is not None:
        if max_rows < shards:
            raise ValueError(
                f"max_rows {max_rows} is less than one row on each of {shards} batch shards: raise it"
            )
        slots = min(slots, max_rows // shards)

    # A memory limit may make requests wait, and waiting requests need a larger cache: it is planned with that.
    if memory_gib is not None:
        # On a CPU, decoding may hold the matrices in panels beside the weights of the prefill.
        panels = generation.list_panel_matrices(weights) if transformer.UNEMBED in weights else []
        memory = rollout_plan.plan_memory(
            {"weights": weights, "panels": panels},
            static.config,
            static.layout,
            static.kv_format,
            prompts=prompts_per_shard,
            width=_prompt_width(static, longest_prompt),
            group=spec.group_size,
            new_tokens=spec.max_new_tokens,
            columns=count_cache_columns(static, waiting=True),
            own_prompts=not static.pallas,  # plain XLA may copy a prompt's keys and values to its slots
        )
        slots = min(slots, memory.slots(int(memory_gib * rollout_plan.GIB)))
    return slots


def count_cache_columns(static: RolloutStatic, waiting: bool) -> int:
    """Count the columns that the suffix cache may need: one per response token except the last.

    waiting: some requests wait for slots.

    The last token is never fed to the model, so it has no keys and values.
    """
    # When requests wait, slots that started at different times share one write column.  It moves to the right
    # until the host shifts the cache back; a quarter more columns make shifts rare.
    columns = max(static.spec.max_new_tokens - 1, 1)
    if waiting:
        columns += max(static.spec.segment, columns // 4)
    multiple = rollout_plan.column_multiple(static.kv_format)
    return -(-columns // multiple) * multiple


def _prompt_width(static: RolloutStatic, longest: int) -> int:
    return rollout_plan.prompt_width(longest, rollout_plan.column_multiple(static.kv_format))


# --- the host's side of a rollout ------------------------------------------------------------------------


# Sizes of rollouts whose programs this process has compiled, all of them.
_COMPILED: set[tuple[RolloutStatic, tuple[int, ...]]] = set()


def _compile_all(
    weights: Params,
    prompts: PromptCache,
    requests: Requests,
    static: RolloutStatic,
    slots_per_shard: int,
    **options: Any,
) -> None:
    """Compile the programs that later rollouts may need, beside those that start one.

    requests: none that needs a slot; donated.  options: of `batch_sizes.compile_batch_sizes`.
    """
    prompts_per_shard = len(prompts.lengths) // static.shards
    width = jax.tree.leaves(prompts.kv)[0].shape[3]
    spare = slot_programs.make_prompt_cache(
        weights, prompts_per_shard=prompts_per_shard, width=width, static=static
    )
    for chunk in rollout_plan.make_empty_chunks(static.shards, prompts_per_shard, width):
        spare = _prefill_chunk(weights, static, spare, chunk)
    del spare

    waiting = slots_per_shard < requests.num_tokens.shape[1]
    columns = batch_sizes.list_columns(static, count_cache_columns(static, waiting))
    batch_sizes.compile_batch_sizes(weights, prompts, requests, slots_per_shard, columns, static, **options)


def _prefill(
    weights: Params,
    static: RolloutStatic,
    prompts: Prompts,
    prompts_per_shard: int,
    width: int,
    fixed_rows: bool,
) -> PromptCache:
    """Prefill all prompts, one chunk after the other.  fixed_rows: see `rollout_plan.make_chunks`."""
    cache = slot_programs.make_prompt_cache(
        weights, prompts_per_shard=prompts_per_shard, width=width, static=static
    )
    chunks = rollout_plan.make_chunks(prompts, static.shards, prompts_per_shard, width, fixed_rows=fixed_rows)
    for chunk in chunks:
        cache = _prefill_chunk(weights, static, cache, chunk)
    return cache


def _prefill_chunk(
    weights: Params, static: RolloutStatic, cache: PromptCache, chunk: rollout_plan.Chunk
) -> PromptCache:
    arrays = static.layout.put((chunk.tokens, chunk.lengths, chunk.source), "batch")
    return slot_programs.prefill_chunk(weights, cache, *arrays, static=static)


def _decode(
    weights: Params,
    prompts: PromptCache,
    requests: Requests,
    slots_per_shard: int,
    static: RolloutStatic,
    notifier: _GroupNotifier | None,
    between_segments: Callable[[], None] | None,
    report: Callable[[Metrics], None] | None,
    shrink: int,
) -> Requests:
    """Decode every request to its end, in `slots_per_shard` slots."""
    segment = static.spec.segment
    max_columns = count_cache_columns(static, waiting=slots_per_shard < requests.num_tokens.shape[1])

    # Plain XLA reads every column of the cache at every token, so its cache starts small.
    sizes = batch_sizes.list_columns(static, max_columns)
    columns = sizes[0]
    slots, packed = slot_programs.open_slots(
        weights, requests, prompts, slots_per_shard=slots_per_shard, columns=columns, static=static
    )
    status = Status.read(packed)

    of_batch = batch_sizes.BatchWeights(weights)

    # Slot use is a share of the slot steps: one decode step counts once for each slot of each shard.
    steps = slot_steps = 0
    while True:
        if status.failed:
            raise FloatingPointError(
                "the policy's logits are not finite, so no token can be sampled: the weights contain NaN "
                "or overflow in " + static.spec.dtype
            )
        if notifier is not None:
            notifier.notify(slots, requests)
        if not status.live and not status.waiting:
            break
        if between_segments is not None:
            between_segments()

        # Refill idle slots; once no request waits, make the batch smaller as soon as fewer slots are enough.
        # `status.idle` counts idle slots only on shards where requests wait.
        fewer = batch_sizes.shrink_slots(slots_per_shard, shrink, of_batch.has_panels)
        if status.idle:
            slots = slot_programs.refill_slots(slots, requests, prompts, static=static)
        elif not status.waiting and fewer is not None and status.live <= fewer:
            # Smaller batches have all columns, so that no program is compiled for each pair of sizes.
            if columns < max_columns:
                slots = slot_programs.resize_cache(slots, 0, columns=max_columns, static=static)
            slots_per_shard, columns, sizes = fewer, max_columns, (max_columns,)
            slots = slot_programs.compact_slots(
                slots, requests, prompts, slots_per_shard=slots_per_shard, static=static
            )

        slots, columns, write_column = batch_sizes.make_room(slots, status, columns, sizes, static)

        refill_at = batch_sizes.choose_refill(slots_per_shard)
        slots, requests, packed = slot_programs.decode_segment(
            of_batch.take(slots_per_shard),
            slots,
            requests,
            prompts,
            steps=segment,
            refill_at=refill_at,
            static=static,
        )
        status = Status.read(packed)  # the host waits for the device here

        # Every step writes one column, however many slots are live.
        segment_steps = status.write_column - write_column
        steps += segment_steps
        slot_steps += segment_steps * slots_per_shard * static.shards
    if report is not None:
        report(_measure_load(requests, steps, slot_steps))
    return requests


def _measure_load(requests: Requests, steps: int, slot_steps: int) -> Metrics:
    """Compute the `rollout/*` metrics.

    slot_use is the share of slot steps that decoded a token; imbalance is the number of tokens of the busiest
    shard over the mean of the shards.
    """
    num_tokens = hosts.fetch_arrays(requests.num_tokens)  # i32[Z, Q]
    by_shard = num_tokens.sum(axis=1, dtype=np.float64)  # f64[Z], first tokens included

    # First tokens come from the prefill and take no slot step.
    decoded = by_shard.sum() - (num_tokens > 0).sum()
    return {
        "rollout/steps": float(steps),
        "rollout/slot_use": float(decoded / slot_steps) if slot_steps else 1.0,
        "rollout/imbalance": float(by_shard.max() / by_shard.mean()),
    }


class _GroupNotifier:
    """Passes each prompt's rows to `on_groups` once, when all of them have finished."""

    def __init__(self, on_groups: OnGroups, num_prompts: int, spec: SamplingSpec):
        self.on_groups, self.spec = on_groups, spec
        self.pending = list(range(num_prompts))  # prompts whose rows have not been passed yet

    def notify(self, slots: Slots, requests: Requests) -> None:
        """Call `on_groups` with the prompts that have finished since the last call, if there are any."""
        unfinished = rollout_state.find_unfinished(
            slots.request, slots.started, requests.queue, requests.queue_length
        )
        group = self.spec.group_size
        unfinished = hosts.fetch_arrays(unfinished).reshape(-1, group).any(axis=1)  # bool[B]
        ready = [i for i in self.pending if not unfinished[i]]
        if not ready:
            return

        # Rows are prompt-major.
        self.pending = [i for i in self.pending if unfinished[i]]
        rows = np.asarray(ready)[:, None] * group + np.arange(group)[None, :]
        self.on_groups(ready, _fetch_rows(requests, rows.reshape(-1), self.spec))


def _fetch_rows(requests: Requests, rows: np.ndarray | slice, spec: SamplingSpec) -> Rollout:
    """Fetch some rows to the host."""
    # All rows are fetched and indexed on the host: they are small, and indexing on the device would compile
    # a program for each number of rows.
    arrays = (
        requests.tokens,
        requests.logprobs,
        requests.num_tokens,
        requests.finished,
        requests.thresholds,
    )
    tokens, logprobs, num_tokens, finished, thresholds = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[rows], hosts.fetch_arrays(arrays)
    )
    mask = np.arange(spec.max_new_tokens)[None, :] < num_tokens[:, None]  # bool[N, T]
    return Rollout(tokens=tokens, mask=mask, logprobs=logprobs, finished=finished, thresholds=thresholds)


def _check_shapes(shapes: SharedShapes, prompts: Prompts) -> None:
    """Raise ValueError if the prompts exceed the shapes."""
    longest = max(map(len, prompts))
    if shapes.longest_prompt < longest or shapes.num_prompts < len(prompts):
        raise ValueError(f"{len(prompts)} prompts of at most {longest} tokens exceed {shapes}")


def _check_inputs(
    config: ModelConfig,
    prompts: Prompts,
    positions: Sequence[int],
    limits: np.ndarray,
    spec: SamplingSpec,
) -> None:
    """Raise ValueError for invalid inputs of `generate`."""
    if not prompts or len(prompts) != len(positions):
        raise ValueError(
            f"{len(prompts)} prompts with {len(positions)} positions: give one position per prompt"
        )
    num_rows = len(prompts) * spec.group_size
    if limits.shape != (num_rows,) or limits.min() < 1 or limits.max() > spec.max_new_tokens:
        raise ValueError(
            f"limits of shape {limits.shape} from {limits.min(initial=0)} to {limits.max(initial=0)}: "
            f"give each of {num_rows} rows a limit from 1 to max_new_tokens = {spec.max_new_tokens}"
        )

    # An id outside the vocabulary would be clipped to another token's embedding without an error.
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: there is no token to continue")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {i} has ids from {min(prompt)} to {max(prompt)}, but the model has "
                f"{config.vocab_size} tokens: use the tokenizer of this model"
            )
    for eos in spec.eos_ids:
        if not 0 <= eos < config.vocab_size:
            raise ValueError(f"EOS id {eos} is outside the model's {config.vocab_size} tokens")
