"""A worker process of the rule verifier: computes the verdicts of rule_verdict.py, one at a time.

It is started by the path of this file, and imports only rule_verdict.py and answer_parser.py from this
project (so no jax).  It exchanges JSON lines with its parent, verifier.py:

    stdin    {"reference": ..., "completion": ..., "limit": seconds}
    stdout   {"verdict": "correct" | "wrong" | "no_answer" | "unrecognised" | "memory"}

The first line of output is {"verdict": "ready", "unlimited": ...}.  The second field is the reason why no
memory limit could be set, or "".  The process exits when its input ends, and therefore when its parent
exits.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

ORPHAN_GRACE = 5.0  # seconds beyond an item's time limit after which a process without a parent kills itself


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
    # stdout is reserved for replies: redirect everything that a library prints to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    # Ctrl-C and SIGTERM reach the whole process group; the parent handles them and ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    unlimited = limit_memory(int(sys.argv[1]))

    # The parent keeps this file's folder off sys.path (-P), because our module names could shadow a
    # library's. The project's root is appended instead, so that the package is found even if it is not
    # installed.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import math_verify

    from cooper_jax.rule import rule_verdict

    # math-verify warns that its timeouts are off, which is intended.
    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)

    # The first verdict builds parsers, which takes time that must not count against an item.
    rule_verdict.judge_answer("4a", "\\boxed{2(a+a)}")
    print(json.dumps({"verdict": "ready", "unlimited": unlimited}), file=replies, flush=True)

    for line in sys.stdin.buffer:
        request = json.loads(line)

        # The parent kills this process at the time limit.  If the parent has died, SIGALRM does, even
        # within a long C call, because its default action needs no Python handler.
        signal.setitimer(signal.ITIMER_REAL, request["limit"] + ORPHAN_GRACE)
        try:
            verdict = rule_verdict.judge_answer(request["reference"], request["completion"])
        except MemoryError:
            verdict = "memory"
        except Exception:
            # math-verify and sympy raise many kinds of exceptions on values that they cannot handle: abstain.
            verdict = rule_verdict.UNRECOGNISED
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)


if __name__ == "__main__":
    main()
