"""Figures of a policy's judged responses, by benchmark and judge, and their table.

For each judge (`rule`: verdict correct; `model`: reward above 0.5; `oracle`: exact truth of synthetic
problems):

    accuracy   mean over problems and samples, which is pass@1
    pass@k     probability that k samples contain a correct one, unbiased (statistics.pass_at_k), for k = 1,
               2, 4, ... and the number of samples n
    maj@n      whether the most frequent answer is correct; answers are compared by normal form
               (data/answer_forms.py)

Each has a 95 % interval bootstrapped by problem.  Figures of the responses themselves: the shares of
truncated (no EOS was sampled), no_answer (the rule found no answer) and undecided ones (the rule could not
compare the answer: it abstains, and the sample counts as wrong), and the mean number of tokens.

    B  problems   G  samples per problem   rows are problem-major
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax import statistics
from cooper_jax.data.answer_forms import normalise_completion
from cooper_jax.evaluation.benchmark_sets import Benchmark
from cooper_jax.evaluation.evaluation_ledger import Row
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.runtime import keys
from cooper_jax.statistics import Interval

# Each judge's decision on a row.
JUDGES: dict[str, Callable[[Row], bool]] = {
    "rule": lambda row: row["rule"] == "correct",
    "model": lambda row: row["reward"] > 0.5,
    "oracle": lambda row: row["oracle"],
}
# The field of a row that exists if the judge has judged it.
_FIELD = {"rule": "rule", "model": "reward", "oracle": "oracle"}


def list_judges(rows: Sequence[Row]) -> list[str]:
    """List the judges that judged the rows, by name."""
    return [name for name in JUDGES if rows and _FIELD[name] in rows[0]]


def make_correct_matrix(rows: Sequence[Row], judge: str, samples: int) -> np.ndarray:
    """Arrange one judge's decisions on problem-major rows as a matrix, bool[B, G]."""
    return np.array([JUDGES[judge](row) for row in rows], bool).reshape(-1, samples)


def bootstrap_mean(values: np.ndarray, seed: int, resamples: int) -> Interval:
    """Compute the mean over problems of f64[B], with its interval.

    Every call draws from the start of the same random stream, so figures over the same number of problems
    share their resamples.
    """

    def compute_mean(weights: np.ndarray) -> float:
        return float((weights * values).sum() / weights.sum())

    rng = keys.make_generator(seed, "bootstrap")
    groups = [f"{i:09d}" for i in range(len(values))]  # of equal width, so that they sort by number
    return statistics.bootstrap_interval(compute_mean, groups, rng, resamples)


def list_k(samples: int) -> list[int]:
    """List the values of k for pass@k: the powers of two up to the number of samples, and that number."""
    powers = {2**i for i in range(samples.bit_length())}  # all are at most `samples`
    return sorted(powers | {samples})


def summarise_benchmark(
    benchmark: Benchmark, rows: Sequence[Row], samples: int, seconds: float, seed: int, resamples: int
) -> dict[str, Any]:
    """Compute all figures of one benchmark.

    Args:
      benchmark: its problems, and the counts of those left out.
      rows: B * G rows, problem-major.
      samples: G.
      seconds: the time spent on sampling and judging.
      seed: of the bootstrap.
      resamples: the number of resamples behind each interval.
    """
    correct = {name: make_correct_matrix(rows, name, samples) for name in list_judges(rows)}
    answers = [normalise_completion(row["completion"]) for row in rows]
    summary: dict[str, Any] = {
        "benchmark": benchmark.name,
        # Problems.
        "problems": len(benchmark.problems),
        "asked": benchmark.asked,
        "too_long": benchmark.too_long,
        "seen": benchmark.seen,
        "excluded": benchmark.excluded,
        # Responses.
        "samples": samples,
        "truncated": float(np.mean([row["truncated"] for row in rows])),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "seconds": seconds,
        # Figures by judge, and by subject and level; filled in below.
        "judges": {},
        "by": {},
    }

    # Only the rule abstains.
    if "rule" in rows[0]:
        verdicts = [row["rule"] for row in rows]
        summary["no_answer"] = float(np.mean([v == "no_answer" for v in verdicts]))
        summary["undecided"] = float(np.mean([v in ("unrecognised", "timeout") for v in verdicts]))

    for name, matrix in correct.items():
        summary["judges"][name] = _summarise_judge(matrix, answers, seed, resamples)
    summary["agreement"] = measure_pairwise_agreement(correct)

    # A benchmark without subjects or levels has empty texts in these fields.
    for field in ("subject", "level"):
        values = np.array([getattr(problem, field) for problem in benchmark.problems])
        if any(values):
            summary["by"][field] = _break_down(values, correct, seed, resamples)
    return summary


