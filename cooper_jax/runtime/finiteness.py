"""The numbers of values in arrays that are not finite, by the arrays' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cooper_jax.runtime.checksums import join_path
from cooper_jax.types import TrainState


def count_non_finite(tree: Any) -> dict[str, int]:
    """Count the NaN and infinite values of each array that has any: dotted name -> number.  Collective.

    Arrays of integers and of random keys have none.
    """
    named = {
        join_path(path): x
        for path, x in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, np.inexact)
    }
    if not named:
        return {}
    counts = jax.device_get(_count_each(list(named.values())))
    return {name: int(count) for name, count in zip(named, counts, strict=True) if count}


def describe_non_finite(models: Mapping[str, TrainState]) -> str:
    """Name the first array of models, by name, that has values that are not finite, and count the others.

    Empty if there is none.  Optimiser states count, too.  Collective.
    """
    trees = {name: {"params": state.params, "opt_state": state.opt_state} for name, state in models.items()}
    if not (bad := count_non_finite(trees)):
        return ""
    name, count = next(iter(bad.items()))
    others = f", and values of {len(bad) - 1} other arrays" if len(bad) > 1 else ""
    return f"{count} values of {name}{others} are not finite"


# One program for all arrays: hosts may run several small ones in different orders, and each would then wait for the
# other's sum for ever.
@jax.jit
def _count_each(arrays: list[jax.Array]) -> jax.Array:
    # A float cannot wrap around: an array of more than 2^31 elements may be full of NaN.
    return jnp.stack([jnp.sum(~jnp.isfinite(x), dtype=jnp.float32) for x in arrays])
