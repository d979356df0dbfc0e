"""Calibration of a reward model's logits: a temperature and a threshold, stored beside its weights.

A reward model's sigmoid(z) need not be the share of correct completions among those with logit z, and the
logit 0 need not be the best place to decide.  With a temperature T > 0 and a threshold b,

    p = sigmoid((z - b) / T),      correct if p > 1/2, that is if z > b

1. `fit_calibration` fits T and b to labelled logits by maximum likelihood (Platt 1999, without his smoothed
   targets; temperature scaling of Guo et al. 2017, arXiv 1706.04599, with a threshold).
2. `cross_fit_logits` calibrates each row by a fit on the rows of other questions.  Accuracy and calibration
   error after calibration are measured on these: on the rows of the fit they would be too good.
3. `write_calibration` and `read_calibration` store it in calibration.json, in a directory of weights or in a
   run directory.
4. `apply_calibration` maps logits to calibrated logits, whose sigmoid is the reward.

The fit is unweighted.  Calibration is a statement on the rows as they are: p is the share of correct
completions where the two classes are as frequent as on the fitted rows.  Weights that balance the classes
would fit another share, under which the calibration error that is reported here would rise.  If completions
are correct with a share s' in place of s, the threshold moves by T (log(s / (1 - s)) - log(s' / (1 - s'))).

    N  rows
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cooper_jax import statistics
from cooper_jax.data import seen_questions
from cooper_jax.runtime import remote_files
from cooper_jax.runtime.metrics import to_jsonable

# The file's name, in a directory of weights or in a run directory.
CALIBRATION = "calibration.json"
VERSION = 1  # of the file's format
FOLDS = 5  # of the cross-fit; fewer if there are fewer questions

_MAX_ITERATIONS = 100  # of Newton's method, which needs about 8
_TOLERANCE = 1e-10  # on the expected decrease of the loss per row, in nats


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A temperature and a threshold with the rows that they were fitted on."""

    temperature: float  # T, above 0
    threshold: float  # b, a logit

    # The fitted rows.
    rows: int
    positives: int  # those labelled correct

    # Expected calibration error (statistics.calibration_curve).
    ece_before: float  # of sigmoid(z) on the fitted rows
    ece_after: float  # of the calibrated probabilities on the same rows, which flatters
    ece_cross_fitted: float | None  # of probabilities from `cross_fit_logits`; None if a fold has no fit

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature}: it must be a number above 0")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold}: it must be a finite number")


# --- fitting -----------------------------------------------------------------------------------------


def fit_calibration(labels: np.ndarray, logits: np.ndarray, questions: Sequence[str]) -> Calibration:
    """Fit temperature and threshold to labelled rows by maximum likelihood.

    Args:
      labels: [N], above 0.5 for a correct completion.
      logits: f32[N].
      questions: [N], for the cross-fitted calibration error.

    Raises ValueError where no such fit exists: rows of one label only, logits that separate the labels
    perfectly (the likelihood grows as T falls to 0), or logits that fall as completions become correct (T < 0).
    """
    y, z = np.asarray(labels) > 0.5, np.asarray(logits, np.float64)
    temperature, threshold = _fit_temperature(y, z)

    # A fold may lack a fit where all rows together have one.
    cross_fitted = None
    with contextlib.suppress(ValueError):
        cross_fitted = _compute_ece(y, cross_fit_logits(y, z, questions))
    return Calibration(
        temperature=temperature,
        threshold=threshold,
        rows=len(y),
        positives=int(y.sum()),
        ece_before=_compute_ece(y, z),
        ece_after=_compute_ece(y, (z - threshold) / temperature),
        ece_cross_fitted=cross_fitted,
    )


