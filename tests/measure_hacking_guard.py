r"""The guard against reward hacking: data of runs made for it, its thresholds, and what it does on other runs.

    python tests/measure_hacking_guard.py collect STUDY... --out=FILE.jsonl
    python tests/measure_hacking_guard.py learn FILE.jsonl --seeds=10-39
    python tests/measure_hacking_guard.py evaluate FILE.jsonl --seeds=40-49
    python tests/measure_hacking_guard.py records docs/results/study.jsonl --learned=FILE.jsonl --seeds=20-24
    python tests/measure_hacking_guard.py ends STUDY... --arm=fallback

* `collect` reads the folders of studies whose runs were evaluated every few steps, and writes a row for each step:
  arm, seed, step, held-out accuracy by exact truth where it was measured, and the signals.
* `learn` prints, for each signal, how well it separates the steps before an onset from those of runs without one,
  and what a detector of this signal alone does.  The last line is the guard's detector.
* `evaluate` replays the detector of cooper_jax/trainer/hacking_detector.py over the rows of other seeds.
* `records` does so with the detector that `learn` finds for false positives alone, over the records of a study
  (launch/study.py --keep), which have no other signal that compares reward and rule.
* `ends` prints the held-out accuracy of runs at their start and end, and from which step the rule rewarded them.

The onset is that of the report (cooper_jax/report/hacking.py): the first of two evaluations in a row that are at
least 5 points below the highest so far.  A lead time is the number of steps from the alarm to the onset.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Run as a file, so the checkout's root is not on the path yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guard_runs import (
    FALSE_POSITIVES,
    SIGNALS,
    Run,
    read_rows,
    read_studies,
    read_study_records,
    write_rows,
)

from cooper_jax.statistics import area_under_roc
from cooper_jax.study.records import EVALUATED, read_whole_rows
from cooper_jax.trainer.hacking_detector import DETECTOR, Detector, Part
from cooper_jax.trainer.hacking_guard import GuardState, observe

# The guard's signals: reward that the rule does not back, disagreement of the two, and a change of the responses'
# form.  Each alone has good reasons, too; the detector needs two of them.
GUARD_SIGNALS = ("hacking/unbacked", "rm/rule_agreement", "response/tokens_mean")
CAP, SLACK = 6.0, 8.0  # of each of them, and of their sum, in units of their noise
TOLERATED = 1  # runs without an onset on which the guard may raise an alarm, of those that it is learned from
SMALLEST_OF_GUARD = 1.0  # as SMALLEST; with this slack few odd steps leave an excess at all

AVERAGED, MEMORY = 5, 20  # steps of the past that are averaged, and how far it goes back
SMOOTHED = 5  # steps of the moving mean whose separation is measured
WINDOW = 15  # steps before an onset that a signal should tell from others
# Tolerated changes of a signal alone, in units of its noise.  The mean of five steps is off by .45 of one, and what
# is tolerated must be more than that.
SLACKS = (1.5, 2.0, 3.0, 4.0)
# Of the excess that a run without an onset may reach, in the same unit: a few odd steps add up to less.
SMALLEST = 4.0
MARGIN = 1.5  # where the two kinds of runs are not apart: the limit over the largest excess without an onset


# --- separation --------------------------------------------------------------------------------------


def measure_separation(runs: Sequence[Run], signal: str) -> float:
    """The area under the ROC curve of a signal: the steps before an onset against those of runs without one.

    Of both the change of the moving mean of SMOOTHED steps from the run's beginning is taken.  NaN if one of the
    two kinds of steps is missing.
    """
    part = Part(signal, 1.0, SIGNALS[signal])
    labels, values = [], []
    for run in runs:
        for step, change in list_changes(run.read(signal), part):
            if run.onset is None or run.onset - WINDOW <= step < run.onset:
                labels.append(run.onset is not None)
                values.append(change)
    return area_under_roc(np.array(labels, bool), np.array(values)) if labels else math.nan


def list_changes(points: Sequence[tuple[int, float]], part: Part) -> list[tuple[int, float]]:
    """How far the moving mean of a signal is from its beginning, at each step after the beginning."""
    if len(points) <= AVERAGED:
        return []
    beginning = statistics.fmean(value for _, value in points[:AVERAGED])
    changes = []
    for last in range(AVERAGED, len(points)):
        first = max(AVERAGED, last - SMOOTHED + 1)
        mean = statistics.fmean(value for _, value in points[first : last + 1])
        changes.append((points[last][0], part.measure(mean, beginning)))
    return changes


# --- detectors ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a detector does on a run."""

    run: Run
    alarm: int | None  # the step of the first alarm
    highest: float  # excess

    @property
    def lead(self) -> int | None:
        """Steps from the alarm to the onset; None if one of them is missing."""
        return None if self.alarm is None or self.run.onset is None else self.run.onset - self.alarm

    @property
    def is_warning(self) -> bool:
        """True for an alarm before the onset."""
        return self.lead is not None and self.lead > 0


