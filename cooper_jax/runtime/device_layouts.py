"""Layouts from a config: the mesh and rules of each model, and the limits and kernels of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.runtime import mesh
from cooper_jax.settings.setup_errors import setup_errors


def make_layouts(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> dict[str, mesh.Layout]:
    """Make the layout of each model, by its name: policy, reward, reference and assistant.

    Models without a mesh of their own share the policy's, which takes the remaining devices (default: all
    devices).  Raises SetupError for meshes that the devices do not fill.
    """
    section = cfg.mesh
    rules, rollout_rules = _freeze(section.rules), _freeze(section.rollout_rules)

    def make_layout(devices: Sequence[jax.Device], data: int, fsdp: int, tensor: int) -> mesh.Layout:
        return mesh.Layout(mesh.make_mesh(data, fsdp, tensor, devices, section.across), rules, rollout_rules)

    sizes: dict[str, tuple[int, int, int]] = {}
    for name in ("reward", "reference", "assistant"):
        with setup_errors(f"mesh.{name}"):
            if section[name]:
                sizes[name] = mesh.parse_sizes(section[name])

    # The policy's mesh takes what is left after the other models' devices.
    with setup_errors("mesh"):
        remaining, own_devices = mesh.split_devices(jax.devices() if devices is None else devices, sizes)
        shared = make_layout(remaining, section.data, section.fsdp, section.tensor)
        layouts = dict.fromkeys(("policy", "reward", "reference", "assistant"), shared)
        for name, devices_of_model in own_devices.items():
            layouts[name] = make_layout(devices_of_model, *sizes[name])
        return layouts


def _freeze(x: Any) -> Any:
    """Turn nested lists into nested tuples, which are hashable."""
    return tuple(_freeze(y) for y in x) if isinstance(x, list | tuple) else x


def make_policy_layout(cfg: ConfigDict) -> mesh.Layout:
    """Make the policy's layout over all devices."""
    return make_layouts(cfg)["policy"]


def get_rollout_options(cfg: ConfigDict) -> dict[str, float | str | None]:
    """Arguments that all rollouts of a run share: the limits of the slots, weight placement, kernels."""
    section = cfg.rollout
    return dict(
        max_rows=section.max_rows or None,
        memory_gib=section.memory_gib or None,
        weights=section.weights,
        implementation=None if section.kernels == "auto" else section.kernels,
    )
