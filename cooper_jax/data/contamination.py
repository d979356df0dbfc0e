"""Contamination of evaluations: held-out problems that the reward model is trained on.

`exclude_contaminated` is the entry point:

1. `record_earlier_questions` and `add_training_questions` collect the questions that the reward model is
   trained on: those recorded beside its weights, those of the supervised phase, and in the cooper arm the
   training problems, on whose responses the reward model is updated.
2. `drop_seen` removes these questions from the held-out problems.
3. `describe_overlap` reports in one line how many held-out problems are among them.

The rule arm has no reward model and no record.  To compare arms, use held-out problems that no arm's reward
model has seen: then every arm is evaluated on the same problems.
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
    """Return the held-out problems to evaluate on, and print the overlap in one line.

    The first host writes the record of the questions that the reward model is trained on into the run
    directory.  The export of a reward model copies the record, and a run that resumes reads it.  Raises
    SetupError for a damaged record and for weights or files that cannot be read.
    """
    lines = []

    def make_record() -> bytes:
        # A run that resumes has its record already.  That record contains the run's own training problems, so
        # the questions seen before the run can no longer be told apart: `earlier` stays None.
        earlier = None
        seen = seen_questions.read_record(run_dir) if list_steps(run_dir) else None
        if seen is None:
            earlier = record_earlier_questions(cfg)
            seen = add_training_questions(cfg, earlier, train)
        # In the rule arm there is nothing to record.
        if seen is None:
            return b""
        seen_questions.write_record(run_dir, seen)
        lines.append(describe_overlap(cfg, seen, held_out, train, earlier))
        return seen.encode()

    # Only the first host makes and writes the record; the broadcast gives all hosts the same problems.
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
    """Record the questions that the reward model sees before step 1, without the training problems.

    They are the questions recorded beside its weights and those of supervised.reward_data.  None in the rule
    arm.  Raises SetupError for a damaged record or file.
    """
    if cfg.reward.arm == "rule":
        return None
    weights = cfg.reward.weights
    seen = Record()
    if weights != "random":
        with setup_errors(f"reward.weights={weights!r}"):
            # Weights without a trained score head are those of a language model, which no labelled completion
            # has trained yet, so their record is complete although it is empty.
            no_record = Record(complete=not seen_questions.has_trained_head(weights))
            seen = seen_questions.read_record(weights) or no_record

    if cfg.supervised.reward_steps and cfg.supervised.reward_data:
        with setup_errors(f"supervised.reward_data={cfg.supervised.reward_data}"):
            triples = labelled_completions.load_labelled_completions(cfg.supervised.reward_data)
        questions = (triple.question for triple in triples)
        seen |= seen_questions.record_questions(questions, _name_file(cfg.supervised.reward_data))
    return seen


def add_training_questions(cfg: ConfigDict, seen: Record | None, train: Sequence[Problem]) -> Record | None:
    """Add the training problems to `seen` if the reward model is trained on them."""
    # Without reward_data, the supervised phase makes its labelled completions from the worked solutions.
    learns_from_solutions = cfg.supervised.reward_steps and not cfg.supervised.reward_data
    if seen is None or not (updates_reward_model(cfg) or learns_from_solutions):
        return seen
    # Of several sources each has its own name; a single one keeps that of its file.
    names = list(dict.fromkeys(p.source for p in train))
    for name in names:
        source = name if len(names) > 1 else _name_file(cfg.data.train) or cfg.data.format
        seen |= seen_questions.record_questions((p.question for p in train if p.source == name), source)
    return seen


def drop_seen(cfg: ConfigDict, held_out: Sequence[Problem], seen: Record | None) -> list[Problem]:
    """Drop the held-out problems that the reward model is trained on.

    None is dropped if `_find_reason_to_keep` gives a reason.  Raises SetupError if all would be dropped.
    """
    if seen is None or _find_reason_to_keep(cfg):
        return list(held_out)
    kept, _ = seen_questions.split_by_seen(held_out, seen.fingerprints)
    # An accuracy over no problems would be NaN, so the run does not start.
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
    are kept, because the evaluation would be empty without them.  Such an evaluation shows the progress of a
    run; it cannot compare two runs.
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
    """Describe the overlap in one line; "" for synthetic problems, which come from no file.

    earlier: the questions that the reward model saw before this run, which the line compares with the
    training problems; None where they are not known.
    """
    if cfg.data.format == "synthetic":
        return ""
    parts = []

    # Held-out problems: these make an evaluation look better than it is.
    if held_out:
        _, overlap = seen_questions.split_by_seen(held_out, seen.fingerprints)
        part = f"{len(overlap)} of {len(held_out)} held-out questions"
        if overlap:
            reason = _find_reason_to_keep(cfg)
            part += f" (kept, as {reason})" if reason else " (left out)"
        parts.append(part)

    # Training problems: a reward model may know their answers, and then judges them better than others.
    if earlier is not None:
        _, known = seen_questions.split_by_seen(train, earlier.fingerprints)
        parts.append(f"before this run {len(known)} of {len(train)} training questions")

    overlaps = ", ".join(parts or ["none held out"])
    line = f"the reward model is trained on {_list_sources(seen)}; among them {overlaps}"
    if not seen.complete:
        line += (
            f"; what else reward.weights={cfg.reward.weights} saw is unknown: there is no complete "
            f"{seen_questions.SEEN} beside them"
        )
    return line


def _name_file(path: str) -> str:
    """The file name without its folders: records are published with weights, and folders are private."""
    return PurePosixPath(path).name


def _list_sources(seen: Record) -> str:
    """The sources of a record with their numbers of questions, for messages."""
    sources = [f"{count} questions of {name}" for name, count in seen.sources.items()]
    return ", ".join(sources) or "no known question"
