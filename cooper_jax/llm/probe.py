"""One question to a server before a job begins, so that a wrong address, model or key ends it at once."""

from __future__ import annotations

import dataclasses
import time

from cooper_jax.llm.chat import ChatConfig, OpenAIChat
from cooper_jax.llm.chat_replies import Failure, Reply
from cooper_jax.runtime import hosts

QUESTION = (("user", "Reply with the word: ready"),)
MAX_TOKENS = 16
# Reasons for which a later request may well be answered: a busy server, or a reply that is no text.
_PASSING = ("http_429", "empty", "nonsense", "truncated")
# A server that loads its model refuses connections, or answers that it is not ready.
_STARTING = ("connection", "unavailable", "http_502", "http_503")
PAUSE = 2.0  # seconds between two questions to a server that is starting
MIN_TIMEOUT = 1.0  # seconds for the last of them


def probe_server(cfg: ChatConfig, start_timeout: float = 0.0) -> None:
    """Ask the server one question.  Raises ValueError if it does not answer, and hosts.Stopped after SIGTERM.

    A server that is busy, or that answers without text, is there: its replies are counted during the run.  Every
    host asks for itself, and all wait as long as one of them has to.

    start_timeout: seconds in which a server that is starting is asked again.
    """
    deadline = time.monotonic() + start_timeout
    reply, words = _ask_once(cfg, start_timeout)
    told = False
    while _must_wait(reply, deadline):
        if not told and isinstance(reply, Failure):
            limit = f"for at most {start_timeout:g} s"
            hosts.print_once(
                f"waiting for {cfg.address}, which does not answer yet ({reply.reason}), {limit}"
            )
            told = True
        time.sleep(max(0.0, min(PAUSE, deadline - time.monotonic())))
        hosts.raise_if_stopping()
        reply, words = _ask_once(cfg, max(deadline - time.monotonic(), MIN_TIMEOUT))

    if not isinstance(reply, Failure) or reply.reason in _PASSING:
        return
    key = f"the key in {cfg.key_env}" if cfg.read_key() else "no key"
    said = f"; it says: {words}" if words else ""
    raise ValueError(
        f"{cfg.address} does not answer ({reply.reason}, asked for model {cfg.model!r} with {key}){said}: check "
        f"--config.{cfg.name}.url, .model, .key_env and .fields, wait longer for a server that is starting with "
        f"--config.{cfg.name}.start_timeout=SECONDS, or go on without the question with "
        f"--config.{cfg.name}.probe=False"
    )


def _must_wait(reply: Reply, deadline: float) -> bool:
    """True if the server of some host is starting, and the first host has time left.  Collective."""
    is_starting = isinstance(reply, Failure) and reply.reason in _STARTING
    own = bytes([is_starting, time.monotonic() < deadline])
    answers = hosts.exchange_bytes("assistant probe", own)
    return bool(answers[0][1]) and any(answer[0] for answer in answers)


def _ask_once(cfg: ChatConfig, seconds: float) -> tuple[Reply, str]:
    """The reply to the question, and the server's own words if it refused it.

    seconds: left for a server that is starting, whose question is not repeated; 0: as any other question.
    """
    if seconds > 0:
        cfg = dataclasses.replace(cfg, retries=0, timeout=min(cfg.timeout, seconds))
    # A client of its own for each question: the circuit breaker would hold back the next one.
    chat = OpenAIChat(cfg)
    try:
        reply = chat.ask([QUESTION], [(0, 0, 0, 0)], [MAX_TOKENS])[0]
        return reply, chat.server_words.get(reply.reason, "") if isinstance(reply, Failure) else ""
    finally:
        chat.close()
