"""A byte-level BPE tokenizer rebuilt from the metadata of a GGUF file.

`read_tokenizer` makes a `tokenizers` backend from the tokens, their types, the merges and the name of the
pre-tokenizer, and returns it with the special tokens, the chat template and the end-of-sequence ids.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cooper_jax.model.gguf import read_metadata

_CONTROL, _USER_DEFINED = 3, 4  # token types

# Regexes that split text into words; merges are applied within a word only.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Name of the pre-tokenizer in the file -> (normaliser, whether digits are split first, regex).
_PRE = {
    "gpt-2": (None, False, _GPT2),
    "smollm": (None, True, _GPT2),
    "qwen2": ("NFC", False, _TIKTOKEN.replace("DIGITS", "")),
    "llama-bpe": (None, False, _TIKTOKEN.replace("DIGITS", "{1,3}")),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tokenizer of a GGUF file, as the parts from which a `transformers` tokenizer is made."""

    backend: Any  # tokenizers.Tokenizer
    special_tokens: dict[str, str]  # by transformers' names: bos_token, eos_token, ...
    chat_template: str | None
    eos_ids: tuple[int, ...]


def read_tokenizer(path: Path) -> Parts:
    """Read the tokenizer of a GGUF file.

    Raises ValueError for a damaged file, for a tokenizer that is not byte-level BPE, and for a pre-tokenizer
    that is not in `_PRE`.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    # A pre-tokenizer that is not in the table would split text differently than in training, without an
    # error.
    meta = {k.removeprefix("tokenizer.ggml."): v for k, v in read_metadata(path).items()}
    missing = {"model", "pre", "tokens", "token_type", "merges"} - meta.keys()
    if missing or meta["model"] != "gpt2" or meta["pre"] not in _PRE:
        if missing:
            found = f"no {', '.join(sorted(missing))}"
        else:
            found = f"model {meta['model']!r}, pre {meta['pre']!r}"
        raise ValueError(
            f"{path}: its tokenizer metadata have {found}; this reader knows model 'gpt2' with pre one of "
            f"{', '.join(map(repr, _PRE))}: name a directory with a tokenizer.json instead"
        )

    # A merge is stored as its two halves, separated by a space; a token's id is its index.
    tokens, types = meta["tokens"], meta["token_type"]
    normaliser, single_digits, regex = _PRE[meta["pre"]]
    merges = [tuple(m.split(" ", 1)) for m in meta["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise ValueError(
            f"{path}: {len(tokens)} tokens, {len(vocab)} different, {len(types)} types: must be equal"
        )

    # Llama 3 does not apply merges to words that are in the vocabulary as a whole.
    whole_words = meta["pre"] == "llama-bpe"
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    if normaliser is not None:
        backend.normalizer = getattr(normalizers, normaliser)()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    steps.append(pre_tokenizers.Split(Regex(regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()

    # Control tokens and user-defined ones (runs of spaces, tags) are matched in the text before the regex.
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])

    # Special tokens under the names of transformers.
    special = {}
    for name, gguf_name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if f"{gguf_name}_token_id" in meta:
            special[f"{name}_token"] = tokens[meta[f"{gguf_name}_token_id"]]

    # Llama 3 prepends bos to every text, and its files do not always say so.
    add_bos = meta["add_bos_token"] if "add_bos_token" in meta else whole_words
    if add_bos and "bos_token" in special:
        first = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, vocab[first])]
        )

    # Chat models have a second end token, of a turn (eot).
    template = "tokenizer.chat_template"
    eos_ids = tuple(meta[k] for k in ("eos_token_id", "eot_token_id") if k in meta)
    return Parts(backend, special, meta[template] if template in meta else None, eos_ids)
