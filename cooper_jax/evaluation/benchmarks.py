"""A policy's samples of benchmark problems, judged by the rule, the reward model, or both side by side.

1. A `Sampler` gives `benchmark.samples` responses to each problem of a chunk: the policy's rollout, or recorded
   ones that are judged anew.
2. `run` goes through the chunks.  The rule judges responses as they end, beside decoding; the reward model scores
   when the chunk has ended.  A chunk's rows are then written (ledger.py).
3. `summaries.py` makes figures of the rows.

A response's random bits depend on (seed, the benchmark's name, the problem's place in its file, sample, token)
alone.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import row_reader, synthetic
from cooper_jax.evaluation.benchmark_sets import SYNTHETIC, Benchmark, cut_chunks
from cooper_jax.evaluation.evaluated_models import RewardModel
from cooper_jax.evaluation.evaluation_ledger import ITEMS, RESULTS, Ledger, Row
from cooper_jax.model import loading
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.rollout import engine, rollout_config
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import hosts, keys, output_folder, remote_files
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.types import Completion, Params, Problem, Triple

# Is given a problem's place in the chunk and its responses, while others are still sampled.
OnReady = Callable[[int, list[Completion]], None]


# --- responses --------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """Where responses come from."""

    samples: int  # of each problem

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None: ...


class PolicySampler:
    """The rollout engine, at the benchmark section's own temperature, top-p and length."""

    def __init__(self, cfg: ConfigDict, layout: Layout, model: loading.Model, params: Params):
        section = cfg.benchmark
        self.samples = section.samples
        self._cfg, self._layout, self._model, self._params = cfg, layout, model, params
        self._rollout = rollout_config.RolloutConfig.from_config(cfg.rollout)
        with setup_errors("benchmark"):
            self._spec = self._rollout.make_sampling_spec(
                model.tokenizer.eos_ids,
                temperature=section.temperature,
                top_k=0,
                top_p=section.top_p,
                min_p=0.0,
                max_new_tokens=section.max_new_tokens,
                group_size=section.samples,
            )

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        spec, tokenizer = self._spec, self._model.tokenizer

        def on_groups(places: list[int], rows) -> None:
            responses = engine.decode_completions(rows, tokenizer.decode, spec.eos_ids)
            for i, place in enumerate(places):
                on_ready(place, responses[i * self.samples : (i + 1) * self.samples])

        key = keys.make_key(self._cfg.seed, "benchmark", zlib.crc32(benchmark.name.encode()))
        with setup_errors("rollout"):
            engine.generate(
                self._params, self._model.config, self._layout,
                benchmark.prompts[chunk.start : chunk.stop], benchmark.places[chunk.start : chunk.stop],
                key, spec, on_groups=on_groups, between_segments=hosts.raise_if_stopping,
                **self._rollout.make_engine_options(),
            )  # fmt: skip


class RecordedSampler:
    """The responses of an items file, to be judged anew."""

    def __init__(self, rows: Sequence[Row], samples: int):
        self.samples = samples
        self._found: dict[tuple[str, str], list[Completion]] = {}
        for row in rows:
            text = row_reader.replace_surrogates(row["completion"])
            said = Completion(text, row["truncated"], row["tokens"])
            self._found.setdefault((row["benchmark"], row["id"]), []).append(said)

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        for place, i in enumerate(chunk):
            on_ready(place, self._found[benchmark.name, benchmark.problems[i].id])


_RECORDED = {
    "benchmark": str, "id": str, "place": int, "question": str, "reference": str, "subject": str, "level": str,
    "sample": int, "completion": str, "truncated": bool, "tokens": int,
}  # fmt: skip


def read_recorded(path: str) -> tuple[list[Benchmark], RecordedSampler]:
    """An items file's problems and responses.

    Raises ValueError for a part of one, which would be judged as if it were all, and for what no evaluation wrote,
    naming file, line and field.
    """
    if _unfinished(path):
        raise ValueError(
            f"{path}: the evaluation that writes it has not ended, for no {RESULTS} lies beside it: give that "
            "evaluation's command again, and judge its responses when it has ended"
        )
    rows: list[Row] = []
    found: dict[str, dict[str, tuple[int, Problem]]] = {}  # benchmark -> problem -> (its place, itself)
    counts: Counter[tuple[str, str]] = Counter()
    for where, _, row in row_reader.read_file_rows(path):
        name, id = _checked(row, where, counts)
        problem = Problem(row["question"], row["reference"], "", id, row["subject"], row["level"])
        found.setdefault(name, {}).setdefault(id, (row["place"], problem))
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: there is no row in it")
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{path}: problems have from {min(counts.values())} to {max(counts.values())} samples"
        )
    made = []
    for name, own in found.items():
        places, problems = zip(*own.values(), strict=True)
        made.append(Benchmark(name, problems, places, asked=len(own)))
    return made, RecordedSampler(rows, next(iter(counts.values())))


