"""What a run says at its end: what changed from start to end, where its files are, what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cooper_jax.runtime.console import format_seconds
from cooper_jax.runtime.trackers.tracker_choice import split_names
from cooper_jax.trainer.run_display import FIGURES, format_figure
from cooper_jax.trainer.run_settings import RunSettings

# What the figures of an evaluation are called in full.
NAMES = {
    "held-out": "held-out accuracy",
    "reward": "reward",
    "false pos.": "false positives, held out",
    "KL": "KL to the policy of step 0",
    "tokens": "tokens a response, held out",
}


def describe_end(settings: RunSettings, path: str, rows: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """The closing summary of a complete run.

    Args:
      path: of the run directory.
      rows: of its metrics.jsonl, all of them.
      seconds: that this command took.
    """
    lines = [f"{path}: {settings.steps} steps complete; this command took {format_seconds(seconds)}"]
    lines += describe_changes(rows)
    lines.append("files")
    lines += _list_files(settings)
    lines += ["next", f"  {find_command('report')} {shlex.quote(path)}"]
    lines.append(
        f"  {find_command('export')} --run_dir={shlex.quote(path)} --model=policy --out=exported/policy"
    )
    benchmark = "synthetic" if settings.data.is_synthetic else "FILE"
    lines.append(
        f"  {find_command('evaluate')} --run_dir={shlex.quote(path)} --benchmark={benchmark} --out=runs/evaluation"
    )
    return "\n".join(lines)


def describe_changes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the figures at the first and at the last row that have them, with the rows' steps."""
    cells = []
    for heading, metrics, spec in FIGURES:
        figures = [(int(row["step"]), format_figure(row, metrics, spec)) for row in rows]
        # A metric that an evaluation could not measure is no figure.
        measured = [(step, figure) for step, figure in figures if figure != "-"]
        if len(measured) > 1:
            (first, start), (last, end) = measured[0], measured[-1]
            cells.append((NAMES[heading], start, end, f"steps {first} and {last}"))
    if not cells:
        return []
    table = [("", "start", "end", ""), *cells]
    return [f"  {name:27}  {start:>8}  {end:>8}   {steps}".rstrip() for name, start, end, steps in table]


def _list_files(settings: RunSettings) -> list[str]:
    files = [("metrics.jsonl", "the figures of each step")]
    if settings.supervised.policy_steps or settings.supervised.reward_steps:
        files.append(("supervised.jsonl", "the losses of the phases before step 1"))
    if settings.log.samples_every:
        files.append(("samples.jsonl", "prompts with their responses, verdicts, rewards and pairs"))
    files.append(
        ("checkpoints/", "policy and reward model; the same command with more steps goes on from them")
    )
    if "tensorboard" in split_names(settings.log.to):
        files.append(("tensorboard/", "the same figures as events"))
    return [f"  {name:17}  {text}" for name, text in files]


def describe_resumption() -> str:
    """How to resume a run that a signal has ended: the command, if this process is one of the launch scripts."""
    command = describe_own_command()
    return f"to resume: {command}" if command else "the same call resumes"


def describe_own_command() -> str:
    """The command line of this process; "" if it was not started by a script of launch/."""
    name = sys.argv[0]
    if name.startswith("cooper-jax "):
        return shlex.join([*name.split(" "), *sys.argv[1:]])
    if name.endswith(("launch/train.py", "launch/train_rm.py")):
        return shlex.join(["python", *sys.argv])
    return ""


def find_command(job: str) -> str:
    """The command of another job, as this process was started: by the console script or from a checkout."""
    return f"cooper-jax {job}" if sys.argv[0].startswith("cooper-jax ") else f"python launch/{job}.py"
