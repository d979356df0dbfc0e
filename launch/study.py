"""Compares ways to reward a policy over several seeds, in the miniature: runs, tables and a figure.

    python launch/study.py --config=configs/tiny.py --arms=rule,frozen,robust --seeds=0
    python launch/study.py --config=configs/tiny.py --out=runs/study --seeds=10-19 --jobs=2
    python launch/study.py --config=configs/tiny.py --arm="often: reward.recipe=robust, reward.updates=4"
    python launch/study.py --out=runs/study --report --keep=docs/results/study.jsonl
    python launch/study.py --from=docs/results/study.jsonl --report --out=runs/again

Of each seed the supervised phases run once, and every arm begins with their models.  --config flags hold for all
arms, and one that contradicts an arm's settings (cooper_jax/study/arms.py) is refused.  The same command goes on
where it was stopped, also with more seeds or arms.  --report runs nothing: it makes results.json, arms.csv,
runs.csv, tables.md and study.png in --out again, from the runs that are there or from the file of --from.

Exit codes: 0 done; 1 a run failed, and the others are done; 2 an error in the settings or files; 75 stopped by a
signal, with checkpoints: the same command goes on.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the checkout it lies in comes first
    sys.path.insert(0, str(ROOT))

from absl import app, flags
from ml_collections import config_flags

from cooper_jax.launch import common

OUT = flags.DEFINE_string("out", "runs/study", "The study's directory.")
ARMS = flags.DEFINE_list(
    "arms", [], "Names of cooper_jax/study/arms.py; the main ones where no --arm is given."
)
ARM = flags.DEFINE_multi_string("arm", [], 'An arm of one\'s own, "NAME: FIELD=VALUE, ..."; repeatable.')
SEEDS = flags.DEFINE_string("seeds", "", "As in 0, 10-19 or 1,3,10-12; 0 where nothing is given.")
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at once; several keep to a core each.", lower_bound=1)
REPORT = flags.DEFINE_bool(
    "report", False, "Run nothing: write tables and figure of the runs that are there."
)
KEEP = flags.DEFINE_string(
    "keep", "", "A file to write the records to from which tables and figure are made."
)
FROM = flags.DEFINE_string("from", "", "With --report: a file that --keep wrote, used instead of the runs.")


def main(argv: list[str]) -> None:
    common.begin_job(argv)
    from cooper_jax.runtime import hosts
    from cooper_jax.runtime.extras import import_extra
    from cooper_jax.settings.setup_errors import SetupError, setup_errors

    try:
        if FROM.value and not REPORT.value:
            raise SetupError(f"--from={FROM.value} belongs to --report")
        with setup_errors("study.png"):  # drawn when all runs are over: too late to find a package missing
            import_extra("matplotlib", "figures")
        with setup_errors(f"--out={OUT.value}"):
            failed = [] if REPORT.value else run_study_arms()
            report_study(failed)
    except SetupError as error:
        common.print_setup_error(error)
    except hosts.Stopped:
        print("stopped by a signal; the same command goes on")
        sys.exit(hosts.STOPPED)
    if failed:
        print(f"failed: {', '.join(f.run.label for f in failed)}: log.txt there says why", file=sys.stderr)
        sys.exit(1)


def run_study_arms() -> list:
    """Carry out what is not complete.  Returns the failures."""
    from cooper_jax.runtime import run_directory
    from cooper_jax.study import arms, run_scheduler, study_plan
    from cooper_jax.study.progress import ProgressBoard

    base, out = common.read_config(), Path(OUT.value).absolute()
    names = ARMS.value or (() if ARM.value else arms.MAIN)
    given = config_flags.get_override_values(flags.FLAGS["config"])
    study = study_plan.Study(
        out=out,
        config_file=str(Path(config_flags.get_config_filename(flags.FLAGS["config"])).absolute()),
        base=base,
        given=tuple(given),
        arms=arms.choose_arms(names, ARM.value, base),
        seeds=study_plan.parse_seeds(SEEDS.value or "0"),
    )
    out.mkdir(parents=True, exist_ok=True)
    handle = run_directory.lock_folder(out / "lock", out, "--out")
    try:
        study.begin()
        board = ProgressBoard()
        try:
            return run_scheduler.run_study(study.list_runs(), JOBS.value, board)
        finally:
            board.close()
    finally:
        os.close(handle)


def report_study(failed: list) -> None:
    """Tables and figure of what is there, and what they are made of where --keep says so."""
    from cooper_jax.study import records, study_plan
    from cooper_jax.study import study_report as files

    out = Path(OUT.value).absolute()
    found = records.read_records(Path(FROM.value)) if FROM.value else records.read_folder(out)
    if REPORT.value:
        found = found.only(ARMS.value, study_plan.parse_seeds(SEEDS.value) if SEEDS.value else ())
    if failed and not found.runs:
        return
    tables = files.write_report(found, out)
    if KEEP.value:
        records.write_records(found, Path(KEEP.value))
    print(tables.split("\n## ")[0] + "\n## " + tables.split("\n## ")[1])
    print(
        f"{out}: results.json, arms.csv, runs.csv, tables.md, study.png"
        + (f"; {KEEP.value}" if KEEP.value else "")
    )


def parse_flags(argv: list[str]) -> list[str]:
    """The launchers' own; --report needs no --config."""
    named = {a.lstrip("-").split("=")[0] for a in argv[1:] if a.startswith("-")}
    if "report" in named and "config" not in named:
        argv = [argv[0], f"--config={ROOT / 'configs/base.py'}", *argv[1:]]
        sys.argv = argv  # where the config's own fields are looked for
    return common.parse_flags(argv, __doc__)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
