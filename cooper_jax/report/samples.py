"""The texts of a report: a part of each run's samples, chosen by a fixed rule.

1. All sources of a report have equal shares of TEXT_BYTES.
2. A text of more than LENGTHS[0] characters is cut in its middle.
3. Of a run's sampled steps the first and the last are kept, and between them every n-th, counted from the last,
   with the smallest n for which the source's share is enough.  An evaluation's problems are chosen likewise.
4. If the first and the last alone are too large, texts are cut at the next of LENGTHS.

Nothing is drawn at random: the same files give the same samples.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cooper_jax.report.curves import round_number, to_number
from cooper_jax.report.sources import ITEMS, SAMPLES, Folder, read_rows

TEXT_BYTES = 4_500_000
LENGTHS = (6000, 3000, 1500, 700, 300)  # characters
DIGITS_KEPT = 4

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The chosen samples of a source, in the order of its file."""

    samples: list[Row]
    shown: int  # steps, or problems of an evaluation
    total: int
    cut_at: int  # characters

    def to_json(self) -> dict[str, Any]:
        """The object that the page reads."""
        return dataclasses.asdict(self)


def choose_samples(folder: Folder, budget: int) -> Chosen:
    """Choose the samples of a training run; none without a samples.jsonl.

    budget: bytes.  Raises ValueError, naming the file, for rows that are no samples.
    """
    path = folder / SAMPLES

    def read_groups() -> Iterator[tuple[Any, Row]]:
        for row in read_rows(path):
            yield row.get("step"), row

    return _choose(read_groups, lambda row, length: describe_sample(row, length, path), budget)


def choose_items(folder: Folder, budget: int) -> Chosen:
    """Choose the problems of an evaluation, with all responses to them; budget: bytes."""
    path = folder / ITEMS

    # Rows of one problem follow each other: its samples, or a completion under several attacks.
    def read_groups() -> Iterator[tuple[Any, Row]]:
        for number, row in enumerate(read_rows(path)):
            yield (row.get("benchmark", ""), row.get("id") or row.get("group") or number), row

    return _choose(read_groups, lambda row, length: describe_item(row, length, path), budget)


def _choose(
    read_groups: Callable[[], Iterable[tuple[Any, Row]]], describe: Callable[[Row, int], Row], budget: int
) -> Chosen:
    """Choose groups of rows (steps or problems) by the module's rule.

    Args:
      read_groups: yields (group, row); may be called several times, so that no file is held in memory.
      describe: (row, characters at which texts are cut) -> the row for the page.
    """
    for length in LENGTHS:
        sizes: dict[Any, int] = {}
        for group, row in read_groups():
            sizes[group] = sizes.get(group, 0) + _measure(describe(row, length))
        kept = choose_evenly(list(sizes.values()), budget)
        if kept is not None or length == LENGTHS[-1]:
            break

    # Texts cannot be made any shorter: the last group alone.
    groups = list(sizes)
    chosen = {groups[i] for i in (kept if kept is not None else [len(groups) - 1])}
    samples = [describe(row, length) for group, row in read_groups() if group in chosen]
    return Chosen(_merge(samples), len(chosen), len(groups), length)


def choose_evenly(sizes: Sequence[int], budget: int) -> list[int] | None:
    """Choose indices by the module's third rule; None if the first and the last exceed the budget.

    sizes: bytes of each group.
    """
    if not sizes:
        return []
    last = len(sizes) - 1
    for stride in range(1, len(sizes) + 1):
        kept = sorted({0, *range(last, -1, -stride)})
        if sum(sizes[i] for i in kept) <= budget:
            return kept
    return None


