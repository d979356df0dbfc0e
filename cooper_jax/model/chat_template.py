"""Chat templates with untrusted messages: which control tokens are the template's own, and which are data.

1. `hiding` replaces control tokens in the messages by marks, so that the template cannot mix them up with
   those that it writes itself.
2. `render` runs the template.
3. `segments` cuts the outcome at its control tokens; all of them are the template's.
4. The text between them gets its marks resolved and is encoded by one of the `data_encoders`, which know
   no control tokens.

Templates that print today's date (Llama 3.2's) get a fixed one, `DATE`: a run resumed tomorrow must see the
prompts it saw today.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = tuple[str, str]  # (role, content)

DATE = datetime.date(2024, 7, 26)  # what Llama 3.2's template itself falls back to


def make_data_encoders(spec: dict, control: Mapping[str, Any]):
    """Two backends that read control tokens as text: for a text's beginning, and for what follows a token.

    `encode_special_tokens` passes over tokens flagged special only, so here all control tokens get that flag.
    The two differ where a space is put before the first word and before no other.
    """
    from tokenizers import Tokenizer as Backend

    added = [{**t, "special": True} if t["content"] in control else t for t in spec["added_tokens"]]
    text = json.dumps({**spec, "added_tokens": added, "truncation": None, "padding": None})
    first = Backend.from_str(text)
    first.encode_special_tokens = True
    pre = json.dumps(spec["pre_tokenizer"])
    if '"prepend_scheme": "first"' not in pre:
        return first, first
    pre = pre.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    inner = Backend.from_str(json.dumps({**json.loads(text), "pre_tokenizer": json.loads(pre)}))
    inner.encode_special_tokens = True
    return first, inner


def _fixed_date() -> str:
    """A Jinja macro that stands before a template and hides transformers' strftime_now.

    The empty expression at its end keeps Jinja from taking the template's first newline for the macro's.
    """
    codes = ("%Y", "%y", "%m", "%d", "%j", "%B", "%b", "%A", "%a", "%H", "%I", "%M", "%S", "%p")
    filters = "".join(f" | replace({code!r}, {DATE.strftime(code)!r})" for code in codes)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}{{{{ '' }}}}"


def render_chat(
    hf, messages: Sequence[Message], generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """The text of messages in the chat template of `hf`, a `transformers` tokenizer.

    Raises ValueError if the template refuses them, ImportError without jinja2.
    """
    try:
        return hf.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=_fixed_date() + hf.get_chat_template(),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **variables,
        )
    except ImportError:  # jinja2 is missing: that is not the template's fault
        raise
    except Exception as e:  # a template may refuse a role with an error of its own, or be broken in any way
        name = hf.name_or_path or "this tokenizer"
        raise ValueError(f"{name}: its chat template refused the messages: {e}") from e


def find_turn_end(hf, control: Mapping[str, Any]) -> int | None:
    """The control token that the chat template writes after the assistant's words, if any."""
    if not hf.chat_template:
        return None
    text = render_chat(hf, [("user", "question"), ("assistant", "the-assistants-words")], False, {})
    _, _, rest = text.rpartition("the-assistants-words")
    token = split_segments(rest, control)[0][1]
    return control[token]["id"] if token else None


def _matcher(tokens: Iterable[str]) -> re.Pattern:
    """Leftmost, then longest, as the tokenizers library finds its added tokens."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def split_segments(text: str, control: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Cut text at its control tokens: (text before, token), and (the rest, "") at the end."""
    out, at = [], 0
    for match in _matcher(control).finditer(text):
        before = text[at : match.start()]
        out.append((before.rstrip() if control[match.group()]["lstrip"] else before, match.group()))
        at = match.end()
        if control[match.group()]["rstrip"]:  # the token swallows the spaces behind it
            at += len(text[at:]) - len(text[at:].lstrip())
    return [*out, (text[at:], "")]


def hide_control_tokens(control: Mapping[str, Any], contents: Sequence[str]):
    """(hide, restore): control tokens in a message pass through the template as marks, then come back.

    A mark is the token's number between two private-use characters that no message contains.
    """
    fence = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if not any(c in text for text in contents))
    names = list(control)
    numbers = {name: i for i, name in enumerate(names)}
    find, mark = _matcher(names), re.compile(f"{fence}([0-9]+){fence}")
    return (
        lambda text: find.sub(lambda m: f"{fence}{numbers[m.group()]}{fence}", text),
        lambda text: mark.sub(lambda m: names[int(m.group(1))], text),
    )
