"""Sample G responses to each prompt: prompts in as token ids, a `Rollout` of arrays out.

1. The weights are cast once (`rollout_weights`), and gathered from the axis that shards them for training.
2. `_start`: prompts are padded right and prefilled once each; a prompt's samples share its keys and values.  The
   first token is drawn from the prompt's last hidden state.
3. `_segment`, again and again: a jitted loop over at most `spec.segment` tokens whose state is donated, so the
   cache is updated in place.  Its key length is static and grows from segment to segment: keys not
   yet written are not read.  The loop ends as soon as every row has.
4. After each segment the host reads one number, the rows still going, and stops at 0.

Compiled once for each (prompts, prompt length) bucket and segment: prompts are padded to a multiple of 32
tokens, their number to three significant bits (1 to 8, 10, 12, 14, 16, 20, ...) times the layout's batch
shards.  Padding prompts have ended from the start and are cropped from the result.

An EOS is inside the mask when it was sampled, nothing after it is; truncated rows have no EOS.  A row's random bits
depend on the key, its prompt's position in the data order, its sample index and the token's index alone.

B prompts   G samples a prompt   N = B * G rows, prompt-major   P prompt tokens   T response tokens
D width   L layers   K key/value heads   h head_dim   V padded vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.model.transformer import KV
from cooper_jax.rollout import sampling
from cooper_jax.rollout.sampling import SamplingSpec
from cooper_jax.runtime.mesh import Layout, shardings
from cooper_jax.types import Completion, Params, Rollout

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of so many tokens


def generate(
    params: Params,
    config: ModelConfig,
    layout: Layout | None,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    key: jax.Array,
    spec: SamplingSpec,
    *,
    max_rows: int | None = None,
) -> Rollout:
    """Sample spec.group_size responses to each prompt -> Rollout of N = B * G rows, T = spec.max_new_tokens.

    params: as trained, or already through `rollout_weights` (then nothing is cast again).
    positions: each prompt's place in the data order; with `key` (of this step's rollout stream) they decide
      the random bits.
    max_rows: rows that fit at once, in all; prompts then run in chunks of equal size, with the same random bits.

    Raises ValueError for prompts that are missing, empty or outside the vocabulary, and FloatingPointError when
    a live row's logits are not finite.
    """
    _check(config, prompts, positions, spec)
    shards = 1 if layout is None else layout.batch_shards
    size = _prompts_at_once(len(prompts), spec.group_size, shards, max_rows)
    width = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    weights = rollout_weights(params, config, layout, spec.dtype)
    parts = [
        _generate_chunk(
            weights, config, layout, prompts[i : i + size], positions[i : i + size], key, spec, size, width
        )
        for i in range(0, len(prompts), size)
    ]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


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


# --- one chunk -------------------------------------------------------------------------------------------


@struct.dataclass
class _State:
    """Everything that changes from token to token."""

    step: jax.Array  # i32[]: tokens drawn so far
    token: jax.Array  # i32[N]: the last one drawn, not yet fed; 0 in rows that have ended
    ended: jax.Array  # bool[N]
    failed: jax.Array  # bool[]: a live row had no distribution
    keys: jax.Array  # key[N]
    tokens: jax.Array  # i32[N, T]
    mask: jax.Array  # bool[N, T]
    logprobs: jax.Array  # f32[N, T]
    suffix: KV  # [L, N, K, T - 1, h]: the last token is never fed

    @property
    def going(self) -> jax.Array:  # bool[]
        return ~(jnp.all(self.ended) | self.failed)


def _generate_chunk(weights, config, layout, prompts, positions, key, spec, size, width) -> Rollout:
    """At most `size` prompts, padded to `size` and to `width` tokens."""
    tokens = np.zeros((size, width), np.int32)
    lengths = np.ones(size, np.int32)
    places = np.zeros(size, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)
    places[: len(positions)] = positions
    real = np.arange(size) < len(prompts)
    inputs = (tokens, lengths, places, real)
    inputs = jax.tree.map(jnp.asarray, inputs) if layout is None else layout.put(inputs, "batch")

    static = dict(config=config, layout=layout, spec=spec)
    state, prompt_kv, live = _start(weights, *inputs, key, **static)
    end = 1
    while (rows := int(live)) > 0 and end < spec.max_new_tokens:
        end = min(end + spec.segment, spec.max_new_tokens)
        state, live = _segment(weights, prompt_kv, inputs[1], state, end=end, **static)
    if rows < 0:
        raise FloatingPointError(
            f"the policy's logits are not finite at response token {int(state.step) - 1}: there is nothing to "
            "sample from; the weights hold NaN or overflow in " + spec.dtype
        )
    rollout = Rollout(
        tokens=state.tokens,
        mask=state.mask,
        logprobs=state.logprobs,
        finished=state.ended,
    )
    rows = len(prompts) * spec.group_size
    return rollout if len(prompts) == size else jax.tree.map(lambda x: x[:rows], rollout)


@functools.partial(jax.jit, static_argnames=("config", "layout", "spec"))
def _start(weights, tokens, lengths, places, real, key, *, config, layout, spec):
    """Prefill and draw the first token -> (state, prompts' KV, rows still going: see `_live`)."""
    dtype = jnp.dtype(spec.dtype)
    rows, T = tokens.shape[0] * spec.group_size, spec.max_new_tokens
    hidden, prompt_kv = transformer.prefill(weights, config, tokens, lengths, dtype=dtype, layout=layout)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros((rows,), jnp.int32),
        ended=jnp.repeat(~real, spec.group_size),
        failed=jnp.zeros((), bool),
        keys=sampling.row_keys(key, places, spec.group_size),
        tokens=jnp.zeros((rows, T), jnp.int32),
        mask=jnp.zeros((rows, T), bool),
        logprobs=jnp.zeros((rows, T), jnp.float32),
        suffix=transformer.empty_suffix(config, rows, max(T - 1, 1), dtype),
    )
    logits = jnp.repeat(transformer.logits(weights, config, hidden), spec.group_size, axis=0)
    state = _emit(state, logits, layout, spec)
    return _placed(state, layout), _placed(prompt_kv, layout), _live(state)


