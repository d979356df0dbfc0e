"""How much of the rollouts of a run with rollout.ahead=1 ran beside the other phases, and the timeline of a step.

    python tests/measure_ahead.py RUN

RUN is a run directory of launch/train.py.  Steps in which a program was compiled are left out: those that took more
than twice the median.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cooper_jax.runtime.metrics import read_lines

# In the order of a step; a phase that occurs twice in a step is shown once.
PHASES = ("rollout", "copy_weights", "score", "logprobs", "rule", "functions", "pairs", "policy", "reward")
WIDTH = 60  # characters of the timeline


def main(run: str) -> None:
    """Print the median times of a run's steps, and the timeline of its median step."""
    rows = [row for row in read_lines(Path(run) / "metrics.jsonl") if "time/rollout_ahead" in row][1:]
    limit = 2 * statistics.median(row["time/step"] for row in rows)
    rows = sorted((row for row in rows if row["time/step"] <= limit), key=lambda row: row["time/step"])

    # The rollout's seconds and those of the phases that do not wait for it.  Where both share cores they slow each
    # other, so this is not the time of a step in sequence.
    total = [row["time/step"] - row["time/rollout"] + row["time/rollout_ahead"] for row in rows]
    names = ("time/step", "time/rollout_ahead", "time/rollout", "time/rollout_overlap")
    step, rollout, wait, overlap = (statistics.median(row[name] for row in rows) for name in names)
    print(
        f"{len(rows)} steps, medians: step {step:.2f} s; the seconds of all phases, those that overlap included, "
        f"{statistics.median(total):.2f} s"
    )
    print(
        f"rollout {rollout:.2f} s, of which {overlap:.0%} ran beside the step before; a step waits {wait:.2f} s "
        "for it"
    )

    row = rows[len(rows) // 2]
    print(f"\nstep {row['step']}: {row['time/step']:.2f} s")
    start = 0.0
    for name in PHASES:
        seconds = row.get(f"time/{name}", 0.0)
        if seconds >= 0.005:
            label = "wait for the rollout" if name == "rollout" else name
            print(f"{label:>22} {draw_bar(start, seconds, row['time/step'])} {seconds:.2f} s")
        start += seconds
    following = next((other for other in rows if other["step"] == row["step"] + 1), None)
    if following is not None:
        begin = row["time/rollout"] + row.get("time/copy_weights", 0.0)
        seconds = following["time/rollout_ahead"]
        print(f"{'rollout of the next':>22} {draw_bar(begin, seconds, row['time/step'])} {seconds:.2f} s")


def draw_bar(start: float, seconds: float, whole: float) -> str:
    """A bar from `start` of `seconds`, in a line that stands for `whole` seconds and is cut there."""
    first = min(round(WIDTH * start / whole), WIDTH - 1)
    last = min(max(round(WIDTH * (start + seconds) / whole), first + 1), WIDTH)
    return "|" + " " * first + "#" * (last - first) + " " * (WIDTH - last) + "|"


if __name__ == "__main__":
    main(sys.argv[1])
