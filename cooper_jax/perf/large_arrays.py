"""Arrays that a compiled program should not have: logits of the whole vocabulary, and scores over all positions."""

from __future__ import annotations

import math
import re

_FLOATS = re.compile(r"\b(f32|bf16|f16)\[([\d,]+)\]")


def find_logits(text: str, vocabulary: int, width: int, most: int) -> list[str]:
    """Find the float32 arrays [.., V] of a program's text that have more than `most` elements.

    vocabulary: V on one device.  width: of the model; arrays [.., V, .., D] or with a part of D as an axis are the
    head, the embedding and their gradients.
    """
    found = set()
    for kind, shape in set(_FLOATS.findall(text)):
        dims = [int(d) for d in shape.split(",")]
        if kind != "f32" or vocabulary not in dims or math.prod(dims) <= most:
            continue
        others = [d for d in dims if d not in (1, vocabulary)]
        # A part of the width is a divisor of it; rows usually are not, but 1,536 is divided by many numbers: only
        # one axis beside the vocabulary, or several whose product is the width, are weights.
        if math.prod(others) == width or (len(others) == 1 and width % others[0] == 0):
            continue
        found.add(f"{kind}[{shape}]")
    return sorted(found)


def find_scores(text: str, tokens: int) -> list[str]:
    """Find the float arrays of a program's text that have two axes of `tokens` positions."""
    found = set()
    for kind, shape in set(_FLOATS.findall(text)):
        if [int(d) for d in shape.split(",")].count(tokens) >= 2:
            found.add(f"{kind}[{shape}]")
    return sorted(found)
