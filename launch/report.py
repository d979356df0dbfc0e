"""Writes a report on runs, studies, trainings of reward models and evaluations: one HTML file that loads nothing.

    python launch/report.py runs/tiny
    python launch/report.py runs/rule runs/frozen runs/robust --out=comparison.html --figures=figures
    python launch/report.py runs/study runs/verifyrm runs/eval_tiny --title="What was tried in May"

A RUN is the folder of launch/train.py, launch/study.py, launch/train_rm.py or launch/evaluate.py.  It may still
be running.  --figures also writes PNG and SVG figures.  docs/report.md says what the report shows, and which
samples it holds.

Exit codes: 0 done; 2 an error in the flags or the runs' files.
"""

from __future__ import annotations

import sys
from pathlib import Path

# As a file (not as a module of the package), the script imports the package of its own checkout.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags

from cooper_jax.launch import command_line

OUT = flags.DEFINE_string("out", "runs/report.html", "The HTML file to write.")
FIGURES = flags.DEFINE_string("figures", "", "A folder to write figures to, each as PNG and SVG.")
TITLE = flags.DEFINE_string("title", "", "The report's title; empty: the names of the folders.")


def main(argv: list[str]) -> None:
    """Write the report of the runs that the arguments name."""
    # Imported after the flags are parsed, because importing JAX takes seconds.
    from cooper_jax.settings.setup_errors import SetupError

    if len(argv) == 1:
        command_line.exit_with_errors(
            ["no RUN is given: python launch/report.py RUN [RUN ...]; --help lists the flags"]
        )
    try:
        for line in write_report(argv[1:]):
            print(line)
    except SetupError as error:
        command_line.exit_with_errors(error.messages)


def write_report(places: list[str]) -> list[str]:
    """Write the page and the figures; returns a line on each.  Raises SetupError."""
    from cooper_jax.report import page, report_data
    from cooper_jax.runtime import remote_files
    from cooper_jax.runtime.extras import import_extra
    from cooper_jax.settings.setup_errors import setup_errors

    # A package that is missing is reported before anything is read.
    if FIGURES.value:
        with setup_errors("--figures"):
            import_extra("matplotlib", "figures")
    with setup_errors("report"):
        report = report_data.collect_report(places, TITLE.value)
        data = report_data.encode_report(report)
        content = page.write_page(data)

    out = Path(OUT.value).expanduser().absolute()
    with setup_errors(f"--out={OUT.value}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        remote_files.write_atomically(out, content)
    lines = [f"{out}: {len(report.runs)} runs, {len(content) / 1e6:.1f} MB; open it in a browser"]
    if FIGURES.value:
        from cooper_jax.report import figures

        with setup_errors(f"--figures={FIGURES.value}"):
            names = figures.write_figures(report, Path(FIGURES.value).expanduser())
        lines.append(f"{FIGURES.value}: {', '.join(names)}, each as .png and .svg")
    return lines


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; what is no flag is a RUN."""
    return command_line.parse_own_flags(argv, __doc__, flags.FLAGS)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
