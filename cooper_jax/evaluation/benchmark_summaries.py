"""Figures of a policy's judged responses, by benchmark and judge, and their table.

For each judge (`rule`: verdict correct; `model`: reward above 0.5; `oracle`: exact truth of synthetic
problems):

    accuracy   mean over problems and samples, which is pass@1
    pass@k     probability that k samples contain a correct one, unbiased (statistics.pass_at_k), for k = 1,
               2, 4, ... and the number of samples n
    maj@n      whether the most frequent answer is correct; answers are compared by normal form
               (answer_forms.py)

each with a 95 % interval bootstrapped by problem.  Also, for the responses: truncated (no EOS was sampled),
no_answer and undecided (the rule found no answer, or could not compare it: it abstains, and the sample counts
as wrong), and mean tokens.

    B  problems   G  samples per problem   rows are problem-major
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax import statistics
from cooper_jax.evaluation.answer_forms import normalise_completion
from cooper_jax.evaluation.benchmark_sets import Benchmark
from cooper_jax.evaluation.evaluation_ledger import Row
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.runtime import keys
from cooper_jax.statistics import Interval

JUDGES: dict[str, Callable[[Row], bool]] = {
    "rule": lambda row: row["rule"] == "correct",
    "model": lambda row: row["reward"] > 0.5,
    "oracle": lambda row: row["oracle"],
}
_FIELD = {"rule": "rule", "model": "reward", "oracle": "oracle"}


def list_judges(rows: Sequence[Row]) -> list[str]:
    """Names of the judges that judged the rows."""
    return [name for name in JUDGES if rows and _FIELD[name] in rows[0]]


def make_correct_matrix(rows: Sequence[Row], judge: str, samples: int) -> np.ndarray:
    """One judge's decisions, bool[B, G]."""
    return np.array([JUDGES[judge](row) for row in rows], bool).reshape(-1, samples)


def bootstrap_mean(values: np.ndarray, seed: int, resamples: int) -> Interval:
    """The mean over problems of f64[B], with its interval.  All figures of one size share their resamples."""

    def compute_mean(weights: np.ndarray) -> float:
        return float((weights * values).sum() / weights.sum())

    rng = keys.make_generator(seed, "bootstrap")
    groups = [f"{i:09d}" for i in range(len(values))]  # of equal width, so that they sort by number
    return statistics.bootstrap_interval(compute_mean, groups, rng, resamples)


