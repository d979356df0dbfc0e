"""Devices, axes, and the rules that place arrays on them.

1. `make_mesh(cfg.mesh)` lays the devices out on the axes data x fsdp x tensor.
2. A `Layout` is that mesh with a table of rules: a logical axis ("embed", "heads", ...) to a mesh axis.
3. A parameter is declared once, as a `ParamSpec`: shape, logical axes and initialiser.  Shapes, shardings
   and initial values all derive from it.

A dimension that its mesh axis does not divide falls to the next rule of that logical axis, or raises.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
Rules = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter: shape, one logical axis name (or None) a dimension, and how it starts.

    init: "normal" (standard deviation `scale`), "zeros" or "ones".
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float = 0.02


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A data x fsdp x tensor mesh; one axis may be -1 ("all the rest").

    Raises ValueError when the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, at most one is -1")
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} holds {math.prod(sizes)} devices, but there are "
            f"{len(devices)}: change --config.mesh.data, .fsdp or .tensor (-1 takes the rest)"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and its rules: everything that decides where an array lives.  Hashable, so static in jit."""

    mesh: Mesh
    rules: Rules

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is cut; batch sizes must be multiples of it."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def platform(self) -> str:
        """Of the mesh's devices, which need not be the default backend's: cpu, gpu, tpu."""
        return self.mesh.devices.flat[0].platform

    def ways(self, target: Any) -> int:
        """Into how many parts a PartitionSpec's entry cuts a dimension."""
        targets = (target,) if isinstance(target, str) else tuple(target or ())
        return math.prod(self.mesh.shape[t] for t in targets)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        With a shape, rules whose mesh axes do not divide the dimension are passed over.  Raises ValueError
        for an axis that no rule serves.
        """
        used: set[str] = set()
        out = []
        for i, axis in enumerate(axes):
            out.append(None if axis is None else self._place(axis, None if shape is None else shape[i], used))
        return PartitionSpec(*out)

    def _place(self, axis: str, size: int | None, used: set[str]) -> Any:
        tried = []
        for name, target in self.rules:
            if name != axis:
                continue
            if target is None:
                return None
            targets = (target,) if isinstance(target, str) else tuple(target)
            ways = math.prod(self.mesh.shape[t] for t in targets)
            tried.append(f"{target} ({ways} ways)")
            if used.isdisjoint(targets) and (size is None or size % ways == 0):
                used.update(targets)
                return target
        raise ValueError(
            f"no mesh rule places the axis {axis!r} of size {size}; tried {tried or 'none'}: "
            f"change --config.mesh sizes, or add ({axis!r}, None) to the rules"
        )

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Inside jit: pin an activation to its place."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def put(self, tree: Any, *axes: str | None) -> Any:
        """Place host arrays; `axes` name the leading dimensions, the others are replicated."""

        def place(x):
            full = axes[: np.ndim(x)] + (None,) * (np.ndim(x) - len(axes))
            return jax.device_put(x, self.sharding(full, np.shape(x)))

        return jax.tree.map(place, tree)


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def shardings(layout: Layout, specs: Any) -> Any:
    """A tree of ParamSpec -> the same tree of NamedSharding."""
    return jax.tree.map(lambda s: layout.sharding(s.axes, s.shape), specs, is_leaf=is_spec)


def abstract(layout: Layout, specs: Any) -> Any:
    """A tree of ParamSpec -> the same tree of f32 ShapeDtypeStruct, placed."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=layout.sharding(s.axes, s.shape)),
        specs,
        is_leaf=is_spec,
    )


def init_params(key: jax.Array, specs: Any, layout: Layout | None = None) -> Any:
    """Initial f32 values; each parameter's bits depend on the key and its own path alone."""
    leaves, treedef = jax.tree.flatten_with_path(specs, is_leaf=is_spec)

    def make(key):
        out = []
        for path, s in leaves:
            name = jax.tree_util.keystr(path)
            sub = jax.random.fold_in(key, int.from_bytes(name.encode(), "little") % (2**31 - 1))
            if s.init == "normal":
                out.append(s.scale * jax.random.normal(sub, s.shape, jnp.float32))
            elif s.init in ("zeros", "ones"):
                out.append(getattr(jnp, s.init)(s.shape, jnp.float32))
            else:
                raise ValueError(f"{name}: init {s.init!r} is none of normal, zeros, ones")
        return jax.tree.unflatten(treedef, out)

    return jax.jit(make, out_shardings=None if layout is None else shardings(layout, specs))(key)
