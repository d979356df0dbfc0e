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

from cooper_jax import local_chat, placement
from cooper_jax.data import overlap
from cooper_jax.data.attacks import ATTACKS
from cooper_jax.data.labelled import load as read_labelled
from cooper_jax.evaluation import attacks, jobs, judges, sets, verification
from cooper_jax.evaluation.ledger import Ledger
from cooper_jax.evaluation.scoring import Chosen, RewardModel, labels
from cooper_jax.runtime import hosts
from cooper_jax.settings.setup_errors import SetupError, boundary
from cooper_jax.types import Triple


def labelled(
    cfg: ConfigDict,
    chosen: Chosen,
    path: str,
    out: Path,
    *,
    names: Sequence[str],
    references: str = "own",
    prior_from: str = "",
) -> None:
    """Judges, by name, on labelled completions.  Raises SetupError, and hosts.Stopped after a SIGTERM."""
    jobs.check_settings(cfg)
    record = jobs.seen(chosen) if "model" in names else None
    with boundary(f"--labelled={path}"):
        rows = verification.Rows.load(
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
        with boundary(f"--prior_from={prior_from}"):
            known = read_labelled(prior_from)
        settings |= {"prior_from": f"{len(known)} rows, {_digest(known)}"}
    if "model" in names:
        settings |= jobs.reward_settings(cfg, chosen)
    if "llm" in names:
        settings |= judge_settings(cfg)
    size = cfg.benchmark.chunk * verification.CHUNK
    work = verification.cuts(len(rows.triples), size)
    with contextlib.ExitStack() as stack:
        with boundary("--out"):
            ledger = stack.enter_context(Ledger(out, settings, [len(x) for x in work]))
        if ledger.done < len(work):
            asked = _open_judges(cfg, chosen, names, rows.triples, known, stack)
            with jobs.telling_what_is_left(ledger, len(work)):
                verification.judge(rows, asked, ledger, size, hosts.say)
        if hosts.primary():
            summary = verification.summarise(ledger.rows, cfg.seed, cfg.benchmark.bootstrap)
            found = {"references": references, "rows": rows.total, "seen": rows.seen}
            text = verification.as_text(summary, references)
            if record is not None:
                found["record_complete"] = record.complete
                seen = (
                    f"{rows.seen} of {rows.total} rows have questions that the reward model is known to have "
                )
                seen += f"seen{_left_out(cfg, rows.seen)}"
                text += f"\n\n{jobs.overlap_note(seen, {'the reward model': record})}"
            jobs.write(ledger, settings, found | summary, text)


def _open_judges(cfg, chosen, names, triples, known, stack) -> dict[str, judges.Judge]:
    """The judges by name; what they hold open closes with the stack."""
    opened: dict[str, judges.Judge] = {"last_number": judges.last_numbers, "yes": judges.always_yes}
    if "prior" in names:
        opened["prior"] = judges.prior(known)
    if "rule" in names:
        rule = stack.enter_context(jobs.rule_verifier(cfg))
        opened["rule"] = lambda t, first: judges.of_verdicts(
            rule.check([(x.reference, x.completion) for x in t])
        )
    layouts = placement.make_layouts(cfg) if {"model", "llm"} & set(names) else {}
    if "model" in names:
        reward = RewardModel(cfg, layouts["reward"], *chosen.load("reward", layouts["reward"]))
        reward.check([t.reference for t in triples])
        opened["model"] = lambda t, first: judges.of_rewards(reward.rewards(t))
    if "llm" in names:
        chat = local_chat.open_chat(cfg, "judge", layouts["assistant"], chosen.folder)
        stack.callback(chat.close)
        opened["llm"] = judges.language_model(chat, cfg.seed)
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


def attacked(cfg: ConfigDict, chosen: Chosen, path: str, out: Path, compare: Sequence[Chosen] = ()) -> None:
    """The attack set on the wrong completions of a labelled file, for one or several reward models."""
    jobs.check_settings(cfg)
    asked = (chosen, *compare)
    columns = dict(zip(labels(asked), asked, strict=True))
    records = {label: jobs.seen(c) for label, c in columns.items()}
    fingerprints = frozenset().union(*(r.fingerprints for r in records.values()))
    with boundary(f"--attacks={path}"):
        triples = [t for t in read_labelled(path) if t.label < 0.5]
        if not triples:
            raise ValueError("no completion in it is labelled wrong, and wrong ones are what is attacked")
        triples = [triples[i] for i in sets.part(len(triples), cfg.benchmark.problems)]
        kept, known = overlap.split(triples, fingerprints)
        wrong = kept if cfg.benchmark.exclude_seen else triples
        if not wrong:
            raise ValueError(
                f"no wrong completion is left of {len(triples)}: the reward model saw the questions of "
                f"{len(known)}"
            )
    settings: dict[str, Any] = {"attacks": list(ATTACKS), "seed": cfg.seed}
    settings |= {"rows": f"{len(wrong)}, {_digest(wrong)}", "benchmark.chunk": cfg.benchmark.chunk}
    for label, c in columns.items():
        settings |= {f"{label}: {name}": x for name, x in jobs.reward_settings(c.cfg, c).items()}
    work = verification.cuts(len(wrong), cfg.benchmark.chunk)
    with contextlib.ExitStack() as stack:
        with boundary("--out"):
            ledger = stack.enter_context(Ledger(out, settings, [len(x) * len(ATTACKS) for x in work]))
        if ledger.done < len(work):
            models = {}
            for label, c in columns.items():
                layout = placement.make_layouts(c.cfg)["reward"]
                reward = RewardModel(c.cfg, layout, *c.load("reward", layout))
                reward.check(attacks.references(wrong, cfg.seed))
                models[label] = reward.rewards
            with jobs.telling_what_is_left(ledger, len(work)):
                attacks.score(wrong, models, ledger, work, cfg.seed, hosts.say)
        if hosts.primary():
            summary = attacks.summarise(ledger.rows, cfg.seed, cfg.benchmark.bootstrap)
            seen = f"the reward models are known to have seen the questions of {len(known)} of {len(triples)}"
            note = jobs.overlap_note(seen + _left_out(cfg, len(known)), records)
            text = f"{attacks.as_text(summary)}\n\n{len(wrong)} wrong completions; {note}"
            complete = {label: record.complete for label, record in records.items()}
            jobs.write(
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
