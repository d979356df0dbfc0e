"""Chat models of a config, including local ones: our own weights on the rollout engine.

1. `read_chat_config` reads and checks the config section of the assistant, judge or source.
2. `open_chat` opens the model that the section describes: a server, or local weights.
3. `make_local_generate` loads local weights, and returns the function that samples replies in batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from cooper_jax.llm import chat as chats
from cooper_jax.model.loading import Directory, load_model
from cooper_jax.rollout import engine, rollout_plan
from cooper_jax.rollout.rollout_config import RolloutConfig
from cooper_jax.runtime import hosts, keys, mesh
from cooper_jax.settings.setup_errors import ErrorCollector, setup_errors


def open_chat(cfg: ConfigDict, name: str, layout: mesh.Layout, run_dir: Directory) -> chats.Chat:
    """Open the chat model of the config section `name`: assistant, judge or source.  The caller closes it.

    A local model is loaded onto `layout`.  Raises SetupError for settings or weights that cannot be used.
    """
    chat_cfg = read_chat_config(cfg, name)
    with setup_errors(name):
        generate = None
        if chat_cfg.kind == "local":
            generate = make_local_generate(cfg, chat_cfg, layout, run_dir)
        return chats.make_chat(chat_cfg, generate)


def read_chat_config(cfg: ConfigDict, name: str) -> chats.ChatConfig:
    """Read and check the section of a chat model; loads nothing.  Raises SetupError with all problems."""
    section = cfg[name]
    errors = ErrorCollector()

    # "random" is a model of the shape in `arch`, which is for tests of the trainer.
    errors.require(
        section.kind != "local" or section.weights not in ("", "random"),
        f"{name}.weights={section.weights!r}: a local {name} needs trained weights: give "
        f"--config.{name}.weights=DIR, a hub id or a .gguf file, or use a server "
        f"(--config.{name}.kind=openai)",
    )
    with errors.collect(name):
        chat_cfg = chats.ChatConfig.from_config(section, name)
    errors.raise_if_any()
    return chat_cfg


def make_local_generate(
    cfg: ConfigDict, chat_cfg: chats.ChatConfig, layout: mesh.Layout, run_dir: Directory
) -> chats.Generate:
    """Load the weights of the section `chat_cfg.name`; returns a function (conversations, ids) -> replies.

    ids are (seed, step, row, attempt) with row < 2^31.  Requests that differ only in the row form one
    batch.  Successive attempts of one conversation that follow each other are samples of one prompt: they share its
    prefill.  A conversation that is too long gets Failure("too_long").

    Raises ValueError if `max_new_tokens` leaves no room for a conversation, and what load_model raises.
    """
    name = chat_cfg.name
    section = cfg[name]

    # load_model checks the sum of these lengths against the model's context length.
    # Without a limit for all requests, the limit is one that no request exceeds: a positive has at most as many
    # words as tokens.
    max_new_tokens, limit_name = chat_cfg.max_new_tokens, f"{name}.max_new_tokens"
    if not max_new_tokens:
        max_new_tokens = cfg.rollout.max_new_tokens + chats.EXTRA_TOKENS
        limit_name = f"rollout.max_new_tokens + {chats.EXTRA_TOKENS} ({limit_name}=0)"
    lengths = {limit_name: max_new_tokens}
    if chat_cfg.max_prompt_tokens:
        lengths = {f"{name}.max_prompt_tokens": chat_cfg.max_prompt_tokens, **lengths}
    model, params, _ = load_model(section, name, "logits", layout, run_dir, cfg.seed, lengths)

    # The rollout engine reads the weights in the section's dtype and with a sharding of its own.
    params = engine.copy_rollout_weights(params, model.config, layout, section.dtype)

    # Engine options come from the `rollout` section, sampling parameters from the model's own section.
    rollout_cfg = RolloutConfig.from_config(cfg.rollout)
    spec = rollout_cfg.make_sampling_spec(
        model.tokenizer.eos_ids,
        temperature=chat_cfg.temperature,
        top_k=0,
        top_p=chat_cfg.top_p,
        min_p=0.0,
        max_new_tokens=max_new_tokens,
        group_size=1,
        dtype=section.dtype,
    )

    # The conversation and the reply share the model's context length.
    room = sys.maxsize
    if model.config.max_len is not None:
        room = model.config.max_len - max_new_tokens
    max_prompt_tokens = chat_cfg.max_prompt_tokens or room
    if max_prompt_tokens < 1:
        raise ValueError(
            f"--config.{name}.max_new_tokens={max_new_tokens} leaves no room for a conversation: "
            f"the model was trained for {model.config.max_len} tokens in all"
        )

    variables = chat_cfg.template_variables
    options = rollout_cfg.make_engine_options()

    def generate(conversations: Sequence[chats.Messages], ids: Sequence[chats.Ids]) -> list[chats.Reply]:
        # Replies are in the order of the requests; those not sampled below keep this Failure.
        prompts = [model.tokenizer.chat(c, fallback=True, variables=variables) for c in conversations]
        replies: list[chats.Reply] = [chats.Failure("too_long")] * len(prompts)

        # A rollout has one random key and one number of samples for all its prompts.
        batches: dict[tuple[int, int, int, int], list[list[int]]] = {}
        for members in _group_attempts(prompts, ids):
            if len(prompts[members[0]]) <= max_prompt_tokens:
                seed, step, _, attempt = ids[members[0]]
                batches.setdefault((seed, step, attempt, len(members)), []).append(members)

        for (seed, step, attempt, samples), groups in batches.items():
            # Batches differ in number and length; few sizes of programs serve them all.
            firsts = [members[0] for members in groups]
            longest = rollout_plan.choose_shared_width(max(len(prompts[i]) for i in firsts), layout.platform)
            shapes = engine.SharedShapes(
                longest_prompt=min(longest, max_prompt_tokens),
                num_prompts=rollout_plan.choose_shared_prompts(len(groups), layout.platform),
            )
            rollout = engine.generate(
                params,
                model.config,
                layout,
                [prompts[i] for i in firsts],
                [ids[i][2] for i in firsts],
                keys.make_key(seed, name, step, attempt),
                dataclasses.replace(spec, group_size=samples),
                shapes=shapes,
                between_segments=hosts.raise_if_stopping,
                **options,
            )
            completions = engine.decode_completions(rollout, model.tokenizer.decode, spec.eos_ids)
            for i, completion in zip(itertools.chain(*groups), completions, strict=True):
                replies[i] = completion
        return replies

    return generate


def _group_attempts(prompts: Sequence[Sequence[int]], ids: Sequence[chats.Ids]) -> list[list[int]]:
    """Group the indices of requests that follow each other and differ in the attempt alone, each by one more.

    prompts: the tokens of each conversation.
    """
    groups: list[list[int]] = []
    for i, (*request, attempt) in enumerate(ids):
        previous = groups[-1][-1] if groups else None
        if (
            previous is not None
            and ids[previous] == (*request, attempt - 1)
            and list(prompts[previous]) == list(prompts[i])
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
