"""Conversations with language models, weights of our own among them: the rollout engine behind llm/chat.py.

`open_chat` opens the assistant, judge or source of a config, a server or local; `local_generate` loads a local one
and samples its replies, many at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from cooper_jax.llm import chat as chats
from cooper_jax.model.loading import Directory, load_model
from cooper_jax.rollout import engine
from cooper_jax.runtime import hosts, keys, mesh
from cooper_jax.runtime.device_layouts import get_rollout_options
from cooper_jax.settings.setup_errors import Problems, setup_errors


def open_chat(cfg: ConfigDict, name: str, layout: mesh.Layout, run_dir: Directory) -> chats.Chat:
    """The language model of the config's section `name`: assistant, judge or source.

    A local one is loaded onto `layout`.  Raises SetupError; the caller closes it.
    """
    asked = read_chat_config(cfg, name)
    with setup_errors(name):
        generate = make_local_generate(cfg, asked, layout, run_dir) if asked.kind == "local" else None
        return chats.make_chat(asked, generate)


def read_chat_config(cfg: ConfigDict, name: str) -> chats.ChatConfig:
    """Read the section of a language model; nothing is loaded.  Raises SetupError with all that is wrong."""
    section, problems = cfg[name], Problems()
    problems.need(
        section.kind != "local" or section.weights not in ("", "random"),
        f"{name}.weights={section.weights!r}: a local {name} needs trained weights: give "
        f"--config.{name}.weights=DIR, a hub id or a .gguf file, or ask a server (--config.{name}.kind=openai)",
    )
    with problems.collect(name):
        asked = chats.ChatConfig.from_config(section, name)
    problems.raise_if_any()
    return asked


def make_local_generate(
    cfg: ConfigDict, asked: chats.ChatConfig, layout: mesh.Layout, run_dir: Directory
) -> chats.Generate:
    """Sampling from the weights of a section, `asked.name`: (messages of each request, their ids) -> replies.

    ids are (seed, step, row, attempt), row below 2^31; requests that share all but the row are sampled together.
    Conversations that are too long are refused: Failure("too_long").
    """
    section, name, told = cfg[asked.name], asked.name, asked.template_variables
    lengths = {f"{name}.max_new_tokens": asked.max_new_tokens}
    if asked.max_prompt_tokens:
        lengths = {f"{name}.max_prompt_tokens": asked.max_prompt_tokens, **lengths}
    model, params, _ = load_model(section, name, "logits", layout, run_dir, cfg.seed, lengths)
    params = engine.copy_rollout_weights(params, model.config, layout, section.dtype)
    spec = engine.SamplingSpec.for_nucleus(
        cfg.rollout,
        model.tokenizer.eos_ids,
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_new_tokens=asked.max_new_tokens,
        group_size=1,
        dtype=section.dtype,
    )
    room = sys.maxsize if model.config.max_len is None else model.config.max_len - asked.max_new_tokens
    most = asked.max_prompt_tokens or room
    if most < 1:
        raise ValueError(
            f"--config.{name}.max_new_tokens={asked.max_new_tokens} leaves no room for a conversation: the model "
            f"was trained for {model.config.max_len} tokens in all"
        )

    def generate(messages: Sequence[chats.Messages], ids: Sequence[chats.Ids]) -> list[chats.Reply]:
        rows = [model.tokenizer.chat(m, fallback=True, variables=told) for m in messages]
        replies: list[chats.Reply] = [chats.Failure("too_long")] * len(rows)
        together: dict[tuple[int, int, int], list[int]] = {}
        for i, (seed, step, _, attempt) in enumerate(ids):
            if len(rows[i]) <= most:
                together.setdefault((seed, step, attempt), []).append(i)
        for (seed, step, attempt), members in together.items():
            rollout = engine.generate(
                params, model.config, layout, [rows[i] for i in members], [ids[i][2] for i in members],
                keys.make_key(seed, name, step, attempt), spec,
                between_segments=hosts.raise_if_stopping, **get_rollout_options(cfg),
            )  # fmt: skip
            for i, text in zip(
                members, engine.decode_completions(rollout, model.tokenizer.decode, spec.eos_ids), strict=True
            ):
                replies[i] = text
        return replies

    return generate