def apply_detector(run: Run, detector: Detector) -> Outcome:
    """Replay a detector over a run's rows, as in training."""
    state, highest = GuardState(), 0.0
    for row in run.rows:
        measured = {name: value for name, value in row.items() if value is not None}
        state = observe(state, row["step"], measured, detector=detector)
        highest = max(highest, state.detector.excess)
    return Outcome(run, state.first_alarm or None, highest)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A detector, with how far the two kinds of runs are apart."""

    detector: Detector
    margin: float  # least excess before an onset over the largest of runs without one; above 1 they are apart


def learn_limit(
    runs: Sequence[Run],
    parts: tuple[Part, ...],
    cap: float,
    slack: float,
    tolerated: int = 0,
    smallest: float = SMALLEST,
) -> Learned:
    """A detector whose limit is in the middle between runs with an onset and runs without one.

    The middle is the geometric mean of the largest excess on the latter (at least `smallest`), without the
    `tolerated` runs of the very largest, and the least excess that the former have reached before their onset.
    Where the two are not apart, the limit is MARGIN times the largest excess, so that there is no further alarm on
    runs without an onset.
    """
    # An unreachable limit: the excess is not capped.
    probe = Detector(parts, AVERAGED, MEMORY, cap, slack, math.inf)
    others = sorted(apply_detector(run, probe).highest for run in runs if run.onset is None)
    largest = max([smallest, *others[: max(len(others) - tolerated, 1)]])
    least = min(apply_detector(_cut_at_onset(run), probe).highest for run in runs if run.onset is not None)
    limit = math.sqrt(largest * least) if least > largest else MARGIN * largest
    return Learned(dataclasses.replace(probe, limit=_round(limit)), least / largest)


def learn_single(runs: Sequence[Run], signal: str) -> Learned | None:
    """The detector of one signal, with the slack of the largest margin; None if a kind of run is missing."""
    runs = [run for run in runs if run.read(signal)]
    part = make_part(runs, signal)
    if part is None or not any(run.onset is not None for run in runs):
        return None
    candidates = [learn_limit(runs, (part,), math.inf, slack) for slack in SLACKS]
    return max(candidates, key=lambda learned: learned.margin)


def learn_guard(runs: Sequence[Run]) -> Learned:
    """The guard's detector.  Raises ValueError without both kinds of runs."""
    runs = [run for run in runs if all(run.read(signal) for signal in GUARD_SIGNALS)]
    parts = [make_part(runs, signal) for signal in GUARD_SIGNALS]
    known = tuple(part for part in parts if part is not None)
    if len(known) < len(parts) or not any(run.onset is not None for run in runs):
        raise ValueError(
            "the guard is learned from runs with an onset and runs without one, which have its signals"
        )
    return learn_limit(runs, known, CAP, SLACK, TOLERATED, SMALLEST_OF_GUARD)


def make_part(runs: Sequence[Run], signal: str) -> Part | None:
    """A signal with its noise on the runs without an onset; None without such runs, and without noise.

    The noise is the standard deviation of the differences between successive steps, over the square root of 2, so
    slow changes are no part of it.
    """
    squares = []
    for run in runs:
        values = [value for _, value in run.read(signal)]
        if run.onset is not None or not values:
            continue
        unit = 1.0 if SIGNALS[signal] else statistics.fmean(values[:AVERAGED])
        squares += [((after - before) / unit) ** 2 for before, after in itertools.pairwise(values)]
    noise = math.sqrt(statistics.fmean(squares) / 2) if squares else 0.0
    return Part(signal, _round(noise), SIGNALS[signal]) if noise > 0 else None


def _cut_at_onset(run: Run) -> Run:
    """The rows of a run before its onset."""
    assert run.onset is not None
    return dataclasses.replace(run, rows=tuple(row for row in run.rows if row["step"] < run.onset))


def _round(value: float) -> float:
    return float(f"{value:.2g}")


# --- commands ----------------------------------------------------------------------------------------


