"""Hybrid annotation (arXiv 2508.05613, the reward model's data): completions labelled where two judges agree.

1. `items.list_items` makes a plan of the problems and of the existing completions: items with stable ids.
2. The source model samples completions of the problems; existing completions are copied.
3. `outcome.drop_repeats` drops items that repeat another's question, reference and completion.
4. The rule verifier and, at the same time, the LLM judge label each completion independently.
5. `outcome.settle_outcome` labels the rows on which both decided and agree, and balances the classes; the
   other rows are disputed.

Every answer is in the ledger (annotation_ledger.py) as soon as it arrives; the files written at the end
(labelled.jsonl, disputed.jsonl, report.json) are computed from the ledger alone.

Departures from the paper: the rule abstains if it cannot show that an answer is wrong (rule/verifier.py),
and such rows are disputed; the judge's prompt is ours.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from cooper_jax.annotation import annotation_ledger as ledgers
from cooper_jax.annotation import items as plans
from cooper_jax.annotation import outcome
from cooper_jax.annotation.annotation_ledger import Ledger, Row
from cooper_jax.annotation.items import AnnotateConfig, Item
from cooper_jax.annotation.querying import Answer, Progress, Stage
from cooper_jax.data.policy_prompts import PromptStyle, make_policy_messages
from cooper_jax.llm import judge as judges
from cooper_jax.llm import local_chat
from cooper_jax.llm.chat import Chat, Failure, Messages, Reply
from cooper_jax.rule.verifier import PendingVerdicts, RuleConfig, RuleVerifier
from cooper_jax.rule.worker_process import Item as RuleItem
from cooper_jax.runtime import device_layouts, hosts
from cooper_jax.settings.setup_errors import ErrorCollector, setup_errors

COPIED_ROWS = 1000  # rows of a completions file that are appended to the ledger at once


def annotate_completions(
    cfg: ConfigDict, problems: Sequence[str], completions: Sequence[str], out: str
) -> None:
    """Annotate problem sets and files of completions into the folder `out`, or resume there.

    Args:
      cfg: the whole config.
      problems: problem sets; the source model writes completions of them.
      completions: files of existing completions.
      out: a local folder.

    Raises SetupError for settings, files and servers that cannot be used, and hosts.Stopped after SIGTERM.
    """
    # The plan is a function of the files and settings alone, so a later start has the same items.
    settings = read_annotate_config(cfg)
    plan = plans.list_items(cfg, settings, problems, completions)
    sampled = any(item.completion is None for item in plan.items)
    outcome_settings = ledgers.list_outcome_settings(cfg, settings, plan.files, sampled)

    with contextlib.ExitStack() as stack:
        with setup_errors("--out"):
            ledger = stack.enter_context(Ledger(out, outcome_settings))
        hosts.print_once(
            f"{len(plan.items)} completions to annotate, of {len(problems)} problem sets and "
            f"{len(completions)} files of completions, into {ledger.folder}"
        )

        # The two models are asked one after the other, so a local one has the devices to itself.
        _collect_completions(cfg, settings, plan, ledger)
        unique = outcome.drop_repeats(plan.items, ledger.completions.rows)
        _collect_verdicts(cfg, settings, unique, ledger)

        # All answers are in the ledger: the outcome is computed from it and can be written again.
        settled = outcome.settle_outcome(settings, cfg.seed, plan, unique, ledger)
        ledger.write("disputed.jsonl", settled.disputed)
        ledger.write("labelled.jsonl", settled.labelled)
        ledger.write("report.json", settled.report)
        hosts.print_once(outcome.format_report(settled.report), always=True)
        hosts.print_once(
            f"{len(settled.labelled)} labelled rows: {ledger.folder / 'labelled.jsonl'}", always=True
        )


def read_annotate_config(cfg: ConfigDict) -> AnnotateConfig:
    """Read the section `annotate`.  Raises SetupError for values out of range, and in a multi-process job."""
    # Both checks are reported together.
    errors = ErrorCollector()
    with errors.collect("annotate"):
        settings = AnnotateConfig.from_config(cfg.annotate)
    errors.require(
        jax.process_count() == 1,
        f"annotation runs in one process, and this is one of {jax.process_count()}: start it on one host, or "
        "on several with a part of the problems and an --out each",
    )
    errors.raise_if_any()
    return settings


def _get_time() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _name_model(section: ConfigDict) -> str:
    """The name of a language model as rows record it.  section: `source` or `judge`."""
    if section.kind == "openai":
        return section.model
    return section.weights + (f" (first {section.num_layers} layers)" if section.num_layers else "")


# --- 2. completions -----------------------------------------------------------------------------------------


def _collect_completions(
    cfg: ConfigDict, settings: AnnotateConfig, plan: plans.AnnotationPlan, ledger: Ledger
) -> None:
    """Copy the existing completions into the ledger, and sample the others."""
    file = ledger.completions
    if settings.ask_again:
        file.forget_failures()

    # Existing completions are copied into the ledger too, so that the outcome needs no other file.
    existing = [i for i in plan.items if i.completion is not None and i.id not in file.rows]
    for start in range(0, len(existing), COPIED_ROWS):
        file.append([_make_existing_row(item) for item in existing[start : start + COPIED_ROWS]])

    to_sample = [item for item in plan.items if item.completion is None]
    remaining = sum(item.id not in file.rows for item in to_sample)
    if not remaining:
        return
    # Check the judge's settings too: the judge is opened only after all completions are sampled, which may
    # take hours.
    for name in ("source", "judge"):
        local_chat.read_chat_config(cfg, name)

    # Every sampled row records how it was sampled.
    source = cfg.source
    sampling = {name: source[name] for name in ("temperature", "top_p", "max_new_tokens", "thinking")}
    common = {"model": _name_model(source), "sampling": sampling, "seed": cfg.seed}

    style = PromptStyle.from_config(cfg.data)

    # The completions are asked for as the policy's are in training.
    def make_messages(item: Item) -> Messages:
        return make_policy_messages(item.question, item.messages, style)

    def keep_answers(answers: Sequence[Answer]) -> None:
        file.append([_make_sampled_row(item, reply, common) for item, reply in answers])

    with (
        _open_chat(cfg, "source", ledger.folder) as chat,
        _show_progress("completions", to_sample, remaining) as bar,
    ):
        stage = Stage(chat, "source", cfg.seed, settings.batch, make_messages, keep_answers)
        stage.run(to_sample, file.rows, bar)


def _make_existing_row(item: Item) -> Row:
    """Make the row of completions.jsonl for a completion from a file."""
    label = {} if item.label is None else {"given_label": item.label}
    return _make_row(item) | {"completion": item.completion, "model": item.model, **label}


def _make_sampled_row(item: Item, reply: Reply, common: Row) -> Row:
    """Make the row of completions.jsonl for a reply of the source.  common: fields that such rows share."""
    row = _make_row(item) | {"sample": item.sample}
    if isinstance(reply, Failure):
        return row | {"failure": reply.reason, **common, "completed": _get_time()}
    text = {"completion": reply.text, "truncated": reply.truncated, "tokens": reply.tokens}
    return row | text | common | {"completed": _get_time()}


def _make_row(item: Item) -> Row:
    """Make the fields that all rows of completions.jsonl share."""
    return {
        "id": item.id,
        "source": item.source,
        "problem": item.problem,
        "question": item.question,
        "reference_answer": item.reference,
    }


# --- 4. verdicts --------------------------------------------------------------------------------------------


def _collect_verdicts(
    cfg: ConfigDict, settings: AnnotateConfig, items: Sequence[Item], ledger: Ledger
) -> None:
    """Ask the rule and the judge about the items that have no verdict yet."""
    file, completions = ledger.verdicts, ledger.completions.rows
    if settings.ask_again:
        file.forget_failures()
    remaining = sum(item.id not in file.rows for item in items)
    if not remaining:
        return

    # Every verdict records the judge and the versions of the rule's software.
    common = {"judge_model": _name_model(cfg.judge), "versions": ledgers.read_versions()}
    pending: dict[str, PendingVerdicts] = {}  # item's id -> the rule's verdict, being computed

    with _open_chat(cfg, "judge", ledger.folder) as chat, _open_rule_verifier(cfg) as rule:

        def make_messages(item: Item) -> Messages:
            text = completions[item.id]["completion"]
            # The rule's processes work while the judge does.  A local judge samples whole batches, which may
            # contain items that have a verdict already.
            if item.id not in file.rows:
                pending[item.id] = rule.submit([RuleItem(item.reference, text, item.question)])
            return judges.make_triple_messages(item.make_triple(text))

        def keep_answers(answers: Sequence[Answer]) -> None:
            rows = []
            for item, reply in answers:
                # A failed request leaves the judge undecided; the rule's verdict is kept with it.
                (verdict,) = pending.pop(item.id).result()
                judgement = judges.parse_judgement_reply(reply)
                row: Row = {"id": item.id, "rule": str(verdict), "judge": judgement.correct}
                row["judge_reply"] = judgement.reply
                if judgement.reason:
                    row["judge_reason"] = judgement.reason
                if isinstance(reply, Failure):
                    row["failure"] = reply.reason
                rows.append(row | common | {"judged": _get_time()})
            file.append(rows)

        # Both the model and the rule verifier are opened before the first item is judged: either may fail to.
        with _show_progress("verdicts", items, remaining) as bar:
            stage = Stage(chat, "judge", cfg.seed, settings.batch, make_messages, keep_answers)
            stage.run(items, file.rows, bar)


@contextlib.contextmanager
def _show_progress(title: str, items: Sequence[Item], remaining: int) -> Iterator[Progress]:
    """Show the progress of a stage.  remaining: items that have no answer yet."""
    bar = Progress(title, len(items), len(items) - remaining)
    try:
        yield bar
    finally:
        bar.close()


@contextlib.contextmanager
def _open_chat(cfg: ConfigDict, name: str, folder: Path) -> Iterator[Chat]:
    """Open the language model of a section; it is closed on exit.

    Args:
      name: the section, `source` or `judge`.
      folder: for a tokenizer made for random weights.
    """
    chat = local_chat.open_chat(cfg, name, device_layouts.make_layouts(cfg)["policy"], folder)
    try:
        yield chat
    finally:
        chat.close()


@contextlib.contextmanager
def _open_rule_verifier(cfg: ConfigDict) -> Iterator[RuleVerifier]:
    """Start the rule verifier's processes; they end on exit.  Raises SetupError if they cannot answer."""
    with setup_errors("rule"):
        rule = RuleVerifier(RuleConfig.from_config(cfg.rule))
    with rule:
        with setup_errors("rule"):
            rule.check_ready()
        yield rule
