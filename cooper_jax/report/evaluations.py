"""What a report shows of an evaluation by launch/evaluate.py: its figures with intervals, and its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cooper_jax.report import sources
from cooper_jax.report.sources import Source
from cooper_jax.runtime.environment import ENVIRONMENT

TABLE = "table.txt"

# A bar of a chart: its name, the interval {value, low, high}, and the name of its colour.
Bar = dict[str, Any]


def read_evaluation(source: Source) -> dict[str, Any]:
    """Read an evaluation for `report_data.collect_report`, without its items.

    An evaluation that has not ended has no charts.
    """
    results = sources.read_object(source.folder / sources.RESULTS)
    table = source.folder / TABLE
    try:
        charts = list(_make_charts(results))
    except (KeyError, TypeError) as error:
        path = source.folder / sources.RESULTS
        raise ValueError(f"{path} was not written by launch/evaluate.py ({error!r} is missing)") from None
    return {
        "kind": sources.EVALUATION,
        "label": source.label,
        "group": source.group,
        "about": source.about,
        "config": sources.read_object(source.folder / sources.SETTINGS),
        "environment": sources.read_object(source.folder / ENVIRONMENT),
        "points": {},
        "summary": {"finished": bool(results), "measured": _name_kind(results)},
        "charts": charts,
        "table": table.read_text() if table.exists() else "",
    }


def _name_kind(results: Mapping[str, Any]) -> str:
    """Which of the three kinds of evaluation the results are of; "" if it has not ended."""
    kinds = {"benchmarks": "a policy on benchmarks", "all": "judges", "attacks": "reward models under attack"}
    return next((text for name, text in kinds.items() if name in results), "")


def _make_charts(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The charts of an evaluation's results, each {title, bars}."""
    if "benchmarks" in results:
        yield {"title": "Accuracy (pass@1), by benchmark and judge", "bars": _list_benchmarks(results)}
    if "all" in results:
        for figure, title in (("accuracy", "Accuracy"), ("auroc", "AUROC")):
            judged = results["all"]["judges"].items()
            bars = [make_bar(name, judge[figure], name) for name, judge in judged]
            yield {"title": f"{title} of the judges on labelled completions", "bars": bars}
    if "attacks" in results:
        yield {"title": "Wrong completions that are accepted, by attack", "bars": _list_attacks(results)}


def _list_benchmarks(results: Mapping[str, Any]) -> list[Bar]:
    bars = []
    for summary in results["benchmarks"]:
        for judge, figures in summary["judges"].items():
            bars.append(make_bar(f"{summary['benchmark']}, by {judge}", figures["accuracy"], judge))
    return bars


def _list_attacks(results: Mapping[str, Any]) -> list[Bar]:
    bars = []
    for attack, figures in results["attacks"].items():
        several = len(figures["models"]) > 1
        for model, of_model in figures["models"].items():
            name = f"{attack}, {model}" if several else attack
            bars.append(make_bar(name, of_model["accepted"], model))
    return bars


def make_bar(name: str, interval: Mapping[str, Any], colour: str) -> Bar:
    """A bar with its interval; colour: bars of one name have one colour."""
    return {"name": name, "colour": colour, **{x: interval.get(x) for x in ("value", "low", "high")}}