def _unfinished(path: str) -> bool:
    """Whether an evaluation's folder was begun and not ended; nobody can tell of an items file that lies alone."""
    folder, name = os.path.split(path)
    if name != ITEMS:
        return False
    try:
        beside = remote_files.fetch_local(folder, (output_folder.SETTINGS, RESULTS))
    except FileNotFoundError:  # at an address where neither is
        return False
    return (beside / output_folder.SETTINGS).is_file() and not (beside / RESULTS).is_file()


def _checked(row: Row, where: str, counts: Counter[tuple[str, str]]) -> tuple[str, str]:
    """(benchmark, problem) of a row, which is counted; ValueError for one that no evaluation wrote."""
    try:
        for name, kind in _RECORDED.items():
            if not isinstance(row_reader.get_field(row, name), kind):
                raise ValueError(f"field {name!r} is {row[name]!r}: must be {kind.__name__}")
        key = row["benchmark"], row["id"]
        if row["sample"] != counts[key]:
            raise ValueError(f"sample {row['sample']} of {row['id']} stands where its {counts[key]}. is due")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    counts[key] += 1
    return key


# --- judged and written -----------------------------------------------------------------------------------


def run_benchmarks(
    benchmarks: Sequence[Benchmark],
    sampler: Sampler,
    rule: RuleVerifier | SharedRule | None,
    reward: RewardModel | None,
    ledger: Ledger,
    chunk: int,
    tell: Callable[[str], Any],
) -> None:
    """All that the ledger does not hold yet.  rule, reward: the judges; at least one.

    Raises hosts.Stopped after a SIGTERM: what is written stays, and the chunk under way is lost.
    """
    work = list(cut_chunks(benchmarks, chunk))
    began, first = time.perf_counter(), ledger.done
    for number, (benchmark, places) in enumerate(work):
        if number < first:
            continue
        hosts.raise_if_stopping()
        start = time.perf_counter()
        rows = _judged(benchmark, places, sampler, rule, reward)
        ledger.append(rows, time.perf_counter() - start)
        pace = (time.perf_counter() - began) / (number + 1 - first)
        left = round(pace * (len(work) - number - 1))
        tell(
            f"{benchmark.name} {places.stop}/{len(benchmark.problems)} problems  {_in_short(rows)}"
            f"  {sum(r['tokens'] for r in rows) / (time.perf_counter() - start):.0f} tokens/s"
            f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )


def _judged(benchmark: Benchmark, places: range, sampler: Sampler, rule, reward) -> list[Row]:
    """A chunk's rows, problem by problem."""
    problems = [benchmark.problems[i] for i in places]
    responses: dict[int, list[Completion]] = {}

    def on_ready(place: int, completions: list[Completion]) -> None:
        responses[place] = completions
        if rule is not None:  # while others are decoded; the verifier remembers its verdicts
            rule.submit([(problems[place].reference, c.text) for c in completions])

    sampler(benchmark, places, on_ready)
    flat = [
        (problems[n], responses[n][s], n, s) for n in range(len(problems)) for s in range(sampler.samples)
    ]
    pending = None if rule is None else rule.submit([(p.reference, c.text) for p, c, _, _ in flat])
    rewards = (
        None
        if reward is None
        else reward.rewards([Triple(p.question, p.reference, c.text) for p, c, _, _ in flat])
    )
    verdicts = None if pending is None else pending.result()
    rows = []
    for i, (problem, completion, n, sample) in enumerate(flat):
        row: Row = {
            "benchmark": benchmark.name,
            "id": problem.id,
            "place": benchmark.places[places[n]],
            "subject": problem.subject,
            "level": problem.level,
            "question": problem.question,
            "reference": problem.reference,
            "sample": sample,
            "completion": completion.text,
            "tokens": completion.tokens,
            "truncated": completion.truncated,
        }
        if verdicts is not None:
            row["rule"] = verdicts[i].value
        if rewards is not None:
            row["reward"] = round(float(rewards[i]), 6)
        if benchmark.name == SYNTHETIC:
            row["oracle"] = synthetic.is_correct(problem, completion.text)
        rows.append(row)
    return rows


def _in_short(rows: Sequence[Row]) -> str:
    parts = []
    if "rule" in rows[0]:
        parts.append(f"rule {np.mean([r['rule'] == 'correct' for r in rows]):.1%}")
    if "reward" in rows[0]:
        parts.append(f"reward model {np.mean([r['reward'] > 0.5 for r in rows]):.1%}")
    return "  ".join([*parts, f"truncated {np.mean([r['truncated'] for r in rows]):.1%}"])
