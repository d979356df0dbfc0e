"""Device meshes, and the rules that shard arrays over them.

1. `split_devices` reserves devices on every host for models that do not share the policy's mesh.
2. `make_mesh` arranges devices on the axes data x fsdp x tensor.  With several slices (TPU pods joined by a
   data-centre network, or hosts of GPUs), only one axis crosses slices; the others stay on fast links.
3. A `Layout` is such a mesh with a table of rules that maps a logical axis ("embed", "heads", ...) to a mesh
   axis.  A second table is tried before it for a rollout's copy of the weights.
4. A parameter is declared once, as a `ParamSpec`: shape, logical axes and initialiser.  Abstract values,
   shardings and initial values derive from it.

If a mesh axis does not divide a dimension, the next rule of that logical axis is tried; without one this is
an error.  The tokens of a row are not sharded: rows of the paper's length (1,024) are many and short, and
sharded over `data` and `fsdp`.
"""

from __future__ import annotations

import dataclasses
import itertools
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
    """Declaration of a parameter: shape, one logical axis name (or None) per dimension, initialiser.

    init: "normal" (standard deviation `scale`), "zeros" or "ones".
    keep_f32: used in float32 (norms); other parameters are cast to the compute dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float = 0.02
    keep_f32: bool = False


def parse_sizes(text: str) -> tuple[int, int, int]:
    """Parse "1x2x1" into (1, 2, 1): data x fsdp x tensor.  Raises ValueError for anything else."""
    parts = text.split("x")
    if len(parts) != len(AXES) or not all(p.isdecimal() and int(p) for p in parts):
        raise ValueError(f"{text!r} is no mesh: write {' x '.join(AXES)} as in 1x2x1")
    data, fsdp, tensor = map(int, parts)
    return data, fsdp, tensor


def split_devices(
    devices: Sequence[jax.Device], aside: Mapping[str, tuple[int, int, int]]
) -> tuple[list[jax.Device], dict[str, list[jax.Device]]]:
    """Reserve devices for meshes of the given sizes -> (remaining devices, reserved devices by name).

    Every host gives the same number of its last devices, because all hosts take part in every program.
    Raises ValueError if hosts cannot give equally many, or no device would remain.
    """
    by_host: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_host.setdefault(device.process_index, []).append(device)
    taken: dict[str, list[jax.Device]] = {}
    for name, sizes in aside.items():
        count, hosts = math.prod(sizes), len(by_host)
        per_host, fewest = count // hosts, min(map(len, by_host.values()))
        if count % hosts or per_host >= fewest:
            raise ValueError(
                f"mesh.{name}={'x'.join(map(str, sizes))} takes {count} devices, as many from each of {hosts} "
                f"hosts, and must leave some; a host has {fewest} left: choose another size, or '' to share the "
                "policy's mesh"
            )
        taken[name] = list(itertools.chain.from_iterable(own[-per_host:] for own in by_host.values()))
        by_host = {host: own[:-per_host] for host, own in by_host.items()}
    return list(itertools.chain.from_iterable(by_host.values())), taken


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    devices: Sequence[jax.Device] | None = None,
    across: str = "data",
) -> Mesh:
    """Make a data x fsdp x tensor mesh; one axis may be -1, which takes the remaining devices.

    across: the axis that crosses slices, if the devices are in several.

    Raises ValueError if the axes do not multiply to the number of devices, or the number of slices does not
    divide `across`.
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
    """Arrange the devices in an array of `sizes` whose neighbours are connected by fast links."""
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
    """Tell whether TPU chips fill a box; a part of a host's chips keeps its own order instead."""
    coords = np.asarray([d.coords for d in devices])
    cores = len({d.core_on_chip for d in devices})
    return int(np.prod(coords.max(0) - coords.min(0) + 1)) * cores == len(devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and its sharding rules.  Hashable, so that it can be a static argument of jit."""

    mesh: Mesh
    rules: Rules
    rollout_rules: Rules = (("embed", None),)  # tried before `rules` for a rollout's copy of the weights

    def for_rollout(self) -> Layout:
        """The layout of a rollout's copy of the weights."""
        return dataclasses.replace(self, rules=(*self.rollout_rules, *self.rules))

    @property
    def single_device(self) -> bool:
        """True if nothing is partitioned."""
        return self.mesh.size == 1

    @property
    def fast_cpu_products(self) -> bool:
        """True if generation uses the product that XLA:CPU computes fastest (`kernels.matmul.matmul_cpu`).

        On one device only: over several, the partitioner would gather its operands.
        """
        return self.single_device and self.platform == "cpu"

    @property
    def batch_shards(self) -> int:
        """Number of shards of a batch; batch sizes must be multiples of it."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def platform(self) -> str:
        """The platform of the mesh's devices: cpu, gpu or tpu; it may differ from the default backend's."""
        return self.mesh.devices.flat[0].platform

    def ways(self, target: Any) -> int:
        """Number of shards into which an entry of a PartitionSpec splits a dimension."""
        targets = (target,) if isinstance(target, str) else tuple(target or ())
        return math.prod(self.mesh.shape[t] for t in targets)

    def first_ways(self, axis: str) -> int:
        """Number of shards by the first rule of a logical axis; sizes should be multiples of it."""
        return next((self.ways(target) for name, target in self.rules if name == axis), 1)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """Make the PartitionSpec of an array with these logical axes.

        With a shape, rules whose mesh axes do not divide the dimension are skipped.  Raises ValueError for an
        axis for which no rule is left.
        """
        used: set[str] = set()  # mesh axes; each may shard one dimension only
        entries = []
        for i, axis in enumerate(axes):
            size = None if shape is None else shape[i]
            entries.append(None if axis is None else self._find_target(axis, size, used))
        return PartitionSpec(*entries)

    def _find_target(self, axis: str, size: int | None, used: set[str]) -> Any:
        """The first rule's mesh axes that are free and divide the dimension; adds them to `used`."""
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
        """Make the NamedSharding of an array with these logical axes; see `spec`."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrain the sharding of an array inside jit; `axes` are logical axes, one per dimension."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def put(self, tree: Any, *axes: str | None) -> Any:
        """Put arrays that every host holds on the devices.

        `axes` are the logical axes of the leading dimensions; the other dimensions are replicated.
        """

        def place(x):
            x = np.asarray(x)
            sharding = self.sharding(axes[: x.ndim] + (None,) * (x.ndim - len(axes)), x.shape)
            # The callback lets each host copy only its own devices' rows.
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(place, tree)


def is_spec(x: Any) -> bool:
    """Tell whether x is a ParamSpec; `is_leaf` for trees of them."""
    return isinstance(x, ParamSpec)


def make_shardings(layout: Layout, specs: Any) -> Any:
    """Make the tree of NamedSharding for a tree of ParamSpec."""
    return jax.tree.map(lambda s: layout.sharding(s.axes, s.shape), specs, is_leaf=is_spec)


def check_sharding(layout: Layout, specs: Any) -> None:
    """Raise ValueError if the rules shard a parameter of over 1 MiB, but every device would hold all of it.

    Only meshes with an `fsdp` axis are checked: they are chosen to save memory.
    """
    fsdp = layout.mesh.shape["fsdp"]
    for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec):
        sharding = layout.sharding(spec.axes, spec.shape)
        has_sharded_axis = any(layout.first_ways(axis) > 1 for axis in spec.axes)
        is_large = 4 * math.prod(spec.shape) > 2**20  # bytes, in f32
        is_replicated = sharding.shard_shape(spec.shape) == spec.shape
        if fsdp > 1 and has_sharded_axis and is_large and is_replicated:
            raise ValueError(
                f"mesh {dict(layout.mesh.shape)} does not divide {jax.tree_util.keystr(path)} of shape "
                f"{spec.shape}, which every device would hold whole: choose sizes that divide it"
            )


def abstract_params(layout: Layout, specs: Any) -> Any:
    """Make the tree of f32 ShapeDtypeStruct with shardings for a tree of ParamSpec."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=layout.sharding(s.axes, s.shape)),
        specs,
        is_leaf=is_spec,
    )


def init_params(key: jax.Array, specs: Any, layout: Layout) -> Any:
    """Draw initial f32 values, sharded by the layout.

    Each parameter's bits depend on the key and on the parameter's own path: not on other parameters or the
    mesh.
    """
    leaves, treedef = jax.tree.flatten_with_path(specs, is_leaf=is_spec)

    def draw(key):
        params = []
        for path, spec in leaves:
            name = jax.tree_util.keystr(path)
            # Keyed by the path: parameters keep their values if others are added or reordered.
            path_key = jax.random.fold_in(key, int.from_bytes(name.encode(), "little") % (2**31 - 1))
            if spec.init == "normal":
                params.append(spec.scale * jax.random.normal(path_key, spec.shape, jnp.float32))
            elif spec.init == "zeros":
                params.append(jnp.zeros(spec.shape, jnp.float32))
            elif spec.init == "ones":
                params.append(jnp.ones(spec.shape, jnp.float32))
            else:
                raise ValueError(f"{name}: init {spec.init!r} is none of normal, zeros, ones")
        return jax.tree.unflatten(treedef, params)

    return jax.jit(draw, out_shardings=make_shardings(layout, specs))(key)
