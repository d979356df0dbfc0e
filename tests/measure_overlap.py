"""What slow services cost a step: a run with a judge and an assistant that take their time, and without.

    python tests/measure_overlap.py [--rewrite=2] [--judge=0.012] [--steps=6] [--config.FIELD=VALUE ...]

Three runs of configs/tiny.py with a larger model, through launch/train.py: services that answer at once, slow ones,
and slow ones in sequence (overlap=False).  The services sleep, so they take no CPU from the devices.  Prints the
median step of each without the steps that compiled (the first two), and what of it the devices waited.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cooper_jax.runtime.metrics import read_lines

SERVICES = ROOT / "tests/slow_services.py"

# A policy that ends its responses after a short supervised phase.
FLAGS = {
    "data.prompts_per_step": 20,
    "rollout.group_size": 16,
    "policy.arch.width": 256,
    "policy.arch.ffn": 768,
    "reward.arch.width": 256,
    "reward.arch.ffn": 768,
    "reward.allow_untrained_head": True,
    "supervised.policy_steps": 60,
    "reward.recipe": "",
    "supervised.reward_steps": 0,
    "eval.every": 0,
    "rule.judge": f"{SERVICES}:judge",
    "assistant.kind": f"{SERVICES}:Rewriter",
}
SKIPPED = 2  # steps at the beginning, which compile


def main() -> None:
    """Run the three, and print their times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rewrite", type=float, default=2.0, help="seconds of a request to the assistant")
    parser.add_argument("--judge", type=float, default=0.012, help="seconds of a verdict")
    parser.add_argument("--steps", type=int, default=8)
    args, config_flags = parser.parse_known_args()

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, rewrite, judge, overlap) in enumerate(
            (
                ("services that answer at once", 0.0, 0.0, True),
                ("slow services", args.rewrite, args.judge, True),
                ("slow services in sequence", args.rewrite, args.judge, False),
            )
        ):
            flags = {**FLAGS, "steps": args.steps, "overlap": overlap, "run_dir": f"{folder}/{i}"}
            if i:
                flags["supervised.start_from"] = f"{folder}/0"
            command = [sys.executable, str(ROOT / "launch/train.py"), f"--config={ROOT}/configs/tiny.py"]
            command += [f"--config.{field}={value}" for field, value in flags.items()] + config_flags
            environment = os.environ | {"REWRITE_SECONDS": str(rewrite), "JUDGE_SECONDS": str(judge)}
            subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
            found[name] = read_medians(Path(folder) / str(i))
    first = next(iter(found.values()))[0]
    print(f"an assistant of {args.rewrite:g} s a request, a judge of {1000 * args.judge:g} ms a response")
    for name, (seconds, waiting, pairs) in found.items():
        print(
            f"{name:>30}: {seconds:6.2f} s a step, {seconds / first:.2f}x; the devices wait {waiting:.2f} s; "
            f"{pairs:.0f} pairs"
        )


def read_medians(run_dir: Path) -> tuple[float, float, float]:
    """The medians of a run's steps: seconds, seconds in which the devices waited, valid pairs."""
    rows = [row for row in read_lines(run_dir / "metrics.jsonl") if row["step"] > SKIPPED]
    names = ("time/step", "time/waiting", "pairs/valid")
    seconds, waiting, pairs = (statistics.median(row[name] for row in rows) for name in names)
    return seconds, waiting, pairs


if __name__ == "__main__":
    main()
