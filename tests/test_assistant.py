"""Assistants: number edits that keep length and layout, and a client that survives whatever a server does."""

import logging
import socket
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from chat_server import Server
from chat_server import reply as chat

from cooper_jax.configs import base
from cooper_jax.data import prompts
from cooper_jax.llm import chat as chats
from cooper_jax.reward import assistants
from cooper_jax.reward.assistants import Failure, Request
from cooper_jax.reward.corruption import corrupt_answer
from cooper_jax.settings import cross_checks
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Completion, Problem

PROBLEM = Problem("How many?", "20")


def request(row=0, attempt=0, positive="14 + 6 = 20 #### 20"):
    return Request(PROBLEM, positive, (7, 3, row, attempt))


# --- corrupt -----------------------------------------------------------------------------------------------

EDITS = [
    # text, its parts that must stay, split at the numbers that must change together
    ("14 + 6 = 20 #### 20", "14 + 6 = {} #### {}"),
    ("7 * 2 = 14 ; 14 + 6 = 20 # 20", "7 * 2 = 14 ; 14 + 6 = {} # {}"),
    ("x = 20. So 20 in all: \\boxed{20 \\text{ cups}}", "x = {}. So {} in all: \\boxed{{{} \\text{{ cups}}}}"),
    ("20 cups, 4 * 5 = 20.\n#### 20", "20 cups, 4 * 5 = {}.\n#### {}"),
    ("The answer is $20.", "The answer is ${}."),
    ("we are left with 20", "we are left with {}"),
    ("#### 1,000", "#### {}"),
    ("= 123456789012345678 #### 123456789012345678", "= {} #### {}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "pattern"), EDITS)
def test_corrupt_changes_the_answer_and_the_result_before_it(text, pattern):
    seen = set()
    for seed in range(20):
        new = corrupt_answer(text, np.random.default_rng(seed))
        assert len(new) == len(text)
        holes = pattern.count("{}")
        candidates = {f"{n:,}" for n in range(950, 1051)} | {str(n) for n in range(0, 41)}
        candidates |= {str(123456789012345678 + d) for d in range(-20, 21)}
        matches = [n for n in candidates if pattern.format(*[n] * holes) == new]
        assert len(matches) == 1 and new != text
        seen.add(matches[0])
    assert len(seen) >= 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 57.6", "57.6"),
        ("#### 20.0", "20"),
        ("#### 20 .0", "20"),
        ("#### 0.05", "0.05"),
        ("#### 0", "0"),
    ],
)
def test_corrupt_keeps_the_decimals(text, value):
    for seed in range(20):
        new = corrupt_answer(text, np.random.default_rng(seed))
        number = Fraction(new[5:].replace(" ", ""))
        assert len(new) == len(text) and new.find(".") == text.find(".")
        assert 0 < abs(number - Fraction(value)) <= 20 and number >= 0
        if text.endswith(".0"):
            assert new.endswith(".0")


def test_corrupt_moves_fractions_words_and_their_results():
    for seed in range(20):
        top, bottom = corrupt_answer("\\boxed{\\frac{3}{4}}", np.random.default_rng(seed))[13:-2].split("}{")
        assert bottom == "4" and top != "3"
        new = corrupt_answer("14 + 6 = 20 #### 40 / 2", np.random.default_rng(seed))
        result, _, over = new[9:].partition(" #### ")
        assert over.endswith(" / 2") and int(over[:-4]) == 2 * int(result) != 40
        new = corrupt_answer("14 + 6 = 20 #### Twenty", np.random.default_rng(seed))
        words = {"Thirty": 30, "Eighty": 80, "Ninety": 90, "Eleven": 11, "Twelve": 12}
        result, _, word = new[9:].partition(" #### ")
        assert words[word] == int(result)
        assert corrupt_answer("#### forty-two", np.random.default_rng(seed))[5:] != "forty-two"
        box = corrupt_answer("so 4a-2 = \\boxed{4a-2}", np.random.default_rng(seed))
        assert box.startswith("so 4a-2 = \\boxed{") and box != "so 4a-2 = \\boxed{4a-2}"


