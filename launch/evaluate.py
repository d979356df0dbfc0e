"""Evaluates a policy on benchmarks, and the judges of its answers on labelled completions.

    python launch/evaluate.py --config=configs/qwen_1p5b.py --config.policy.weights=DIR --out=runs/eval \\
        --benchmark=gsm8k_test.jsonl --benchmark=svamp_test.jsonl --benchmark=FOLDER
    python launch/evaluate.py --run_dir=runs/tiny --step=80 --benchmark=synthetic --out=runs/eval_tiny
    python launch/evaluate.py --config=configs/qwen_1p5b.py --config.reward.weights=DIR --out=runs/again \\
        --rejudge=runs/eval/items.jsonl --config.benchmark.judged_by=both
    python launch/evaluate.py --config=configs/verifyrm_1p5b.py --config.reward.weights=DIR \\
        --out=runs/judges --labelled=verify_dev.jsonl --judge=model --judge=rule --references=own
    python launch/evaluate.py --run_dir=runs/tiny --attacks=verify_dev.jsonl --compare=0 --out=runs/attacks

--benchmark evaluates a policy, --rejudge judges its recorded responses again, --labelled evaluates judges on
labelled completions, --attacks tests a reward model with known hacks.  A folder is read as the benchmarks in
its *_test files.  With --run_dir the models and prompts are those of a run of launch/train.py, and the other
settings are those of configs/base.py; a --config.FIELD of the command line overrides both.  The same command
resumes after an interruption.  docs/evaluation.md explains files and figures.

Exit codes are those of launch/common.py.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging
from ml_collections import config_flags

from cooper_jax.launch import common

# At run time this is imported after the flags are parsed, because importing JAX takes seconds.
if TYPE_CHECKING:
    from cooper_jax.evaluation.evaluated_models import ChosenModels

# --- the four kinds of evaluation, of which one must be given ---
BENCHMARK = flags.DEFINE_multi_string(
    "benchmark", [], "A file of problems, a folder, a hub id, or synthetic; repeatable."
)
REJUDGE = flags.DEFINE_string("rejudge", "", "An items.jsonl whose responses are judged again.")
LABELLED = flags.DEFINE_string("labelled", "", "Labelled completions, on which judges are measured.")
ATTACKS = flags.DEFINE_string("attacks", "", "Labelled completions, which are shown under known hacks.")

# --- options of --labelled ---
JUDGE = flags.DEFINE_multi_enum(
    "judge", [], ["model", "rule", "rule_then_model", "blend", "llm", "last_number", "yes", "prior"],
    "Who judges --labelled; the first is compared with the others.  None: model, rule, last_number and yes.",
)  # fmt: skip
PRIOR_FROM = flags.DEFINE_string("prior_from", "", "Labelled completions from which --judge=prior learns.")
BLEND_FROM = flags.DEFINE_string(
    "blend_from", "", "The items.jsonl of another comparison, to which --judge=blend is fitted."
)
REFERENCES = flags.DEFINE_enum(
    "references",
    "own",
    ["own", "none", "shuffled"],
    "The references that the judges of --labelled see.",
)

# --- options of --attacks ---
COMPARE = flags.DEFINE_multi_string(
    "compare", [], "--attacks: another reward model's weights, or with --run_dir a step; repeatable."
)
SEARCH = flags.DEFINE_integer(
    "search", 0, "--attacks: completions scored in a search for new attacks, at least 176; 0: no search.",
    lower_bound=0,
)  # fmt: skip

# --- options of all kinds ---
OUT = flags.DEFINE_string("out", None, "The directory of the results.", required=True)
RUN_DIR = flags.DEFINE_string("run_dir", "", "A run of launch/train.py whose models are evaluated.")
STEP = flags.DEFINE_integer("step", -1, "The checkpoint's step; -1 is the newest.", lower_bound=-1)


def main(argv: list[str]) -> None:
    """Run the evaluation that the flags name."""
    common.begin_job(argv)
    from cooper_jax.evaluation import attack_jobs, benchmark_jobs, judge_jobs

    with common.run_job("evaluating"):
        check_modes()
        chosen, out = choose_models(STEP.value), Path(OUT.value)

        # Each job loads the models that it needs and writes its results into `out`.
        if BENCHMARK.value:
            benchmark_jobs.evaluate_benchmarks(chosen.cfg, chosen, BENCHMARK.value, out)
        elif REJUDGE.value:
            benchmark_jobs.rejudge_items(chosen.cfg, chosen, REJUDGE.value, out)
        elif LABELLED.value:
            # A repeated judge is measured once.
            names = list(dict.fromkeys(JUDGE.value)) or ["model", "rule", "last_number", "yes"]
            judge_jobs.compare_judges(
                chosen.cfg, chosen, LABELLED.value, out,
                names=names, references=REFERENCES.value, prior_from=PRIOR_FROM.value,
                blend_from=BLEND_FROM.value,
            )  # fmt: skip
        else:
            attack_jobs.measure_attacks(
                chosen.cfg, chosen, ATTACKS.value, out,
                compare=[parse_compared(chosen, x) for x in COMPARE.value], search=SEARCH.value,
            )  # fmt: skip


def check_modes() -> None:
    """Raise SetupError unless the flags name one kind of evaluation, and no option of another kind."""
    from cooper_jax.settings.setup_errors import SetupError

    modes = [flag for flag in (BENCHMARK, REJUDGE, LABELLED, ATTACKS) if flag.value]
    if len(modes) != 1:
        given = " and ".join(f"--{flag.name}" for flag in modes) or "no evaluation"
        raise SetupError(
            f"{given} is asked for: give one of --benchmark, --rejudge, --labelled and --attacks"
        )
    options = ((JUDGE, LABELLED), (PRIOR_FROM, LABELLED), (BLEND_FROM, LABELLED), (COMPARE, ATTACKS))
    for flag, mode in (*options, (SEARCH, ATTACKS)):
        if flag.value and not mode.value:
            raise SetupError(f"--{flag.name} belongs to --{mode.name}")
    if REFERENCES.value != "own" and not LABELLED.value:
        raise SetupError(f"--references={REFERENCES.value} belongs to --labelled")


def choose_models(step: int) -> ChosenModels:
    """Choose the models to evaluate, with their config: those of --config, or those of --run_dir at `step`.

    step: -1 for the newest checkpoint.

    Raises SetupError for flags that contradict each other, and for a run or a step that does not exist.
    """
    from cooper_jax.evaluation.evaluated_models import ChosenModels
    from cooper_jax.runtime import remote_files
    from cooper_jax.runtime.checkpoint import list_steps
    from cooper_jax.settings.setup_errors import SetupError, setup_errors
    from cooper_jax.trainer import run_checkpoint

    if not OUT.value.strip():
        raise SetupError("--out is empty: give --out=DIR, the directory of the results")
    if remote_files.is_remote(OUT.value):
        raise SetupError(f"--out={OUT.value}: results are written to a local path, to be copied from there")
    cfg = common.read_config()

    # Without a run, the config names the weights.
    if not RUN_DIR.value:
        if step != -1:
            raise SetupError(f"--step={step} is a step of a run: give --run_dir=RUN, too")
        return ChosenModels(cfg, Path(OUT.value).expanduser().absolute())

    # Orbax warns of every checkpoint that is opened for reading only.
    logging.set_verbosity(logging.ERROR)
    with setup_errors(f"--run_dir={RUN_DIR.value}"):
        run_dir = remote_files.to_path(RUN_DIR.value)
        given = config_flags.get_override_values(flags.FLAGS["config"])
        for name in ("policy.weights", "reward.weights"):
            if name in given:
                raise ValueError(
                    f"--config.{name} names other weights than the run's: leave one of them out (to judge a "
                    "run's responses with another reward model: --rejudge=ITEMS --config.reward.weights=DIR)"
                )
        cfg = run_checkpoint.overlay_run(cfg, run_checkpoint.read_run_config(run_dir), given)

        steps = list_steps(run_dir)
        if not steps:
            raise ValueError("it holds no checkpoint yet")
        step = steps[-1] if step == -1 else step
        if step not in steps:
            raise ValueError(f"step {step} is not there; the checkpoints are {', '.join(map(str, steps))}")
    return ChosenModels(cfg, run_dir, run_dir, step)


def parse_compared(chosen: ChosenModels, named: str) -> ChosenModels:
    """Choose the reward model that a --compare names: weights, or a step of the same run."""
    # With a run, a number is a step; a directory of this name is still reachable as ./NUMBER.
    if chosen.run_dir is not None and named.isdecimal():
        return choose_models(int(named))
    cfg = chosen.cfg.copy_and_resolve_references()
    cfg.reward.weights = named
    return dataclasses.replace(chosen, cfg=cfg, run_dir=None, step=None)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; --run_dir takes the place of --config."""
    flag_names = {argument.lstrip("-").split("=")[0] for argument in argv[1:] if argument.startswith("-")}
    if "run_dir" in flag_names:
        if "config" in flag_names:
            common.exit_with_error("--config and --run_dir both say what is evaluated: leave one out")
        argv = [argv[0], "--config=base", *argv[1:]]
        # ml_collections reads the config's fields from sys.argv.
        sys.argv = argv
    return common.parse_flags(argv, __doc__)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
