"""Requests to servers that never finish: each ends within its time, whatever the server sends."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time

import pytest
from chat_server import Server

from cooper_jax.configs import base
from cooper_jax.llm import chat as chats
from cooper_jax.llm.chat_replies import Failure
from cooper_jax.llm.circuit_breaker import FAILURES, FIRST_PAUSE, CircuitBreaker
from cooper_jax.types import Completion

MESSAGES = (("user", "Hello"),)
REPLY = json.dumps(
    {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
).encode()


def open_chat(url: str, **changes) -> chats.OpenAIChat:
    section = base.get_config().assistant
    section.update(kind="openai", url=url, model="m", timeout=1.0, retries=0, concurrency=4, **changes)
    return chats.OpenAIChat(chats.ChatConfig.from_config(section, "assistant"))


class Trickle:
    """Accepts connections and sends `first`, then `piece` every 50 ms, for ever."""

    def __init__(self, first: bytes, piece: bytes):
        self._first, self._piece = first, piece
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._send, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _send(self, connection):
        # The client goes away in the middle.
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(self._first)
            while True:
                time.sleep(0.05)
                connection.sendall(self._piece)

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize(
    "first, piece",
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Slow: 1\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["status line", "headers", "1xx", "body", "chunks"],
)
def test_a_reply_that_trickles_ends_with_its_time(first, piece):
    server = Trickle(first, piece)
    chat = open_chat(server.url)
    try:
        # The first form is no HTTP at all once it is long enough, which ends the request earlier.
        assert chat.ask([MESSAGES] * 2, [(0, 1, row, 0) for row in range(2)]) == [Failure("timeout")] * 2
    finally:
        chat.close()  # waits for all threads
        server.close()


def test_connections_are_kept_and_compressed_replies_refused():
    def script(n, body):
        if n == 2:
            return 200, {"Content-Encoding": "gzip"}, gzip.compress(REPLY)
        return 200, {}, REPLY

    server = Server(script)
    chat = open_chat(server.url)
    try:
        replies = [chat.ask([MESSAGES], [(0, 1, row, 0)])[0] for row in range(4)]
        yes = Completion("yes", truncated=False, tokens=1)
        assert replies == [yes, yes, Failure("compressed"), yes]
        assert all(headers["Accept-Encoding"] == "identity" for _, headers, _ in server.requests)
    finally:
        chat.close()


def test_a_server_that_does_not_answer_is_left_alone_for_a_while():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    chat = open_chat(f"http://127.0.0.1:{port}/v1")
    try:
        replies = [chat.ask([MESSAGES], [(0, 1, row, 0)])[0].reason for row in range(FAILURES + 2)]
    finally:
        chat.close()
    assert replies == ["connection"] * FAILURES + ["unavailable"] * 2


def test_a_breaker_tries_again_after_ever_longer_pauses():
    now = 0.0
    breaker = CircuitBreaker(clock=lambda: now)
    for _ in range(FAILURES):
        assert breaker.admit()
        breaker.report(answered=False)
    assert not breaker.admit()
    now = FIRST_PAUSE
    assert breaker.admit() and not breaker.admit(), "one trial at a time"
    breaker.report(answered=False)
    now = 2.5 * FIRST_PAUSE
    assert not breaker.admit(), "the second pause is twice as long"
    now = 3 * FIRST_PAUSE
    assert breaker.admit()
    breaker.report(answered=True)
    assert breaker.admit() and breaker.admit()
