"""Group advantages: each sample's reward relative to the other samples of the same prompt.

K  rewards   B  prompts   G  samples per prompt   N = B * G  rows, prompt-major
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def group_advantages(
    rewards: jax.Array,  # f32[N]
    group_size: int,
    *,
    std_normalise: bool,
    eps: float,
    floor: float,
) -> tuple[jax.Array, jax.Array]:
    """Advantages within each prompt's group, and the share of groups without a learning signal.

        A_i = (r_i - mean(r)) / (max(std(r), floor) + eps)        GRPO: DeepSeekMath (arXiv 2402.03300), 4.1.2
        A_i =  r_i - mean(r)                                      std_normalise False: Dr. GRPO (2503.20783)

    std is the sample standard deviation (divided by G - 1), as in the released code.  `floor` is a departure:
    without it sigmoid rewards of .998 and .999 would get advantages as large as rewards of 0 and 1.

    A reward that is not finite is left out of its group's mean and std, and its row gets advantage 0.  A
    group has zero variance if its finite rewards are all equal or fewer than two (any group if G = 1).  Its
    advantages are exactly 0, because rounding in the mean is not a signal.

    Returns (advantages f32[N], the share of zero-variance groups f32[]).  Raises ValueError if N is not a
    multiple of the group size.
    """
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"{rewards.shape[0]} rewards do not split into groups of {group_size}: rows are prompt-major, "
            "rollout.group_size to a prompt"
        )

    # The mean is over finite rewards only; f32 even if rewards are bf16, since differences can be small.
    grouped = rewards.astype(jnp.float32).reshape(-1, group_size)  # [B, G]
    finite = jnp.isfinite(grouped)
    grouped = jnp.where(finite, grouped, 0.0)
    finite_count = finite.sum(axis=1, keepdims=True).astype(jnp.float32)  # [B, 1]
    mean = grouped.sum(axis=1, keepdims=True) / jnp.maximum(finite_count, 1.0)
    centred = jnp.where(finite, grouped - mean, 0.0)

    # Equal rewards are found by comparison, not by std == 0, which rounding in the mean would defeat.
    lowest = jnp.where(finite, grouped, jnp.inf).min(axis=1, keepdims=True)
    highest = jnp.where(finite, grouped, -jnp.inf).max(axis=1, keepdims=True)
    zero_variance = lowest >= highest  # bool[B, 1]; inf >= -inf in a group without a finite reward

    scale = jnp.ones_like(mean)
    if std_normalise:
        sum_of_squares = (centred**2).sum(axis=1, keepdims=True)
        scale = jnp.maximum(jnp.sqrt(sum_of_squares / jnp.maximum(finite_count - 1.0, 1.0)), floor) + eps

    # With eps = floor = 0 the scale of a zero-variance group is 0: it is replaced before the division.
    advantages = jnp.where(zero_variance, 0.0, centred / jnp.where(zero_variance, 1.0, scale))
    return advantages.reshape(-1), zero_variance.mean(dtype=jnp.float32)


def decoupled_advantages(
    rewards: jax.Array,  # f32[K, N]
    weights: Sequence[float],  # [K]
    group_size: int,
    *,
    std_normalise: bool,
    eps: float,
    floor: float,
) -> tuple[jax.Array, jax.Array]:
    """Advantages of several rewards, each normalised within its group, and the share of groups without a signal.

        A_i = sum_k w_k A_ki,   A_ki = (r_ki - mean(r_k)) / (max(std(r_k), floor) + eps)
        and all of them divided by their standard deviation over the step + eps         GDPO (arXiv 2601.05242)

    A sum that is normalised afterwards makes different combinations of rewards equal: (1, 0) and (0, 1) have
    one sum.  The mean over the step is not subtracted: it is 0 but for rounding, which is not a signal.

    A reward that is not finite is left out of its group's statistics and adds nothing to its row's advantage;
    rows without any finite reward do not count in the standard deviation over the step.

    Returns and raises as `group_advantages`.
    """
    total = jnp.zeros(rewards.shape[1:], jnp.float32)
    for reward, weight in zip(rewards, weights, strict=True):
        advantages, _ = group_advantages(
            reward, group_size, std_normalise=std_normalise, eps=eps, floor=floor
        )
        total = total + weight * advantages

    # The sample standard deviation, as within groups.
    counted = jnp.isfinite(rewards).any(axis=0)
    count = counted.sum().astype(jnp.float32)
    std = jnp.sqrt(jnp.where(counted, total**2, 0.0).sum() / jnp.maximum(count - 1.0, 1.0))
    zero_variance = (total.reshape(-1, group_size) == 0).all(axis=1)
    return jnp.where(std > 0, total / (std + eps), 0.0), zero_variance.mean(dtype=jnp.float32)