def cross_fit_logits(
    labels: np.ndarray, logits: np.ndarray, questions: Sequence[str], folds: int = FOLDS
) -> np.ndarray:
    """Calibrate each row's logit by a fit on the rows of the other folds: f64[N].

    labels, logits, questions: as in `fit_calibration`.

    Raises ValueError for rows of a single question, and where the rows outside a fold have no fit.
    """
    y, z = np.asarray(labels) > 0.5, np.asarray(logits, np.float64)
    fold_of_row = assign_folds(questions, folds)
    calibrated = np.zeros(len(z))
    for fold in range(fold_of_row.max() + 1):
        inside = fold_of_row == fold  # bool[N]
        try:
            temperature, threshold = _fit_temperature(y[~inside], z[~inside])
        except ValueError as error:
            raise ValueError(f"without fold {fold + 1} of {fold_of_row.max() + 1}: {error}") from error
        calibrated[inside] = (z[inside] - threshold) / temperature
    return calibrated


def assign_folds(questions: Sequence[str], folds: int = FOLDS) -> np.ndarray:
    """Assign rows to folds by whole questions: i64[N], numbers from 0.

    The folds have equally many questions, up to one.  They depend on the questions' normalised texts alone
    and not on a seed or on the order of rows.

    Raises ValueError for fewer than two questions.
    """
    # The order of fingerprints, which are hashes, is unrelated to the files' order, by source or difficulty.
    fingerprints = [seen_questions.fingerprint_question(question) for question in questions]
    rank = {fingerprint: i for i, fingerprint in enumerate(sorted(set(fingerprints)))}
    if len(rank) < 2:
        raise ValueError(f"{len(rank)} question: a cross-fit needs rows of at least 2")
    return np.array([rank[fingerprint] % min(folds, len(rank)) for fingerprint in fingerprints])


