"""Compares ways to reward a policy over several seeds on a small task: runs, tables and a figure.

    python launch/study.py --config=configs/tiny.py --arms=rule,frozen,robust --seeds=0
    python launch/study.py --config=configs/tiny.py --out=runs/study --seeds=10-19 --jobs=2
    python launch/study.py --config=configs/tiny.py --arm="often: reward.recipe=robust, reward.updates=4"
    python launch/study.py --out=runs/study --report --keep=docs/results/study.jsonl
    python launch/study.py --from=docs/results/study.jsonl --report --out=runs/again

The supervised phases run once per seed, those of the two models at the same time with --jobs=2, and every arm
starts from their models.  Meanwhile an idle slot compiles the arms' programs.  --config flags apply to all
arms; a flag that contradicts an arm's settings (cooper_jax/study/arms.py) is refused.  The same command
resumes a study, also with more seeds or arms.  --report runs nothing: it writes results.json, arms.csv,
runs.csv, tables.md and study.png in --out again, from the runs in --out or from the file of --from.

Exit codes: 0 done; 1 a run failed and the others are done; 2 an error in the settings or files; 75 stopped by
a signal, with checkpoints from which the same command resumes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from ml_collections import config_flags

from cooper_jax.launch import common
from cooper_jax.runtime.console import CONSOLE

# At run time this is imported after the flags are parsed, because importing JAX takes seconds.
if TYPE_CHECKING:
    from cooper_jax.study.run_scheduler import Failure

# --- the runs ---
OUT = flags.DEFINE_string("out", "runs/study", "The study's directory.")
ARMS = flags.DEFINE_list(
    "arms", [], "Arms of cooper_jax/study/arms.py; without --arms and --arm: the main ones."
)
ARM = flags.DEFINE_multi_string("arm", [], 'An arm of your own, "NAME: FIELD=VALUE, ..."; repeatable.')
SEEDS = flags.DEFINE_string("seeds", "", "Seeds, as in 0, 10-19 or 1,3,10-12; empty: 0.")
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time; several use one core each.", lower_bound=1)

# --- the report ---
REPORT = flags.DEFINE_bool("report", False, "Run nothing: write the tables and the figure of existing runs.")
KEEP = flags.DEFINE_string(
    "keep", "", "A file to write the records to, from which the tables and the figure can be made again."
)
FROM = flags.DEFINE_string("from", "", "With --report: a file that --keep wrote, used instead of the runs.")


def main(argv: list[str]) -> None:
    """Run the study's arms unless --report is given, then write its tables and figure."""
    common.begin_job(argv)
    from cooper_jax.runtime import hosts
    from cooper_jax.runtime.extras import import_extra
    from cooper_jax.settings.setup_errors import SetupError, setup_errors

    try:
        if FROM.value and not REPORT.value:
            raise SetupError(f"--from={FROM.value} belongs to --report")
        if FROM.value and not Path(FROM.value).exists():
            raise SetupError(f"--from={FROM.value}: there is no such file")
        # The figure is drawn after all runs; a package that is missing is reported before them.
        with setup_errors("study.png"):
            import_extra("matplotlib", "figures")
        with setup_errors(f"--out={OUT.value}"):
            failed = [] if REPORT.value else run_study_arms()
            CONSOLE.begin_stage("writing the tables and the figure")
            report_study(failed)
            CONSOLE.end_stage()
    except SetupError as error:
        common.print_setup_error(error)
    except hosts.Stopped:
        CONSOLE.print_line("stopped by a signal; the same command resumes", always=True)
        sys.exit(hosts.STOPPED)

    # The other runs are complete and in the report, but the exit code shows the failure.
    if failed:
        labels = ", ".join(failure.run.label for failure in failed)
        print(f"failed: {labels}: see log.txt in each run's directory", file=sys.stderr)
        sys.exit(1)


def run_study_arms() -> list[Failure]:
    """Run the arms and seeds that are not complete, and return the runs that failed."""
    from cooper_jax.runtime import run_directory
    from cooper_jax.study import arms, run_scheduler, study_plan
    from cooper_jax.study.progress import ProgressBoard

    # Without any arm on the command line, the main arms are compared.
    base, out = common.read_config(), Path(OUT.value).absolute()
    names = tuple(ARMS.value)
    if not names and not ARM.value:
        names = arms.MAIN

    # The runs are processes of their own, so the study records the config's file and the flags given for it.
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    study = study_plan.Study(
        out=out,
        config_file=str(Path(config_flags.get_config_filename(flags.FLAGS["config"])).absolute()),
        base=base,
        given=tuple(overrides),
        arms=arms.choose_arms(names, ARM.value, base),
        seeds=study_plan.parse_seeds(SEEDS.value or "0"),
    )

    # The lock prevents a second command from running the same study.
    out.mkdir(parents=True, exist_ok=True)
    lock_file = run_directory.lock_folder(out / "lock", out, "--out")
    try:
        CONSOLE.end_stage()
        study.begin()
        board = ProgressBoard()
        try:
            return run_scheduler.run_study(study.list_runs(), JOBS.value, board, study.make_compile_run())
        finally:
            board.close()
    finally:
        os.close(lock_file)


def report_study(failed: list[Failure]) -> None:
    """Write the tables and the figure of all complete runs, and with --keep the records behind them.

    failed: the runs of this command that failed.
    """
    from cooper_jax.study import records, study_plan
    from cooper_jax.study import study_report as report_files

    out = Path(OUT.value).absolute()
    study_records = records.read_records(Path(FROM.value)) if FROM.value else records.read_folder(out)
    # A report alone may be about some of the runs; after a study it is about all of them.
    if REPORT.value:
        seeds = study_plan.parse_seeds(SEEDS.value) if SEEDS.value else ()
        study_records = study_records.only(ARMS.value, seeds)
    # If the very first runs fail, there is nothing to report.
    if failed and not study_records.runs:
        return

    tables = report_files.write_report(study_records, out)
    if KEEP.value:
        records.write_records(study_records, Path(KEEP.value))

    # The first table is printed, and all tables are in the file.
    heading, first_table = tables.split("\n## ")[:2]
    CONSOLE.print_line(f"{heading}\n## {first_table}", always=True)
    kept = f"; {KEEP.value}" if KEEP.value else ""
    CONSOLE.print_line(f"{out}: results.json, arms.csv, runs.csv, tables.md, study.png{kept}", always=True)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; --report needs no --config."""
    flag_names = {argument.lstrip("-").split("=")[0] for argument in argv[1:] if argument.startswith("-")}
    if "report" in flag_names and "config" not in flag_names:
        argv = [argv[0], "--config=base", *argv[1:]]
        # ml_collections reads the config's fields from sys.argv.
        sys.argv = argv
    return common.parse_flags(argv, __doc__)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
