"""Figures as text: aligned tables, and percentages with their intervals.

benchmark   accuracy
gsm8k_test  3.1 (2.0 to 4.4)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cooper_jax.statistics import Interval


def format_percent(x: float | Interval | None, digits: int = 1) -> str:
    """Format a share as a percentage without the % sign; "-" for NaN and None.

    An interval becomes `value (low to high)`, or its value alone if its limits are NaN.
    """
    if isinstance(x, Interval):
        value = format_percent(x.value, digits)
        if value == "-" or math.isnan(x.low):
            return value
        return f"{value} ({format_percent(x.low, digits)} to {format_percent(x.high, digits)})"
    return "-" if x is None or math.isnan(x) else f"{100 * x:.{digits}f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format columns side by side, two blanks apart; columns of numbers are aligned to the right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [bool(rows) and _is_numeric(column[1:]) for column in columns]

    # A rule of dashes separates the header; blanks at the ends of lines are removed.
    lines = []
    for row in cells:
        aligned = []
        for cell, width, right in zip(row, widths, numeric, strict=True):
            aligned.append(cell.rjust(width) if right else cell.ljust(width))
        lines.append("  ".join(aligned))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _is_numeric(cells: Sequence[str]) -> bool:
    """True if every cell that is not empty begins like a number."""
    return all(cell[0].isdigit() or cell[0] in "-+." for cell in cells if cell)


def to_plain(x: Any) -> Any:
    """Replace intervals and NumPy values inside containers by values that JSON can represent."""
    if isinstance(x, Interval):
        return dataclasses.asdict(x)
    if isinstance(x, dict):
        return {str(k): to_plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [to_plain(v) for v in x]
    # NaN is left as it is: the writer of the file converts it.
    return x.item() if isinstance(x, np.generic) else x