def _fit_temperature(labels: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Fit (T, b) to labels bool[N] and logits f64[N].  Raises ValueError as `fit_calibration` does."""
    correct, wrong = logits[labels], logits[~labels]
    if not len(correct) or not len(wrong):
        raise ValueError(f"all {len(labels)} rows have the same label")
    if correct.min() >= wrong.max() or correct.max() <= wrong.min():
        raise ValueError(
            f"the logits of {len(correct)} correct rows ({correct.min():.4g} to {correct.max():.4g}) and of "
            f"{len(wrong)} wrong rows ({wrong.min():.4g} to {wrong.max():.4g}) do not overlap, so the "
            "likelihood has no maximum"
        )

    # Standardised logits keep Newton's 2 x 2 systems well conditioned.
    mean, deviation = logits.mean(), logits.std()
    features = np.stack([(logits - mean) / deviation, np.ones(len(logits))], axis=1)  # f64[N, 2]
    slope, intercept = fit_logistic(features, labels)
    if slope <= 0:
        raise ValueError(
            f"the fitted temperature is not positive (slope {slope / deviation:.4g}): the logits of wrong "
            "rows are higher than those of correct ones"
        )

    # slope (z - mean) / deviation + intercept = (z - b) / T
    return float(deviation / slope), float(mean - intercept * deviation / slope)


def fit_logistic(features: np.ndarray, labels: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """Fit a logistic regression P(correct) = sigmoid(features @ w) by Newton's method: w f64[K].

    Args:
      features: f64[N, K]; a constant column serves as the intercept.
      labels: bool[N].
      ridge: of the penalty ridge |w|^2 / 2, added to the sum of the rows' losses.

    Raises ValueError if Newton's method does not converge, as for separable labels without a ridge.
    """
    x, signs = np.asarray(features, np.float64), np.where(labels, 1.0, -1.0)  # [N, K], [N]
    penalty = ridge * np.eye(x.shape[1])

    def compute_loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -signs * (x @ w)).sum() + w @ penalty @ w / 2)

    w = np.zeros(x.shape[1])
    loss = compute_loss(w)
    for _ in range(_MAX_ITERATIONS):
        # With p = sigmoid(x w): gradient x' (p - y) + ridge w, Hessian x' diag(p (1 - p)) x + ridge.
        p = np.exp(-np.logaddexp(0.0, -(x @ w)))  # f64[N]
        gradient = x.T @ (p - (signs > 0)) + penalty @ w
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + penalty
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            break
        decrease = float(gradient @ step) / 2
        if decrease <= _TOLERANCE * len(x):
            return w - step

        # Halve the step until the loss falls: far from the minimum a whole step may overshoot it.
        while (new := compute_loss(w - step)) > loss and np.abs(step).max() > 0:
            step = step / 2
        w, loss = w - step, new
    raise ValueError(
        f"the logistic regression on {len(x)} rows, {int((signs > 0).sum())} of them correct, did not converge in "
        f"{_MAX_ITERATIONS} steps with ridge={ridge:g}: its features separate the labels or depend on each "
        "other: fit to more rows, or with a greater ridge"
    )


def _compute_ece(labels: np.ndarray, logits: np.ndarray) -> float:
    """Compute the expected calibration error of sigmoid(logits).  labels: bool[N]; logits: f64[N]."""
    return statistics.calibration_curve(labels, np.exp(-np.logaddexp(0.0, -logits)))[0]


# --- use ---------------------------------------------------------------------------------------------


def apply_calibration(logits: np.ndarray, calibration: Calibration | None) -> np.ndarray:
    """Map logits [N] to calibrated logits (z - b) / T, f32[N]; without a calibration return them unchanged."""
    if calibration is None:
        return logits
    # In f64, so that the threshold is not rounded before it is compared with the logits.
    z = np.asarray(logits, np.float64)
    return ((z - calibration.threshold) / calibration.temperature).astype(np.float32)


# --- files -------------------------------------------------------------------------------------------


def encode_calibration(calibration: Calibration) -> bytes:
    """Encode the contents of calibration.json."""
    content = {"version": VERSION} | dataclasses.asdict(calibration)
    return json.dumps(to_jsonable(content), indent=1).encode() + b"\n"


def decode_calibration(content: bytes, path: str) -> Calibration:
    """Decode the contents of calibration.json.

    path: the file's name, with which messages begin.

    Raises ValueError for another version, missing or unknown fields, and values out of range.
    """
    try:
        fields = json.loads(content)
        _check_fields(fields)
        return Calibration(**{name: value for name, value in fields.items() if name != "version"})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; copy it again from the source of the weights") from error


def _check_fields(fields: Any) -> None:
    """Raise ValueError unless the JSON of a file has the fields of `Calibration`, as numbers, and our version."""
    if not isinstance(fields, dict):
        raise ValueError(f"it contains a {type(fields).__name__}, not an object")
    if fields.get("version") != VERSION:
        raise ValueError(f"its version is {fields.get('version')}, and this code reads version {VERSION}")
    known = {"version", *(field.name for field in dataclasses.fields(Calibration))}
    if known != fields.keys():
        raise ValueError(
            f"its fields are {', '.join(sorted(fields))}; they must be {', '.join(sorted(known))}"
        )
    for name, value in fields.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and not (name == "ece_cross_fitted" and value is None):
            raise ValueError(f"field {name!r} is {value!r}, not a number")


def write_calibration(directory: str | os.PathLike, calibration: Calibration) -> None:
    """Write calibration.json into a directory of weights or a run directory."""
    path = remote_files.to_path(directory) / CALIBRATION
    remote_files.write_atomically(path, encode_calibration(calibration))


def read_calibration(directory: str | os.PathLike) -> Calibration:
    """Read the calibration of weights (a directory, an address or a hub id) or of a run directory.

    Raises FileNotFoundError with the path and the fix if there is none, ValueError for a damaged file.
    """
    path = seen_questions.find_weights_file(os.fspath(directory), CALIBRATION)
    if path is None:
        raise FileNotFoundError(
            f"{os.fspath(directory).rstrip('/')}/{CALIBRATION} is not there: launch/train_rm.py writes it into "
            "RUN/best (its table says if there was no fit), and runs with --config.reward.calibrated=True into "
            "their directory; give such weights or such a run, or set --config.reward.calibrated=False"
        )
    return decode_calibration(path.read_bytes(), str(path))
