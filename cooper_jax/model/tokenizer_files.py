"""The files of a Hugging Face tokenizer, checked before `transformers` reads them.

`check_files` compares them with file_schema.py.  What is left to the libraries (the rules of tokenizer.json) can
still be wrong: `naming_the_file` turns their errors into one line that names the file and, if it can be found, the
part of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cooper_jax.model import weight_files
from cooper_jax.model.config import find_config_problems
from cooper_jax.model.file_schema import (
    VOCAB_FILE,
    BytePairModel,
    ChatTemplateFile,
    SpecialTokensFile,
    TemplateRules,
    TokenizerConfigFile,
    TokenizerFile,
)
from cooper_jax.model.json_object import read_json
from cooper_jax.settings.value_rules import find_problem, find_record_problems, raise_problems, show_value

_MESSAGE = 300  # characters of a library's message that are shown

# File -> the record of its fields.
_RECORDS: dict[str, type] = {
    "tokenizer_config.json": TokenizerConfigFile,
    "special_tokens_map.json": SpecialTokensFile,
    "chat_template.json": ChatTemplateFile,
    "tokenizer.json": TokenizerFile,
}
# Fields that name tokens with a meaning of their own.
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Files that are a mapping of tokens to ids as a whole.
_VOCABULARIES = ("vocab.json", "added_tokens.json")
_TEXTS = ("chat_template.jinja", "merges.txt")

# Parts of tokenizer.json that the tokenizers library reads alone, and that may be null.
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "truncation")


def check_files(path: Path) -> None:
    """Raise ValueError, in one line that names file and field, for files that are no tokenizer's."""
    files = {name: read_json(path / name) for name in _RECORDS if (path / name).is_file()}
    for name, content in files.items():
        raise_problems(str(path / name), find_record_problems(_RECORDS[name], content))
    for name in _VOCABULARIES:
        if (path / name).is_file() and (tokens := read_json(path / name)):
            problem = find_problem("it", tokens, VOCAB_FILE) or _find_equal_ids("it", tokens)
            raise_problems(str(path / name), [problem] if problem else [])
    for name in _TEXTS:
        if (path / name).is_file():
            try:
                (path / name).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path / name}: not UTF-8 (byte {error.start})") from error

    # transformers reads it to choose the tokenizer's class.
    if (config := path / "config.json").is_file():
        raise_problems(str(config), find_config_problems(read_json(config)))
    if "tokenizer.json" in files:
        _check_together(path, files)