def _summarise_judge(
    correct: np.ndarray, answers: Sequence[str | None], seed: int, resamples: int
) -> dict[str, Any]:
    """Compute accuracy, pass@k and maj@n by one judge.

    Args:
      correct: bool[B, G].
      answers: normal forms, [B * G], problem-major.
    """
    samples = correct.shape[1]
    totals = correct.sum(1)  # i64[B]: correct samples of each problem

    # maj@n of each problem: its samples vote by the normal forms of their answers.
    majority = []
    for i, decisions in enumerate(correct):
        problem_answers = answers[i * samples : (i + 1) * samples]
        majority.append(statistics.majority_accuracy(problem_answers, decisions))

    # pass@k of each problem depends on its number of correct samples only.
    pass_at = {}
    for k in list_k(samples):
        values = np.array([statistics.pass_at_k(samples, int(total), k) for total in totals])
        pass_at[k] = bootstrap_mean(values, seed, resamples)
    return {
        "accuracy": bootstrap_mean(correct.mean(1), seed, resamples),
        "pass_at": pass_at,
        "majority": bootstrap_mean(np.array(majority), seed, resamples),
    }


def _break_down(
    values: np.ndarray, correct: Mapping[str, np.ndarray], seed: int, resamples: int
) -> dict[str, dict[str, Any]]:
    """Compute the accuracy by each judge, for each value of a field.

    Args:
      values: each problem's, str[B].
      correct: judge -> bool[B, G].
    """
    groups: dict[str, dict[str, Any]] = {}
    for value in sorted(set(values)):
        members = values == value  # bool[B]
        accuracy = {}
        for name, matrix in correct.items():
            accuracy[name] = bootstrap_mean(matrix[members].mean(1), seed, resamples)
        groups[str(value)] = {"problems": int(members.sum()), "accuracy": accuracy}
    return groups


