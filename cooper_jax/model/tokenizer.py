"""Text to token ids and back: one small face over two kinds of tokenizer.

1. `load(source)` finds a tokenizer: a Hugging Face directory or hub id, a GGUF file (its metadata hold the
   whole tokenizer), or a sentencepiece `.model`; `train_sentencepiece` makes one for a model from scratch.
2. `encode` reads **data**.  Whatever the text says, no control id comes out: "<|im_end|>" in a problem or a
   completion is ten ordinary characters.  Nothing is added in front or behind.
3. `chat` reads messages.  Control tokens that the *template* writes are real ids; those that stand in a
   message are data.  What lies between two real ones is encoded in one go, so for harmless messages the ids
   equal `transformers`' apply_chat_template.
4. `decode` returns text and leaves special tokens out.

Which added tokens are control tokens: all that are flagged special, and those that are spelt like a tag
(`<|im_end|>`, `<tool_call>`, `[INST]`).  Others (runs of spaces, say) are ordinary
vocabulary and stay in use.

Code that comes with a tokenizer is never run; templates run in Jinja's sandbox.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from cooper_jax.model import chat_template, gguf_tokenizer, weight_files
from cooper_jax.runtime import remote_files

Message = chat_template.Message

_TAG = re.compile(r"[<\[]\S+[>\]]")
_HUB_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_HUB_FILES += ("chat_template*", "config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """An immutable tokenizer; make one with `load` or `train_sentencepiece`."""

    source: str
    vocab_size: int  # highest id + 1; a model's embedding may have more rows
    pad_id: int
    bos_id: int | None  # only where the model wants it in front of plain text
    eos_ids: tuple[int, ...]  # every id that ends a response
    control_ids: frozenset[int]  # never the outcome of `encode`
    _encode: Callable[[str], list[int]]
    _offsets: Callable[[str], list[tuple[int, int]]]
    _decode: Callable[[list[int]], str]
    _chat: Callable[[Sequence[Message], bool, Mapping[str, Any]], list[int]]
    _save: Callable[[Path], None]

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of data: no control id, no bos, no eos."""
        return self._encode(text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The [start, end) characters of each token of `encode(text)`, ascending; a token that is only part
        of a character has the whole character's span, and a leading space may belong to no token."""
        return self._offsets(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._decode([int(i) for i in ids])

    def chat(
        self, messages: Sequence[Message], fallback: bool, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids of (role, content) messages in the model's chat template, ready for the assistant's turn.

        `variables` go to the template (`{"enable_thinking": False}`).  A sentencepiece model knows no roles:
        its format is each content followed by a newline.  A Hugging Face tokenizer without a template takes
        the same plain format, after its bos, if `fallback`; else ValueError.
        """
        return self._chat(messages, fallback, {} if variables is None else variables)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files; `load(directory)` gives the same one.

        Hugging Face kinds leave what `transformers` reads, sentencepiece leaves `tokenizer.model`.  The end
        ids go to generation_config.json, unless the directory already has one.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._save(directory)
        generation = directory / "generation_config.json"
        if not generation.exists():
            ends = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
            generation.write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")


def load_tokenizer_from(source: str) -> Tokenizer:
    """A tokenizer from a directory, a hub id, FILE.model, FILE.gguf, an address (gs://...) of one of these, or
    "package:NAME/FILE.gguf".

    Raises ValueError that names what was looked for, and the fix.
    """
    path = weight_files.resolve_source(source, "tokenizer", (".model", ".gguf"), _HUB_FILES)
    if path.suffix == ".gguf":
        return _gguf(path, source)
    if path.suffix == ".model" and path.is_file():
        return _sentencepiece(path.read_bytes(), source)
    if (path / "tokenizer.model").is_file() and not any(path.glob("tokenizer*.json")):
        return _sentencepiece((path / "tokenizer.model").read_bytes(), source)
    return _directory(path, source)


def train_sentencepiece(
    corpus: Iterable[str], path: str | Path | epath.Path, vocab_size: int, symbols: Sequence[str]
) -> Tokenizer:
    """Train a byte-pair sentencepiece model on `corpus`, write it to `path` (a `.model` file), and load it.

    The result depends on the arguments alone.  `symbols` are one piece each wherever they occur (our tags,
    "\\n"); a symbol " " keeps spaces apart from words; digits are always pieces of their own.  Text is taken as
    it is (no normalisation, no dummy prefix, unseen characters as bytes), so decoding gives it back exactly;
    the one exception is U+2581, which sentencepiece cannot tell from a space.  `vocab_size` is an upper
    bound: a small corpus may not have that many merges.  Ids: 0 pad, 1 eos, 2 unk (never used); no bos.
    """
    import sentencepiece

    path = remote_files.to_path(path)
    if path.suffix != ".model":
        raise ValueError(f"a sentencepiece model is written to a .model file, not to {path}")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=[s.replace(" ", "\u2581") for s in symbols],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # As Qwen2.5's and SmolLM2's tokenizers do: ten symbols in place of hundreds of numbers, and a number
            # is spelt alike at the start of a text and within it, so that a small model learns to compare two.
            split_digits=True,
            byte_fallback=True,
            character_coverage=1.0,
            max_sentence_length=1 << 20,  # bytes; the default silently drops whatever is longer than 4,192
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise ValueError(
            f"{path}: cannot train {vocab_size} pieces with {len(symbols)} symbols: {e}; give a larger vocab_size "
            "(bytes and control pieces alone take 259), or a corpus with text in it"
        ) from e
    path.parent.mkdir(parents=True, exist_ok=True)
    remote_files.write_atomically(path, out.getvalue())
    return load_tokenizer_from(str(path))


# --- where tokenizers come from ----------------------------------------------------------------------


def _directory(path: Path, source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ValueError(
            f"tokenizer {source!r}: {path} holds no tokenizer.json; name another directory with "
            "--config.policy.tokenizer (or .reward, .assistant)"
        )
    try:
        hf = AutoTokenizer.from_pretrained(str(path), use_fast=True, trust_remote_code=False)
    except ImportError:  # a package is missing: that is not the directory's fault
        raise
    except Exception as e:  # whatever a damaged or foreign file makes it raise
        raise ValueError(f"tokenizer {source!r}: transformers cannot read {path}: {e}") from e
    return _hugging_face(hf, _generation_eos(path), source)


def _generation_eos(path: Path) -> list[int]:
    """The end ids in generation_config.json, or in config.json where that is absent."""
    config = path / "config.json"
    found = weight_files.read_generation_config(
        path, weight_files.read_json(config) if config.is_file() else {}
    )
    ends = found["eos_token_id"] if "eos_token_id" in found else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _gguf(path: Path, source: str) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    parts = gguf_tokenizer.read_tokenizer(path)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=parts.backend, chat_template=parts.chat_template, **parts.special_tokens
    )
    return _hugging_face(hf, parts.eos_ids, source)


# --- Hugging Face ------------------------------------------------------------------------------------


def _hugging_face(hf, eos: Sequence[int], source: str) -> Tokenizer:
    """The face of a `transformers` fast tokenizer; `eos` are end ids known from elsewhere."""
    if not hf.is_fast:
        raise ValueError(
            f"tokenizer {source!r} is a {type(hf).__name__}, not a fast one: give a tokenizer.json"
        )
    backend = hf.backend_tokenizer
    spec = json.loads(backend.to_str())
    control = {t["content"]: t for t in spec["added_tokens"] if t["special"] or _TAG.fullmatch(t["content"])}
    control_ids = frozenset(t["id"] for t in control.values())
    first, inner = chat_template.make_data_encoders(spec, control)
    for token in control:
        if not control_ids.isdisjoint(first.encode(token, add_special_tokens=False).ids):
            raise ValueError(
                f"tokenizer {source!r} reads {token!r} in data as a control token, since its model "
                "holds it as an ordinary piece: use a byte-pair tokenizer"
            )
    opening = backend.encode("", add_special_tokens=True).ids
    bos = opening[0] if opening and opening[0] == hf.bos_token_id else None
    ends = tuple(
        i
        for i in dict.fromkeys([*eos, hf.eos_token_id, chat_template.find_turn_end(hf, control)])
        if i is not None
    )
    if not ends:
        raise ValueError(
            f"tokenizer {source!r} names no end token: set eos_token in its tokenizer_config.json"
        )

    def encode(text: str) -> list[int]:
        return first.encode(text, add_special_tokens=False).ids

    def chat(messages: Sequence[Message], fallback: bool, variables: Mapping[str, Any]) -> list[int]:
        if not hf.chat_template:
            if fallback:
                return ([] if bos is None else [bos]) + encode(_plain(messages))
            raise ValueError(
                f"tokenizer {source!r} has no chat template: set --config.data.chat=False, or name another"
            )
        hide, restore = chat_template.hide_control_tokens(control, [content for _, content in messages])
        hidden = [(role, hide(content)) for role, content in messages]
        ids: list[int] = []
        for i, (text, token) in enumerate(
            chat_template.split_segments(chat_template.render_chat(hf, hidden, True, variables), control)
        ):
            ids += (inner if i else first).encode(restore(text), add_special_tokens=False).ids
            ids += [control[token]["id"]] if token else []
        return ids

    return Tokenizer(
        source=source,
        vocab_size=max(hf.get_vocab().values()) + 1,
        pad_id=ends[0] if hf.pad_token_id is None else hf.pad_token_id,
        bos_id=bos,
        eos_ids=ends,
        control_ids=control_ids,
        _encode=encode,
        _offsets=lambda text: first.encode(text, add_special_tokens=False).offsets,
        _decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
        _chat=chat,
        _save=lambda directory: _save_hugging_face(hf, directory),
    )


def _save_hugging_face(hf, directory: Path) -> None:
    """What transformers 4 and 5 both load.

    tokenizer.json holds the whole tokenizer, so the general class reads it.  Version 5 calls that class by a name
    that version 4 does not know, and lists further special tokens under a key that version 4 takes for a mapping.
    """
    hf.save_pretrained(str(directory))
    file = directory / "tokenizer_config.json"
    config = weight_files.read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- sentencepiece -----------------------------------------------------------------------------------


def _plain(messages: Sequence[Message]) -> str:
    """Messages for a model that knows no roles."""
    return "".join(content + "\n" for _, content in messages)


def _sentencepiece(blob: bytes, source: str) -> Tokenizer:
    import sentencepiece

    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=blob)
    except RuntimeError as e:
        raise ValueError(f"tokenizer {source!r} is not a sentencepiece model: {e}") from e
    probe = " a  \u4e00\n "
    if sp.decode(sp.encode(probe)) != probe or sp.eos_id() < 0 or sp.pad_id() < 0:
        raise ValueError(
            f"tokenizer {source!r} alters text, or lacks an eos or pad piece: a .model file must come from "
            "train_sentencepiece; for a published model give the directory with its tokenizer.json"
        )

    def offsets(text: str) -> list[tuple[int, int]]:
        text = text.replace(
            "\u2581", " "
        )  # sentencepiece takes the two for one, and their bytes must count alike
        chars = [i for i, c in enumerate(text) for _ in c.encode()]  # byte -> character
        spans, at = [], 0
        for i in sp.encode(text):
            size = 1 if sp.is_byte(i) else len(sp.id_to_piece(i).replace("\u2581", " ").encode())
            spans.append((chars[at], chars[at + size - 1] + 1))
            at += size
        return spans

    return Tokenizer(
        source=source,
        vocab_size=sp.vocab_size(),
        pad_id=sp.pad_id(),
        bos_id=None,
        eos_ids=(sp.eos_id(),),
        control_ids=frozenset(i for i in range(sp.vocab_size()) if sp.is_control(i) or sp.is_unknown(i)),
        _encode=sp.encode,
        _offsets=offsets,
        _decode=sp.decode,
        _chat=lambda messages, fallback, variables: sp.encode(_plain(messages)),
        _save=lambda directory: (directory / "tokenizer.model").write_bytes(blob),
    )
