"""A tiny policy, four prompts and their rollout, and what the log-probabilities of any rollout have to be."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models
from tiny_models import one_device

from cooper_jax.model import generation, transformer
from cooper_jax.rollout import engine
from cooper_jax.rollout.engine import SamplingSpec, generate
from cooper_jax.runtime.mesh import init_params
from cooper_jax.types import Rollout

TINY = tiny_models.config(vocab_size=60, width=16, head_dim=4, ffn=24, tied=False, vocab_multiple=8)
SPEC = SamplingSpec(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=9,
    group_size=3,
    eos_ids=(7, 9, 31),
    segment=4,
    dtype="float32",
)
PROMPTS = [[3, 5, 8, 13], [21], [2, 9, 2, 33, 17, 8, 50, 1, 11], [4, 44, 14, 41, 50, 6]]
POSITIONS = [40, 41, 42, 43]
KEY = jax.random.key(3)
MOST = tuple(i for i in range(60) if i % 3)  # EOS ids that end most rows within a few tokens
spec_of = functools.partial(dataclasses.replace, SPEC)


@functools.cache
def params_of(config=TINY):
    """Weights whose distributions are neither flat nor certain."""
    params = init_params(jax.random.key(0), transformer.param_specs(config), one_device())
    return params | {"lm_head": 1.6 * params["lm_head"]}


def rollout(spec=SPEC, prompts=PROMPTS, positions=POSITIONS, config=TINY, key=KEY, **options) -> Rollout:
    """`generate` on one device, on the host."""
    return jax.device_get(
        generate(params_of(config), config, one_device(), prompts, positions, key, spec, **options)
    )


sampled = functools.cache(rollout)


def record_requests(monkeypatch) -> list[types.SimpleNamespace]:
    """The arguments of every call of `engine.generate` from now on, by name.

    Nothing is compiled or sampled: every response is truncated and made of tokens that count up.
    """
    requests, signature = [], inspect.signature(engine.generate)

    def record(*args, **options) -> Rollout:
        request = types.SimpleNamespace(**signature.bind(*args, **options).arguments)
        requests.append(request)
        shape = len(request.prompts) * request.spec.group_size, request.spec.max_new_tokens
        responses = Rollout(
            tokens=np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % 40 + 5,
            mask=np.ones(shape, bool),
            logprobs=np.zeros(shape, np.float32),
            finished=np.zeros(shape[0], bool),
        )
        if getattr(request, "on_groups", None) is not None:
            request.on_groups(list(range(len(request.prompts))), responses)
        return responses

    monkeypatch.setattr(engine, "generate", record)
    return requests


def same_key(a: jax.Array, b: jax.Array) -> bool:
    return bool((jax.random.key_data(a) == jax.random.key_data(b)).all())


def rows_of(rollout, rows):
    return jax.tree.map(lambda x: np.asarray(x)[rows], rollout)


def assert_same(a: Rollout, b: Rollout):
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def assert_cut(r: Rollout, whole: Rollout, limits):
    """`r` is `whole`, whose rows were not limited, up to each row's own limit."""
    lengths = whole.mask.sum(axis=1)
    mask = np.arange(whole.mask.shape[1])[None, :] < np.minimum(limits, lengths)[:, None]
    want = Rollout(
        tokens=np.where(mask, whole.tokens, 0),
        mask=mask,
        logprobs=np.where(mask, whole.logprobs, 0),
        finished=whole.finished & (lengths <= limits),
    )
    assert_same(r, want)


def forced(r: Rollout, spec=SPEC, prompts=PROMPTS, config=TINY) -> np.ndarray:
    """f64[N, T]: the log-probabilities of a rollout's tokens, 0 after its end.

    Through `trunk`, which shares neither cache, nor attention, nor positions' code path with decoding.
    """
    group, (rows, most) = spec.group_size, r.tokens.shape
    width = max(map(len, prompts)) + most
    tokens, valid = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for n in range(rows):
        row = prompts[n // group] + r.tokens[n][r.mask[n]].tolist()
        tokens[n, : len(row)], valid[n, : len(row)] = row, True
    logits = np.asarray(_logits(params_of(config), config, tokens, valid), np.float64)
    out = np.zeros((rows, most))
    for n, t in zip(*np.nonzero(r.mask), strict=True):
        z = logits[n, len(prompts[n // group]) + t - 1]
        if spec.temperature == 0:
            assert r.tokens[n, t] == z.argmax()
            continue
        z = z / spec.temperature
        p = np.exp(z - z.max())
        if spec.top_k:
            p[z < np.sort(z)[-spec.top_k]] = 0
        p /= p.sum()
        order = np.argsort(-z)
        p[order[np.cumsum(p[order]) - p[order] >= spec.top_p]] = 0
        with np.errstate(divide="ignore"):
            out[n, t] = np.log(p[r.tokens[n, t]] / p.sum())
    return out


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, config, tokens, valid):
    hidden = transformer.hidden_states(params, config, tokens, valid, dtype=jnp.float32, layout=one_device())
    return transformer.compute_logits(params, config, hidden)


def count_traces(monkeypatch):
    """The model's functions, listed each time that they are traced: a compilation each."""
    traces = []
    for name in ("prefill_prompts", "decode_step"):
        plain = getattr(generation, name)
        traced = lambda *a, plain=plain, name=name, **k: traces.append(name) or plain(*a, **k)  # noqa: E731
        monkeypatch.setattr(generation, name, traced)
    return traces
