"""The evaluations as launch/evaluate.py starts them: settings checked, models and judges loaded, results written.

benchmarks  a policy's samples         rejudge  those of an items file, by other judges
labelled    judges of labelled rows    attacked  reward models under known hacks
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cooper_jax.data import seen_questions
from cooper_jax.evaluation import benchmark_sets, benchmark_summaries
from cooper_jax.evaluation import benchmarks as sampling
from cooper_jax.evaluation.evaluated_models import ChosenModels, RewardModel
from cooper_jax.evaluation.evaluation_ledger import RESULTS, Ledger, Row
from cooper_jax.evaluation.text_tables import to_plain
from cooper_jax.model import loading
from cooper_jax.reward.multihost import SharedRule, share_over_hosts
from cooper_jax.rule.verifier import RuleConfig, RuleVerifier
from cooper_jax.runtime import device_layouts, hosts, remote_files
from cooper_jax.settings.setup_errors import Problems, SetupError, setup_errors

JUDGED_BY = {"rule": (True, False), "model": (False, True), "both": (True, True)}  # rule, reward model


def evaluate_benchmarks(cfg: ConfigDict, chosen: ChosenModels, places: Sequence[str], out: Path) -> None:
    """Sample, judge, report.  Raises SetupError, and hosts.Stopped after a SIGTERM."""
    by_rule, by_model = _judges(cfg)
    found = benchmark_sets.find_benchmarks(places)
    layouts = device_layouts.make_layouts(cfg)
    model, params = chosen.load("policy", layouts["policy"])
    lengths = {f"benchmark.{name}": cfg.benchmark[name] for name in ("max_prompt_tokens", "max_new_tokens")}
    loading.check_length(model.config, "policy", lengths)
    # A run's policy was paid by its reward model: what that saw is no clean benchmark, whoever judges.
    paid = chosen.run_dir is not None and cfg.reward.arm != "rule"
    record = seen_by_reward_model(chosen) if by_model or paid else None
    with setup_errors("data.chat"):
        asked = benchmark_sets.load_benchmarks(
            cfg, found, model.tokenizer, record.fingerprints if record else frozenset()
        )
    sampler = sampling.PolicySampler(cfg, layouts["policy"], model, params)
    r, d, b = cfg.rollout, cfg.data, cfg.benchmark
    settings = chosen.settings("policy") | {
        "seed": cfg.seed,
        "data.instruction": d.instruction,
        "data.chat": d.chat,
        "rollout.dtype": r.dtype,
        "rollout.kv_dtype": r.kv_dtype,
        "benchmark.samples": b.samples,
        "benchmark.temperature": b.temperature,
        "benchmark.top_p": b.top_p,
        "benchmark.max_new_tokens": b.max_new_tokens,
        "benchmark.max_prompt_tokens": b.max_prompt_tokens,
        "benchmark.problems": b.problems,
    }
    hosts.print_once(_describe(cfg, chosen, model, asked))
    _run(cfg, chosen, asked, sampler, settings, by_rule, by_model, layouts, out, record)


def rejudge_items(cfg: ConfigDict, chosen: ChosenModels, items: str, out: Path) -> None:
    """The responses of an items file, judged by what `benchmark.judged_by` says; nothing is sampled."""
    by_rule, by_model = _judges(cfg)
    with setup_errors(f"--rejudge={items}"):
        asked, sampler = sampling.read_recorded(items)
        content = hashlib.sha256(remote_files.fetch_local(items).read_bytes()).hexdigest()[:16]
        record = seen_by_reward_model(chosen) if by_model else None
        if record is not None:
            asked = [
                benchmark_sets.drop_seen_problems(b, record.fingerprints, cfg.benchmark.exclude_seen)
                for b in asked
            ]
    layouts = device_layouts.make_layouts(cfg) if by_model else {}
    _run(cfg, chosen, asked, sampler, {"items": content}, by_rule, by_model, layouts, out, record)


def write_results(ledger: Ledger, settings: dict, found: dict, text: str) -> None:
    ledger.write(RESULTS, to_plain({"settings": settings, **found}))
    ledger.write("table.txt", text)
    hosts.print_once(f"\n{text}\n\n{ledger.folder}: {RESULTS}, table.txt and items.jsonl are there")


@contextlib.contextmanager
def progress_printer(ledger: Ledger, chunks: int) -> Iterator[None]:
    try:
        yield
    except hosts.Stopped:
        hosts.print_once(
            f"stopped by a signal: {ledger.done} of {chunks} chunks are in {ledger.folder}; the same command "
            "goes on"
        )
        raise


def seen_by_reward_model(chosen: ChosenModels) -> seen_questions.Record:
    """What the reward model was trained on, as far as the record beside it says.  Raises SetupError."""
    place = chosen.run_dir or chosen.cfg.reward.weights
    if place == "random":
        return seen_questions.Record()
    with setup_errors(f"{seen_questions.SEEN} beside {place}"):
        found = seen_questions.read_record(place) or seen_questions.Record(complete=False)
    if not found.complete:
        hosts.print_once(f"{_unknown(str(place), found)}; what is measured may be among it")
    return found


def overlap_note(known: str, records: Mapping[str, seen_questions.Record]) -> str:
    """What stands under a table on what reward models saw; records: of each model, by what it is called.

    known: of how many questions it is known; not said where no model has a record.  Of each record that is missing
    or incomplete it is said that the rest is unknown.
    """
    some = any(r.complete or r.fingerprints for r in records.values())
    unknown = [_unknown(name, r) for name, r in records.items() if not r.complete]
    return "; ".join([known, *unknown] if some else unknown)


def _unknown(name: str, record: seen_questions.Record) -> str:
    more = " else" if record.fingerprints else ""
    return f"what{more} {name} was trained on is unknown: no whole {seen_questions.SEEN} lies beside it"


@contextlib.contextmanager
def open_rule_verifier(cfg: ConfigDict) -> Iterator[RuleVerifier | SharedRule]:
    """The rule's workers, on each host for its part; they end on exit."""
    with setup_errors("rule"):
        rule = RuleVerifier(RuleConfig.from_config(cfg.rule))
    with rule:
        with setup_errors("rule"):
            rule.check_ready()
        yield share_over_hosts(rule, None, jax.process_count())[0]