def _check_together(path: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Raise ValueError for tokens that tokenizer.json does not have.

    transformers would add them, with ids beyond the vocabulary that the model was trained with.
    """
    spec = files["tokenizer.json"]
    vocab = spec["model"]["vocab"]
    added = {token["id"]: token["content"] for token in spec.get("added_tokens") or []}
    problems = []
    if isinstance(vocab, dict):
        problems += [problem for problem in [_find_equal_ids("model.vocab", vocab)] if problem]
        ids = vocab | {content: number for number, content in added.items()}
        problems += _find_template_problems(spec.get("post_processor"), ids)
    if spec["model"].get("type", "BPE") == "BPE":
        problems += find_record_problems(BytePairModel, spec["model"], "model.")
    raise_problems(str(path / "tokenizer.json"), problems)

    config = files.get("tokenizer_config.json", {})
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        listed = {int(number): token["content"] for number, token in decoder.items()}
        _check_listed(path, listed, added, vocab)
        added |= listed
    known = {*added.values(), *(vocab if isinstance(vocab, dict) else [piece[0] for piece in vocab])}
    if (path / "added_tokens.json").is_file():
        known |= read_json(path / "added_tokens.json").keys()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for field, content in _list_special(files.get(name, {})):
            if content and content not in known:
                raise ValueError(
                    f"{path / name}: {field} is {show_value(content)}: it must be a token of tokenizer.json"
                )


def _check_listed(path: Path, listed: Mapping[int, str], added: Mapping[int, str], vocab: Any) -> None:
    """Raise ValueError if `added_tokens_decoder` has another token for an id, or another id for a token.

    It may leave tokens out, and many files have an empty one: see `check_added_tokens`.
    """
    pieces = vocab if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
    id_of = {content: number for number, content in added.items()}
    for number, content in listed.items():
        token = added.get(number, content)
        right = id_of.get(content, pieces.get(content, number))
        if token != content or right != number:
            found = (
                f"{show_value(token)} for {number}"
                if token != content
                else f"{right} for {show_value(content)}"
            )
            raise ValueError(
                f"{path / 'tokenizer_config.json'}: added_tokens_decoder has {show_value(content)} for {number}, "
                f"and {path / 'tokenizer.json'} has {found}: both must be equal"
            )


def check_added_tokens(path: Path, vocab: Mapping[str, int]) -> None:
    """Raise ValueError if transformers dropped added tokens of tokenizer.json, or gave them other ids.

    Some of its classes (Qwen2Tokenizer) take all added tokens from `added_tokens_decoder` of
    tokenizer_config.json, if there is one.  vocab: of the tokenizer that it made.
    """
    file, config = path / "tokenizer.json", path / "tokenizer_config.json"
    if not file.is_file() or not config.is_file() or read_json(config).get("added_tokens_decoder") is None:
        return
    for token in read_json(file).get("added_tokens") or []:
        found = vocab.get(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"{config}: with its added_tokens_decoder transformers reads "
                f"{show_value(token['content'])} as {found}, and {file}: added_tokens has {token['id']}: give it "
                "all added tokens, or remove it"
            )


def _list_special(file: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List (field, text) of the special tokens that a file names."""
    found = [(field, file.get(field)) for field in _SPECIAL]
    found += [("additional_special_tokens", token) for token in file.get("additional_special_tokens") or []]
    return [(field, token["content"] if isinstance(token, dict) else token or "") for field, token in found]


def _find_template_problems(rules: Any, ids: Mapping[str, int]) -> list[str]:
    """Write messages for a `post_processor` whose special tokens are not those of the vocabulary (`ids`)."""
    if not isinstance(rules, dict):
        return []  # null, or what the library refuses
    if isinstance(inner := rules.get("processors"), list):
        return [problem for rule in inner for problem in _find_template_problems(rule, ids)]
    if rules.get("type") != "TemplateProcessing":
        return []
    name = "post_processor."
    problems = find_record_problems(TemplateRules, rules, name)
    if problems:
        return problems
    for token, part in rules["special_tokens"].items():
        if [ids.get(text) for text in part["tokens"]] != part["ids"]:
            problems.append(
                f"{name}special_tokens[{show_value(token)}].ids is {show_value(part['ids'])}: it must be the ids "
                f"of {show_value(part['tokens'])}"
            )
    for item in rules["single"]:
        token = item.get("SpecialToken") if isinstance(item, dict) else None
        if isinstance(token, dict) and token.get("id") not in list(rules["special_tokens"]):
            problems.append(
                f"{name}single has SpecialToken.id {show_value(token.get('id'))}: it must be one of special_tokens"
            )
    return problems


def _find_equal_ids(name: str, vocab: Mapping[str, int]) -> str | None:
    """Write a message if two tokens of a vocabulary have one id."""
    token_of: dict[int, str] = {}
    if len(set(vocab.values())) == len(vocab):
        return None
    for token, number in vocab.items():
        other = token_of.setdefault(number, token)
        if other != token:
            return f"{name} has {number} for {show_value(other)} and {show_value(token)}: ids must differ"
    return None


def read_eos_ids(path: Path) -> list[int]:
    """Read the end-of-sequence ids from generation_config.json, or from config.json if there is none."""
    config = path / "config.json"
    hf_config = read_json(config) if config.is_file() else {}
    eos = weight_files.read_generation_config(path, hf_config).get("eos_token_id")
    if eos is None:
        return []
    # One id, or a list of ids.
    return [eos] if isinstance(eos, int) else list(eos)


@contextlib.contextmanager
def naming_the_file(path: Path, is_ours: bool = False) -> Iterator[None]:
    """Context in which the libraries read a directory: their errors become one ValueError, in one line.

    is_ours: errors of the class ValueError are our own, and name the file.
    """
    try:
        yield
    except ImportError:
        # A package is missing, which is not the directory's fault.
        raise
    except BaseException as error:
        # Damaged files, and files of another kind, raise errors of many types.  An error within the tokenizers
        # library itself (a panic) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_ours and isinstance(error, ValueError):
            raise
        text = " ".join("".join(c if c.isprintable() else " " for c in str(error)[:_MESSAGE]).split())
        raise ValueError(f"{_find_file(path)}: transformers cannot read it: {text}") from error


def _find_file(path: Path) -> str:
    """Name config.json if it is the cause; else the part of tokenizer.json without which the library reads it."""
    from transformers import AutoConfig

    if (path / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        except Exception:  # of any type; the message is that of the error that is being described
            return str(path / "config.json")
    file = path / "tokenizer.json"
    if not file.is_file():
        return str(path)
    spec = read_json(file)
    if _can_be_read(spec):
        return str(path)
    for part in _PARTS:
        if spec.get(part) is not None and _can_be_read(spec | {part: None}):
            return f"{file}: {part}"
    if _can_be_read(spec | {"added_tokens": []}):
        return f"{file}: added_tokens"
    return f"{file}: model"


def _can_be_read(spec: dict[str, Any]) -> bool:
    """True if the tokenizers library makes a tokenizer of the contents of a tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return False
    return True
