"""Tokenizers: one interface to Hugging Face, GGUF and sentencepiece tokenizers.

1. `load_tokenizer_from` loads a tokenizer from a Hugging Face directory or hub id, a GGUF file (whose
   metadata contain the whole tokenizer), or a sentencepiece `.model`.  `train_sentencepiece` trains one for a
   model with random weights.
2. `encode` encodes **data** and never returns a control id: "<|im_end|>" in a problem or a completion is ten
   ordinary characters.  No token is added before or after.
3. `chat` encodes messages.  Control tokens that the *template* writes become control ids; control tokens in
   a message are data.  Text between two control ids is encoded in one piece, so for messages without control
   tokens the ids equal those of transformers' apply_chat_template.
4. `decode` returns text without special tokens.

Control tokens are the added tokens that are flagged special or spelt like a tag (`<|im_end|>`, `<tool_call>`,
`[INST]`).  Other added tokens (for example runs of spaces) are ordinary vocabulary.

Code that comes with a tokenizer is never executed; templates run in Jinja's sandbox.
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

from cooper_jax.model import chat_template, gguf_tokenizer, tokenizer_files, weight_files
from cooper_jax.model.json_object import read_json
from cooper_jax.runtime import remote_files

Message = chat_template.Message

_TAG = re.compile(r"[<\[]\S+[>\]]")

# Files that are downloaded for a hub id: no weights.
_HUB_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """An immutable tokenizer, made by `load_tokenizer_from` or `train_sentencepiece`."""

    source: str  # the argument of `load_tokenizer_from`, for messages
    vocab_size: int  # highest id + 1; a model's embedding may have more rows

    # Special ids.
    pad_id: int
    bos_id: int | None  # only if the model expects it before plain text
    eos_ids: tuple[int, ...]  # every id that ends a response
    control_ids: frozenset[int]  # never returned by `encode`
    control_texts: frozenset[str]  # the texts of these tokens

    # The library's part of the methods below.
    _encode: Callable[[str], list[int]]
    _offsets: Callable[[str], list[tuple[int, int]]]
    _decode: Callable[[list[int]], str]
    _chat: Callable[[Sequence[Message], bool, Mapping[str, Any]], list[int]]
    _save: Callable[[Path], object]

    def encode(self, text: str) -> list[int]:
        """Encode a piece of data: no control id, no bos, no eos."""
        return self._encode(text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the [start, end) characters of each token of `encode(text)`, ascending.

        A token that is only part of a character has the whole character's span.  A leading space may belong
        to no token.
        """
        return self._offsets(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text without special tokens; invalid UTF-8 becomes U+FFFD."""
        return self._decode([int(i) for i in ids])

    def chat(
        self, messages: Sequence[Message], fallback: bool, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Encode (role, content) messages with the model's chat template, up to the assistant's next turn.

        Args:
          fallback: for a Hugging Face tokenizer without a template.  True: its bos, then every content
            followed by a newline (the format of sentencepiece models, which have no roles); False: raises
            ValueError.
          variables: passed to the template, for example `{"enable_thinking": False}`.
        """
        return self._chat(messages, fallback, {} if variables is None else variables)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, from which `load_tokenizer_from(directory)` loads an equal one.

        Hugging Face tokenizers write the files of `transformers`, sentencepiece tokenizers `tokenizer.model`.
        The end-of-sequence ids are written to generation_config.json, unless the directory has one.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._save(directory)

        # transformers' tokenizer files have a single eos token; a model may end its responses with several.
        generation = directory / "generation_config.json"
        if not generation.exists():
            ends = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
            generation.write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")


def load_tokenizer_from(source: str) -> Tokenizer:
    """Load a tokenizer of any supported kind.

    Args:
      source: a directory, a hub id, FILE.model, FILE.gguf, the gs:// address of one of these, or
        "package:NAME/FILE.gguf".

    Raises ValueError that names the source and the fix.
    """
    path = weight_files.resolve_source(source, "tokenizer", (".model", ".gguf"), _HUB_FILES)
    if path.suffix == ".gguf":
        return _load_gguf(path, source)
    if path.suffix == ".model" and path.is_file():
        return _wrap_sentencepiece(path.read_bytes(), source)
    # Directories of Llama models have a tokenizer.model, too, but next to it the fast tokenizer's
    # tokenizer.json.
    if (path / "tokenizer.model").is_file() and not any(path.glob("tokenizer*.json")):
        return _wrap_sentencepiece((path / "tokenizer.model").read_bytes(), source)
    return _load_directory(path, source)


def train_sentencepiece(
    corpus: Iterable[str], path: str | Path | epath.Path, vocab_size: int, symbols: Sequence[str]
) -> Tokenizer:
    """Train a byte-pair sentencepiece model on `corpus`, write it to `path` (a `.model` file), and load it.

    The result depends only on the arguments.  Digits are always separate pieces.  Text is not changed (no
    normalisation, no dummy prefix, unseen characters as bytes), so decoding returns it exactly, except for
    U+2581, which sentencepiece cannot tell from a space.  Ids: 0 pad, 1 eos, 2 unk (never used); no bos.

    Args:
      vocab_size: an upper bound; a small corpus may not have that many merges.
      symbols: strings that are always one piece (this project's tags, "\\n"); " " keeps spaces separate
        from words.

    Raises ValueError for a path that is not a .model file, and for a vocabulary that is too small.
    """
    import sentencepiece

    path = remote_files.to_path(path)
    if path.suffix != ".model":
        raise ValueError(f"a sentencepiece model is written to a .model file, not to {path}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=[s.replace(" ", "\u2581") for s in symbols],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # One piece per digit, as in Qwen2.5's and SmolLM2's tokenizers.  A number is then split alike
            # everywhere in a text, so a small model can learn to compare two numbers.
            split_digits=True,
            byte_fallback=True,
            character_coverage=1.0,
            max_sentence_length=1 << 20,  # bytes; the default silently drops sentences longer than 4,192
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise ValueError(
            f"{path}: cannot train {vocab_size} pieces with {len(symbols)} symbols: {e}; give a larger "
            "vocab_size (bytes and control pieces alone take 259), or a corpus with text in it"
        ) from e

    path.parent.mkdir(parents=True, exist_ok=True)
    remote_files.write_atomically(path, model.getvalue())
    return load_tokenizer_from(str(path))


# --- sources of Hugging Face tokenizers --------------------------------------------------------------


def _load_directory(path: Path, source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    # Checked here, because the error of transformers would not name the flag to change.
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ValueError(
            f"tokenizer {source!r}: {path} holds no tokenizer.json; name another directory with "
            "--config.policy.tokenizer (or .reward, .assistant)"
        )
    tokenizer_files.check_files(path)
    eos_ids = tokenizer_files.read_eos_ids(path)
    with tokenizer_files.naming_the_file(path):
        hf = AutoTokenizer.from_pretrained(str(path), use_fast=True, trust_remote_code=False)
    tokenizer_files.check_added_tokens(path, hf.get_vocab())
    with tokenizer_files.naming_the_file(path, is_ours=True):
        return _wrap_hugging_face(hf, eos_ids, source)


def _load_gguf(path: Path, source: str) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    parts = gguf_tokenizer.read_tokenizer(path)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=parts.backend,
        chat_template=parts.chat_template,
        name_or_path=source,
        **parts.special_tokens,
    )
    return _wrap_hugging_face(hf, parts.eos_ids, source)


# --- Hugging Face ------------------------------------------------------------------------------------


def _wrap_hugging_face(hf: Any, eos_ids: Sequence[int], source: str) -> Tokenizer:
    """Wrap a `transformers` fast tokenizer; `eos_ids` are further end-of-sequence ids of the model."""
    # Slow tokenizers have no JSON and no offsets.
    if not hf.is_fast:
        raise ValueError(
            f"tokenizer {source!r} is a {type(hf).__name__}, not a fast one: give a tokenizer.json"
        )
    backend = hf.backend_tokenizer
    spec = json.loads(backend.to_str())

    control = {t["content"]: t for t in spec["added_tokens"] if t["special"] or _TAG.fullmatch(t["content"])}
    control_ids = frozenset(t["id"] for t in control.values())
    first_encoder, later_encoder = _make_checked_encoders(spec, control, source)

    # A length to which every text is padded or cut is for batches of other programs.
    backend.no_padding()
    backend.no_truncation()

    # Many tokenizers name a bos token; it counts only if the tokenizer itself prepends it.
    prefix = backend.encode("", add_special_tokens=True).ids
    bos = prefix[0] if prefix and prefix[0] == hf.bos_token_id else None
    all_eos_ids = _collect_eos_ids(hf, control, eos_ids, source)

    def encode(text: str) -> list[int]:
        return first_encoder.encode(text, add_special_tokens=False).ids

    def chat(messages: Sequence[Message], fallback: bool, variables: Mapping[str, Any]) -> list[int]:
        # A base model has no template.
        if not hf.chat_template:
            if fallback:
                return ([] if bos is None else [bos]) + encode(_join_messages(messages))
            raise ValueError(
                f"tokenizer {source!r} has no chat template: set --config.data.chat=False, or name another"
            )

        # The four steps that chat_template.py describes.
        hide, restore = chat_template.hide_control_tokens(control, [content for _, content in messages])
        hidden = [(role, hide(content)) for role, content in messages]
        rendered = chat_template.render_chat(hf, hidden, True, variables)

        # Everything but the first segment follows a control token.
        ids: list[int] = []
        for i, (text, token) in enumerate(chat_template.split_segments(rendered, control)):
            encoder = later_encoder if i else first_encoder
            ids += encoder.encode(restore(text), add_special_tokens=False).ids
            if token:
                ids.append(control[token]["id"])
        return ids

    return Tokenizer(
        source=source,
        vocab_size=max(hf.get_vocab().values()) + 1,
        pad_id=all_eos_ids[0] if hf.pad_token_id is None else hf.pad_token_id,
        bos_id=bos,
        eos_ids=all_eos_ids,
        control_ids=control_ids,
        control_texts=frozenset(control),
        _encode=encode,
        _offsets=lambda text: first_encoder.encode(text, add_special_tokens=False).offsets,
        _decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
        _chat=chat,
        _save=lambda directory: _save_hugging_face(hf, directory),
    )


def _make_checked_encoders(spec: dict[str, Any], control: Mapping[str, Any], source: str) -> tuple[Any, Any]:
    """Make the encoders of data, and check that no control token's text is encoded as a control id.

    Unigram and WordPiece models may have a control token among their ordinary pieces.
    """
    control_ids = {token["id"] for token in control.values()}
    first_encoder, later_encoder = chat_template.make_data_encoders(spec, control)
    for token in control:
        if not control_ids.isdisjoint(first_encoder.encode(token, add_special_tokens=False).ids):
            raise ValueError(
                f"tokenizer {source!r} reads {token!r} in data as a control token, since its model "
                "holds it as an ordinary piece: use a byte-pair tokenizer, or correct bos_token, eos_token, "
                "pad_token, unk_token and additional_special_tokens in its tokenizer_config.json"
            )
    return first_encoder, later_encoder


def _collect_eos_ids(
    hf: Any, control: Mapping[str, Any], eos_ids: Sequence[int], source: str
) -> tuple[int, ...]:
    """Collect every id that may end a response, without repeats; ValueError if there is none."""
    # The model's own, the tokenizer's, and the token with which the template ends the assistant's turn: an
    # instruction-tuned model may sample any of them.
    candidates = dict.fromkeys([*eos_ids, hf.eos_token_id, chat_template.find_turn_end(hf, control)])
    all_eos_ids = tuple(i for i in candidates if i is not None)
    if not all_eos_ids:
        raise ValueError(
            f"tokenizer {source!r} names no end token: set eos_token in its tokenizer_config.json"
        )
    # A response would never end.
    largest = max(hf.get_vocab().values())
    if beyond := [i for i in all_eos_ids if i > largest]:
        raise ValueError(
            f"tokenizer {source!r}: eos_token_id is {beyond[0]} in its generation_config.json or config.json: it "
            f"must be the id of one of the tokenizer's tokens, 0 to {largest}"
        )
    return all_eos_ids


def _save_hugging_face(hf: Any, directory: Path) -> None:
    """Write files that both transformers 4 and 5 load.

    tokenizer.json contains the whole tokenizer, so the general class can load it.  Version 5 writes a class
    name that version 4 does not know, and a list of further special tokens under a key that is a mapping in
    version 4.
    """
    hf.save_pretrained(str(directory))
    file = directory / "tokenizer_config.json"
    config = read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- sentencepiece -----------------------------------------------------------------------------------


def _join_messages(messages: Sequence[Message]) -> str:
    """Join the contents of messages, for a model without roles."""
    return "".join(content + "\n" for _, content in messages)


def _wrap_sentencepiece(blob: bytes, source: str) -> Tokenizer:
    """Wrap the contents of a .model file made by `train_sentencepiece`."""
    import sentencepiece

    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=blob)
    except RuntimeError as e:
        raise ValueError(f"tokenizer {source!r} is not a sentencepiece model: {e}") from e

    # Reject models that change text, as published models do.  The probe has spaces at both ends, two in a
    # row, a character outside any small corpus, and a newline.
    probe = " a  \u4e00\n "
    if sp.decode(sp.encode(probe)) != probe or sp.eos_id() < 0 or sp.pad_id() < 0:
        raise ValueError(
            f"tokenizer {source!r} alters text, or lacks an eos or pad piece: a .model file must come from "
            "train_sentencepiece; for a published model give the directory with its tokenizer.json"
        )

    def offsets(text: str) -> list[tuple[int, int]]:
        # Pieces are counted in bytes, because a byte piece is only part of a character.  sentencepiece treats
        # U+2581 as a space, but the two have different numbers of bytes.
        text = text.replace("\u2581", " ")
        char_of_byte: list[int] = []
        for i, char in enumerate(text):
            char_of_byte += [i] * len(char.encode())

        spans, position = [], 0  # in bytes
        for i in sp.encode(text):
            size = 1 if sp.is_byte(i) else len(sp.id_to_piece(i).replace("\u2581", " ").encode())
            spans.append((char_of_byte[position], char_of_byte[position + size - 1] + 1))
            position += size
        return spans

    control_ids = [i for i in range(sp.vocab_size()) if sp.is_control(i) or sp.is_unknown(i)]
    return Tokenizer(
        source=source,
        vocab_size=sp.vocab_size(),
        pad_id=sp.pad_id(),
        bos_id=None,
        eos_ids=(sp.eos_id(),),
        control_ids=frozenset(control_ids),
        control_texts=frozenset(sp.id_to_piece(i) for i in control_ids),
        _encode=sp.encode,
        _offsets=offsets,
        _decode=sp.decode,
        _chat=lambda messages, fallback, variables: sp.encode(_join_messages(messages)),
        _save=lambda directory: (directory / "tokenizer.model").write_bytes(blob),
    )