@pytest.mark.parametrize(
    "text", ["", "no number", "\\boxed{x}", "2 + 2 gives \\boxed{n}", "\\boxed{\\frac{1}{0}}"]
)
def test_corrupt_has_nothing_to_change(text):
    assert corrupt_answer(text, np.random.default_rng(0)) is None
    assert assistants.make_assistant(config("corrupt")).rewrite([request(positive=text)]) == [
        Failure("nothing to change")
    ]


def test_corrupt_refuses_a_number_that_python_does_not_read():
    """Of over 4,300 digits: the policy may write one, and it is a ValueError."""
    (reply,) = assistants.CorruptingAssistant().rewrite([request(positive=f"#### {'7' * 5000}")])
    assert reply == Failure("nothing to change")


def test_corrupt_depends_on_ids_alone():
    helper = assistants.make_assistant(config("corrupt"))
    together = helper.rewrite([request(row, attempt) for row in range(10) for attempt in range(2)])
    assert together[::-1] == [
        helper.rewrite([request(row, a)])[0] for row in range(9, -1, -1) for a in (1, 0)
    ]
    assert len({reply.text for reply in together}) >= 4


# --- make ----------------------------------------------------------------------------------------------------


def config(kind, **fields):
    cfg = base.get_config().assistant
    cfg.kind = kind
    cfg.update(fields)
    return chats.ChatConfig.from_config(cfg, "assistant")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("psychic", {}, "assistant.kind='psychic'"),
        ("local", {}, "kind=local"),
        ("openai", dict(model="m"), "set --config.assistant.url"),
        ("openai", dict(url="http://127.0.0.1/v1"), "set --config.assistant.model"),
        ("openai", dict(url="127.0.0.1", model="m"), "must begin with http"),
        ("openai", dict(url="http://host:abc/v1", model="m"), "assistant.url='http://host:abc/v1'"),
        ("openai", dict(url="http:///v1", model="m"), "names no host"),
        ("openai", dict(url="http://name:word@h/v1", model="m"), "contains a name or a password"),
        ("openai", dict(url="http://h/v1", model="m", concurrency=0), "assistant.concurrency=0"),
        ("openai", dict(url="http://h/v1", model="m", retries=-1), "assistant.retries=-1"),
        ("openai", dict(url="http://h/v1", model="m", timeout=0.0), "assistant.timeout=0.0"),
    ],
)
def test_make_refuses_with_the_flag_to_set(kind, fields, message):
    with pytest.raises(ValueError) as caught:
        assistants.make_assistant(config(kind, **fields))
    assert message in str(caught.value)


def test_all_problems_of_a_server_are_named_at_once():
    with pytest.raises(SetupError) as caught:
        config("openai", timeout=-1.0, thinking="maybe")
    fields = ("thinking='maybe'", "kind=openai: set --config.assistant.url", "timeout=-1.0")
    assert all(f"assistant.{field}" in str(caught.value) for field in fields)
    assert len(caught.value.messages) == 4  # and no model is named


def test_local_parses_replies_and_keeps_truncation():
    got = {}

    def generate(messages, ids):
        got["messages"], got["ids"] = messages, ids
        return [
            Completion("Sure!\nIt is 21.", tokens=5),
            Completion("It is", truncated=True),
            Completion("  "),
        ]

    replies = assistants.make_assistant(config("local"), generate).rewrite([request(row) for row in range(3)])
    assert replies == [
        Completion("It is 21.", tokens=5),
        Completion("It is", truncated=True),
        Failure("empty"),
    ]
    assert got["ids"] == [(7, 3, row, 0) for row in range(3)]
    assert got["messages"][0] == prompts.make_negative_messages("How many?", "20", "14 + 6 = 20 #### 20")
    with pytest.raises(ValueError, match="2 completions to 1"):
        assistants.make_assistant(config("local"), lambda m, i: [Completion("a")] * 2).rewrite([request()])


def test_the_prompts_differ_in_what_they_ask_for_and_show():
    def text(name):
        ((role, text),) = assistants.make_rewrite_messages(request(positive="So 6 * 7 = 42 ."), name)
        assert role == "user" and "How many?" in text and "So 6 * 7 = 42 ." in text
        return text

    assert "one plausible mistake" in text("careful") and "\n20\n" in text("careful")
    assert "wrong from its beginning to its end" in text("released") and "20" not in text("released")