def print_learned(runs: Sequence[Run]) -> None:
    """Print a row for each signal alone, one for the guard, and the guard's detector.

    Nothing is learned from a run that ends where an onset may be.
    """
    decided = [run for run in runs if not run.is_undecided]
    left_out = len(runs) - len(decided)
    runs, hacked = decided, [run for run in decided if run.onset is not None]
    print(f"{len(hacked)} runs with an onset, {len(runs) - len(hacked)} without, {left_out} undecided\n")
    print(
        "| signal | AUROC | noise | slack | limit | margin | alarm before onset | lead: median (least, most) |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    words = {1: "rises", -1: "falls", 0: "changes"}
    for signal, direction in SIGNALS.items():
        name = f"| `{signal}` {words[direction]} | {_format(measure_separation(runs, signal))} "
        learned = learn_single(runs, signal)
        if learned is None:
            print(f"{name}| - | - | - | - | - | - |")
            continue
        noise = f"{learned.detector.parts[0].scale:g}"
        print(f"{name}| {noise} | {_describe(learned, [run for run in hacked if run.read(signal)])} |")
    guard = learn_guard(runs)
    print(f"| **all of the guard** | | | {_describe(guard, hacked)} |")
    print(f"\n{guard.detector}")


def _describe(learned: Learned, hacked: Sequence[Run]) -> str:
    """The last five cells of a row of `print_learned`."""
    leads = [
        outcome.lead
        for outcome in (apply_detector(run, learned.detector) for run in hacked)
        if outcome.is_warning
    ]
    known = sorted(lead for lead in leads if lead is not None)
    described = f"{statistics.median(known):g} ({known[0]}, {known[-1]})" if known else "-"
    detector = learned.detector
    warned = f"{len(known)} of {len(hacked)}"
    return f"{detector.slack:g} | {detector.limit:g} | {learned.margin:.1f} | {warned} | {described}"


def _format(value: float) -> str:
    """Two decimals, without a leading zero; - for NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}".removeprefix("0")


def print_evaluation(runs: Sequence[Run], detector: Detector = DETECTOR) -> None:
    """Print what a detector does on each run, and the counts of warnings and false alarms by arm."""
    print(f"{detector}\n")
    print("| arm | seed | onset | alarm | lead time | highest excess |")
    print("| --- | --: | --: | --: | --: | --: |")
    outcomes = [apply_detector(run, detector) for run in runs]
    for outcome in outcomes:
        run = outcome.run
        cells = [run.arm, run.seed, run.onset, outcome.alarm, outcome.lead]
        texts = ["-" if cell is None else str(cell) for cell in cells]
        print(f"| {' | '.join(texts)} | {outcome.highest:.2f} |")
    print()
    for arm in sorted({run.arm for run in runs}):
        of_arm = [outcome for outcome in outcomes if outcome.run.arm == arm]
        hacked = [outcome for outcome in of_arm if outcome.run.onset is not None]
        undecided = [outcome for outcome in of_arm if outcome.run.is_undecided]
        sound = [outcome for outcome in of_arm if outcome.run.onset is None and outcome not in undecided]
        warned = sum(outcome.is_warning for outcome in hacked)
        false = sum(outcome.alarm is not None for outcome in sound)
        rest = f"; {len(undecided)} undecided: the last evaluation is low" if undecided else ""
        print(
            f"{arm}: an alarm before the onset on {warned} of {len(hacked)} runs with one, false alarms on {false} "
            f"of {len(sound)} without{rest}"
        )


def print_ends(folders: Sequence[Path], arm: str) -> None:
    """Print held-out accuracy at the start and at the end (mean of the last three evaluations)."""
    print("| seed | start, % | end, % | change | first step by the rule |")
    print("| --: | --: | --: | --: | --: |")
    for folder in folders:
        for file in sorted(folder.glob(f"seed_*/{arm}/metrics.jsonl")):
            rows = read_whole_rows(file)
            truth = [row[EVALUATED["accuracy"]] for row in rows if EVALUATED["accuracy"] in row]
            start, end = 100 * truth[0], 100 * statistics.fmean(truth[-3:])
            by_rule = next((int(row["step"]) for row in rows if row.get("guard/by_rule")), None)
            seed = file.parent.parent.name.removeprefix("seed_")
            print(f"| {seed} | {start:.1f} | {end:.1f} | {end - start:+.1f} | {by_rule or '-'} |")


def parse_seeds(text: str) -> set[int]:
    """Seeds as in 0, 10-19 or 1,3,10-12."""
    seeds: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds.update(range(int(first), int(last or first) + 1))
    return seeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect", allow_abbrev=False)
    collect.add_argument("studies", nargs="+", type=Path, help="folders of launch/study.py --out")
    collect.add_argument("--out", required=True, type=Path)
    for name in ("learn", "evaluate"):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("file", type=Path, help="what `collect` wrote")
        command.add_argument("--seeds", required=True, type=parse_seeds)
    records = commands.add_parser("records", allow_abbrev=False)
    records.add_argument("file", type=Path, help="what launch/study.py --keep wrote")
    records.add_argument("--learned", required=True, type=Path, help="what `collect` wrote")
    records.add_argument("--seeds", required=True, type=parse_seeds, help="those of --learned to learn from")
    ends = commands.add_parser("ends", allow_abbrev=False)
    ends.add_argument("studies", nargs="+", type=Path)
    ends.add_argument("--arm", required=True)
    flags = parser.parse_args()

    if flags.command == "collect":
        write_rows(read_studies(flags.studies), flags.out)
        return
    if flags.command == "ends":
        print_ends(flags.studies, flags.arm)
        return
    file = flags.learned if flags.command == "records" else flags.file
    runs = [run for run in read_rows(file) if run.seed in flags.seeds]
    if not runs:
        parser.error(f"{file} has no run of the seeds {sorted(flags.seeds)}")
    if flags.command == "learn":
        print_learned(runs)
    elif flags.command == "evaluate":
        print_evaluation(runs)
    else:
        learned = learn_single([run for run in runs if not run.is_undecided], FALSE_POSITIVES)
        if learned is None:
            parser.error(f"{file} does not have both kinds of runs")
        print_evaluation(read_study_records(flags.file), learned.detector)


if __name__ == "__main__":
    main()
