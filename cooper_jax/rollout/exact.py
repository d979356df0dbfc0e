"""Exact sampling: responses whose tokens and log-probabilities are those of the learner's own forward pass.

A rollout decodes with other programs than the learner: one token at a time, with a cache, often in another type.
Its logits differ from the learner's in the last bits, or more.  Here the rollout is a draft, as in speculative
decoding, and the learner corrects it:

1. The learner computes its logits for all tokens of the draft in one forward pass, and samples a token from each
   position with the random bits that the rollout used there (`make_resample`).
2. Up to the first token that differs, the response is what the learner would have sampled.  That token is
   replaced by the learner's, and the rollout decodes the rest again (`correct_draft`).
3. This repeats until no token differs.

Where rollout and learner agree to the last digits hardly a token differs, and the price is one or two forward
passes.  Each further round fixes at least one more token of each response that is still wrong.

N rows, prompt-major   P prompt tokens   T response tokens   S = P + T   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.data import packing
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout import sampling_spec
from cooper_jax.rollout.engine import Continuation
from cooper_jax.rollout.head_sampling import sample_from_hidden
from cooper_jax.rollout.sampling_spec import SamplingSpec
from cooper_jax.runtime import hosts, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.types import Metrics, Params, Rollout

# (params, tokens i32[N, S], valid bool[N, S], positions i32[N], samples i32[N], key)
#   -> tokens i32[N, T], their log-probabilities f32[N, T]
Resample = Callable[
    [Params, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]
]

# (prompts, positions, limits, continuation) -> a rollout of one response to each prompt
Continue = Callable[[list[list[int]], list[int], list[int], Continuation], Rollout]


def make_resample(
    config: ModelConfig,
    layout: Layout,
    *,
    microbatch: int,
    dtype: str,
    spec: SamplingSpec,
    implementation: str,
) -> Resample:
    """Make the jitted function that samples a token from the learner's logits before each response token.

    A token's random bits are those of the rollout: a function of the key, its prompt's position in the data order,
    its row's index among the samples of the prompt, and its index in the response.

    Args:
      microbatch, dtype: those of the learner's forward pass.
      spec, implementation: those of the rollout.
    """
    columns = spec.max_new_tokens

    def resample(
        params: Params,
        tokens: jax.Array,
        valid: jax.Array,
        positions: jax.Array,
        samples: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        def sample_rows(rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total = rows["tokens"].shape[1]
            # Padding ids may be outside the vocabulary; token 0 is a safe index into the embedding.
            hidden = transformer.hidden_states(
                params,
                config,
                jnp.where(rows["valid"], rows["tokens"], 0),
                rows["valid"],
                dtype=jnp.dtype(dtype),
                layout=layout,
            )
            hidden = hidden[:, total - columns - 1 : total - 1]  # [m, T, D]
            row_keys = jax.random.wrap_key_data(rows["keys"], impl="threefry2x32")

            # One column at a time: the logits of all would be [m, T, V].
            def sample_column(column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                index, states = column  # i32[], [m, D]
                sampled = sample_from_hidden(
                    params, config, states, row_keys, index, spec, layout, implementation
                )
                return sampled.token, sampled.logprob

            indices = jnp.arange(columns, dtype=jnp.int32)
            sampled, logprobs = jax.lax.map(sample_column, (indices, hidden.swapaxes(0, 1)))
            return sampled.T, logprobs.T

        keys = sampling_spec.make_row_keys(key, positions, 1, samples)
        rows = {"tokens": tokens, "valid": valid, "keys": jax.random.key_data(keys)}
        return optim.map_rows(sample_rows, rows, microbatch, layout)

    return jax.jit(resample)


def correct_draft(
    draft: Rollout,
    params: Params,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    key: jax.Array,
    spec: SamplingSpec,
    *,
    bucket: int,
    longest_prompt: int,
    resample: Resample,
    continue_rollout: Continue,
) -> tuple[Rollout, Metrics]:
    """Correct a rollout until each token is the one that the learner samples, with its log-probability there.

    Args:
      draft: the rollout of the prompts, with the same key and spec.
      params: the learner's.
      prompts, positions: [B].
      bucket, longest_prompt: those of the learner's batches (packing.pack_policy_batch), so that both have one
        width.
      resample: from `make_resample`.
      continue_rollout: the rollout's decoding of the rest of responses, with the same key.

    Metrics: exact/rounds, the number of forward passes; exact/corrected_rows, the share of responses in which a
    token was replaced, and exact/corrected_tokens, the number of replaced tokens.

    Raises FloatingPointError if tokens still differ after a round for each token of a response: the learner's
    programs are not deterministic on these devices.  Raises hosts.Stopped after a SIGTERM.
    """
    group = spec.group_size
    tokens, mask, finished = (np.array(x) for x in (draft.tokens, draft.mask, draft.finished))
    row_positions = np.repeat(np.asarray(positions, np.int32), group)
    samples = np.tile(np.arange(group, dtype=np.int32), len(prompts))
    corrected = np.zeros(len(tokens), np.int64)
    rounds = 0
    while True:
        hosts.raise_if_stopping()
        rounds += 1
        if rounds > spec.max_new_tokens + 1:
            raise FloatingPointError(
                f"exact=True: after {rounds - 1} rounds the learner still samples other tokens in rows "
                f"{np.flatnonzero(corrected == corrected.max())[:4].tolist()}: its programs are not deterministic "
                "on these devices; set exact=False"
            )
        # A rollout's arrays are NumPy's on the host, although its fields are declared as jax's.
        logprobs = np.zeros(tokens.shape, np.float32)
        arrays: dict[str, Any] = dict(tokens=tokens, mask=mask, finished=finished, logprobs=logprobs)
        rollout = Rollout(**arrays)
        packed = packing.pack_policy_batch(
            prompts,
            rollout,
            bucket=bucket,
            rows_multiple=layout.batch_shards,
            longest_prompt=longest_prompt,
        )
        batch_rows = packed.tokens.shape[0]
        given, valid, places, indices = layout.put(
            (
                packed.tokens,
                packed.valid,
                packing.pad_rows(row_positions, batch_rows),
                packing.pad_rows(samples, batch_rows),
            ),
            "batch",
        )
        # i32[N, T] and f32[N, T]
        found, found_logprobs = (
            x[: len(tokens)] for x in hosts.fetch_arrays(resample(params, given, valid, places, indices, key))
        )
        differs = mask & (found != tokens)
        rows = np.flatnonzero(differs.any(axis=1))
        if not len(rows):
            break
        corrected[rows] += 1

        # Each wrong row keeps its tokens before the first difference, and gets the learner's token there.
        first = differs[rows].argmax(axis=1)
        tokens[rows, first] = found[rows, first]
        behind = np.arange(tokens.shape[1])[None, :] > first[:, None]
        mask[rows] &= ~behind
        tokens[rows] = np.where(behind, 0, tokens[rows])
        finished[rows] = np.isin(found[rows, first], spec.eos_ids)

        open_rows = rows[~finished[rows] & (mask[rows].sum(axis=1) < spec.max_new_tokens)]
        if not len(open_rows):
            continue
        starts = mask[open_rows].sum(axis=1)
        more = continue_rollout(
            *_pad_requests(
                [
                    [*prompts[n // group], *tokens[n, :start].tolist()]
                    for n, start in zip(open_rows, starts, strict=True)
                ],
                row_positions[open_rows].tolist(),
                (spec.max_new_tokens - starts).tolist(),
                Continuation(samples[open_rows].tolist(), starts.tolist()),
                longest=max(map(len, prompts)) + spec.max_new_tokens - 1,
            )
        )
        for i, (n, start) in enumerate(zip(open_rows, starts, strict=True)):
            rest = np.asarray(more.tokens)[i][np.asarray(more.mask)[i]]
            tokens[n, start : start + len(rest)] = rest
            mask[n, start : start + len(rest)] = True
            finished[n] = np.asarray(more.finished)[i]
    metrics = {
        "exact/rounds": float(rounds),
        "exact/corrected_rows": float((corrected > 0).mean()),
        "exact/corrected_tokens": float(corrected.sum()),
    }
    arrays["logprobs"] = np.where(mask, found_logprobs, 0)
    return Rollout(**arrays), metrics


def _pad_requests(
    prompts: list[list[int]],
    positions: list[int],
    limits: list[int],
    continued: Continuation,
    *,
    longest: int,
) -> tuple[list[list[int]], list[int], list[int], Continuation]:
    """Add requests of one token whose results are not read, so that continuations have few shapes.

    Each round continues other rows from other columns.  With the added rows their number is a power of two, and the
    longest prompt has `longest` tokens, so that few programs are compiled.
    """
    count = len(prompts)
    added = (1 << count.bit_length()) - count
    filler = (prompts[0] * (-(-longest // len(prompts[0]))))[:longest]
    return (
        prompts + [filler] * added,
        positions + [positions[0]] * added,
        limits + [1] * added,
        Continuation([*continued.samples, *[0] * added], [*continued.starts, *[0] * added]),
    )