@pytest.mark.parametrize("name", ["careful", "released"])
def test_no_rewrite_of_a_long_positive_is_cut(name):
    """The limit is the positive's number of words + 500, and a local reply beyond its own is truncated."""
    requests = [request(0, positive="word " * 3), request(1, positive="word " * 2000), request(2)]
    replies = [Completion("a", tokens=504), Completion("b", tokens=2500), Completion("c", tokens=507)]
    rewrite = assistants.RewriteConfig(name, probe=False)
    made = assistants.make_assistant(config("local"), lambda messages, ids: replies, rewrite)
    assert [reply.truncated for reply in made.rewrite(requests)] == [True, False, False]
    limited = assistants.make_assistant(
        config("local", max_new_tokens=600), lambda messages, ids: replies, rewrite
    )
    assert limited.rewrite(requests) == replies


def test_an_unknown_prompt_and_a_limit_that_cuts_are_refused():
    section = base.get_config().assistant
    assert assistants.RewriteConfig.from_config(section).prompt == "careful"
    section.prompt = "rude"
    with pytest.raises(SetupError, match="assistant.prompt='rude': it is one of careful, released"):
        assistants.RewriteConfig.from_config(section)
    with pytest.raises(SetupError, match="assistant.max_new_tokens=-1: it must be at least 0"):
        config("local", max_new_tokens=-1)
    judge = base.get_config().judge
    judge.max_new_tokens = 0
    with pytest.raises(SetupError, match="judge.max_new_tokens=0: it must be at least 1"):
        chats.ChatConfig.from_config(judge, "judge")

    cfg = base.get_config()
    cfg.assistant.update(kind="local", weights="somewhere", max_new_tokens=511)
    with pytest.raises(SetupError, match="assistant.max_new_tokens=511 cuts the rewrites .* 512 tokens"):
        cross_checks.check_cross_sections(cfg)
    for limit in (0, 512):
        cfg.assistant.max_new_tokens = limit
        cross_checks.check_cross_sections(cfg)


# --- openai ----------------------------------------------------------------------------------------------------


@pytest.fixture
def openai(monkeypatch):
    """(script, config fields) -> (client, server), closed afterwards."""
    monkeypatch.setattr(chats, "BACK_OFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("THE_KEY", "sk-secret")
    made = []

    def make(script, **fields):
        server = Server(script)
        made.append(server)
        fields = {"url": server.url, "model": "m", "timeout": 5.0, "key_env": "THE_KEY", **fields}
        client = assistants.make_assistant(config("openai", **fields))
        made.append(client)
        return client, server

    yield make
    for thing in reversed(made):
        thing.close()


def test_openai_sends_what_it_should(openai):
    client, server = openai(lambda n, body: chat("It is 21."), temperature=0.5, top_p=0.9, max_new_tokens=17)
    assert client.rewrite([request()]) == client.rewrite([request()]) == [Completion("It is 21.", False, 3)]
    client.rewrite([request(row=1)])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 0.5, 0.9, 17)
    sent = [(m["role"], m["content"]) for m in body["messages"]]
    assert sent == prompts.make_negative_messages("How many?", "20", "14 + 6 = 20 #### 20")
    by_words, other = openai(lambda n, body: chat("It is 21."))
    by_words.rewrite([request(), request(1, positive="word " * 700)])
    assert sorted(body["max_tokens"] for _, _, body in other.requests) == [507, 1200]
    seeds = [body["seed"] for _, _, body in server.requests]
    assert seeds[0] == seeds[1] != seeds[2]


def test_openai_needs_no_key(openai):
    client, server = openai(lambda n, body: chat("ok 3"), key_env="ABSENT_KEY_VARIABLE")
    assert client.rewrite([request()]) == [Completion("ok 3", False, 3)]
    assert "Authorization" not in server.requests[0][1]


def test_openai_keeps_order_and_the_concurrency_limit(openai):
    def script(n, body):
        row = int(body["messages"][0]["content"].split("ROW")[1].split()[0])
        time.sleep(0.05 + 0.02 * (row % 3))
        return chat(f"answer {row}")

    client, server = openai(script, concurrency=3)
    replies = client.rewrite([request(row, positive=f"ROW{row} 20") for row in range(12)])
    assert [reply.text for reply in replies] == [f"answer {row}" for row in range(12)]
    assert 2 <= server.most_open <= 3


