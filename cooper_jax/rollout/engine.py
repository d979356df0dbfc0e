"""Sample G responses to each prompt: prompts in as token ids, a `Rollout` of arrays out.

1. The weights are cast once (`rollout_weights`) and laid out by the layout's rules for rollouts: gathered from the
   axis that shards them for training, where the memory is there.
2. Prompts are prefilled once each, in chunks of like length (plan.py); every (prompt, sample) is a request, and
   its first token is drawn from its prompt's last hidden state.
3. Requests are decoded in slots: `max_rows` of them, as many as `memory_gib` has room for, or one each.  A slot
   whose request has ended takes the next by an index (slots.py): long responses hold up nobody.
4. Decoding runs in jitted segments of at most `spec.segment` tokens whose state is donated.  After each, the host
   reads one small array and refills idle slots, moves the last live ones into half as many, or stops.

Compiled once for each size: prompts are padded to a multiple of 32 tokens and their number to three significant
bits (1 to 8, 10, 12, 14, 16, 20, ...) times the layout's batch shards; so are the columns of the cache, which
plain XLA reads whole and which therefore grow with the oldest response.  Kernels read what they need: theirs have
all columns from the start, and one program decodes them all.  Padding prompts ask for nothing and are cropped.

An EOS is inside the mask when it was sampled, nothing after it is; truncated rows have no EOS.  A row's random bits
depend on the key, its prompt's position in the data order, its sample index and the token's index alone: not on
its slot, nor on when it got it.

B prompts   G samples a prompt   N = B * G rows, prompt-major   P prompt tokens   T response tokens
D batch shards   S slots a shard   W columns of the cache
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cooper_jax.kernels import platform
from cooper_jax.kernels.decode_attention import supports_head_dim
from cooper_jax.model import generation, transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.layers import PROJECTIONS
from cooper_jax.rollout import rollout_plan
from cooper_jax.rollout import slots as programs
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.rollout.slots import RolloutStatic
from cooper_jax.runtime import device_memory, hosts
from cooper_jax.runtime.mesh import Layout, is_spec, make_shardings
from cooper_jax.types import Completion, Metrics, Params, Rollout

# The rows of some prompts, as soon as all of them have ended: (their places among the prompts, their rows).
OnGroups = Callable[[list[int], Rollout], None]


def generate(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    key: jax.Array,
    spec: SamplingSpec,
    *,
    limits: Sequence[int] | None = None,
    max_rows: int | None = None,
    memory_gib: float | None = None,
    weight_placement: str = "auto",
    on_groups: OnGroups | None = None,
    between_segments: Callable[[], None] | None = None,
    report: Callable[[Metrics], None] | None = None,
    implementation: str | None = None,
) -> Rollout:
    """Sample spec.group_size responses to each prompt -> Rollout of N = B * G rows, T = spec.max_new_tokens.

    params: as trained, or already through `rollout_weights` (then nothing is cast again).  On a mesh, prompts,
      positions, key and limits are the same on every host, and so is the Rollout: NumPy arrays.
    positions: each prompt's place in the data order; with `key` (of this step's rollout stream) they decide
      the random bits.
    limits: each row's own most tokens, [N], at most T; None: T for all.
    max_rows: slots, in all: rows that are decoded at once.
    memory_gib: what weights, caches and slots may take of one device; the slots are as many as fit.
    weight_placement: gathered, sharded or auto: see `rollout_plan.should_gather`.
    on_groups: is given each prompt's rows, on the host, while others are still decoded; each prompt once.
    between_segments: is called on the host before the prefill and before each decode segment, on every host equally
      often.  An exception that it raises ends the rollout and reaches the caller.
    report: is given `rollout/*` metrics at the end: how evenly the work lay on slots and shards.
    implementation: of the kernels (kernels/platform.py); None: `kernels_of`.

    Raises ValueError for prompts that are missing, empty or outside the vocabulary and for memory in which no slot
    fits, and FloatingPointError when a live row's logits are not finite.
    """
    rows = len(prompts) * spec.group_size
    limits = np.full(rows, spec.max_new_tokens) if limits is None else np.asarray(limits)
    _check(config, prompts, positions, limits, spec)
    if implementation is None:
        implementation = choose_kernels(config, layout)
    setting = RolloutStatic(config, layout, spec, implementation)
    size = rollout_plan.round_to_bucket(-(-len(prompts) // setting.shards))  # prompts a shard
    gathered = weight_placement != "sharded"
    if weight_placement == "auto":
        budget = (
            memory_gib * rollout_plan.GIB
            if memory_gib
            else device_memory.read_device_memory(layout.mesh.devices.flat[0])
        )
        gathered = rollout_plan.should_gather(config, layout, spec.dtype, budget)
    weights = copy_rollout_weights(params, config, layout, spec.dtype, gathered)
    if between_segments is not None:
        between_segments()
    slots = slots_per_shard(weights, setting, prompts, size, max_rows, memory_gib)
    ready = _prefill(weights, setting, prompts, size)
    places, asked = (
        np.zeros(size * setting.shards, np.int32),
        np.zeros(size * setting.shards * spec.group_size),
    )
    places[: len(prompts)], asked[:rows] = positions, limits
    requests = programs.sample_first_tokens(
        weights, ready, *layout.put((places, asked.astype(np.int32)), "batch"), key, setting=setting
    )
    watch = None if on_groups is None else _Watch(on_groups, len(prompts), spec)
    requests = _decode(weights, ready, requests, slots, setting, watch, between_segments, report)
    return _rows(requests, slice(rows), spec)


def choose_kernels(config: ModelConfig, layout: Layout) -> str:
    """The kernels of the layout's devices where they can read the model's head_dim, otherwise plain XLA."""
    own = platform.default_implementation(layout.platform)
    return own if supports_head_dim(own, config.head_dim) else "xla"


def copy_rollout_weights(
    params: Params, config: ModelConfig, layout: Layout, dtype: str, gathered: bool = True
) -> Params:
    """The copy of the weights that a step's rollout reads: matrices in `dtype`, norms as they are, layers split.

    On a mesh they are `gathered`, once here and not at every token: laid out by `layout.for_rollout()`.  On one
    device, arrays that are right already are passed through without a copy: do not donate them while the result
    lives.
    """
    if isinstance(params["layers"], tuple):
        return params
    if layout.single_device:
        return generation.prepare_generation(_cast(params, config, dtype), config, layout)
    return reshard_weights(params, config=config, layout=layout, dtype=dtype, gathered=gathered)


@functools.partial(jax.jit, static_argnames=("config", "layout", "dtype", "gathered"))
def reshard_weights(
    params: Params, *, config: ModelConfig, layout: Layout, dtype: str, gathered: bool = True
) -> Params:
    """`rollout_weights` on a mesh, as one program: cast first, so that half as much travels."""
    places = layout.for_rollout() if gathered else layout
    specs = transformer.param_specs(config)
    weights = jax.lax.with_sharding_constraint(_cast(params, config, dtype), make_shardings(places, specs))
    weights = generation.prepare_generation(weights, config, layout)
    stacks = tuple(
        jax.lax.with_sharding_constraint(w, flat_shardings(places, specs)) for w in weights["layers"]
    )
    return weights | {"layers": stacks}


def flat_shardings(layout: Layout, specs: Params) -> Params:
    """Where the layers of `reshard` lie: as declared, with a projection's heads as one axis (`PROJECTIONS`)."""

    def place(name, s):
        spec = layout.spec(s.axes, s.shape)
        if name in PROJECTIONS:
            spec = PartitionSpec(*(p for p, axis in zip(spec, s.axes, strict=True) if axis != "head_dim"))
        return NamedSharding(layout.mesh, spec)

    return {name: place(name, s) for name, s in specs["layers"].items()}


