"""Hybrid annotation (arXiv 2508.05613, the reward model's data): completions labelled where two judges agree.

1. `items.list_items`: the problems and the completions that there are become a plan, a list of items with stable ids.
2. The source writes what is to be sampled; completions from files are taken as they are.
3. What stands there twice (the same question, reference and completion but for white space) is left out from here
   on.
4. The rule verifier and, beside it, the LLM judge label each completion, neither knowing of the other.
5. `outcome.settle_outcome`: rows on which both decided and agree are labelled, the rest is disputed; classes are balanced.

Everything that was asked is in the ledger (ledger.py) as soon as it is answered; what is written at the end
(labelled.jsonl, disputed.jsonl, report.json) is made from the ledger alone.

Departures from the paper: the rule abstains where it cannot show that an answer is wrong (rule/verifier.py), and such
rows are disputed; the judge's prompt is ours.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from cooper_jax.annotation import annotation_ledger as ledgers
from cooper_jax.annotation import items as plans
from cooper_jax.annotation import outcome
from cooper_jax.annotation.annotation_ledger import Ledger, Row
from cooper_jax.annotation.items import Item
from cooper_jax.annotation.querying import Answer, Progress, Stage
from cooper_jax.llm import judge as judges
from cooper_jax.llm import local_chat
from cooper_jax.llm.chat import Failure
from cooper_jax.rule.verifier import PendingVerdicts, RuleConfig, RuleVerifier
from cooper_jax.runtime import device_layouts, hosts
from cooper_jax.settings.setup_errors import Problems, setup_errors

COPIED = 1000  # rows of a completions file that are taken into the ledger at once


def annotate_completions(
    cfg: ConfigDict, problems: Sequence[str], completions: Sequence[str], out: str
) -> None:
    """Annotate problem sets and files of completions into the folder `out`, or go on with it.

    Raises SetupError for settings, files and servers that cannot be used, and hosts.Stopped after a SIGTERM.
    """
    check_annotation_settings(cfg)
    plan = plans.list_items(cfg, problems, completions)
    sampled = any(item.completion is None for item in plan.items)
    settings = ledgers.outcome_settings(cfg, plan.files, sampled)
    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            ledger = stack.enter_context(Ledger(out, settings))
        hosts.print_once(
            f"{len(plan.items)} completions to annotate, of {len(problems)} problem sets and "
            f"{len(completions)} files of completions, into {ledger.folder}"
        )
        _complete(cfg, plan, ledger)
        unique = outcome.drop_repeats(plan.items, ledger.completions.rows)
        _judge(cfg, unique, ledger)
        found = outcome.settle_outcome(cfg, plan, unique, ledger)
        ledger.write("disputed.jsonl", found.disputed)
        ledger.write("labelled.jsonl", found.labelled)
        ledger.write("report.json", found.report)
        hosts.print_once(outcome.format_report(found.report))
        hosts.print_once(f"{len(found.labelled)} labelled rows: {ledger.folder / 'labelled.jsonl'}")


def check_annotation_settings(cfg: ConfigDict) -> None:
    """Raise SetupError with every setting that is out of its range or contradicts another."""
    a, problems = cfg.annotate, Problems()
    for name, least in (("problems", 0), ("samples", 1), ("batch", 1)):
        problems.need(a[name] >= least, f"annotate.{name}={a[name]}: it must be at least {least}")
    problems.need(
        a.balance in outcome.BALANCES,
        f"annotate.balance={a.balance!r}: it is one of {', '.join(outcome.BALANCES)}",
    )
    problems.need(
        a.max_ratio >= 1, f"annotate.max_ratio={a.max_ratio}: it must be at least 1 (as many of each class)"
    )
    problems.need(
        jax.process_count() == 1,
        f"annotation runs in one process, and this is one of {jax.process_count()}: start it on one host, or "
        "several with a part of the problems and an --out each",
    )
    problems.raise_if_any()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def model_name(section: ConfigDict) -> str:
    """What rows call a model that was asked."""
    if section.kind == "openai":
        return section.model
    return section.weights + (f" (first {section.num_layers} layers)" if section.num_layers else "")


def sampling_settings(section: ConfigDict) -> Row:
    return {name: section[name] for name in ("temperature", "top_p", "max_new_tokens", "thinking")}


# --- 2. completions ------------------------------------------------------------------------------------------


def _complete(cfg: ConfigDict, plan: plans.AnnotationPlan, ledger: Ledger) -> None:
    log = ledger.completions
    if cfg.annotate.ask_again:
        log.forget_failures()
    given = [i for i in plan.items if i.completion is not None and i.id not in log.rows]
    for start in range(0, len(given), COPIED):
        log.append([_given(item) for item in given[start : start + COPIED]])
    wanted = [item for item in plan.items if item.completion is None]
    left = sum(item.id not in log.rows for item in wanted)
    if not left:
        return
    # The judge follows when all completions are there: hours may have gone by.
    for name in ("source", "judge"):
        local_chat.read_chat_config(cfg, name)
    common = {"model": model_name(cfg.source), "sampling": sampling_settings(cfg.source), "seed": cfg.seed}

    def keep(answers: Sequence[Answer]) -> None:
        log.append([_completed(item, reply, common) for item, reply in answers])

    with _asked(cfg, "source", ledger.folder) as chat, _progress("completions", wanted, left) as bar:
        stage = Stage(
            chat,
            "source",
            cfg.seed,
            cfg.annotate.batch,
            lambda item: [("user", item.question + cfg.data.instruction)],
            keep,
        )
        stage.run(wanted, log.rows, bar)


def _given(item: Item) -> Row:
    """A completion of a file."""
    label = {} if item.label is None else {"given_label": item.label}
    return _head(item) | {"completion": item.completion, "model": item.model, **label}


def _completed(item: Item, reply, common: Row) -> Row:
    row = _head(item) | {"sample": item.sample}
    if isinstance(reply, Failure):
        return row | {"failure": reply.reason, **common, "completed": _now()}
    text = {"completion": reply.text, "truncated": reply.truncated, "tokens": reply.tokens}
    return row | text | common | {"completed": _now()}


def _head(item: Item) -> Row:
    return {
        "id": item.id,
        "source": item.source,
        "problem": item.problem,
        "question": item.question,
        "reference_answer": item.reference,
    }


# --- 4. verdicts ---------------------------------------------------------------------------------------------


def _judge(cfg: ConfigDict, items: Sequence[Item], ledger: Ledger) -> None:
    log, texts = ledger.verdicts, ledger.completions.rows
    if cfg.annotate.ask_again:
        log.forget_failures()
    left = sum(item.id not in log.rows for item in items)
    if not left:
        return
    common = {"judge_model": model_name(cfg.judge), "versions": ledgers.verdict_versions()}
    pending: dict[str, PendingVerdicts] = {}
    with _asked(cfg, "judge", ledger.folder) as chat, _rule(cfg) as rule:

        def talk(item: Item):
            text = texts[item.id]["completion"]
            # The rule works on it while the judge does.
            if item.id not in log.rows:
                pending[item.id] = rule.submit([(item.reference, text)])
            return judges.make_triple_messages(item.triple(text))

        def keep(answers: Sequence[Answer]) -> None:
            rows = []
            for item, reply in answers:
                (verdict,) = pending.pop(item.id).result()
                judged = judges.parse_judgement_reply(reply)
                row = {"id": item.id, "rule": str(verdict), "judge": judged.correct}
                row |= {"judge_reply": judged.reply}
                if judged.reason:
                    row |= {"judge_reason": judged.reason}
                if isinstance(reply, Failure):
                    row |= {"failure": reply.reason}
                rows.append(row | common | {"judged": _now()})
            log.append(rows)

        with _progress("verdicts", items, left) as bar:
            Stage(chat, "judge", cfg.seed, cfg.annotate.batch, talk, keep).run(items, log.rows, bar)


@contextlib.contextmanager
def _progress(what: str, items: Sequence[Item], left: int):
    bar = Progress(what, len(items), len(items) - left)
    try:
        yield bar
    finally:
        bar.close()


@contextlib.contextmanager
def _asked(cfg: ConfigDict, name: str, folder: Path):
    chat = local_chat.open_chat(cfg, name, device_layouts.make_layouts(cfg)["policy"], folder)
    try:
        yield chat
    finally:
        chat.close()


@contextlib.contextmanager
def _rule(cfg: ConfigDict):
    with setup_errors("rule"):
        rule = RuleVerifier(RuleConfig.from_config(cfg.rule))
    with rule:
        with setup_errors("rule"):
            rule.check_ready()
        yield rule
