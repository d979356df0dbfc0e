"""Optimisers, updates that skip non-finite gradients, and gradient accumulation over microbatches.

1. `make_optimiser` turns an `OptimiserConfig` into AdamW with clipping by the global gradient norm, linear
   warm-up and a decay of the learning rate.
2. `init_state` makes a `TrainState` from f32 parameters; `state_shardings` gives the sharding of every part
   of it.
3. `accumulate_gradients` sums loss and gradients over microbatches of one shape in one program;
   `make_accumulator` does so over microbatches of different shapes, with one call for each; `map_rows` runs a
   forward pass over microbatches.
4. `apply_update` updates the state.  If the loss or the gradients are not finite, it only counts a skipped
   update.

Losses are sums whose weights are normalised over the whole batch beforehand, so that the gradients of the
microbatches add up to the gradient of the batch.

Departures from the released code: master weights and both moments are float32 (there they are bfloat16, in
which an update of relative size 1e-5 is rounded away; here the first moment may be bfloat16), and the first
update of the warm-up has the rate lr / warmup_steps instead of 0.  As in the authors' RL code, weight decay
applies to every parameter, norms and biases included; their VerifyRM training excludes norms and biases.

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
from cooper_jax.settings import bounds, typed_config
from cooper_jax.types import Params, TrainState

ADAPTERS = "lora"  # the entry of low-rank adapters in a model's parameters (model/lora.py)


def select_trained(tree: dict[str, Any]) -> dict[str, Any]:
    """The entries of a model's parameters that are trained: all or, with adapters, these and a score head.

    The others have no gradient and no moments, and updates do not change them.

    tree: parameters, or a tree with their top level, such as their shardings.
    """
    if ADAPTERS not in tree:
        return tree
    return {name: tree[name] for name in (ADAPTERS, "score") if name in tree}


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """A gradient transformation with its schedule: update number (from 0) -> learning rate."""

    tx: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]


DECAYS = ("constant", "linear", "cosine")
# Of the first moment.  The second one, with b2 = .999, grows by up to a thousandth per update, which bfloat16 would
# round away: it would stay where it is.
MOMENT_TYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """Settings of AdamW with a linear warm-up: an `optimiser(...)` section of the config."""

    # Learning rate after the warm-up, and the length of the warm-up in updates.
    lr: float
    warmup_steps: int
    decay: str  # of the learning rate after the warm-up, to 0 at the last update: one of DECAYS

    # AdamW.
    b1: float
    b2: float
    eps: float
    weight_decay: float  # decoupled, scaled by the learning rate

    clip_norm: float  # maximum of the global gradient norm
    first_moment: str = "float32"  # the type in which it is stored: one of MOMENT_TYPES
    name: str = dataclasses.field(default="optimiser", compare=False)  # of the section, for messages

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, self.name)
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict, name: str) -> OptimiserConfig:
        """Read a section of the config with this dotted name ("policy.optimiser").  Raises SetupError."""
        return typed_config.read_section(cls, section, name, name=name)


def make_optimiser(cfg: OptimiserConfig, updates: int = 0) -> Optimiser:
    """Make AdamW with these settings.

    updates: their number in the whole run, at which a decaying learning rate has reached 0.  A schedule of a
      "constant" rate does not read it.

    The learning rate of update n (from 0) is lr * min(1, (n + 1) / warmup_steps) * d(n).  With
    t = clip((n - warmup_steps) / (updates - warmup_steps), 0, 1), which is 1 after the last of `updates`,

        decay "constant": d = 1    "linear": d = 1 - t    "cosine": d = (1 + cos(pi t)) / 2

    Weight decay is decoupled (Loshchilov and Hutter 2019, "Decoupled weight decay regularization",
    algorithm 2) and scaled by the rate.
    """

    # The first update already has the rate peak / warmup: an update with the rate 0 would waste a batch.
    peak, warmup, decay = float(cfg.lr), max(1, int(cfg.warmup_steps)), cfg.decay

    def schedule(count):  # i32[] -> f32[]
        rate = peak * jnp.minimum(1.0, (count + 1).astype(jnp.float32) / warmup)
        if decay == "constant":
            return rate

        # The decay starts after the warm-up; its share t grows from 0 to 1.
        first = int(cfg.warmup_steps)
        t = jnp.clip((count - first).astype(jnp.float32) / max(1, updates - first), 0.0, 1.0)
        if decay == "linear":
            return rate * (1.0 - t)
        return rate * ((1.0 + jnp.cos(jnp.pi * t)) / 2)

    # Clip before AdamW, so that the moments see clipped gradients.
    tx = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            schedule,
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            mu_dtype=cfg.first_moment,
            weight_decay=cfg.weight_decay,
        ),
    )
    return Optimiser(tx, schedule)


def init_state(params: Params, opt: Optimiser) -> TrainState:
    """Make the state at update 0, with moments sharded like their parameters.

    The parameters are copied, because updates donate their state and the caller may still need `params` (the
    frozen reference is the policy at step 0).  Raises ValueError for a trained parameter that is not float32.
    """
    # Adam's updates are too small for bfloat16, which has 8 bits of precision.
    for path, x in jax.tree.leaves_with_path(select_trained(params)):
        if x.dtype != jnp.float32:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} is {x.dtype}: master weights are float32 (set the "
                "compute type by the config's dtype instead)"
            )

    def start(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(jax.tree.map(jnp.copy, params), opt.tx.init(select_trained(params)), zero, zero)

    # Parameters without a mesh (host arrays, or one default device) need no shardings.
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    shardings = [x.sharding for x in arrays if isinstance(x.sharding, NamedSharding)]
    if not shardings or len(shardings) < len(arrays):
        return jax.jit(start)(params)

    # Without output shardings, the compiler might replicate the moments.
    replicated = NamedSharding(shardings[0].mesh, PartitionSpec())
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(start, out_shardings=_shard_state(opt, params, param_shardings, replicated))(params)


def state_shardings(opt: Optimiser, specs: Any, layout: Layout) -> TrainState:
    """Make the TrainState of NamedSharding for jit's `out_shardings`.

    Moments are sharded like their parameters, counters are replicated.  specs: the parameters' tree of
    ParamSpec.
    """
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)
    return _shard_state(opt, params, make_shardings(layout, specs), layout.replicated)


def _shard_state(opt: Optimiser, params: Params, param_shardings: Any, replicated: Any) -> TrainState:
    """Make a TrainState whose leaves are shardings (typed Any here: the fields are declared as arrays)."""
    # Only the optimiser knows which of its leaves are moments, with a parameter's shape, and which are
    # counters.
    opt_state = optax.tree_utils.tree_map_params(
        opt.tx,
        lambda _, sharding: sharding,
        jax.eval_shape(opt.tx.init, select_trained(params)),
        select_trained(param_shardings),
        transform_non_params=lambda _: replicated,
    )
    return TrainState(param_shardings, opt_state, replicated, replicated)


def apply_update(
    state: TrainState,
    grads: Params,
    loss: jax.Array,
    opt: Optimiser,
    enabled: jax.Array | bool = True,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply one update, or skip it.

    If the loss or the global gradient norm is not finite, parameters and optimiser state (with its step
    count) stay bit-identical, and `skipped` grows by one.

    Args:
      enabled: bool[]; False if no row of the batch has a gradient.  The state then stays the same, and the
        update does not count as skipped.  With zero gradients instead, weight decay and the moments would
        still change the weights.

    Returns the state and metrics, f32[] each: grad_norm before clipping, lr of this update (0 if there was
    none), skipped (0 or 1).
    """
    # The norm is not finite if any gradient is not, so one number shows it.
    enabled = jnp.asarray(enabled)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    accept = enabled & finite

    # Compute the update, then select the new state or the old one: skips are rare,
    # so a branch would save nothing.
    trained = select_trained(state.params)
    updates, opt_state = opt.tx.update(grads, state.opt_state, trained)
    updated = optax.apply_updates(trained, updates)
    updated, opt_state = jax.tree.map(
        lambda new, old: jnp.where(accept, new, old), (updated, opt_state), (trained, state.opt_state)
    )
    params = state.params | updated

    skipped = (enabled & ~finite).astype(jnp.int32)
    metrics = {
        "grad_norm": jnp.where(enabled, norm, 0.0),
        "lr": jnp.where(accept, opt.schedule(state.updates), 0.0),
        "skipped": skipped.astype(jnp.float32),
    }
    return TrainState(params, opt_state, state.updates + accept, state.skipped + skipped), metrics


