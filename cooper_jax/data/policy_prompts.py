r"""The policy's prompt for a problem: one rendering for training, evaluation, benchmarks and annotation.

1. The user's message is the question with `data.instruction` behind it.  A problem whose data has the prompt
   as messages is asked with these messages as they are, without the instruction.
2. `data.system` is a system message in front of it; it replaces that of the data.
3. The chat template encodes the messages; `data.thinking` is its variable `enable_thinking`.  Without a chat
   template (`data.chat=False`) the prompt is the messages' text, each followed by a newline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from cooper_jax.settings import typed_config
from cooper_jax.types import Problem

# data.thinking -> variables of the chat template, by the name that Qwen3's template uses.
_THINKING: dict[str, dict[str, Any]] = {
    "": {},
    "on": {"enable_thinking": True},
    "off": {"enable_thinking": False},
}


class ChatEncoder(Protocol):
    """The methods of `cooper_jax.model.tokenizer.Tokenizer` that this module uses."""

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def chat(
        self, messages: Sequence[tuple[str, str]], fallback: bool, variables: Mapping[str, Any] | None = None
    ) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """Settings of the policy's prompts: fields of the config's section `data`."""

    instruction: str  # follows the question
    system: str  # system message; "": none, or that of the data
    chat: bool  # use the tokenizer's chat template
    thinking: str  # on, off, or "" for the template's default

    def __post_init__(self) -> None:
        errors = []
        if self.thinking not in _THINKING:
            errors.append(f"data.thinking={self.thinking!r}: it must be on, off or empty")
        if self.thinking and not self.chat:
            errors.append(
                f"data.thinking={self.thinking!r} is a variable of the chat template, and data.chat=False uses "
                "none: set one of them back"
            )
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> PromptStyle:
        """Read the section `data`.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "data")


def make_policy_messages(
    question: str, messages: Sequence[tuple[str, str]], style: PromptStyle
) -> list[tuple[str, str]]:
    """Make the messages of a prompt.  messages: those of the data; if empty, the question is asked."""
    made = list(messages) or [("user", question + style.instruction)]
    if not style.system:
        return made
    return [("system", style.system), *(made[1:] if made[0][0] == "system" else made)]


def encode_policy_prompt(tok: ChatEncoder, problem: Problem, style: PromptStyle) -> list[int]:
    """Encode the policy's prompt for a problem, up to the response."""
    messages = make_policy_messages(problem.question, problem.messages, style)
    if style.chat:
        return tok.chat(messages, fallback=False, variables=_THINKING[style.thinking])
    return encode_plain_text(tok, "".join(f"{content}\n" for _, content in messages))


def encode_plain_text(tok: ChatEncoder, text: str) -> list[int]:
    """Encode a text as it stands, behind the model's bos id if it has one."""
    start = [] if tok.bos_id is None else [tok.bos_id]
    return start + tok.encode(text)


def check_thinking(tok: ChatEncoder, style: PromptStyle) -> None:
    """Raise ValueError if `data.thinking` is set and the chat template does not read it."""
    if not style.thinking:
        return
    prompts = [tok.chat([("user", "1+1?")], fallback=False, variables=_THINKING[v]) for v in ("on", "off")]
    if prompts[0] == prompts[1]:
        raise ValueError(
            f"data.thinking={style.thinking!r}: the policy's chat template does not read enable_thinking: set "
            '--config.data.thinking=""'
        )
