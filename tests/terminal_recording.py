"""Records what a command shows on a terminal: tmux runs it, and its screen is read several times a second."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL = 0.1  # seconds between two looks at the screen
SCROLLED = 10000  # lines that tmux keeps above the screen


@dataclasses.dataclass(frozen=True)
class Frame:
    """A screen that differs from the one before."""

    seconds: float  # since the command was started
    text: str

    @property
    def last_line(self) -> str:
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


@dataclasses.dataclass(frozen=True)
class Recording:
    """The screens of a command, and all that it left on the terminal."""

    frames: list[Frame]
    text: str  # the lines that stayed
    seconds: float  # until the command ended

    def list_gaps(self) -> list[tuple[float, Frame]]:
        """The time that each screen stood, the longest first."""
        ends = [*(frame.seconds for frame in self.frames[1:]), self.seconds]
        gaps = [(end - frame.seconds, frame) for frame, end in zip(self.frames, ends, strict=True)]
        return sorted(gaps, key=lambda gap: -gap[0])

    def list_descriptions(self) -> list[tuple[float, str]]:
        """How long the last line said the same but for its numbers, the longest first."""
        found: list[tuple[float, str]] = []
        began, said = 0.0, None
        for frame in [*self.frames, Frame(self.seconds, "")]:
            words = re.sub(r"\d[\d.,:/]*", "#", frame.last_line)
            words = re.sub(r"(# h |# min )*# s\b", "# s", words)
            if words != said:
                if said is not None:
                    found.append((frame.seconds - began, said))
                began, said = frame.seconds, words
        return sorted(found, key=lambda entry: -entry[0])


def is_available() -> bool:
    """True if tmux is installed."""
    return shutil.which("tmux") is not None


def record_terminal(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    columns: int = 120,
    lines: int = 40,
    timeout: float = 1800,
) -> Recording:
    """Run a command on a terminal of its own until it ends, and return what was seen.

    folder: for tmux's socket, and for the file that says that the command has ended.

    Raises TimeoutError.
    """
    socket, ended = folder / "tmux", folder / "ended"
    tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
    # tmux gives the session this process's environment, except for what its server was started with.
    text = f"{shlex.join(command)}; echo $? > {shlex.quote(str(ended))}; sleep 1000"
    begun = time.monotonic()
    subprocess.run(
        [*tmux, "set-option", "-g", "history-limit", str(SCROLLED), ";", "new-session", "-d"]
        + ["-x", str(columns), "-y", str(lines), text],
        env=dict(environment or os.environ),
        check=True,
    )
    frames = [Frame(0.0, "")]
    try:
        while not ended.exists():
            screen = _capture(tmux)
            now = time.monotonic() - begun
            if screen != frames[-1].text:
                frames.append(Frame(now, screen))
            if now > timeout:
                raise TimeoutError(f"after {timeout:.0f} s the screen is\n{screen}")
            time.sleep(POLL)
        seconds = time.monotonic() - begun
        return Recording(frames, _capture(tmux, "-S", "-", "-J"), seconds)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def _capture(tmux: Sequence[str], *flags: str) -> str:
    done = subprocess.run([*tmux, "capture-pane", "-p", *flags], capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).rstrip()