def split_rows(batch: Any, microbatch: int, layout: Layout) -> Any:
    """Split a batch into microbatches: leaves [N, ...] -> [M, m, ...], padded with rows of zeros at the end.

    m is at most `microbatch` rounded up to a multiple of the layout's batch shards, and as small as M equal
    microbatches allow.  Row i goes to microbatch i mod M: on a mesh, where a shard has neighbouring rows,
    every microbatch takes its rows from all shards, and no row is transferred.  Raises ValueError for
    microbatch < 1.
    """
    if microbatch < 1:
        raise ValueError(f"microbatch is {microbatch} rows; it must be at least 1")
    shards = layout.batch_shards
    n = jax.tree.leaves(batch)[0].shape[0]

    # As few microbatches as `microbatch` allows, then as small as that number of them allows.
    max_rows = -(-microbatch // shards) * shards
    m = -(-n // -(-n // max_rows))
    m = -(-m // shards) * shards
    count = -(-n // m)

    def split(x):
        assert x.shape[0] == n, f"a leaf has {x.shape[0]} rows, another {n}"
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
    shardings: Any,
) -> tuple[jax.Array, Params, Any]:
    """Compute the loss and gradients of a batch, one microbatch at a time.

    Args:
      loss_fn: (params, rows) -> (loss f32[], aux); the loss is a weighted sum over the rows, to which a row
        of zeros (padding: no valid token, no weight) adds nothing.
      batch: leaves [N, ...].
      shardings: the parameters' tree of shardings, for the running sum of the gradients.

    Returns (summed loss f32[], summed gradients of the trained parameters (`select_trained`), aux with a
    leading axis [M] for the caller to reduce).
    """
    grad_fn = _differentiate_trained(loss_fn)
    shardings = select_trained(shardings)
    rows = split_rows(batch, microbatch, layout)
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        # One microbatch needs no running sum, which would be a second copy of the gradients.
        (loss, aux), grads = grad_fn(params, jax.tree.map(lambda x: x[0], rows))
        return loss, grads, jax.tree.map(lambda x: x[None], aux)

    # Without the constraint, the compiler may replicate the running sum in the loop: 4 bytes per parameter.
    def constrain(grads):
        return jax.lax.with_sharding_constraint(grads, shardings)

    def step(carry, microbatch_rows):
        total, sums = carry
        (loss, aux), grads = grad_fn(params, microbatch_rows)
        return (total + loss, constrain(jax.tree.map(jnp.add, sums, grads))), aux

    zeros = jax.tree.map(jnp.zeros_like, select_trained(params))
    start = (jnp.zeros((), jnp.float32), constrain(zeros))
    (loss, grads), aux = jax.lax.scan(step, start, rows)
    return loss, grads, aux


def accumulate_first(
    loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]],
    params: Params,
    microbatches: Any,
    count: jax.Array | None,
    shardings: Any,
) -> tuple[jax.Array, Params, Any]:
    """`accumulate_gradients` over the first `count` of M microbatches: the others are not computed.

    microbatches: leaves [M, ...].  count: i32[]; None: M.  The aux of microbatches that are left out is 0.  If M is
    1, the microbatch is computed whatever the count is.
    """
    grad_fn = _differentiate_trained(loss_fn)
    shardings = select_trained(shardings)
    total = jax.tree.leaves(microbatches)[0].shape[0]

    def take(i):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), microbatches)

    if total == 1:
        # As in `accumulate_gradients`: no running sum.
        (loss, aux), grads = grad_fn(params, take(0))
        return loss, grads, jax.tree.map(lambda x: x[None], aux)

    def constrain(grads):
        return jax.lax.with_sharding_constraint(grads, shardings)

    def body(i, carry):
        loss_sum, sums, collected = carry
        (loss, aux), grads = grad_fn(params, take(i))
        collected = jax.tree.map(lambda x, all_of_it: all_of_it.at[i].set(x), aux, collected)
        return loss_sum + loss, constrain(jax.tree.map(jnp.add, sums, grads)), collected

    aux_shapes = jax.eval_shape(lambda: grad_fn(params, take(0))[0][1])
    start = (
        jnp.zeros((), jnp.float32),
        constrain(jax.tree.map(jnp.zeros_like, select_trained(params))),
        jax.tree.map(lambda x: jnp.zeros((total, *x.shape), x.dtype), aux_shapes),
    )
    return jax.lax.fori_loop(0, total if count is None else count, body, start)


