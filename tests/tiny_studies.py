"""Studies for tests: settings of seconds, and the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny_runs
from ml_collections import ConfigDict

from cooper_jax.configs import tiny
from cooper_jax.study import arms, study_plan

ROOT = Path(__file__).resolve().parents[1]


def small(**changes) -> ConfigDict:
    cfg = tiny.get_config()
    fields = {"steps": 4, "eval.every": 2} | {name.replace("__", "."): x for name, x in changes.items()}
    cfg.update_from_flattened_dict(fields)
    return cfg


def a_study(
    out: Path,
    names=("rule", "frozen"),
    seeds=(3, 4),
    defined=(),
    given=("name", "steps", "eval.every"),
    **changes,
):
    base = small(**changes)
    return study_plan.Study(
        out, "configs/tiny.py", base, given, arms.choose_arms(names, defined, base), seeds
    )


def launch(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/study.py"), *words],
        env=tiny_runs.environment(), capture_output=True, text=True, timeout=900, cwd=ROOT,
    )  # fmt: skip
