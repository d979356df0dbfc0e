r"""Which questions a reward model has seen, and which of an evaluation set are among them.

  1. `normalise` reduces a question to what makes it that question: layout, white space, case, LaTeX spacing and
     the punctuation of prose go; numbers, operators and words stay.  A hash of that is its `fingerprint`.
  2. `write_record` keeps beside a reward model's weights the fingerprints of all questions that it was trained
     on; `read_record` finds them there.
  3. `split` takes the questions that were seen out of an evaluation set.

Two questions are one where their normalised texts are equal.  On the data sets that this was measured on nothing
closer than that is left to find (tests/test_overlap.py): what shares most of its words is another question.
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

SEEN = "seen_questions.json"
# Of the file and of `normalise` together: fingerprints of another version cannot be compared, so whoever changes
# what `normalise` gives raises this.
VERSION = 1
_BYTES = 16  # of a fingerprint

T = TypeVar("T")

# --- 1. questions -------------------------------------------------------------------------------------------

# "Please reason step by step, and put your final answer within \boxed{}." at the end.
_INSTRUCTION = re.compile(
    r"(?:\b(?:please|let's) (?:think|reason) step by step[.,]?)?[^\n.?!]*\banswer\b[^\n.?!]*\\boxed\{\s*\}[^\n]*\Z"
)
_RESPELLED = (
    (re.compile(r"[‐‑‒–—―−]"), "-"),
    (re.compile(r"[‘’′`]"), "'"),
    (re.compile(r'[“”"]|\'\''), ""),
    (re.compile(r"\\begin\{problem\}|\\end\{problem\}"), " "),
    (re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(le|ge|ne)q(?![a-z])"), r"\\\1"),
    (
        re.compile(
            r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|noindent|qquad|quad|newline)(?![a-z])"
        ),
        " ",
    ),
    (re.compile(r"(?<=\d)(?:,\\!|\\,|\{,\}|,)\s?(?=\d{3}(?!\d))"), ""),  # thousands
    (re.compile(r"\\\\|\\[,;:! ()\[\]]|~"), " "),
    (re.compile(r"\\?\$"), ""),
    (re.compile(r"\\([%#&_])"), r"\1"),
    # LaTeX reads \frac12 and \frac{1}{2} alike, and x^2 and x^{2}; \frac{1}{23} keeps its braces.
    (re.compile(r"\{\s*(\w)\s*\}"), r"\1"),
    # Sentences end and pause in many ways; between digits a mark is part of a number or a ratio.
    (re.compile(r"[.,:;?](?!(?<=\d.)\d)"), " "),
    (re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})"), " "),  # two-digit
    (re.compile(r"(?<=\d)\s+(?=\d)"), "\x00"),  # 1 23 is not 12 3
    (re.compile(r"\s+"), ""),
    (re.compile("\x00"), " "),
)
_SUPERSCRIPTS = {ord(c): f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}  # NFKC would write x² as x2


def normalise_question(question: str) -> str:
    """What makes a question that question, as text without white space (but between two digits)."""
    text = unicodedata.normalize("NFKC", question.translate(_SUPERSCRIPTS)).casefold()
    text = "".join(
        c for c in text if unicodedata.category(c) != "Cf"
    ).strip()  # soft hyphens, byte order marks
    text = _INSTRUCTION.sub("", text) or text
    out = text
    for pattern, instead in _RESPELLED:
        out = pattern.sub(instead, out)
    return out or text  # nothing but punctuation


@functools.lru_cache(maxsize=1 << 16)  # a data set is counted, split and recorded
def fingerprint_question(question: str) -> str:
    """32 hex digits: a hash of the normalised question."""
    return hashlib.blake2b(
        normalise_question(question).encode("utf-8", "surrogatepass"), digest_size=_BYTES
    ).hexdigest()


def split_by_seen(
    items: Sequence[T], seen: frozenset[str], question: Callable[[T], str] = lambda x: x.question
) -> tuple[list[T], list[T]]:
    """(items whose question was not seen, items whose question was), each in the order given."""
    kept: list[T] = []
    dropped: list[T] = []
    for item in items:
        (dropped if seen and fingerprint_question(question(item)) in seen else kept).append(item)
    return kept, dropped


# --- 2. what a reward model saw -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """Questions that a reward model was trained on."""

    fingerprints: frozenset[str] = frozenset()
    sources: Mapping[str, int] = dataclasses.field(default_factory=dict)  # name -> distinct questions from it
    complete: bool = True  # False: it was trained on others too, of which nothing is known

    def __or__(self, other: Record) -> Record:
        return Record(
            self.fingerprints | other.fingerprints,
            {
                name: max(r.sources[name] for r in (self, other) if name in r.sources)
                for name in (*self.sources, *other.sources)
            },
            self.complete and other.complete,
        )

    def encode(self) -> bytes:
        """The file's contents."""
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
    def decode(cls, content: bytes, where: str) -> Record:
        """Raises ValueError, beginning with `where`, for what `encode` did not write."""
        try:
            return cls._checked(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: {error}; copy it again from where the weights came from (without the file, what the "
                "reward model saw is unknown)"
            ) from error

    @classmethod
    def _checked(cls, content: Any) -> Record:
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        fields = {"version": int, "complete": bool, "sources": dict, "questions": int, "fingerprints": list}
        for name, kind in fields.items():
            if name not in content:
                raise ValueError(f"field {name!r} is missing")
            if not isinstance(content[name], kind):
                raise ValueError(f"field {name!r} is a {type(content[name]).__name__}, not a {kind.__name__}")
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}, and this code reads version {VERSION}")
        for name, count in content["sources"].items():
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"source {name!r} has the count {count!r}")
        found = content["fingerprints"]
        for i, x in enumerate(found):
            if not (isinstance(x, str) and re.fullmatch(rf"[0-9a-f]{{{2 * _BYTES}}}", x)):
                raise ValueError(f"fingerprint {i} is {x!r}, not {2 * _BYTES} hex digits")
        if len(set(found)) != content["questions"]:
            raise ValueError(
                f"it holds {len(set(found))} fingerprints, and says that there are {content['questions']}"
            )
        return cls(frozenset(found), content["sources"], content["complete"])


