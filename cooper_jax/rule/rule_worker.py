"""One worker process of the rule verifier: verdicts of `rule_judge.py`, one at a time.

It is started by path, imports nothing of this project but `rule_judge.py` and what that reads with (so no jax), and
speaks JSON lines:

    in   {"reference": ..., "completion": ..., "limit": seconds}
    out  {"verdict": "correct" | "wrong" | "no_answer" | "unrecognised" | "memory"}

The first line out is {"verdict": "ready", "unlimited": why no memory limit could be set, or ""}.  The process ends
with its input: that is, with its parent.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

GRACE = 5.0  # seconds after the parent's limit at which an orphan ends itself


def limit_memory(megabytes: int) -> str:
    """Cap the address space of this process, in MiB; 0 leaves it alone.

    Returns "", or the reason where the platform refuses the limit, as macOS does.
    """
    import resource

    try:
        if megabytes:
            resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ValueError, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def main() -> None:
    # Whatever a library prints must not end up among the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):  # which reach the whole group: the parent's to answer
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    unlimited = limit_memory(int(sys.argv[1]))
    # The parent starts this file with its folder off the path, where our names could hide a library's; where the
    # package itself is not installed, it is found from here.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import math_verify

    from cooper_jax.rule import rule_verdict

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that its timeouts are off
    rule_verdict.judge_answer(
        "4a", "\\boxed{2(a+a)}"
    )  # the first verdict builds parsers, which is no item's fault
    print(json.dumps({"verdict": "ready", "unlimited": unlimited}), file=replies, flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The parent kills at the limit.  Should it be gone, the kernel does, even inside one long C call.
        signal.setitimer(signal.ITIMER_REAL, request["limit"] + GRACE)
        try:
            verdict = rule_verdict.judge_answer(request["reference"], request["completion"])
        except MemoryError:
            verdict = "memory"
        except Exception:  # sympy raises of every kind on values that it cannot work with: abstain
            verdict = rule_verdict.UNRECOGNISED
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)


if __name__ == "__main__":
    main()
