"""A worker process of the rule verifier: it computes the verdicts of rule_verdict.py, one at a time.

It is started by path, imports nothing of this project but rule_verdict.py and answer_parser.py (so no jax),
and exchanges JSON lines with its parent, verifier.py:

    stdin    {"reference": ..., "completion": ..., "limit": seconds}
    stdout   {"verdict": "correct" | "wrong" | "no_answer" | "unrecognised" | "memory"}

The first line of its output is {"verdict": "ready", "unlimited": ...}, where the second field is the reason
why no memory limit could be set, or "".  The process ends when its input does, and so with its parent.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

ORPHAN_GRACE = 5.0  # seconds after the parent's limit at which a process without a parent ends itself


def limit_memory(megabytes: int) -> str:
    """Limit the address space of this process, in MiB; 0 sets no limit.

    Returns "", or the reason why the platform refuses the limit, as macOS does.
    """
    import resource

    try:
        if megabytes:
            resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ValueError, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def main() -> None:
    # stdout carries replies alone: what a library prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    # These signals reach the whole process group; the parent handles them, and ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    unlimited = limit_memory(int(sys.argv[1]))

    # The parent keeps this file's folder off sys.path, where our module names could hide a library's.  A
    # package that is not installed is found through its own path.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import math_verify

    from cooper_jax.rule import rule_verdict

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that its timeouts are off
    # The first verdict builds parsers, whose time must not count against an item.
    rule_verdict.judge_answer("4a", "\\boxed{2(a+a)}")
    print(json.dumps({"verdict": "ready", "unlimited": unlimited}), file=replies, flush=True)

    # The loop ends when the parent closes the pipe, or dies.
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The parent kills this process at the limit.  If the parent is gone, the kernel does, even inside a C
        # call.
        signal.setitimer(signal.ITIMER_REAL, request["limit"] + ORPHAN_GRACE)
        try:
            verdict = rule_verdict.judge_answer(request["reference"], request["completion"])
        except MemoryError:
            verdict = "memory"
        except Exception:  # sympy raises exceptions of every kind on values that it cannot work with: abstain
            verdict = rule_verdict.UNRECOGNISED
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)


if __name__ == "__main__":
    main()
