"""Device meshes, and the rules that shard arrays over them.

1. `split_devices` reserves devices on every host for models that do not share the policy's mesh.
2. `make_mesh` arranges devices on the axes data x fsdp x tensor.  With several slices (TPU pods joined by a
   data-centre network, or hosts of GPUs), only one axis crosses slices; the others stay on fast links.
3. A `Layout` is such a mesh with a table of rules that maps a logical axis ("embed", "heads", ...) to a mesh
   axis.  For a rollout's copy of the weights, a second table is tried first.
4. A parameter is declared once, as a `ParamSpec`: shape, logical axes and initialiser.  Abstract values,
   shardings and initial values derive from it.

If a mesh axis does not divide a dimension, the next rule of that logical axis is tried; if there is no other
rule, this is an error.  The tokens of a row are not sharded: with rows as short as the paper's (1,024
tokens), sharding the rows over `data` and `fsdp` is enough.
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

# Mesh axes: copies of the model, shards of parameters (all-gathered for use), shards of matrix products.
AXES = ("data", "fsdp", "tensor")

# (logical axis, mesh axis, tuple of mesh axes or None), tried in order.
Rules = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Declaration of a parameter: shape, one logical axis name (or None) per dimension, initialiser.

    init: "normal" (standard deviation `scale`), "zeros" or "ones".
    keep_f32: used in float32 (norms); other parameters are cast to the compute dtype.
    dtype: in which it is stored.  Parameters that are trained are float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float = 0.02
    keep_f32: bool = False
    dtype: str = "float32"


def parse_sizes(text: str) -> tuple[int, int, int]:
    """Parse "1x2x1" into (1, 2, 1): data x fsdp x tensor.  Raises ValueError for text of another form."""
    parts = text.split("x")
    if len(parts) != len(AXES) or not all(p.isdecimal() and int(p) for p in parts):
        raise ValueError(f"{text!r} is no mesh: write {' x '.join(AXES)} as in 1x2x1")
    data, fsdp, tensor = map(int, parts)
    return data, fsdp, tensor


def split_devices(
    devices: Sequence[jax.Device], aside: Mapping[str, tuple[int, int, int]]
) -> tuple[list[jax.Device], dict[str, list[jax.Device]]]:
    """Reserve devices for meshes of the given sizes -> (remaining devices, reserved devices by name).

    The same number of devices is reserved on every host, because all hosts take part in every program.

    Args:
      aside: name of a model -> its mesh sizes, data x fsdp x tensor.

    Raises ValueError if a size is not a multiple of the number of hosts, or a host would have no device left.
    """
    by_host: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_host.setdefault(device.process_index, []).append(device)

    # Each mesh takes the last devices that are left on every host.
    reserved: dict[str, list[jax.Device]] = {}
    for name, sizes in aside.items():
        count, hosts = math.prod(sizes), len(by_host)
        per_host, fewest = count // hosts, min(map(len, by_host.values()))
        if count % hosts or per_host >= fewest:
            raise ValueError(
                f"mesh.{name}={'x'.join(map(str, sizes))} takes {count} devices, as many from each of "
                f"{hosts} hosts, and must leave some; a host has {fewest} left: choose another size, "
                "or '' to share the policy's mesh"
            )
        reserved[name] = list(itertools.chain.from_iterable(own[-per_host:] for own in by_host.values()))
        by_host = {host: own[:-per_host] for host, own in by_host.items()}
    return list(itertools.chain.from_iterable(by_host.values())), reserved


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

    # An axis of -1 takes the devices that the other axes leave; the check below finds a remainder.
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

    # Auto: the compiler propagates shardings (GSPMD) from the constraints in the code.
    axis_types = (AxisType.Auto,) * len(AXES)
    return Mesh(_arrange(devices, sizes, AXES.index(across)), AXES, axis_types=axis_types)


def _arrange(devices: list[jax.Device], sizes: list[int], across: int) -> np.ndarray:
    """Arrange the devices in an array of `sizes` whose neighbours are connected by fast links."""
    # One slice: on TPUs JAX maps the axes to the torus; elsewhere every order is equally good.
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        if devices[0].platform == "tpu" and _is_box(devices):
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return np.asarray(devices).reshape(sizes)

    # Several slices: the axis `across` is split into (slices, devices per slice), the others stay in a slice.
    if sizes[across] % slices:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))}: the devices are in {slices} slices, which do not "
            f"divide {AXES[across]}={sizes[across]}, the axis that spans them: change its size or "
            "--config.mesh.across"
        )
    inner, outer = list(sizes), [1] * len(sizes)
    inner[across], outer[across] = sizes[across] // slices, slices
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def _is_box(devices: Sequence[jax.Device]) -> bool:
    """Tell whether TPU chips fill a box of the torus: only then can mesh_utils map axes to it."""
    coords = np.asarray([d.coords for d in devices])
    cores = len({d.core_on_chip for d in devices})
    return int(np.prod(coords.max(0) - coords.min(0) + 1)) * cores == len(devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and its sharding rules.  Hashable, so that it can be a static argument of jit."""

    mesh: Mesh
    rules: Rules
    rollout_rules: Rules = (("embed", None),)  # tried before `rules` for a rollout's copy of the weights
    collective_matmul: bool = False  # see `compiler_options`

    def for_rollout(self) -> Layout:
        """Return the layout of a rollout's copy of the weights."""
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
    def compiler_options(self) -> dict[str, bool] | None:
        """The options of jax.jit for programs that gather weights; None: the compiler's own choice.

        XLA:TPU takes the product with a gathered matrix apart, so that pieces of the matrix travel while others
        are multiplied.  In FSDP a piece is a part of the contracted axis, so that each adds to the whole result,
        which is read and written in device memory for every piece: scores move 3.2 times the bytes.  Without
        it, the compiler gathers a matrix while others are multiplied.  collective_matmul=True leaves it on.
        """
        if self.platform != "tpu" or self.single_device or self.collective_matmul:
            return None
        return {"xla_tpu_enable_windowed_einsum_for_all_gather": False}

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
        """Return the mesh axes of the first rule that fits, and add them to `used`.

        A rule fits if its mesh axes are not in `used` and divide the size; None is a size that all divide.
        """
        tried = []
        for name, target in self.rules:
            if name != axis:
                continue
            if target is None:
                return None

            # A mesh axis shards at most one dimension of an array.
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
        """The sharding of an array of which every device has a full copy."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrain the sharding of an array inside jit; `axes` are logical axes, one per dimension."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def put(self, tree: Any, *axes: str | None) -> Any:
        """Put arrays, which every host has in full, on the devices.

        `axes` are the logical axes of the leading dimensions; the other dimensions are replicated.
        """

        def place(x):
            x = np.asarray(x)
            sharding = self.sharding(axes[: x.ndim] + (None,) * (x.ndim - len(axes)), x.shape)
            # The callback is called for local shards only, so each host copies the rows of its own devices.
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(place, tree)


def move_layout(layout: Layout, devices: Sequence[jax.Device]) -> Layout:
    """The same layout on other devices, as many as its mesh has."""
    arranged = np.array(devices).reshape(layout.mesh.devices.shape)
    return dataclasses.replace(
        layout, mesh=Mesh(arranged, layout.mesh.axis_names, axis_types=layout.mesh.axis_types)
    )


def is_spec(x: Any) -> bool:
    """Tell whether x is a ParamSpec; `is_leaf` for trees of them."""
    return isinstance(x, ParamSpec)


def make_shardings(layout: Layout, specs: Any) -> Any:
    """Make the tree of NamedSharding for a tree of ParamSpec."""
    return jax.tree.map(lambda s: layout.sharding(s.axes, s.shape), specs, is_leaf=is_spec)


def check_sharding(layout: Layout, specs: Any) -> None:
    """Raise ValueError if a parameter of over 1 MiB has a sharding rule, but would be replicated.

    Only meshes with an `fsdp` axis are checked: they are chosen to save memory.
    """
    # Replicated although a rule names a mesh axis: its size does not divide the dimension.
    fsdp = layout.mesh.shape["fsdp"]
    for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec):
        sharding = layout.sharding(spec.axes, spec.shape)
        has_sharded_axis = any(layout.first_ways(axis) > 1 for axis in spec.axes)
        is_large = 4 * math.prod(spec.shape) > 2**20  # bytes, in f32
        is_replicated = sharding.shard_shape(spec.shape) == spec.shape
        if fsdp > 1 and has_sharded_axis and is_large and is_replicated:
            raise ValueError(
                f"mesh {dict(layout.mesh.shape)} does not divide {jax.tree_util.keystr(path)} of shape "
                f"{spec.shape}, of which every device would have a full copy: choose sizes that divide it"
            )


def abstract_params(layout: Layout, specs: Any) -> Any:
    """Make the tree of ShapeDtypeStruct with shardings for a tree of ParamSpec."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout.sharding(s.axes, s.shape)),
        specs,
        is_leaf=is_spec,
    )


