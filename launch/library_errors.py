"""One line, not a traceback, for what threads of the libraries meet on a full disk.

The run itself ends with one line and exit code 2 when it cannot write.  Threads of Orbax and tensorboardX meet the
same full disk, and Python prints a traceback for each.  Every other error of a thread is printed as usual.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import traceback
from logging import ERROR, LogRecord
from types import TracebackType

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def shorten_disk_errors() -> None:
    """Print one line for an error of a full disk in a thread, or in a function that runs at the program's end.

    What follows from it inside a library, whose event loop is closed by then, is not printed.
    """
    report_in_thread, report_at_end, report = threading.excepthook, sys.unraisablehook, sys.excepthook

    def report_thread_error(args: threading.ExceptHookArgs) -> None:
        if not _print_if_disk_is_full(args.exc_value, args.exc_traceback):
            report_in_thread(args)

    def report_error_at_end(args: sys.UnraisableHookArgs) -> None:
        if not _print_if_disk_is_full(args.exc_value, args.exc_traceback):
            report_at_end(args)

    def report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Tensorstore calls Orbax back from its own threads, after the save has failed and the run has reported it.
        is_late = kind is RuntimeError and str(error) == "Event loop is closed"
        if not (is_late and threading.current_thread() is not threading.main_thread()):
            report(kind, error, trace)

    threading.excepthook, sys.unraisablehook = report_thread_error, report_error_at_end
    sys.excepthook = report_error


def is_news(record: LogRecord) -> bool:
    """False for a logged error that the run reports itself.

    Orbax logs what it raises, and asyncio logs what a future of Orbax raised; runtime/checkpoint.py makes one line
    of the exception.
    """
    if record.levelno < ERROR:
        return True
    if record.name == "asyncio" and record.exc_info and record.exc_info[1] is not None:
        return not (
            _is_disk_full(record.exc_info[1]) or str(record.exc_info[1]).startswith("RESOURCE_EXHAUSTED")
        )
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _print_if_disk_is_full(error: BaseException | None, trace: TracebackType | None) -> bool:
    if error is None or not _is_disk_full(error):
        return False
    frames = traceback.extract_tb(trace)
    # The library and its file, as in tensorboardX/record_writer.py.
    where = os.sep.join(frames[-1].filename.split(os.sep)[-2:]) if frames else "a thread"
    print(f"warning: {where}: {error}", file=sys.stderr, flush=True)
    return True


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FULL
