"""Responses to benchmark problems, judged by the rule verifier, the reward model, or both.

1. A `Sampler` provides `benchmark.samples` responses to each problem of a chunk: the policy's rollout, or
   recorded responses that are judged again.
2. `run_benchmarks` samples and judges chunk by chunk.  The rule judges responses while others are decoded;
   the reward model scores at the end of the chunk.  Then the chunk's rows are written (evaluation_ledger.py).
3. benchmark_summaries.py computes figures from the rows.

A response's random bits depend only on (seed, benchmark's name, problem's index in its file, sample, token).
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
from cooper_jax.evaluation.benchmark_sets import SYNTHETIC, Benchmark, BenchmarkConfig, split_chunks
from cooper_jax.evaluation.evaluated_models import RewardModel
from cooper_jax.evaluation.evaluation_ledger import ITEMS, RESULTS, Ledger, Row
from cooper_jax.model import loading
from cooper_jax.reward.multihost import SharedRule
from cooper_jax.rollout import engine, rollout_config
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.rule.worker_process import Item, make_item
from cooper_jax.runtime import hosts, keys, output_folder, remote_files
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.types import Completion, Params, Problem, Rollout, Triple, Verdict

# Called with a problem's index in the chunk and its responses, while those of others are still sampled.
OnReady = Callable[[int, list[Completion]], None]


# --- responses --------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """A source of responses."""

    samples: int  # per problem

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        """Call `on_ready` with the responses to each problem of the chunk, in any order."""


class PolicySampler:
    """A sampler that runs the rollout engine with the sampling settings of the section `benchmark`."""

    def __init__(
        self,
        cfg: ConfigDict,
        settings: BenchmarkConfig,
        layout: Layout,
        model: loading.Model,
        params: Params,
    ):
        """Check the sampling settings.  Raises SetupError for values out of range.

        cfg: the whole config, of which `rollout` and `seed` are read.
        """
        self.samples = settings.samples
        self._cfg, self._layout, self._model, self._params = cfg, layout, model, params
        # The engine is configured as in training; only the sampling settings are the evaluation's own.
        self._rollout = rollout_config.RolloutConfig.from_config(cfg.rollout)
        with setup_errors("benchmark"):
            self._spec = self._rollout.make_sampling_spec(
                model.tokenizer.eos_ids,
                temperature=settings.temperature,
                top_k=0,
                top_p=settings.top_p,
                min_p=0.0,
                max_new_tokens=settings.max_new_tokens,
                group_size=settings.samples,
            )

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        """Sample responses to a chunk's problems."""
        spec, tokenizer = self._spec, self._model.tokenizer

        def on_groups(places: list[int], rows: Rollout) -> None:
            responses = engine.decode_completions(rows, tokenizer.decode, spec.eos_ids)
            for i, place in enumerate(places):
                on_ready(place, responses[i * self.samples : (i + 1) * self.samples])

        # Each benchmark has a random key of its own; the engine folds in each problem's index in its file.
        key = keys.make_key(self._cfg.seed, "benchmark", zlib.crc32(benchmark.name.encode()))
        with setup_errors("rollout"):
            engine.generate(
                self._params,
                self._model.config,
                self._layout,
                benchmark.prompts[chunk.start : chunk.stop],
                benchmark.places[chunk.start : chunk.stop],
                key,
                spec,
                on_groups=on_groups,
                between_segments=hosts.raise_if_stopping,
                **self._rollout.make_engine_options(),
            )


class RecordedSampler:
    """A sampler that returns the responses of an items file, to be judged again."""

    def __init__(self, rows: Sequence[row_reader.Row], samples: int):
        """Group the rows by problem.

        Args:
          rows: checked rows of an items file; the samples of a problem are in order.
          samples: per problem.
        """
        self.samples = samples
        self._responses: dict[tuple[str, str], list[Completion]] = {}  # by (benchmark, problem's id)
        for row in rows:
            text = row_reader.replace_surrogates(row["completion"])
            completion = Completion(text, row["truncated"], row["tokens"])
            self._responses.setdefault((row["benchmark"], row["id"]), []).append(completion)

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        """Return the recorded responses to a chunk's problems."""
        for place, i in enumerate(chunk):
            on_ready(place, self._responses[benchmark.name, benchmark.problems[i].id])


