"""Runs for the tests of reports, made by the writers that training uses, with numbers and texts of their own."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from cooper_jax.configs import tiny
from cooper_jax.report import report_data
from cooper_jax.runtime.run_directory import RunDirectory
from cooper_jax.trainer import recipes
from cooper_jax.trainer.samples import StepRecord, select_samples
from cooper_jax.types import Completion, Pair, Problem, Verdict

# What a step of the arm `cooper` measures.
METRICS = """
data/epoch data/position oracle/accuracy oracle/accuracy_number oracle/accuracy_words
pairs/refused_same_answer pairs/valid pairs/valid_share policy/advantage_abs policy/advantage_mean
policy/clip_high policy/clip_low policy/dual_clip policy/entropy policy/grad_norm policy/kl policy/loss
policy/lr policy/pg_loss policy/ratio_max policy/ratio_mean policy/ratio_min policy/rollout_mismatch
policy/rollout_mismatch_max policy/rollout_mismatch_p50 policy/rollout_mismatch_p99 policy/rollout_ratio_max
policy/rollout_ratio_min policy/skipped response/tokens_max response/tokens_mean response/truncated
reward/flat_group_share reward/std reward/zero_variance_groups rm/accuracy rm/grad_norm rm/loss rm/lr rm/mean
rm/mean_on_correct rm/mean_on_wrong rm/negative_mean rm/pair_loss rm/positive_mean rm/rule_agreement
rm/skipped rm/updates rollout/imbalance rollout/slot_use rollout/steps rule/no_answer rule/timeout
rule/unrecognised rule/wrong time/functions time/logprobs time/pairs time/policy time/reward time/rollout
time/rule time/score time/tokens_per_second time/waiting
""".split()
# Text that would break out of a page that did not escape it.
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<style>body { display: none }</style>&lt;b&gt; {{script}} \x00\x07\x1b[31m \u202egnp.exe\u202c \ud800 "
    "\u2028 مرحبا بالعالم ${1} `x`"
)


def encode(*places: Path, title: str = "") -> dict:
    """What a report on these folders embeds."""
    return report_data.encode_report(report_data.collect_report([str(place) for place in places], title))


@dataclasses.dataclass(frozen=True)
class RunShape:
    """The size of a run."""

    steps: int = 12
    every: int = 2  # steps between evaluations, and between dumps of samples
    group: int = 4  # responses to a prompt
    prompts: int = 2  # in a dump
    words: int = 8  # in a response


def write_run(
    path: Path, shape: RunShape = RunShape(), *, seed: int = 0, hacked: bool = True, text: str = "", **changes
) -> Path:
    """Write a run of the arm `cooper`.

    hacked: held-out accuracy falls from the middle of the run on.  text: is in every response.
    """
    cfg = tiny.get_config()
    recipes.apply_presets(cfg, ())
    cfg.update_from_flattened_dict(
        {"run_dir": str(path), "seed": seed, "steps": shape.steps, "log.to": ""}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    rng = np.random.default_rng(seed)
    with RunDirectory(path, cfg, resume=True) as run:
        run.truncate(None)
        run.log(0, make_evaluation(0, shape, hacked))
        for step in range(1, shape.steps + 1):
            row = {name: float(rng.normal(1, 0.2)) for name in METRICS} | make_signal(step, shape)
            if step % shape.every == 0:
                row |= make_evaluation(step, shape, hacked)
                record = make_record(step, shape, rng, text)
                samples = select_samples(record, shape.prompts, is_correct, lambda ids: f"Solve: {ids}\n")
                run.dump_samples(step, samples)
            run.log(step, row)
    return path


def make_signal(step: int, shape: RunShape) -> dict[str, float]:
    """The metrics whose values tests know: reward and false positives rise, rule accuracy falls."""
    share = step / shape.steps
    return {
        "reward/mean": 0.4 + 0.5 * share,
        "rule/accuracy": 0.3 - 0.2 * share,
        "rule/decidable": 0.8,
        "rm/false_positive_rate": 0.1 + 0.8 * share,
        "rm/false_negative_rate": math.nan if step == 1 else 0.1,
        "time/step": 2.0,
        "time/eval": 0.5,
    }


def make_evaluation(step: int, shape: RunShape, hacked: bool) -> dict[str, float]:
    share = step / shape.steps
    accuracy = 0.3 + 0.3 * share
    if hacked and share > 0.5:
        accuracy = max(0.0, 0.45 - 1.2 * (share - 0.5))
    return {
        "eval/oracle/accuracy": accuracy,
        "eval/rule/accuracy": accuracy / 2,
        "eval/rm_policy/accuracy": 0.9 - 0.5 * share,
    }


def is_correct(problem: Problem, text: str) -> bool:
    return text.endswith(f"#### {problem.reference}")


def make_record(step: int, shape: RunShape, rng: np.random.Generator, text: str) -> StepRecord:
    """Responses that are right and wrong in turn, with verdicts and scores that do not all agree."""
    verdicts = [Verdict.CORRECT, Verdict.WRONG, Verdict.UNRECOGNISED, Verdict.NO_ANSWER]
    problems, completions, given, pairs = [], [], [], []
    for index in range(shape.prompts):
        reference = str(10 * step + index)
        problem = Problem(f"Question {index} of step {step}?", reference, id=f"train:{step}:{index}")
        problems.append(problem)
        for sample in range(shape.group):
            words = " ".join(f"word{n}" for n in rng.integers(0, 2000, shape.words))
            answer = reference if sample % 2 == 0 else "7"
            completions.append(Completion(f"{text}{words} #### {answer}", tokens=shape.words))
            given.append(verdicts[sample % len(verdicts)])
        right = completions[-shape.group].text
        wrong = right.replace(f"#### {reference}", "#### 999")
        pairs.append(Pair(problem, right, wrong, index * shape.group) if index == 0 else None)
    count = len(completions)
    scores = np.linspace(0.05, 0.95, count, dtype=np.float32)
    return StepRecord(
        problems, completions, given, scores, scores - scores.mean(), pairs, Counter(),
        scores=scores, prompt_tokens=[[n] for n in range(shape.prompts)],
    )  # fmt: skip


def write_study(path: Path, arms=("rule", "frozen"), seeds=(3, 4)) -> Path:
    """Write a study's folder; the last arm is hacked."""
    for arm in arms:
        folder = path / "arms" / arm
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps({"reward.arm": arm}))
        for seed in seeds:
            write_run(path / f"seed_{seed}" / arm, seed=seed, hacked=arm == arms[-1])
    # Runs of supervised phases alone are no runs to compare.
    (path / "seed_3" / "start").mkdir(parents=True)
    (path / "seed_3" / "start" / "config.json").write_text("{}")
    (path / "settings.json").write_text(json.dumps({"steps": 12}))
    return path


