"""Runs of seconds, as a user starts them: processes of `launch/train.py`, alone or several of one run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parents[1]

# A Cooper run of seconds: the tiny config, made tinier.
SMALL = {
    "steps": 4,
    "data.prompts_per_step": 8,
    "data.synthetic_size": 32,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 24,
    "policy.arch.width": 32,
    "policy.arch.ffn": 64,
    "policy.arch.head_dim": 8,
    "reward.arch.width": 32,
    "reward.arch.ffn": 64,
    "reward.arch.head_dim": 8,
    "supervised.policy_steps": 250,
    "supervised.policy_habit": (0.0, 0.0),
    "supervised.policy_batch": 16,
    "supervised.policy_corrupt": 0.0,
    "supervised.policy_optimiser.lr": 5e-3,
    "supervised.reward_steps": 10,
    "eval.every": 2,
    "eval.problems": 8,
    "eval.greedy": False,
    "eval.reward_rows": 8,
    "reward.recipe": "sigmoid",
    "checkpoint.every": 2,
    "checkpoint.keep": 0,
    "log.samples_every": 1,
}


def command(run_dir: Path, config: str = "configs/tiny.py", **changes) -> list[str]:
    flags = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        sys.executable,
        str(ROOT / "launch/train.py"),
        f"--config={ROOT / config}",
        f"--config.run_dir={run_dir}",
        *(f"--config.{name}={value}" for name, value in flags.items()),
    ]


def environment(devices: int = 1) -> dict[str, str]:
    """The tests' own virtual devices are for the tests' own process; a run here has one, or says otherwise."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    assert f"device_count={devices}" in flags
    return os.environ | {"XLA_FLAGS": flags}


def run(run_dir: Path, devices: int = 1, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(run_dir, **changes), env=environment(devices), capture_output=True, text=True, timeout=900
    )


def assert_refused(path: Path, *words: str, **changes) -> None:
    """Check that a run ends with code 2 and a message, no traceback, in which all `words` occur."""
    done = run(path, **changes)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    for word in words:
        assert word in said, f"{word!r} is not in:\n{said}"


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def begun_again(finished: Path, path: Path) -> Path:
    """A copy of a run as it stood at step 0, its supervised phases done: for another mesh to go on from."""
    shutil.copytree(finished, path)
    for step in (path / "checkpoints").iterdir():
        if step.name != "0":
            shutil.rmtree(step)
    return path


def parameters(run_dir: Path, step: int, model: str) -> np.ndarray:
    """All of a checkpoint's parameters, one after another, whatever devices it was saved from."""
    path = run_dir / "checkpoints" / str(step) / model
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as files:
        shapes = files.metadata(path).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = files.restore(path, ocp.args.PyTreeRestore(restore_args=kinds))
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def start_hosts(
    run_dir: Path, processes: int, devices: int, out: Path, program: str = "", **changes
) -> list[subprocess.Popen]:
    """The processes of one run, each with so many virtual devices; what process i says goes to `out`/i.

    program: Python text to run instead of launch/train.py.
    """
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for i in range(processes):
        peers = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(processes), JAX_PROCESS_ID=str(i))
        with open(out / str(i), "wb") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", program] if program else command(run_dir, **changes),
                    env=environment(devices) | peers,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return started
