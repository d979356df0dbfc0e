"""Responses to benchmark problems, judged by the rule verifier, the reward model, or both.

1. A `Sampler` gives `benchmark.samples` responses to each problem of a chunk: the policy's rollout, or
   recorded responses that are judged again.
2. `run_benchmarks` goes through the chunks.  The rule judges responses while others are decoded; the reward
   model scores at the end of the chunk.  Then the chunk's rows are written (evaluation_ledger.py).
3. benchmark_summaries.py computes figures from the rows.

A response's random bits depend on (seed, benchmark's name, problem's index in its file, sample, token) alone.
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
from cooper_jax.runtime import hosts, keys, output_folder, remote_files
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import setup_errors
from cooper_jax.types import Completion, Params, Problem, Rollout, Triple, Verdict

# Called with a problem's index in the chunk and its responses, while others are still sampled.
OnReady = Callable[[int, list[Completion]], None]


# --- responses --------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """A source of responses."""

    samples: int  # per problem

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        """Give the responses to the chunk's problems to `on_ready`, problem by problem, in any order."""


class PolicySampler:
    """The rollout engine, with the temperature, top-p and length of the section `benchmark`."""

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
        spec, tokenizer = self._spec, self._model.tokenizer

        def on_groups(places: list[int], rows: Rollout) -> None:
            responses = engine.decode_completions(rows, tokenizer.decode, spec.eos_ids)
            for i, place in enumerate(places):
                on_ready(place, responses[i * self.samples : (i + 1) * self.samples])

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
    """The responses of an items file, to be judged again."""

    def __init__(self, rows: Sequence[row_reader.Row], samples: int):
        self.samples = samples
        self._responses: dict[tuple[str, str], list[Completion]] = {}  # by (benchmark, problem's id)
        for row in rows:
            text = row_reader.replace_surrogates(row["completion"])
            completion = Completion(text, row["truncated"], row["tokens"])
            self._responses.setdefault((row["benchmark"], row["id"]), []).append(completion)

    def __call__(self, benchmark: Benchmark, chunk: range, on_ready: OnReady) -> None:
        for place, i in enumerate(chunk):
            on_ready(place, self._responses[benchmark.name, benchmark.problems[i].id])


# Fields of an items file that are needed to judge its responses again, and their types.
_ITEM_FIELDS = {
    "benchmark": str, "id": str, "place": int, "question": str, "reference": str, "subject": str,
    "level": str, "sample": int, "completion": str, "truncated": bool, "tokens": int,
}  # fmt: skip


def read_recorded(path: str) -> tuple[list[Benchmark], RecordedSampler]:
    """Problems and responses of an items file.

    Raises ValueError for the file of an unfinished evaluation, which would be judged as if it were complete,
    and for a row that no evaluation wrote, naming file, line and field.
    """
    if _is_unfinished(path):
        raise ValueError(
            f"{path}: the evaluation that writes it has not ended, for no {RESULTS} lies beside it: repeat "
            "that evaluation's command, and judge its responses when it has ended"
        )

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
        own = tuple(problem for _, problem in members.values())
        benchmarks.append(Benchmark(name, own, places, asked=len(members)))
    return benchmarks, RecordedSampler(rows, next(iter(counts.values())))


def _is_unfinished(path: str) -> bool:
    """True for the items file of an evaluation that has begun and not ended.

    An items file that was copied out of its folder is taken for finished: nothing beside it tells.
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
        if row["sample"] != counts[key]:
            raise ValueError(f"sample {row['sample']} of {row['id']} stands where its {counts[key]}. is due")
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
    """Sample and judge all chunks that the ledger does not hold yet.

    Args:
      rule, reward: the judges; at least one.
      chunk: problems in a chunk.
      print_line: called with a line of progress after each chunk.

    Raises hosts.Stopped after SIGTERM: rows of finished chunks are kept, the chunk in progress is lost.
    """
    work = list(split_chunks(benchmarks, chunk))
    begin, first = time.perf_counter(), ledger.done
    for number, (benchmark, places) in enumerate(work):
        if number < first:
            continue
        hosts.raise_if_stopping()
        chunk_begin = time.perf_counter()
        rows = _judge_chunk(benchmark, places, sampler, rule, reward)
        ledger.append(rows, time.perf_counter() - chunk_begin)

        # The estimate of the time left takes all chunks for equally long.
        seconds_per_chunk = (time.perf_counter() - begin) / (number + 1 - first)
        left = round(seconds_per_chunk * (len(work) - number - 1))
        tokens_per_second = sum(r["tokens"] for r in rows) / (time.perf_counter() - chunk_begin)
        print_line(
            f"{benchmark.name} {places.stop}/{len(benchmark.problems)} problems  {_format_shares(rows)}"
            f"  {tokens_per_second:.0f} tokens/s"
            f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )


def _judge_chunk(
    benchmark: Benchmark,
    places: range,
    sampler: Sampler,
    rule: RuleVerifier | SharedRule | None,
    reward: RewardModel | None,
) -> list[Row]:
    """Rows of a chunk, problem by problem.  places: indices among the benchmark's problems."""
    problems = [benchmark.problems[i] for i in places]
    responses: dict[int, list[Completion]] = {}  # by the problem's index in the chunk

    def on_ready(index: int, completions: list[Completion]) -> None:
        responses[index] = completions
        # The rule judges while others are decoded; it remembers its verdicts, which are collected below.
        if rule is not None:
            rule.submit([(problems[index].reference, c.text) for c in completions])

    sampler(benchmark, places, on_ready)
    samples = []  # (problem, completion, problem's index in the chunk, sample), problem-major
    for index, problem in enumerate(problems):
        for sample in range(sampler.samples):
            samples.append((problem, responses[index][sample], index, sample))

    # The rule's processes work while the reward model scores.
    pending = None
    if rule is not None:
        pending = rule.submit([(problem.reference, c.text) for problem, c, _, _ in samples])
    rewards: np.ndarray | None = None
    if reward is not None:
        rewards = reward.rewards([Triple(p.question, p.reference, c.text) for p, c, _, _ in samples])
    verdicts: Sequence[Verdict] | None = None if pending is None else pending.result()

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


def _format_shares(rows: Sequence[Row]) -> str:
    """Accuracy by each judge and the share of truncated responses, for a line of progress."""
    parts = []
    if "rule" in rows[0]:
        parts.append(f"rule {np.mean([r['rule'] == 'correct' for r in rows]):.1%}")
    if "reward" in rows[0]:
        parts.append(f"reward model {np.mean([r['reward'] > 0.5 for r in rows]):.1%}")
    return "  ".join([*parts, f"truncated {np.mean([r['truncated'] for r in rows]):.1%}"])
