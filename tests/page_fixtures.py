"""The files that commands of the pages expect in the folder where they are run: small models, data and a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import tiny_directories
from page_commands import ROOT

# What a scratch folder has of the repository.
COPIED = ("configs", "cooper_jax", "docs", "examples", "kernels", "launch", "tests", "notebooks")
# Fields of the run that stands for the quick start's, as flags.
RUN = (
    "--config.steps=1 --config.supervised.policy_steps=4 --config.supervised.reward_steps=4 --config.eval.every=1 "
    "--config.eval.problems=8 --config.eval.reward_rows=8 --config.data.prompts_per_step=2 "
    "--config.rollout.group_size=2 --config.data.synthetic_size=64"
)


def copy_repository(folder: Path) -> None:
    """Copy what commands read into a scratch folder, so that one that writes pages changes no page of ours."""
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for file in (*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "mkdocs.yml"):
        shutil.copy(file, folder)


def write_models(folder: Path) -> None:
    """A language model and a reward model with random weights, in the places that the pages name."""
    # configs/verifyrm_smollm2.py takes the first eight layers.
    for name, head in (("policy", "logits"), ("scorer", "score")):
        tiny_directories.write_model(folder / "models" / f"{name}_files", head, layers=8, max_len=4096)
        shutil.move(folder / "models" / f"{name}_files" / "hf", folder / "models" / name)
    for run in ("verifyrm_smollm2", "verifyrm_attacked"):
        if not (folder / "runs" / run / "best").exists():
            shutil.copytree(folder / "models" / "scorer", folder / "runs" / run / "best")


def write_data(folder: Path) -> None:
    """Problems and labelled completions, under the names of the published files."""
    problems = [
        {
            "question": f"Ann has {n} pens and buys {n} more. How many pens has she?",
            "answer": f"{n}+{n}={2 * n}\n#### {2 * n}",
        }
        for n in range(2, 18)
    ]
    (folder / "benchmarks").mkdir(exist_ok=True)
    for name in ("gsm8k_train", "gsm8k_test", "svamp", "svamp_test", "benchmarks/svamp_test"):
        write_rows(folder / f"{name}.jsonl", problems)
    for name, first in (
        ("verify_train", 2),
        ("verify_dev", 40),
        ("verify_bench", 70),
        ("verify_bench_hard", 70),
    ):
        write_rows(folder / f"{name}.jsonl", label_completions(first))
    (folder / "verifierbench.json").write_text(json.dumps(label_completions(70)))


def label_completions(first: int) -> list[dict]:
    """Rows of two sources: a right and a wrong completion to each of 24 questions."""
    rows = []
    for n in range(first, first + 24):
        for label in (1, 0):
            total = 2 * n + 1 - label
            rows.append(
                {
                    "id": f"{n}/{label}",
                    "question": f"Bob finds {n} shells, then {n} more. How many shells has he?",
                    "reference_answer": str(2 * n),
                    "completion": f"He has {n} + {n} = {total} shells. The answer is {total}.",
                    "label": label,
                    "source": "gsm8k" if n % 2 else "svamp",
                    "model": "hand",
                }
            )
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, environment: dict[str, str]) -> None:
    """A complete run of the miniature in runs/tiny.  Raises CalledProcessError if it fails."""
    command = f"python launch/train.py --config=configs/tiny.py {RUN}"
    subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True, capture_output=True)


class Store:
    """Fixtures that are made once, and copied into the folder of each page that needs them.

    folder: of the store.  environment: of the commands.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self._folder, self._environment = folder, environment
        self._makers: dict[str, Callable[[Path], None]] = {
            "models": write_models,
            "data": write_data,
            "run": self._make_run,
        }

    def _make_run(self, folder: Path) -> None:
        copy_repository(folder / "source")
        make_run(folder / "source", self._environment)
        shutil.move(folder / "source" / "runs", folder / "runs")
        shutil.rmtree(folder / "source")

    def provide(self, name: str, page: Path) -> None:
        """Copy a fixture into a page's folder; files that are there already stay."""
        made = self._folder / name
        if not made.exists():
            made.mkdir(parents=True)
            self._makers[name](made)
        for file in sorted(made.rglob("*")):
            target = page / file.relative_to(made)
            if file.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif not target.exists():
                shutil.copy(file, target)
