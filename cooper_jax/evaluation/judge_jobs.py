"""The job of launch/evaluate.py that compares judges on labelled completions."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.data import seen_questions
from cooper_jax.data.labelled_completions import load_labelled_completions
from cooper_jax.evaluation import (
    benchmark_jobs,
    blended_judge,
    judge_comparison,
    judges,
    published_benchmarks,
)
from cooper_jax.evaluation.benchmark_sets import BenchmarkConfig
from cooper_jax.evaluation.evaluated_models import ChosenModels, RewardModel
from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.llm import local_chat
from cooper_jax.reward import multihost
from cooper_jax.rule.worker_process import Item as RuleItem
from cooper_jax.runtime import device_layouts, hosts
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Triple


def compare_judges(
    cfg: ConfigDict,
    chosen: ChosenModels,
    path: str,
    out: Path,
    *,
    names: Sequence[str],
    references: str = "own",
    prior_from: str = "",
    blend_from: str = "",
) -> None:
    """Compare judges on labelled completions.

    Args:
      cfg: the whole config.
      chosen: the source of the reward model.
      path: the file of labelled completions.
      out: the folder of the results.
      names: some of judges.NAMES; the first judge is compared with each of the others.
      references: one of judge_comparison.REFERENCES.
      prior_from: labelled completions for the judge `prior`.
      blend_from: the items.jsonl of another comparison, for the judge `blend`; "": it is cross-fitted.

    Raises SetupError, and hosts.Stopped after SIGTERM.
    """
    # 1. The rows.
    settings = benchmark_jobs.read_benchmark_config(cfg)
    needed = judges.list_needed(names)
    record = benchmark_jobs.read_seen_questions(chosen) if "model" in needed else None
    with setup_errors(f"--labelled={path}"):
        rows = judge_comparison.LabelledRows.load(
            path,
            references=references,
            seen=record.fingerprints if record else frozenset(),
            exclude=settings.exclude_seen,
            count=settings.problems,
            seed=cfg.seed,
        )

    # 2. Settings that decide the opinions: a later start with other values must not continue this ledger.
    outcome_settings: dict[str, Any] = {
        "labelled": f"{len(rows.triples)} rows, {digest_rows(rows.triples)}",
        "judges": list(names),
        "references": references,
        "benchmark.chunk": settings.chunk,
        "seed": cfg.seed,
    }
    prior_triples: list[Triple] = []
    if "prior" in names:
        if not prior_from:
            raise SetupError("--judge=prior needs --prior_from=FILE: labelled rows of the same models")
        with setup_errors(f"--prior_from={prior_from}"):
            prior_triples = load_labelled_completions(prior_from)
        outcome_settings["prior_from"] = f"{len(prior_triples)} rows, {digest_rows(prior_triples)}"
    if "model" in needed:
        outcome_settings |= benchmark_jobs.list_reward_settings(cfg, chosen)
    if "llm" in names:
        outcome_settings |= list_judge_settings(cfg.judge)
    # The blend is computed from the ledger's opinions, so what it is fitted to does not decide them.
    known = _read_known_rows(cfg, chosen, names, references, blend_from)

    # 3. Judge, a chunk at a time, and report.
    size = settings.chunk * judge_comparison.CHUNK
    work = judge_comparison.split_rows(len(rows.triples), size)
    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            ledger = stack.enter_context(Ledger(out, outcome_settings, [len(places) for places in work]))
        # Judges are loaded only if there is work for them.
        if ledger.done < len(work):
            asked = judges.list_asked(names)
            opened = _open_judges(cfg, chosen, asked, rows.triples, prior_triples, stack)
            with benchmark_jobs.report_interruption(ledger, len(work)):
                judge_comparison.judge_rows(rows, opened, ledger, size, hosts.print_once)

        # Only the first process has the rows.
        if hosts.is_primary():
            judged = ledger.rows
            blend: dict[str, Any] | None = None
            if "blend" in names:
                with setup_errors("--judge=blend"):
                    judged, fitted = blended_judge.add_blend(judged, names, known)
                blend = {"from": blend_from, "rows": fitted, "left_out": max(0, len(known) - fitted)}
            _write_comparison(
                cfg.seed, settings, rows, references, ledger, judged, outcome_settings, record, blend
            )


def _read_known_rows(
    cfg: ConfigDict, chosen: ChosenModels, names: Sequence[str], references: str, path: str
) -> list[Row]:
    """Read the rows that the judge `blend` is fitted to, on the first process; none if it is cross-fitted.

    path: as `blend_from` of `compare_judges`; the other arguments are those of `compare_judges`, too.

    Raises SetupError for references under which the labels do not hold, and for rows of other settings.
    """
    if "blend" in names and references != "own":
        raise SetupError(
            f"--references={references}: --judge=blend learns from the labels, and they are those of the own "
            "references: leave one of the two out"
        )
    known: list[Row] = []
    if path:
        with setup_errors(f"--blend_from={path}"):
            if "blend" not in names:
                raise ValueError("it belongs to --judge=blend")
            settings = benchmark_jobs.list_reward_settings(cfg, chosen)
            # The file is on the first host, which alone fits; the others wait, in case it cannot be used.
            hosts.on_primary_first(
                "blend rows", lambda: known.extend(blended_judge.read_judged_rows(path, settings))
            )
    return known


def _write_comparison(
    seed: int,
    settings: BenchmarkConfig,
    rows: judge_comparison.LabelledRows,
    references: str,
    ledger: Ledger,
    judged: Sequence[Row],
    outcome_settings: dict[str, Any],
    record: seen_questions.Record | None,
    blend: Mapping[str, Any] | None,
) -> None:
    """Compute the figures of all judges and write them.

    Args:
      seed: of the bootstrap.
      references: one of judge_comparison.REFERENCES.
      judged: the ledger's rows with the opinions of the judges that are compared.
      record: of the questions in the reward model's training data; None if it is not among the judges.
      blend: the rows that the judge `blend` was fitted to: `from` (their file; "": cross-fitted), `rows` and
        `left_out`; None if it is not among the judges.
    """
    summary = judge_comparison.summarise_judges(judged, seed, settings.bootstrap)
    text = judge_comparison.format_judges(summary, references)
    results: dict[str, Any] = {"references": references, "rows": rows.total, "seen": rows.seen}
    if published_benchmarks.has_published_figures(rows.benchmark, references):
        published = published_benchmarks.measure_judges(rows.benchmark, judged, seed, settings.bootstrap)
        results["published_figures"] = published
        text += f"\n\n{published_benchmarks.format_figures(published)}"
    if blend is not None:
        results["blend"] = blend
        text += f"\n\n{_describe_blend(blend)}"

    # A reward model is measured fairly only on questions that it was not trained on.
    if record is not None:
        results["record_complete"] = record.complete
        known = (
            f"{rows.seen} of {rows.total} rows have questions that the reward model is known to have "
            f"seen{format_exclusion(settings, rows.seen)}"
        )
        text += f"\n\n{benchmark_jobs.describe_overlap(known, {'the reward model': record})}"
    benchmark_jobs.write_results(ledger, outcome_settings, results | summary, text)


def _describe_blend(blend: Mapping[str, Any]) -> str:
    """Write the note on the rows that the judge `blend` was fitted to; blend: as for `_write_comparison`."""
    if not blend["from"]:
        return f"blend: cross-fitted by question on these {blend['rows']} rows"
    left_out = f" ({blend['left_out']} more have a measured question: left out)" if blend["left_out"] else ""
    return f"blend: fitted to {blend['rows']} rows of {blend['from']}{left_out}"


def _open_judges(
    cfg: ConfigDict,
    chosen: ChosenModels,
    names: Sequence[str],
    triples: Sequence[Triple],
    prior_triples: Sequence[Triple],
    stack: contextlib.ExitStack,
) -> dict[str, judges.Judge]:
    """Load the judges; returns them by name, in the order of `names`.

    Args:
      names: some of judges.NAMES other than `blend`.
      triples: all triples that will be judged.
      prior_triples: labelled triples for the judge `prior`.
      stack: closes the processes and models of the judges.
    """
    # Judges without a model or processes.
    opened: dict[str, judges.Judge] = {
        "last_number": judges.judge_by_last_number,
        "yes": judges.judge_always_yes,
    }
    if "prior" in names:
        opened["prior"] = judges.make_prior_judge(prior_triples)

    # The rule verifier runs in processes of its own.  Combined judges share its opinions and the reward model's.
    needed = judges.list_needed(names)
    if "rule" in needed:
        rule = stack.enter_context(multihost.open_rule_verifier(cfg))
        opened["rule"] = judges.remember_last_opinions(
            lambda triples, first: judges.make_verdict_opinions(
                rule.check([RuleItem(t.reference, t.completion, t.question) for t in triples])
            )
        )

    # Both the reward model and a local language model need devices; the other judges do not.
    layouts = device_layouts.make_layouts(cfg) if {"model", "llm"} & needed else {}
    if "model" in needed:
        loaded = chosen.load("reward", layouts["reward"])
        reward = RewardModel(cfg, layouts["reward"], *loaded, chosen.read_calibration())
        reward.check([t.reference for t in triples])  # before hours of work, not in the middle of it
        opened["model"] = judges.remember_last_opinions(
            lambda triples, first: judges.make_reward_opinions(reward.rewards(triples))
        )
    if "rule_then_model" in names:
        opened["rule_then_model"] = judges.make_rule_then_model_judge(opened["rule"], opened["model"])
    if "llm" in names:
        chat = local_chat.open_chat(cfg, "judge", layouts["assistant"], chosen.folder)
        stack.callback(chat.close)
        opened["llm"] = judges.make_llm_judge(chat, cfg.seed)
    return {name: opened[name] for name in names}


def list_judge_settings(section: ConfigDict) -> dict[str, Any]:
    """List the settings that decide an LLM judge's verdicts, by dotted names.

    section: the config's `judge`.
    """
    # A server's address and key do not decide its verdicts, but the name of its model does.
    names = ["kind", "temperature", "top_p", "max_new_tokens", "thinking", "tokenizer", "max_prompt_tokens"]
    names += ["weights", "num_layers", "dtype"] if section.kind == "local" else ["model"]
    return {f"judge.{name}": section[name] for name in names}


def format_exclusion(settings: BenchmarkConfig, seen: int) -> str:
    """Write the end of a note on `seen` questions in the training data; "" if there are none."""
    if not seen:
        return ""
    return ": left out" if settings.exclude_seen else ": not left out"


def digest_rows(triples: Sequence[Triple]) -> str:
    """Hash the rows, to detect another file of the same name."""
    # Control characters separate fields and rows, so that moving text between fields changes the hash.
    text = "\0".join(
        f"{t.id}\1{t.question}\1{t.reference}\1{t.completion}\1{t.label}\1{t.model}" for t in triples
    )
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
