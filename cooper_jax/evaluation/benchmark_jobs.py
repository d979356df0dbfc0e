"""Benchmark jobs of launch/evaluate.py: they check settings, load models and judges, and write results.

    evaluate_benchmarks  samples a policy's responses and judges them
    rejudge_items        judges recorded responses again, by other judges

The other public functions are shared with judge_jobs.py, which measures judges.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.data import seen_questions
from cooper_jax.evaluation import benchmark_sets, benchmark_summaries, benchmarks
from cooper_jax.evaluation.benchmark_sets import Benchmark, BenchmarkConfig
from cooper_jax.evaluation.evaluated_models import ChosenModels, RewardModel
from cooper_jax.evaluation.evaluation_ledger import RESULTS, Ledger, Row
from cooper_jax.evaluation.text_tables import to_plain
from cooper_jax.model import loading
from cooper_jax.reward.multihost import open_rule_verifier
from cooper_jax.runtime import device_layouts, hosts, remote_files
from cooper_jax.settings.setup_errors import ErrorCollector, setup_errors


def evaluate_benchmarks(cfg: ConfigDict, chosen: ChosenModels, places: Sequence[str], out: Path) -> None:
    """Measure a policy on benchmarks: sample, judge, report.

    Args:
      cfg: the whole config.
      chosen: the source of the policy and the reward model.
      places: files, folders or `synthetic`, as for `find_benchmarks`.
      out: the folder of the results.

    Raises SetupError, and hosts.Stopped after SIGTERM.
    """
    # Settings and files are checked before the policy is loaded, which takes longest.
    settings = read_benchmark_config(cfg)
    files = benchmark_sets.find_benchmarks(places)
    layout = device_layouts.make_layouts(cfg)["policy"]
    model, params = chosen.load("policy", layout)
    lengths = {
        "benchmark.max_prompt_tokens": settings.max_prompt_tokens,
        "benchmark.max_new_tokens": settings.max_new_tokens,
    }
    loading.check_length(model.config, "policy", lengths)

    # A run's policy was rewarded by its reward model.  The questions in that model's training data are
    # therefore not a clean test of the policy either, even if only the rule judges.
    trained_with_model = chosen.run_dir is not None and cfg.reward.arm != "rule"
    record = read_seen_questions(chosen) if settings.by_model or trained_with_model else None
    seen = record.fingerprints if record else frozenset()
    with setup_errors("data.chat"):
        loaded = benchmark_sets.load_benchmarks(cfg, settings, files, model.tokenizer, seen)

    # Settings that decide the responses: a later start with other values must not continue this ledger.
    sampler = benchmarks.PolicySampler(cfg, settings, layout, model, params)
    outcome_settings = chosen.settings("policy") | {
        "seed": cfg.seed,
        "data.instruction": cfg.data.instruction,
        "data.system": cfg.data.system,
        "data.chat": cfg.data.chat,
        "data.thinking": cfg.data.thinking,
        "rollout.dtype": cfg.rollout.dtype,
        "rollout.kv_dtype": cfg.rollout.kv_dtype,
        "benchmark.samples": settings.samples,
        "benchmark.temperature": settings.temperature,
        "benchmark.top_p": settings.top_p,
        "benchmark.max_new_tokens": settings.max_new_tokens,
        "benchmark.max_prompt_tokens": settings.max_prompt_tokens,
        "benchmark.problems": settings.problems,
    }
    hosts.print_once(_describe_job(cfg, settings, chosen, model, loaded))
    _judge_and_report(cfg, settings, chosen, loaded, sampler, outcome_settings, out, record)


def rejudge_items(cfg: ConfigDict, chosen: ChosenModels, items: str, out: Path) -> None:
    """Judge the responses of an items file again, by the judges of `benchmark.judged_by`; nothing is sampled.

    Args:
      cfg: the whole config.
      chosen: the source of the reward model.
      items: the items.jsonl of a finished evaluation.
      out: the folder of the results.

    Raises SetupError, and hosts.Stopped after SIGTERM.
    """
    settings = read_benchmark_config(cfg)
    with setup_errors(f"--rejudge={items}"):
        recorded, sampler = benchmarks.read_recorded(items)
        # The hash detects another file of the same name at a later start.
        digest = hashlib.sha256(remote_files.fetch_local(items).read_bytes()).hexdigest()[:16]
        record = read_seen_questions(chosen) if settings.by_model else None
        if record is not None:
            recorded = [
                benchmark_sets.drop_seen_problems(b, record.fingerprints, settings.exclude_seen)
                for b in recorded
            ]
    _judge_and_report(cfg, settings, chosen, recorded, sampler, {"items": digest}, out, record)


def write_results(ledger: Ledger, settings: Mapping[str, Any], results: Mapping[str, Any], text: str) -> None:
    """Write results.json and table.txt, and print the table.

    Args:
      ledger: the open ledger, to whose folder the files are written.
      settings: flat names -> values that decided the results.
      results: figures; may contain intervals.
      text: the tables.
    """
    ledger.write(RESULTS, to_plain({"settings": settings, **results}))
    ledger.write("table.txt", text)
    hosts.print_once(f"\n{text}\n\n{ledger.folder}: wrote {RESULTS}, table.txt and items.jsonl", always=True)


@contextlib.contextmanager
def report_interruption(ledger: Ledger, chunks: int) -> Iterator[None]:
    """Print the number of finished chunks if a signal stops the work in the context.

    chunks: their total number.
    """
    try:
        yield
    except hosts.Stopped:
        hosts.print_once(
            f"stopped by a signal: {ledger.done} of {chunks} chunks are in {ledger.folder}; the same command "
            "resumes",
            always=True,
        )
        raise


def read_seen_questions(chosen: ChosenModels) -> seen_questions.Record:
    """Read the record of the questions in the reward model's training data, which is beside its weights.

    Without a record the result is empty and marked incomplete, which is printed.  Raises SetupError for a
    damaged record.
    """
    place = chosen.run_dir or chosen.cfg.reward.weights
    # Random weights were trained on nothing: their empty record is complete.
    if place == "random":
        return seen_questions.Record()
    with setup_errors(f"{seen_questions.SEEN} beside {place}"):
        record = seen_questions.read_record(place) or seen_questions.Record(complete=False)
    if not record.complete:
        hosts.print_once(f"{_describe_gap(str(place), record)}; it may include questions measured here")
    return record


def describe_overlap(known: str, records: Mapping[str, seen_questions.Record]) -> str:
    """Write the note under a table on the overlap with training data.

    Args:
      known: the text on the known overlap; left out if no model has a record.
      records: reward model's name -> its record; the note names those that are missing or incomplete.
    """
    any_known = any(record.complete or record.fingerprints for record in records.values())
    gaps = [_describe_gap(name, record) for name, record in records.items() if not record.complete]
    return "; ".join([known, *gaps] if any_known else gaps)


def _describe_gap(name: str, record: seen_questions.Record) -> str:
    """Describe a record that is missing or incomplete."""
    more = " else" if record.fingerprints else ""
    return (
        f"what{more} {name} was trained on is unknown: there is no complete {seen_questions.SEEN} beside it"
    )


def list_reward_settings(cfg: ConfigDict, chosen: ChosenModels) -> dict[str, Any]:
    """List the settings that decide a reward model's scores, as flat names -> values."""
    return chosen.settings("reward") | {"reward.max_tokens": cfg.reward.max_tokens}