def _differentiate_trained(
    loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]],
) -> Callable[[Params, Any], tuple[tuple[jax.Array, Any], Params]]:
    """A function (params, rows) -> ((loss, aux), gradients of the trained parameters)."""

    def compute(params: Params, rows: Any) -> tuple[tuple[jax.Array, Any], Params]:
        def loss_of_trained(trained: Params) -> tuple[jax.Array, Any]:
            return loss_fn(params | trained, rows)

        return jax.value_and_grad(loss_of_trained, has_aux=True)(select_trained(params))

    return compute


@struct.dataclass
class Sums:
    """Sums over those microbatches of a batch that were added so far."""

    loss: jax.Array  # f32[]
    grads: Params
    aux: dict[str, jax.Array]  # f32[] each


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Jitted functions for an update whose microbatches may differ in shape; each shape is compiled once.

        sums = start(state.params)
        for rows in microbatches:
            sums = add(state.params, sums, rows)  # donates sums
        state, metrics = finish(state, sums)  # donates state

    metrics: loss, the sums in aux, and the metrics of `apply_update`.
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
    """Make an accumulator.

    Args:
      loss_fn: as in `accumulate_gradients`, but its aux is a dict of sums, f32[] each.
      aux: the names in that dict.
      specs: the parameters' tree of ParamSpec.
    """
    grad_fn = _differentiate_trained(loss_fn)

    def start(params):
        zero = jnp.zeros((), jnp.float32)
        return Sums(zero, jax.tree.map(jnp.zeros_like, select_trained(params)), dict.fromkeys(aux, zero))

    def add(params, sums, rows):
        (loss, extra), grads = grad_fn(params, rows)
        return jax.tree.map(jnp.add, sums, Sums(loss, grads, extra))

    def finish(state, sums):
        state, metrics = apply_update(state, sums.grads, sums.loss, opt)
        return state, {"loss": sums.loss} | sums.aux | metrics

    # Fixed output shardings, so that the sums can be donated from call to call.
    replicated: Any = layout.replicated  # a leaf of Sums, which is typed as an array
    trained = make_shardings(layout, select_trained(specs))
    sums = Sums(replicated, trained, dict.fromkeys(aux, replicated))
    states = state_shardings(opt, specs, layout)
    return Accumulator(
        jax.jit(start, out_shardings=sums),
        jax.jit(add, donate_argnums=1, out_shardings=sums, compiler_options=layout.compiler_options),
        jax.jit(finish, donate_argnums=0, out_shardings=(states, layout.replicated)),
    )


def map_rows(fn: Callable[[Any], Any], batch: Any, microbatch: int, layout: Layout) -> Any:
    """Map fn over the microbatches of a batch in sequence: leaves [N, ...] -> results [N, ...].

    The assignment of rows to microbatches depends only on N, `microbatch` and the layout.
    """
    # Undo `split_rows`: microbatch j has the rows j, j + M, ...; padding is at the end.
    n = jax.tree.leaves(batch)[0].shape[0]
    out = jax.lax.map(fn, split_rows(batch, microbatch, layout))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:n], out)
