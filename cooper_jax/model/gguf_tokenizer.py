"""A byte-level BPE tokenizer rebuilt from the metadata of a GGUF file.

`read_tokenizer` makes a `tokenizers` backend from the tokens, their types, the merges and the name of the
pre-tokenizer, and returns it with the special tokens, the chat template and the end-of-sequence ids.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cooper_jax.model.file_schema import GgufTemplate, GgufTokenIds, GgufTokenizer
from cooper_jax.model.gguf import read_metadata
from cooper_jax.settings.value_rules import list_required, read_record, show_value

_PREFIX = "tokenizer.ggml."
_LLAMA3 = "llama-bpe"  # the pre-tokenizer of Llama 3

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
    _LLAMA3: (None, False, _TIKTOKEN.replace("DIGITS", "{1,3}")),
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
    from tokenizers import processors

    metadata = read_metadata(path)
    fields = _read_fields(metadata, path)
    template = read_record(GgufTemplate, metadata, str(path)).chat_template
    ids = _read_ids(fields, path)
    backend = _make_backend(fields, path)

    # Special tokens under the names of transformers.
    special = {}
    for name, gguf_name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = ids[f"{gguf_name}_token_id"]
        if index is not None:
            special[f"{name}_token"] = fields.tokens[index]

    # Llama 3 prepends bos to every text, and its files do not always say so.
    add_bos = fields.pre == _LLAMA3 if fields.add_bos_token is None else fields.add_bos_token
    if add_bos and "bos_token" in special:
        first = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, ids["bos_token_id"])]
        )

    # Chat models have a second end token, of a turn (eot).
    eos_ids = tuple(i for i in (fields.eos_token_id, fields.eot_token_id) if i is not None)
    return Parts(backend, special, template, eos_ids)


def _read_fields(metadata: dict[str, Any], path: Path) -> GgufTokenizer:
    """Read the tokenizer's metadata; raises ValueError for kinds of tokenizers that are not read."""
    # A pre-tokenizer that is not in the table would split text differently than in training, without an
    # error.
    meta = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
    missing = [key for key in list_required(GgufTokenizer) if key not in meta]
    if missing or meta["model"] != "gpt2" or meta["pre"] not in list(_PRE):
        if missing:
            found = f"no {', '.join(sorted(missing))}"
        else:
            found = f"model {show_value(meta['model'])}, pre {show_value(meta['pre'])}"
        raise ValueError(
            f"{path}: its tokenizer metadata have {found}; this reader knows model 'gpt2' with pre one of "
            f"{', '.join(map(repr, _PRE))}: name a directory with a tokenizer.json instead"
        )
    fields = read_record(GgufTokenizer, meta, str(path), _PREFIX)

    tokens, different = len(fields.tokens), len(set(fields.tokens))
    if not tokens == different == len(fields.token_type):
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens has {tokens} tokens, {different} different, and "
            f"tokenizer.ggml.token_type {len(fields.token_type)} types: must be equal"
        )
    return fields


def _read_ids(fields: GgufTokenizer, path: Path) -> dict[str, int | None]:
    """The ids of special tokens; raises ValueError for one that is no token's."""
    ids = {field.name: getattr(fields, field.name) for field in dataclasses.fields(GgufTokenIds)}
    for name, value in ids.items():
        if value is not None and value >= len(fields.tokens):
            raise ValueError(
                f"{path}: {_PREFIX}{name} is {value}: it must be the id of one of the {len(fields.tokens)} tokens"
            )
    return ids


def _make_backend(fields: GgufTokenizer, path: Path) -> Any:
    """Make the `tokenizers` backend, without bos."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # A merge is stored as its two halves, separated by a space; a token's id is its index.
    normaliser, single_digits, regex = _PRE[fields.pre]
    merges = [(first, second) for first, _, second in (m.partition(" ") for m in fields.merges)]
    vocab = {token: i for i, token in enumerate(fields.tokens)}

    # Llama 3 does not apply merges to words that are in the vocabulary as a whole.
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=fields.pre == _LLAMA3)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path}: {_PREFIX}merges: {' '.join(str(error).split())}") from error
    backend = Tokenizer(model)
    if normaliser is not None:
        backend.normalizer = getattr(normalizers, normaliser)()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    steps.append(pre_tokenizers.Split(Regex(regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()

    # Control tokens and user-defined ones (runs of spaces, tags) are matched in the text before the regex.
    for token, kind in zip(fields.tokens, fields.token_type, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    return backend
