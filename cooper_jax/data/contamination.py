"""Contamination of evaluations: held-out problems that the reward model is trained on.

`exclude_contaminated` is the entry point:

1. `record_earlier_questions` and `add_training_questions` collect the questions that the reward model sees:
   those its weights were trained on, those of the supervised phase, and in the cooper arm the training
   problems, on whose responses the reward model is updated.
2. `drop_seen` removes the held-out problems among them from the evaluation.
3. `describe_overlap` counts them in one line.

The rule arm has no reward model and no record.  To compare arms, use held-out problems that no arm's reward
model has
seen: then no arm drops any.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from etils import epath
from ml_collections import ConfigDict

from cooper_jax.data import labelled_completions, seen_questions
from cooper_jax.data.seen_questions import Record
from cooper_jax.runtime import hosts
from cooper_jax.runtime.checkpoint import list_steps
from cooper_jax.settings.cross_checks import updates_reward_model
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Problem


def exclude_contaminated(
    cfg: ConfigDict, run_dir: Path | epath.Path, train: Sequence[Problem], held_out: Sequence[Problem]
) -> list[Problem]:
    """The held-out problems to evaluate on; the overlap is printed in one line.

    The first host writes the record of what the reward model is trained on into the run directory.  An
    exported reward model takes it along, and a run that resumes reads it.  Raises SetupError for a damaged
    record and for weights or files that cannot be read.
    """
    lines = []

    def make_record() -> bytes:
        # A run with a checkpoint has its record already; what was known before it is then no longer at hand.
        earlier = None
        seen = seen_questions.read_record(run_dir) if list_steps(run_dir) else None
        if seen is None:
            earlier = record_earlier_questions(cfg)
            seen = add_training_questions(cfg, earlier, train)
        if seen is None:
            return b""
        seen_questions.write_record(run_dir, seen)
        lines.append(describe_overlap(cfg, seen, held_out, train, earlier))
        return seen.encode()

    # All hosts evaluate on the same problems, and only the first one writes.
    with setup_errors("run_dir"):
        encoded = hosts.broadcast_value("questions seen", make_record)
        seen = None
        if encoded:
            seen = seen_questions.Record.decode(encoded, f"{run_dir / seen_questions.SEEN}")
    kept = drop_seen(cfg, held_out, seen)
    for line in filter(None, lines):
        hosts.print_once(line)
    return kept


def record_earlier_questions(cfg: ConfigDict) -> Record | None:
    """The questions that the reward model sees before step 1, the training problems not included.

    They are those recorded beside its weights and those of supervised.reward_data.  None in the rule arm.  Raises
    SetupError for a damaged record or file.
    """
    if cfg.reward.arm == "rule":
        return None
    weights = cfg.reward.weights
    seen = Record()
    if weights != "random":
        with setup_errors(f"reward.weights={weights!r}"):
            # Weights without a trained head are a language model's: they have judged no answer yet.
            no_record = Record(complete=not seen_questions.has_trained_head(weights))
            seen = seen_questions.read_record(weights) or no_record
    if cfg.supervised.reward_steps and cfg.supervised.reward_data:
        with setup_errors(f"supervised.reward_data={cfg.supervised.reward_data}"):
            triples = labelled_completions.load_labelled_completions(cfg.supervised.reward_data)
        questions = (triple.question for triple in triples)
        seen |= seen_questions.record_questions(questions, _name_file(cfg.supervised.reward_data))
    return seen


def add_training_questions(cfg: ConfigDict, seen: Record | None, train: Sequence[Problem]) -> Record | None:
    """The run's record: `seen`, and the training problems where the reward model is trained on them."""
    learns_from_solutions = cfg.supervised.reward_steps and not cfg.supervised.reward_data
    if seen is None or not (updates_reward_model(cfg) or learns_from_solutions):
        return seen
    source = _name_file(cfg.data.train) or cfg.data.format
    return seen | seen_questions.record_questions((p.question for p in train), source)


def drop_seen(cfg: ConfigDict, held_out: Sequence[Problem], seen: Record | None) -> list[Problem]:
    """The held-out problems that the reward model is not trained on, or all with a reason to keep them.

    The reasons are those of `_find_reason_to_keep`.  Raises SetupError where none would be left.
    """
    if seen is None or _find_reason_to_keep(cfg):
        return list(held_out)
    kept, _ = seen_questions.split_by_seen(held_out, seen.fingerprints)
    if held_out and not kept:
        raise SetupError(
            f"data.eval={cfg.data.eval}: the reward model is trained on all {len(held_out)} questions in it "
            f"({_list_sources(seen)}), so nothing is left to evaluate on: give another file, or evaluate on "
            "them with --config.data.exclude_seen=False"
        )
    return kept


def _find_reason_to_keep(cfg: ConfigDict) -> str:
    """The reason for evaluating on held-out problems that the reward model has seen; "" if they are left out.

    A reward model that was trained on the training file has seen all problems of data.eval_from_train.  They
    are kept, because the evaluation would be empty without them: it shows a run's progress, and compares no
    two runs.
    """
    if not cfg.data.exclude_seen:
        return "data.exclude_seen=False"
    is_from_train = cfg.data.format != "synthetic" and not cfg.data.eval and cfg.data.eval_from_train > 0
    if is_from_train:
        return "data.eval_from_train takes them from the training file"
    return ""


def describe_overlap(
    cfg: ConfigDict,
    seen: Record,
    held_out: Sequence[Problem],
    train: Sequence[Problem],
    earlier: Record | None,
) -> str:
    """One line on the overlap; "" for synthetic problems, which no file holds.

    earlier: the questions that the reward model saw before this run, with which the training problems are
    compared; None where they are no longer known.
    """
    if cfg.data.format == "synthetic":
        return ""
    parts = []
    if held_out:
        _, overlap = seen_questions.split_by_seen(held_out, seen.fingerprints)
        part = f"{len(overlap)} of {len(held_out)} held-out questions"
        if overlap:
            reason = _find_reason_to_keep(cfg)
            part += f" (kept, as {reason})" if reason else " (left out)"
        parts.append(part)
    if earlier is not None:
        _, known = seen_questions.split_by_seen(train, earlier.fingerprints)
        parts.append(f"before this run {len(known)} of {len(train)} training questions")

    overlaps = ", ".join(parts or ["none held out"])
    line = f"the reward model is trained on {_list_sources(seen)}; among them {overlaps}"
    if not seen.complete:
        line += (
            f"; what else reward.weights={cfg.reward.weights} saw is unknown: no whole {seen_questions.SEEN} "
            "lies beside them"
        )
    return line


def _name_file(path: str) -> str:
    """A file's name without this machine's folders, since records are published with weights."""
    return PurePosixPath(path).name


def _list_sources(seen: Record) -> str:
    sources = [f"{count} questions of {name}" for name, count in seen.sources.items()]
    return ", ".join(sources) or "no known question"
