"""The study, for real."""

from __future__ import annotations

import pytest
import tiny_runs
from tiny_studies import ROOT, launch

from cooper_jax.study import records, summary


@pytest.mark.slow
def test_a_study_of_seconds(tmp_path):
    """Two steps of a small model, from one start; frozen_warm keeps the reward model that robust begins with."""
    fields = tiny_runs.SMALL | {
        "steps": 2,
        "eval.every": 1,
        "eval.reward_rows": 8,
        "supervised.policy_steps": 100,
    }
    del fields["reward.recipe"]  # an arm's to say
    words = [
        f"--config={ROOT / 'configs/tiny.py'}",
        f"--out={tmp_path}",
        "--arms=rule,frozen,frozen_warm,robust",
    ]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    done = launch(*words, "--seeds=5", f"--keep={tmp_path / 'kept.jsonl'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6/6 runs" in done.stdout  # two starts and four arms
    found = records.read_records(tmp_path / "kept.jsonl")
    assert [(run.arm, run.done) for run in found.runs] == [
        ("rule", 2), ("frozen", 2), ("frozen_warm", 2), ("robust", 2)
    ]  # fmt: skip
    by_arm = {run.arm: tiny_runs.metrics(tmp_path / "seed_5" / run.arm) for run in found.runs}
    first = {arm: rows[0] for arm, rows in by_arm.items()}
    assert len({row["eval/oracle/accuracy"] for row in first.values()}) == 1
    assert (
        first["frozen_warm"]["eval/rm/mean"]
        == first["robust"]["eval/rm/mean"]
        != first["frozen"]["eval/rm/mean"]
    )
    assert "rm/updates" not in by_arm["frozen_warm"][1] and by_arm["robust"][1]["rm/updates"] == 2
    before = (tmp_path / "seed_5/rule/log.txt").read_text()
    again = launch(f"--out={tmp_path}", "--report")
    assert again.returncode == 0 and (tmp_path / "seed_5/rule/log.txt").read_text() == before
    assert (tmp_path / "tables.md").read_text().startswith("# Arms compared over seeds")


@pytest.mark.slow
def test_a_shortened_study_orders_the_arms(tmp_path):
    """The miniature's finding in half of its steps: frozen is hacked, the rule's arm rises, and Cooper's more."""
    fields = {
        "steps": 50, "eval.every": 10, "eval.problems": 512, "eval.greedy": False, "eval.reward_rows": 512,
        "checkpoint.every": 50,
    }  # fmt: skip
    words = [f"--config={ROOT / 'configs/tiny.py'}", f"--out={tmp_path}", "--seeds=10", "--jobs=2"]
    words += ["--arms=rule,frozen,robust", *(f"--config.{name}={value}" for name, value in fields.items())]
    done = launch(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary.summarise_study(records.read_folder(tmp_path))
    rule, frozen, robust = (
        next(run for run in found["runs"] if run["arm"] == name) for name in ("rule", "frozen", "robust")
    )
    assert rule["accuracy_start"] == frozen["accuracy_start"] == robust["accuracy_start"]
    assert frozen["ends_below_half"] and frozen["dipped"], frozen["accuracies"]
    assert frozen["reward_end"] > 0.7, "it was no hack: the policy earned little"
    assert rule["ends_above_start"] and not robust["dipped"], (rule["accuracies"], robust["accuracies"])
    assert robust["accuracy_end"] > rule["accuracy_end"] > frozen["accuracy_end"]
    assert robust["false_positives_end"] < frozen["false_positives_end"] / 2