def reward_settings(cfg: ConfigDict, chosen: ChosenModels) -> dict[str, Any]:
    """What decides a reward model's scores."""
    return chosen.settings("reward") | {"reward.max_tokens": cfg.reward.max_tokens}


def _run(cfg, chosen, asked, sampler, settings, by_rule, by_model, layouts, out, record) -> None:
    """Judge what the sampler gives, a chunk at a time, and write the results."""
    b = cfg.benchmark
    settings |= {f"benchmark.{x.name}": f"{len(x.problems)} problems, {x.digest()}" for x in asked}
    settings |= {"benchmark.judged_by": b.judged_by, "benchmark.chunk": b.chunk}
    if by_model:
        settings |= reward_settings(cfg, chosen)
    work = list(benchmark_sets.cut_chunks(asked, b.chunk))
    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            sizes = [len(places) * sampler.samples for _, places in work]
            ledger = stack.enter_context(Ledger(out, settings, sizes))
        if ledger.done < len(work):
            rule = stack.enter_context(open_rule_verifier(cfg)) if by_rule else None
            reward = None
            if by_model:
                layout = layouts["reward"]
                reward = RewardModel(cfg, layout, *chosen.load("reward", layout))
                reward.check([p.reference for x in asked for p in x.problems])
            with progress_printer(ledger, len(work)):
                sampling.run_benchmarks(asked, sampler, rule, reward, ledger, b.chunk, hosts.print_once)
        if hosts.is_primary():
            _report(cfg, asked, sampler.samples, work, ledger, settings, record)


