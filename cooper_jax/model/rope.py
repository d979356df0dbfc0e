"""Rotary position embeddings: base and scaling, as Hugging Face's `config.json` states them.

Two scalings change the frequencies once and for all: "linear" divides all of them, "llama3" the low ones.
Scalings that depend on a row's length ("dynamic", "yarn", "longrope") are refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np

from cooper_jax.settings.value_rules import show_value


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of low rotary frequencies to longer contexts (Hugging Face: rope_type "llama3")."""

    factor: float  # by which the longest wavelengths are stretched
    # Bounds of the interpolation, in turns per original context length (see compute_frequencies).
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int  # context length of pre-training, tokens


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Linear scaling of all rotary frequencies to longer contexts (Hugging Face: rope_type "linear")."""

    factor: float  # by which all wavelengths are stretched


Scaling: TypeAlias = RopeScaling | LinearScaling | None


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer."""

    theta: float  # base of the frequencies
    scaling: Scaling = None


def compute_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Compute the angles per position, in radians -> f64[h / 2]."""
    freqs = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    s = rope.scaling
    if isinstance(s, LinearScaling):
        return freqs / s.factor
    if isinstance(s, RopeScaling):
        # Wavelengths above (original context / low_freq_factor) are stretched by `factor`, those below
        # (original context / high_freq_factor) stay; in between, frequencies are interpolated.
        turns = s.original_max_len * freqs / (2 * np.pi)
        kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        return freqs * (kept + (1 - kept) / s.factor)
    return freqs


def read_rope(hf: dict[str, Any], where: str, default_theta: float) -> Rope:
    """Read RoPE's base and scaling from `rope_parameters` (transformers 5), or from version 4's two keys.

    Raises ValueError, naming `where` (the file), for another scaling.
    """
    # Version 5 has the base and the scaling in one dict; version 4 has the base at the top level.
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if hf.get(key) is not None:
            rope |= {name: value for name, value in hf[key].items() if value is not None}
            # transformers refuses such an object, too: what the model was trained with is unknown.
            if not {"rope_type", "type", "rope_theta"} & rope.keys():
                raise ValueError(f"{where}: {key} has no rope_type: it must have one, or be null")
    # Later entries win: the dict, then the top level, then transformers' defaults.
    theta = float(({"rope_theta": default_theta} | hf | rope)["rope_theta"])

    # Version 5 writes it here; families.py checks version 4's key.
    if rope.get("partial_rotary_factor", 1) != 1:
        factor = rope["partial_rotary_factor"]
        raise ValueError(f"{where}: partial_rotary_factor is {show_value(factor)}; only 1 is supported")

    # Old files write "type" instead of "rope_type".
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        _need(rope, ("factor",), kind, where)
        return Rope(theta, LinearScaling(float(rope["factor"])))

    if kind != "llama3":
        raise ValueError(
            f"{where}: rope_type is {show_value(kind)}; only default, linear and llama3 are supported"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    _need(rope, keys, kind, where)
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_len=int(rope["original_max_position_embeddings"]),
    )
    # Frequencies are interpolated between the two, by their difference.
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"{where}: low_freq_factor is {scaling.low_freq_factor:g}: it must be below high_freq_factor "
            f"({scaling.high_freq_factor:g})"
        )
    return Rope(theta, scaling)


def _need(rope: dict[str, Any], keys: tuple[str, ...], kind: str, where: str) -> None:
    missing = [k for k in keys if k not in rope]
    if missing:
        raise ValueError(f"{where}: the {kind} rope scaling lacks {', '.join(missing)}")


def write_scaling(scaling: Scaling) -> dict[str, Any] | None:
    """Convert a scaling to config.json's `rope_scaling`, the key of version 4, which version 5 reads, too."""
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_len,
    }