def write_reward_training(path: Path) -> Path:
    """Write what launch/train_rm.py leaves in its run directory."""
    cfg = tiny.get_config()
    cfg.name = "verifyrm"
    with RunDirectory(path, cfg, resume=True) as run:
        run.truncate(None)
        for step in range(1, 9):
            row = {
                "train_rm/loss": 0.7 - 0.05 * step,
                "train_rm/accuracy": 0.5 + 0.05 * step,
                "time/step": 1.0,
            }
            if step % 2 == 0:
                row |= {
                    "eval/loss": 0.6,
                    "eval/accuracy": 0.6 + 0.04 * step,
                    "eval/auroc": 0.9,
                    "eval/ece": 0.1,
                }
            run.log(step, row)

    figures = {name: {"value": 0.9, "low": 0.8, "high": 0.95} for name in ("accuracy", "auroc", "precision")}
    group = {
        "rows": 40, "questions": 8, "positives": 16, "figures": figures | {"ece": {"value": 0.1}},
        "reliability": [
            {"predicted": 0.2, "observed": 0.1, "count": 25}, {"predicted": 0.8, "observed": 0.9, "count": 15},
        ],
    }  # fmt: skip
    report = {
        "name": "verifyrm", "best": {"step": 8, "auroc": 0.9}, "updates": 8, "training_rows": 100,
        "groups": {"all": group, "gsm8k": group, "math": group}, "calibration_note": "calibration fitted",
    }  # fmt: skip
    (path / "report.json").write_text(json.dumps(report))
    return path


def write_evaluation(path: Path, problems: int = 3, samples: int = 2) -> Path:
    """Write what launch/evaluate.py --benchmark leaves in its folder."""
    path.mkdir(parents=True)
    (path / "settings.json").write_text(json.dumps({"seed": 0, "benchmark.samples": samples}))
    rows = []
    for index in range(problems):
        for sample in range(samples):
            rows.append({
                "benchmark": "gsm8k", "id": f"gsm8k:{index}", "place": index, "subject": "", "level": "",
                "question": f"How many {index}?", "reference": "5", "sample": sample,
                "completion": f"It is {5 + sample}.", "tokens": 4, "truncated": False,
                "rule": "correct" if sample == 0 else "wrong", "reward": 0.75,
            })  # fmt: skip
    (path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    judges = {
        "rule": {"accuracy": interval},
        "model": {"accuracy": {"value": 1.0, "low": None, "high": None}},
    }
    results = {"settings": {}, "benchmarks": [{"benchmark": "gsm8k", "judges": judges}], "mean": {}}
    (path / "results.json").write_text(json.dumps(results))
    (path / "table.txt").write_text("benchmark  accuracy\n---------  --------\ngsm8k      50.0\n")
    return path
