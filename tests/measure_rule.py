"""Figures of the rule verifier on files of cases, labelled completions and problems.

    python tests/measure_rule.py FILE.jsonl...

The fields of a file's first row decide what is measured:

* `expected` (correct | wrong | abstain), with `reference`, `completion` and `kind`: the precision of "correct" and
  "wrong", the recall of "correct", and every row whose verdict does harm, by kind.
* `label`, with `source`: agreement with the labels, by source, and the time per verdict.
* anything else is a file of problems: each reference against itself and against that of another row.

References are cleaned as for training.

With --hanging=20, completions of a labelled file also make a step of 256 answers, which is timed with and without
20 answers that take seconds each; the settings are those of a run.
"""

import argparse
import collections
import json
import sys
import time
from pathlib import Path

# Run as a file, so the checkout's root is not on the path yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cooper_jax.configs import base
from cooper_jax.data import answers, labelled_completions, problems
from cooper_jax.rule import rule_verdict
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier

COLUMNS = dict(question_key="question", reference_key="answer", solution_key="", tfds_dir="", split="train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--every", type=int, default=1, help="measure every n-th row of labelled files only")
    parser.add_argument("--hanging", type=int, default=0, help="time a step with this many slow answers")
    flags = parser.parse_args()

    with RuleVerifier(RuleConfig.from_config(base.get_config().rule)) as rule:
        rule.check_ready()
        for path in flags.files:
            print(f"\n{path.name}")
            with open(path) as file:
                rows = [json.loads(line) for line in file]
            if "expected" in rows[0]:
                measure_cases(rule, rows)
            elif "label" in rows[0]:
                measure_labelled(rule, path, flags.every)
                if flags.hanging:
                    measure_hanging(path, flags.hanging)
            else:
                measure_references(rule, path)


def measure_cases(rule: RuleVerifier, rows: list[dict]) -> None:
    """Print precision and recall by kind, and each row that is called the opposite of what it is."""
    verdicts = rule.check([(answers.clean_reference(row["reference"]), row["completion"]) for row in rows])
    by_kind = collections.defaultdict(list)
    harmful, missed = [], []
    for row, verdict in zip(rows, verdicts, strict=True):
        said = verdict.value
        by_kind[row["kind"]].append((row["expected"], said))
        line = f"{row['kind']}: {row['reference'][:60]!r} | {row['completion'][-80:]!r} -> {said}"
        if said == "correct" != row["expected"] or (said == "wrong" and row["expected"] == "correct"):
            harmful.append(line)
        elif row["expected"] == "correct" != said:
            missed.append(line)

    print(f"{'kind':20} {'rows':>4} {'correct-precision':>17} {'correct-recall':>14} {'wrong-precision':>15}")
    for kind, pairs in [*by_kind.items(), ("all", sum(by_kind.values(), []))]:
        right = count(pairs, "correct", "correct")
        said_correct = sum(said == "correct" for _, said in pairs)
        expected_correct = sum(expected == "correct" for expected, _ in pairs)
        said_wrong = sum(said == "wrong" for _, said in pairs)
        not_correct = said_wrong - count(pairs, "correct", "wrong")
        print(
            f"{kind:20} {len(pairs):4} {share(right, said_correct):>17} {share(right, expected_correct):>14} "
            f"{share(not_correct, said_wrong):>15}"
        )
    print(f"{len(harmful)} harmful:", *harmful, sep="\n  ")
    print(f"{len(missed)} missed:", *missed, sep="\n  ")