# Fields of an items file that are needed to judge its responses again, and their types.
_ITEM_FIELDS = {
    "benchmark": str, "id": str, "place": int, "question": str, "reference": str, "subject": str,
    "level": str, "sample": int, "completion": str, "truncated": bool, "tokens": int,
}  # fmt: skip


def read_recorded(path: str) -> tuple[list[Benchmark], RecordedSampler]:
    """Read the problems and responses of an items file.

    Raises ValueError for the file of an unfinished evaluation, which would be judged as if it were complete,
    and for a row that no evaluation wrote, naming file, line and field.
    """
    if _is_unfinished(path):
        raise ValueError(
            f"{path}: the evaluation that writes it has not ended, since there is no {RESULTS} beside it: "
            "repeat that evaluation's command, and judge its responses when it has ended"
        )

    # Problems keep the order of their first rows.
    rows: list[row_reader.Row] = []
    problems: dict[str, dict[str, tuple[int, Problem]]] = {}  # benchmark -> problem's id -> (place, problem)
    counts: Counter[tuple[str, str]] = Counter()  # samples so far, by (benchmark, problem's id)
    for where, _, row in row_reader.read_file_rows(path):
        name, id = _check_item(row, where, counts)
        problem = Problem(row["question"], row["reference"], "", id, row["subject"], row["level"])
        problems.setdefault(name, {}).setdefault(id, (row["place"], problem))
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: there is no row in it")
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{path}: problems have from {min(counts.values())} to {max(counts.values())} samples"
        )

    benchmarks = []
    for name, members in problems.items():
        places = tuple(place for place, _ in members.values())
        benchmark_problems = tuple(problem for _, problem in members.values())
        benchmarks.append(Benchmark(name, benchmark_problems, places, asked=len(members)))
    return benchmarks, RecordedSampler(rows, next(iter(counts.values())))


def _is_unfinished(path: str) -> bool:
    """True for the items file of an evaluation that has begun and not ended.

    An items file that was copied out of its folder counts as finished, since settings.json is not beside it.
    """
    folder, name = os.path.split(path)
    if name != ITEMS:
        return False
    try:
        beside = remote_files.fetch_local(folder, (output_folder.SETTINGS, RESULTS))
    except FileNotFoundError:  # an address that has neither file
        return False
    return (beside / output_folder.SETTINGS).is_file() and not (beside / RESULTS).is_file()


def _check_item(row: row_reader.Row, where: str, counts: Counter[tuple[str, str]]) -> tuple[str, str]:
    """Check a row of an items file, and count it in `counts`.

    Returns (benchmark, problem's id).  Raises ValueError for a row that no evaluation wrote.
    """
    try:
        for name, kind in _ITEM_FIELDS.items():
            if not isinstance(row_reader.get_field(row, name), kind):
                raise ValueError(f"field {name!r} is {row[name]!r}: must be {kind.__name__}")
        key = row["benchmark"], row["id"]
        # Samples of a problem are numbered from 0, without gaps.
        if row["sample"] != counts[key]:
            raise ValueError(
                f"sample {row['sample']} of {row['id']} is where sample {counts[key]} is expected"
            )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    counts[key] += 1
    return key


# --- judging ----------------------------------------------------------------------------------------------


def run_benchmarks(
    benchmarks: Sequence[Benchmark],
    sampler: Sampler,
    rule: RuleVerifier | SharedRule | None,
    reward: RewardModel | None,
    ledger: Ledger,
    chunk: int,
    print_line: Callable[[str], Any],
) -> None:
    """Sample and judge all chunks that are not in the ledger yet.

    Args:
      benchmarks: in the order of the ledger's rows.
      sampler: of the responses.
      rule, reward: the judges, at least one of them.
      ledger: receives the rows of each finished chunk.
      chunk: problems in a chunk.
      print_line: called with a line of progress after each chunk.

    Raises hosts.Stopped after SIGTERM: rows of finished chunks are kept, the chunk in progress is lost.
    """
    work = list(split_chunks(benchmarks, chunk))
    # The ledger's chunks are the first ones: the order of the work is fixed.
    begin, first = time.perf_counter(), ledger.done
    for number, (benchmark, places) in enumerate(work):
        if number < first:
            continue
        hosts.raise_if_stopping()
        chunk_begin = time.perf_counter()
        rows = _judge_chunk(benchmark, places, sampler, rule, reward)
        ledger.append(rows, time.perf_counter() - chunk_begin)

        # The estimate of the remaining time assumes that all chunks take equally long.
        seconds_per_chunk = (time.perf_counter() - begin) / (number + 1 - first)
        eta = round(seconds_per_chunk * (len(work) - number - 1))  # seconds
        tokens_per_second = sum(r["tokens"] for r in rows) / (time.perf_counter() - chunk_begin)
        print_line(
            f"{benchmark.name} {places.stop}/{len(benchmark.problems)} problems  {_format_shares(rows)}"
            f"  {tokens_per_second:.0f} tokens/s"
            f"  ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
        )