def _judge_and_report(
    cfg: ConfigDict,
    settings: BenchmarkConfig,
    chosen: ChosenModels,
    loaded: Sequence[Benchmark],
    sampler: benchmarks.Sampler,
    outcome_settings: dict[str, Any],
    out: Path,
    record: seen_questions.Record | None,
) -> None:
    """Judge the sampler's responses, a chunk at a time, and write the results.

    Args:
      cfg: the whole config.
      settings: its section `benchmark`.
      chosen: the source of the reward model.
      loaded: the benchmarks.
      sampler: of the responses.
      outcome_settings: settings that decide the responses; those that decide the judgements are added here.
      out: the folder of the results.
      record: of the questions in the reward model's training data; None if they do not matter.
    """
    # The chunk size is among them, since the ledger is read in chunks.
    outcome_settings |= {f"benchmark.{b.name}": f"{len(b.problems)} problems, {b.digest()}" for b in loaded}
    outcome_settings |= {"benchmark.judged_by": settings.judged_by, "benchmark.chunk": settings.chunk}
    if settings.by_model:
        outcome_settings |= list_reward_settings(cfg, chosen)

    # A row per response; all processes know the same list of chunks.
    work = list(benchmark_sets.split_chunks(loaded, settings.chunk))
    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            sizes = [len(places) * sampler.samples for _, places in work]
            ledger = stack.enter_context(Ledger(out, outcome_settings, sizes))

        # Judges are loaded only if there is work for them: a finished evaluation is only reported again.
        if ledger.done < len(work):
            rule = stack.enter_context(open_rule_verifier(cfg)) if settings.by_rule else None
            reward = None
            if settings.by_model:
                layout = device_layouts.make_layouts(cfg)["reward"]
                reward = RewardModel(cfg, layout, *chosen.load("reward", layout), chosen.read_calibration())
                # A reference that does not fit would otherwise fail in the middle of the work.
                for benchmark in loaded:
                    reward.check([problem.reference for problem in benchmark.problems])
            with report_interruption(ledger, len(work)):
                benchmarks.run_benchmarks(
                    loaded, sampler, rule, reward, ledger, settings.chunk, hosts.print_once
                )

        # Only the first process has the rows.
        if hosts.is_primary():
            _write_report(cfg.seed, settings, loaded, sampler.samples, work, ledger, outcome_settings, record)


