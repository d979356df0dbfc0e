r"""Prompts in a column of a data row: a question as text, or a whole prompt as a list of messages.

1. `read_prompt` reads a column as (question, messages).
2. A message is {"role": .., "content": ..} or, in ShareGPT's layout, {"from": .., "value": ..}.
3. The question is the last message of the user, without the instructions of published data sets; the reward
   model, the assistant and judges read it.  The policy reads the messages as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cooper_jax.data import answers, row_reader
from cooper_jax.data.row_reader import Row

Messages = tuple[tuple[str, str], ...]  # (role, content)

# Roles, ShareGPT's among them -> those of chat templates.
_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}

# Instructions around the questions of published data sets.
_BEFORE = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*"
)
_BEHIND = (
    re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.\s*\Z"),
    re.compile(
        r"\s*Let's think step by step and output the final answer (?:after \"####\"|within \\boxed\{\})\.?\s*\Z"
    ),
)


def read_prompt(row: Row, key: str) -> tuple[str, Messages]:
    """Read a prompt: (question, messages); the messages are empty for a prompt that is text.

    Raises ValueError that names the field for anything else, and for messages that do not end with the
    user's.  An answer of the assistant behind the user's last message is left out.
    """
    value = read_messages_text(row_reader.get_field(row, key))
    if not isinstance(value, list):
        return answers.clean_question(answers.strip_instruction(row_reader.get_text(row, key))), ()

    messages = [_read_message(item, f"{key}.{i}") for i, item in enumerate(value)]
    while messages and messages[-1][0] == "assistant":
        messages.pop()
    if not messages or messages[-1][0] != "user":
        raise ValueError(
            f"field {key!r} is a list of {len(value)} messages, the last of which is not the user's"
        )
    return answers.clean_question(strip_instructions(messages[-1][1])), tuple(messages)


def read_messages_text(value: Any) -> Any:
    """The list of messages that a text is the JSON of, as in a .csv file; any other value stays as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith("[{")):
        return value
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_chat = isinstance(items, list) and all(
        isinstance(item, dict) and item.keys() & {"role", "from"} for item in items
    )
    return items if is_chat else value


def strip_instructions(text: str) -> str:
    """Remove the instructions of published data sets in front of a question and behind it."""
    text = _BEFORE.sub("", text)
    for pattern in _BEHIND:
        text = pattern.sub("", text)
    return answers.strip_instruction(text)


def _read_message(item: Any, field: str) -> tuple[str, str]:
    """Read one message.  field: its place in the row, for messages."""
    if not isinstance(item, Mapping):
        raise ValueError(f"field {field!r} is a {type(item).__name__}, not a message with role and content")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    role, content = item.get(role_key), item.get(content_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"field '{field}.{role_key}' is {role!r}: it must be system, user or assistant")

    # Content as a list of parts, of which only texts can be read.
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(row_reader.get_text(part, "text") for part in content)
    if not isinstance(content, str):
        raise ValueError(f"field '{field}.{content_key}' is {type(content).__name__}: it must be text")
    row_reader.check_encodable(content, f"{field}.{content_key}")
    return _ROLES[role], content
