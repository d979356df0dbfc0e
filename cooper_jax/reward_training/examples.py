"""Labelled completions as a reward model is trained and measured on them: text, ids, and what was left out.

1. The files of `train_rm.data` are read one after the other.
2. Without `train_rm.eval_data` a part of them is held out, by whole questions: by the order of the questions'
   fingerprints, which knows nothing of seed or file order, so that runs can be compared.
3. Held-out rows whose normalised question is in the training data, or in the record of what the weights to begin
   with have seen, are counted, and left out unless `train_rm.exclude_overlap` is off.
4. Training texts of over `train_rm.max_characters` are dropped, as the authors do; held-out ones are kept, and cut
   inside the completion as everywhere that the model is used.
5. A share of the wrong training completions is shown once more under a known reward hack (data/reward_hacks.py), as
   wrong (`train_rm.attacked`).
6. Everything is rendered by the one template, and tokenised.

A reward model learns which of two classes a completion is in: both must occur in each part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from cooper_jax.data import labelled_completions, prompts, reward_hacks, seen_questions
from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.runtime import keys
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.types import Triple

UNNAMED = "unnamed"  # stands for a source that the data do not name


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of one part, in the order of the files."""

    triples: tuple[Triple, ...]
    tokens: tuple[tuple[int, ...], ...]
    cut: int  # rows that were longer than reward.max_tokens

    def __len__(self) -> int:
        return len(self.triples)

    @property
    def lengths(self) -> np.ndarray:  # i64[N]
        return np.array([len(x) for x in self.tokens], np.int64)

    @property
    def labels(self) -> np.ndarray:  # f32[N]
        return np.array([t.label for t in self.triples], np.float32)

    @property
    def sources(self) -> list[str]:
        return [t.source or UNNAMED for t in self.triples]


@dataclasses.dataclass(frozen=True)
class Data:
    train: Examples
    held_out: Examples
    too_long: int  # training rows dropped for their characters
    attacked: int  # training rows that are reward hacks: the last ones
    overlapping: int  # held-out rows whose question is in the training data
    excluded: bool  # whether those were left out

    @property
    def digest(self) -> str:
        """16 hex digits over all that is trained and measured on: ids and labels."""
        content = hashlib.sha256()
        for part in (self.train, self.held_out):
            for tokens, triple in zip(part.tokens, part.triples, strict=True):
                content.update(np.array([len(tokens), int(triple.label), *tokens], np.int64).tobytes())
        return content.hexdigest()[:16]


def load_examples(cfg: ConfigDict, tokenizer: Tokenizer) -> Data:
    """Both parts.  Raises SetupError naming file, row and flag."""
    section = cfg.train_rm
    train = _read("train_rm.data", section.data)
    if section.eval_data:
        held_out = _read("train_rm.eval_data", section.eval_data)
    else:
        train, held_out = split_held_out(train, section.eval_share)
    seen = frozenset(seen_questions.fingerprint_question(q) for q in {t.question for t in train})
    with setup_errors(f"reward.weights={cfg.reward.weights!r}"):
        before = seen_questions.read_record(cfg.reward.weights)
    seen |= before.fingerprints if before is not None else frozenset()
    apart, overlapping = seen_questions.split_by_seen(held_out, seen)
    if section.exclude_overlap:
        held_out = apart
    if not held_out:
        raise SetupError(
            f"train_rm.eval_data={section.eval_data!r}: all of its {len(overlapping)} rows have a question that is "
            "in the training data, or that the weights to begin with have seen: give other data, or "
            "--config.train_rm.exclude_overlap=False"
        )
    short = [t for t in train if _fits(t, section.max_characters)]
    if not short:
        raise SetupError(
            f"train_rm.max_characters={section.max_characters}: all of the {len(train)} training texts are longer: "
            "raise it, or set 0 to keep all"
        )
    for name, triples in (("training", short), ("held-out", held_out)):
        labels = Counter(t.label for t in triples)
        if len(labels) < 2:
            raise SetupError(
                f"train_rm: the {len(triples)} {name} rows all have the label {next(iter(labels)):g}: both labels "
                "must occur, or nothing can be learned or measured"
            )
    hacks = add_attacked(short, section.attacked, cfg.seed)
    most = cfg.reward.max_tokens
    return Data(
        train=_examples("train_rm.data", short + hacks, tokenizer, most),
        held_out=_examples("train_rm.eval_data", held_out, tokenizer, most),
        too_long=len(train) - len(short),
        attacked=len(hacks),
        overlapping=len(overlapping),
        excluded=section.exclude_overlap,
    )


def add_attacked(triples: Sequence[Triple], share: float, seed: int) -> list[Triple]:
    """So large a share of the wrong completions once more, each under one of the hacks that end on no right answer.

    Which ones and how depends on (seed, place of the row) alone.
    """
    wrong = [i for i, t in enumerate(triples) if t.label < 0.5]
    rng = keys.make_generator(seed, "attacked")
    out = []
    for i in sorted(rng.choice(wrong, size=round(share * len(wrong)), replace=False)):
        name = reward_hacks.WRONG[rng.integers(len(reward_hacks.WRONG))]
        t = reward_hacks.apply_attack(triples[i], name, seed, int(i))
        out.append(dataclasses.replace(t, id=f"{t.id} under {name}"))
    return out


def split_held_out(triples: Sequence[Triple], share: float) -> tuple[list[Triple], list[Triple]]:
    """(training rows, held-out rows): whole questions, until so large a share of the rows is held out.

    Raises SetupError where one of the parts would be empty.
    """
    groups = defaultdict(list)
    for i, t in enumerate(triples):
        groups[seen_questions.fingerprint_question(t.question)].append(i)
    taken: set[int] = set()
    for _, rows in sorted(groups.items()):
        if len(taken) >= share * len(triples):
            break
        taken.update(rows)
    if not 0 < len(taken) < len(triples):
        raise SetupError(
            f"train_rm.eval_share={share} of {len(triples)} rows of {len(groups)} questions leaves nothing to "
            "train on, or nothing held out: change it, or give --config.train_rm.eval_data"
        )
    return (
        [t for i, t in enumerate(triples) if i not in taken],
        [t for i, t in enumerate(triples) if i in taken],
    )


def _read(field: str, paths: str) -> list[Triple]:
    triples = []
    for path in filter(None, (p.strip() for p in paths.split(","))):
        with setup_errors(f"{field}={path}"):
            triples += labelled_completions.load_labelled_completions(path)
    if not triples:
        raise SetupError(f"{field} is empty: give --config.{field}=FILE, or several with commas between them")
    return triples


def _fits(t: Triple, most: int) -> bool:
    return not most or len(prompts.render_verifier_text(t.question, t.reference, t.completion)) <= most


def _examples(field: str, triples: Sequence[Triple], tokenizer: Tokenizer, most: int) -> Examples:
    rows, cut = [], 0
    for t in triples:
        texts = (t.question, t.reference, t.completion)
        ids = prompts.encode_verifier_input(tokenizer, *texts, sys.maxsize)
        if len(ids) > most:
            with setup_errors(f"{field}, row {t.id}"):
                ids = prompts.encode_verifier_input(tokenizer, *texts, most)
            cut += 1
        rows.append(tuple(ids))
    return Examples(tuple(triples), tuple(rows), cut)
