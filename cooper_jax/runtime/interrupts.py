"""Ctrl-C where nothing is to be saved: the process ends at once, with a code and without a traceback."""

from __future__ import annotations

import os
import signal
from typing import Any

INTERRUPTED = 130  # exit code, as a shell shows for a process that Ctrl-C has ended


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process at once, unless it ignores Ctrl-C or has a handler of its own."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_now)


def end_now(number: int, frame: Any) -> None:
    """Handle a SIGINT: end without cleaning up, since threads and devices may be in the middle of something."""
    # os.write may be called in a signal handler; print may not.  The sequence shows a terminal's cursor again.
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)
