"""What a run's reward model is trained on, against what the run is evaluated on.

`set_apart` is the way in:

1. `before` and `with_training` add up a run's record: what the reward model's weights saw before,
   what supervised training shows them, and in the cooper arm the training problems, on whose answers the reward
   model is updated.
2. `leave_out` takes the held-out problems among them out of the evaluation.
3. `report` says how many there are, in one line.

The rule arm has no reward model, and no record.  Evaluations that are to be compared between arms want held-out
problems that no arm's reward model has seen, so that none is left out.
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
    """The held-out problems to evaluate on; the overlap is said in one line.

    What the reward model is trained on is written into the run directory, by the first host.  It goes from there
    with an exported reward model, and holds for the whole run: one that goes on reads it.  Raises SetupError.
    """
    lines = []

    def look() -> bytes:
        known = seen_questions.read_record(run_dir) if list_steps(run_dir) else None
        earlier = None if known is not None else seen_before_training(cfg)
        seen = known if known is not None else add_training_questions(cfg, earlier, train)
        if seen is None:
            return b""
        seen_questions.write_record(run_dir, seen)
        lines.append(describe_overlap(cfg, seen, held_out, train, earlier))
        return seen.encode()

    with setup_errors("run_dir"):
        told = hosts.broadcast_value("questions seen", look)
        seen = seen_questions.Record.decode(told, f"{run_dir / seen_questions.SEEN}") if told else None
    kept = drop_seen(cfg, held_out, seen)
    for line in filter(None, lines):
        hosts.print_once(line)
    return kept


def seen_before_training(cfg: ConfigDict) -> Record | None:
    """What the reward model saw before step 1, of other data than the training problems; None in the rule arm.

    That is what is recorded beside its weights, and the questions of supervised.reward_data.  Raises SetupError
    for a damaged record or file.
    """
    if cfg.reward.arm == "rule":
        return None
    weights = cfg.reward.weights
    seen = Record()
    if weights != "random":
        with setup_errors(f"reward.weights={weights!r}"):
            # Without a trained head it is a language model, and no answer was ever judged by it.
            seen = seen_questions.read_record(weights) or Record(
                complete=not seen_questions.has_trained_head(weights)
            )
    if cfg.supervised.reward_steps and cfg.supervised.reward_data:
        with setup_errors(f"supervised.reward_data={cfg.supervised.reward_data}"):
            triples = labelled_completions.load_labelled_completions(cfg.supervised.reward_data)
        seen |= seen_questions.record_questions(
            (t.question for t in triples), _name(cfg.supervised.reward_data)
        )
    return seen


def add_training_questions(cfg: ConfigDict, seen: Record | None, train: Sequence[Problem]) -> Record | None:
    """The run's whole record: with the training problems, where the reward model is trained on them."""
    solutions = cfg.supervised.reward_steps and not cfg.supervised.reward_data
    if seen is None or not (updates_reward_model(cfg) or solutions):
        return seen
    return seen | seen_questions.record_questions(
        (p.question for p in train), _name(cfg.data.train) or cfg.data.format
    )


def drop_seen(cfg: ConfigDict, held_out: Sequence[Problem], seen: Record | None) -> list[Problem]:
    """The held-out problems that the reward model is not trained on; all where `_reason_to_keep` gives a reason.

    Raises SetupError where none would be left.
    """
    if seen is None or _reason_to_keep(cfg):
        return list(held_out)
    kept, _ = seen_questions.split_by_seen(held_out, seen.fingerprints)
    if held_out and not kept:
        raise SetupError(
            f"data.eval={cfg.data.eval}: the reward model is trained on all {len(held_out)} questions in it "
            f"({_sources(seen)}), so nothing is left to evaluate on: give another file, or evaluate on them with "
            "--config.data.exclude_seen=False"
        )
    return kept


def _reason_to_keep(cfg: ConfigDict) -> str:
    """The reason for evaluating on held-out problems that the reward model has seen; "" if they are left out.

    A reward model that was trained on the training file has seen all problems of data.eval_from_train.  They are
    kept, because the evaluation would otherwise be empty: it shows how the run goes, and compares no two runs.
    """
    if not cfg.data.exclude_seen:
        return "data.exclude_seen=False"
    return "data.eval_from_train takes them from the training file" if _is_from_train(cfg) else ""


def _is_from_train(cfg: ConfigDict) -> bool:
    return cfg.data.format != "synthetic" and not cfg.data.eval and cfg.data.eval_from_train > 0


def describe_overlap(
    cfg: ConfigDict,
    seen: Record,
    held_out: Sequence[Problem],
    train: Sequence[Problem],
    earlier: Record | None,
) -> str:
    """One line on the overlap; "" for made problems, which no file holds.

    earlier: what the reward model saw before this run, against which the training problems are held; None where
    that is not known any more.
    """
    if cfg.data.format == "synthetic":
        return ""
    parts = []
    if held_out:
        _, among = seen_questions.split_by_seen(held_out, seen.fingerprints)
        reason = _reason_to_keep(cfg)
        done = f"kept, as {reason}" if reason else "left out"
        parts.append(f"{len(among)} of {len(held_out)} held-out questions" + (f" ({done})" if among else ""))
    if earlier is not None:
        _, known = seen_questions.split_by_seen(train, earlier.fingerprints)
        parts.append(f"before this run {len(known)} of {len(train)} training questions")
    line = f"the reward model is trained on {_sources(seen)}; among them " + ", ".join(
        parts or ["none held out"]
    )
    if not seen.complete:
        weights = cfg.reward.weights
        line += f"; what else reward.weights={weights} saw is unknown: no whole {seen_questions.SEEN} lies beside them"
    return line


def _name(path: str) -> str:
    """Of a file, without this machine's folders: records are published with weights."""
    return PurePosixPath(path).name


def _sources(seen: Record) -> str:
    return (
        ", ".join(f"{count} questions of {name}" for name, count in seen.sources.items())
        or "no known question"
    )
