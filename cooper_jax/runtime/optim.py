"""Optimisers, guarded updates, and batches that are worked through in microbatches.

1. `make` turns an `OptimiserConfig` into AdamW: clipped by the global gradient norm, warmed up linearly.
2. `init` wraps f32 parameters into a `TrainState`; `state_shardings` says where every part of it lives.
3. `accumulate` sums loss and gradients over microbatches of one shape, `make_accumulator` over microbatches of any
   shapes, a call each; `map_rows` runs a forward pass over them.
4. `apply` moves the state, unless loss or gradients are not finite: then nothing moves, and it is counted.

Losses here are sums whose weights were normalised over the whole batch beforehand, so that a batch cut into
microbatches has the gradient of the batch itself.

Departures from the released code: master weights and both moments are float32 (there: bfloat16, in which an
update of 1e-5 relative size rounds to nothing), and the warm-up's first update has the rate lr / warmup_steps
instead of 0.  As in the authors' RL code, weight decay reaches every parameter, norms and biases included; their
VerifyRM training leaves norms and biases out.

    N  rows of a batch   m  rows of a microbatch   M  microbatches
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cooper_jax.runtime.mesh import Layout, is_spec, make_shardings
from cooper_jax.settings import typed_config
from cooper_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """A gradient transformation and the learning rate that it takes at its n-th update, counted from 0."""

    tx: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]


DECAYS = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """Settings of AdamW with a linear warm-up: an `optimiser(...)` section of the config."""

    lr: float
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float  # of the global gradient norm
    name: str = dataclasses.field(default="optimiser", compare=False)  # the section's, for messages

    def __post_init__(self) -> None:
        fields = ("lr", "warmup_steps", "b1", "b2", "weight_decay")
        problems = typed_config.find_small(self, self.name, 0, fields)
        for field, value in (("b1", self.b1), ("b2", self.b2)):
            if not value < 1:
                problems.append(f"{self.name}.{field}={value}: it must be below 1")
        for field, value in (("eps", self.eps), ("clip_norm", self.clip_norm)):
            if not value > 0:
                problems.append(f"{self.name}.{field}={value}: it must be positive (1e9 never clips)")
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict, name: str) -> OptimiserConfig:
        """Read a section; name: its dotted name, such as "policy.optimiser".  Raises SetupError."""
        return typed_config.read_section(cls, section, name, name=name)


def make_optimiser(cfg: OptimiserConfig, decay: str = "constant", updates: int = 0) -> Optimiser:
    """AdamW of these settings.

    The rate of update n (from 0) is lr * min(1, (n + 1) / warmup_steps) * d(n).  decay "constant": d = 1; else with
    t = clip((n - warmup_steps) / (updates - warmup_steps), 0, 1), which reaches 1 behind the last of `updates`,
    "linear": d = 1 - t, "cosine": d = (1 + cos(pi t)) / 2.  Weight decay is decoupled (Loshchilov and Hutter 2019,
    "Decoupled weight decay regularization", algorithm 2) and scaled by the rate.  Raises ValueError for another
    decay.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay is {decay!r}; it is one of {', '.join(DECAYS)}")
    peak, warmup = float(cfg.lr), max(1, int(cfg.warmup_steps))

    def schedule(count):
        rate = peak * jnp.minimum(1.0, (count + 1).astype(jnp.float32) / warmup)
        if decay == "constant":
            return rate
        first = int(cfg.warmup_steps)
        t = jnp.clip((count - first).astype(jnp.float32) / max(1, updates - first), 0.0, 1.0)
        return rate * (1.0 - t if decay == "linear" else (1.0 + jnp.cos(jnp.pi * t)) / 2)

    tx = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay),
    )
    return Optimiser(tx, schedule)


