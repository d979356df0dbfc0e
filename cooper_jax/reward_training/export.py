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

from cooper_jax.data import overlap
from cooper_jax.model import weights
from cooper_jax.reward_training import measure, plan
from cooper_jax.reward_training.examples import UNNAMED
from cooper_jax.runtime import files, hosts
from cooper_jax.runtime.files import write_atomically
from cooper_jax.runtime.metrics import jsonable, read_lines

BEST = "best"
PREDICTIONS = "predictions.jsonl"


def keep(job: plan.Job, params: Any, step: int, value: float, logits: np.ndarray) -> None:
    """Replace what is kept of the best model.  All processes must call it; the first one writes."""
    if jax.process_count() > 1:
        params = hosts.fetch(params)  # whole, on every host's memory

    def write() -> None:
        remote = files.is_remote(job.path)
        folder = (files.staging(job.path) if remote else Path(job.path)) / BEST
        save(job, params, folder)
        if remote:
            # The record first: weights without it say nothing of what they saw.
            for file in sorted(folder.iterdir(), key=lambda f: f.name != overlap.SEEN):
                epath.Path(file).copy(job.path / BEST / file.name, overwrite=True)
            shutil.rmtree(folder)
        rows = measure.predictions(job.data.held_out, logits)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(job.path / PREDICTIONS, text.encode("utf-8", "backslashreplace"))

    hosts.first("best model", write)


def save(job: plan.Job, params: Any, folder: Path) -> None:
    """A directory that AutoModelForSequenceClassification and `reward.weights` load.

    It appears whole, with the record of what its model saw; one that is there is replaced.
    """
    model = job.model
    staged, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("staged", "old"))
    with tempfile.TemporaryDirectory() as tokenizer:
        model.tokenizer.save(tokenizer)
        weights.save(
            staged,
            model.config,
            params,
            "score",
            tokenizer_dir=tokenizer,
            generation_config={"eos_token_id": list(model.tokenizer.eos_ids)},
            pad_token_id=model.tokenizer.pad_id,
        )
    overlap.write_record(staged, seen(job))
    shutil.rmtree(old, ignore_errors=True)  # a killed run's
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def seen(job: plan.Job) -> overlap.Record:
    """The questions that this run's model is trained on, and what the weights to begin with had seen."""
    data, questions = job.data, defaultdict(set)
    for t in data.train.triples[: len(data.train) - data.attacked]:  # some hacks alter the question
        questions[t.source or UNNAMED].add(t.question)
    # Without a trained head they are a language model's; with one, somebody's, trained on we do not know what.
    found = overlap.read_record(job.cfg.reward.weights) or overlap.Record(complete=not job.head_trained)
    for source, asked in sorted(questions.items()):
        found |= overlap.record(asked, source)
    return found


def note_seen(job: plan.Job) -> None:
    """Lay that record into the run directory as well, where those look who take a model from its checkpoints."""
    hosts.first("questions seen", lambda: overlap.write_record(job.path, seen(job)))


def conclude(job: plan.Job, step: int, best: dict[str, float]) -> str:
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
    groups = measure.report(held_out, logits, job.cfg.seed)
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
    write_atomically(job.path / "report.json", json.dumps(jsonable(found), indent=2).encode() + b"\n")
    title = f"{job.cfg.name}, update {best['step']:.0f}: {len(held_out)} held-out rows"
    write_atomically(job.path / "reliability.png", measure.plot(held_out, logits, title))
    return (
        f"{measure.table(groups)}\n{job.path}: {step} updates done; {BEST}/ is the model of update "
        f"{best['step']:.0f} ({section.keep_best} {best['value']:.4f}), with report.json, reliability.png and "
        f"{PREDICTIONS}"
    )
