"""Device layouts of a run's models: meshes of the available devices, from the config's `mesh` section."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.runtime import mesh
from cooper_jax.settings import typed_config
from cooper_jax.settings.setup_errors import setup_errors

# The models, and the training rollouts (rollout.ahead=1).
USERS = ("policy", "reward", "reference", "assistant", "rollout")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Settings of the devices: the config's `mesh` section."""

    # The policy's mesh: devices along each axis; one axis may be -1, which takes the remaining devices.
    data: int
    fsdp: int
    tensor: int
    across: str  # the axis that spans slices
    collective_matmul: bool  # see mesh.Layout.compiler_options

    # Meshes of the other models, and of the rollouts, on devices of their own, as in "1x2x1"; "": the policy's mesh
    # and devices.
    reward: str
    reference: str
    assistant: str
    rollout: str

    # Sharding rules (logical axis, mesh axis): the first rule that fits an array applies.
    rules: mesh.Rules
    rollout_rules: mesh.Rules  # tried first for a rollout's copy of the weights

    @classmethod
    def from_config(cls, section: ConfigDict) -> MeshConfig:
        """Read the `mesh` section.  Raises SetupError for a field that is missing."""
        rules = {name: _freeze(section[name]) for name in ("rules", "rollout_rules")}
        return typed_config.read_section(cls, section, "mesh", **rules)

    def read_own_sizes(self) -> dict[str, tuple[int, int, int]]:
        """Parse the mesh sizes, data x fsdp x tensor, of the USERS with devices of their own.

        Raises SetupError for text that is no mesh.
        """
        sizes = {}
        for name in USERS[1:]:
            if text := getattr(self, name):
                with setup_errors(f"mesh.{name}"):
                    sizes[name] = mesh.parse_sizes(text)
        return sizes


def lay_out_models(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> dict[str, mesh.Layout]:
    """Make the layout of each of USERS; those without devices of their own share the policy's.

    devices: None for all devices of all hosts.  Raises SetupError for a mesh that the devices do not fill.
    """
    sizes = config.read_own_sizes()

    def make_layout(own_devices: Sequence[jax.Device], data: int, fsdp: int, tensor: int) -> mesh.Layout:
        model_mesh = mesh.make_mesh(data, fsdp, tensor, own_devices, config.across)
        return mesh.Layout(model_mesh, config.rules, config.rollout_rules, config.collective_matmul)

    # Reserve first: an axis of -1 in the policy's mesh takes the devices that remain.
    with setup_errors("mesh"):
        shared, own = mesh.split_devices(jax.devices() if devices is None else devices, sizes)
        policy = make_layout(shared, config.data, config.fsdp, config.tensor)
        layouts = dict.fromkeys(USERS, policy)
        for name, own_devices in own.items():
            layouts[name] = make_layout(own_devices, *sizes[name])
    return layouts


def make_layouts(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> dict[str, mesh.Layout]:
    """Lay out the models of a whole config, as `lay_out_models` does."""
    return lay_out_models(MeshConfig.from_config(cfg.mesh), devices)


def make_policy_layout(cfg: ConfigDict) -> mesh.Layout:
    """Make the policy's layout for a whole config."""
    return make_layouts(cfg)["policy"]


def _freeze(value: Any) -> Any:
    """Convert nested lists to tuples, which are hashable, as a static argument of jit must be."""
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value
