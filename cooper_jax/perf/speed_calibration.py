"""Comparison of the roofline with measured speeds, and a forecast's efficiencies from it.

1. `bound_seconds` computes a row's lower bound with the roofline (roofline.py) at the chip's public peaks, as
   launch/compile.py does for phases of a step.  Bound / measured time is the row's efficiency.
2. `fit_efficiencies` takes, for each kind of work, the geometric mean of its rows' efficiencies.  A forecast is a
   bound divided by that mean.
3. `leave_one_out` predicts each row from the mean of the *other* rows of its kind.  The factor by which the
   predicted time misses the measured one, in either direction, is the row's error.  Rows of one engine resemble
   each other, so each row is also predicted from the rows of other engines alone.

Below MIN_ROWS published rows nothing is forecast.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cooper_jax.perf import bench_programs, chips, roofline
from cooper_jax.perf.machine import Rates
from cooper_jax.perf.published_speeds import KINDS, ROWS, SHAPES, SpeedRow

# The least number of published rows from which a forecast is made.
MIN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class CalibratedRow:
    """A row with its bound, and its prediction from the other rows of its kind."""

    row: SpeedRow
    bound: float  # seconds
    predicted: float | None  # seconds; None if no other row is of its kind
    predicted_elsewhere: float | None  # the same, from the rows of other engines alone

    @property
    def efficiency(self) -> float:
        """The share of the bound in the measured time."""
        return self.bound / self.row.seconds

    @property
    def error(self) -> float | None:
        """The factor, at least 1, by which the prediction misses the measured time."""
        return _find_factor(self.predicted, self.row.seconds)

    @property
    def error_elsewhere(self) -> float | None:
        """The same for the prediction from the rows of other engines alone."""
        return _find_factor(self.predicted_elsewhere, self.row.seconds)


def _find_factor(predicted: float | None, measured: float) -> float | None:
    if predicted is None:
        return None
    return max(predicted / measured, measured / predicted)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """All rows, and the efficiency of each kind of work."""

    rows: tuple[CalibratedRow, ...]
    efficiencies: dict[str, float]

    @property
    def published(self) -> int:
        """The number of rows that others published."""
        return sum(not calibrated.row.own for calibrated in self.rows)

    @property
    def usable(self) -> bool:
        """True if there are enough published rows for a forecast."""
        return self.published >= MIN_ROWS

    def median_error(
        self, own: bool | None = None, kind: str | None = None, elsewhere: bool = False
    ) -> float | None:
        """The median leave-one-out error of some rows; None without any.

        own: True: of our rows, False: of the published ones, None: of both.  kind: None: of all kinds.
        elsewhere: of the predictions from the rows of other engines alone.
        """
        errors = []
        for calibrated in self.rows:
            error = calibrated.error_elsewhere if elsewhere else calibrated.error
            is_chosen = own in (None, calibrated.row.own) and kind in (None, calibrated.row.kind)
            if is_chosen and error is not None:
                errors.append(error)
        return statistics.median(errors) if errors else None


def calibrate(rows: Sequence[SpeedRow] = ROWS) -> Calibration:
    """Compare the roofline with these rows."""
    bounds = [bound_seconds(row) for row in rows]
    kinds, engines = [row.kind for row in rows], [row.name for row in rows]
    efficiencies = [bound / row.seconds for bound, row in zip(bounds, rows, strict=True)]
    calibrated = [
        CalibratedRow(row, bound, _divide(bound, other), _divide(bound, elsewhere))
        for row, bound, other, elsewhere in zip(
            rows,
            bounds,
            leave_one_out(kinds, efficiencies),
            leave_one_out(kinds, efficiencies, engines),
            strict=True,
        )
    ]
    return Calibration(tuple(calibrated), fit_efficiencies(kinds, efficiencies))


def _divide(bound: float, efficiency: float | None) -> float | None:
    return None if efficiency is None else bound / efficiency


def fit_efficiencies(kinds: Sequence[str], efficiencies: Sequence[float]) -> dict[str, float]:
    """The geometric mean of the efficiencies of each kind that occurs."""
    by_kind: dict[str, list[float]] = {}
    for kind, efficiency in zip(kinds, efficiencies, strict=True):
        by_kind.setdefault(kind, []).append(efficiency)
    return {kind: statistics.geometric_mean(values) for kind, values in by_kind.items()}


def leave_one_out(
    kinds: Sequence[str], efficiencies: Sequence[float], engines: Sequence[str] | None = None
) -> list[float | None]:
    """Predict each row's efficiency from the other rows of its kind; None where there is no other.

    engines: of the rows; rows of a row's own engine are then left out, too.
    """
    predictions: list[float | None] = []
    for i, kind in enumerate(kinds):
        others = [
            efficiency
            for j, efficiency in enumerate(efficiencies)
            if j != i and kinds[j] == kind and (engines is None or engines[j] != engines[i])
        ]
        predictions.append(statistics.geometric_mean(others) if others else None)
    return predictions


def bound_seconds(row: SpeedRow) -> float:
    """Compute the roofline of a row's work on its devices.

    In decoding the devices share one copy of the weights (tensor parallelism), as in all published rows with more
    than one device.  Sending data counts as free.
    """
    chip = chips.CHIPS[row.chip]
    rates = Rates(chip.flops * row.peak_factor, chip.bandwidth, {}).times(row.devices)
    return roofline.roofline_seconds(count_work(row), rates)


def count_work(row: SpeedRow) -> dict[str, roofline.Work]:
    """Count a row's work by part.  Raises ValueError for an unknown kind."""
    config = SHAPES[row.model]
    lengths = np.full(row.rows, row.response_tokens)
    if row.ragged:
        lengths = bench_programs.draw_lengths(np.random.default_rng(0), row.rows, row.response_tokens)

    if row.kind == "update":
        return roofline.update_work(config, row.prompt_tokens, lengths)
    if row.kind == "score" and row.response_tokens:
        return roofline.score_work(config, row.prompt_tokens, lengths)
    if row.kind not in KINDS:
        raise ValueError(f"{row.name}: kind {row.kind!r} is none of {', '.join(KINDS)}")

    # A score without responses is a prefill: logits of the last token alone.
    parts = roofline.rollout_work(
        config, row.rows // row.group, row.prompt_tokens, np.maximum(lengths, 1), row.slots or row.rows,
        weight_bytes=row.weight_bytes, cache_bytes=row.cache_bytes,
    )  # fmt: skip
    if row.kind == "score":
        return {"prefill": parts["prefill"]}
    return {"decode": parts["decode"]} if row.decode_only else parts