def _judge_chunk(
    benchmark: Benchmark,
    places: range,
    sampler: Sampler,
    rule: RuleVerifier | SharedRule | None,
    reward: RewardModel | None,
) -> list[Row]:
    """Sample and judge a chunk; returns its rows, problem-major.

    places: indices among the benchmark's problems.
    """
    problems = [benchmark.problems[i] for i in places]
    responses: dict[int, list[Completion]] = {}  # by the problem's index in the chunk

    def on_ready(index: int, completions: list[Completion]) -> None:
        responses[index] = completions
        # The rule judges these responses while others are decoded.  It remembers its verdicts, which are
        # collected below.
        if rule is not None:
            rule.submit([make_item(problems[index], c.text) for c in completions])

    sampler(benchmark, places, on_ready)

    # Responses arrive in any order; the rows have the order of the problems.
    samples = []  # (problem, completion, problem's index in the chunk, sample), problem-major
    for index, problem in enumerate(problems):
        for sample in range(sampler.samples):
            samples.append((problem, responses[index][sample], index, sample))

    triples = [Triple(p.question, p.reference, c.text) for p, c, _, _ in samples]
    verdicts, rewards = _collect_judgements(triples, rule, reward)

    rows = []
    for n, (problem, completion, index, sample) in enumerate(samples):
        row = _make_row(benchmark, places[index], problem, sample, completion)
        if verdicts is not None:
            row["rule"] = verdicts[n].value
        if rewards is not None:
            row["reward"] = round(float(rewards[n]), 6)
        rows.append(row)
    return rows


def _make_row(benchmark: Benchmark, index: int, problem: Problem, sample: int, completion: Completion) -> Row:
    """The row of one response without its judgements; index: the problem's among the benchmark's problems."""
    row: Row = {
        "benchmark": benchmark.name,
        "id": problem.id,
        "place": benchmark.places[index],
        "subject": problem.subject,
        "level": problem.level,
        "question": problem.question,
        "reference": problem.reference,
        "sample": sample,
        "completion": completion.text,
        "tokens": completion.tokens,
        "truncated": completion.truncated,
    }
    # Synthetic problems have an exact truth beside the judges' opinions.
    if benchmark.name == SYNTHETIC:
        row["oracle"] = synthetic.is_correct(problem, completion.text)
    return row


def _collect_judgements(
    triples: Sequence[Triple], rule: RuleVerifier | SharedRule | None, reward: RewardModel | None
) -> tuple[Sequence[Verdict] | None, np.ndarray | None]:
    """Judge triples; returns (the rule's verdicts [N], rewards f32[N]), with None for an absent judge."""
    # The rule's processes work while the reward model scores.
    pending = None
    if rule is not None:
        pending = rule.submit([Item(t.reference, t.completion, t.question) for t in triples])

    rewards = None
    if reward is not None:
        rewards = reward.rewards(triples)
    verdicts = None
    if pending is not None:
        verdicts = pending.result()
    return verdicts, rewards


def _format_shares(rows: Sequence[Row]) -> str:
    """Format the accuracy by each judge and the share of truncated responses for a line of progress."""
    parts = []
    if "rule" in rows[0]:
        parts.append(f"rule {np.mean([r['rule'] == 'correct' for r in rows]):.1%}")
    if "reward" in rows[0]:
        parts.append(f"reward model {np.mean([r['reward'] > 0.5 for r in rows]):.1%}")
    return "  ".join([*parts, f"truncated {np.mean([r['truncated'] for r in rows]):.1%}"])