def record_questions(questions: Iterable[str], source: str) -> Record:
    """Of the questions of one source, which may name some of them many times."""
    found = frozenset(fingerprint_question(q) for q in dict.fromkeys(questions))
    return Record(found, {source: len(found)} if found else {})


def write_record(directory: str | os.PathLike, seen: Record) -> None:
    """Write the record of a reward model's training beside its weights."""
    remote_files.write_atomically(remote_files.to_path(directory) / SEEN, seen.encode())


def read_record(weights: str | os.PathLike) -> Record | None:
    """The record beside weights: a directory, here or at an address, or a hub id.

    None where there is none: what such weights saw is unknown (or, for weights made at random, nothing).  Raises
    ValueError for a damaged record, naming the file.
    """
    path = _find(os.fspath(weights), SEEN)
    return None if path is None else Record.decode(path.read_bytes(), str(path))


def has_trained_head(weights: str | os.PathLike) -> bool:
    """Whether weights are a sequence classifier's, by their config.json; what is damaged is another's to report."""
    path = _find(os.fspath(weights), "config.json")
    try:
        config = json.loads(path.read_bytes()) if path is not None else {}
        return any("ForSequenceClassification" in name for name in config["architectures"])
    except (ValueError, KeyError, TypeError):
        return False


def _find(weights: str, name: str) -> Path | None:
    """A file of a weights directory; None where it has no such file, or there is no such directory."""
    if remote_files.is_remote(weights):
        try:
            path = remote_files.fetch_local(weights, (name,))
        except FileNotFoundError:
            return None
    else:
        path = Path(weights).expanduser()
    if (path / name).is_file():
        return path / name
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights):
        return None
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(weights, name))
    except Exception:  # a dozen kinds: no such file, no such id, offline; the weights' own loader says which
        return None
