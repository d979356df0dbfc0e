"""Compare the metrics of two checkouts, bit for bit: a refactoring must not change what a run computes.

    python tests/compare_checkouts.py BEFORE AFTER [--out=DIR] [--cases=tiny,resume,...] [--data=gsm8k_train.jsonl]

BEFORE and AFTER are working trees of this repository.  Each case starts `launch/train.py` in both, on this machine,
and compares every value of metrics.jsonl except times.  Finished runs in DIR are kept, so that a second call with
another AFTER runs only what is new (delete DIR/after first).

    tiny      20 steps of configs/tiny.py in each arm and with each recipe, all from one step 0
    resume    the cooper arm in two starts: 10 steps, then 10 more
    hosts     4 steps on two processes of two devices each
    smollm2   3 steps of configs/smollm2_135m.py on the problems in --data (about 20 minutes a checkout;
              --prompts=2 takes less)

The tables below name flags and metrics that were renamed between the two checkouts, as old name -> new name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

# Flags by their name after `--config.`, metrics as they stand in metrics.jsonl.
RENAMED_FLAGS: dict[str, str] = {
    "warmup.start": "supervised.start_from",
    "warmup.policy_steps": "supervised.policy_steps",
    "warmup.reward_steps": "supervised.reward_steps",
}
RENAMED_METRICS: dict[str, str] = {}
# A checkout that lists an old name in this file knows the new one.
RENAMED_FLAGS_FILE = "cooper_jax/settings/renamed_flags.py"

RECIPES = {
    "rule": ["reward.arm=rule"],
    "model": ["reward.arm=model", "reward.recipe=released"],
    "released": ["reward.recipe=released"],
    "sigmoid": ["reward.recipe=sigmoid"],
    "robust": ["reward.recipe=robust"],
}
TINY = ["steps=20", "eval.every=10", "eval.problems=256", "eval.reward_rows=256", "log.samples_every=0"]
PHASES = ["warmup.policy_steps=300", "warmup.reward_steps=600"]
SHORT_PHASES = ["warmup.policy_steps=20", "warmup.reward_steps=20"]
CASES = ("tiny", "resume", "hosts", "smollm2")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_checkouts"))
    parser.add_argument("--cases", default="tiny,resume,hosts")
    parser.add_argument("--data", type=Path, help="smollm2: problems in GSM8K's format")
    parser.add_argument("--prompts", type=int, help="smollm2: prompts a step; default: the config's own")
    options = parser.parse_args()

    cases = options.cases.split(",")
    unknown = sorted(set(cases) - set(CASES))
    if unknown:
        parser.error(f"--cases names {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    if "smollm2" in cases and options.data is None:
        parser.error("the case smollm2 needs --data=FILE")

    before, after = options.out.resolve() / "before", options.out.resolve() / "after"
    smollm2 = []
    if "smollm2" in cases:
        smollm2 = [f"data.train={options.data.resolve()}", "steps=3"]
    if options.prompts is not None:
        smollm2.append(f"data.prompts_per_step={options.prompts}")
    names = run_cases(Runner(options.before.resolve(), before), cases, smollm2)
    run_cases(Runner(options.after.resolve(), after), cases, smollm2)

    differences: list[str] = []
    for name in names:
        differences += compare_runs(name, before / name, after / name)
    for difference in differences:
        print(difference)
    print(f"{len(names)} runs compared, {len(differences)} differences")
    return 1 if differences else 0


@dataclasses.dataclass(frozen=True)
class Runner:
    """Starts runs of one checkout, in folders of `out`."""

    checkout: Path
    out: Path

    def train(self, name: str, config: str, flags: list[str], launcher: tuple[str, ...] = ()) -> None:
        """Run launch/train.py to its end, unless the run has ended before.

        flags: NAME=VALUE, with the old names.  launcher: a command that starts several processes.

        Raises SystemExit where the run fails.
        """
        # Of a flag that is given twice the last value counts.
        given = dict(flag.split("=", 1) for flag in flags)
        run_dir = self.out / name
        if is_done(run_dir, int(given["steps"])):
            return

        command = [*launcher, sys.executable, str(self.checkout / "launch/train.py")]
        command += [f"--config={self.checkout / 'configs' / config}.py", f"--config.run_dir={run_dir}"]
        command += [f"--config.{self.name_flag(flag)}={value}" for flag, value in given.items()]

        print(f"{run_dir} ...", flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / f"{name}.log", "a") as log:
            done = subprocess.run(
                command, cwd=self.checkout, stdout=log, stderr=log, env=dict(os.environ), check=False
            )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: see {log.name}")

    def name_flag(self, old: str) -> str:
        """The name that this checkout has for a flag."""
        table = self.checkout / RENAMED_FLAGS_FILE
        section = old.partition(".")[0]
        knows_new_name = table.exists() and f'"{section}.' in table.read_text()
        return RENAMED_FLAGS.get(old, old) if knows_new_name else old


def run_cases(runner: Runner, cases: list[str], smollm2: list[str]) -> list[str]:
    """Start what has not finished yet; returns the names of the runs to compare.  smollm2: flags of that case."""
    names = []
    shared = [*TINY, f"warmup.start={runner.out / 'phases'}"]
    if "tiny" in cases or "resume" in cases:
        # The supervised phases run once: all runs below start from the models of this step 0.
        runner.train("phases", "tiny", ["steps=0", "eval.every=0", *PHASES])
    if "tiny" in cases:
        for name, flags in RECIPES.items():
            runner.train(name, "tiny", [*shared, *flags])
            names.append(name)
    if "resume" in cases:
        if not is_done(runner.out / "resumed", 20):
            runner.train("resumed", "tiny", [*shared, "steps=10"])
        runner.train("resumed", "tiny", shared)
        names.append("resumed")
    if "hosts" in cases:
        script = str(runner.checkout / "launch/local_hosts.py")
        two_hosts = (sys.executable, script, "-n", "2", "--devices", "2", "--")
        flags = [*TINY, *SHORT_PHASES, "steps=4", "eval.every=2", "mesh.data=2"]
        runner.train("hosts", "tiny", flags, two_hosts)
        names.append("hosts")
    if "smollm2" in cases:
        runner.train("smollm2", "smollm2_135m", smollm2)
        names.append("smollm2")
    return names


def is_done(run_dir: Path, steps: int) -> bool:
    """True if the run directory holds the checkpoint of its last step."""
    return (run_dir / "checkpoints" / str(steps)).is_dir()


def compare_runs(name: str, before: Path, after: Path) -> list[str]:
    """Lines that name each value that differs, by step and metric."""
    old_rows, new_rows = read_rows(before), read_rows(after)
    if len(old_rows) != len(new_rows):
        return [f"{name}: {len(old_rows)} rows before, {len(new_rows)} after"]

    differences = []
    for old_row, new in zip(old_rows, new_rows, strict=True):
        old = {RENAMED_METRICS.get(metric, metric): value for metric, value in old_row.items()}
        for metric in sorted(old.keys() | new.keys()):
            if not metric.startswith("time/") and old.get(metric) != new.get(metric):
                values = f"{old.get(metric)} before, {new.get(metric)} after"
                differences.append(f"{name}: step {new['step']}: {metric}: {values}")
    return differences


def read_rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl, in which a NaN is null."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