@functools.partial(jax.jit, static_argnames=("end", "config", "layout", "spec"), donate_argnames="state")
def _segment(weights, prompt_kv, lengths, state, *, end, config, layout, spec):
    """Decode up to `end` tokens in all, or until every row has ended -> (state, rows still going)."""
    dtype = jnp.dtype(spec.dtype)

    def token(state: _State) -> _State:
        hidden, suffix = transformer.decode_step(
            weights,
            config,
            state.token,
            state.step - 1,
            prompt_kv,
            lengths,
            state.suffix,
            end - 1,
            dtype=dtype,
            layout=layout,
        )
        logits = transformer.logits(weights, config, hidden)
        return _emit(state.replace(suffix=suffix), logits, layout, spec)

    state = jax.lax.while_loop(lambda s: (s.step < end) & s.going, token, state)
    return _placed(state, layout), _live(state)


def _emit(state: _State, logits: jax.Array, layout: Layout | None, spec: SamplingSpec) -> _State:
    """Draw the next token of every live row from logits f32[N, V], and record it."""
    if layout is not None:
        logits = layout.constrain(logits, "batch", None)  # a draw needs a row's whole vocabulary
    token, logprob = sampling.sample(logits, state.keys, state.step, spec)
    live = ~state.ended
    token = jnp.where(live, token, 0)
    is_eos = jnp.any(token[:, None] == jnp.asarray(spec.eos_ids, jnp.int32)[None, :], axis=-1)

    def record(column, values):
        return jax.lax.dynamic_update_index_in_dim(column, values, state.step, axis=1)

    return state.replace(
        step=state.step + 1,
        token=token,
        ended=state.ended | is_eos,
        failed=state.failed | jnp.any(live & jnp.isnan(logprob)),
        tokens=record(state.tokens, token),
        mask=record(state.mask, live),
        logprobs=record(state.logprobs, jnp.where(live, logprob, 0.0)),
    )


def _live(state: _State) -> jax.Array:
    """i32[]: rows that have not ended; -1 when one has failed."""
    return jnp.where(state.failed, -1, jnp.sum(~state.ended, dtype=jnp.int32))


def _placed(tree, layout: Layout | None):
    """Pin rows to their batch shards, so that every segment finds its input where the last one left it."""
    if layout is None:
        return tree

    def place(x):
        if isinstance(x, KV):
            axes = ("layers", "batch", "kv_heads", None, "head_dim")
            return jax.tree.map(lambda a: layout.constrain(a, *axes), x)
        return layout.constrain(x, *("batch", None)[: x.ndim])

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, KV))


# --- sizes -----------------------------------------------------------------------------------------------


def _prompts_at_once(prompts: int, group_size: int, shards: int, max_rows: int | None) -> int:
    """Prompts in a chunk: a multiple of `shards`, in few distinct sizes, at most max_rows // group_size."""
    if max_rows is None:
        return _bucket(-(-prompts // shards)) * shards
    most = max_rows // group_size // shards
    if most == 0:
        raise ValueError(
            f"max_rows {max_rows} is less than one group of {group_size} samples on each of {shards} batch "
            f"shards: raise it to {group_size * shards} or more"
        )
    each = -(-prompts // shards)  # prompts a shard
    chunks = -(-each // most)
    return min(most, _bucket(-(-each // chunks))) * shards


def _bucket(n: int) -> int:
    """n rounded up to three significant bits: at most a quarter more, four sizes an octave."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def _check(config: ModelConfig, prompts, positions, spec: SamplingSpec) -> None:
    if not prompts or len(prompts) != len(positions):
        raise ValueError(
            f"{len(prompts)} prompts with {len(positions)} positions: give one position a prompt"
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