def _write_report(
    seed: int,
    settings: BenchmarkConfig,
    loaded: Sequence[Benchmark],
    samples: int,
    work: Sequence[tuple[Benchmark, range]],
    ledger: Ledger,
    outcome_settings: Mapping[str, Any],
    record: seen_questions.Record | None,
) -> None:
    """Compute the figures of all rows and write them.

    Args:
      seed: of the bootstrap.
      samples: per problem.
      work: all chunks, in the order of the ledger.
    """
    # Sort rows and seconds by benchmark.
    rows: dict[str, list[Row]] = {b.name: [] for b in loaded}
    for row in ledger.rows:
        rows[row["benchmark"]].append(row)
    seconds = dict.fromkeys(rows, 0.0)
    for (benchmark, _), chunk_seconds in zip(work, ledger.seconds, strict=True):
        seconds[benchmark.name] += chunk_seconds

    resamples = settings.bootstrap
    summaries = [
        benchmark_summaries.summarise_benchmark(b, rows[b.name], samples, seconds[b.name], seed, resamples)
        for b in loaded
    ]
    means = benchmark_summaries.average_benchmarks(summaries, rows, seed, resamples)
    text = benchmark_summaries.format_summary(summaries, means)

    results: dict[str, Any] = {"benchmarks": summaries, "mean": means, "reward_model_saw": None}
    if record is not None:
        text += f"\n\n{_describe_training_data(loaded, record)}"
        results |= {"reward_model_saw": dict(record.sources), "record_complete": record.complete}
    write_results(ledger, outcome_settings, results, text)


def _describe_training_data(loaded: Sequence[Benchmark], record: seen_questions.Record) -> str:
    """Describe the reward model's training questions, and count those that are in the benchmarks."""
    sources = ", ".join(f"{n} questions of {name}" for name, n in record.sources.items())
    overlaps = []
    for b in loaded:
        excluded = f" ({b.excluded} left out)" if b.seen else ""
        overlaps.append(f"{b.seen} of {b.asked} in {b.name}{excluded}")
    known = (
        f"the reward model was trained on {sources or 'no known question'}; among them are "
        f"{', '.join(overlaps)}"
    )
    return describe_overlap(known, {"the reward model": record})


def read_benchmark_config(cfg: ConfigDict) -> BenchmarkConfig:
    """Read the section `benchmark`, and check the other settings that evaluations use.

    The cross checks of training (settings/cross_checks.py) do not apply: they require data and models that an
    evaluation does not use.

    Raises SetupError with every setting that is out of its range.
    """
    errors = ErrorCollector()
    with errors.collect("benchmark"):
        settings = BenchmarkConfig.from_config(cfg.benchmark)

    # Fields with a fixed set of values: field -> (its value, the allowed ones).
    choices = {
        "policy.dtype": (cfg.policy.dtype, ("float32", "bfloat16")),
        "reward.dtype": (cfg.reward.dtype, ("float32", "bfloat16")),
        "rollout.kernels": (cfg.rollout.kernels, ("auto", "xla")),
        "rollout.weight_placement": (cfg.rollout.weight_placement, ("auto", "gathered", "sharded")),
    }
    for field, (value, allowed) in choices.items():
        errors.require(value in allowed, f"{field}={value!r}: it is one of {', '.join(allowed)}")

    # Numbers with a lower bound.
    for field, value in (("reward.microbatch", cfg.reward.microbatch), ("data.bucket", cfg.data.bucket)):
        errors.require(value >= 1, f"{field}={value}: it must be at least 1")
    errors.raise_if_any()
    return settings


def _describe_job(
    cfg: ConfigDict,
    settings: BenchmarkConfig,
    chosen: ChosenModels,
    model: loading.Model,
    loaded: Sequence[Benchmark],
) -> str:
    """Describe the job in one line, which is printed before sampling."""
    source = f"{chosen.run_dir}, step {chosen.step}" if chosen.run_dir else cfg.policy.weights
    config = model.config
    return (
        f"{source}: {config.family} of {config.layers} layers x {config.width}, "
        f"{sum(len(b.problems) for b in loaded)} problems of {', '.join(b.name for b in loaded)}, "
        f"{settings.samples} samples each, temperature {settings.temperature}, top-p {settings.top_p}, "
        f"judged by {settings.judged_by}"
    )