def init_state(params: Params, opt: Optimiser) -> TrainState:
    """A state at update 0, its moments placed like the parameters that they belong to.

    The parameters are copied: updates donate their state, and the caller may go on using `params` (the frozen
    reference is the policy at step 0).  Raises ValueError for a parameter that is not float32.
    """
    for path, x in jax.tree.leaves_with_path(params):
        if x.dtype != jnp.float32:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} is {x.dtype}: master weights are float32 (set the "
                "compute type by the config's dtype instead)"
            )

    def start(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(jax.tree.map(jnp.copy, params), opt.tx.init(params), zero, zero)

    places = [x.sharding for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    if not places or not all(isinstance(s, NamedSharding) for s in places):
        return jax.jit(start)(params)
    replicated = NamedSharding(places[0].mesh, PartitionSpec())
    return jax.jit(
        start, out_shardings=_place(opt, params, jax.tree.map(lambda x: x.sharding, params), replicated)
    )(params)


def state_shardings(opt: Optimiser, specs: Any, layout: Layout) -> TrainState:
    """Where each part of a state lives, for jit's `out_shardings`.

    specs: the parameters' tree of ParamSpec.  Returns a TrainState of NamedSharding: moments lie where their
    parameter does, counters everywhere.
    """
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs, is_leaf=is_spec)
    return _place(opt, params, make_shardings(layout, specs), layout.replicated)


def _place(opt: Optimiser, params: Params, places: Any, replicated: NamedSharding) -> TrainState:
    opt_state = optax.tree_utils.tree_map_params(
        opt.tx,
        lambda _, place: place,
        jax.eval_shape(opt.tx.init, params),
        places,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(places, opt_state, replicated, replicated)


def apply_update(
    state: TrainState,
    grads: Params,
    loss: jax.Array,
    opt: Optimiser,
    enabled: jax.Array | bool = True,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, or none.

    A loss or a global gradient norm that is not finite leaves parameters and optimiser state as they are, bit
    for bit, step count included, and adds one to `skipped`.  enabled False (bool[]: the batch held nothing to
    learn from) leaves them alike without counting: zero gradients would still decay the weights and move them
    by the moments.

    Metrics, f32[]: grad_norm before clipping, lr of this update (0 where none took place), skipped 0 or 1.
    """
    enabled = jnp.asarray(enabled)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    go = enabled & finite
    updates, opt_state = opt.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(go, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    skipped = (enabled & ~finite).astype(jnp.int32)
    metrics = {
        "grad_norm": jnp.where(enabled, norm, 0.0),
        "lr": jnp.where(go, opt.schedule(state.updates), 0.0),
        "skipped": skipped.astype(jnp.float32),
    }
    return TrainState(params, opt_state, state.updates + go, state.skipped + skipped), metrics


def split_rows(batch: Any, microbatch: int, layout: Layout) -> Any:
    """Leaves [N, ...] -> [M, m, ...], rows appended at the end being all zeros.

    m is at most `microbatch`, rounded up to a multiple of the layout's batch shards, and no larger than M
    even parts need.  Row i goes to microbatch i mod M, so that on a mesh, where each shard holds neighbouring
    rows, every microbatch takes its share from each shard and nothing travels.
    """
    if microbatch < 1:
        raise ValueError(f"microbatch is {microbatch} rows; it must be at least 1")
    shards = layout.batch_shards
    n = jax.tree.leaves(batch)[0].shape[0]
    most = -(-microbatch // shards) * shards
    m = -(-n // -(-n // most))
    m = -(-m // shards) * shards
    count = -(-n // m)

    def split(x):
        assert x.shape[0] == n, f"{x.shape[0]} rows beside {n}"
        x = jnp.pad(x, [(0, m * count - n)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(m, count, *x.shape[1:]).swapaxes(0, 1)
        return layout.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, batch)


def accumulate_gradients(
    loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]],
    params: Params,
    batch: Any,
    microbatch: int,
    layout: Layout,
    places: Any,
) -> tuple[jax.Array, Params, Any]:
    """Loss and gradients of a batch, one microbatch at a time.

    loss_fn(params, rows) -> (loss f32[], aux): a weighted sum over its rows, in which a row of zeros
    (padding: no token valid, no weight) counts for nothing.  batch: leaves [N, ...].  places: the parameters'
    tree of shardings, for the running sum of the gradients.

    Returns (loss f32[] summed, gradients summed, aux with a leading axis [M] for the caller to reduce).
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    rows = split_rows(batch, microbatch, layout)
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        (loss, aux), grads = grad_fn(params, jax.tree.map(lambda x: x[0], rows))
        return loss, grads, jax.tree.map(lambda x: x[None], aux)

    def pin(grads):
        return jax.lax.with_sharding_constraint(grads, places)

    def step(carry, piece):
        total, sums = carry
        (loss, aux), grads = grad_fn(params, piece)
        return (total + loss, pin(jax.tree.map(jnp.add, sums, grads))), aux

    start = (jnp.zeros((), jnp.float32), pin(jax.tree.map(jnp.zeros_like, params)))
    (loss, grads), aux = jax.lax.scan(step, start, rows)
    return loss, grads, aux


@struct.dataclass
class Sums:
    """What the microbatches of a batch have added up to."""

    loss: jax.Array  # f32[]
    grads: Params
    aux: dict[str, jax.Array]  # f32[] each


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """An update in pieces, each jitted; microbatches may differ in shape, and each shape is compiled once.

        sums = start(state.params)
        for rows in microbatches:
            sums = add(state.params, sums, rows)  # the sums given are donated
        state, metrics = finish(state, sums)  # the state given is donated

    metrics: loss, the aux, and `apply`'s.
    """

    start: Callable[[Params], Sums]
    add: Callable[[Params, Sums, Any], Sums]
    finish: Callable[[TrainState, Sums], tuple[TrainState, dict[str, jax.Array]]]


def make_accumulator(
    loss_fn: Callable[[Params, Any], tuple[jax.Array, dict[str, jax.Array]]],
    aux: Sequence[str],
    opt: Optimiser,
    specs: Any,
    layout: Layout,
) -> Accumulator:
    """loss_fn: as `accumulate`'s, its aux being sums f32[] under the names `aux`.  specs: the parameters' tree of
    ParamSpec."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def start(params):
        zero = jnp.zeros((), jnp.float32)
        return Sums(zero, jax.tree.map(jnp.zeros_like, params), dict.fromkeys(aux, zero))

    def add(params, sums, rows):
        (loss, extra), grads = grad_fn(params, rows)
        return jax.tree.map(jnp.add, sums, Sums(loss, grads, extra))

    def finish(state, sums):
        state, moved = apply_update(state, sums.grads, sums.loss, opt)
        return state, {"loss": sums.loss} | sums.aux | moved

    places = Sums(layout.replicated, make_shardings(layout, specs), dict.fromkeys(aux, layout.replicated))
    states = state_shardings(opt, specs, layout)
    return Accumulator(
        jax.jit(start, out_shardings=places),
        jax.jit(add, donate_argnums=1, out_shardings=places),
        jax.jit(finish, donate_argnums=0, out_shardings=(states, layout.replicated)),
    )


def map_rows(fn: Callable[[Any], Any], batch: Any, microbatch: int, layout: Layout) -> Any:
    """fn over the microbatches of a batch, one after the other: leaves [N, ...] -> results [N, ...].

    Which rows share a microbatch depends on N, `microbatch` and the layout alone.
    """
    n = jax.tree.leaves(batch)[0].shape[0]
    out = jax.lax.map(fn, split_rows(batch, microbatch, layout))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:n], out)