# --- reports -----------------------------------------------------------------------------------------------


def describe_fit(calibration: Calibration) -> str:
    """One line: the efficiencies and the error, or why nothing is forecast."""
    if not calibration.usable:
        return (
            f"no forecast: {calibration.published} published rows, of which at least {MIN_ROWS} are needed "
            "(cooper_jax/perf/published_speeds.py)"
        )
    means = ", ".join(f"{kind} {e:.0%}" for kind, e in calibration.efficiencies.items())
    own = len(calibration.rows) - calibration.published
    error = calibration.median_error(own=False)
    return (
        f"efficiencies {means}, from {calibration.published} published rows and {own} of ours; median "
        f"leave-one-out error of the published rows {_format_factor(error)}"
    )


def format_calibration(calibration: Calibration) -> str:
    """Write the rows, their notes and the errors as Markdown."""
    lines = [
        "| | work | devices | measured, s | bound, s | share | predicted, s | misses by | source |",
        "| --: | --- | --- | --: | --: | --: | --: | --: | --- |",
    ]
    rows = _sort_rows(calibration.rows)
    lines += [_format_row(number, calibrated) for number, calibrated in enumerate(rows, 1)]
    notes = [f"{number}: {c.row.note}" for number, c in enumerate(rows, 1) if c.row.note]
    lines += ["", "Notes on rows. " + "; ".join(notes) + ".", ""]

    # A line for each kind, and one for all.
    lines += [
        "| kind | published rows | ours | efficiency | median error, published | ours | published, other engines |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    kinds: list[str | None] = [*calibration.efficiencies, None]
    for kind in kinds:
        efficiency = "" if kind is None else f"{calibration.efficiencies[kind]:.0%}"
        own = sum(c.row.own and kind in (None, c.row.kind) for c in calibration.rows)
        published = sum(kind in (None, c.row.kind) for c in calibration.rows) - own
        errors = (
            calibration.median_error(own=False, kind=kind),
            calibration.median_error(own=True, kind=kind),
            calibration.median_error(own=False, kind=kind, elsewhere=True),
        )
        factors = " | ".join(_format_factor(error) for error in errors)
        lines.append(f"| {kind or 'all'} | {published} | {own} | {efficiency} | {factors} |")
    return "\n".join([*lines, "", describe_fit(calibration)])


def calibration_to_json(calibration: Calibration) -> dict[str, Any]:
    """Convert a calibration to JSON values."""
    rows = [
        dataclasses.asdict(c.row)
        | {"bound": c.bound, "efficiency": c.efficiency, "predicted": c.predicted, "error": c.error}
        | {"predicted_elsewhere": c.predicted_elsewhere, "error_elsewhere": c.error_elsewhere}
        for c in calibration.rows
    ]
    return {
        "published": calibration.published,
        "own": len(calibration.rows) - calibration.published,
        "usable": calibration.usable,
        "efficiencies": calibration.efficiencies,
        "median_error_published": calibration.median_error(own=False),
        "median_error_own": calibration.median_error(own=True),
        "median_error_elsewhere": calibration.median_error(own=False, elsewhere=True),
        "rows": rows,
    }


def _sort_rows(rows: Iterable[CalibratedRow]) -> list[CalibratedRow]:
    """By kind, published rows first."""
    return sorted(rows, key=lambda c: (KINDS.index(c.row.kind), c.row.own))


def _format_row(number: int, calibrated: CalibratedRow) -> str:
    row = calibrated.row
    work = f"{row.rows:,} x ({row.prompt_tokens:,} + {row.response_tokens:,})"
    if not row.response_tokens:
        work = f"{row.rows:,} x {row.prompt_tokens:,}"
    elif row.decode_only:
        work = f"{row.rows:,}, one step"
    elif not row.prompt_tokens:
        work = f"{row.rows:,} x {row.response_tokens:,}"
    predicted = "" if calibrated.predicted is None else f"{calibrated.predicted:.3g}"
    source = f"ours, {row.source}" if row.own else f"{row.name}, {row.source}"
    return (
        f"| {number} | {row.kind}: {row.model}, {work} | {row.devices} {row.chip} | {row.seconds:.3g} | "
        f"{calibrated.bound:.3g} | {calibrated.efficiency:.0%} | {predicted} | "
        f"{_format_factor(calibrated.error)} | {source} |"
    )


def _format_factor(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.2f}x"
