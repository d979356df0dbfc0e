"""Runs on a disk that fills: what is lost, what is said, and whether the run goes on when there is room again.

    python tests/fill_disk.py           as root, who may mount a file system in memory

1. A run of two steps is copied to a tmpfs.
2. A file takes the room that is left, but for some KiB, and the same command is to do two steps more.  It must end
   with exit code 2 and one line, and with a whole checkpoint.
3. The file is deleted.  The same command must end with code 0, and with the metrics of a run that had room.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import tiny_runs

SIZE = 64  # MiB of the disk
FREE = (
    0,
    64,
    96,
    256,
)  # KiB that are left: too few for the start, for metrics, for samples, for a checkpoint
SHORT = {
    "reward.arm": "rule", "reward.recipe": "", "supervised.policy_steps": 2, "supervised.reward_steps": 0,
    "checkpoint.every": 1, "checkpoint.keep": 1, "eval.every": 0, "eval.reward_rows": 0, "log.giveaway_every": 0,
}  # fmt: skip


def digest_checkpoints(run: Path) -> dict[str, str]:
    """The digests of all files of the checkpoints, by path."""
    files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fill(disk: Path, free: int) -> None:
    """Write a file that leaves `free` KiB of a file system."""
    left = shutil.disk_usage(disk).free - free * 1024
    with open(disk / "filler", "wb") as file:
        file.write(bytes(max(left, 0)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk, whole, begun = Path(folder, "disk"), Path(folder, "whole"), Path(folder, "begun")
        disk.mkdir()
        for path, steps in ((begun, 2), (whole, 4)):
            done = tiny_runs.run(path, **SHORT, steps=steps)
            assert done.returncode == 0, done.stderr
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            print(f"a run of {steps} steps takes {size} bytes", flush=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(disk)], check=True)
        try:
            for free in FREE:
                try_full_disk(disk, begun, whole, free)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def try_full_disk(disk: Path, begun: Path, whole: Path, free: int) -> None:
    """Do the three steps above, and print what the run said."""
    run = disk / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(begun, run)
    before = digest_checkpoints(run)

    fill(disk, free)
    stopped = tiny_runs.run(run, **SHORT, steps=4)
    # Threads of libraries meet the same full disk: a line each (launch/library_errors.py).
    errors = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    others = stopped.stderr.count("Traceback (most recent call last)")
    steps = [row["step"] for row in tiny_runs.metrics(run)]
    print(
        f"{free} KiB left: exit code {stopped.returncode} after step {steps[-1]}, {others} tracebacks: {errors}",
        flush=True,
    )
    after = digest_checkpoints(run)
    newest = max(path.split("/")[1] for path in before)
    lost = [path for path in before if path.split("/")[1] == newest and after.get(path) != before[path]]
    assert stopped.returncode == 2 and len(errors) == 1 and not others, stopped.stderr
    assert not lost or steps[-1] > 2, lost

    (disk / "filler").unlink()
    done = tiny_runs.run(run, **SHORT, steps=4)
    assert done.returncode == 0, done.stderr
    rows = [tiny_runs.timeless(tiny_runs.metrics(path)) for path in (run, whole)]
    assert rows[0] == rows[1], "the resumed run is another"
    print(f"{free} KiB left: resumed, with the metrics of a run that had room", flush=True)


if __name__ == "__main__":
    main()
