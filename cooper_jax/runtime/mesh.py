"""Devices, axes, and the rules that place arrays on them.

1. `split_devices` sets devices aside for models that do not share the policy's mesh, some of every host's.
2. `make_mesh` lays devices out on the axes data x fsdp x tensor.  Over several slices (TPU pods that a data-centre
   network joins, or hosts of GPUs) one axis alone crosses from slice to slice; the others stay on fast links.
3. A `Layout` is such a mesh with a table of rules: a logical axis ("embed", "heads", ...) to a mesh axis; and a
   second one, tried before it, for a rollout's copy of the weights.
4. A parameter is declared once, as a `ParamSpec`: shape, logical axes and initialiser.  Shapes, shardings
   and initial values all derive from it.

A dimension that its mesh axis does not divide falls to the next rule of that logical axis, or raises.  There is no
axis over a row's tokens: rows of the paper's length (1,024) are many and short, and cut over `data` and `fsdp`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
Rules = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter: shape, one logical axis name (or None) a dimension, and how it starts.

    init: "normal" (standard deviation `scale`), "zeros" or "ones".
    keep_f32: it computes in float32, as norms do; the other parameters are cast to the compute type.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float = 0.02
    keep_f32: bool = False


def parse_sizes(text: str) -> tuple[int, int, int]:
    """ "1x2x1" -> (1, 2, 1), data x fsdp x tensor.  Raises ValueError for anything else."""
    parts = text.split("x")
    if len(parts) != len(AXES) or not all(p.isdecimal() and int(p) for p in parts):
        raise ValueError(f"{text!r} is no mesh: write {' x '.join(AXES)} as in 1x2x1")
    return tuple(int(p) for p in parts)


def split_devices(
    devices: Sequence[jax.Device], aside: Mapping[str, tuple[int, int, int]]
) -> tuple[list[jax.Device], dict[str, list[jax.Device]]]:
    """Devices that are left, and those set aside under each name for a mesh of so many.

    Every host gives the same number, its last ones: all hosts take part in every program.  Raises ValueError where
    the hosts cannot give equally many, or nothing would be left.
    """
    by_host: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_host.setdefault(device.process_index, []).append(device)
    taken: dict[str, list[jax.Device]] = {}
    for name, sizes in aside.items():
        count, hosts = math.prod(sizes), len(by_host)
        each, least = count // hosts, min(map(len, by_host.values()))
        if count % hosts or each >= least:
            raise ValueError(
                f"mesh.{name}={'x'.join(map(str, sizes))} takes {count} devices, as many from each of {hosts} "
                f"hosts, and must leave some; a host has {least} left: choose another size, or '' to share the "
                "policy's mesh"
            )
        taken[name] = [d for own in by_host.values() for d in own[-each:]]
        by_host = {host: own[:-each] for host, own in by_host.items()}
    return [d for own in by_host.values() for d in own], taken


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    devices: Sequence[jax.Device] | None = None,
    across: str = "data",
) -> Mesh:
    """A data x fsdp x tensor mesh; one axis may be -1 ("all the rest").

    across: the axis that spans slices, where the devices lie in several: neighbours on the others share one.

    Raises ValueError when the axes do not multiply to the number of devices, or slices do not divide `across`.
    """
    devices = list(jax.devices() if devices is None else np.asarray(devices).flat)
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
    if across not in AXES:
        raise ValueError(f"mesh.across={across!r}: it is one of {', '.join(AXES)}")
    axis_types = (AxisType.Auto,) * len(AXES)
    return Mesh(_arrange(devices, sizes, AXES.index(across)), AXES, axis_types=axis_types)


def _arrange(devices: list[jax.Device], sizes: list[int], across: int) -> np.ndarray:
    """The devices as an array of `sizes`: neighbours in it are neighbours on the machine."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        if devices[0].platform == "tpu" and _is_box(devices):
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return np.asarray(devices).reshape(sizes)
    if sizes[across] % slices:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))}: the devices lie in {slices} slices, which do not divide "
            f"{AXES[across]}={sizes[across]}, the axis that spans them: change its size or --config.mesh.across"
        )
    inner, outer = list(sizes), [1] * len(sizes)
    inner[across], outer[across] = sizes[across] // slices, slices
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def _is_box(devices: Sequence[jax.Device]) -> bool:
    """Whether TPU chips fill a box: a part of a host's is laid out in its own order."""
    coords = np.asarray([d.coords for d in devices])
    cores = len({d.core_on_chip for d in devices})
    return int(np.prod(coords.max(0) - coords.min(0) + 1)) * cores == len(devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and its rules: everything that decides where an array lives.  Hashable, so static in jit."""

    mesh: Mesh
    rules: Rules
    rollout_rules: Rules = (("embed", None),)  # tried before `rules` for a rollout's copy of the weights

    def for_rollout(self) -> Layout:
        """The layout of the weights that a rollout reads."""
        return dataclasses.replace(self, rules=(*self.rollout_rules, *self.rules))

    @property
    def single_device(self) -> bool:
        """Whether nothing is partitioned."""
        return self.mesh.size == 1

    @property
    def fast_cpu_products(self) -> bool:
        """Whether generation multiplies in the form that XLA:CPU computes fastest (`kernels.matmul.matmul_cpu`).

        On one device only: over several, the partitioner would gather the operands of these products.
        """
        return self.single_device and self.platform == "cpu"

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

    def first_ways(self, axis: str) -> int:
        """Into how many parts the first rule of a logical axis cuts it: what its sizes had better divide by."""
        return next((self.ways(target) for name, target in self.rules if name == axis), 1)

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
        """Place arrays that every host holds; `axes` name the leading dimensions, the others are replicated."""

        def place(x):
            x = np.asarray(x)
            sharding = self.sharding(axes[: x.ndim] + (None,) * (x.ndim - len(axes)), x.shape)
            # By callback: of a batch that every host holds, each copies its own devices' rows alone.
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(place, tree)


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def make_shardings(layout: Layout, specs: Any) -> Any:
    """A tree of ParamSpec -> the same tree of NamedSharding."""
    return jax.tree.map(lambda s: layout.sharding(s.axes, s.shape), specs, is_leaf=is_spec)


def check_sharding(layout: Layout, specs: Any) -> None:
    """Raise ValueError for a parameter of over 1 MB that lies whole on every device though `fsdp` was to cut it."""
    for path, s in jax.tree.leaves_with_path(specs, is_leaf=is_spec):
        sharding, wanted = layout.sharding(s.axes, s.shape), [a for a in s.axes if layout.first_ways(a) > 1]
        if wanted and 4 * math.prod(s.shape) > 2**20 and sharding.shard_shape(s.shape) == s.shape:
            if layout.mesh.shape["fsdp"] > 1:
                raise ValueError(
                    f"mesh {dict(layout.mesh.shape)} does not divide {jax.tree_util.keystr(path)} of shape "
                    f"{s.shape}, which would lie whole on every device: choose sizes that divide it"
                )


def abstract_params(layout: Layout, specs: Any) -> Any:
    """A tree of ParamSpec -> the same tree of f32 ShapeDtypeStruct, placed."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=layout.sharding(s.axes, s.shape)),
        specs,
        is_leaf=is_spec,
    )


def init_params(key: jax.Array, specs: Any, layout: Layout) -> Any:
    """Initial f32 values, placed by the layout; each parameter's bits depend on the key and its own path alone."""
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

    return jax.jit(make, out_shardings=make_shardings(layout, specs))(key)