def init_params(key: jax.Array, specs: Any, layout: Layout) -> Any:
    """Draw initial values in f32, sharded by the layout, and round them to the types of the declarations.

    Each parameter's bits depend on the key and on the parameter's own path: not on other parameters or the
    mesh.
    """
    leaves, treedef = jax.tree.flatten_with_path(specs, is_leaf=is_spec)

    # Under jit with output shardings, each device draws only its own shards; threefry's bits do not depend on
    # it.  On one device parameters are drawn flat: the bits are the same, and the program compiles in a quarter of
    # the time.
    def draw_normal(key, spec):
        shape = (math.prod(spec.shape),) if layout.single_device else spec.shape
        return (spec.scale * jax.random.normal(key, shape, jnp.float32)).reshape(spec.shape)

    def draw(key):
        params = []
        for path, spec in leaves:
            name = jax.tree_util.keystr(path)
            # The path is folded in, so parameters keep their values if others are added or reordered.
            path_key = jax.random.fold_in(key, int.from_bytes(name.encode(), "little") % (2**31 - 1))
            if spec.init == "normal":
                params.append(draw_normal(path_key, spec))
            elif spec.init == "zeros":
                params.append(jnp.zeros(spec.shape, jnp.float32))
            elif spec.init == "ones":
                params.append(jnp.ones(spec.shape, jnp.float32))
            else:
                raise ValueError(f"{name}: init {spec.init!r} is none of normal, zeros, ones")
            params[-1] = params[-1].astype(spec.dtype)
        return jax.tree.unflatten(treedef, params)

    return jax.jit(draw, out_shardings=make_shardings(layout, specs))(key)