def _measure(row: Row) -> int:
    return len(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace"))


def _merge(samples: Iterable[Row]) -> list[Row]:
    """Join the rows of an evaluation that are about one problem; samples of training runs stay as they are."""
    merged: list[Row] = []
    last_key = None
    for sample in samples:
        key = sample.pop("key", None)
        if key is not None and key == last_key:
            merged[-1]["responses"] += sample["responses"]
        else:
            merged.append(sample)
        last_key = key
    return merged


# --- rows ---------------------------------------------------------------------------------------------------


def describe_sample(row: Row, length: int, path: Folder) -> Row:
    """Describe a row of samples.jsonl for the page; texts are cut at `length` characters.

    Raises ValueError, naming the file and the step, for a row that is no sample.
    """
    where = f"{path}: a sample of step {row.get('step', '?')}"
    described: Row = {"step": _read(row, "step", where)}
    for name in ("id", "question", "reference"):
        described[name] = cut_text(_read(row, name, where), length)
    # A prompt that is the question alone says nothing more.
    prompt = row.get("prompt", "")
    if prompt.strip() not in ("", row["question"].strip()):
        described["prompt"] = cut_text(prompt, length)
    described["responses"] = [_describe_response(r, length, where) for r in _read(row, "responses", where)]
    described["pairs"] = [_describe_pair(pair, length) for pair in row.get("pairs", [])]
    return described


def _describe_response(response: Mapping[str, Any], length: int, where: str) -> Row:
    described: Row = {"text": cut_text(_read(response, "text", where), length)}
    for name in ("verdict", "truncated", "truth"):
        if name in response:
            described[name] = response[name]
    for name in ("reward", "advantage", "score"):
        if name in response:
            described[name] = _round(response[name])
    if response.get("rewards"):
        described["rewards"] = {name: _round(value) for name, value in response["rewards"].items()}
    return described


def _describe_pair(pair: Mapping[str, str], length: int) -> Row:
    described = {name: cut_text(pair[name], length) for name in ("positive", "negative")}
    # References are shown only where the members of the pair differ by them.
    if pair.get("positive_reference") != pair.get("negative_reference"):
        for name in ("positive_reference", "negative_reference"):
            described[name] = cut_text(pair.get(name, ""), length)
    return described


def describe_item(row: Row, length: int, path: Folder) -> Row:
    """Describe a row of an evaluation's items.jsonl, of any of its three kinds, in the form of a sample."""
    where = f"{path}: an item"
    response: Row = {"text": cut_text(_read(row, "completion", where), length)}
    if "label" in row:
        response["truth"] = row["label"] == 1
    if "oracle" in row:
        response["truth"] = row["oracle"]
    if "truncated" in row:
        response["truncated"] = row["truncated"]

    # A benchmark's rows have one field for each judge, the others have a table of them.
    if "rule" in row:
        response["verdict"] = row["rule"]
    if "reward" in row:
        response["score"] = _round(row["reward"])
    if "attack" in row:
        response["attack"] = row["attack"]
    for name, opinion in row.get("judges", {}).items():
        _add_opinion(response, name, opinion, length)
    if "rewards" in row:
        response["rewards"] = {name: _round(value) for name, value in row["rewards"].items()}
        response["score"] = next(iter(response["rewards"].values()))

    parts = [row[name] for name in ("benchmark", "source", "subject", "level", "model") if row.get(name)]
    return {
        # An attack may change the question; `group` is the one before it.
        "key": f"{row.get('benchmark', '')} {row.get('id', '')} {row.get('group', row.get('question'))}"[
            :200
        ],
        "id": cut_text(str(row.get("id", "")), length),
        "about": cut_text(" · ".join(map(str, parts)), length),
        "question": cut_text(_read(row, "question", where), length),
        "reference": cut_text(_read(row, "reference", where), length),
        "responses": [response],
        "pairs": [],
    }


def _add_opinion(response: Row, name: str, opinion: Mapping[str, Any], length: int) -> None:
    """Add a judge's opinion of a labelled completion."""
    score = _round(opinion.get("score"))
    if name == "rule":
        decision = "correct" if opinion.get("yes") else "wrong"
        response["verdict"] = "unrecognised" if opinion.get("abstained") else decision
    elif name == "model":
        response["score"] = score
    else:
        response.setdefault("judges", {})[name] = "yes" if opinion.get("yes") else "no"
    if opinion.get("reply"):
        response.setdefault("replies", {})[name] = cut_text(opinion["reply"], length)


def cut_text(text: Any, length: int) -> str:
    """Cut a text of more than `length` characters in its middle, and say how many characters are left out."""
    text = str(text)
    if len(text) <= length:
        return text
    # The end has the answer, the beginning the way to it.
    head = length // 2
    tail = length - head
    return f"{text[:head]}\n[... {len(text) - length:,} characters left out ...]\n{text[-tail:]}"


def _read(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where} has no field {name!r}: was the file written by another program?")
    return row[name]


def _round(value: Any) -> float | int | None:
    number = to_number(value)
    return None if number is None else round_number(float(f"{number:.{DIGITS_KEPT}g}"))