def _report(cfg, asked, samples, work, ledger: Ledger, settings, record) -> None:
    seed, resamples = cfg.seed, cfg.benchmark.bootstrap
    by_name: dict[str, list[Row]] = {x.name: [] for x in asked}
    for row in ledger.rows:
        by_name[row["benchmark"]].append(row)
    spent = dict.fromkeys(by_name, 0.0)
    for (x, _), seconds in zip(work, ledger.seconds, strict=True):
        spent[x.name] += seconds
    results = [
        benchmark_summaries.summarise_benchmark(x, by_name[x.name], samples, spent[x.name], seed, resamples)
        for x in asked
    ]
    means = benchmark_summaries.average_benchmarks(results, by_name, seed, resamples)
    text = benchmark_summaries.format_summary(results, means)
    found: dict[str, Any] = {"benchmarks": results, "mean": means, "reward_model_saw": None}
    if record is not None:
        text += f"\n\n{_overlap(asked, record)}"
        found |= {"reward_model_saw": dict(record.sources), "record_complete": record.complete}
    write_results(ledger, settings, found, text)


def _overlap(asked: Sequence[benchmark_sets.Benchmark], record: seen_questions.Record) -> str:
    """What the reward model was trained on, against what it judges here."""
    saw = ", ".join(f"{n} questions of {name}" for name, n in record.sources.items()) or "no known question"
    found = (
        f"{x.seen} of {x.asked} in {x.name}" + (f" ({x.excluded} left out)" if x.seen else "") for x in asked
    )
    known = f"the reward model was trained on {saw}; among them are {', '.join(found)}"
    return overlap_note(known, {"the reward model": record})


def _judges(cfg: ConfigDict) -> tuple[bool, bool]:
    """(by the rule, by the reward model).  Raises SetupError for settings that mean nothing."""
    b = cfg.benchmark
    if b.judged_by not in JUDGED_BY:
        raise SetupError(f"benchmark.judged_by={b.judged_by!r}: it is one of {', '.join(JUDGED_BY)}")
    check_settings(cfg)
    return JUDGED_BY[b.judged_by]


def check_settings(cfg: ConfigDict) -> None:
    """Raise SetupError with every setting that is out of its range, of those that evaluations use.

    cross_checks.py is for training, and asks for data and models that nobody needs here.
    """
    least = {
        "samples": 1,
        "max_new_tokens": 1,
        "max_prompt_tokens": 1,
        "chunk": 1,
        "bootstrap": 1,
        "problems": 0,
    }
    problems = Problems()
    for field, lowest in least.items():
        value = cfg.benchmark[field]
        problems.need(value >= lowest, f"benchmark.{field}={value}: it must be at least {lowest}")
    one_of = {
        "policy.dtype": (cfg.policy.dtype, ("float32", "bfloat16")),
        "reward.dtype": (cfg.reward.dtype, ("float32", "bfloat16")),
        "rollout.kernels": (cfg.rollout.kernels, ("auto", "xla")),
        "rollout.weight_placement": (cfg.rollout.weight_placement, ("auto", "gathered", "sharded")),
    }
    for field, (value, choices) in one_of.items():
        problems.need(value in choices, f"{field}={value!r}: it is one of {', '.join(choices)}")
    for field, value in (("reward.microbatch", cfg.reward.microbatch), ("data.bucket", cfg.data.bucket)):
        problems.need(value >= 1, f"{field}={value}: it must be at least 1")
    problems.raise_if_any()


def _describe(
    cfg: ConfigDict, chosen: ChosenModels, model: loading.Model, asked: Sequence[benchmark_sets.Benchmark]
) -> str:
    source = f"{chosen.run_dir}, step {chosen.step}" if chosen.run_dir else cfg.policy.weights
    b, config = cfg.benchmark, model.config
    return (
        f"{source}: {config.family} of {config.layers} layers x {config.width}, "
        f"{sum(len(x.problems) for x in asked)} problems of {', '.join(x.name for x in asked)}, "
        f"{b.samples} samples each, temperature {b.temperature}, top-p {b.top_p}, judged by {b.judged_by}"
    )
