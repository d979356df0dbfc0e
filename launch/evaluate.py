"""Measures a policy on benchmarks, and the judges of its answers on labelled completions.

    python launch/evaluate.py --config=configs/qwen_1p5b.py --config.policy.weights=DIR --out=runs/eval \\
        --benchmark=gsm8k_test.jsonl --benchmark=svamp_test.jsonl --benchmark=FOLDER
    python launch/evaluate.py --run_dir=runs/tiny --step=80 --benchmark=synthetic --out=runs/eval_tiny
    python launch/evaluate.py --config=configs/qwen_1p5b.py --config.reward.weights=DIR --out=runs/again \\
        --rejudge=runs/eval/items.jsonl --config.benchmark.judged_by=both

A folder stands for the benchmarks among its *_test files.  With --run_dir the models and prompts are those of a
run of launch/train.py; the other settings are those of configs/base.py, and any --config.FIELD of the command line
goes before both.  The same command goes on where it was stopped.  docs/evaluation.md explains files and figures.

Exit codes are those of launch/common.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags
from ml_collections import config_flags

from launch import common

BENCHMARK = flags.DEFINE_multi_string(
    "benchmark", [], "A file of problems, a folder, or synthetic; repeatable."
)
REJUDGE = flags.DEFINE_string("rejudge", "", "An items.jsonl whose responses are judged anew.")
OUT = flags.DEFINE_string("out", None, "The directory of the results.", required=True)
RUN_DIR = flags.DEFINE_string("run_dir", "", "A run of launch/train.py whose models are evaluated.")
STEP = flags.DEFINE_integer("step", -1, "The checkpoint's step; -1 is the newest.", lower_bound=-1)


def main(argv: list[str]) -> None:
    common.begin(argv)
    from cooper_jax.evaluation import jobs

    with common.running():
        chosen = choose()
        out = Path(OUT.value)
        if BENCHMARK.value:
            jobs.benchmarks(chosen.cfg, chosen, BENCHMARK.value, out)
        else:
            jobs.rejudge(chosen.cfg, chosen, REJUDGE.value, out)


def choose():
    """Where the models come from, with the config that holds for them.  Raises SetupError."""
    from cooper_jax import runs
    from cooper_jax.evaluation.scoring import Chosen
    from cooper_jax.runtime import files
    from cooper_jax.runtime.checkpoint import steps_in
    from cooper_jax.settings import SetupError, boundary

    given = [f"--{f.name}" for f in (BENCHMARK, REJUDGE) if f.value]
    if len(given) != 1:
        raise SetupError(
            f"{' and '.join(given) or 'nothing'} is asked for: give one of --benchmark, --rejudge"
        )
    if files.is_remote(OUT.value):
        raise SetupError(f"--out={OUT.value}: results are written to a local path, to be copied from there")
    cfg = common.config()
    if not RUN_DIR.value:
        if STEP.value != -1:
            raise SetupError(f"--step={STEP.value} is of a run: give --run_dir=RUN too")
        return Chosen(cfg, Path(OUT.value).expanduser().absolute())
    with boundary(f"--run_dir={RUN_DIR.value}"):
        run_dir = files.path(RUN_DIR.value)
        cfg = runs.over(
            cfg, runs.read_config(run_dir), config_flags.get_override_values(flags.FLAGS["config"])
        )
        steps = steps_in(run_dir)
        if not steps:
            raise ValueError("it holds no checkpoint yet")
        step = steps[-1] if STEP.value == -1 else STEP.value
        if step not in steps:
            raise ValueError(f"step {step} is not there; the checkpoints are {', '.join(map(str, steps))}")
    return Chosen(cfg, run_dir, run_dir, step)


def parse_flags(argv: list[str]) -> list[str]:
    """The launchers' own; --run_dir needs no --config, and brooks none."""
    named = {a.lstrip("-").split("=")[0] for a in argv[1:] if a.startswith("-")}
    if "run_dir" in named:
        if "config" in named:
            print("error: --config and --run_dir both say what is evaluated: leave one out", file=sys.stderr)
            sys.exit(2)
        extra = f"--config={ROOT / 'configs/base.py'}"
        argv = [argv[0], extra, *argv[1:]]
        sys.argv = argv  # where the config's own fields are looked for
    return common.parse_flags(argv)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
