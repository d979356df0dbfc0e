"""The best model of a reward model's training, exported for use elsewhere, and the report on it.

1. `keep_best_model` writes best/ and the model's logits on the held-out rows.  best/ contains the weights in
   the form that transformers and `reward.weights` read, the tokenizer, the training questions' fingerprints,
   and the calibration that is fitted to those logits, if there is a fit.
2. `write_final_report` turns those logits into report.json, reliability.png and a table.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from cooper_jax.data import seen_questions
from cooper_jax.model import weight_export
from cooper_jax.reward import calibration
from cooper_jax.reward.calibration import Calibration
from cooper_jax.reward_training import rm_report, rm_setup
from cooper_jax.reward_training.examples import UNNAMED
from cooper_jax.runtime import hosts, remote_files
from cooper_jax.runtime.metrics import read_lines, to_jsonable
from cooper_jax.runtime.remote_files import write_atomically

BEST = "best"
PREDICTIONS = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class BestEvaluation:
    """The best held-out evaluation so far."""

    step: int  # updates done before it
    value: float  # of the metric that train_rm.keep_best names


def keep_best_model(job: rm_setup.Job, params: Any, step: int, value: float, logits: np.ndarray) -> None:
    """Replace the stored best model.  All processes must call this; the first one writes.

    Args:
      step: updates done.
      value: the model's value of the metric that train_rm.keep_best names.
      logits: of the held-out rows, f32[N].
    """
    # Export needs whole arrays.  Fetching is a collective operation, so it precedes the part that only the
    # first process runs.
    if jax.process_count() > 1:
        params = hosts.fetch_arrays(params)  # a full copy of the weights in the memory of every host

    def write() -> None:
        # The exporter writes local files only: a run directory in a bucket is filled by copying.
        remote = remote_files.is_remote(job.path)
        folder = (remote_files.staging_dir(job.path) if remote else Path(job.path)) / BEST
        fitted, _ = rm_report.fit_held_out_calibration(job.data.held_out, logits)
        export_best_model(job, params, folder, fitted)
        if remote:
            _copy_best_model(folder, job.path / BEST)
            shutil.rmtree(folder)

        # One line per held-out row, from which the final report is computed.
        rows = rm_report.list_predictions(job.data.held_out, logits)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(job.path / PREDICTIONS, text.encode("utf-8", "backslashreplace"))

    hosts.on_primary_first("best model", write)


def _copy_best_model(folder: Path, target: epath.Path) -> None:
    """Copy the files of best/ to a bucket, over those of an earlier model."""
    # The record of questions comes first: without it, the weights would count as trained on unknown questions.
    # The calibration comes last, and the old one is removed before: it must not be applied to other weights.
    (target / calibration.CALIBRATION).unlink(missing_ok=True)

    def get_rank(file: Path) -> tuple[bool, bool]:
        return file.name == calibration.CALIBRATION, file.name != seen_questions.SEEN

    for file in sorted(folder.iterdir(), key=get_rank):
        epath.Path(file).copy(target / file.name, overwrite=True)


def export_best_model(
    job: rm_setup.Job, params: Any, folder: Path, fitted: Calibration | None = None
) -> None:
    """Write a directory that AutoModelForSequenceClassification and `reward.weights` load.

    The directory is written under another name and then renamed, so it is always complete and includes the
    record of the training questions.  An existing directory is replaced.

    fitted: the calibration to be stored with the weights; None: none is stored.
    """
    model = job.model
    # Both temporary names are in the same parent directory, so that renaming never copies.
    staged, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("staged", "old"))
    with tempfile.TemporaryDirectory() as tokenizer:
        model.tokenizer.save(tokenizer)
        weight_export.save_pretrained(
            staged,
            model.config,
            params,
            "score",
            tokenizer_dir=tokenizer,
            generation_config={"eos_token_id": list(model.tokenizer.eos_ids)},
            pad_token_id=model.tokenizer.pad_id,
        )
    seen_questions.write_record(staged, make_seen_record(job))
    if fitted is not None:
        calibration.write_calibration(staged, fitted)

    # A directory cannot be renamed onto another that has files: move the old one away first.
    shutil.rmtree(old, ignore_errors=True)  # a leftover of a run that was killed
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def make_seen_record(job: rm_setup.Job) -> seen_questions.Record:
    """The questions that this run trains on, added to those that the initial weights were trained on."""
    data = job.data
    questions: dict[str, set[str]] = defaultdict(set)  # source -> questions
    # Added rows come last and are left out: some reward hacks alter the question.
    for triple in data.train.triples[: len(data.train) - sum(data.added.values())]:
        questions[triple.source or UNNAMED].add(triple.question)

    # Initial weights with a trained score head and no record were trained on unknown questions.
    record = seen_questions.read_record(job.cfg.reward.weights) or seen_questions.Record(
        complete=not job.head_trained
    )
    for source, source_questions in sorted(questions.items()):
        record |= seen_questions.record_questions(source_questions, source)
    return record


def write_seen_record(job: rm_setup.Job) -> None:
    """Write the record of training questions into the run directory, for models loaded from checkpoints."""
    hosts.on_primary_first(
        "questions seen", lambda: seen_questions.write_record(job.path, make_seen_record(job))
    )


def write_final_report(job: rm_setup.Job, step: int, best: BestEvaluation) -> str:
    """Write report.json and reliability.png of the best model; returns a table for the terminal.

    step: updates done in total.

    Raises ValueError if the rows of predictions.jsonl are not the held-out ones.
    """
    held_out, selection = job.data.held_out, job.settings.train_rm.keep_best
    # The stored logits make the report independent of the model that is in memory, which is the last one.
    logits = _read_logits(job)
    groups = rm_report.make_report(held_out, logits, job.cfg.seed)
    fitted, calibration_note = rm_report.fit_held_out_calibration(held_out, logits)
    report = {
        "name": job.cfg.name,
        "best": {"step": best.step, selection: best.value},
        "updates": step,
        # Row counts of the data.
        "training_rows": len(job.data.train),
        "added_rows": dict(job.data.added),
        "too_long": job.data.too_long,
        "overlapping": job.data.overlapping,
        "overlap_excluded": job.data.overlap_excluded,
        # Metrics of all rows and of each source.
        "groups": groups,
        # The calibration stored in best/; null if there is none, for the reason in the note.
        "calibration": None if fitted is None else dataclasses.asdict(fitted),
        "calibration_note": calibration_note,
    }
    write_atomically(job.path / "report.json", json.dumps(to_jsonable(report), indent=2).encode() + b"\n")

    title = f"{job.cfg.name}, update {best.step}: {len(held_out)} held-out rows"
    write_atomically(job.path / "reliability.png", rm_report.plot_reliability(held_out, logits, title))
    return (
        f"{rm_report.format_report_table(groups)}\n{calibration_note}\n{job.path}: {step} updates done; "
        f"{BEST}/ is the model of update {best.step} ({selection} {best.value:.4f}), with report.json, "
        f"reliability.png and {PREDICTIONS}"
    )


def _read_logits(job: rm_setup.Job) -> np.ndarray:
    """The best model's logits f64[N] from predictions.jsonl.

    Raises ValueError if the file's rows are not the held-out ones.
    """
    path = job.path / PREDICTIONS
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / PREDICTIONS  # the run directory may be in a bucket
        local.write_bytes(path.read_bytes())
        rows = read_lines(local)

    # A run directory that was used with other data would give a report on the wrong rows.
    if [row["id"] for row in rows] != [t.id for t in job.data.held_out.triples]:
        raise ValueError(f"{path} has rows other than this run's held-out ones: use a new --config.run_dir")
    return np.array([row["logit"] for row in rows])
