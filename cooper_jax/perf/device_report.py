"""The report of launch/check_device.py: records of its parts as JSON values, and the report as Markdown.

A part runs in a process of its own, which writes a record, a JSON object, for each thing that it begins and each
result.  `collect_part` makes a part's summary from them, whether or not the process came to its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """What a part found, and how its process ended."""

    part: str
    seconds: float
    problems: tuple[str, ...]  # a line each; empty if all is well
    results: tuple[Record, ...]


def collect_part(part: str, records: Sequence[Record], seconds: float, end: str) -> PartSummary:
    """Summarise a part.

    records: begin, result and end records, in order.
    end: "" if the process ended by itself with code 0; else how it ended, for the message.
    """
    results = tuple(record for record in records if record["record"] == "result")
    problems = [problem for result in results for problem in result["problems"]]
    if end or not any(record["record"] == "end" for record in records):
        begun = [record["name"] for record in records if record["record"] == "begin"]
        where = f" in {begun[-1]!r}" if len(begun) > len(results) else ""
        problems.append(
            f"{part}: the process {end or 'ended early'}{where}; the parts after it ran all the same"
        )
    return PartSummary(part, seconds, tuple(problems), results)


def make_report(device: Record, small: bool, summaries: Sequence[PartSummary]) -> dict[str, Any]:
    """Make the whole report as JSON values."""
    problems = [problem for summary in summaries for problem in summary.problems]
    return {
        "ok": not problems,
        "problems": problems,
        "device": device,
        "small": small,
        "parts": [dataclasses.asdict(summary) for summary in summaries],
    }


# --- Markdown ------------------------------------------------------------------------------------------------


def format_report(report: dict[str, Any]) -> str:
    """Write the report as Markdown, to be pasted into a bug report."""
    device = report["device"]
    lines = [
        f"**{'All checks passed' if report['ok'] else 'Something is wrong'}**: "
        f"{device.get('kind', 'no device')}, jax {device.get('jax', '?')}, "
        f"cooper_jax {device.get('version', '?')}, kernels {device.get('kernels', '?')}"
        + (", small sizes" if report["small"] else "")
    ]
    lines += [f"- {problem}" for problem in report["problems"]]

    results = {part["part"]: part["results"] for part in report["parts"]}
    sections = [
        _format_errors([*results.get("kernels", ()), *results.get("programs", ())]),
        _format_speeds(results.get("speeds", ())),
        _format_step(results.get("step", ())),
    ]
    times = ", ".join(f"{part['part']} {part['seconds']:.0f} s" for part in report["parts"])
    return "\n\n".join(["\n".join(lines), *filter(None, sections), f"Times: {times}."])


def _format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; "" without rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format_errors(results: Sequence[Record]) -> str:
    rows = []
    for result in results:
        values = result["values"]
        if values is None:
            rows.append([result["name"], "", "**failed**", "", "", "", "", ""])
            continue
        rows.append(
            [
                result["name"],
                values["form"],
                "ok" if values["ok"] else "**wrong**",
                _number(values["error"]),
                _number(values["limit"]),
                _number(values["plain_error"]),
                _microseconds(values.get("seconds")),
                _microseconds(values.get("plain_seconds")),
            ]
        )
    heads = ("check", "form", "result", "error", "limit", "plain form's error", "us a call", "plain form")
    return _format_table(heads, rows)


def _format_speeds(results: Sequence[Record]) -> str:
    rows = []
    for result in results:
        values = result["values"]
        if values is None:
            rows.append([result["name"], "**failed**", "", "", "", ""])
            continue
        rows.append(
            [
                values["program"],
                f"{values['tokens_per_second']:,.0f}",
                f"{values['share_of_roofline']:.0%}",
                _rate(
                    values["flops_per_second"],
                    1e12,
                    values["measured_flops_per_second"],
                    values["share_of_peak_flops"],
                ),
                _rate(
                    values["bytes_per_second"],
                    1e9,
                    values["measured_bytes_per_second"],
                    values["share_of_peak_bandwidth"],
                ),
                f"{values['first_call_seconds']:.1f}",
            ]
        )
    heads = (
        "program",
        "tokens/s",
        "of the roofline",
        "TFLOP/s (measured rate, of the peak)",
        "GB/s (measured rate, of the peak)",
        "first call, s",
    )
    return _format_table(heads, rows)


def _format_step(results: Sequence[Record]) -> str:
    lines = []
    for result in results:
        values = result["values"]
        if values is None:
            continue
        phases = ", ".join(f"{name.removeprefix('time/')} {s:.1f}" for name, s in values["phases"].items())
        lines.append(
            f"A Cooper step of {values['responses']} responses and {values['pairs']} pairs: "
            f"{values['seconds']:.1f} s with compiling ({phases}), after {values['setup_seconds']:.1f} s of setup."
        )
    return "\n".join(lines)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:,.0f}"


def _rate(rate: float, unit: float, measured: float, share_of_peak: float | None) -> str:
    peak = "peak not known" if share_of_peak is None else f"{share_of_peak:.0%}"
    return f"{rate / unit:,.3g} ({measured / unit:,.3g}, {peak})"


# --- the records of a part -----------------------------------------------------------------------------------


class Recorder:
    """Runs the checks of a part one by one and writes their records; an exception is a result, too."""

    def __init__(self, write: Callable[[Record], None]):
        self._write = write

    def run(self, name: str, check: Callable[[], tuple[Any, list[str]]], fallback: str = "") -> None:
        """Run a check that returns (its values as JSON, its problems).

        fallback: what to do if it raises.
        """
        self._write({"record": "begin", "name": name})
        try:
            values, problems = check()
        # A check may fail in any way, and must not hide the others.
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            values, problems = None, [f"{name} fails: {fallback + ': ' if fallback else ''}{message}"]
        self._write({"record": "result", "name": name, "values": values, "problems": problems})

    def end(self) -> None:
        """Write that the part came to its end."""
        self._write({"record": "end", "name": ""})
