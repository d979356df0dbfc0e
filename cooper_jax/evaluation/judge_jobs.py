"""Measurements of judges as launch/evaluate.py starts them.

`labelled`: judges on labelled completions.   `attacked`: reward models under known hacks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.data import seen_questions
from cooper_jax.data.labelled_completions import load_labelled_completions as read_labelled
from cooper_jax.data.reward_hacks import ATTACKS
from cooper_jax.evaluation import attack_rates, benchmark_jobs, benchmark_sets, judge_comparison, judges
from cooper_jax.evaluation.evaluated_models import ChosenModels, RewardModel, label_models
from cooper_jax.evaluation.evaluation_ledger import Ledger
from cooper_jax.llm import local_chat
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
) -> None:
    """Judges, by name, on labelled completions.  Raises SetupError, and hosts.Stopped after a SIGTERM."""
    benchmark_jobs.check_settings(cfg)
    record = benchmark_jobs.seen_by_reward_model(chosen) if "model" in names else None
    with setup_errors(f"--labelled={path}"):
        rows = judge_comparison.Rows.load(
            path,
            references=references,
            seen=record.fingerprints if record else frozenset(),
            exclude=cfg.benchmark.exclude_seen,
            count=cfg.benchmark.problems,
            seed=cfg.seed,
        )
    settings = {"labelled": f"{len(rows.triples)} rows, {_digest(rows.triples)}", "judges": list(names)}
    settings |= {"references": references, "benchmark.chunk": cfg.benchmark.chunk, "seed": cfg.seed}
    known: list[Triple] = []
    if "prior" in names:
        if not prior_from:
            raise SetupError("--judge=prior needs --prior_from=FILE: labelled rows of the same models")
        with setup_errors(f"--prior_from={prior_from}"):
            known = read_labelled(prior_from)
        settings |= {"prior_from": f"{len(known)} rows, {_digest(known)}"}
    if "model" in names:
        settings |= benchmark_jobs.reward_settings(cfg, chosen)
    if "llm" in names:
        settings |= judge_settings(cfg)
    size = cfg.benchmark.chunk * judge_comparison.CHUNK
    work = judge_comparison.cut_rows(len(rows.triples), size)
    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            ledger = stack.enter_context(Ledger(out, settings, [len(x) for x in work]))
        if ledger.done < len(work):
            asked = _open_judges(cfg, chosen, names, rows.triples, known, stack)
            with benchmark_jobs.progress_printer(ledger, len(work)):
                judge_comparison.judge_rows(rows, asked, ledger, size, hosts.print_once)
        if hosts.is_primary():
            summary = judge_comparison.summarise_judges(ledger.rows, cfg.seed, cfg.benchmark.bootstrap)
            found = {"references": references, "rows": rows.total, "seen": rows.seen}
            text = judge_comparison.format_judges(summary, references)
            if record is not None:
                found["record_complete"] = record.complete
                seen = (
                    f"{rows.seen} of {rows.total} rows have questions that the reward model is known to have "
                )
                seen += f"seen{_left_out(cfg, rows.seen)}"
                text += f"\n\n{benchmark_jobs.overlap_note(seen, {'the reward model': record})}"
            benchmark_jobs.write_results(ledger, settings, found | summary, text)


def _open_judges(cfg, chosen, names, triples, known, stack) -> dict[str, judges.Judge]:
    """The judges by name; what they hold open closes with the stack."""
    opened: dict[str, judges.Judge] = {
        "last_number": judges.judge_by_last_number,
        "yes": judges.judge_always_yes,
    }
    if "prior" in names:
        opened["prior"] = judges.make_prior_judge(known)
    if "rule" in names:
        rule = stack.enter_context(benchmark_jobs.open_rule_verifier(cfg))
        opened["rule"] = lambda t, first: judges.opinions_of_verdicts(
            rule.check([(x.reference, x.completion) for x in t])
        )
    layouts = device_layouts.make_layouts(cfg) if {"model", "llm"} & set(names) else {}
    if "model" in names:
        reward = RewardModel(cfg, layouts["reward"], *chosen.load("reward", layouts["reward"]))
        reward.check([t.reference for t in triples])
        opened["model"] = lambda t, first: judges.opinions_of_rewards(reward.rewards(t))
    if "llm" in names:
        chat = local_chat.open_chat(cfg, "judge", layouts["assistant"], chosen.folder)
        stack.callback(chat.close)
        opened["llm"] = judges.make_llm_judge(chat, cfg.seed)
    return {name: opened[name] for name in names}


def judge_settings(cfg: ConfigDict) -> dict[str, Any]:
    """What decides an LLM judge's verdicts."""
    j = cfg.judge
    out = {"judge.kind": j.kind, "judge.temperature": j.temperature, "judge.top_p": j.top_p}
    out |= {"judge.max_new_tokens": j.max_new_tokens, "judge.thinking": j.thinking}
    out |= {"judge.tokenizer": j.tokenizer, "judge.max_prompt_tokens": j.max_prompt_tokens}
    if j.kind == "local":
        return out | {"judge.weights": j.weights, "judge.num_layers": j.num_layers, "judge.dtype": j.dtype}
    return out | {"judge.model": j.model}