def _cast(params: Params, config: ModelConfig, dtype: str) -> Params:
    def cast(spec, x):
        return x if x.dtype == dtype or spec.keep_f32 else x.astype(dtype)

    return jax.tree.map(cast, transformer.param_specs(config), params, is_leaf=is_spec)


def decode_completions(
    rollout: Rollout, decode: Callable[[Sequence[int]], str], eos_ids: Sequence[int]
) -> list[Completion]:
    """Each row as text.  The EOS is dropped where one was sampled; a truncated row keeps its last token.

    `Completion.tokens` counts sampled tokens, the EOS included.  Raises ValueError when a finished row ends with
    no id of eos_ids: the rollout was sampled with others.
    """
    tokens, mask, finished = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.finished))
    out = []
    for n, (row, real, done) in enumerate(zip(tokens, mask, finished, strict=True)):
        ids = row[real].tolist()
        if done and ids[-1] not in eos_ids:
            raise ValueError(f"row {n} finished with token {ids[-1]}, which is none of the EOS ids {eos_ids}")
        text = decode(ids[:-1] if done else ids)
        out.append(Completion(text=text, truncated=not done, tokens=len(ids)))
    return out


# --- the host's side of a rollout ------------------------------------------------------------------------


def slots_per_shard(weights, setting: RolloutStatic, prompts, size: int, max_rows, memory_gib) -> int:
    """Slots of each shard: its requests, or what `max_rows` and `memory_gib` leave it."""
    spec, shards = setting.spec, setting.shards
    slots = size * spec.group_size
    if max_rows is not None:
        if max_rows < shards:
            raise ValueError(
                f"max_rows {max_rows} is less than one row on each of {shards} batch shards: raise it"
            )
        slots = min(slots, max_rows // shards)
    if memory_gib is not None:
        needs = rollout_plan.plan_memory(
            weights, setting.config, setting.layout, setting.form,
            prompts=size, width=_width(setting, prompts), group=spec.group_size,
            new_tokens=spec.max_new_tokens, columns=cache_columns(setting, waiting=True),
            own_prompts=not setting.pallas,
        )  # fmt: skip
        slots = min(slots, needs.slots(int(memory_gib * rollout_plan.GIB)))
    return slots


def cache_columns(setting: RolloutStatic, waiting: bool) -> int:
    """The cache's columns at most; the last token is never fed.

    Where requests wait, slots of all ages share one write column, which wanders to the right until the cache is
    moved back: a quarter more columns make that rare.
    """
    columns = max(setting.spec.max_new_tokens - 1, 1)
    columns += max(setting.spec.segment, columns // 4) if waiting else 0
    multiple = rollout_plan.column_multiple(setting.form)
    return -(-columns // multiple) * multiple


def _width(setting: RolloutStatic, prompts) -> int:
    return rollout_plan.prompt_width(max(map(len, prompts)), rollout_plan.column_multiple(setting.form))


def _prefill(weights, setting: RolloutStatic, prompts, size: int) -> programs.Prompts:
    width = _width(setting, prompts)
    ready = programs.make_prompt_cache(weights, size=size, width=width, setting=setting)
    for chunk in rollout_plan.make_chunks(prompts, setting.shards, size, width):
        arrays = setting.layout.put((chunk.tokens, chunk.lengths, chunk.source), "batch")
        ready = programs.prefill_chunk(weights, ready, *arrays, setting=setting)
    return ready


def _decode(
    weights, ready, requests, size: int, setting: RolloutStatic, watch, between_segments, report
) -> programs.Requests:
    """Every request to its end, in `size` slots a shard."""
    segment = setting.spec.segment
    grows = not setting.pallas
    most = cache_columns(setting, waiting=size < requests.count.shape[1])
    columns = min(segment, most) if grows else most
    slots, seen = programs.open_slots(weights, requests, ready, size=size, columns=columns, setting=setting)
    steps = room = 0
    while True:
        now = dict(zip(programs.STATUS, np.asarray(seen).tolist(), strict=True))
        if now["failed"]:
            raise FloatingPointError(
                "the policy's logits are not finite: there is nothing to sample from; the weights hold NaN or "
                "overflow in " + setting.spec.dtype
            )
        over = not now["live"] and not now["waiting"]
        if watch is not None:
            watch.look(slots, requests)
        if over:
            break
        if between_segments is not None:
            between_segments()
        if now["idle"]:
            slots = programs.refill_slots(slots, requests, ready, setting=setting)
        elif not now["waiting"] and now["live"] <= size // 2 and size // 2 >= rollout_plan.FEWEST_SLOTS:
            size //= 2
            slots = programs.compact_slots(slots, requests, ready, size=size, setting=setting)
        past = now["column"] - now["oldest"]  # columns that nobody reads any more
        if now["column"] + segment > columns and (past or columns < most):
            if grows:
                needed = now["oldest"] + segment
                needed += needed // 4 if past else 0
                columns = min(rollout_plan.round_to_bucket(-(-needed // segment)) * segment, most)
            slots = programs.resize_cache(slots, past, columns=columns, setting=setting)
            now["column"] -= past
        slots, requests, seen = programs.decode_segment(
            weights, slots, requests, ready, steps=segment, refill_at=max(1, size // 8), setting=setting
        )
        done = int(np.asarray(seen)[programs.STATUS.index("column")]) - now["column"]
        steps, room = steps + done, room + done * size * setting.shards
    if report is not None:
        report(_metrics(requests, steps, room))
    return requests


def _metrics(requests: programs.Requests, steps: int, room: int) -> Metrics:
    """How evenly the work lay: over slots, and over the mesh's batch shards."""
    count = hosts.fetch_arrays(requests.count)
    drawn = count.sum(axis=1, dtype=np.float64)  # [D], first tokens included
    decoded = drawn.sum() - (count > 0).sum()
    return {
        "rollout/steps": float(steps),
        "rollout/slot_use": float(decoded / room) if room else 1.0,
        "rollout/imbalance": float(drawn.max() / drawn.mean()),
    }


class _Watch:
    """Hands each prompt's rows to the caller once, when all of them have ended."""

    def __init__(self, on_groups: OnGroups, prompts: int, spec: SamplingSpec):
        self.on_groups, self.spec = on_groups, spec
        self.left = list(range(prompts))

    def look(self, slots, requests) -> None:
        group = self.spec.group_size
        going = programs.unfinished_requests(slots.request, slots.taken, requests.queue, requests.queued)
        going = hosts.fetch_arrays(going).reshape(-1, group).any(axis=1)  # bool[B]
        ready = [i for i in self.left if not going[i]]
        if not ready:
            return
        self.left = [i for i in self.left if going[i]]
        rows = np.asarray(ready)[:, None] * group + np.arange(group)[None, :]
        self.on_groups(ready, _rows(requests, rows.reshape(-1), self.spec))


def _rows(requests: programs.Requests, rows: np.ndarray | slice, spec: SamplingSpec) -> Rollout:
    """Some rows, on the host.  All are fetched: they are small, and a program a choice of rows would not be."""
    r = requests
    tokens, logprobs, count, finished = (
        x.reshape(-1, *x.shape[2:])[rows]
        for x in hosts.fetch_arrays((r.tokens, r.logprobs, r.count, r.finished))
    )
    mask = np.arange(spec.max_new_tokens)[None, :] < count[:, None]
    return Rollout(tokens=tokens, mask=mask, logprobs=logprobs, finished=finished)


def _check(config: ModelConfig, prompts, positions, limits, spec: SamplingSpec) -> None:
    if not prompts or len(prompts) != len(positions):
        raise ValueError(
            f"{len(prompts)} prompts with {len(positions)} positions: give one position a prompt"
        )
    rows = len(prompts) * spec.group_size
    if limits.shape != (rows,) or limits.min() < 1 or limits.max() > spec.max_new_tokens:
        raise ValueError(
            f"limits of shape {limits.shape} from {limits.min(initial=0)} to {limits.max(initial=0)}: give each of "
            f"{rows} rows one from 1 to max_new_tokens = {spec.max_new_tokens}"
        )
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: there is no token to continue")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {i} holds the ids {min(prompt)} to {max(prompt)}, but the model has {config.vocab_size} "
                "tokens: its tokenizer is another model's"
            )
    for eos in spec.eos_ids:
        if not 0 <= eos < config.vocab_size:
            raise ValueError(f"EOS id {eos} is outside the model's {config.vocab_size} tokens")