def list_k(samples: int) -> list[int]:
    """Values of k for pass@k: 1, 2, 4, ... and the number of samples."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def summarise_benchmark(
    benchmark: Benchmark, rows: Sequence[Row], samples: int, seconds: float, seed: int, resamples: int
) -> dict[str, Any]:
    """All figures of one benchmark.

    Args:
      rows: B * G rows, problem-major.
      samples: G.
      seconds: spent on sampling and judging.
      resamples: behind each interval.
    """
    correct = {name: make_correct_matrix(rows, name, samples) for name in list_judges(rows)}
    answers = [normalise_completion(row["completion"]) for row in rows]
    summary: dict[str, Any] = {
        "benchmark": benchmark.name,
        "problems": len(benchmark.problems),
        "asked": benchmark.asked,
        "too_long": benchmark.too_long,
        "seen": benchmark.seen,
        "excluded": benchmark.excluded,
        "samples": samples,
        "truncated": float(np.mean([row["truncated"] for row in rows])),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "seconds": seconds,
        "judges": {},
        "by": {},
    }
    if "rule" in rows[0]:
        verdicts = [row["rule"] for row in rows]
        summary["no_answer"] = float(np.mean([v == "no_answer" for v in verdicts]))
        summary["undecided"] = float(np.mean([v in ("unrecognised", "timeout") for v in verdicts]))

    for name, matrix in correct.items():
        summary["judges"][name] = _summarise_judge(matrix, answers, seed, resamples)
    summary["agreement"] = measure_pairwise_agreement(correct)
    for field in ("subject", "level"):
        values = np.array([getattr(problem, field) for problem in benchmark.problems])
        if any(values):
            summary["by"][field] = _break_down(values, correct, seed, resamples)
    return summary


def _summarise_judge(
    correct: np.ndarray, answers: Sequence[str | None], seed: int, resamples: int
) -> dict[str, Any]:
    """accuracy, pass@k and maj@n by one judge.  correct: bool[B, G].  answers: normal forms, [B * G]."""
    samples = correct.shape[1]
    totals = correct.sum(1)  # i64[B]: correct samples of each problem
    majority = []
    for i, decisions in enumerate(correct):
        own = answers[i * samples : (i + 1) * samples]
        majority.append(statistics.majority_accuracy(own, decisions))

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
    """Accuracy by each judge, per value.  values: str[B].  correct: judge -> bool[B, G]."""
    groups: dict[str, dict[str, Any]] = {}
    for value in sorted(set(values)):
        members = values == value  # bool[B]
        accuracy = {}
        for name, matrix in correct.items():
            accuracy[name] = bootstrap_mean(matrix[members].mean(1), seed, resamples)
        groups[str(value)] = {"problems": int(members.sum()), "accuracy": accuracy}
    return groups


def measure_pairwise_agreement(correct: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Agreement of each two judges over all samples, Cohen's kappa, and the share that only one accepts.

    correct: judge -> bool[B, G].
    """
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
    """The mean accuracy over benchmarks, each with equal weight, by every judge that judged all of them.

    rows: each benchmark's, by name.
    """
    shared = [name for name in JUDGES if all(name in summary["judges"] for summary in summaries)]
    means = {}
    for name in shared:
        accuracies, indices = [], []  # per benchmark: f64[B], i64[B]
        for index, summary in enumerate(summaries):
            matrix = make_correct_matrix(rows[summary["benchmark"]], name, summary["samples"])
            accuracies.append(matrix.mean(1))
            indices.append(np.full(len(matrix), index))
        values, members = np.concatenate(accuracies), np.concatenate(indices)  # problems of all benchmarks

        def compute_mean(weights: np.ndarray, values=values, members=members) -> float:
            counts = np.bincount(members, weights)
            sums = np.bincount(members, weights * values)
            # A resample may hold no problem of a small benchmark.
            return float(np.mean(sums[counts > 0] / counts[counts > 0]))

        groups = [f"{member} {i:09d}" for i, member in enumerate(members)]
        rng = keys.make_generator(seed, "bootstrap")
        means[name] = statistics.bootstrap_interval(compute_mean, groups, rng, resamples)
    return means


# --- the table ----------------------------------------------------------------------------------------------


def format_summary(summaries: Sequence[Mapping[str, Any]], means: Mapping[str, Interval]) -> str:
    """The tables for a terminal: benchmarks by judges, agreement, subjects and levels; then notes."""
    parts = [
        _format_accuracies(summaries, means),
        _format_agreement(summaries),
        _format_breakdown(summaries),
        _format_left_out(summaries),
    ]
    return "\n\n".join(part for part in parts if part)


def _format_accuracies(summaries: Sequence[Mapping[str, Any]], means: Mapping[str, Interval]) -> str:
    """One row per benchmark and judge; with several benchmarks also their means."""
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
    """Cells of one benchmark and judge.  columns: values of k of the table."""
    pass_at = judged["pass_at"]
    passes = [format_percent(pass_at[k].value) if k in pass_at else "" for k in columns]
    # Only the rule abstains.
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
    """One row per benchmark and pair of judges; "" with one judge."""
    rows = []
    for summary in summaries:
        for pair, figures in summary["agreement"].items():
            rows.append([summary["benchmark"], pair, *(format_percent(x) for x in figures.values())])
    header = ["benchmark", "judges", "agreement", "kappa x 100", "only first", "only second"]
    return format_table(header, rows) if rows else ""


def _format_breakdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One row per benchmark and subject or level; "" without any."""
    judges = [name for name in JUDGES if any(name in summary["judges"] for summary in summaries)]
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
    """A line per benchmark with too long prompts."""
    notes = []
    for summary in summaries:
        if summary["too_long"]:
            notes.append(
                f"{summary['benchmark']}: {summary['too_long']} of {summary['asked']} problems left out, for "
                "their prompts are too long"
            )
    return "\n".join(notes)
