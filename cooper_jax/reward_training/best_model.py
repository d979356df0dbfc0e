"""The best model of a training, as others use it, and what is said about it.

1. `keep` writes best/ (weights as transformers and `reward.weights` read them, the tokenizer, the fingerprints of
   the questions that it was trained on) and its logits on the held-out rows.
2. `conclude` turns those logits into report.json, reliability.png and a table.
"""

from __future__ import annotations

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
from cooper_jax.reward_training import rm_report, rm_setup
from cooper_jax.reward_training.examples import UNNAMED
from cooper_jax.runtime import hosts, remote_files
from cooper_jax.runtime.metrics import read_lines, to_jsonable
from cooper_jax.runtime.remote_files import write_atomically

BEST = "best"
PREDICTIONS = "predictions.jsonl"


def keep_best_model(job: rm_setup.Job, params: Any, step: int, value: float, logits: np.ndarray) -> None:
    """Replace what is kept of the best model.  All processes must call it; the first one writes."""
    if jax.process_count() > 1:
        params = hosts.fetch_arrays(params)  # whole, on every host's memory

    def write() -> None:
        remote = remote_files.is_remote(job.path)
        folder = (remote_files.staging_dir(job.path) if remote else Path(job.path)) / BEST
        export_best_model(job, params, folder)
        if remote:
            # The record first: weights without it say nothing of what they saw.
            for file in sorted(folder.iterdir(), key=lambda f: f.name != seen_questions.SEEN):
                epath.Path(file).copy(job.path / BEST / file.name, overwrite=True)
            shutil.rmtree(folder)
        rows = rm_report.list_predictions(job.data.held_out, logits)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(job.path / PREDICTIONS, text.encode("utf-8", "backslashreplace"))

    hosts.on_primary_first("best model", write)


def export_best_model(job: rm_setup.Job, params: Any, folder: Path) -> None:
    """A directory that AutoModelForSequenceClassification and `reward.weights` load.

    It appears whole, with the record of what its model saw; one that is there is replaced.
    """
    model = job.model
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
    seen_questions.write_record(staged, seen_questions_of(job))
    shutil.rmtree(old, ignore_errors=True)  # a killed run's
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def seen_questions_of(job: rm_setup.Job) -> seen_questions.Record:
    """The questions that this run's model is trained on, and what the weights to begin with had seen."""
    data, questions = job.data, defaultdict(set)
    for t in data.train.triples[: len(data.train) - data.attacked]:  # some hacks alter the question
        questions[t.source or UNNAMED].add(t.question)
    # Without a trained head they are a language model's; with one, somebody's, trained on we do not know what.
    found = seen_questions.read_record(job.cfg.reward.weights) or seen_questions.Record(
        complete=not job.head_trained
    )
    for source, asked in sorted(questions.items()):
        found |= seen_questions.record_questions(asked, source)
    return found


def write_seen_record(job: rm_setup.Job) -> None:
    """Lay that record into the run directory as well, where those look who take a model from its checkpoints."""
    hosts.on_primary_first(
        "questions seen", lambda: seen_questions.write_record(job.path, seen_questions_of(job))
    )


def write_final_report(job: rm_setup.Job, step: int, best: dict[str, float]) -> str:
    """report.json and reliability.png of the best model; returns the table, for the terminal."""
    held_out, section = job.data.held_out, job.cfg.train_rm
    path = job.path / PREDICTIONS
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PREDICTIONS
        copy.write_bytes(path.read_bytes())
        rows = read_lines(copy)
    logits = np.array([row["logit"] for row in rows])
    if [row["id"] for row in rows] != [t.id for t in held_out.triples]:
        raise ValueError(f"{path} is of other held-out rows than this run's: begin again in a new run_dir")
    groups = rm_report.make_report(held_out, logits, job.cfg.seed)
    found = {
        "name": job.cfg.name,
        "best": {"step": int(best["step"]), section.keep_best: best["value"]},
        "updates": step,
        "training_rows": len(job.data.train),
        "attacked": job.data.attacked,
        "too_long": job.data.too_long,
        "overlapping": job.data.overlapping,
        "overlap_excluded": job.data.excluded,
        "groups": groups,
    }
    write_atomically(job.path / "report.json", json.dumps(to_jsonable(found), indent=2).encode() + b"\n")
    title = f"{job.cfg.name}, update {best['step']:.0f}: {len(held_out)} held-out rows"
    write_atomically(job.path / "reliability.png", rm_report.plot_reliability(held_out, logits, title))
    return (
        f"{rm_report.format_report_table(groups)}\n{job.path}: {step} updates done; {BEST}/ is the model of update "
        f"{best['step']:.0f} ({section.keep_best} {best['value']:.4f}), with report.json, reliability.png and "
        f"{PREDICTIONS}"
    )
