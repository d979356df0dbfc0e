"""Loops over layers that differ from each other: one compiled body for every pattern that repeats.

Windows and rotary embeddings are constants of a layer, not traced flags, so a loop's body must contain every
kind of layer that it runs.  `group_layers` cuts the layers into groups, each some kinds repeated in order:
Gemma 3's 26 layers are 4 times (5 sliding, 1 full) and then 2 sliding.  Layers that are all alike are one
group of one kind, and run as one loop over single layers.

L layers   p kinds of a group   n repeats
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cooper_jax.model.config import LayerKind
from cooper_jax.types import Params

LONGEST = 8  # kinds of a group: a body of more layers would take long to compile

X = TypeVar("X")


class Group(NamedTuple):
    """Layers first, first + 1, ..., first + n p - 1, whose kinds are `kinds`, repeated n times."""

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.kinds) * self.repeats


@functools.cache
def group_layers(kinds: Sequence[LayerKind]) -> tuple[Group, ...]:
    """Cut layers of these kinds into groups, from the first on: each covers as many layers as possible.

    Among groups that cover the same layers the one with the fewest kinds is taken.  kinds: a tuple.
    """
    groups, first = [], 0
    while first < len(kinds):
        rest = kinds[first:]
        candidates = []
        for p in range(1, min(LONGEST, len(rest)) + 1):
            repeats = 1
            while rest[repeats * p : (repeats + 1) * p] == rest[:p]:
                repeats += 1
            # A pattern that does not repeat is not a loop: its layers are left to shorter patterns.
            if repeats > 1 or p == 1:
                candidates.append(Group(first, tuple(rest[:p]), repeats))

        group = max(candidates, key=lambda g: (g.layers, -len(g.kinds)))
        groups.append(group)
        first += group.layers
    return tuple(groups)


def make_layer_scan(
    layer: Callable[[X, Params, LayerKind], tuple[X, Any]],
) -> Callable[[X, Params, tuple[LayerKind, ...]], tuple[X, Any]]:
    """Make a function that runs x through layers, as `lax.scan` does.

    It takes (x, weights, kinds), where the weights' leaves are [L, ..] and there is a kind for each layer, and
    returns (x, what the layers return, stacked [L, ..]).  A body that is needed again, for other weights of the
    same kinds, is not traced again.

    layer: (x, one layer's weights, its kind) -> (x, anything).
    """

    @functools.cache
    def make_body(kinds: tuple[LayerKind, ...]) -> Callable[[X, Params], tuple[X, Any]]:
        if len(kinds) == 1:
            return lambda x, w: layer(x, w, kinds[0])

        def body(x: X, w: Params) -> tuple[X, Any]:  # leaves of w: [p, ..]
            outputs = []
            for i, kind in enumerate(kinds):
                x, output = layer(x, jax.tree.map(lambda a, i=i: a[i], w), kind)
                outputs.append(output)
            return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

        return body

    def scan(x: X, weights: Params, kinds: tuple[LayerKind, ...]) -> tuple[X, Any]:
        outputs = []
        for group in group_layers(kinds):
            w = _take_group(weights, group, len(kinds))
            period = len(group.kinds)
            if period > 1:
                # [n p, ..] -> [n, p, ..], and back for the outputs.
                w = jax.tree.map(lambda a, n=group.repeats: a.reshape(n, -1, *a.shape[1:]), w)
            x, output = jax.lax.scan(make_body(group.kinds), x, w)
            if period > 1:
                output = jax.tree.map(lambda a, n=group.layers: a.reshape(n, *a.shape[2:]), output)
            outputs.append(output)
        if len(outputs) == 1:
            return x, outputs[0]
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

    return scan


def _take_group(weights: Params, group: Group, count: int) -> Params:
    """Return the weights of a group's layers: of all `count` layers without a slice, which would be a copy."""
    if group.layers == count:
        return weights
    return jax.tree.map(lambda w: w[group.first : group.first + group.layers], weights)


def loop_layers(
    layer: Callable[[jax.Array | int, X, LayerKind], X], carry: X, kinds: tuple[LayerKind, ...]
) -> X:
    """Run `carry` through layers that index their own weights and caches, in `lax.fori_loop`s.

    A fori_loop carries caches, so that each layer's write is in place; a scan would copy them.

    layer: (index among these layers, carry, its kind) -> carry.
    """
    for group in group_layers(kinds):
        period = len(group.kinds)

        # The default binds this iteration's group: a closure would see the last one.
        def body(i, carry, group=group, period=period):
            for j, kind in enumerate(group.kinds):
                index = i if period == 1 else i * period + j
                index = index if group.first == 0 else group.first + index
                carry = layer(index, carry, kind)
            return carry

        carry = jax.lax.fori_loop(0, group.repeats, body, carry)
    return carry
