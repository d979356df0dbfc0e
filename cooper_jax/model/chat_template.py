"""Chat templates for untrusted messages: control tokens in a message's text are encoded as data.

1. `hide_control_tokens` replaces control tokens in the messages by placeholders, so that they cannot be
   mistaken for those that the template writes.
2. `render_chat` runs the template.
3. `split_segments` splits the rendered text at its control tokens; all of these were written by the template.
4. The caller restores the placeholders in the text between them, and encodes it with one of the
   `make_data_encoders`, which never return a control token.

Templates that print today's date (Llama 3.2's) print the fixed `DATE` instead, so that a run resumed tomorrow
builds the same prompts as today.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Message = tuple[str, str]  # (role, content)

# Printed by templates that ask for the current date.
DATE = datetime.date(2024, 7, 26)  # the default of Llama 3.2's own template


def make_data_encoders(spec: dict[str, Any], control: Mapping[str, Any]) -> tuple[Any, Any]:
    """Make two `tokenizers` backends that encode control tokens as ordinary text.

    The first encodes the beginning of a text, the second the text after a control token.  They differ for
    tokenizers that prepend a space to the first word only.

    Args:
      spec: the JSON of the original backend, parsed.
      control: the control tokens, by content.
    """
    from tokenizers import Tokenizer as Backend

    # `encode_special_tokens` applies only to tokens flagged special, so all control tokens get that flag.
    # Flags are part of the backend's JSON, so both encoders are new backends, made from edited JSON.
    added = [{**t, "special": True} if t["content"] in control else t for t in spec["added_tokens"]]
    first_spec = json.dumps({**spec, "added_tokens": added, "truncation": None, "padding": None})
    first = Backend.from_str(first_spec)
    first.encode_special_tokens = True

    # Text after a control token does not begin the prompt, so a space before its first word would be wrong.
    # Most tokenizers prepend none anywhere: both encoders are then the same object.
    pre_tokenizer = json.dumps(spec["pre_tokenizer"])
    if '"prepend_scheme": "first"' not in pre_tokenizer:
        return first, first
    pre_tokenizer = pre_tokenizer.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    later = Backend.from_str(
        json.dumps({**json.loads(first_spec), "pre_tokenizer": json.loads(pre_tokenizer)})
    )
    later.encode_special_tokens = True
    return first, later


def _fixed_date_macro() -> str:
    """Make a Jinja macro that overrides transformers' strftime_now; it is prepended to the template.

    Without the empty expression at its end, Jinja would drop a newline at the beginning of the template.
    """
    # Jinja has no strftime, so the macro replaces each format code by its value for DATE.
    codes = ("%Y", "%y", "%m", "%d", "%j", "%B", "%b", "%A", "%a", "%H", "%I", "%M", "%S", "%p")
    filters = "".join(f" | replace({code!r}, {DATE.strftime(code)!r})" for code in codes)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}{{{{ '' }}}}"


def render_chat(
    hf: Any, messages: Sequence[Message], generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """Render messages with the chat template of `hf`, a `transformers` tokenizer.

    Raises ValueError if the template rejects the messages, ImportError if jinja2 is not installed.
    """
    try:
        return hf.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=_fixed_date_macro() + hf.get_chat_template(),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **variables,
        )
    except ImportError:
        # jinja2 is missing, which is not the template's fault.
        raise
    except Exception as e:
        # Templates call raise_exception, and a broken one may raise any error of Python or Jinja.
        name = hf.name_or_path or "this tokenizer"
        raise ValueError(f"{name}: its chat template rejected the messages: {e}") from e


def find_turn_end(hf: Any, control: Mapping[str, Any]) -> int | None:
    """Return the id of the control token that the template writes after the assistant's message, if any."""
    if not hf.chat_template:
        return None

    # Render a conversation with a known answer: the first control token after the answer ends the turn.
    marker = "the-assistants-words"
    question = "the-users-words"
    text = render_chat(hf, [("user", question), ("assistant", marker)], False, {})
    # All prompts would be equal.
    if question not in text or marker not in text:
        raise ValueError(
            f"{hf.name_or_path or 'this tokenizer'}: its chat_template (in tokenizer_config.json or "
            "chat_template.jinja) leaves out what messages say: it must write the content of each"
        )
    _, _, after = text.rpartition(marker)
    token = split_segments(after, control)[0][1]
    return control[token]["id"] if token else None


def _make_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Make a pattern that finds the leftmost, then the longest token, as the tokenizers library does."""
    # Alternatives are tried in order, so longer tokens come first; "(?!)" never matches.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def split_segments(text: str, control: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Split text at its control tokens -> [(text before, token), ..., (text after the last, "")]."""
    # The flags lstrip and rstrip are those of `tokenizers.AddedToken`.
    segments, position = [], 0
    for match in _make_pattern(control).finditer(text):
        token = match.group()
        before = text[position : match.start()]
        if control[token]["lstrip"]:  # the token absorbs the spaces before it
            before = before.rstrip()
        segments.append((before, token))
        position = match.end()
        if control[token]["rstrip"]:  # the token absorbs the spaces after it
            position += len(text[position:]) - len(text[position:].lstrip())
    return [*segments, (text[position:], "")]


def hide_control_tokens(
    control: Mapping[str, Any], contents: Sequence[str]
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Make (hide, restore): `hide` replaces control tokens by placeholders, `restore` undoes it.

    A placeholder is the token's number between two copies of a private-use character that no message
    contains.
    """
    # Unicode's private-use plane 15 has 65,534 characters, so one is free for messages of any realistic
    # content.
    used_characters = set("".join(contents))
    delimiter = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used_characters)
    tokens = list(control)
    numbers = {token: i for i, token in enumerate(tokens)}
    token_pattern = _make_pattern(tokens)
    placeholder_pattern = re.compile(f"{delimiter}([0-9]+){delimiter}")

    def hide(text: str) -> str:
        return token_pattern.sub(lambda m: f"{delimiter}{numbers[m.group()]}{delimiter}", text)

    def restore(text: str) -> str:
        return placeholder_pattern.sub(lambda m: tokens[int(m.group(1))], text)

    return hide, restore
