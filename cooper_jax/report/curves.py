"""Curves of a report: a metric's values over the steps, thinned out to a number of points that a page can hold.

The rule, which the page states: a curve with more points than the limit is divided into that many runs of
neighbouring points; each run becomes one point, the mean of its values at its last step.  The limit is
MOST_POINTS, or less where a report has so many curves that they would have more than ALL_POINTS together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Points of one curve, and of all curves of a report.  A point takes about seven bytes in the file.
MOST_POINTS, FEWEST_POINTS, ALL_POINTS = 1000, 50, 450_000
DIGITS = 5  # significant digits

Point = tuple[int, float | None]  # step, value; None where nothing was measured


def collect_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Collect each metric's points from the rows of a metrics.jsonl, by the metric's name."""
    curves: dict[str, list[Point]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                curves.setdefault(name, []).append((int(row["step"]), to_number(value)))
    # A metric that was never a number is no curve.
    return {name: points for name, points in curves.items() if any(v is not None for _, v in points)}


def to_number(value: Any) -> float | None:
    """The value as a finite float; None for the null and the infinities of metrics.jsonl, and for other types."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def choose_limit(curve_count: int) -> int:
    """The number of points that a curve may have in a report of so many curves."""
    return max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(curve_count, 1)))


def thin_out(points: Sequence[Point], limit: int) -> list[Point]:
    """Reduce a curve to at most `limit` points by the module's rule; a shorter curve is returned as it is."""
    if len(points) <= limit:
        return list(points)
    thinned: list[Point] = []
    for index in range(limit):
        # Integers: runs differ in length by one point at most, and each has one.
        part = points[index * len(points) // limit : (index + 1) * len(points) // limit]
        values = [value for _, value in part if value is not None]
        thinned.append((part[-1][0], sum(values) / len(values) if values else None))
    return thinned


def encode_curves(curves: Mapping[str, Sequence[Point]], limit: int) -> dict[str, Any]:
    """Encode a run's curves for the page: {axes: lists of steps, curves: name -> [index of its axis, values]}."""
    # Most metrics have the same steps, which are stored once.
    axes: dict[tuple[int, ...], int] = {}
    encoded = {}
    for name, points in curves.items():
        thinned = thin_out(points, limit)
        axis = axes.setdefault(tuple(step for step, _ in thinned), len(axes))
        encoded[name] = [axis, [round_number(value) for _, value in thinned]]
    return {"axes": [list(axis) for axis in axes], "curves": encoded}


def round_number(value: float | None) -> float | int | None:
    """Round to DIGITS significant digits; whole numbers become integers, which are shorter."""
    if value is None:
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
