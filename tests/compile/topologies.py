"""Devices that are not there, for XLA's TPU and GPU compilers; without the compiler the caller skips."""

from __future__ import annotations

import numpy as np
import pytest

from cooper_jax.perf import chips
from cooper_jax.settings.setup_errors import SetupError

MACHINES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4", "h100": "h100:1x1x8"}


def devices(chip: str) -> np.ndarray:
    """The devices of a 16-chip TPU slice ("v5e", "v5p", "v6e") or of a host with 8 GPUs ("h100")."""
    return np.asarray(topology(chip).devices)


def topology(chip: str) -> chips.Topology:
    try:
        return chips.find_topology(MACHINES[chip])
    except SetupError as error:
        if "compiler is absent" not in str(error):
            raise
        pytest.skip(str(error))
