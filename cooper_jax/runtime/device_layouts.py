"""Device layouts of a run's models: the config's `mesh` section, laid over the devices at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.runtime import mesh
from cooper_jax.settings import typed_config
from cooper_jax.settings.setup_errors import setup_errors

MODELS = ("policy", "reward", "reference", "assistant")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Settings of the devices: the config's `mesh` section."""

    data: int  # devices along each axis of the policy's mesh; -1: all that are left, on one axis
    fsdp: int
    tensor: int
    across: str  # the axis that spans slices
    reward: str  # a model's own mesh, as in "1x2x1"; "": the policy's
    reference: str
    assistant: str
    rules: mesh.Rules  # (logical axis, mesh axis), the first that fits
    rollout_rules: mesh.Rules  # tried first for a rollout's copy of the weights

    @classmethod
    def from_config(cls, section: ConfigDict) -> MeshConfig:
        """Read the `mesh` section.  Raises SetupError for a field that is missing."""
        rules = {name: _freeze(section[name]) for name in ("rules", "rollout_rules")}
        return typed_config.read_section(cls, section, "mesh", **rules)

    def read_own_sizes(self) -> dict[str, tuple[int, int, int]]:
        """The mesh sizes, data x fsdp x tensor, of the models that have devices of their own.

        Raises SetupError for text that is no mesh.
        """
        sizes = {}
        for name, text in (
            ("reward", self.reward),
            ("reference", self.reference),
            ("assistant", self.assistant),
        ):
            if text:
                with setup_errors(f"mesh.{name}"):
                    sizes[name] = mesh.parse_sizes(text)
        return sizes


def lay_out_models(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> dict[str, mesh.Layout]:
    """The layout of each of MODELS; those without devices of their own share the policy's.

    devices: all that there are, if None.  Raises SetupError for a mesh that the devices do not fill.
    """
    sizes = config.read_own_sizes()

    def make_layout(own_devices: Sequence[jax.Device], data: int, fsdp: int, tensor: int) -> mesh.Layout:
        made = mesh.make_mesh(data, fsdp, tensor, own_devices, config.across)
        return mesh.Layout(made, config.rules, config.rollout_rules)

    with setup_errors("mesh"):
        shared, own = mesh.split_devices(jax.devices() if devices is None else devices, sizes)
        policy = make_layout(shared, config.data, config.fsdp, config.tensor)
        layouts = dict.fromkeys(MODELS, policy)
        for name, own_devices in own.items():
            layouts[name] = make_layout(own_devices, *sizes[name])
    return layouts


def make_layouts(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> dict[str, mesh.Layout]:
    """Lay out the models of a whole config, as `lay_out_models` does."""
    return lay_out_models(MeshConfig.from_config(cfg.mesh), devices)


def make_policy_layout(cfg: ConfigDict) -> mesh.Layout:
    """The policy's layout for a whole config."""
    return make_layouts(cfg)["policy"]


def _freeze(value: Any) -> Any:
    """Nested lists as tuples, which are hashable."""
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value