def test_openai_waits_as_long_as_a_429_asks(openai):
    answers = [(429, {"Retry-After": "0.4"}, b""), chat("at last 5")]
    client, server = openai(lambda n, body: answers[n])
    start = time.monotonic()
    assert client.rewrite([request()]) == [Completion("at last 5", False, 3)]
    assert time.monotonic() - start >= 0.4 and len(server.requests) == 2


def test_openai_gives_up_on_a_broken_server(openai, caplog):
    client, server = openai(lambda n, body: (500, {}, b"sk-secret oops"), retries=2)
    with caplog.at_level(logging.DEBUG, logger=chats.__name__):
        assert client.rewrite([request()]) == client.rewrite([request()]) == [Failure("http_500")]
        client.report_failures()
        client.report_failures()  # there are none since the last report
    assert len(server.requests) == 6
    assert caplog.text.count("requests failed") == caplog.text.count("2 of 2 requests failed (http_500)") == 1
    assert "sk-secret" not in caplog.text


def test_openai_does_not_repeat_what_cannot_help(openai):
    client, server = openai(lambda n, body: (401, {}, b"{}"), retries=3)
    assert client.rewrite([request()]) == [Failure("http_401")] and len(server.requests) == 1


def test_openai_times_out(openai):
    release = threading.Event()

    def script(n, body):
        release.wait(20)
        return chat("late")

    client, server = openai(script, timeout=0.3)
    start = time.monotonic()
    assert client.rewrite([request(), request(1)]) == [Failure("timeout")] * 2
    assert time.monotonic() - start < 3.0
    release.set()
    assert len(server.requests) == 2


def reply_with_tokens(count: str) -> bytes:
    """A chat completion with a number of tokens, as a server would write it in JSON."""
    choice = '{"message": {"content": "x"}, "finish_reason": "stop"}'
    return f'{{"choices": [{choice}], "usage": {{"completion_tokens": {count}}}}}'.encode()


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (b"<html>hello</html>", Failure("nonsense")),
        (b"[]", Failure("nonsense")),
        (b"null", Failure("nonsense")),
        (b'{"choices": []}', Failure("nonsense")),
        (b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}', Failure("nonsense")),
        (reply_with_tokens("true"), Failure("nonsense")),
        (reply_with_tokens("-5"), Failure("nonsense")),
        (reply_with_tokens("1" + "0" * 400), Failure("nonsense")),
        (b"[" * 100_000, Failure("nonsense")),
        (b"\xff\xfe", Failure("nonsense")),
        (b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}', Failure("empty")),
        (b'{"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]}', Failure("empty")),
        (b'{"choices": [{"message": {"content": "<think>a"}, "finish_reason": "stop"}]}', Failure("malformed")),
        (b'{"choices": [{"message": {"content": "It is"}, "finish_reason": "length"}]}', Completion("It is", True)),
        (b'{"choices": [{"message": {"content": "\\ud83dIt is 21 \\ud83d\\ude00"}, "finish_reason": "stop"}]}',
         Completion("\ufffdIt is 21 \U0001f600")),
    ],
)  # fmt: skip
def test_openai_reads_any_body(openai, body, reply):
    client, _ = openai(lambda n, _: (200, {}, body))
    assert client.rewrite([request()]) == [reply]


def test_openai_down_is_a_failure(monkeypatch):
    monkeypatch.setattr(chats, "BACK_OFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = assistants.make_assistant(
        config("openai", url=f"http://127.0.0.1:{port}/v1", model="m", retries=1)
    )
    assert client.rewrite([request(), request(1)]) == [Failure("connection")] * 2
    client.close()


def test_openai_refuses_a_broken_key_without_showing_it(monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-sécret")
    with pytest.raises(ValueError, match="THE_KEY") as caught:
        assistants.make_assistant(config("openai", url="http://h/v1", model="m", key_env="THE_KEY"))
    assert "cret" not in str(caught.value)