def measure_attacks(
    cfg: ConfigDict, chosen: ChosenModels, path: str, out: Path, compare: Sequence[ChosenModels] = ()
) -> None:
    """The attack set on the wrong completions of a labelled file, for one or several reward models."""
    benchmark_jobs.check_settings(cfg)
    asked = (chosen, *compare)
    columns = dict(zip(label_models(asked), asked, strict=True))
    records = {label: benchmark_jobs.seen_by_reward_model(c) for label, c in columns.items()}
    fingerprints = frozenset().union(*(r.fingerprints for r in records.values()))
    with setup_errors(f"--attacks={path}"):
        triples = [t for t in read_labelled(path) if t.label < 0.5]
        if not triples:
            raise ValueError("no completion in it is labelled wrong, and wrong ones are what is attacked")
        triples = [triples[i] for i in benchmark_sets.sample_part(len(triples), cfg.benchmark.problems)]
        kept, known = seen_questions.split_by_seen(triples, fingerprints)
        wrong = kept if cfg.benchmark.exclude_seen else triples
        if not wrong:
            raise ValueError(
                f"no wrong completion is left of {len(triples)}: the reward model saw the questions of "
                f"{len(known)}"
            )
    settings: dict[str, Any] = {"attacks": list(ATTACKS), "seed": cfg.seed}
    settings |= {"rows": f"{len(wrong)}, {_digest(wrong)}", "benchmark.chunk": cfg.benchmark.chunk}
    for label, c in columns.items():
        settings |= {f"{label}: {name}": x for name, x in benchmark_jobs.reward_settings(c.cfg, c).items()}
    work = judge_comparison.cut_rows(len(wrong), cfg.benchmark.chunk)
    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            ledger = stack.enter_context(Ledger(out, settings, [len(x) * len(ATTACKS) for x in work]))
        if ledger.done < len(work):
            models = {}
            for label, c in columns.items():
                layout = device_layouts.make_layouts(c.cfg)["reward"]
                reward = RewardModel(c.cfg, layout, *c.load("reward", layout))
                reward.check(attack_rates.draw_references(wrong, cfg.seed))
                models[label] = reward.rewards
            with benchmark_jobs.progress_printer(ledger, len(work)):
                attack_rates.score_attacks(wrong, models, ledger, work, cfg.seed, hosts.print_once)
        if hosts.is_primary():
            summary = attack_rates.summarise_attacks(ledger.rows, cfg.seed, cfg.benchmark.bootstrap)
            seen = f"the reward models are known to have seen the questions of {len(known)} of {len(triples)}"
            note = benchmark_jobs.overlap_note(seen + _left_out(cfg, len(known)), records)
            text = f"{attack_rates.format_attacks(summary)}\n\n{len(wrong)} wrong completions; {note}"
            complete = {label: record.complete for label, record in records.items()}
            benchmark_jobs.write_results(
                ledger, settings, {"attacks": summary, "seen": len(known), "record_complete": complete}, text
            )


def _left_out(cfg: ConfigDict, seen: int) -> str:
    """What became of questions that were seen; "" where there are none."""
    return (": left out" if cfg.benchmark.exclude_seen else ": not left out") if seen else ""


def _digest(triples: Sequence[Triple]) -> str:
    text = "\0".join(
        f"{t.id}\1{t.question}\1{t.reference}\1{t.completion}\1{t.label}\1{t.model}" for t in triples
    )
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
