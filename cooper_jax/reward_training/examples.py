"""Labelled completions that a reward model is trained and measured on.

1. The files of `train_rm.data` are read one after the other.
2. Without `train_rm.eval_data`, a share of them is held out by whole questions, in the order of the
   questions' fingerprints.  The choice depends neither on the seed nor on the order of files, so runs can be
   compared.
3. Held-out rows whose normalised question is in the training data, or in the record of the questions that the
   initial weights were trained on, are counted.  They are left out unless `train_rm.exclude_overlap` is off.
4. Training texts longer than `train_rm.max_characters` are dropped, as in the authors' code.  Held-out ones
   are kept and truncated inside the completion, as the model's inputs are everywhere else.
5. Rows made from the training rows are added to them: completions under reward hacks, or beside other
   references (added_rows.py).
6. All rows are rendered by the one template and tokenised.

A reward model learns to tell two classes apart, so both labels must occur in each part.

    N  rows
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import labelled_completions, prompts, seen_questions
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.reward_training.added_rows import make_added_rows
from cooper_jax.reward_training.rm_config import TrainRmConfig
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Triple

UNNAMED = "unnamed"  # the source of rows without a source


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of one part (training or held out), in the order of the files."""

    triples: tuple[Triple, ...]
    tokens: tuple[tuple[int, ...], ...]  # token ids of each row, of uneven length
    truncated: int  # rows that were longer than reward.max_tokens

    def __len__(self) -> int:
        return len(self.triples)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, i64[N]."""
        return np.array([len(row) for row in self.tokens], np.int64)

    @property
    def labels(self) -> np.ndarray:
        """1 for a correct completion, 0 for a wrong one, f32[N]."""
        return np.array([t.label for t in self.triples], np.float32)

    @property
    def sources(self) -> list[str]:
        """The data source of each row, [N]."""
        return [t.source or UNNAMED for t in self.triples]


@dataclasses.dataclass(frozen=True)
class RewardData:
    """Training and held-out rows, with the counts of rows that were dropped, added or left out."""

    # The two parts.
    train: Examples
    held_out: Examples

    # Changes to the training rows.
    too_long: int  # rows dropped because their text has more than train_rm.max_characters
    added: Mapping[str, int]  # rows that were added, by kind (added_rows.py); they are the last ones

    # Overlap of the held-out rows with training.
    overlapping: int  # rows whose question was trained on
    overlap_excluded: bool  # True if those rows were left out

    @property
    def digest(self) -> str:
        """16 hex digits of a hash of the token ids and labels of both parts."""
        # Each row begins with its length, so that moving a token from one row to the next changes the hash.
        content = hashlib.sha256()
        for part in (self.train, self.held_out):
            for tokens, triple in zip(part.tokens, part.triples, strict=True):
                content.update(np.array([len(tokens), int(triple.label), *tokens], np.int64).tobytes())
        return content.hexdigest()[:16]


def load_examples(cfg: ConfigDict, settings: TrainRmConfig, tokenizer: Tokenizer) -> RewardData:
    """Read, split, filter and tokenise the labelled completions.

    Args:
      cfg: the whole config, of which `reward`, `seed` and `rule` are read.
      settings: its `train_rm` section.

    Raises SetupError, naming file, row and flag, for files that cannot be read, and for parts without rows
    of both labels.
    """
    train, held_out = _read_parts(settings)

    # Overlap is decided by the questions of all training rows, including rows that are dropped below.
    overlapping, unseen = _find_overlap(train, held_out, cfg.reward.weights)
    if settings.exclude_overlap:
        held_out = unseen
    if not held_out:
        raise SetupError(
            f"train_rm.eval_data={settings.eval_data!r}: all of its {len(overlapping)} rows have a question "
            "that is in the training data, or that the initial weights were trained on: give other data, or "
            "--config.train_rm.exclude_overlap=False"
        )

    # Long training texts are dropped rather than truncated, as in the authors' code.
    kept = [t for t in train if _has_allowed_length(t, settings.max_characters)]
    if not kept:
        raise SetupError(
            f"train_rm.max_characters={settings.max_characters}: all of the {len(train)} training texts are "
            "longer: raise it, or set 0 to keep all"
        )

    # Without both labels nothing can be learned, and AUROC and balanced accuracy are undefined.
    _check_labels("training", kept)
    _check_labels("held-out", held_out)

    # The added rows come last: make_seen_record (best_model.py) relies on that.
    max_tokens = cfg.reward.max_tokens
    added = make_added_rows(kept, settings, cfg)
    # A user can shorten the references of a file, but not those that are made here.
    added = added.select(lambda t: prompts.reference_fits(tokenizer, t.reference, max_tokens))
    return RewardData(
        train=_tokenize("train_rm.data", [*kept, *added.triples], tokenizer, max_tokens),
        held_out=_tokenize("train_rm.eval_data", held_out, tokenizer, max_tokens),
        too_long=len(train) - len(kept),
        added=added.counts,
        overlapping=len(overlapping),
        overlap_excluded=settings.exclude_overlap,
    )


def split_held_out(triples: Sequence[Triple], share: float) -> tuple[list[Triple], list[Triple]]:
    """Split rows into (training, held out) by whole questions.

    Questions are held out, in the order of their fingerprints, until `share` of the rows is reached.

    Raises SetupError if one of the parts would be empty.
    """
    rows_by_question = defaultdict(list)  # fingerprint -> row indices
    for i, t in enumerate(triples):
        rows_by_question[seen_questions.fingerprint_question(t.question)].append(i)

    # Fingerprints are hashes, so their order is random with respect to the content but the same in every run.
    held_out_rows: set[int] = set()
    for _, rows in sorted(rows_by_question.items()):
        if len(held_out_rows) >= share * len(triples):
            break
        held_out_rows.update(rows)

    if not 0 < len(held_out_rows) < len(triples):
        raise SetupError(
            f"train_rm.eval_share={share} of {len(triples)} rows of {len(rows_by_question)} questions leaves "
            "nothing to train on, or nothing held out: change it, or give --config.train_rm.eval_data"
        )
    # Both parts keep the order of the files.
    train = [t for i, t in enumerate(triples) if i not in held_out_rows]
    held_out = [t for i, t in enumerate(triples) if i in held_out_rows]
    return train, held_out


def _read_parts(settings: TrainRmConfig) -> tuple[list[Triple], list[Triple]]:
    """Read the files and return (training rows, held-out rows), before any row is dropped."""
    train = _read_files("train_rm.data", settings.data)
    if settings.eval_data:
        return train, _read_files("train_rm.eval_data", settings.eval_data)
    return split_held_out(train, settings.eval_share)


def _read_files(field: str, paths: str) -> list[Triple]:
    """Read the rows of several files.

    Args:
      field: the config's field, for messages.
      paths: separated by commas.
    """
    triples = []
    for path in filter(None, (p.strip() for p in paths.split(","))):
        with setup_errors(f"{field}={path}"):
            triples += labelled_completions.load_labelled_completions(path)
    if not triples:
        raise SetupError(f"{field} is empty: give --config.{field}=FILE, or several with commas between them")
    return triples


def _find_overlap(
    train: Sequence[Triple], held_out: Sequence[Triple], weights: str
) -> tuple[list[Triple], list[Triple]]:
    """Split the held-out rows into (rows whose question was trained on, all others).

    A question counts as trained on if it is in `train` or in the record beside the initial weights.
    """
    # Many rows share a question: each is fingerprinted once.
    questions = {t.question for t in train}
    seen = frozenset(seen_questions.fingerprint_question(question) for question in questions)
    with setup_errors(f"reward.weights={weights!r}"):
        record = seen_questions.read_record(weights)
    if record is not None:
        seen |= record.fingerprints
    unseen, overlapping = seen_questions.split_by_seen(held_out, seen)
    return overlapping, unseen


def _has_allowed_length(triple: Triple, max_characters: int) -> bool:
    """True if the rendered text has at most `max_characters`; 0 allows any length."""
    if not max_characters:
        return True
    text = prompts.render_verifier_text(triple.question, triple.reference, triple.completion)
    return len(text) <= max_characters


def _check_labels(part: str, triples: Sequence[Triple]) -> None:
    """Raise SetupError unless both labels occur."""
    labels = {t.label for t in triples}
    if len(labels) < 2:
        raise SetupError(
            f"train_rm: the {len(triples)} {part} rows all have the label {next(iter(labels)):g}: both "
            "labels must occur, or nothing can be learned or measured"
        )


def _tokenize(field: str, triples: Sequence[Triple], tokenizer: Tokenizer, max_tokens: int) -> Examples:
    """Render and tokenise rows, truncated to `max_tokens`.  field: the config's field, for messages."""
    # A row whose reference leaves no room for the rest is an error: truncating it would hide the answer.
    rows, truncated = [], 0
    for t in triples:
        texts = (t.question, t.reference, t.completion)
        # The first call has no limit: truncation has to render and tokenise again, and few rows need it.
        ids = prompts.encode_verifier_input(tokenizer, *texts, sys.maxsize)
        if len(ids) > max_tokens:
            with setup_errors(f"{field}, row {t.id}"):
                ids = prompts.encode_verifier_input(tokenizer, *texts, max_tokens)
            truncated += 1
        rows.append(tuple(ids))
    return Examples(tuple(triples), tuple(rows), truncated)
