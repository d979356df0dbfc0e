"""The judge `blend`: a logistic model of what other judges say about a completion.

The features of a row, beside a constant:

    logit         of the reward model's reward
    rule correct  1 if the rule verifier finds the completion correct, else 0
    rule wrong    1 if it finds it wrong or without an answer, else 0; an abstention has 0 in both
    last number   1 if the last numbers of completion and reference are equal, else 0
    log length    log(1 + characters of the completion)

The model is fitted to labelled rows that the rule and the reward model have judged: to the rows of another
comparison (`--blend_from`), or to the measured rows themselves.  These are cross-fitted by question: a row is
judged by the fit on the folds of other questions.  The ridge penalty keeps weights finite where a feature
separates the labels.

    N  rows   K  features, the constant included
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cooper_jax.data import seen_questions
from cooper_jax.evaluation import judges
from cooper_jax.evaluation.evaluation_ledger import RESULTS, Row
from cooper_jax.reward.calibration import assign_folds, fit_logistic
from cooper_jax.runtime import output_folder
from cooper_jax.runtime.metrics import read_lines
from cooper_jax.types import Triple

RIDGE = 1.0  # on standardised features; the labels of a few rows weigh as much
_SMALLEST = 1e-6  # rewards are stored with six decimals, and 0 and 1 have no logit


def compute_features(rows: Sequence[Row]) -> np.ndarray:
    """Compute the features of judged rows, f64[N, K].

    rows: of a ledger, with the opinions of the judges `rule` and `model`.
    """
    triples = [Triple(row["question"], row["reference"], row["completion"]) for row in rows]
    rule = [row["judges"]["rule"] for row in rows]
    rewards = np.array([row["judges"]["model"]["score"] for row in rows])
    rewards = np.clip(rewards, _SMALLEST, 1 - _SMALLEST)  # f64[N]
    columns = [
        np.ones(len(rows)),
        np.log(rewards) - np.log1p(-rewards),
        [opinion["yes"] for opinion in rule],
        [not (opinion["yes"] or opinion["abstained"]) for opinion in rule],
        [opinion.yes for opinion in judges.judge_by_last_number(triples, 0)],
        [np.log1p(len(triple.completion)) for triple in triples],
    ]
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def predict_blend(known: Sequence[Row], rows: Sequence[Row]) -> np.ndarray:
    """Fit the model to `known` rows and predict each row's probability of being correct, f64[N]."""
    known_features, features = compute_features(known), compute_features(rows)
    labels = np.array([row["label"] == 1 for row in known])

    # Standardised by the known rows; a constant column, the first one among them, stays as it is.
    mean, deviation = known_features.mean(0), known_features.std(0)
    mean, deviation = np.where(deviation > 0, mean, 0.0), np.where(deviation > 0, deviation, 1.0)
    weights = fit_logistic((known_features - mean) / deviation, labels, RIDGE)
    return np.exp(-np.logaddexp(0.0, -((features - mean) / deviation @ weights)))


def add_blend(rows: Sequence[Row], names: Sequence[str], known: Sequence[Row] = ()) -> tuple[list[Row], int]:
    """Add the opinions of the judge `blend` to rows, and keep those of `names` alone, in their order.

    Args:
      rows: of a ledger, with the opinions of the judges `rule` and `model`.
      known: labelled rows to fit to, those with a question of `rows` excluded; none: cross-fit on `rows`.

    Returns the rows and the number of rows that the model was fitted to; in a cross-fit that is all of them.

    Raises ValueError for a cross-fit on rows of a single question, and if no known row is left.
    """
    fitted = len(rows)
    if known:
        asked = frozenset(seen_questions.fingerprint_question(row["question"]) for row in rows)
        kept, _ = seen_questions.split_by_seen(known, asked, question=lambda row: row["question"])
        if not kept:
            raise ValueError(f"all {len(known)} rows have questions that are measured: give other rows")
        fitted = len(kept)
        probabilities = predict_blend(kept, rows)
    else:
        fold_of_row = assign_folds([row["question"] for row in rows])
        probabilities = np.zeros(len(rows))
        for fold in range(fold_of_row.max() + 1):
            inside = np.flatnonzero(fold_of_row == fold).tolist()
            outside = np.flatnonzero(fold_of_row != fold).tolist()
            probabilities[inside] = predict_blend([rows[i] for i in outside], [rows[i] for i in inside])

    blended = []
    for row, p in zip(rows, probabilities, strict=True):
        opinion = {"score": float(p), "yes": bool(p > judges.THRESHOLD), "abstained": False}
        opinions = row["judges"] | {"blend": opinion}
        blended.append(row | {"judges": {name: opinions[name] for name in names}})
    return blended, fitted


def read_judged_rows(path: str, settings: Mapping[str, Any]) -> list[Row]:
    """Read the items.jsonl of another comparison, whose rows the same rule and reward model have judged.

    settings: the reward model's, which must be those of the other comparison (settings.json beside the file).

    Raises ValueError and OSError, naming the file and what differs.
    """
    # Without these files it is not known what the rows are.
    file = Path(path)
    rows = read_lines(file)
    if not file.with_name(output_folder.SETTINGS).exists():
        raise ValueError(
            f"{path} has no {output_folder.SETTINGS} beside it: give the items.jsonl in the --out of a comparison"
        )
    if not file.with_name(RESULTS).exists():
        raise ValueError(
            f"{path}: the comparison that writes it has not ended, since there is no {RESULTS} beside it: "
            "repeat that comparison's command, and fit to its rows when it has ended"
        )

    # The labels are those of the file's own references.
    stored = output_folder.read_settings(file.with_name(output_folder.SETTINGS))
    if stored.get("references") != "own":
        raise ValueError(
            f"{path} was judged with --references={stored.get('references')}, and its labels are those of the "
            "own references: give a comparison with --references=own"
        )
    differing = [name for name, value in settings.items() if stored.get(name) != value]
    if differing:
        raise ValueError(
            f"{path} was judged with another reward model or setting: {', '.join(differing)}: repeat that "
            "comparison with this reward model, in another --out"
        )

    # Every row must have what the features are made of.
    for number, row in enumerate(rows, 1):
        _check_judged_row(row, f"{path}:{number}")
    if not rows:
        raise ValueError(f"{path} has no rows: give the items.jsonl of a comparison with some")
    return rows


def _check_judged_row(row: Row, where: str) -> None:
    """Raise ValueError, beginning with `where`, unless a row has all fields that the blend is fitted to."""
    missing = {"question", "reference", "completion", "label", "judges"} - row.keys()
    if missing:
        raise ValueError(
            f"{where}: no field {', '.join(sorted(missing))}: give the items.jsonl of a comparison of judges"
        )
    absent = [name for name in ("rule", "model") if name not in row["judges"]]
    if absent:
        raise ValueError(
            f"{where}: no opinion of the judge {' and '.join(absent)}: compare judges on its rows with "
            "--judge=rule --judge=model, in another --out, and give that one's items.jsonl"
        )