def measure_labelled(rule: RuleVerifier, path: Path, every: int) -> None:
    """Print agreement with labels by source, and the CPU time per verdict in this process."""
    triples = labelled_completions.load_labelled_completions(str(path))[::every]
    verdicts = rule.check([(t.reference, t.completion) for t in triples])
    by_source = collections.defaultdict(list)
    for triple, verdict in zip(triples, verdicts, strict=True):
        by_source[triple.source].append((triple.label == 1, verdict.value))

    print(
        f"{'source':8} {'rows':>5} {'agreement':>9} {'correct: precision':>18} {'recall':>7} "
        f"{'wrong: precision':>16}"
    )
    for source, pairs in [*sorted(by_source.items()), ("all", sum(by_source.values(), []))]:
        right, mistaken = count(pairs, True, "correct"), count(pairs, False, "correct")
        positives = sum(label for label, _ in pairs)
        agreeing = right + len(pairs) - positives - mistaken  # an abstention counts as "not correct"
        said_wrong = sum(said == "wrong" for _, said in pairs)
        print(
            f"{source:8} {len(pairs):5} {share(agreeing, len(pairs)):>9} {share(right, right + mistaken):>18} "
            f"{share(right, positives):>7} {share(count(pairs, False, 'wrong'), said_wrong):>16} "
            f" {dict(sorted(collections.Counter(said for _, said in pairs).items()))}"
        )

    # The time of the verdicts alone, on short texts; process time does not count other processes.
    ordinary = [(t.reference, t.completion) for t in triples[::6]]
    judge_all(ordinary[:50])
    start = time.process_time()
    judge_all(ordinary)
    print(f"{len(ordinary)} verdicts: {1e3 * (time.process_time() - start) / len(ordinary):.2f} ms each")


def measure_hanging(path: Path, hanging: int) -> None:
    """Print the seconds of a step of 256 answers, without and with slow ones among them."""
    triples = labelled_completions.load_labelled_completions(str(path))
    ordinary = [(t.reference, t.completion) for t in triples[:: max(1, len(triples) // 256)]][: 256 - hanging]
    slow = [
        ("\\int_0^1 x dx", f"\\boxed{{\\int_0^1 \\frac{{x^{{x^x}}}}{{\\sin(x^{n}+1)}} dx}}")
        for n in range(5, 5 + hanging)
    ]
    seconds, verdicts = {}, {}
    for name, items in (("without", ordinary), ("with", slow + ordinary)):
        # A new verifier, since timeouts are remembered.
        with RuleVerifier(RuleConfig.from_config(base.get_config().rule)) as rule:
            rule.check(ordinary[:2])
            start = time.perf_counter()
            verdicts[name] = rule.check(items)
            seconds[name] = time.perf_counter() - start
    others = zip(verdicts["without"], verdicts["with"][hanging:], strict=True)
    print(
        f"a step of {len(ordinary)} answers: {seconds['without']:.1f} s; with {hanging} that take seconds each: "
        f"{seconds['with']:.1f} s; {sum(a != b for a, b in others)} of the other verdicts differ"
    )


def judge_all(items: list[tuple[str, str]]) -> None:
    for reference, completion in items:
        try:
            rule_verdict.judge_answer(reference, completion)
        except Exception:  # as in a worker
            continue


def measure_references(rule: RuleVerifier, path: Path) -> None:
    """Print how many references are verified against themselves, and the verdicts against other rows'."""
    found = problems.load_problems(str(path), "auto", **COLUMNS)
    distinct = list(dict.fromkeys(p.reference for p in found))
    own = rule.check([(r, f"The final answer is \\boxed{{{r}}}.") for r in distinct])
    print(
        f"{len(distinct)} distinct references, {sum(v.value == 'correct' for v in own)} equal to themselves"
    )
    for reference, verdict in zip(distinct, own, strict=True):
        if verdict.value != "correct":
            print(f"  {reference!r}: {verdict.value}")

    verdicts = collections.Counter()
    for shift in (1, 7, 41, 113):
        others = distinct[shift:] + distinct[:shift]
        items = [(a, f"The final answer is \\boxed{{{b}}}.") for a, b in zip(distinct, others, strict=True)]
        for item, verdict in zip(items, rule.check(items), strict=True):
            verdicts[verdict.value] += 1
            if verdict.value == "correct":
                print(f"  another row's is called correct: {item}")
    total = sum(verdicts.values())
    print("other rows': " + ", ".join(f"{k} {share(n, total)}" for k, n in sorted(verdicts.items())))


def count(pairs: list[tuple], first: object, second: object) -> int:
    return sum(pair == (first, second) for pair in pairs)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


if __name__ == "__main__":
    main()
