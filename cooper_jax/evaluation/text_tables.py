"""Figures as text: aligned tables, percentages with their intervals.

benchmark   accuracy
gsm8k_test  3.1 (2.0 to 4.4)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from cooper_jax.statistics import Interval


def format_percent(x: float | Interval, digits: int = 1) -> str:
    """A share as a percentage, without the sign; "-" for NaN, which has nothing to stand on."""
    if isinstance(x, Interval):
        value = format_percent(x.value, digits)
        if value == "-" or math.isnan(x.low):
            return value
        return f"{value} ({format_percent(x.low, digits)} to {format_percent(x.high, digits)})"
    return "-" if x is None or math.isnan(x) else f"{100 * x:.{digits}f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, two blanks apart; those that hold figures in all rows stand to the right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    figures = [
        bool(rows) and all(row[i][:1].isdigit() or row[i][:1] in "-+." for row in cells[1:] if row[i])
        for i in range(len(header))
    ]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, figures, strict=True)
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def to_plain(x):
    """Intervals and NumPy values inside containers as what JSON holds."""
    if isinstance(x, Interval):
        return dataclasses.asdict(x)
    if isinstance(x, dict):
        return {str(k): to_plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [to_plain(v) for v in x]
    return x.item() if isinstance(x, np.generic) else x