def measure_pairwise_agreement(correct: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Measure each two judges' agreement, Cohen's kappa, and the shares of samples that only one accepts.

    correct: judge -> bool[B, G].
    """
    # Abstentions of the rule count as rejections, as in its accuracy.
    names = list(correct)
    agreement = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            x, y = correct[a].ravel(), correct[b].ravel()  # bool[B * G]
            agreement[f"{a} and {b}"] = {
                "agreement": float((x == y).mean()),
                "kappa": statistics.cohens_kappa(x.tolist(), y.tolist()),
                f"only {a}": float((x & ~y).mean()),
                f"only {b}": float((~x & y).mean()),
            }
    return agreement


def average_benchmarks(
    summaries: Sequence[Mapping[str, Any]], rows: Mapping[str, Sequence[Row]], seed: int, resamples: int
) -> dict[str, Interval]:
    """Compute the mean accuracy over benchmarks, each with equal weight, by each judge of all of them.

    rows: each benchmark's rows, by its name.
    """
    means = {}
    for name in JUDGES:
        if not all(name in summary["judges"] for summary in summaries):
            continue
        accuracies, indices = [], []  # per benchmark: f64[B], i64[B]
        for index, summary in enumerate(summaries):
            matrix = make_correct_matrix(rows[summary["benchmark"]], name, summary["samples"])
            accuracies.append(matrix.mean(1))
            indices.append(np.full(len(matrix), index))
        means[name] = _bootstrap_macro_mean(
            np.concatenate(accuracies), np.concatenate(indices), seed, resamples
        )
    return means


def _bootstrap_macro_mean(values: np.ndarray, members: np.ndarray, seed: int, resamples: int) -> Interval:
    """Compute the mean of the benchmarks' means, with its interval; problems are resampled.

    Args:
      values: of the problems of all benchmarks, f64[sum of B].
      members: the index of each problem's benchmark, i64[sum of B].
    """

    def compute_mean(weights: np.ndarray) -> float:
        counts = np.bincount(members, weights)
        sums = np.bincount(members, weights * values)
        # A resample may have no problem of a small benchmark, which is then left out of its mean.
        return float(np.mean(sums[counts > 0] / counts[counts > 0]))

    # Every problem is a group of its own.
    groups = [f"{member} {i:09d}" for i, member in enumerate(members)]
    rng = keys.make_generator(seed, "bootstrap")
    return statistics.bootstrap_interval(compute_mean, groups, rng, resamples)


# --- the table ----------------------------------------------------------------------------------------------


def format_summary(summaries: Sequence[Mapping[str, Any]], means: Mapping[str, Interval]) -> str:
    """Format the tables for a terminal (benchmarks by judges, agreement, subjects and levels) and notes."""
    parts = [
        _format_accuracies(summaries, means),
        _format_agreement(summaries),
        _format_breakdown(summaries),
        _format_left_out(summaries),
    ]
    return "\n\n".join(part for part in parts if part)


def _format_accuracies(summaries: Sequence[Mapping[str, Any]], means: Mapping[str, Interval]) -> str:
    """Format a table with one row per benchmark and judge; with several benchmarks also their means."""
    # pass@1 is the accuracy, which has a column already.
    ks: set[int] = set()
    for summary in summaries:
        for judged in summary["judges"].values():
            ks |= {k for k in judged["pass_at"] if k > 1}
    columns = sorted(ks)
    samples = {summary["samples"] for summary in summaries}
    header = ["benchmark", "judge", "problems", "accuracy % (95 %)", *(f"pass@{k}" for k in columns)]
    header += [f"maj@{min(samples)}", "truncated", "no answer", "undecided", "tokens", "seconds"]

    rows = []
    for summary in summaries:
        for name, judged in summary["judges"].items():
            rows.append(_format_judge_row(summary, name, judged, columns))

    # Means have no pass@k, maj@n and shares: those cells stay empty.
    if len(summaries) > 1:
        problems = str(sum(summary["problems"] for summary in summaries))
        seconds = f"{sum(summary['seconds'] for summary in summaries):.0f}"
        empty = [""] * (len(columns) + 5)
        for name, interval in means.items():
            rows.append(["mean", name, problems, format_percent(interval), *empty, seconds])
    return format_table(header, rows)


def _format_judge_row(
    summary: Mapping[str, Any], name: str, judged: Mapping[str, Any], columns: Sequence[int]
) -> list[str]:
    """Format the cells of one benchmark and judge.  columns: the table's values of k."""
    pass_at = judged["pass_at"]
    passes = [format_percent(pass_at[k].value) if k in pass_at else "" for k in columns]
    # Only the rule abstains; the cells of other judges stay empty.
    abstentions = ["", ""]
    if name == "rule":
        abstentions = [format_percent(summary["no_answer"]), format_percent(summary["undecided"])]
    return [
        summary["benchmark"],
        name,
        str(summary["problems"]),
        format_percent(judged["accuracy"]),
        *passes,
        format_percent(judged["majority"].value),
        format_percent(summary["truncated"]),
        *abstentions,
        f"{summary['tokens']:.0f}",
        f"{summary['seconds']:.0f}",
    ]


def _format_agreement(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Format a table with one row per benchmark and pair of judges; "" if there is one judge."""
    rows = []
    for summary in summaries:
        for pair, figures in summary["agreement"].items():
            rows.append([summary["benchmark"], pair, *(format_percent(x) for x in figures.values())])
    header = ["benchmark", "judges", "agreement", "kappa x 100", "only first", "only second"]
    return format_table(header, rows) if rows else ""


def _format_breakdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Format a table with one row per benchmark and subject or level; "" if there are none."""
    # Columns: every judge of any benchmark, in the order of JUDGES.
    judged_by: set[str] = set()
    for summary in summaries:
        judged_by |= set(summary["judges"])
    judges = [name for name in JUDGES if name in judged_by]

    rows = []
    for summary in summaries:
        for field, groups in summary["by"].items():
            for value, group in groups.items():
                accuracy = group["accuracy"]
                cells = [format_percent(accuracy[name]) if name in accuracy else "" for name in judges]
                rows.append([summary["benchmark"], field, value or "(none)", str(group["problems"]), *cells])
    header = ["benchmark", "by", "value", "problems", *(f"{name}, accuracy %" for name in judges)]
    return format_table(header, rows) if rows else ""


def _format_left_out(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Write one line for each benchmark with prompts that are too long."""
    notes = []
    for summary in summaries:
        if summary["too_long"]:
            notes.append(
                f"{summary['benchmark']}: {summary['too_long']} of {summary['asked']} problems left out: "
                "their prompts are too long"
            )
    return "\n".join(notes)
