"""Attacks the rule verifier with generated texts, and measures what is left of it.

    python tests/measure_rule_attacks.py --count=1000 --ordinary=../shared/data/verify_train.jsonl

The verifier has a run's settings.  Printed are the verdicts by kind of attack, the most memory that a worker had,
and the verdicts per second on ordinary answers before and after.  Exit code 1: an attack was called correct or was
run as code, or an ordinary answer has another verdict afterwards.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rule_attacks

from cooper_jax.configs import base
from cooper_jax.data import labelled_completions
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.rule.worker_process import Item
from cooper_jax.types import Verdict

STEP = 256  # answers that are submitted together, as in a step


@dataclasses.dataclass
class Findings:
    """What attacks did."""

    attacks: int = 0
    verdicts: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)  # by kind
    correct: list[rule_attacks.Attack] = dataclasses.field(default_factory=list)
    ran_code: bool = False
    changed: int = 0  # ordinary answers with another verdict afterwards
    memory_mb: float = 0.0  # the largest of all workers
    seconds: float = 0.0  # of all attacks
    before: float = 0.0  # ordinary verdicts per second
    after: float = 0.0

    @property
    def is_sound(self) -> bool:
        """True if no attack had any effect."""
        return not (self.correct or self.ran_code or self.changed)


def read_worker_memory() -> float:
    """MB of the largest resident set that a child of this process has had."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    largest = 0.0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue  # it has ended
        fields = dict(line.split(":", 1) for line in status.splitlines())
        largest = max(largest, int(fields.get("VmHWM", "0 kB").split()[0]) / 1e3)
    return largest


def attack_verifier(count: int, ordinary: list[Item]) -> Findings:
    """Submit attacks in batches, as steps do, and ordinary answers before and after them."""
    found = Findings()
    config = RuleConfig.from_config(base.get_config().rule)
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary"
        attacks = rule_attacks.generate_attacks(count, canary)
        found.attacks = len(attacks)
        expected, found.before = judge_ordinary(config, ordinary)
        with RuleVerifier(config) as rule:
            rule.check_ready()
            started = time.perf_counter()
            for start in range(0, len(attacks), STEP):
                batch = attacks[start : start + STEP]
                verdicts = rule.check([Item(rule_attacks.REFERENCE, attack.text) for attack in batch])
                found.memory_mb = max(found.memory_mb, read_worker_memory())
                for attack, verdict in zip(batch, verdicts, strict=True):
                    found.verdicts.setdefault(attack.kind, collections.Counter())[verdict.value] += 1
                    if verdict is Verdict.CORRECT:
                        found.correct.append(attack)
            found.seconds = time.perf_counter() - started

            # In the same processes.
            started = time.perf_counter()
            verdicts = rule.check(ordinary)
            found.after = len(ordinary) / (time.perf_counter() - started)
        found.changed = sum(a != b for a, b in zip(expected, verdicts, strict=True))
        found.ran_code = canary.exists()
    return found


def judge_ordinary(config: RuleConfig, ordinary: list[Item]) -> tuple[list[Verdict], float]:
    """The verdicts of a new verifier, and how many it gave per second."""
    with RuleVerifier(config) as rule:
        rule.check_ready()
        started = time.perf_counter()
        verdicts = rule.check(ordinary)
        return verdicts, len(ordinary) / (time.perf_counter() - started)


def main(arguments: list[str]) -> None:
    """Attack as the arguments say, and print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="attacks")
    parser.add_argument("--ordinary", type=Path, required=True, help="a file of labelled completions")
    options = parser.parse_args(arguments)
    triples = labelled_completions.load_labelled_completions(str(options.ordinary))
    found = attack_verifier(options.count, [Item(t.reference, t.completion) for t in triples])

    values = [verdict.value for verdict in Verdict]
    print(f"{'attacks':12} " + " ".join(f"{value:>12}" for value in values))
    for kind, counts in found.verdicts.items():
        print(f"{kind:12} " + " ".join(f"{counts[value]:12}" for value in values))
    print(
        f"{found.attacks} attacks in {found.seconds:.0f} s; the largest worker had {found.memory_mb:.0f} MB"
    )
    print(
        f"ordinary answers: {found.before:.0f} verdicts/s before, {found.after:.0f} after, in the same processes"
    )
    print(f"{found.changed} of {len(triples)} ordinary verdicts changed; run as code: {found.ran_code}")
    for attack in found.correct:
        print(f"called correct: {attack.kind}: {attack.text[:200]!r}")
    if not found.is_sound:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
