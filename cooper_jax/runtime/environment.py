"""The environment of a job: versions, system and devices, which jobs store in `environment.json`."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from etils import epath

from cooper_jax import __version__
from cooper_jax.runtime.remote_files import write_atomically

ENVIRONMENT = "environment.json"
# Packages whose version can change numbers or speed.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
# The checkout, if this package is not an installed one.
CHECKOUT = Path(__file__).resolve().parents[2]


def write_environment(folder: Path | epath.Path) -> None:
    """Write the environment into a folder; it replaces that of an earlier start."""
    text = json.dumps(describe_environment(), indent=2)
    write_atomically(folder / ENVIRONMENT, text.encode() + b"\n")


def describe_environment() -> dict[str, Any]:
    """Describe versions, system and devices as JSON values; neither host name nor user nor paths."""
    devices = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cooper_jax": __version__,
        "commit": find_commit(),
        "python": platform.python_version(),
        "packages": {name: _find_version(name) for name in PACKAGES},
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "processes": jax.process_count(),
        "backend": jax.default_backend(),
        "devices": dict(devices),  # kind -> number
    }


def find_commit() -> str | None:
    """Return the checkout's commit, with "+" if tracked files differ from it; None for an installed package."""
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        commit = _run_git("rev-parse", "HEAD")
        changed = _run_git("status", "--porcelain", "--untracked-files=no")
    # A job needs no git: without it, or where it refuses the folder, the commit is not known.
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _run_git(*words: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
