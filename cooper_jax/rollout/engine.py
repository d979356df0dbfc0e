"""Sample G responses to each prompt: prompts in as token ids, a `Rollout` of arrays out.

1. The weights are cast once (`rollout_weights`), and gathered from the axis that shards them for training.
2. Prompts are padded right and prefilled once each; every (prompt, sample) is a request, and its first token is
   drawn from its prompt's last hidden state.
3. Requests are decoded in slots, `max_rows` of them or as many as there are requests.  A slot whose request has
   ended takes the next by an index (see slots.py): long responses hold up nobody.
4. Decoding runs in jitted segments of at most `spec.segment` tokens whose state is donated.  One reads as many
   columns of the cache as its oldest slot has tokens, in few sizes.  After each, the host reads one small array
   and refills idle slots, moves the last live ones into half as many, or stops.

Compiled once for each (prompts, prompt length, slots, key length) bucket: prompts are padded to a multiple of 32
tokens, their number to three significant bits (1 to 8, 10, 12, 14, 16, 20, ...) times the layout's batch
shards.  Padding prompts ask for nothing and are cropped from the result.

An EOS is inside the mask when it was sampled, nothing after it is; truncated rows have no EOS.  A row's random bits
depend on the key, its prompt's position in the data order, its sample index and the token's index alone: not on
its slot, nor on when it got it.

B prompts   G samples a prompt   N = B * G rows, prompt-major   P prompt tokens   T response tokens
D batch shards   S slots a shard   W columns of the cache
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout import slots as programs
from cooper_jax.rollout.sampling import SamplingSpec
from cooper_jax.runtime.mesh import Layout, shardings
from cooper_jax.types import Completion, Params, Rollout

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of so many tokens
FEWEST_SLOTS = 8  # a shard's slots are not halved below this many


def generate(
    params: Params,
    config: ModelConfig,
    layout: Layout | None,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    key: jax.Array,
    spec: SamplingSpec,
    *,
    limits: Sequence[int] | None = None,
    max_rows: int | None = None,
) -> Rollout:
    """Sample spec.group_size responses to each prompt -> Rollout of N = B * G rows, T = spec.max_new_tokens.

    params: as trained, or already through `rollout_weights` (then nothing is cast again).
    positions: each prompt's place in the data order; with `key` (of this step's rollout stream) they decide
      the random bits.
    limits: each row's own most tokens, [N], at most T; None: T for all.
    max_rows: slots, in all: rows that are decoded at once.

    Raises ValueError for prompts that are missing, empty or outside the vocabulary, and FloatingPointError when
    a live row's logits are not finite.
    """
    rows = len(prompts) * spec.group_size
    limits = np.full(rows, spec.max_new_tokens) if limits is None else np.asarray(limits)
    _check(config, prompts, positions, limits, spec)
    shards = 1 if layout is None else layout.batch_shards
    size = _bucket(-(-len(prompts) // shards)) * shards
    slots = _slots_a_shard(size * spec.group_size // shards, shards, max_rows)
    inputs = _arrays(prompts, positions, limits, spec.group_size, size)
    inputs = jax.tree.map(jnp.asarray, inputs) if layout is None else layout.put(inputs, "batch")
    weights = rollout_weights(params, config, layout, spec.dtype)
    requests = _decode(weights, config, layout, inputs, key, spec, slots)

    def row(x):
        return x.reshape(-1, *x.shape[2:])[:rows]

    count = row(requests.count)
    return Rollout(
        tokens=row(requests.tokens),
        mask=jnp.arange(spec.max_new_tokens)[None, :] < count[:, None],
        logprobs=row(requests.logprobs),
        finished=row(requests.finished),
    )


def rollout_weights(params: Params, config: ModelConfig, layout: Layout | None, dtype: str) -> Params:
    """The copy of the weights that a step's rollout reads: matrices in `dtype`, norms as they are.

    On a mesh, the axis that cuts weights for training ("embed") is gathered, once here and not at every token.
    Arrays that are right already are passed through without a copy: do not donate them while the result lives.
    """

    def cast(path, x):
        return x if x.dtype == dtype or path[-1].key.endswith("norm") else x.astype(dtype)

    weights = jax.tree.map_with_path(cast, params)
    if layout is None:
        return weights
    rules = tuple(r for r in layout.rules if r[0] != "embed") + (("embed", None),)
    specs = transformer.param_specs(config)
    return jax.device_put(weights, shardings(dataclasses.replace(layout, rules=rules), specs))


def completions(
    rollout: Rollout, decode: Callable[[Sequence[int]], str], eos_ids: Sequence[int]
) -> list[Completion]:
    """Each row as text.  The EOS is dropped where one was sampled; a truncated row keeps its last token.

    `Completion.tokens` counts sampled tokens, the EOS included.  Raises ValueError when a finished row ends with
    no id of eos_ids: the rollout was sampled with others.
    """
    tokens, mask, finished = jax.device_get((rollout.tokens, rollout.mask, rollout.finished))
    out = []
    for n, (row, real, done) in enumerate(zip(tokens, mask, finished, strict=True)):
        ids = row[real].tolist()
        if done and ids[-1] not in eos_ids:
            raise ValueError(f"row {n} finished with token {ids[-1]}, which is none of the EOS ids {eos_ids}")
        text = decode(ids[:-1] if done else ids)
        out.append(Completion(text=text, truncated=not done, tokens=len(ids)))
    return out


def _arrays(prompts, positions, limits, group: int, size: int) -> tuple[np.ndarray, ...]:
    """Tokens i32[size, P], lengths and places i32[size], limits i32[size * G]; nothing is asked of padding."""
    width = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
    places, asked = np.zeros(size, np.int32), np.zeros(size * group, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)
    places[: len(positions)] = positions
    asked[: len(limits)] = limits
    return tokens, lengths, places, asked


def _decode(weights, config, layout, inputs, key, spec: SamplingSpec, size: int) -> programs.Requests:
    """Every request to its end, in `size` slots a shard."""
    tokens, lengths, places, limits = inputs
    static = dict(config=config, layout=layout, spec=spec)
    requests, prompt = programs.start(weights, tokens, lengths, places, limits, key, **static)
    columns = max(spec.max_new_tokens - 1, 1)  # the last token is never fed
    if size < requests.count.shape[1]:
        # Slots of all ages share one write column, which wanders to the right until the cache is shifted back.
        columns += max(spec.segment, columns // 4)
    slots, seen = programs.open_slots(requests, prompt, lengths, size=size, columns=columns, **static)
    while True:
        now = dict(zip(programs.STATUS, np.asarray(seen).tolist(), strict=True))
        if now["failed"]:
            raise FloatingPointError(
                "the policy's logits are not finite: there is nothing to sample from; the weights hold NaN or "
                "overflow in " + spec.dtype
            )
        if not now["live"] and not now["waiting"]:
            return requests
        taking = (slots, requests, prompt, lengths)
        if now["idle"]:
            slots = programs.refill(*taking, layout=layout, spec=spec)
        elif not now["waiting"] and now["live"] <= size // 2 and size // 2 >= FEWEST_SLOTS:
            size //= 2
            slots = programs.compact(*taking, size=size, layout=layout, spec=spec)
        if now["column"] + spec.segment > columns and now["column"] > now["oldest"]:
            slots = programs.shift(slots, now["column"] - now["oldest"], layout=layout)
        slots, requests, seen = programs.segment(
            weights, slots, requests,
            steps=spec.segment,
            key_len=min(_bucket(-(-(now["oldest"] + spec.segment) // spec.segment)) * spec.segment, columns),
            refill_at=max(1, size // 8),
            **static,
        )  # fmt: skip


# --- sizes -----------------------------------------------------------------------------------------------


def _slots_a_shard(requests: int, shards: int, max_rows: int | None) -> int:
    """Slots of each shard: its requests, or what `max_rows` leaves it."""
    if max_rows is None:
        return requests
    if max_rows < shards:
        raise ValueError(
            f"max_rows {max_rows} is less than one row on each of {shards} batch shards: raise it"
        )
    return min(requests, max_rows // shards)


def _bucket(n: int) -> int:
    """n rounded up to three significant bits: at most a quarter more, four sizes an octave."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


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
