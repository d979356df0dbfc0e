"""Figures of a policy's judged responses, by benchmark and judge, and their table.

Of each judge (`rule`: verdict correct; `model`: reward above 0.5; `oracle`: synthetic problems' exact truth):

    accuracy   mean over problems and samples, which is pass@1
    pass@k     the chance that k samples hold a correct one, unbiased (statistics.pass_at_k), for 1, 2, 4, ... and n
    maj@n      whether the most frequent answer is correct; answers are one by their normal form (answer_forms.py)

each with a 95 % interval bootstrapped by problem.  Of the responses: truncated (no end was sampled), no_answer and
undecided (the rule found none, or could not compare it: it abstains, and the sample counts as wrong), mean tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Those whose say the rows hold."""
    return [name for name in JUDGES if rows and _FIELD[name] in rows[0]]


def correct_matrix(rows: Sequence[Row], judge: str, samples: int) -> np.ndarray:
    """bool[problems, samples]"""
    return np.array([JUDGES[judge](row) for row in rows], bool).reshape(-1, samples)


def mean_interval(values: np.ndarray, seed: int, resamples: int) -> Interval:
    """The mean over problems, f64[problems]; every figure is resampled alike."""

    def statistic(w: np.ndarray) -> float:
        return float((w * values).sum() / w.sum())

    rng = keys.make_generator(seed, "bootstrap")
    return statistics.bootstrap_interval(statistic, [f"{i:09d}" for i in range(len(values))], rng, resamples)


def list_k(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def summarise_benchmark(
    benchmark: Benchmark, rows: Sequence[Row], samples: int, seconds: float, seed: int, resamples: int
) -> dict[str, Any]:
    """All figures of one benchmark; rows problem by problem."""
    found = {name: correct_matrix(rows, name, samples) for name in list_judges(rows)}
    forms = [normalise_completion(row["completion"]) for row in rows]
    out: dict[str, Any] = {
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
        out["no_answer"] = float(np.mean([v == "no_answer" for v in verdicts]))
        out["undecided"] = float(np.mean([v in ("unrecognised", "timeout") for v in verdicts]))
    for name, right in found.items():
        totals = right.sum(1)
        groups = [forms[i * samples : (i + 1) * samples] for i in range(len(right))]
        most = np.array([statistics.majority_accuracy(g, r) for g, r in zip(groups, right, strict=True)])
        passes = {
            k: np.array([statistics.pass_at_k(samples, int(c), k) for c in totals]) for k in list_k(samples)
        }
        out["judges"][name] = {
            "accuracy": mean_interval(right.mean(1), seed, resamples),
            "pass_at": {k: mean_interval(v, seed, resamples) for k, v in passes.items()},
            "majority": mean_interval(most, seed, resamples),
        }
    out["agreement"] = pairwise_agreement(found)
    for by in ("subject", "level"):
        said = np.array([getattr(p, by) for p in benchmark.problems])
        if any(said):
            out["by"][by] = {
                str(value): {
                    "problems": int((said == value).sum()),
                    "accuracy": {
                        n: mean_interval(r[said == value].mean(1), seed, resamples) for n, r in found.items()
                    },
                }
                for value in sorted(set(said))
            }
    return out


def pairwise_agreement(found: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Of each two judges, over all samples: how often they agree, Cohen's kappa, and who says yes alone."""
    names = list(found)
    out = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            x, y = found[a].ravel(), found[b].ravel()
            out[f"{a} and {b}"] = {
                "agreement": float((x == y).mean()),
                "kappa": statistics.cohens_kappa(x.tolist(), y.tolist()),
                f"only {a}": float((x & ~y).mean()),
                f"only {b}": float((~x & y).mean()),
            }
    return out


def average_benchmarks(
    results: Sequence[dict], rows: dict[str, Sequence[Row]], seed: int, resamples: int
) -> dict[str, Interval]:
    """Of each judge of all benchmarks: the mean of their accuracies, every benchmark counting alike."""
    shared = [n for n in JUDGES if all(n in r["judges"] for r in results)]
    out = {}
    for name in shared:
        values, of = [], []
        for place, result in enumerate(results):
            right = correct_matrix(rows[result["benchmark"]], name, result["samples"]).mean(1)
            values.append(right)
            of.append(np.full(len(right), place))
        flat, of = np.concatenate(values), np.concatenate(of)

        def statistic(w: np.ndarray, flat=flat, of=of) -> float:
            weights = np.bincount(of, w)
            return float(np.mean(np.bincount(of, w * flat)[weights > 0] / weights[weights > 0]))

        groups = [f"{b} {i:09d}" for i, b in enumerate(of)]
        out[name] = statistics.bootstrap_interval(
            statistic, groups, keys.make_generator(seed, "bootstrap"), resamples
        )
    return out


# --- the table -----------------------------------------------------------------------------------------------


def format_summary(results: Sequence[dict], means: dict[str, Interval]) -> str:
    """The tables of a terminal: benchmarks by judges, agreement, subjects and levels."""
    ks = sorted({k for r in results for j in r["judges"].values() for k in j["pass_at"] if k > 1})
    samples = {r["samples"] for r in results}
    header = ["benchmark", "judge", "problems", "accuracy % (95 %)", *(f"pass@{k}" for k in ks)]
    header += [f"maj@{min(samples)}", "truncated", "no answer", "undecided", "tokens", "seconds"]
    rows = []
    for r in results:
        for name, judged in r["judges"].items():
            passes = [
                format_percent(judged["pass_at"][k].value) if k in judged["pass_at"] else "" for k in ks
            ]
            rule = [
                format_percent(r[x]) if name == "rule" else "" for x in ("no_answer", "undecided") if x in r
            ]
            rows.append(
                [r["benchmark"], name, str(r["problems"]), format_percent(judged["accuracy"]), *passes]
                + [
                    format_percent(judged["majority"].value),
                    format_percent(r["truncated"]),
                    *(rule or ["", ""]),
                ]
                + [f"{r['tokens']:.0f}", f"{r['seconds']:.0f}"]
            )
    for name, interval in means.items() if len(results) > 1 else ():
        problems, seconds = sum(r["problems"] for r in results), sum(r["seconds"] for r in results)
        rows.append(
            ["mean", name, str(problems), format_percent(interval), *[""] * (len(ks) + 5), f"{seconds:.0f}"]
        )
    parts = [format_table(header, rows)]
    apart = [
        [r["benchmark"], pair, *(format_percent(x) for x in said.values())]
        for r in results
        for pair, said in r["agreement"].items()
    ]
    if apart:
        parts.append(
            format_table(
                ["benchmark", "judges", "agreement", "kappa x 100", "only first", "only second"], apart
            )
        )
    judges = [n for n in JUDGES if any(n in r["judges"] for r in results)]
    groups = [
        [r["benchmark"], by, value or "(none)", str(g["problems"])]
        + [format_percent(g["accuracy"][n]) if n in g["accuracy"] else "" for n in judges]
        for r in results
        for by, values in r["by"].items()
        for value, g in values.items()
    ]
    if groups:
        parts.append(
            format_table(
                ["benchmark", "by", "value", "problems", *(f"{n}, accuracy %" for n in judges)], groups
            )
        )
    notes = [
        f"{r['benchmark']}: {r['too_long']} of {r['asked']} problems left out, for their prompts are too long"
        for r in results
        if r["too_long"]
    ]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])
