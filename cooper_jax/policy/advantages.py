"""Group advantages: the reward of each sample relative to its group.

N = B * G rows, prompt-major: B prompts, G samples a prompt
"""

from __future__ import annotations

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
    """Advantages of the rows within their prompt's group, and the share of groups without a signal.

        A_i = (r_i - mean(r)) / (max(std(r), floor) + eps)        GRPO: DeepSeekMath (arXiv 2402.03300), 4.1.2
        A_i =  r_i - mean(r)                                      std_normalise False: Dr. GRPO (2503.20783)

    The standard deviation is the sample's (divided by G - 1), as in the released code; `floor` is ours:
    sigmoid rewards of .998 and .999 would otherwise become advantages of full size.

    A reward that is not finite is left out of its group's mean and deviation, and its row gets advantage 0.
    A group whose finite rewards are all equal, or fewer than two (so any group when G = 1), gets exact zeros:
    rounding in the mean is not a signal.

    Returns (advantages f32[N], zero_variance_share f32[]: such groups over all groups).  Raises ValueError
    when N is not a multiple of the group size.
    """
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"{rewards.shape[0]} rewards do not split into groups of {group_size}: rows are prompt-major, "
            "rollout.group_size to a prompt"
        )

    r = rewards.astype(jnp.float32).reshape(-1, group_size)  # [B, G]
    ok = jnp.isfinite(r)
    r = jnp.where(ok, r, 0.0)
    n = ok.sum(axis=1, keepdims=True).astype(jnp.float32)  # [B, 1]
    mean = r.sum(axis=1, keepdims=True) / jnp.maximum(n, 1.0)
    centred = jnp.where(ok, r - mean, 0.0)

    lowest = jnp.where(ok, r, jnp.inf).min(axis=1, keepdims=True)
    highest = jnp.where(ok, r, -jnp.inf).max(axis=1, keepdims=True)
    flat = lowest >= highest  # also true of a group without a finite reward

    scale = jnp.ones_like(mean)
    if std_normalise:
        std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(n - 1.0, 1.0))
        scale = jnp.maximum(std, floor) + eps
    # A flat group's scale can be 0 (eps = floor = 0): the division must not see it.
    advantages = jnp.where(flat, 0.0, centred / jnp.where(flat, 1.0, scale))
    return advantages.reshape(-1), flat.mean(dtype=jnp.float32)
