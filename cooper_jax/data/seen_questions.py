r"""Records of the questions that a reward model has seen, and their overlap with evaluation sets.

  1. `normalise_question` removes layout, white space, case, LaTeX spacing and the punctuation of prose from a
     question; numbers, operators and words stay.  `fingerprint_question` is a hash of the result.
  2. `write_record` stores the fingerprints of all questions that a reward model was trained on beside its
     weights; `read_record` reads them.
  3. `split_by_seen` separates the questions of an evaluation set that were seen from the others.

Two questions are the same if their normalised texts are equal.  On the data sets of tests/test_overlap.py a
looser comparison finds no further pair: questions that share most of their words are different questions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cooper_jax.runtime import remote_files

# The record's file name, in a directory of weights or in a run directory.
SEEN = "seen_questions.json"
# Version of the file format and of `normalise_question`.  Fingerprints of different versions cannot be
# compared, so any change of `normalise_question`'s results needs a new number.
VERSION = 1
_FINGERPRINT_BYTES = 16

T = TypeVar("T")

# --- 1. questions -------------------------------------------------------------------------------------------

# "Please reason step by step, and put your final answer within \boxed{}." at the end.
_INSTRUCTION = re.compile(
    r"(?:\b(?:please|let's) (?:think|reason) step by step[.,]?)?"
    r"[^\n.?!]*\banswer\b[^\n.?!]*\\boxed\{\s*\}[^\n]*\Z"
)
# Replacements, applied in this order: (equivalent spellings, the normal one).
_SPELLINGS = (
    # Dashes and quotation marks.
    (re.compile(r"[‐‑‒–—―−]"), "-"),
    (re.compile(r"[‘’′`]"), "'"),
    (re.compile(r'[“”"]|\'\''), ""),
    # LaTeX commands that change layout, font or size, but not the question.
    (re.compile(r"\\begin\{problem\}|\\end\{problem\}"), " "),
    (re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(le|ge|ne)q(?![a-z])"), r"\\\1"),
    (
        re.compile(
            r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|noindent|qquad|quad|newline)"
            r"(?![a-z])"
        ),
        " ",
    ),
    (re.compile(r"(?<=\d)(?:,\\!|\\,|\{,\}|,)\s?(?=\d{3}(?!\d))"), ""),  # thousands
    # LaTeX spaces, delimiters of formulas, and escapes.
    (re.compile(r"\\\\|\\[,;:! ()\[\]]|~"), " "),
    (re.compile(r"\\?\$"), ""),
    (re.compile(r"\\([%#&_])"), r"\1"),
    # \frac12 and \frac{1}{2} mean the same in LaTeX, and so do x^2 and x^{2}; \frac{1}{23} keeps its braces.
    (re.compile(r"\{\s*(\w)\s*\}"), r"\1"),
    # Punctuation of prose.  Between digits a mark is part of a number or a ratio.
    (re.compile(r"[.,:;?](?!(?<=\d.)\d)"), " "),
    # Hyphens between words (two-digit), but not minus signs.
    (re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})"), " "),
    # All white space, except that between digits (1 23 is not 12 3), which a NUL protects.
    (re.compile(r"(?<=\d)\s+(?=\d)"), "\x00"),
    (re.compile(r"\s+"), ""),
    (re.compile("\x00"), " "),
)
# Replaced before NFKC, which would write x² as x2.
_SUPERSCRIPTS = {ord(c): f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}


def normalise_question(question: str) -> str:
    """The question without layout, case, punctuation and white space, except a space between digits."""
    text = unicodedata.normalize("NFKC", question.translate(_SUPERSCRIPTS)).casefold()
    # Category Cf is invisible formatting: soft hyphens, byte order marks.
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").strip()
    text = _INSTRUCTION.sub("", text) or text

    normalised = text
    for pattern, replacement in _SPELLINGS:
        normalised = pattern.sub(replacement, normalised)
    # A question of punctuation alone must not become "", which all such questions would share.
    return normalised or text


# Cached, because a data set is counted, split and recorded: three calls per question.
@functools.lru_cache(maxsize=1 << 16)
def fingerprint_question(question: str) -> str:
    """A hash of the normalised question: 32 hex digits."""
    content = normalise_question(question).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=_FINGERPRINT_BYTES).hexdigest()


def _get_question(item: Any) -> str:
    """The question of a Problem or a Triple."""
    return item.question


def split_by_seen(
    items: Sequence[T], seen: frozenset[str], question: Callable[[T], str] = _get_question
) -> tuple[list[T], list[T]]:
    """Split items into (those with an unseen question, those with a seen one), each in their order.

    seen: fingerprints of the seen questions.
    question: returns an item's question; by default its attribute `question`.
    """
    unseen_items: list[T] = []
    seen_items: list[T] = []
    for item in items:
        if seen and fingerprint_question(question(item)) in seen:
            seen_items.append(item)
        else:
            unseen_items.append(item)
    return unseen_items, seen_items


# --- 2. records of a reward model ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """The questions that a reward model was trained on."""

    fingerprints: frozenset[str] = frozenset()
    # Name of a source -> number of distinct questions from it.
    sources: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # False if the reward model was trained on unknown questions too.
    complete: bool = True

    def __or__(self, other: Record) -> Record:
        """The union of two records.  A source in both counts once, with the greater number."""
        sources = dict(self.sources)
        for name, count in other.sources.items():
            sources[name] = max(count, sources.get(name, count))
        return Record(self.fingerprints | other.fingerprints, sources, self.complete and other.complete)

    def encode(self) -> bytes:
        """The contents of the record's file."""
        content = {
            "version": VERSION,
            "what": "questions that this reward model was trained on: hashes of their normalised texts",
            "complete": self.complete,
            "sources": dict(sorted(self.sources.items())),
            "questions": len(self.fingerprints),
            "fingerprints": sorted(self.fingerprints),
        }
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes, path: str) -> Record:
        """Decode the contents that `encode` returned.  Raises ValueError for anything else.

        path: the file's name, with which the message begins.
        """
        try:
            return cls._from_json(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: {error}; copy it again from the source of the weights (without the file, the "
                "questions that the reward model saw are unknown)"
            ) from error

    @classmethod
    def _from_json(cls, content: Any) -> Record:
        """The record in a file's JSON.  Raises ValueError for missing fields, wrong types and counts."""
        _check_record_fields(content)
        for name, count in content["sources"].items():
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"source {name!r} has the count {count!r}")

        # A malformed fingerprint would match no question, and so hide a contaminated one.
        digits = 2 * _FINGERPRINT_BYTES
        for i, fingerprint in enumerate(content["fingerprints"]):
            if not (isinstance(fingerprint, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", fingerprint)):
                raise ValueError(f"fingerprint {i} is {fingerprint!r}, not {digits} hex digits")

        # The count detects a list that was shortened by hand or by a bad merge.
        fingerprints = frozenset(content["fingerprints"])
        if len(fingerprints) != content["questions"]:
            raise ValueError(
                f"it contains {len(fingerprints)} fingerprints, but its field 'questions' is "
                f"{content['questions']}"
            )
        return cls(fingerprints, content["sources"], content["complete"])


def _check_record_fields(content: Any) -> None:
    """Raise ValueError unless a record's JSON has all fields with the right types, and our version."""
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__}, not an object")
    fields = {"version": int, "complete": bool, "sources": dict, "questions": int, "fingerprints": list}
    for name, kind in fields.items():
        if name not in content:
            raise ValueError(f"field {name!r} is missing")
        if not isinstance(content[name], kind):
            raise ValueError(f"field {name!r} is a {type(content[name]).__name__}, not a {kind.__name__}")
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']}, and this code reads version {VERSION}")


def record_questions(questions: Iterable[str], source: str) -> Record:
    """Record the questions of one source, which may contain duplicates.  source: the source's name."""
    fingerprints = frozenset(fingerprint_question(q) for q in dict.fromkeys(questions))
    return Record(fingerprints, {source: len(fingerprints)} if fingerprints else {})


def write_record(directory: str | os.PathLike, seen: Record) -> None:
    """Write a record into the directory of a reward model's weights."""
    remote_files.write_atomically(remote_files.to_path(directory) / SEEN, seen.encode())


def read_record(weights: str | os.PathLike) -> Record | None:
    """Read the record beside weights, which are a local or remote directory or a hub id.

    None if there is no record: then the questions are unknown (or, for random weights, there are none).
    Raises ValueError with the file's name for a damaged record.
    """
    path = find_weights_file(os.fspath(weights), SEEN)
    return None if path is None else Record.decode(path.read_bytes(), str(path))


def has_trained_head(weights: str | os.PathLike) -> bool:
    """True if the config.json of weights names a sequence classifier.

    False for a missing or damaged file, which the loader of the weights reports.
    """
    path = find_weights_file(os.fspath(weights), "config.json")
    try:
        config = json.loads(path.read_bytes()) if path is not None else {}
        return any("ForSequenceClassification" in name for name in config["architectures"])
    except (ValueError, KeyError, TypeError):
        return False


def find_weights_file(weights: str, name: str) -> Path | None:
    """Find a local copy of a file beside weights; None if the file or the directory does not exist.

    weights: a local or remote directory, or a hub id.
    """
    if remote_files.is_remote(weights):
        try:
            path = remote_files.fetch_local(weights, (name,))
        except FileNotFoundError:
            return None
    else:
        path = Path(weights).expanduser()
    if (path / name).is_file():
        return path / name

    # A path that does not exist may be a hub id, owner/name.
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights):
        return None
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(weights, name))
    # huggingface_hub raises a dozen classes: unknown file, unknown id, offline.  The loader of the weights
    # asks the same hub and reports the error.
    except Exception:
        return None
