"""Advantages: each response's reward relative to the other responses of its group, or of the step.

K  rewards   B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# What is subtracted from a reward, and the standard deviation by which the result is divided.
BASELINES = ("group_mean", "leave_one_out", "batch_mean")
STDS = ("group", "batch", "none")


def normalise_rewards(
    rewards: jax.Array,  # f32[N]
    group_size: int,
    *,
    baseline: str,
    std: str,
    eps: float,
    floor: float,
) -> tuple[jax.Array, jax.Array]:
    """Advantages of a step's responses, and the share of groups whose rewards are all equal.

        A_i = (r_i - b_i) / (max(d, floor) + eps)

        baseline   group_mean      b_i = mean of the group         GRPO: DeepSeekMath (arXiv 2402.03300), 4.1.2
                   leave_one_out   b_i = mean of the group's other rewards           RLOO (arXiv 2402.14740)
                   batch_mean      b = mean of the step's rewards            REINFORCE++ (arXiv 2501.03262)
        std        group           d = standard deviation of the group's rewards                        GRPO
                   batch           d = that of r_i - b_i over the step                           REINFORCE++
                   none            A_i = r_i - b_i                             Dr. GRPO (arXiv 2503.20783), RLOO

    Standard deviations are those of samples (divided by n - 1), as in the released code.  `floor` is a
    departure: without it sigmoid rewards of .998 and .999 would get advantages as large as rewards of 0 and 1.

    A reward that is not finite is left out of all statistics, and its row gets advantage 0.  A group has zero
    variance if its finite rewards are all equal or fewer than two (any group if G = 1).  With a baseline of the
    group its advantages are exactly 0, because rounding in the mean is not a signal; with `batch_mean` all
    advantages are if the whole step has zero variance.

    Returns (advantages f32[N], the share of zero-variance groups f32[]).  Raises ValueError if N is not a
    multiple of the group size, for another baseline or std, and for `batch_mean` with std `group`: a group of equal
    rewards has no deviation to be divided by.
    """
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"{rewards.shape[0]} rewards do not split into groups of {group_size}: rows are prompt-major, "
            "rollout.group_size to a prompt"
        )
    for name, value, allowed in (("baseline", baseline, BASELINES), ("std", std, STDS)):
        if value not in allowed:
            raise ValueError(f"policy.{name} is {value!r}; it is one of {', '.join(allowed)}")

    if baseline == "batch_mean" and std == "group":
        raise ValueError("policy.baseline is 'batch_mean' and policy.std 'group': use std batch or none")

    # f32 even if rewards are bf16, since differences can be small.
    grouped = rewards.astype(jnp.float32).reshape(-1, group_size)  # [B, G]
    finite = jnp.isfinite(grouped)
    in_group = _compute_statistics(grouped, finite, axis=1)  # [B, 1] each
    in_batch = _compute_statistics(grouped, finite, axis=None)  # [1, 1] each

    centred = grouped - (in_batch if baseline == "batch_mean" else in_group).mean
    if baseline == "leave_one_out":
        # r_i - (n mean - r_i) / (n - 1) = (r_i - mean) n / (n - 1)
        centred = centred * in_group.count / jnp.maximum(in_group.count - 1.0, 1.0)
    centred = jnp.where(finite, centred, 0.0)

    scale = jnp.ones_like(in_group.mean)
    if std == "group":
        scale = jnp.maximum(in_group.std, floor) + eps
    elif std == "batch":
        # The mean of r_i - b_i over the step is 0 with each of the baselines.
        deviation = jnp.sqrt((centred**2).sum() / jnp.maximum(in_batch.count - 1.0, 1.0))
        scale = jnp.maximum(deviation, floor) + eps

    # With eps = floor = 0 the scale of equal rewards is 0: it is replaced before the division.
    no_signal = (in_batch if baseline == "batch_mean" else in_group).are_equal
    advantages = jnp.where(no_signal | (scale == 0), 0.0, centred / jnp.where(scale == 0, 1.0, scale))
    return advantages.reshape(-1), in_group.are_equal.mean(dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Statistics:
    """Statistics of the finite rewards of each group, [B, 1], or of the whole step, [1, 1]."""

    count: jax.Array
    mean: jax.Array
    std: jax.Array  # of samples: divided by count - 1
    are_equal: jax.Array  # bool: fewer than two different finite rewards


def _compute_statistics(grouped: jax.Array, finite: jax.Array, axis: int | None) -> _Statistics:
    """Statistics of the finite entries of [B, G] over an axis, or over both."""

    def total(values: jax.Array) -> jax.Array:
        return jnp.where(finite, values, 0.0).sum(axis=axis, keepdims=True)

    count = total(jnp.ones_like(grouped))
    mean = total(grouped) / jnp.maximum(count, 1.0)
    std = jnp.sqrt(total((grouped - mean) ** 2) / jnp.maximum(count - 1.0, 1.0))

    # Equal rewards are found by comparison, not by std == 0, which rounding in the mean would defeat.
    lowest = jnp.where(finite, grouped, jnp.inf).min(axis=axis, keepdims=True)
    highest = jnp.where(finite, grouped, -jnp.inf).max(axis=axis, keepdims=True)
    return _Statistics(count, mean, std, lowest >= highest)  # inf >= -inf without a finite reward


def decoupled_advantages(
    rewards: jax.Array,  # f32[K, N]
    weights: Sequence[float],  # [K]
    group_size: int,
    *,
    baseline: str,
    std: str,
    eps: float,
    floor: float,
) -> tuple[jax.Array, jax.Array]:
    """Advantages of several rewards, each normalised within its group, and the share of groups without a signal.

        A_i = sum_k w_k A_ki,   A_ki as in `normalise_rewards`, within each group
        and all of them divided by their standard deviation over the step + eps         GDPO (arXiv 2601.05242)

    A sum that is normalised afterwards makes different combinations of rewards equal: (1, 0) and (0, 1) have
    one sum.  The mean over the step is not subtracted: it is 0 but for rounding, which is not a signal.

    A reward that is not finite is left out of its group's statistics and adds nothing to its row's advantage;
    rows without any finite reward do not count in the standard deviation over the step.

    Returns and raises as `normalise_rewards`.
    """
    total = jnp.zeros(rewards.shape[1:], jnp.float32)
    for reward, weight in zip(rewards, weights, strict=True):
        advantages, _ = normalise_rewards(
            reward, group_size, baseline=baseline, std=std, eps=eps, floor=floor
        )
        total = total + weight * advantages

    # The sample standard deviation, as within groups.
    counted = jnp.isfinite(rewards).any(axis=0)
    count = counted.sum().astype(jnp.float32)
    deviation = jnp.sqrt(jnp.where(counted, total**2, 0.0).sum() / jnp.maximum(count - 1.0, 1.0))
    zero_variance = (total.reshape(-1, group_size) == 0).all(axis=1)
    return jnp.where(deviation > 0, total / (deviation + eps), 0.0), zero_variance.mean(dtype=jnp.float32)


def measure_deviations(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """The standard deviation of each group's finite rewards, f32[B]; 0 with fewer than two.

    rewards: f32[N].
    """
    grouped = np.where(np.isfinite(rewards), rewards, np.nan).reshape(-1, group_size)
    known = np.isfinite(grouped).sum(axis=1) > 1
    deviations = np.zeros(len(grouped), np.float32)
    deviations[known] = np.nanstd(grouped[known], axis=1, ddof=1)
    return deviations


def find_flat_groups(
    rewards: np.ndarray, advantages: np.ndarray, group_size: int, flat_std: float
) -> np.ndarray:
    """Find the groups that teach the policy nothing, bool[B].

    They have advantages of 0 only, or rewards whose standard deviation is at most flat_std (if that is not 0).

    rewards, advantages: f32[N].
    """
    is_flat = (advantages.reshape(-1, group_size) == 0).all(axis=1)
    if flat_std:
        is_flat |= measure_deviations(rewards, group_size) <= flat_std
    return is_flat
