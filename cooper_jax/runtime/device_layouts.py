"""What a config says of devices: where each model lives, and what a rollout may take and run there."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from cooper_jax.runtime import mesh
from cooper_jax.settings.setup_errors import setup_errors


def make_layouts(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> dict[str, mesh.Layout]:
    """Where each model lives, by its name: the config's meshes over the devices at hand, with their rules."""
    m = cfg.mesh

    def frozen(x):
        return tuple(frozen(y) for y in x) if isinstance(x, list | tuple) else x

    def layout(devices, data, fsdp, tensor):
        made = mesh.make_mesh(data, fsdp, tensor, devices, m.across)
        return mesh.Layout(made, frozen(m.rules), frozen(m.rollout_rules))

    sizes = {}
    for name, asked in (("reward", m.reward), ("reference", m.reference), ("assistant", m.assistant)):
        with setup_errors(f"mesh.{name}"):
            sizes |= {name: mesh.parse_sizes(asked)} if asked else {}
    with setup_errors("mesh"):
        left, taken = mesh.split_devices(jax.devices() if devices is None else devices, sizes)
        out = dict.fromkeys(
            ("policy", "reward", "reference", "assistant"), layout(left, m.data, m.fsdp, m.tensor)
        )
        return out | {name: layout(own, *sizes[name]) for name, own in taken.items()}


def make_policy_layout(cfg: ConfigDict) -> mesh.Layout:
    """The policy's."""
    return make_layouts(cfg)["policy"]


def get_rollout_options(cfg: ConfigDict) -> dict[str, float | str | None]:
    """What holds for every rollout of a run: the bounds of its slots, and its kernels."""
    r = cfg.rollout
    implementation = None if r.kernels == "auto" else r.kernels
    return dict(
        max_rows=r.max_rows or None,
        memory_gib=r.memory_gib or None,
        weight_placement=r.weight_placement,
        implementation=implementation,
    )
