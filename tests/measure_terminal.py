"""Measures how long the terminal of a training run stands still: screens of tmux, read ten times a second.

    python tests/measure_terminal.py
    python tests/measure_terminal.py --cold -- --config=configs/tiny.py --config.steps=3 --config.eval.every=1

Arguments behind -- replace --config=configs/tiny.py --config.steps=3.  --cold uses an empty compilation cache.
Printed are the seconds until the first line, the longest times without any change of the screen, and the longest
times in which the last line said the same but for its numbers, which count seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import terminal_recording

SHOWN = 5
TIMEOUT = 3 * 3600  # seconds


def main(arguments: list[str]) -> None:
    """Measure the run that the arguments name."""
    own, given = arguments, ["--config=configs/tiny.py", "--config.steps=3"]
    if "--" in arguments:
        own, given = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    if unknown := set(own) - {"--cold"}:
        sys.exit(
            f"error: {' '.join(sorted(unknown))}: the one flag is --cold; those of the run come after --"
        )
    if not terminal_recording.is_available():
        sys.exit("error: tmux is not installed")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = dict(os.environ)
        if own:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        command = [sys.executable, str(ROOT / "launch/train.py"), *given]
        recording = terminal_recording.record_terminal(
            [*command, f"--config.run_dir={folder / 'run'}"], folder, environment, timeout=TIMEOUT
        )
    print(recording.text)
    print(f"\n{recording.seconds:.0f} s, {len(recording.frames)} screens")
    first = next(frame for frame in recording.frames if frame.text)
    print(f"the first line came after {first.seconds:.1f} s: {first.last_line}")
    print("the longest times without a change of the screen, with its last line")
    # The empty screen before the first line, and the last one, which has the summary, are no gaps.
    last = recording.frames[-1]
    gaps = [(seconds, frame) for seconds, frame in recording.list_gaps() if frame.text and frame is not last]
    for seconds, frame in gaps[:SHOWN]:
        print(f"  {seconds:5.1f} s  {frame.last_line}")
    print("the longest times in which the last line said the same but for its numbers")
    for seconds, words in recording.list_descriptions()[:SHOWN]:
        print(f"  {seconds:5.1f} s  {words}")
    print(f"the process ended {recording.seconds - last.seconds:.1f} s after its last line")


if __name__ == "__main__":
    main(sys.argv[1:])
