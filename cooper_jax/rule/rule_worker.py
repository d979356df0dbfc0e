"""A worker process of the rule verifier: computes the verdicts of rule_verdict.py, one at a time.

It is started by the path of this file, and imports only cooper_jax/rule from this project (so no jax).  It
exchanges JSON lines with its parent, worker_process.py:

    stdin    {"reference": ..., "completion": ..., "limit": CPU seconds}
    stdout   {"verdict": "correct" | "wrong" | "no_answer" | "unrecognised" | "memory" | "timeout",
              "cpu": seconds, "error": the exception of a user's judge, or ""}

The first line of output is {"verdict": "ready", "unlimited": ...}.  The second field is the reason why no
memory limit could be set, or "".  The process exits when its input ends, and therefore when its parent exits.

With the argument `judge` the first line of input is {"path": ..., "name": ..., "text": ...}, the user's judge
(rule.judge), which then decides in place of rule_verdict.py; the items have "question" and "columns", too.

Two limits act on the CPU time of an item.  A timer interrupts Python code; the process then replies "timeout"
and goes on.  If a single C call does not come back, the kernel ends the process (RLIMIT_CPU, SIGXCPU) about a
second later, also if the parent has died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

KERNEL_GRACE = 0.3  # CPU seconds beyond an item's limit after which the kernel ends the process


class OutOfTime(BaseException):
    """Raised by the timer; no Exception, so that no library catches it."""


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


def set_cpu_limit(seconds: float) -> None:
    """Let the timer interrupt this process after more CPU seconds, and the kernel end it soon after."""
    import resource

    end = math.ceil(time.process_time() + seconds + KERNEL_GRACE)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = end if hard == resource.RLIM_INFINITY else min(end, hard)
    # Without the kernel's limit the parent replaces a process that does not come back.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def lift_cpu_limit() -> None:
    """Undo `set_cpu_limit`."""
    import resource

    signal.setitimer(signal.ITIMER_PROF, 0.0)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def main() -> None:
    # stdout is reserved for replies: redirect everything that a library prints to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    # Ctrl-C and SIGTERM reach the whole process group; the parent handles them and ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, _interrupt)
    unlimited = limit_memory(int(sys.argv[-1]))

    # The parent keeps this file's folder off sys.path (-P), because our module names could shadow a library's. The
    # project's root is appended instead, so that the package is found even if it is not installed.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    decide = _load_judge() if "judge" in sys.argv[1:-1] else _load_rule()
    print(json.dumps({"verdict": "ready", "unlimited": unlimited}), file=replies, flush=True)

    for line in sys.stdin.buffer:
        request = json.loads(line)
        started = time.process_time()
        verdict, error = decide(request)
        spent = round(time.process_time() - started, 4)
        print(json.dumps({"verdict": verdict, "cpu": spent, "error": error}), file=replies, flush=True)


# A request -> (verdict, error).
Decide = Callable[[Mapping[str, Any]], tuple[str, str]]


def _load_rule() -> Decide:
    """Prepare the rule's own verdicts."""
    from cooper_jax.rule import latex_parser, rule_verdict

    # The first verdict compiles expressions, which takes time that must not count against an item.
    rule_verdict.judge_answer("4a", "\\boxed{2(a+a)}")

    def decide(request: Mapping[str, Any]) -> tuple[str, str]:
        if "math_verify" not in sys.modules and latex_parser.needs_math_verify(request["reference"]):
            _import_math_verify()
        return judge_within(request["reference"], request["completion"], request["limit"]), ""

    return decide


def _load_judge() -> Decide:
    """Import the user's judge, whose text is the first line of the input."""
    from cooper_jax.rule import user_judge
    from cooper_jax.settings.user_code import UserCode, load_function

    code = UserCode(**json.loads(sys.stdin.buffer.readline()))
    judge = load_function(code, "rule.judge")

    def decide(request: Mapping[str, Any]) -> tuple[str, str]:
        errors: list[str] = []

        def ask() -> str:
            verdict, error = user_judge.ask_judge(judge, request, code.path)
            errors.append(error)
            return verdict

        verdict = run_within(ask, request["limit"])
        return verdict, "".join(errors)

    return decide


def judge_within(reference: str, completion: str, limit: float) -> str:
    """The rule's verdict on one item, or a reason of `run_within`."""
    from cooper_jax.rule import rule_verdict

    return run_within(lambda: rule_verdict.judge_answer(reference, completion), limit)


def run_within(decide: Callable[[], str], limit: float) -> str:
    """The verdict that `decide` returns, "timeout" after `limit` CPU seconds, or "memory" if memory is exhausted.

    An exception is an abstention, "unrecognised".
    """
    # The timer may fire until the last line within the outer block.
    try:
        set_cpu_limit(limit)
        try:
            return decide()
        except MemoryError:
            return "memory"
        except Exception:
            # mpmath, math-verify and sympy raise many kinds of exceptions on values that they cannot
            # handle: abstain.
            return "unrecognised"
        finally:
            lift_cpu_limit()
    except OutOfTime:
        return "timeout"


def _import_math_verify() -> None:
    """Import math-verify and build its parsers, which takes time that must not count against an item."""
    import math_verify

    # It warns that its timeouts are off, which is intended.
    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)
    math_verify.parse("\\boxed{\\int_0^1 x dx}", parsing_timeout=None, fallback_mode="no_fallback")


if __name__ == "__main__":
    main()
