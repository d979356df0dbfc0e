"""A judge and an assistant that take their time, but no CPU, to measure and test what waits for them.

    --config.rule.judge=tests/slow_services.py:judge
    --config.assistant.kind=tests/slow_services.py:Rewriter

JUDGE_SECONDS and REWRITE_SECONDS are the seconds for a response and for a rewrite; 0 without them.  With
UNEVEN_SECONDS=1 each takes between 0 and twice its time, so that results come in another order.
"""

import os
import time
import zlib


def wait(name, text):
    """Sleep for the seconds of an environment variable."""
    seconds = float(os.environ.get(name, 0))
    if os.environ.get("UNEVEN_SECONDS"):
        seconds *= zlib.crc32(text.encode()) % 100 / 50
    time.sleep(seconds)


def judge(completion):
    """Right for a third of all texts, whatever they say: untrained policies and rewrites have positives, too."""
    wait("JUDGE_SECONDS", completion)
    return zlib.crc32(completion.encode()) % 3 == 0


class Rewriter:
    """Adds a number to the positive, another one in each attempt."""

    concurrency = 128

    def rewrite(self, requests):
        wait("REWRITE_SECONDS", str(requests[0].seed))
        return [f"{request.positive} {request.seed % 100}" for request in requests]
