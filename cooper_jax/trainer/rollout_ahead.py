"""Rollouts one step ahead (rollout.ahead=1): step k+1 is sampled while step k is graded and trained on.

The rollouts have devices of their own (mesh.rollout).  theta_k are the policy's weights after step k:

    rollout mesh    sample k with theta_{k-2}   sample k+1 with theta_{k-1}   ...
    policy's mesh                               grade, update: theta_k        ...

1. `take_batch` waits for the responses of step k, copies the policy's weights theta_{k-1} to the rollout's devices
   and starts to sample step k+1 with them in a thread.  Step k continues meanwhile.
2. So a step trains on responses of weights that are one update old; step 1 has none older than theta_0.  The
   importance weights of sampler_mismatch.py correct the loss: the sampler's log-probabilities come with the
   responses.
3. `State.rollout_params` are the weights with which the next step is sampled, and checkpoints store them.  A
   resumed run samples that step again, with the same draws.

Weights are never older, since one batch at a time is sampled and none waits in a queue.  The thread launches
programs on the rollout's devices alone, and no other thread does while it runs, so all hosts launch the programs of
each device in one order.  Orbax launches one on all devices when it saves: the rollout is paused then
(rollout_thread.py).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from cooper_jax.model import transformer
from cooper_jax.runtime import mesh
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.runtime.optim import select_trained
from cooper_jax.trainer.dynamic_sampling import (
    SampledBatch,
    make_rollout_key,
    replace_flat_groups,
    sample_batch,
)
from cooper_jax.trainer.rollout_thread import PendingRollout
from cooper_jax.trainer.state import Components, State
from cooper_jax.types import Metrics, Params

_PART_BYTES = 2**27  # of an array that passes through the hosts' memory, at a time


def take_batch(components: Components, state: State, phases: PhaseTimer) -> tuple[SampledBatch, State]:
    """Take the responses of the next step, and start to sample those of the step after it.

    Returns the batch, in which flat groups are replaced with data.refill_prompts, and the state with the
    weights of the batch that is being sampled.  The last step of a run starts none.

    Metrics, beside those of the rollout:

        time/rollout_ahead    seconds that the sampling of the batch took
        time/rollout_overlap  the share of them in which the step before was graded and trained on
    """
    thread, settings, step = components.rollout_thread, components.settings, state.step + 1
    assert thread is not None and state.rollout_params is not None, "the run has rollout.ahead=0"

    # After the start of a run, and of a resumed one, no batch is being sampled yet.
    pending = state.pending_rollout
    if pending is None:
        pending = _start_rollout(components, state.rollout_params, step, state.position)
    wait_start = time.perf_counter()
    with phases.phase("rollout"):
        sampled = thread.take(pending)
    waited = min(time.perf_counter() - wait_start, pending.seconds)
    metrics: Metrics = {
        "time/rollout_ahead": pending.seconds,
        "time/rollout_overlap": 1 - waited / pending.seconds,
    }
    if settings.data.refill_prompts:
        sampled = replace_flat_groups(components, state, sampled, phases)

    # Copied before the step's update, which donates the policy's arrays.
    with phases.phase("copy_weights"):
        trained = copy_to_rollout(components, select_trained(state.policy.params))
        params = state.rollout_params | trained
    pending = None
    if step < settings.steps:
        pending = _start_rollout(components, params, step + 1, sampled.problems.next_position)
    state = dataclasses.replace(state, rollout_params=params, pending_rollout=pending)
    return dataclasses.replace(sampled, metrics=sampled.metrics | metrics), state


def _start_rollout(
    components: Components, params: Params, step: int, first: int
) -> PendingRollout[SampledBatch]:
    """Start to sample the batch of a step in the thread, and return without waiting.

    Args:
      params: the policy's, on the rollout's devices.
      first: position of the batch's first problem.
    """
    assert components.rollout_thread is not None

    # Made here, since it is a program of the policy's devices.
    key = make_rollout_key(components, step)

    # Responses are scored when the batch is taken, since the reward model changes until then.
    def sample(between_segments: Callable[[], None]) -> SampledBatch:
        return sample_batch(
            components,
            params,
            PhaseTimer(),
            key=key,
            step=step,
            first=first,
            between_segments=between_segments,
        )

    return components.rollout_thread.start(sample)


def copy_to_rollout(components: Components, params: Params) -> Params:
    """Copy parameters of the policy to the rollout's devices, sharded by the same rules, and wait for the copy.

    params: all entries of the top level or some of them; the policy's devices have them.  Collective.
    """
    specs = transformer.param_specs(components.policy.model.config)
    shardings = mesh.make_shardings(components.policy.rollout_layout, {name: specs[name] for name in params})
    if jax.process_count() == 1:
        return jax.block_until_ready(jax.device_put(params, shardings))

    # Devices of several hosts exchange arrays within one mesh only, so each array passes through the hosts.
    return jax.tree.map(_copy_through_host, params, shardings)


def _copy_through_host(x: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """Copy an array to the devices of another mesh.  Collective."""
    # A part is gathered on every device of its mesh before the host reads it, so parts are small.
    rows = max(1, _PART_BYTES * x.shape[0] // x.nbytes)
    assert isinstance(x.sharding, jax.sharding.NamedSharding)
    take = _make_take(x.sharding.mesh)
    value = np.empty(x.shape, x.dtype)
    for start in range(0, x.shape[0], rows):
        count = min(rows, x.shape[0] - start)
        value[start : start + count] = take(x, start, count)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


@functools.cache
def _make_take(source: jax.sharding.Mesh) -> Callable[[jax.Array, int, int], jax.Array]:
    """Make the function (x, start, count) -> x[start : start + count], in full on every device of x's mesh."""
    replicated = jax.sharding.NamedSharding(source, jax.sharding.PartitionSpec())
    return jax.jit(
        lambda x, start, count: jax.lax.dynamic_slice_in_dim(x, start, count),
        static_argnums=2,
        out_shardings=replicated,
    )
